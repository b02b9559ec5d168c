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
from gateway.net.tls import describe_tls_error
from gateway.net.transport import is_between_messages, unsent_bytes, write_now
from gateway.protocol.frames import MAX_PAYLOAD, PING, TEXT, decode_unmasked, encode_masked, is_partial_unmasked
from gateway.protocol.uri import WebSocketURI, parse_uri
from gateway.util.cork import Cork
from gateway.websocket.client import ClientConnection, ClientConnectionFactory, CloseEvent, ConnectionOptions
from gateway.websocket.errors import HandshakeError

#: what follows a peer url
BACKEND_PATH = "/v1/backend"
#: how long it may take until a link is open, in seconds
OPEN_TIMEOUT = 3.0
#: how long one address of a node's host has the better chance than the next one, in seconds; so long it takes, too, to
#: find that none is left
ATTEMPT_DELAY = 0.05
#: so many bytes are gathered for the end of a turn
MAX_CORKED = 65536

_MAX_CLOSE_REASON = 123
_MASKING_KEY = struct.Struct("<I")


def random_masking_keys() -> Iterator[int]:
    """Masking keys without end, from the system's random bytes (RFC 6455, section 10.3)."""
    while True:
        for (key,) in _MASKING_KEY.iter_unpack(urandom(4096)):
            yield key


class PeerConnection(ClientConnection):
    """A link; made for one opening handshake, used once. ``opened``, ``closing`` and ``gone`` tell of it."""

    data: bytes

    def __init__(
        self, options: ConnectionOptions, cork: Cork, message_received: Callable[[PeerConnection, bytes], None]
    ) -> None:
        """``received`` is told of each text message, as UTF-8; if it raises, the link ends."""
        super().__init__(options)
        self._cork = cork
        self._message_received = message_received
        self._max_payload_size = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        self._masking_keys = random_masking_keys()
        #: messages that are to be written at the end of the turn
        self._corked: list[bytes] | None = None
        self._corked_size = 0
        self._was_active = True
        self._idle_seconds = 0.0

    # What is done with it.

    def send(self, payload: bytes) -> bool:
        """Send one text message (UTF-8), at the end of the turn if one is on; ``False`` if the link is not open."""
        if self.state != self.STATE_OPEN:
            return False
        if self._corked is not None:
            self._corked.append(payload)
            self._corked_size += len(payload)
            if self._corked_size > MAX_CORKED:
                self._flush_corked()
        elif self._cork.is_corked:
            self._corked = [payload]
            self._corked_size = len(payload)
            self._cork.on_flush(self._flush_corked)
        else:
            self.transport.write(encode_masked(payload, next(self._masking_keys)))
        return True

    def take_unsent(self) -> list[bytes]:
        """The messages that have not left this process, and never will."""
        gathered, self._corked = self._corked, None
        return gathered or []

    def is_congested(self, max_unsent: int) -> bool:
        """Whether more than so many bytes wait for the other node to read them."""
        return not self._is_writable and unsent_bytes(self.transport) > max_unsent

    def check_idle(self, elapsed: float) -> float:
        """So many seconds more have passed: for how long nothing came. If that is not 0, it is pinged."""
        self._idle_seconds = 0.0 if self._was_active else self._idle_seconds + elapsed
        self._was_active = False
        if self._idle_seconds and self.state == self.STATE_OPEN:
            self.sendPing()
        return self._idle_seconds

    def reset_idle(self) -> None:
        """Begin to count anew: this process did not run, and has not read what may have come."""
        self._was_active = True

    def close_with(self, code: int, reason: str) -> None:
        """Close it; one that is not open yet just ends."""
        if self.state == self.STATE_OPEN:
            self.sendCloseFrame(code=code, reasonUtf8=encode_truncate(reason, _MAX_CLOSE_REASON), isReply=False)
            self._report_close(CloseEvent(code, reason, initiated_locally=True))
        else:
            self.abort(reason)

    # Bytes in.

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        self._was_active = True
        self.data += data
        self.consumeData()

    def consumeData(self) -> None:
        """Handle what was read; what it sets off is one turn."""
        begun = self._cork.cork()
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
                self._cork.uncork()

    def _consume_frames(self) -> None:
        while self.state in (self.STATE_OPEN, self.STATE_CLOSING):
            if self.state == self.STATE_OPEN and is_between_messages(self):
                self._fast_path()
                if not self.data or is_partial_unmasked(self.data, self._max_payload_size):
                    return
            if not self.processData():
                return

    def _fast_path(self) -> None:
        """Handle the whole frames at the beginning of what was read between two messages."""
        data, self.data = self.data, b""
        at, end, most = 0, len(data), self._max_payload_size
        while at < end and self.state == self.STATE_OPEN:
            frame = decode_unmasked(data, at, most)
            if frame is None:
                break
            opcode, payload, at = frame
            if opcode == TEXT:
                self._message_received(self, payload)
            elif opcode == PING:
                self.sendPong(payload)
        if at < end:
            self.data = data[at:]

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """A message is whole that did not pass the fast lane."""
        if self.state == self.STATE_OPEN and not isBinary:
            self._message_received(self, payload)
        else:
            super().onMessage(payload, isBinary)

    # Bytes out.

    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None) -> None:
        """Write bytes, behind those that were gathered. Everything that Autobahn sends goes this way."""
        self._flush_corked(data)

    def _flush_corked(self, data: bytes = b"") -> None:
        gathered, self._corked = self._corked, None
        if gathered is not None:
            keys = self._masking_keys
            frames = [encode_masked(payload, next(keys)) for payload in gathered]
            frames.append(data)
            data = b"".join(frames)
        if data:
            write_now(self.transport, data)

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
        self._failure_reason = self._failure_reason or describe_tls_error(reason.value)
        super().connectionLost(reason)


