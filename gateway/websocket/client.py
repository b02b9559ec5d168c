"""The client side of one WebSocket to the gateway: Autobahn's client protocol, and what it leaves open.

    -> GET /v1/connect?client_id=demo-1 HTTP/1.1      with Authorization, Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1
    <- HTTP/1.1 101 Switching Protocols               open
    <- HTTP/1.1 503 Service Unavailable               or refused: Retry-After, Location, {"error":"word","message":"…"}

Autobahn does the frames and the closing handshake. Added here: responses to the opening handshake other than 101, which
Autobahn does not tell apart; all timers, since Autobahn's would run on the global reactor and some ways to end have no
timeout; and a guard: nothing that the server sends raises into the transport.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from autobahn.websocket.protocol import parseHttpHeader
from autobahn.websocket.types import ConnectingRequest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway import __version__
from gateway.protocol.frames import CloseCode
from gateway.protocol.jsonrpc import SUBPROTOCOL
from gateway.protocol.uri import WebSocketURI
from gateway.util.deferred import Observers
from gateway.websocket.errors import ConnectionClosedError, HandshakeError, HandshakeRefusedError
from gateway.websocket.slim_protocol import NullLogger

#: bytes that the head of a response to the opening handshake may have
MAX_HEADERS_SIZE = 2**14
#: bytes of a refusal's body that are read
MAX_REFUSAL_BODY_SIZE = 2**12
#: seconds from the end of messages to the end of the TCP connection
CLOSE_TIMEOUT = 2.0


@attrs.frozen
class CloseEvent:
    """How an open connection ended. ``initiated_locally``: this side closed it, for what the gateway sent or failed to
    send, or because its user asked for it."""

    code: int
    reason: str
    initiated_locally: bool = False


@attrs.frozen(kw_only=True)
class ConnectionOptions:
    """Parameters of a connection."""

    target: WebSocketURI
    headers: Mapping[str, str]
    clock: IReactorTime
    #: bytes
    max_message_size: int
    #: seconds without a byte from the server after which the connection is aborted
    idle_timeout: float


@implementer(IPushProducer)
class ClientConnection(WebSocketClientProtocol):  # type: ignore[misc]
    """One WebSocket connection; good for one opening handshake."""

    log = NullLogger()

    # Autobahn's settings, on the class; the list is empty, so that Autobahn copies none of them from the factory.
    CONFIG_ATTRS: list[str] = []
    logOctets = logFrames = trackTimings = False
    utf8validateIncoming = True
    applyMask = maskClientFrames = True
    acceptMaskedServerFrames = False
    maxFramePayloadSize = 0
    autoFragmentSize = 0
    #: makes Autobahn stop reading at the first violation; _fail_connection decides what to send
    failByDrop = True
    echoCloseCodeReason = True
    openHandshakeTimeout = closeHandshakeTimeout = serverConnectionDropTimeout = 0
    tcpNoDelay = True
    autoPingInterval = autoPingTimeout = 0
    autoPingSize = 12
    autoPingRestartOnAnyTraffic = True
    version = WebSocketClientProtocol.DEFAULT_SPEC_VERSION
    perMessageCompressionOffers: list[object] = []

    def __init__(self, options: ConnectionOptions) -> None:
        super().__init__()
        self._options = options
        self.target = options.target
        self._clock = options.clock
        self._log = Logger()
        #: called with each text message, as UTF-8; must not raise
        self.on_message: Callable[[bytes], None] = lambda payload: None
        self.maxMessagePayloadSize = options.max_message_size
        #: fires when messages can be sent; fails with HandshakeRefusedError or HandshakeError
        self.opened: Deferred[None] = Deferred()
        #: fires when no message can be sent or received any more; never, if the connection did not open
        self.closed: Deferred[CloseEvent] = Deferred()
        #: fires when the transport is lost
        self.disconnected: Deferred[None] = Deferred()
        self._was_open = False
        self._refusal: HandshakeRefusedError | None = None
        self._failure_reason = ""
        self._last_received_at = 0.0
        self._idle_timer: IDelayedCall | None = None
        self._close_timer: IDelayedCall | None = None
        self._is_writable = True
        self._writable_observers: Observers[None] = Observers()

    # Operations.

    def send(self, payload: bytes) -> bool:
        """Write one text message to the transport. Returns ``False`` if the connection is not open."""
        if self.state != self.STATE_OPEN:
            return False
        self.sendMessage(payload)
        return True

    def wait_writable(self) -> Deferred[None]:
        """Wait until the transport's buffer has room. Fails with :class:`ConnectionClosedError` if it is lost first."""
        return succeed(None) if self._is_writable else self._writable_observers.observe()

    def close(self) -> None:
        """Start the closing handshake with 1000, or abort if there cannot be one (any more)."""
        if self.state == self.STATE_OPEN:
            self.sendCloseFrame(code=CloseCode.NORMAL_CLOSURE, isReply=False)
            self._report_close(CloseEvent(CloseCode.NORMAL_CLOSURE, "closed by this side", initiated_locally=True))
        elif self.connected and self.state != self.STATE_CLOSING:
            self.abort("closed by this side")

    def abort(self, reason: str) -> None:
        """Drop the connection without a closing handshake."""
        self._failure_reason = self._failure_reason or reason
        if self.connected:
            self.dropConnection(abort=True)
            # Autobahn regards a connection as closed once it has asked the transport to close, and would not abort it.
            self.transport.abortConnection()
        self._report_close(CloseEvent(CloseCode.ABNORMAL_CLOSURE, reason, initiated_locally=True))

    # The opening handshake.

    def perMessageCompressionAccept(self, response: object) -> None:
        """Refuse any extension: none was offered."""

    def onConnecting(self, transport_details: object) -> Any:
        target = self._options.target
        return ConnectingRequest(
            host=target.host_header,
            port=target.port,
            resource=target.resource,
            headers=dict(self._options.headers),
            useragent=f"wsgateway-agent/{__version__}",
            protocols=[SUBPROTOCOL],
        )

    def processHandshake(self) -> None:
        end = self.data.find(b"\r\n\r\n")
        if end > MAX_HEADERS_SIZE or (end < 0 and len(self.data) > MAX_HEADERS_SIZE):
            self.failHandshake(
                f"the response to the opening handshake has more than {MAX_HEADERS_SIZE} bytes of headers"
            )
        elif end >= 0 and self._is_switching_protocols(self.data[:end]):
            try:
                super().processHandshake()
            except Exception:  # noqa: BLE001  Autobahn's header parser raises exceptions of many types
                self.failHandshake("the headers of the response to the opening handshake cannot be parsed")
        elif end >= 0 and self.state == self.STATE_CONNECTING:
            self._read_refusal(end)

    def _is_switching_protocols(self, head: bytes) -> bool:
        words = head.split(b"\r\n", 1)[0].split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not (words[1].isdigit() and len(words[1]) == 3):
            self.failHandshake("the response to the opening handshake is not HTTP/1.1")
            return False
        return words[1] == b"101"

    def _read_refusal(self, end: int) -> None:
        """Keep what has arrived of a refusal's body, and close the connection once it is complete."""
        head, body = self.data[:end], self.data[end + 4 :]
        try:
            line, headers, _ = parseHttpHeader(head)
        except Exception:  # noqa: BLE001  newer releases of Autobahn raise exceptions for some headers
            self.failHandshake("the headers of the response to the opening handshake cannot be parsed")
            return
        self._refusal = HandshakeRefusedError(int(line.split()[1]), headers, body[:MAX_REFUSAL_BODY_SIZE])
        length = headers.get("content-length", "0")
        body_size = int(length) if len(length) < 10 and length.isascii() and length.isdigit() else 0
        if len(body) >= min(body_size, MAX_REFUSAL_BODY_SIZE):
            self.dropConnection(abort=True)
            self._report_close(CloseEvent(CloseCode.ABNORMAL_CLOSURE, str(self._refusal)))

    def failHandshake(self, reason: str) -> None:
        self.abort(reason)

    def _onOpen(self) -> None:
        # Autobahn's own reads the TLS channel id and the certificate, which needs a transport of its own kind.
        self._last_received_at = self._clock.seconds()
        self._idle_timer = self._clock.callLater(self._options.idle_timeout, self._check_idle)
        self.registerProducer(self, True)
        self._was_open = True
        self.opened.callback(None)

    # Bytes in.

    def dataReceived(self, data: bytes) -> None:
        self._last_received_at = self._clock.seconds()
        super().dataReceived(data)

    def consumeData(self) -> None:
        try:
            super().consumeData()
        except Exception:  # noqa: BLE001  the last resort: drop the connection, not the program
            self._log.failure("an error in handling bytes from the gateway")
            self.abort("an error in handling bytes from the gateway")

    def onMessageFrameData(self, payload: bytes) -> None:
        # A message may have any number of empty frames; Autobahn would store each.
        if payload:
            super().onMessageFrameData(payload)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        if self.state != self.STATE_OPEN:
            return
        if isBinary:
            self._fail_connection(CloseCode.UNSUPPORTED_DATA, "messages are text here, not binary")
        else:
            self.on_message(payload)

    def onCloseFrame(self, code: int | None, reasonRaw: bytes | None) -> bool | None:
        stop: bool | None = super().onCloseFrame(code, reasonRaw)
        if self.state == self.STATE_CLOSING:
            self._report_close(
                CloseEvent(self.remoteCloseCode or CloseCode.NO_STATUS_RCVD, self.remoteCloseReason or "")
            )
        return stop

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connected = 0
        super().connectionLost(reason)
        self._report_close(CloseEvent(CloseCode.ABNORMAL_CLOSURE, self._failure_reason or reason.getErrorMessage()))
        for timer in (self._idle_timer, self._close_timer):
            if timer is not None and timer.active():
                timer.cancel()
        self._writable_observers.errback(ConnectionClosedError("the connection to the gateway ended"))
        self.disconnected.callback(None)

    # Closing.

    def _fail_connection(self, code: int = CloseCode.GOING_AWAY, reason: str = "going away") -> None:
        """Send a close frame, then close, because of a protocol error (RFC 6455, section 7.1.7). Overrides Autobahn's
        hook."""
        if self.state == self.STATE_CLOSED:
            return
        self.failedByMe = True
        self.wasNotCleanReason = self._failure_reason = reason
        if self.state == self.STATE_OPEN:
            self.sendCloseFrame(code=code, reasonUtf8=reason.encode()[:123], isReply=False)
        self.dropConnection(abort=False)
        self._report_close(CloseEvent(code, reason, initiated_locally=True))

    def _report_close(self, event: CloseEvent) -> None:
        """Fire ``opened`` or ``closed``, with the first event only; abort the transport after ``CLOSE_TIMEOUT``."""
        if not self.opened.called:
            self.opened.errback(self._refusal or HandshakeError(self._failure_reason or event.reason))
        elif self._was_open and not self.closed.called:
            self.closed.callback(event)
        if self.connected and self._close_timer is None:
            self._close_timer = self._clock.callLater(
                CLOSE_TIMEOUT, self.abort, "the gateway did not close the connection"
            )

    def _check_idle(self) -> None:
        time_left = self._last_received_at + self._options.idle_timeout - self._clock.seconds()
        if time_left > 0:
            self._idle_timer = self._clock.callLater(time_left, self._check_idle)
        else:
            self.abort(f"nothing received from the gateway for {self._options.idle_timeout:g} s")

    # IPushProducer: the transport reports whether its buffer has room.

    def pauseProducing(self) -> None:
        self._is_writable = False

    def resumeProducing(self) -> None:
        self._is_writable = True
        self._writable_observers.callback(None)

    def stopProducing(self) -> None:
        """Ignore the loss of the transport: connectionLost follows."""


class ClientConnectionFactory(WebSocketClientFactory):  # type: ignore[misc]
    """Give an endpoint the one connection that it connects for."""

    noisy = False
    log = NullLogger()

    def __init__(self, connection: ClientConnection, clock: IReactorTime) -> None:
        super().__init__(protocols=[SUBPROTOCOL], reactor=clock)
        self._connection = connection

    def buildProtocol(self, addr: object) -> ClientConnection:
        self._connection.factory = self
        return self._connection
