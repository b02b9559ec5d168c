"""Client side of the WebSocket connection to a peer, on which each message is one of JSON-RPC (messages.py).

    -> GET <path of the peer URL>/v1/backend HTTP/1.1     with Authorization: Wsgateway-Peer … (auth.py)
    <- HTTP/1.1 101 Switching Protocols                   open
    <- HTTP/1.1 401 Unauthorized                          or refused: {"error":"word","message":"…"}

Based on the agent's connection, that is Autobahn's with its missing timeouts and limits; a fast path handles whole text
messages (frames.py) and writes the messages sent while corked at once.
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
from gateway.cluster.features import FEATURES_HEADER, Feature, decode_features, encode_features
from gateway.net.tls import describe_tls_error
from gateway.net.transport import is_between_messages, unsent_bytes, write_now
from gateway.protocol.frames import MAX_PAYLOAD, PING, TEXT, decode_unmasked, encode_masked, is_partial_unmasked
from gateway.protocol.uri import WebSocketURI, parse_uri
from gateway.util.cork import Cork
from gateway.websocket.client import ClientConnection, ClientConnectionFactory, CloseEvent, ConnectionOptions
from gateway.websocket.errors import HandshakeError

#: path below a peer URL
BACKEND_PATH = "/v1/backend"
#: the most time for TCP, TLS and opening handshake together, in seconds
OPEN_TIMEOUT = 3.0
#: delay between attempts to the addresses of a host, in seconds; also the time to find that no address is left
ATTEMPT_DELAY = 0.05
#: corked messages are written early above this size, in bytes
MAX_CORKED = 2**16

_MAX_CLOSE_REASON = 123
_MASKING_KEY = struct.Struct("<I")


def random_masking_keys() -> Iterator[int]:
    """Generate masking keys from the system's random bytes, without end (RFC 6455, section 10.3)."""
    while True:
        for (key,) in _MASKING_KEY.iter_unpack(urandom(4096)):
            yield key


class PeerConnection(ClientConnection):
    """A connection to a peer, for one opening handshake. ``opened``, ``closed`` and ``disconnected`` fire once each."""

    data: bytes
    #: what both nodes know; none before the connection is open
    features: frozenset[Feature] = frozenset()

    def __init__(
        self, options: ConnectionOptions, cork: Cork, message_received: Callable[[PeerConnection, bytes], None]
    ) -> None:
        """``message_received`` is called with each text message, as UTF-8; the connection is aborted if it raises."""
        super().__init__(options)
        self._cork = cork
        self._message_received = message_received
        self._max_payload_size = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        self._masking_keys = random_masking_keys()
        #: messages to be written when the cork is released; ``None`` if there are none
        self._corked: list[bytes] | None = None
        self._corked_size = 0
        self._was_active = True
        self._idle_seconds = 0.0

    def send(self, payload: bytes) -> bool:
        """Send a text message (UTF-8), when the cork is released if there is one. Returns ``False`` if the connection
        is not open."""
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
        """Return the messages that have not been written to the transport, and drop them."""
        unsent, self._corked = self._corked, None
        return unsent or []

    def is_congested(self, max_unsent: int) -> bool:
        """Whether more than ``max_unsent`` bytes wait for the peer to read them."""
        return not self._is_writable and unsent_bytes(self.transport) > max_unsent

    def check_idle(self, elapsed: float) -> float:
        """Add ``elapsed`` seconds to the time without input, and return it. A connection that is idle is sent a
        ping."""
        self._idle_seconds = 0.0 if self._was_active else self._idle_seconds + elapsed
        self._was_active = False
        if self._idle_seconds and self.state == self.STATE_OPEN:
            self.sendPing()
        return self._idle_seconds

    def reset_idle(self) -> None:
        """Restart the idle time: this process was suspended, and has not read its input."""
        self._was_active = True

    def close_with(self, code: int, reason: str) -> None:
        """Send a close frame with that code and reason; a connection that is not open yet is aborted."""
        if self.state == self.STATE_OPEN:
            self.sendCloseFrame(code=code, reasonUtf8=encode_truncate(reason, _MAX_CLOSE_REASON), isReply=False)
            self._report_close(CloseEvent(code, reason, initiated_locally=True))
        else:
            self.abort(reason)

    # Input.

    def dataReceived(self, data: bytes) -> None:
        """Buffer and handle input."""
        self._was_active = True
        self.data += data
        self.consumeData()

    def consumeData(self) -> None:
        """Handle the buffered input, corked."""
        corked = self._cork.cork()
        try:
            if self.state == self.STATE_CONNECTING:
                super().consumeData()
            else:
                self._consume_frames()
        except Exception:  # noqa: BLE001  abort this connection only
            self._log.failure("error in handling a message of another node")
            self.abort("a message could not be handled")
        finally:
            if corked:
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
        """Handle the complete frames at the start of the buffered input, between two messages."""
        data, self.data = self.data, b""
        offset, end, max_size = 0, len(data), self._max_payload_size
        while offset < end and self.state == self.STATE_OPEN:
            frame = decode_unmasked(data, offset, max_size)
            if frame is None:
                break
            opcode, payload, offset = frame
            if opcode == TEXT:
                self._message_received(self, payload)
            elif opcode == PING:
                self.sendPong(payload)
        if offset < end:
            self.data = data[offset:]

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """Handle a message that the fast path did not decode."""
        if self.state == self.STATE_OPEN and not isBinary:
            self._message_received(self, payload)
        else:
            super().onMessage(payload, isBinary)

    # Output.

    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None) -> None:
        """Write bytes after the corked messages. Autobahn sends everything through this method."""
        self._flush_corked(data)

    def _flush_corked(self, data: bytes = b"") -> None:
        messages, self._corked = self._corked, None
        if messages is not None:
            keys = self._masking_keys
            frames = [encode_masked(payload, next(keys)) for payload in messages]
            frames.append(data)
            data = b"".join(frames)
        if data:
            write_now(self.transport, data)

    # The opening handshake.

    def onConnecting(self, transport_details: object) -> Any:
        """Set the ``User-Agent`` of the opening handshake."""
        request = super().onConnecting(transport_details)
        request.useragent = f"wsgateway/{__version__}"
        return request

    def onConnect(self, response: Any) -> None:
        """Take note of the features that both nodes know."""
        self.features = decode_features(response.headers.get(FEATURES_HEADER.lower(), ""))

    def _onOpen(self) -> None:
        # Without the keep-alive of the base class: PeerPool detects silent peers by check_idle().
        self.registerProducer(self, True)
        self._was_open = True
        self.opened.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._failure_reason = self._failure_reason or describe_tls_error(reason.value)
        super().connectionLost(reason)