def peer_target(peer_url: str) -> WebSocketURI:
    """Where the link to a node is opened that is reached by that url. Raises ``ValueError``."""
    return parse_uri(peer_url.rstrip("/") + BACKEND_PATH)


def open_connection(connection: PeerConnection, target: WebSocketURI, reactor: Any, tls: PeerTLS) -> Deferred[None]:
    """Connect, and open a link; over TLS for a wss url.

    Fails with ``Refused``, with ``OpeningFailed`` (after ``OPEN_TIMEOUT`` too), or with what the endpoint fails with;
    then, and when it is cancelled, nothing is left behind.
    """
    return Deferred.fromCoroutine(_open(connection, target, reactor, tls))


async def _open(connection: PeerConnection, target: WebSocketURI, reactor: Any, tls: PeerTLS) -> None:
    endpoint: Any = HostnameEndpoint(reactor, target.host, target.port, attemptDelay=ATTEMPT_DELAY)
    if target.secure:
        endpoint = wrapClientTLS(tls.options(target.host), endpoint)
    began = reactor.seconds()
    try:
        await endpoint.connect(ClientConnectionFactory(connection, reactor)).addTimeout(
            OPEN_TIMEOUT, reactor, _open_timed_out
        )
        left = max(0.0, began + OPEN_TIMEOUT - reactor.seconds())
        await connection.opened.addTimeout(left, reactor, _open_timed_out)
    except Exception as e:
        connection.opened.addErrback(lambda _: None)
        connection.abort("given up")
        if isinstance(e, ConnectingCancelledError):
            raise CancelledError from None
        raise


def _open_timed_out(result: object, timeout: float) -> Failure:
    return Failure(HandshakeError(f"the link was not open within {OPEN_TIMEOUT:g} s"))


def make_connection(
    target: WebSocketURI,
    authorization: str,
    *,
    clock: IReactorTime,
    cork: Cork,
    max_message_size: int,
    message_received: Callable[[PeerConnection, bytes], None],
) -> PeerConnection:
    """A link for :func:`open_link`; ``max_message_size`` is in bytes."""
    opening = ConnectionOptions(
        target=target,
        headers={"Authorization": authorization},
        clock=clock,
        max_message_size=max_message_size,
        # Not looked at: see Link._onOpen.
        idle_timeout=0.0,
    )
    return PeerConnection(opening, cork, message_received)
