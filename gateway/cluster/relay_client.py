"""One way to another node for a client's bytes: from the request that opens it until the client's connection is there.

-> GET /v1/relay?… HTTP/1.1
<- HTTP/1.1 101 Switching Protocols          reading pauses; what came behind it is held for the client

Opens the way for a client's bytes to another node, which takes the client as if it had come by itself.

-> GET /v1/relay?client_id=x&address=192.0.2.7%3A4711&until=0 HTTP/1.1      to its peer url
     Upgrade: websocket, the client's subprotocols but for its token, Authorization: Wsgateway-Peer …
<- HTTP/1.1 101 Switching Protocols      from here on the client's bytes, both ways
<- 429                                   a refusal that the client gets
<- anything else, or nothing             that node cannot be reached

A prefix of the peer url is for whoever stands before that node: what is signed is what it is asked for itself.
"""

from __future__ import annotations

import base64
import math
import os
import socket
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

from gateway.clients.interface import ConnectRequest, IRelay
from gateway.cluster.auth import PeerTLS
from gateway.cluster.errors import PeerUnreachableError, RelayRefusedError
from gateway.cluster.interface import IRelayDialer
from gateway.cluster.relay import SocketRelays
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

#: how many bytes may come for the client before its connection is there: one read of the socket, which then pauses
MAX_EARLY_DATA = 131072


@implementer(IRelay)
class RelayHandshake(TwistedProtocol):
    """The connection to the other node."""

    #: there is one from before :meth:`ask`
    transport: Any = None

    def __init__(self, relays: SocketRelays, client_id: str, node_id: str, key: str, offered: tuple[str, ...]) -> None:
        self._relays = relays
        self._client_id = client_id
        self._node_id = node_id
        self._key = key
        self._offered = offered
        self._waiter: Deferred[None] | None = None
        self._response: HandshakeResponse | None = None
        self._is_open = False
        self._is_lost = False
        #: what came and was not handled
        self._buffer = b""

    def send_request(self, request: bytes) -> Deferred[None]:
        """Send the request; fires when it is answered with a 101. Fails with :class:`~gateway.protocol.handshake.Refusal`,
        :class:`Declined`, :class:`~gateway.protocol.handshake.BadAnswer`, or why the connection was lost."""
        waiter: Deferred[None] = Deferred(self._cancelled)
        self._waiter = waiter
        self.transport.write(request)
        return waiter

    def _cancelled(self, waiter: Deferred[None]) -> None:
        self._waiter = None
        self.abandon()

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        self._buffer += data
        if self._is_open:
            if len(self._buffer) > MAX_EARLY_DATA:
                self.abandon()
        elif self._waiter is not None:
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
        answer = self._response
        if answer.status == 101:
            check_upgrade_response(answer, self._key, self._offered)
            self._is_open = True
            self.transport.pauseProducing()
            waiter, self._waiter = self._waiter, None
            assert waiter is not None
            waiter.callback(None)
        elif answer.status not in FORWARDED_REFUSALS:
            raise RelayRefusedError(f"it answered {answer.status}")
        elif len(self._buffer) >= answer.body_size():
            self._raise_refusal(answer)

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
        """The connection is gone."""
        self._is_lost = True
        if self._waiter is None:
            return
        if self._response is not None:
            # All of the refusal that there will be.
            try:
                self._raise_refusal(self._response)
            except RequestRefusedError:
                reason = Failure()
        self._fail(reason)

    # IRelay.

    def attach(self, protocol: Any) -> None:
        """See :meth:`IRelay.attach`. Nothing escapes."""
        pipe = self._relays.create(self._client_id, self._node_id)
        try:
            early = swap_protocol(protocol, pipe.client)
            held, self._buffer = self._buffer, b""
            if self._is_lost:
                pipe.node.is_lost = True
            else:
                set_protocol(self.transport, pipe.node)
            self.transport = None
            pipe.start(held, early)
        except Exception:  # noqa: BLE001
            self._relays.error_log.failure("an error in beginning a relay")
            self.abandon()
            pipe.abort()

    def abandon(self) -> None:
        """See :meth:`IRelay.abandon`."""
        if self.transport is not None and not self._is_lost:
            self.transport.abortConnection()


RELAY_PATH = "/v1/relay"
#: what a client's token follows, in a subprotocol: it is not for another node
_BEARER_PREFIX = "wsgateway.bearer."
#: what is no error of this node's
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
    def sign(self, to: str, method: str, target: str, client_id: str = "", address: str = "") -> str:
        """See :meth:`gateway.cluster.auth.Credentials.sign`."""


