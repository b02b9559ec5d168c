"""The opening handshake, made safe: shared by the clients' endpoint and the WebSocket of backends.

-> GET /v1/connect?client_id=robot-7 HTTP/1.1 …        the head is read strictly, then parsing stops
                                                        admit() decides; bytes that come meanwhile are held
<- HTTP/1.1 101 Switching Protocols …                   open: what was held is handled now
<- HTTP/1.1 503 Service Unavailable … {"error": …}      or refused: the answer reaches even a client that still sends

A connection that dies while it awaits its admission cancels it, and never opens.
"""

from __future__ import annotations

import contextlib
from typing import Any

from autobahn.twisted.websocket import WebSocketServerFactory
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IProtocolNegotiationFactory, ISSLTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.net.transport import release_to_reactor
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import HandshakeRequest, find_request_head, parse_request, retry_after_header
from gateway.util.cork import Cork
from gateway.util.log import RateLimitedLogger
from gateway.util.timers import Timer, TimerWheel
from gateway.websocket.autobahn import NullLogger
from gateway.websocket.connection import ServerConnection
from gateway.websocket.limits import HandshakeLimiter, ReassemblyBudget

__all__ = ["HandshakeRequest", "RequestRefusedError", "ServerFactory", "ServerProtocol", "format_address"]

#: how many bytes may come before the admission is decided, until reading pauses
MAX_EARLY_DATA = 65536


def format_address(address: object) -> str:
    """``host:port`` of an address, ``[host]:port`` for IPv6, ``unix`` for a UNIX socket."""
    if isinstance(address, IPv4Address):
        return f"{address.host}:{address.port}"
    if isinstance(address, IPv6Address):
        return f"[{address.host}]:{address.port}"
    return "unix"


class ServerProtocol(ServerConnection):
    """A WebSocket server's side of one connection. A subclass sets ``path`` and overrides :meth:`admit` and the hooks
    of :class:`~gateway.websocket.connection.GuardedConnection`."""

    #: the only path there is
    path = "/"
    #: whether it was open before it had this object
    already_open = False

    _admission: Deferred[str | None] | None = None
    _request: HandshakeRequest | None = None
    _scanned = 0
    _handshake_counted = False
    #: whether it was charged to its network's rate
    _rate_charged = False
    #: for which its opening handshake is counted
    _network = ""
    openHandshakeTimeoutCall: Timer | None = None

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        """Decide on a request, which is a valid opening handshake for ``path``.

        Fires with the subprotocol to be spoken (one that was offered) or ``None``; raises, or fails with,
        :class:`Refusal`. The Deferred is cancelled when the connection is lost or its time is up. Once it has fired
        the connection opens in the same call, or :meth:`admission_void` is called.
        """
        return succeed(None)

    def admission_abandoned(self) -> None:
        """The admission was granted, but the connection could not be opened."""

    def connectionMade(self) -> None:
        """The transport is there."""
        if self.already_open:
            self.resume_open()
            return
        self.last_received_at = self.factory.clock()
        set_no_delay = getattr(self.transport, "setTcpNoDelay", None)
        if set_no_delay is not None:
            # A UNIX socket behind a wrapper has none, a connection that is gone already cannot be set.
            with contextlib.suppress(AttributeError, OSError):
                set_no_delay(True)
        self._connectionMade()
        self._handshake_counted = True
        try:
            self.factory.handshake_limiter.started()
            if not self.factory.behind_proxy:
                self._identify_address()
                if ISSLTransport.providedBy(self.transport):
                    # The TLS handshake, before the first bytes, takes the most.
                    self._charge_rate()
        except RequestRefusedError as refusal:
            self.refuse(refusal)

    def _identify_address(self) -> None:
        peer = self.transport.getPeer()
        self.peer = self.address = format_address(peer)
        self._network = self.factory.handshake_limiter.identified(getattr(peer, "host", ""))

    def _first_data_received(self) -> None:
        if self.factory.behind_proxy:
            self._identify_address()
        # First of all, so that guessing tokens is limited too, and who sends a head slowly.
        if not self._rate_charged:
            self._charge_rate()

    def _charge_rate(self) -> None:
        self._rate_charged = True
        self.factory.handshake_limiter.charged(self._network)

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        self.last_received_at = self.factory.clock()
        if self.state != self.STATE_CONNECTING:
            self.receive_data(data)
            return
        if self._request is not None:
            self.data += data
            if len(self.data) > MAX_EARLY_DATA:
                self.pause_reading()
            return
        try:
            if not self.data:
                self._first_data_received()
            self.data += data
            end = find_request_head(self.data, self._scanned)
            self._scanned = len(self.data)
            if not end:
                return
            self._request = parse_request(self.data[:end], self.path)
        except RequestRefusedError as refusal:
            self.refuse(refusal)
            return
        self.data = self.data[end:]
        self._admission = admission = maybeDeferred(self.admit, self._request)
        admission.addCallbacks(self._on_admitted, self._on_admission_failed)

    def _on_admitted(self, subprotocol: str | None) -> None:
        self._admission = None
        request = self._request
        if self.state != self.STATE_CONNECTING or request is None:
            self.admission_abandoned()
            return
        self._finish_handshake()
        self.websocket_version = 13
        self.websocket_protocols = request.subprotocols
        self.websocket_extensions: list[object] = []
        self._wskey = request.key
        # Before it opens, since what came early may well ask for a pause of its own.
        self.resume_reading()
        try:
            self.succeedHandshake(subprotocol)
        except Exception:  # noqa: BLE001
            self._on_open_error()
        # A subprotocol may carry a token; and all of it is memory.
        self._request = self.http_response_data = None
        self.websocket_protocols = ()

    def _on_open_error(self, failure: Failure | None = None) -> None:
        self.factory.error_log.failure("an error in opening a connection", failure)
        if self.state == self.STATE_CONNECTING:
            self.refuse(RequestRefusedError(500, "internal", "internal error"))
            self.admission_abandoned()
        else:
            self.close_with(1011, "internal error")

    def _on_admission_failed(self, failure: Failure) -> None:
        self._admission = None
        if self.state != self.STATE_CONNECTING:
            # Cancelled, since the connection is gone.
            return
        if isinstance(failure.value, RequestRefusedError):
            self.refuse(failure.value)
        else:
            self.factory.error_log.failure("an error in admitting a connection", failure)
            self.refuse(RequestRefusedError(500, "internal", "internal error"))

    def refuse(self, refusal: RequestRefusedError) -> None:
        """Answer the request with an error, if it has not been answered yet, and end the connection."""
        if self.state != self.STATE_CONNECTING:
            return
        self.factory.metrics.refused[refusal.reason] += 1
        self._refused = True
        self.transport.write(refusal.response())
        self.dropConnection(abort=False)
        self._finish_handshake()
        # What the client still sends is read, or the answer may not reach it.
        self.resume_reading()

    def _finish_handshake(self) -> None:
        if self._handshake_counted:
            self._handshake_counted = False
            self.factory.handshake_limiter.finished(self._network)
            self._network = ""
        timer, self.openHandshakeTimeoutCall = self.openHandshakeTimeoutCall, None
        if timer is not None:
            timer.cancel()
        admission, self._admission = self._admission, None
        if admission is not None and self.state == self.STATE_CLOSED:
            admission.cancel()

    def onOpen(self) -> None:
        """The connection is open (Autobahn says so, before it handles what came early)."""
        self._is_open = True
        self._producer_registered = True
        self.transport.registerProducer(self, True)
        if not self.parkable:
            release_to_reactor(self.transport)
        self.opened()

    def _onOpen(self) -> None:
        # Autobahn's own looks at the TLS channel and the certificate first; nobody asks for those.
        self.onOpen()

    def onOpenHandshakeTimeout(self) -> None:
        """The time for the opening handshake is up."""
        self.openHandshakeTimeoutCall = None
        if self.state != self.STATE_CONNECTING:
            return
        if self._request is not None:
            self.refuse(
                RequestRefusedError(
                    503, "timeout", "the connection could not be admitted in time", [retry_after_header(1)]
                )
            )
            return
        self.factory.metrics.refused["timeout"] += 1
        self.dropConnection(abort=True)
        self._finish_handshake()

    def failHandshake(self, reason: str, code: int = 400, responseHeaders: object = None) -> None:
        """Autobahn found fault with what was checked here already."""
        self.refuse(RequestRefusedError(400, "upgrade", "this is no WebSocket handshake"))

    def connectionLost(self, reason: Any) -> None:
        """The transport is gone."""
        super().connectionLost(reason)
        self._finish_handshake()
        self._request = None


