"""One link to another node: a WebSocket, made here, over which this node asks and the other answers (messages.py).

    -> GET <peer_url's prefix>/v1/backend HTTP/1.1     with Authorization: Wsgateway-Peer … (credentials.py)
    <- HTTP/1.1 101 Switching Protocols                open
    <- HTTP/1.1 401 Unauthorized                       or refused: {"error":"word","message":"…"}

The connection is the agent's, that is Autobahn's with what it leaves open; on top of it is a fast lane (frames.py):
whole text messages in, and out those of one turn in one write.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from os import urandom
from typing import Any

from autobahn.util import encode_truncate
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure

from gateway import __version__
from gateway.cluster.auth import PeerTLS
from gateway.net.tls import explain_tls
from gateway.net.transport import between_messages, unsent, write
from gateway.protocol.frames import MAX_PAYLOAD, PING, TEXT, decode_unmasked, encode_masked, is_unmasked_beginning
from gateway.protocol.uri import Target, parse
from gateway.util.cork import Turn
from gateway.websocket.client import Connection, ConnectionFactory, Ended, Opening, OpeningFailed

#: what follows a peer url
PATH = "/v1/backend"
#: how long it may take until a link is open, in seconds
OPEN_TIMEOUT = 3.0
#: how long one address of a node's host has the better chance than the next one, in seconds; so long it takes, too, to
#: find that none is left
ATTEMPT_DELAY = 0.05
#: so many bytes are gathered for the end of a turn
MAX_GATHERED = 65536

_MAX_REASON = 123
_KEYS = struct.Struct("<I")


def random_keys() -> Iterator[int]:
    """Masking keys without end, from the system's random bytes (RFC 6455, section 10.3)."""
    while True:
        for (key,) in _KEYS.iter_unpack(urandom(4096)):
            yield key


