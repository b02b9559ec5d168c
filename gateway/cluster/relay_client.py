"""Client side of the /v1/relay handshake: connects a client to another node, as if it had connected there itself.

-> GET /v1/relay?client_id=x&address=192.0.2.7%3A4711&until=0 HTTP/1.1      to the node's peer URL
     Upgrade: websocket, the client's subprotocols except its token, Authorization: Wsgateway-Peer …
<- HTTP/1.1 101 Switching Protocols      from here on the client's bytes, both ways
<- 429                                   a refusal that is passed on to the client
<- anything else, or nothing             the node counts as unreachable

After the 101 reading pauses until the relay is attached to the client's connection; bytes that came with it are
buffered.

The path of a peer URL is for a reverse proxy in front of the node: the signed target is the one that the node sees.
"""

from __future__ import annotations

import base64
import math
import os
import socket
from enum import Enum, auto
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, urlsplit

from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ConnectionClosed,
    ConnectionRefusedError,
    DNSLookupError,
)
from twisted.internet.interfaces import IAddress, IDelayedCall, IStreamClientEndpoint
from twisted.internet.protocol import Factory, connectionDone
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.auth.bearer import is_bearer
from gateway.clients.interface import ConnectRequest, IRelay
from gateway.cluster.auth import PeerTLS
from gateway.cluster.errors import PeerUnreachableError, RelayRefusedError
from gateway.cluster.interface import IRelayDialer
from gateway.cluster.relay import RelayEndState, SocketRelays
from gateway.metrics import Metrics
from gateway.net.tls import describe_tls_error
from gateway.net.transport import set_protocol, swap_protocol
from gateway.protocol.errors import InvalidResponseError, RequestRefusedError
from gateway.protocol.handshake import (
    FORWARDED_REFUSALS,
    HandshakeResponse,
    check_upgrade_response,
    find_response_head,
    parse_refusal,
    parse_response,
)
from gateway.settings import ConfigError

#: the most bytes buffered before the relay is attached: one read of the socket, which then pauses
MAX_EARLY_DATA = 2**17


class HandshakeState(Enum):
    """State of the handshake of one relay.

    CONNECTING -request sent-> WAITING_HEAD -101-> OPEN -attach()-> ATTACHED
                               WAITING_HEAD -429-> WAITING_BODY -body-> ABANDONED
    any but ATTACHED -abandon()-> ABANDONED      any but ATTACHED -connectionLost()-> LOST
    """

    CONNECTING = auto()
    WAITING_HEAD = auto()
    WAITING_BODY = auto()
    #: the node has responded with 101
    OPEN = auto()
    #: the transport has been handed over to the relay
    ATTACHED = auto()
    #: refused, cancelled, or failed
    ABANDONED = auto()
    LOST = auto()


