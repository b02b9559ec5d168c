"""Opens the way for a client's bytes to another node, which takes the client as if it had come by itself.

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
from twisted.internet.protocol import Factory
from twisted.protocols.policies import ProtocolWrapper
from zope.interface import implementer

from gateway.cluster.answer import BadAnswer
from gateway.cluster.interface import IRelaying, PeerUnreachable
from gateway.cluster.peer_tls import PeerTLS
from gateway.cluster.relay import Relays
from gateway.cluster.way import Declined, Way
from gateway.edge.head import Refusal
from gateway.edge.interface import Arrival, IRelay
from gateway.settings import ConfigError
from gateway.telemetry.metrics import Metrics
from gateway.tls_errors import explain_tls

PATH = "/v1/relay"
#: what a client's token follows, in a subprotocol: it is not for another node
_BEARER = "wsgateway.bearer."
#: what is no error of this node's
_EXPECTED = (
    BadAnswer,
    Declined,
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
        """See :meth:`gateway.cluster.credentials.Credentials.sign`."""


@implementer(IRelaying)
class Relaying:
    """Opens relays at this node."""

    def __init__(
        self,
        reactor: Any,
        credentials: _Signer,
        relays: Relays,
        metrics: Metrics,
        *,
        heartbeat: float,
        lease: float,
        tls: PeerTLS | None = None,
    ) -> None:
        """A node that is silent is noticed by probes each ``heartbeat`` seconds, or when it acknowledges nothing for
        ``lease`` seconds. ``tls`` is for wss peer urls."""
        self._reactor = reactor
        self._credentials = credentials
        self._relays = relays
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._lease = lease
        self._tls = tls or PeerTLS()

    def open(self, arrival: Arrival, node_id: str, peer_url: str, timeout: float) -> Deferred[IRelay]:
        """See :meth:`IRelaying.open`. Cancelling it closes what there is."""
        opening = _Opening(timeout)
        running = Deferred.fromCoroutine(self._open(opening, arrival, node_id, peer_url))
        opening.timer = self._reactor.callLater(timeout, opening.late, running)
        return running.addBoth(opening.over)

    async def _open(self, opening: _Opening, arrival: Arrival, node_id: str, peer_url: str) -> IRelay:
        way = None
        try:
            endpoint, request, key = self._prepare(arrival, node_id, peer_url)
            way = Way(self._relays, arrival.client_id, node_id, key, offers(arrival))
            await endpoint.connect(_Once(way))
            self._watch_over(way.transport)
            opening.sent = True
            await way.ask(request)
            return way
        except BaseException as e:
            if way is not None:
                way.abandon()
            if isinstance(e, (CancelledError, ConnectingCancelledError)) and not opening.timed_out:
                raise CancelledError from None
            if isinstance(e, Refusal) or not isinstance(e, Exception):
                raise
            self._metrics.relay_failures += 1
            refused = isinstance(e, ConnectionRefusedError)
            raise PeerUnreachable(self._problem(opening, e, peer_url), sent=opening.sent, refused=refused) from None

    def _prepare(self, arrival: Arrival, node_id: str, peer_url: str) -> tuple[IStreamClientEndpoint, bytes, str]:
        if not peer_url.isascii() or not peer_url.isprintable():
            raise ValueError("it is no url")
        url = urlsplit(peer_url)
        target = (
            f"{PATH}?client_id={quote(arrival.client_id, safe='')}&address={quote(arrival.address, safe='')}"
            f"&until={arrival.until:.0f}{f'&cap={arrival.cap:.0f}' if arrival.cap else ''}"
        )
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        lines = [
            f"GET {url.path}{target} HTTP/1.1",
            f"Host: {url.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            f"Authorization: {self._credentials.sign(node_id, 'GET', target, arrival.client_id, arrival.address)}",
        ]
        offered = offers(arrival)
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

    def _watch_over(self, transport: Any) -> None:
        """Let the kernel find out that a node has vanished without a word."""
        while isinstance(transport, ProtocolWrapper):
            transport = transport.transport
        skt: socket.socket = transport.getHandle()
        skt.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        skt.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        skt.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, math.ceil(self._heartbeat))
        skt.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, math.ceil(self._heartbeat))
        skt.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(self._lease * 1000))

    def _problem(self, opening: _Opening, e: Exception, peer_url: str) -> str:
        peer_url = peer_url if peer_url.isprintable() else ascii(peer_url)
        if opening.timed_out:
            return f"{peer_url} did not take a relay within {opening.timeout:g} s"
        if not isinstance(e, _EXPECTED):
            self._relays.troubles.report("an error in opening a relay")
        problem = explain_tls(e) or " ".join(str(e).split()) or type(e).__name__
        return f"{peer_url} cannot take a relay: {problem}"


class _Once(Factory):
    """Makes one protocol, which is there already."""

    noisy = False

    def __init__(self, protocol: Way) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: IAddress | None) -> Way:
        """See there."""
        return self._protocol


class _Opening:
    """What is known of one attempt."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.timed_out = False
        #: whether the other node may have been asked
        self.sent = False
        self.timer: IDelayedCall | None = None

    def late(self, running: Deferred[IRelay]) -> None:
        """The time is up."""
        self.timed_out = True
        running.cancel()

    def over(self, result: Any) -> Any:
        """It has ended, one way or the other."""
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
        return result


def offers(arrival: Arrival) -> tuple[str, ...]:
    """The subprotocols that are offered for a client."""
    return tuple(name for name in arrival.subprotocols if not name.startswith(_BEARER))
