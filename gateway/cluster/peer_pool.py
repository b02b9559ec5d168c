"""What other nodes were asked and have not answered yet: calls of :mod:`gateway.rpc.pending`, with links as owners.

One other node: the link to it, opened when somebody needs it, kept, and opened again.

nobody needs it               no link
somebody asks for it          an attempt; who asks meanwhile waits with him
the attempt failed            who waits is told why; who asks within a time that grows is told so at once
the link is open              until it breaks, or the node is gone

The links of this node to others (link.py), by node_id, and what is asked over them.

Every ``heartbeat`` a link on which nothing came is pinged; it is cut when nothing came for ``lease``. When a link ends,
what was asked over it fails: CONNECTION_LOST, or NODE_UNREACHABLE (not sent) for what had certainly not left this node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, fail, succeed
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.cluster.auth import OTHER_NODE, Credentials, PeerTLS
from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.messages import decode_answer, encode_question, failed, id_of
from gateway.cluster.peer_connection import PATH, Link, link_target, make_link, open_link
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.frames import CLOSE_GOING_AWAY
from gateway.rpc.interface import Miss, Missed
from gateway.rpc.pending import Call, DeferredCall, Pending, Reply
from gateway.util.cork import Turn
from gateway.util.deferred import Waiters
from gateway.websocket.client import Ended, Refused

SILENT = "the node was silent until the deadline"


class Question(DeferredCall):
    """What is asked as a Deferred, which fails with ``RpcError``, or with ``Missed``."""

    def miss(self, miss: Miss) -> None:
        """The node did not pass it on."""
        self.errback(Missed(miss))


class Asked(Pending):
    """The questions in flight. At its deadline one fails with ``NODE_UNREACHABLE``: the client did have a node, and it
    is that which was silent."""

    def fail(self, owner: Hashable, id: bytes, error: RpcError) -> bool:
        """Settle a question with an error of this node's; see :meth:`Pending.fail`."""
        if error.kind is Kind.TIMEOUT:
            error = RpcError(Kind.NODE_UNREACHABLE, error.client_id, sent=True, detail=SILENT)
        return super().fail(owner, id, error)

    def fail_unsent(self, owner: Hashable, ids: Iterable[bytes]) -> None:
        """Fail those that have certainly not left this node."""
        for id in ids:
            call = self._calls.get(id)
            if call is not None:
                detail = "the link to the node broke before anything was sent"
                super().fail(owner, id, RpcError(Kind.NODE_UNREACHABLE, call.client_id, sent=False, detail=detail))

    def take(self, owner: Hashable, id: bytes) -> Call | None:
        """Await a question no longer that was asked of ``owner``; ``None`` when it is unknown, or over."""
        call = self._calls.get(id)
        if call is None or call.owner != owner:
            return None
        self.forget(call)
        return call

    def settle(self, call: Call, error: RpcError) -> None:
        """Settle one that was taken."""
        self._settle_with_error(call, error)

    def owner_of(self, call: Any) -> Hashable:
        """Who was asked this, or ``None`` if it is not in flight here."""
        # One that was never begun has no id.
        known = self._calls.get(getattr(call, "id", b""))
        return None if known is None or known is not call else known.owner


#: how long nothing is attempted after a failure, in seconds: at first, and at most
FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0
#: a link that broke sooner, in seconds, has failed like one that did not open
STABLE = 2.0
#: how often at most it is logged that a node cannot be reached, in seconds
LOG_EVERY = 30.0

_NORMAL = (1000, CLOSE_GOING_AWAY)
_SECRET = "; have both nodes the same --cluster-secret-file, and clocks that agree?"