@implementer(IRelay)
class RelayHandshake(TwistedProtocol):
    """The connection to the other node until the relay is attached."""

    #: set before :meth:`send_request`, and ``None`` after :meth:`attach`
    transport: Any = None

    def __init__(self, relays: SocketRelays, client_id: str, node_id: str, key: str, offered: tuple[str, ...]) -> None:
        self._relays = relays
        self._client_id = client_id
        self._node_id = node_id
        self._key = key
        self._offered = offered
        self._waiter: Deferred[None] | None = None
        self._response: HandshakeResponse | None = None
        self._state = HandshakeState.CONNECTING
        #: bytes that were received and not handled
        self._buffer = b""

    def send_request(self, request: bytes) -> Deferred[None]:
        """Send the request; fires when the node responds with 101.

        Fails with :class:`~gateway.protocol.errors.RequestRefusedError` for a refusal that is passed on to the client,
        with :class:`~gateway.cluster.errors.RelayRefusedError` for any other response, with
        :class:`~gateway.protocol.errors.InvalidResponseError`, or with the reason of the loss of the connection.
        """
        waiter: Deferred[None] = Deferred(self._cancelled)
        self._waiter = waiter
        self._state = HandshakeState.WAITING_HEAD
        self.transport.write(request)
        return waiter

    def _cancelled(self, waiter: Deferred[None]) -> None:
        self._waiter = None
        self.abandon()

    def dataReceived(self, data: bytes) -> None:
        self._buffer += data
        if self._state is HandshakeState.OPEN:
            if len(self._buffer) > MAX_EARLY_DATA:
                self.abandon()
        elif self._state in (HandshakeState.WAITING_HEAD, HandshakeState.WAITING_BODY):
            try:
                self._read_response()
            except (InvalidResponseError, RelayRefusedError, RequestRefusedError):
                self._fail(Failure())

    def _read_response(self) -> None:
        if self._response is None:
            end = find_response_head(self._buffer)
            if not end:
                return
            self._response = parse_response(self._buffer[:end])
            self._buffer = self._buffer[end:]
        response = self._response
        if response.status == 101:
            check_upgrade_response(response, self._key, self._offered)
            self._state = HandshakeState.OPEN
            self.transport.pauseProducing()
            waiter, self._waiter = self._waiter, None
            assert waiter is not None
            waiter.callback(None)
        elif response.status not in FORWARDED_REFUSALS:
            raise RelayRefusedError(f"it responded with {response.status}")
        elif len(self._buffer) >= response.body_size():
            self._raise_refusal(response)
        else:
            self._state = HandshakeState.WAITING_BODY

    def _raise_refusal(self, response: HandshakeResponse) -> None:
        refusal = parse_refusal(response, self._buffer[: response.body_size()])
        assert refusal is not None
        raise refusal

    def _fail(self, failure: Failure) -> None:
        waiter, self._waiter = self._waiter, None
        self.abandon()
        if waiter is not None:
            waiter.errback(failure)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        previous_state, self._state = self._state, HandshakeState.LOST
        if self._waiter is None:
            return
        if previous_state is HandshakeState.WAITING_BODY and self._response is not None:
            # The body of the refusal is incomplete, its status is passed on.
            try:
                self._raise_refusal(self._response)
            except RequestRefusedError:
                reason = Failure()
        self._fail(reason)

    # IRelay.

    def attach(self, protocol: Any) -> None:
        """Relay between this connection and that of ``protocol``, whose transport is taken over. Errors abort the
        relay, and are logged."""
        relay = self._relays.create(self._client_id, self._node_id)
        try:
            to_node = swap_protocol(protocol, relay.client)
            to_client, self._buffer = self._buffer, b""
            if self._state is HandshakeState.LOST:
                relay.node.state = RelayEndState.LOST
            else:
                set_protocol(self.transport, relay.node)
            self.transport = None
            self._state = HandshakeState.ATTACHED
            relay.start(to_client, to_node)
        except Exception:  # noqa: BLE001
            self._relays.error_log.failure("error in starting a relay")
            self.abandon()
            relay.abort()

    def abandon(self) -> None:
        """Abort the connection, unless it is attached."""
        if self._state in (HandshakeState.ATTACHED, HandshakeState.LOST):
            return
        self._state = HandshakeState.ABANDONED
        if self.transport is not None:
            self.transport.abortConnection()


RELAY_PATH = "/v1/relay"
#: errors that are not logged with a traceback
_EXPECTED_ERRORS = (
    InvalidResponseError,
    RelayRefusedError,
    ConfigError,
    ConnectError,
    ConnectionClosed,
    DNSLookupError,
    OSError,
    SSL.Error,
    ValueError,
    VerificationError,
)


class _Signer(Protocol):
    """What the dialer needs of :class:`~gateway.cluster.auth.PeerAuth`."""

    def sign(self, to: str, method: str, target: str, client_id: str = "", address: str = "") -> str: ...