@implementer(IRelayDialer)
class RelayDialer:
    """Opens relays at this node."""

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
        """A node that is silent is noticed by probes each ``heartbeat`` seconds, or when it acknowledges nothing for
        ``lease`` seconds. ``tls`` is for wss peer urls."""
        self._reactor = reactor
        self._peer_auth = peer_auth
        self._relays = relays
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._lease = lease
        self._tls = tls or PeerTLS()

    def dial(self, request: ConnectRequest, node_id: str, peer_url: str, timeout: float) -> Deferred[IRelay]:
        """See :meth:`IRelaying.open`. Cancelling it closes what there is."""
        opening = _DialAttempt(timeout)
        running = Deferred.fromCoroutine(self._dial(opening, request, node_id, peer_url))
        opening.timer = self._reactor.callLater(timeout, opening.time_out, running)
        return running.addBoth(opening.finish)

    async def _dial(
        self, attempt: _DialAttempt, connect_request: ConnectRequest, node_id: str, peer_url: str
    ) -> IRelay:
        way = None
        try:
            endpoint, request, key = self._prepare(connect_request, node_id, peer_url)
            way = RelayHandshake(
                self._relays, connect_request.client_id, node_id, key, offered_subprotocols(connect_request)
            )
            await endpoint.connect(_SingleProtocolFactory(way))
            self._enable_keepalive(way.transport)
            attempt.sent = True
            await way.send_request(request)
            return way
        except BaseException as e:
            if way is not None:
                way.abandon()
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
            raise ValueError("it is no url")
        url = urlsplit(peer_url)
        target = (
            f"{RELAY_PATH}?client_id={quote(connect_request.client_id, safe='')}&address={quote(connect_request.address, safe='')}"
            f"&until={connect_request.expires_at:.0f}{f'&cap={connect_request.max_expires_at:.0f}' if connect_request.max_expires_at else ''}"
        )
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        lines = [
            f"GET {url.path}{target} HTTP/1.1",
            f"Host: {url.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            f"Authorization: {self._peer_auth.sign(node_id, 'GET', target, connect_request.client_id, connect_request.address)}",
        ]
        offered = offered_subprotocols(connect_request)
        if offered:
            lines.append(f"Sec-WebSocket-Protocol: {', '.join(offered)}")
        return self._endpoint(url), "\r\n".join((*lines, "", "")).encode("ascii"), key

    def _endpoint(self, url: SplitResult) -> IStreamClientEndpoint:
        host, secure = url.hostname, url.scheme == "wss"
        if not host or url.scheme not in ("ws", "wss"):
            raise ValueError("it is no url of the form ws://host[:port] or wss://host[:port]")
        port = url.port or (443 if secure else 80)
        # The time that it may take is counted here, together with the rest. An address needs no thread of a resolver.
        kind: Any = TCP4ClientEndpoint if isIPAddress(host) else TCP6ClientEndpoint
        if not isIPAddress(host) and not isIPv6Address(host):
            kind = HostnameEndpoint
        endpoint: IStreamClientEndpoint = kind(self._reactor, host, port, timeout=None)
        if secure:
            endpoint = wrapClientTLS(self._tls.options(host), endpoint)
        return endpoint

    def _enable_keepalive(self, transport: Any) -> None:
        """Let the kernel find out that a node has vanished without a word."""
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
            self._relays.error_log.failure("an error in opening a relay")
        problem = describe_tls_error(e) or " ".join(str(e).split()) or type(e).__name__
        return f"{peer_url} cannot take a relay: {problem}"


class _SingleProtocolFactory(Factory):
    """Makes one protocol, which is there already."""

    noisy = False

    def __init__(self, protocol: RelayHandshake) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: IAddress | None) -> RelayHandshake:
        """See there."""
        return self._protocol


class _DialAttempt:
    """What is known of one attempt."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.timed_out = False
        #: whether the other node may have been asked
        self.sent = False
        self.timer: IDelayedCall | None = None

    def time_out(self, running: Deferred[IRelay]) -> None:
        """The time is up."""
        self.timed_out = True
        running.cancel()

    def finish(self, result: Any) -> Any:
        """It has ended, one way or the other."""
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
        return result


def offered_subprotocols(request: ConnectRequest) -> tuple[str, ...]:
    """The subprotocols that are offered for a client."""
    return tuple(name for name in request.subprotocols if not name.startswith(_BEARER_PREFIX))