class Peer:
    """The way to one node."""

    _log = Logger()

    def __init__(
        self,
        node_id: str,
        *,
        clock: IReactorTime,
        metrics: Metrics,
        open: Callable[[str, str], tuple[Link, Deferred[None]]],
        opened: Callable[[str, Link], None],
        ended: Callable[[str, Link], None],
    ) -> None:
        """``open`` makes a link to a node by its node_id and its url, and opens it. ``opened`` and ``ended`` are told
        of each link that was open."""
        self.node_id = node_id
        #: how often in succession it was not among the nodes that are live
        self.absent = 0
        self.link: Link | None = None
        self._clock = clock
        self._metrics = metrics
        self._open = open
        self._tell_opened = opened
        self._tell_ended = ended
        self._url = ""
        self._attempt: Deferred[None] | None = None
        self._waiters: Waiters[None] = Waiters()
        self._opened_at = 0.0
        self._failures = 0
        self._problem: PeerUnreachable | None = None
        self._not_before = -math.inf
        self._logged_at = -math.inf

    @property
    def idle(self) -> bool:
        """Whether there is neither a link nor an attempt."""
        return self.link is None and self._attempt is None

    def connect(self, url: str) -> Deferred[None]:
        """Have a link open to the node, which is reached by that url. Fails with ``PeerUnreachable``, not sent; at once
        for a while after a failure. Cancelling it only stops the wait."""
        if self.link is not None:
            return succeed(None)
        if self._attempt is None and self._problem is not None and self._clock.seconds() < self._not_before:
            return fail(self._problem)
        waiter = self._waiters.wait()
        if self._attempt is None:
            self._begin(url)
        return waiter

    def _begin(self, url: str) -> None:
        self._url = url
        try:
            link, attempt = self._open(self.node_id, url)
        except Exception:  # noqa: BLE001 (what is wrong with a url, or with the secret)
            self._not_opened(Failure())
            return
        self._attempt = attempt
        attempt.addCallbacks(self._opened, self._not_opened, callbackArgs=(link,))
        attempt.addErrback(lambda failure: self._log.failure("error in opening a link", failure))

    def _opened(self, _: None, link: Link) -> None:
        self._attempt = None
        self.link = link
        self._opened_at = self._clock.seconds()
        if self._problem is not None:
            self._log.info("node {node} at {url} is linked again", node=self.node_id, url=self._url)
        link.closing.addCallback(self._ended, link)
        self._tell_opened(self.node_id, link)
        self._waiters.fire(None)

    def _not_opened(self, failure: Failure) -> None:
        self._attempt = None
        problem = explain(failure)
        if not failure.check(CancelledError):
            self._failed(problem, failure.check(ConnectionRefusedError) is not None or OTHER_NODE in problem)
        self._waiters.fail(self._problem or PeerUnreachable(problem))

    def _ended(self, ended: Ended, link: Link) -> None:
        self.link = None
        if ended.code not in _NORMAL:
            self._failed(f"the link broke: {ended.code} {ascii(ended.reason)[1:-1]}", False)
        if self._clock.seconds() - self._opened_at >= STABLE:
            self._failures = 0
            self._not_before = -math.inf
        self._tell_ended(self.node_id, link)

    def _failed(self, problem: str, refused: bool) -> None:
        self._metrics.link_failures += 1
        self._problem = PeerUnreachable(f"node {self.node_id} at {self._url}: {problem}", refused=refused)
        now = self._clock.seconds()
        self._not_before = now + min(FIRST_WAIT * 2**self._failures, LONGEST_WAIT)
        self._failures = min(self._failures + 1, 16)
        if now - self._logged_at >= LOG_EVERY:
            self._logged_at = now
            url = ascii(self._url)[1:-1]
            text = "node {node} at {url} cannot be asked: {problem}"
            self._log.warn(text, node=self.node_id, url=url, problem=problem)

    def stop(self) -> Link | None:
        """Close the link with 1001, or give up the attempt; returns the link that is being closed."""
        link = self.link
        if self._attempt is not None:
            self._attempt.cancel()
        elif link is not None:
            link.close_with(CLOSE_GOING_AWAY, "going away")
        return link


def explain(failure: Failure) -> str:
    """Why a link could not be opened, in a line."""
    problem = failure.value
    if isinstance(problem, ConnectionRefusedError):
        return "nothing listens there (connection refused)"
    if isinstance(problem, Refused):
        is_secret = problem.status in (401, 403) and OTHER_NODE not in f"{problem}"
        return f"{problem}{_SECRET if is_secret else ''}"
    text = f"{problem}" or type(problem).__name__
    return text.replace("\n", " ")


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
        """The same as for :class:`~gateway.cluster.peer_client.Peers`; ``missed`` is told of each call that a node did not
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