@implementer(IRelayDialer)
class RelayDialer:
    """Opens relays to other nodes."""

    def __init__(
        self,
        reactor: Any,
        peer_auth: _Signer,
        relays: SocketRelays,
        metrics: Metrics,
        *,
        heartbeat: float,
        lease: float,
        tls: PeerTLS | None = None,
    ) -> None:
        """The kernel sends keep-alive probes each ``heartbeat`` seconds, and closes a connection to a node that
        acknowledges nothing for ``lease`` seconds. ``tls`` is for wss peer URLs."""
        self._reactor = reactor
        self._peer_auth = peer_auth
        self._relays = relays
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._lease = lease
        self._tls = tls or PeerTLS()

    def dial(self, request: ConnectRequest, node_id: str, peer_url: str, timeout: float) -> Deferred[IRelay]:
        """Connect a client to another node. Cancelling the Deferred aborts the connection."""
        attempt = _DialAttempt(timeout)
        dialing = Deferred.fromCoroutine(self._dial(attempt, request, node_id, peer_url))
        attempt.timer = self._reactor.callLater(timeout, attempt.time_out, dialing)
        return dialing.addBoth(attempt.finish)

    async def _dial(
        self, attempt: _DialAttempt, connect_request: ConnectRequest, node_id: str, peer_url: str
    ) -> IRelay:
        handshake = None
        try:
            endpoint, request, key = self._prepare(connect_request, node_id, peer_url)
            handshake = RelayHandshake(
                self._relays, connect_request.client_id, node_id, key, offered_subprotocols(connect_request)
            )
            await endpoint.connect(_SingleProtocolFactory(handshake))
            self._enable_keepalive(handshake.transport)
            attempt.sent = True
            await handshake.send_request(request)
            return handshake
        except BaseException as e:
            if handshake is not None:
                handshake.abandon()
            if isinstance(e, (CancelledError, ConnectingCancelledError)) and not attempt.timed_out:
                raise CancelledError from None
            if isinstance(e, RequestRefusedError) or not isinstance(e, Exception):
                raise
            self._metrics.relay_failures += 1
            refused = isinstance(e, ConnectionRefusedError)
            raise PeerUnreachableError(
                self._describe_error(attempt, e, peer_url), sent=attempt.sent, refused=refused
            ) from None

    def _prepare(
        self, connect_request: ConnectRequest, node_id: str, peer_url: str
    ) -> tuple[IStreamClientEndpoint, bytes, str]:
        if not peer_url.isascii() or not peer_url.isprintable():
            raise ValueError("it is not a URL")
        url = urlsplit(peer_url)
        client_id, address = connect_request.client_id, connect_request.address
        target = (
            f"{RELAY_PATH}?client_id={quote(client_id, safe='')}&address={quote(address, safe='')}"
            f"&until={connect_request.expires_at:.0f}"
        )
        if connect_request.max_expires_at:
            target += f"&cap={connect_request.max_expires_at:.0f}"
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        lines = [
            f"GET {url.path}{target} HTTP/1.1",
            f"Host: {url.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            f"Authorization: {self._peer_auth.sign(node_id, 'GET', target, client_id, address)}",
        ]
        offered = offered_subprotocols(connect_request)
        if offered:
            lines.append(f"Sec-WebSocket-Protocol: {', '.join(offered)}")
        return self._endpoint(url), "\r\n".join((*lines, "", "")).encode("ascii"), key

    def _endpoint(self, url: SplitResult) -> IStreamClientEndpoint:
        host, secure = url.hostname, url.scheme == "wss"
        if not host or url.scheme not in ("ws", "wss"):
            raise ValueError("it is not a URL of the form ws://host[:port] or wss://host[:port]")
        port = url.port or (443 if secure else 80)
        # Without a timeout: that of the dial includes the connect. An address needs no resolver thread.
        endpoint_class: Any = TCP4ClientEndpoint if isIPAddress(host) else TCP6ClientEndpoint
        if not isIPAddress(host) and not isIPv6Address(host):
            endpoint_class = HostnameEndpoint
        endpoint: IStreamClientEndpoint = endpoint_class(self._reactor, host, port, timeout=None)
        if secure:
            endpoint = wrapClientTLS(self._tls.options(host), endpoint)
        return endpoint

    def _enable_keepalive(self, transport: Any) -> None:
        """Let the kernel detect a node that no longer responds."""
        while isinstance(transport, ProtocolWrapper):
            transport = transport.transport
        skt: socket.socket = transport.getHandle()
        skt.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        skt.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        skt.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, math.ceil(self._heartbeat))
        skt.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, math.ceil(self._heartbeat))
        skt.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(self._lease * 1000))

    def _describe_error(self, attempt: _DialAttempt, e: Exception, peer_url: str) -> str:
        peer_url = peer_url if peer_url.isprintable() else ascii(peer_url)
        if attempt.timed_out:
            return f"{peer_url} did not take a relay within {attempt.timeout:g} s"
        if not isinstance(e, _EXPECTED_ERRORS):
            self._relays.error_log.failure("error in opening a relay")
        problem = describe_tls_error(e) or " ".join(str(e).split()) or type(e).__name__
        return f"{peer_url} cannot take a relay: {problem}"


class _SingleProtocolFactory(Factory):
    """Returns a protocol that exists already."""

    noisy = False

    def __init__(self, protocol: RelayHandshake) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: IAddress | None) -> RelayHandshake:
        return self._protocol


class _DialAttempt:
    """Timeout and progress of one dial."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.timed_out = False
        #: whether the other node may have received the request
        self.sent = False
        self.timer: IDelayedCall | None = None

    def time_out(self, dialing: Deferred[IRelay]) -> None:
        """Cancel the dial."""
        self.timed_out = True
        dialing.cancel()

    def finish(self, result: Any) -> Any:
        """Cancel the timer."""
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
        return result


def offered_subprotocols(request: ConnectRequest) -> tuple[str, ...]:
    """Return the subprotocols that are offered to the other node for a client: without those that carry its token."""
    return tuple(name for name in request.subprotocols if not is_bearer(name))