@implementer(IProtocolNegotiationFactory)
class ServerFactory(WebSocketServerFactory):  # type: ignore[misc]
    """Makes :class:`GuardedServerProtocol` connections, and holds what they share."""

    log = NullLogger()
    noisy = False
    #: whether an address is known from the first bytes on, not before
    behind_proxy = False

    def __init__(
        self,
        protocol: type[ServerProtocol],
        *,
        metrics: Metrics,
        reactor: Any,
        max_message_size: int,
        send_buffer: int,
        burst: int = 0,
        max_openings: float = float("inf"),
        openings_per_address: float = 0.0,
        cork: Cork | None = None,
        reassembly_budget: ReassemblyBudget | None = None,
    ) -> None:
        """``max_message_size`` is in bytes, as are ``send_buffer`` and ``burst``
        (:class:`~gateway.websocket.limits.Backlog`); ``max_openings`` counts opening handshakes that are in progress,
        ``openings_per_address`` those that begin a second, where 0 means no limits per address. ``turn`` is shared by
        all connections of a node, ``unfinished`` by those of its clients."""
        super().__init__(server="", reactor=reactor)
        options = {"maxMessagePayloadSize": max_message_size, "send_buffer": send_buffer, "burst": burst}
        self.protocol = type(protocol.__name__, (protocol,), options)
        self.metrics = metrics
        self.handshake_limiter = HandshakeLimiter(reactor.seconds, max_openings, openings_per_address)
        self.clock = reactor.seconds
        self.error_log = RateLimitedLogger(reactor.seconds)
        self._batched_timer = TimerWheel(reactor)
        self.cork = cork or Cork(reactor.seconds)
        self.reassembly_budget = reassembly_budget or ReassemblyBudget(max_message_size, metrics)

    def acceptableProtocols(self) -> list[bytes]:
        """What is spoken behind TLS; without it Twisted fails every handshake that offers a protocol (ALPN)."""
        return [b"http/1.1"]