class Link(Connection):
    """A link; made for one opening handshake, used once. ``opened``, ``closing`` and ``gone`` tell of it."""

    data: bytes

    def __init__(self, opening: Opening, turn: Turn, received: Callable[[Link, bytes], None]) -> None:
        """``received`` is told of each text message, as UTF-8; if it raises, the link ends."""
        super().__init__(opening)
        self._turn = turn
        self._received = received
        self._most = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        self._keys = random_keys()
        #: messages that are to be written at the end of the turn
        self._gathered: list[bytes] | None = None
        self._gathered_size = 0
        self._heard = True
        self._silent = 0.0

    # What is done with it.

    def send(self, payload: bytes) -> bool:
        """Send one text message (UTF-8), at the end of the turn if one is on; ``False`` if the link is not open."""
        if self.state != self.STATE_OPEN:
            return False
        if self._gathered is not None:
            self._gathered.append(payload)
            self._gathered_size += len(payload)
            if self._gathered_size > MAX_GATHERED:
                self._write_gathered()
        elif self._turn.on:
            self._gathered = [payload]
            self._gathered_size = len(payload)
            self._turn.at_end(self._write_gathered)
        else:
            self.transport.write(encode_masked(payload, next(self._keys)))
        return True

    def take_gathered(self) -> list[bytes]:
        """The messages that have not left this process, and never will."""
        gathered, self._gathered = self._gathered, None
        return gathered or []

    def is_full(self, most: int) -> bool:
        """Whether more than so many bytes wait for the other node to read them."""
        return not self._has_room and unsent(self.transport) > most

    def silence(self, seconds: float) -> float:
        """So many seconds more have passed: for how long nothing came. If that is not 0, it is pinged."""
        self._silent = 0.0 if self._heard else self._silent + seconds
        self._heard = False
        if self._silent and self.state == self.STATE_OPEN:
            self.sendPing()
        return self._silent

    def forgive(self) -> None:
        """Begin to count anew: this process did not run, and has not read what may have come."""
        self._heard = True

    def close_with(self, code: int, reason: str) -> None:
        """Close it; one that is not open yet just ends."""
        if self.state == self.STATE_OPEN:
            self.sendCloseFrame(code=code, reasonUtf8=encode_truncate(reason, _MAX_REASON), isReply=False)
            self._end(Ended(code, reason, ours=True))
        else:
            self.abort(reason)

    # Bytes in.

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        self._heard = True
        self.data += data
        self.consumeData()

    def consumeData(self) -> None:
        """Handle what was read; what it sets off is one turn."""
        begun = self._turn.begin()
        try:
            if self.state == self.STATE_CONNECTING:
                super().consumeData()
            else:
                self._consume_frames()
        except Exception:  # noqa: BLE001  the last resort: the link ends, the node does not
            self._log.failure("an answer of another node could not be handled")
            self.abort("an answer could not be handled")
        finally:
            if begun:
                self._turn.end()

    def _consume_frames(self) -> None:
        while self.state in (self.STATE_OPEN, self.STATE_CLOSING):
            if self.state == self.STATE_OPEN and between_messages(self):
                self._fast_lane()
                if not self.data or is_unmasked_beginning(self.data, self._most):
                    return
            if not self.processData():
                return

    def _fast_lane(self) -> None:
        """Handle the whole frames at the beginning of what was read between two messages."""
        data, self.data = self.data, b""
        at, end, most = 0, len(data), self._most
        while at < end and self.state == self.STATE_OPEN:
            frame = decode_unmasked(data, at, most)
            if frame is None:
                break
            opcode, payload, at = frame
            if opcode == TEXT:
                self._received(self, payload)
            elif opcode == PING:
                self.sendPong(payload)
        if at < end:
            self.data = data[at:]

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """A message is whole that did not pass the fast lane."""
        if self.state == self.STATE_OPEN and not isBinary:
            self._received(self, payload)
        else:
            super().onMessage(payload, isBinary)

    # Bytes out.

    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None) -> None:
        """Write bytes, behind those that were gathered. Everything that Autobahn sends goes this way."""
        self._write_gathered(data)

    def _write_gathered(self, more: bytes = b"") -> None:
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            keys = self._keys
            frames = [encode_masked(payload, next(keys)) for payload in gathered]
            frames.append(more)
            more = b"".join(frames)
        if more:
            write(self.transport, more)

    # The opening handshake.

    def onConnecting(self, transport_details: object) -> Any:
        """What the request of the opening handshake is made of."""
        request = super().onConnecting(transport_details)
        request.useragent = f"wsgateway/{__version__}"
        return request

    def _onOpen(self) -> None:
        # Who is silent is found by whoever has the link, by counting.
        self.registerProducer(self, True)
        self._was_open = True
        self.opened.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone."""
        self._why = self._why or explain_tls(reason.value)
        super().connectionLost(reason)


def link_target(peer_url: str) -> Target:
    """Where the link to a node is opened that is reached by that url. Raises ``ValueError``."""
    return parse(peer_url.rstrip("/") + PATH)


def open_link(link: Link, target: Target, reactor: Any, tls: PeerTLS) -> Deferred[None]:
    """Connect, and open a link; over TLS for a wss url.

    Fails with ``Refused``, with ``OpeningFailed`` (after ``OPEN_TIMEOUT`` too), or with what the endpoint fails with;
    then, and when it is cancelled, nothing is left behind.
    """
    return Deferred.fromCoroutine(_open(link, target, reactor, tls))


async def _open(link: Link, target: Target, reactor: Any, tls: PeerTLS) -> None:
    endpoint: Any = HostnameEndpoint(reactor, target.host, target.port, attemptDelay=ATTEMPT_DELAY)
    if target.secure:
        endpoint = wrapClientTLS(tls.options(target.host), endpoint)
    began = reactor.seconds()
    try:
        await endpoint.connect(ConnectionFactory(link, reactor)).addTimeout(OPEN_TIMEOUT, reactor, _too_late)
        left = max(0.0, began + OPEN_TIMEOUT - reactor.seconds())
        await link.opened.addTimeout(left, reactor, _too_late)
    except Exception as e:
        link.opened.addErrback(lambda _: None)
        link.abort("given up")
        if isinstance(e, ConnectingCancelledError):
            raise CancelledError from None
        raise


def _too_late(result: object, timeout: float) -> Failure:
    return Failure(OpeningFailed(f"the link was not open within {OPEN_TIMEOUT:g} s"))


def make_link(
    target: Target,
    authorization: str,
    *,
    clock: IReactorTime,
    turn: Turn,
    max_message_size: int,
    received: Callable[[Link, bytes], None],
) -> Link:
    """A link for :func:`open_link`; ``max_message_size`` is in bytes."""
    opening = Opening(
        target=target,
        headers={"Authorization": authorization},
        clock=clock,
        max_message_size=max_message_size,
        # Not looked at: see Link._onOpen.
        idle_timeout=0.0,
    )
    return Link(opening, turn, received)
