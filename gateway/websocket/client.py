"""One WebSocket to the gateway: Autobahn's client protocol, and what it leaves open.

    -> GET /v1/connect?client_id=demo-1 HTTP/1.1      with Authorization, Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1
    <- HTTP/1.1 101 Switching Protocols               open
    <- HTTP/1.1 503 Service Unavailable               or refused: Retry-After, Location, {"error":"word","message":"…"}

Autobahn has the frames and the closing handshake. Here are the answers to an opening handshake other than 101 (for
Autobahn all the same), every timer (Autobahn's would run on the global reactor, and some ends of a connection have
none), and a guard: whatever the server sends, nothing is raised into the transport.
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
from gateway.protocol.uri import WebSocketURI
from gateway.util.deferred import Observers
from gateway.websocket.errors import (
    ConnectionClosedError,
    HandshakeError,
    HandshakeRefusedError,
)


@attrs.frozen
class CloseEvent:
    """How an open connection ended. ``ours``: by this side, for what the gateway did or did not send."""

    code: int
    reason: str
    initiated_locally: bool = False


SUBPROTOCOL = "wsgateway.jsonrpc.v1"

#: bytes of the header block of an answer to the opening handshake, and of the body of a refusal
MAX_HEADERS_SIZE = 16384
MAX_REFUSAL_BODY_SIZE = 4096
#: seconds from the end of the talking to the end of the TCP connection
CLOSE_TIMEOUT = 2.0


class NullLogger:
    """Stands for Autobahn's logger, which has a line for every bad packet."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return self._ignore

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass


@attrs.frozen(kw_only=True)
class ConnectionOptions:
    """What a connection is made with."""

    target: WebSocketURI
    headers: Mapping[str, str]
    clock: IReactorTime
    #: bytes
    max_message_size: int
    #: seconds without a byte from the server, after which it counts as dead
    idle_timeout: float


