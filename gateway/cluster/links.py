"""The links of this node to others (link.py), by node_id, and what is asked over them.

Every ``heartbeat`` a link on which nothing came is pinged; it is cut when nothing came for ``lease``. When a link ends,
what was asked over it fails: CONNECTION_LOST, or NODE_UNREACHABLE (not sent) for what had certainly not left this node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, fail
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.cluster.asked import Asked, Question
from gateway.cluster.credentials import Credentials
from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.link import PATH, Link, link_target, make_link, open_link
from gateway.cluster.messages import decode_answer, encode_question, failed, id_of
from gateway.cluster.peer import Peer
from gateway.cluster.peer_tls import PeerTLS
from gateway.edge.turn import Turn
from gateway.rpc import jsonrpc
from gateway.rpc.errors import Kind, RpcError
from gateway.rpc.interface import Miss, Reply
from gateway.rpc.pending import Call
from gateway.telemetry.metrics import Metrics

#: While more bytes than these wait for a node to read them, it is asked nothing more.
MAX_WAITING = 16777216
#: what a message is longer than what it carries, more than enough
ENVELOPE = 256
#: so often in succession a node is not listed before it counts as gone: one that has just joined may not be listed yet
ABSENCES = 2

_PROTOCOL_ERROR = 1002
_UNREADABLE = "what the client's node answered cannot be read"


class Links:
    """The links, and the questions that are in flight on them."""

    _log = Logger()

    def __init__(
        self,
        *,
        credentials: Credentials,
        reactor: Any,
        turn: Turn,
        metrics: Metrics,
        heartbeat: float,
        lease: float,
        max_message_size: int,
        max_calls: int,
        max_waiting: int,
        tls: PeerTLS,
        missed: Callable[[Call, Miss], None],
    ) -> None:
        """The same as for :class:`~gateway.cluster.peers.Peers`; ``missed`` is told of each call that a node did not
        pass on."""
        #: by node_id, those that are open
        self.open: dict[str, Link] = {}
        self.asked = Asked(reactor, max_calls=max_calls, max_per_owner=max_calls)
        self._credentials = credentials
        self._reactor = reactor
        self._turn = turn
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._lease = lease
        self._max_message_size = max_message_size
        self._fits = max_message_size - ENVELOPE
        self._max_waiting = max_waiting
        self._tls = tls
        self._missed = missed
        self._peers: dict[str, Peer] = {}
        #: those that were open, until their transports are gone
        self._transports: set[Link] = set()
        self._sweeping: IDelayedCall | None = None
        self._swept_at = 0.0
        self._stopped = False

    # What is asked.

    def connect(self, node_id: str, url: str) -> Deferred[None]:
        """Have a link open to a node. Fails with ``PeerUnreachable``; see :meth:`Peer.connect`."""
        if self._stopped:
            return fail(PeerUnreachable("this node is stopping"))
        peer = self._peers.get(node_id)
        if peer is None:
            peer = Peer(
                node_id,
                clock=self._reactor,
                metrics=self._metrics,
                open=self._open,
                opened=self._opened,
                ended=self._ended,
            )
            self._peers[node_id] = peer
        return peer.connect(url)

    def connect_within(self, timeout: float, node_id: str, url: str) -> Deferred[None]:
        """The same, which fails when so many seconds have passed."""

        def over(result: object, timeout: float) -> Failure:
            return Failure(PeerUnreachable(f"node {node_id} at {url}: there was no link to it within {timeout:g} s"))

        return self.connect(node_id, url).addTimeout(timeout, self._reactor, over)

    def check(self, link: Link, client_id: str, size: int) -> None:
        """Raise ``RpcError`` if a message with params of so many bytes is not to be sent over a link."""
        if size > self._fits:
            raise RpcError(Kind.TOO_LARGE, client_id)
        if link.is_full(self._max_waiting):
            detail = "the client's node does not read what it is asked"
            raise RpcError(Kind.NODE_UNREACHABLE, client_id, sent=False, detail=detail)

    def ask(self, node_id: str, client_id: str, method: str, params: bytes, timeout: float) -> Question:
        """Ask a node something by its open link. Fails with, and raises, ``RpcError``."""
        link = self.open.get(node_id)
        if link is None:
            raise _closed(client_id)
        self.check(link, client_id, len(params))
        question = Question(self.asked.forget)
        id = self.asked.start(question, link, client_id, timeout)
        if not link.send(encode_question(id, method, params)):
            self.asked.forget(question)
            raise _closed(client_id)
        self.asked.sent(question)
        return question

    def send(self, link: Link, payload: bytes) -> None:
        """Send what is not to be answered; forget it if the node does not read."""
        if not link.is_full(self._max_waiting):
            link.send(payload)

    # What is answered.

    def _received(self, link: Link, payload: bytes) -> None:
        id, answer = decode_answer(payload)
        if isinstance(answer, Reply):
            if not self.asked.resolve(link, id, answer):
                self._unknown(link, id, payload)
            return
        call = self.asked.take(link, id)
        if call is None:
            self._unknown(link, id, payload)
        elif answer is None:
            self._metrics.bad_messages["peer"] += 1
            self.asked.settle(call, RpcError(Kind.CONNECTION_LOST, call.client_id, detail=_UNREADABLE))
        elif isinstance(answer, tuple):
            self.asked.settle(call, failed(answer, call.client_id))
        elif isinstance(call, Question):
            call.miss(answer)
        else:
            try:
                self._missed(call, answer)
            except Exception:  # noqa: BLE001 (it is no concern of the next call)
                self._log.failure("it could not be told that a call was not passed on")

    def _unknown(self, link: Link, id: bytes, payload: bytes) -> None:
        """It answers nothing that is in flight."""
        if id not in (b"", b"null"):
            self._metrics.late_responses += 1
            return
        self._metrics.bad_messages["peer"] += 1
        if not isinstance(jsonrpc.decode(payload), (jsonrpc.Notification, jsonrpc.Request)):
            # It may be the answer to any of them: none is to wait for it in vain.
            link.close_with(_PROTOCOL_ERROR, "an answer cannot be read, nor what it answers")

    # The links.

    def _open(self, node_id: str, url: str) -> tuple[Link, Deferred[None]]:
        target = link_target(url)
        link = make_link(
            target,
            # The prefix is a reverse proxy's: the node that is asked sees what follows it.
            self._credentials.sign(node_id, "GET", PATH),
            clock=self._reactor,
            turn=self._turn,
            max_message_size=self._max_message_size,
            received=self._received,
        )
        return link, open_link(link, target, self._reactor, self._tls)

    def _opened(self, node_id: str, link: Link) -> None:
        self.open[node_id] = link
        self._transports.add(link)
        link.gone.addCallback(lambda _: self._transports.discard(link))
        if self._sweeping is None:
            self._swept_at = self._reactor.seconds()
            self._sweeping = self._reactor.callLater(self._heartbeat, self._sweep)

    def _ended(self, node_id: str, link: Link) -> None:
        del self.open[node_id]
        self.asked.fail_unsent(link, map(id_of, link.take_gathered()))
        self.asked.fail_owner(link, lambda client_id: RpcError(Kind.CONNECTION_LOST, client_id))

    def _sweep(self) -> None:
        self._sweeping = None
        now = self._reactor.seconds()
        # Time is counted in sweeps: while this process was stopped, nobody could be heard.
        stopped = now - self._swept_at > 2 * self._heartbeat
        self._swept_at = now
        for link in list(self.open.values()):
            if stopped:
                link.forgive()
            if link.silence(self._heartbeat) >= self._lease:
                link.abort(f"nothing was heard for {self._lease:g} s")
        if self.open:
            self._sweeping = self._reactor.callLater(self._heartbeat, self._sweep)

    def nodes_changed(self, node_ids: Iterable[str]) -> set[str]:
        """These nodes are live. Returns those of the others, as far as there was anything of them, that are gone: there
        are no links to them any more once nothing is in flight on them."""
        live = set(node_ids)
        gone = set()
        for node_id, peer in list(self._peers.items()):
            peer.absent = 0 if node_id in live else peer.absent + 1
            if peer.absent < ABSENCES:
                continue
            gone.add(node_id)
            if peer.link is None or not self.asked.in_flight(peer.link):
                del self._peers[node_id]
                peer.stop()
        return gone

    def stop(self) -> Deferred[None]:
        """Close all links with 1001; fires when they are gone."""
        self._stopped = True
        for peer in list(self._peers.values()):
            peer.stop()
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        return DeferredList([link.gone for link in self._transports]).addCallback(lambda _: None)


def _closed(client_id: str) -> RpcError:
    return RpcError(Kind.NODE_UNREACHABLE, client_id, sent=False, detail="the link to the node is closed")
