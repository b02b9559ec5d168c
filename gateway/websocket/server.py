"""The opening handshake of the server, for clients, backends and peers.

-> GET /v1/connect?client_id=robot-7 HTTP/1.1 …        the head is parsed strictly, then parsing stops
                                                        admit() decides; bytes received meanwhile are held
<- HTTP/1.1 101 Switching Protocols …                   open: the held bytes are handled
<- HTTP/1.1 503 Service Unavailable … {"error": …}      or refused: the response reaches even a client still sending

A connection that is lost while its admission is pending cancels the admission, and never opens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
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
from gateway.protocol.frames import CloseCode
from gateway.protocol.handshake import (
    HandshakeRequest,
    encode_refusal,
    find_request_head,
    parse_request,
    retry_after_header,
)
from gateway.util.cork import Cork
from gateway.util.log import RateLimitedLogger
from gateway.util.timers import Timer, TimerWheel
from gateway.websocket.connection import ConnectionPhase, ServerConnection
from gateway.websocket.handshake_limiter import HandshakeLimiter, HandshakeSlot
from gateway.websocket.reassembly import ReassemblyBudget
from gateway.websocket.slim_protocol import NullLogger

__all__ = ["HandshakeRequest", "RequestRefusedError", "ServerFactory", "ServerProtocol", "format_address"]

#: bytes held while the admission is pending, beyond which reading pauses
MAX_EARLY_DATA = 2**16


def format_address(address: object) -> str:
    """Return ``host:port`` of an address, ``[host]:port`` for IPv6, ``unix`` for a UNIX socket."""
    if isinstance(address, IPv4Address):
        return f"{address.host}:{address.port}"
    if isinstance(address, IPv6Address):
        return f"[{address.host}]:{address.port}"
    return "unix"


class ServerProtocol(ServerConnection):
    """One connection, from accepted to closed. Subclasses set ``path``, and override :meth:`admit` and the hooks of
    :class:`~gateway.websocket.connection.ServerConnection`."""

    #: the only path that is served
    path = "/"
    #: whether the transport's connection was open before it got this protocol
    already_open = False

    _admission: Deferred[str | None] | None = None
    _request: HandshakeRequest | None = None
    #: bytes of ``data`` already searched for the end of the head
    _scanned = 0
    _handshake_slot: HandshakeSlot | None = None
    #: why the request is refused, unless it is no opening handshake
    _postponed_refusal: RequestRefusedError | None = None
    #: more headers of the response to a request that was admitted; set by ``admit``
    response_headers: Mapping[str, str] = MappingProxyType({})
    openHandshakeTimeoutCall: Timer | None = None

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        """Decide on a request, a valid opening handshake for ``path``.

        Fires with the subprotocol to speak (one that was offered) or ``None``. Raises, or fails with,
        :class:`~gateway.protocol.errors.RequestRefusedError` to refuse. The Deferred is cancelled when the connection
        is lost or the handshake times out. Once it has fired, the connection opens in the same call, or
        :meth:`admission_abandoned` is called.
        """
        return succeed(None)

    def may_respond(self, data: bytes) -> bool:
        """Return whether :meth:`respond` may have a response to a request that begins with these bytes."""
        return False

    def respond(self, head: bytes) -> bytes | None:
        """Return the whole response to a request that is no opening handshake, or ``None`` to refuse it."""
        return None

    def admission_abandoned(self) -> None:
        """Undo an admission that was granted: the connection could not be opened."""

    def connectionMade(self) -> None:
        if self.already_open:
            self.resume_open()
            return
        self.last_received_at = self.factory.clock()
        set_no_delay = getattr(self.transport, "setTcpNoDelay", None)
        if set_no_delay is not None:
            # A wrapped UNIX socket lacks the method; on a connection that is already lost the call fails.
            with contextlib.suppress(AttributeError, OSError):
                set_no_delay(True)
        self._connectionMade()
        try:
            self._handshake_slot = slot = self.factory.handshake_limiter.started()
            if not self.factory.behind_proxy:
                self._identify_address(slot)
                if ISSLTransport.providedBy(self.transport):
                    # The TLS handshake precedes the first bytes, and costs the most.
                    slot.charged()
        except RequestRefusedError as refusal:
            self._over_limit(refusal)

    def _over_limit(self, refusal: RequestRefusedError) -> None:
        if not self.may_respond(self.data):
            self.refuse(refusal)
            return
        self._postponed_refusal = refusal
        self.factory.handshake_limiter.postpone(self._refuse_postponed)

    def _refuse_postponed(self) -> None:
        if self._postponed_refusal is not None:
            self.refuse(self._postponed_refusal)

    def _identify_address(self, slot: HandshakeSlot) -> None:
        peer = self.transport.getPeer()
        self.peer = self.address = format_address(peer)
        slot.identified(getattr(peer, "host", ""))

    def _first_data_received(self) -> None:
        slot = self._handshake_slot
        if slot is None:
            # There are too many handshakes in progress.
            return
        try:
            if self.factory.behind_proxy:
                self._identify_address(slot)
            # Before the head is parsed, to limit guessing of tokens and clients that send a head slowly, too.
            slot.charged()
        except RequestRefusedError as refusal:
            if self._postponed_refusal is None:
                self._over_limit(refusal)

    def dataReceived(self, data: bytes) -> None:
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
                if self.state != self.STATE_CONNECTING:
                    return
            self.data += data
            if self._postponed_refusal is not None and not self.may_respond(self.data):
                raise self._postponed_refusal
            end = find_request_head(self.data, self._scanned)
            self._scanned = len(self.data)
            if not end:
                return
            response = self.respond(self.data[:end])
            if response is not None:
                self.factory.handshake_limiter.health_checked(getattr(self.transport.getPeer(), "host", ""))
                self._respond(response)
                return
            if self._postponed_refusal is not None:
                raise self._postponed_refusal
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
        # Before the connection opens, since an early message may pause reading itself.
        self.resume_reading()
        try:
            self.succeedHandshake((subprotocol, self.response_headers) if self.response_headers else subprotocol)
        except Exception:  # noqa: BLE001
            self._on_open_error()
        # A subprotocol may carry a token; and all of it takes memory.
        self._request = self.http_response_data = None
        self.websocket_protocols = ()

    def _on_open_error(self, failure: Failure | None = None) -> None:
        self.factory.error_log.failure("an error in opening a connection", failure)
        if self.state == self.STATE_CONNECTING:
            self.refuse(RequestRefusedError(500, "internal", "internal error"))
            self.admission_abandoned()
        else:
            self.close_with(CloseCode.INTERNAL_ERROR, "internal error")

    def _on_admission_failed(self, failure: Failure) -> None:
        self._admission = None
        if self.state != self.STATE_CONNECTING:
            # Cancelled: the connection is lost or refused.
            return
        if isinstance(failure.value, RequestRefusedError):
            self.refuse(failure.value)
        else:
            self.factory.error_log.failure("an error in admitting a connection", failure)
            self.refuse(RequestRefusedError(500, "internal", "internal error"))

    def refuse(self, refusal: RequestRefusedError) -> None:
        """Answer the request with an HTTP error and close the connection; a no-op after the handshake."""
        if self.state != self.STATE_CONNECTING:
            return
        self.factory.metrics.refused[refusal.reason] += 1
        self._respond(encode_refusal(refusal))

    def _respond(self, response: bytes) -> None:
        self._phase = ConnectionPhase.REFUSED
        self.transport.write(response)
        self.dropConnection(abort=False)
        self._finish_handshake()
        # What the client still sends must be read, or the response may not reach it.
        self.resume_reading()

    def _finish_handshake(self) -> None:
        slot, self._handshake_slot = self._handshake_slot, None
        if slot is not None:
            slot.finished()
        if self._postponed_refusal is not None:
            self._postponed_refusal = None
            self.factory.handshake_limiter.discard_postponed(self._refuse_postponed)
        timer, self.openHandshakeTimeoutCall = self.openHandshakeTimeoutCall, None
        if timer is not None:
            timer.cancel()
        admission, self._admission = self._admission, None
        if admission is not None and self.state == self.STATE_CLOSED:
            admission.cancel()

    def onOpen(self) -> None:
        """Handle the open connection. Autobahn calls this before it handles the bytes that came early."""
        self._phase = ConnectionPhase.OPEN
        self._producer_registered = True
        self.transport.registerProducer(self, True)
        if not self.parkable:
            release_to_reactor(self.transport)
        self.opened()

    def _onOpen(self) -> None:
        # Autobahn's own reads the TLS channel id and the certificate first; the gateway does not use them.
        self.onOpen()

    def onOpenHandshakeTimeout(self) -> None:
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
        if self._postponed_refusal is not None:
            self.refuse(self._postponed_refusal)
            return
        self.factory.metrics.refused["timeout"] += 1
        self.dropConnection(abort=True)
        self._finish_handshake()

    def failHandshake(self, reason: str, code: int = 400, responseHeaders: object = None) -> None:
        """Refuse a request that passed the checks here but not Autobahn's."""
        self.refuse(RequestRefusedError(400, "upgrade", "this is no WebSocket handshake"))

    def connectionLost(self, reason: Any) -> None:
        super().connectionLost(reason)
        self._finish_handshake()
        self._request = None


@implementer(IProtocolNegotiationFactory)
class ServerFactory(WebSocketServerFactory):  # type: ignore[misc]
    """Build :class:`ServerProtocol` connections, and hold what they share."""

    log = NullLogger()
    noisy = False
    #: whether the address is known from the first bytes on only (PROXY protocol)
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
        """``max_message_size``, ``send_buffer`` and ``burst`` are in bytes; for the latter two see
        :class:`~gateway.websocket.slow_consumer.SlowConsumerDetector`. ``max_openings`` limits opening handshakes in
        progress, ``openings_per_address`` those started per second and network; 0 means no limit per network. ``cork``
        is shared by all connections of a node, ``reassembly_budget`` by those of its clients."""
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
        """Return the protocols spoken over TLS. Without them Twisted fails every handshake that offers one (ALPN)."""
        return [b"http/1.1"]