@implementer(IPushProducer)
class ClientConnection(WebSocketClientProtocol):  # type: ignore[misc]
    """One WebSocket; made for one opening handshake, used once."""

    log = NullLogger()

    # All that Autobahn would copy from its factory to each protocol; without the list it copies nothing.
    CONFIG_ATTRS: list[str] = []
    logOctets = logFrames = trackTimings = False
    utf8validateIncoming = True
    applyMask = maskClientFrames = True
    acceptMaskedServerFrames = False
    maxFramePayloadSize = 0
    autoFragmentSize = 0
    #: makes Autobahn stop reading at the first violation; what is sent then is up to _fail_connection
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
        #: gets each text message, as UTF-8; must not raise
        self.on_message: Callable[[bytes], None] = lambda payload: None
        self.maxMessagePayloadSize = options.max_message_size
        #: fires when messages can be sent; fails with Refused or OpeningFailed
        self.opened: Deferred[None] = Deferred()
        #: fires when no message can be sent or received any more; never, if it was not opened
        self.closed: Deferred[CloseEvent] = Deferred()
        #: fires when the transport is gone
        self.disconnected: Deferred[None] = Deferred()
        self._was_open = False
        self._refusal: HandshakeRefusedError | None = None
        self._failure_reason = ""
        self._last_received_at = 0.0
        self._idle_timer: IDelayedCall | None = None
        self._close_timer: IDelayedCall | None = None
        self._is_writable = True
        self._writable_observers: Observers[None] = Observers()

    # What the agent does with it

    def send(self, payload: bytes) -> bool:
        """Hand one text message to the transport; ``False`` if the connection is no longer open."""
        if self.state != self.STATE_OPEN:
            return False
        self.sendMessage(payload)
        return True

    def wait_writable(self) -> Deferred[None]:
        """Fires when the transport has little left to send. Fails with :class:`ConnectionClosedError`."""
        return succeed(None) if self._is_writable else self._writable_observers.observe()

    def close(self) -> None:
        """Close it with 1000; where that cannot be done (any more), end it."""
        if self.state == self.STATE_OPEN:
            self.sendCloseFrame(code=1000, isReply=False)
            self._report_close(CloseEvent(1000, "closed by this side", initiated_locally=True))
        elif self.connected and self.state != self.STATE_CLOSING:
            self.abort("closed by this side")

    def abort(self, reason: str) -> None:
        """End it without a closing handshake."""
        self._failure_reason = self._failure_reason or reason
        if self.connected:
            self.dropConnection(abort=True)
            # Autobahn takes a connection for closed as soon as it has asked for that.
            self.transport.abortConnection()
        self._report_close(CloseEvent(1006, reason, initiated_locally=True))

    # The opening handshake

    def perMessageCompressionAccept(self, response: object) -> None:
        """No extension was offered: refuse any."""

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
            self.failHandshake(f"the answer to the opening handshake has more than {MAX_HEADERS_SIZE} bytes of headers")
        elif end >= 0 and self._is_switching_protocols(self.data[:end]):
            try:
                super().processHandshake()
            except Exception:  # noqa: BLE001  Autobahn's parsing of headers raises all kinds
                self.failHandshake("the headers of the answer to the opening handshake cannot be read")
        elif end >= 0 and self.state == self.STATE_CONNECTING:
            self._read_refusal(end)

    def _is_switching_protocols(self, head: bytes) -> bool:
        words = head.split(b"\r\n", 1)[0].split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not (words[1].isdigit() and len(words[1]) == 3):
            self.failHandshake("the answer to the opening handshake is not HTTP/1.1")
            return False
        return words[1] == b"101"

    def _read_refusal(self, end: int) -> None:
        """Take what is there of a refusal's body, and end the connection once it is all there."""
        head, body = self.data[:end], self.data[end + 4 :]
        line, headers, _ = parseHttpHeader(head)
        self._refusal = HandshakeRefusedError(int(line.split()[1]), headers, body[:MAX_REFUSAL_BODY_SIZE])
        length = headers.get("content-length", "0")
        wanted = int(length) if len(length) < 10 and length.isascii() and length.isdigit() else 0
        if len(body) >= min(wanted, MAX_REFUSAL_BODY_SIZE):
            self.dropConnection(abort=True)
            self._report_close(CloseEvent(1006, str(self._refusal)))

    def failHandshake(self, reason: str) -> None:
        self.abort(reason)

    def _onOpen(self) -> None:
        # Autobahn's own takes the channel binding and the certificate from the transport, which must then be its kind.
        self._last_received_at = self._clock.seconds()
        self._idle_timer = self._clock.callLater(self._options.idle_timeout, self._check_idle)
        self.registerProducer(self, True)
        self._was_open = True
        self.opened.callback(None)

    # What comes from the transport

    def dataReceived(self, data: bytes) -> None:
        self._last_received_at = self._clock.seconds()
        super().dataReceived(data)

    def consumeData(self) -> None:
        try:
            super().consumeData()
        except Exception:  # noqa: BLE001  the last resort: the connection ends, the program does not
            self._log.failure("bytes from the gateway could not be handled")
            self.abort("bytes from the gateway could not be handled")

    def onMessageFrameData(self, payload: bytes) -> None:
        # Frames may be empty, and a message may have any number of them.
        if payload:
            super().onMessageFrameData(payload)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        if self.state != self.STATE_OPEN:
            return
        if isBinary:
            self._fail_connection(1003, "binary where text is spoken")
        else:
            self.on_message(payload)

    def onCloseFrame(self, code: int | None, reasonRaw: bytes | None) -> bool | None:
        stop: bool | None = super().onCloseFrame(code, reasonRaw)
        if self.state == self.STATE_CLOSING:
            self._report_close(CloseEvent(self.remoteCloseCode or 1005, self.remoteCloseReason or ""))
        return stop

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connected = 0
        super().connectionLost(reason)
        self._report_close(CloseEvent(1006, self._failure_reason or reason.getErrorMessage()))
        for timer in (self._idle_timer, self._close_timer):
            if timer is not None and timer.active():
                timer.cancel()
        self._writable_observers.errback(ConnectionClosedError("the connection to the gateway ended"))
        self.disconnected.callback(None)

    # Ends

    def _fail_connection(self, code: int = 1001, reason: str = "going away") -> None:
        """Autobahn's hook for what breaks the protocol: say so (RFC 6455, section 7.1.7), then hear no more."""
        if self.state == self.STATE_CLOSED:
            return
        self.failedByMe = True
        self.wasNotCleanReason = self._failure_reason = reason
        if self.state == self.STATE_OPEN:
            self.sendCloseFrame(code=code, reasonUtf8=reason.encode()[:123], isReply=False)
        self.dropConnection(abort=False)
        self._report_close(CloseEvent(code, reason, initiated_locally=True))

    def _report_close(self, event: CloseEvent) -> None:
        """The talking is over, for the reason that is given first; the transport has ``LINGER`` seconds more."""
        if not self.opened.called:
            self.opened.errback(self._refusal or HandshakeError(self._failure_reason or event.reason))
        elif self._was_open and not self.closed.called:
            self.closed.callback(event)
        if self.connected and self._close_timer is None:
            self._close_timer = self._clock.callLater(
                CLOSE_TIMEOUT, self.abort, "the gateway did not end the connection"
            )

    def _check_idle(self) -> None:
        left = self._last_received_at + self._options.idle_timeout - self._clock.seconds()
        if left > 0:
            self._idle_timer = self._clock.callLater(left, self._check_idle)
        else:
            self.abort(f"nothing came from the gateway for {self._options.idle_timeout:g} s")

    # IPushProducer: the transport says whether it has room

    def pauseProducing(self) -> None:
        self._is_writable = False

    def resumeProducing(self) -> None:
        self._is_writable = True
        self._writable_observers.callback(None)

    def stopProducing(self) -> None:
        """The transport is lost; connectionLost follows."""


class ClientConnectionFactory(WebSocketClientFactory):  # type: ignore[misc]
    """Gives the transport the one connection that it was made for."""

    noisy = False
    log = NullLogger()

    def __init__(self, connection: ClientConnection, clock: IReactorTime) -> None:
        super().__init__(protocols=[SUBPROTOCOL], reactor=clock)
        self._connection = connection

    def buildProtocol(self, addr: object) -> ClientConnection:
        self._connection.factory = self
        return self._connection