def peer_target(peer_url: str) -> WebSocketURI:
    """Return the URI for connections to the node with that peer URL. Raises ``ValueError``."""
    return parse_uri(peer_url.rstrip("/") + BACKEND_PATH)


def open_connection(connection: PeerConnection, target: WebSocketURI, reactor: Any, tls: PeerTLS) -> Deferred[None]:
    """Connect and do the opening handshake; over TLS for a wss URL.

    Fails with ``HandshakeRefusedError``, with ``HandshakeError`` (also after ``OPEN_TIMEOUT``), or with the endpoint's
    error. The connection is aborted then, and when the Deferred is cancelled.
    """
    return Deferred.fromCoroutine(_open(connection, target, reactor, tls))


async def _open(connection: PeerConnection, target: WebSocketURI, reactor: Any, tls: PeerTLS) -> None:
    endpoint: Any = HostnameEndpoint(reactor, target.host, target.port, attemptDelay=ATTEMPT_DELAY)
    if target.secure:
        endpoint = wrapClientTLS(tls.options(target.host), endpoint)
    started_at = reactor.seconds()
    try:
        await endpoint.connect(ClientConnectionFactory(connection, reactor)).addTimeout(
            OPEN_TIMEOUT, reactor, _open_timed_out
        )
        remaining = max(0.0, started_at + OPEN_TIMEOUT - reactor.seconds())
        await connection.opened.addTimeout(remaining, reactor, _open_timed_out)
    except Exception as e:
        connection.opened.addErrback(lambda _: None)
        connection.abort("opening failed")
        if isinstance(e, ConnectingCancelledError):
            raise CancelledError from None
        raise


def _open_timed_out(result: object, timeout: float) -> Failure:
    return Failure(HandshakeError(f"the connection was not open within {OPEN_TIMEOUT:g} s"))


def make_connection(
    target: WebSocketURI,
    authorization: str,
    *,
    clock: IReactorTime,
    cork: Cork,
    max_message_size: int,
    message_received: Callable[[PeerConnection, bytes], None],
) -> PeerConnection:
    """Make a connection for :func:`open_connection`; ``max_message_size`` is in bytes."""
    options = ConnectionOptions(
        target=target,
        headers={"Authorization": authorization, FEATURES_HEADER: encode_features()},
        clock=clock,
        max_message_size=max_message_size,
        # Unused: see PeerConnection._onOpen.
        idle_timeout=0.0,
    )
    return PeerConnection(options, cork, message_received)
