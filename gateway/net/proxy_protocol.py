"""The PROXY protocol: behind a load balancer, which says by a header at the very beginning who a client is.

    -> PROXY TCP4 203.0.113.7 10.0.0.5 5555 443\r\n       version 1; or TCP6, or UNKNOWN
    -> \r\n\r\n\0\r\nQUIT\n …                             version 2, in binary; PROXY, or LOCAL
       what the client said, TLS included

UNKNOWN and LOCAL are the load balancer's own connections, such as its health checks: the address is its own then, as it
is where the client came by what is no address. A connection that begins with anything else is dropped.

https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocolFactory, IStreamServerEndpoint
from twisted.logger import Logger
from twisted.protocols.haproxy._v2parser import V2Parser
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.net.errors import InvalidProxyHeaderError
from gateway.util.log import LogLimiter

#: the most bytes of a header of version 1, its end included; and of version 2, which may have more than addresses
MAX_V1_SIZE, MAX_V2_SIZE = 107, 4096
#: the log tells of bad headers once in so many seconds
LOG_INTERVAL = 10.0

_V1_PREFIX = b"PROXY "
_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED_SIZE = 16
#: ``None`` in place of an address: it is the load balancer's own
_Addresses = tuple[IAddress | None, IAddress | None]
_V1_LINE = re.compile(rb"PROXY (?:UNKNOWN(?: [^\r\n]*)?|TCP([46]) (\S+) (\S+) ([0-9]{1,5}) ([0-9]{1,5}))")

_log = Logger()


def parse_header(data: bytes) -> tuple[_Addresses, int] | None:
    """What a connection begins with: the addresses of the client and of where it connected to, and the length of the
    header; ``None`` while more of it is to come.

    Raises :class:`BadHeader`.
    """
    if data.startswith(_V1_PREFIX):
        return _parse_v1(data)
    if data.startswith(_V2_SIGNATURE):
        return _parse_v2(data)
    if _V1_PREFIX.startswith(data) or _V2_SIGNATURE.startswith(data):
        return None
    raise InvalidProxyHeaderError("it begins with something else")


def _parse_v1(data: bytes) -> tuple[_Addresses, int] | None:
    end = data.find(b"\r\n", 0, MAX_V1_SIZE)
    if end < 0:
        if len(data) >= MAX_V1_SIZE:
            raise InvalidProxyHeaderError(f"its line is longer than {MAX_V1_SIZE} bytes")
        return None
    # Twisted's parser takes anything for an address, and whatever int() takes for a port.
    found = _V1_LINE.fullmatch(data[:end])
    if found is None:
        raise InvalidProxyHeaderError("its line is none of version 1")
    if found[1] is None:
        return (None, None), end + 2
    kind: Any = ipaddress.IPv4Address if found[1] == b"4" else ipaddress.IPv6Address
    source, destination = (_parse_address(kind, found[i].decode("latin-1"), int(found[i + 2])) for i in (2, 3))
    return (source, destination), end + 2


def _parse_v2(data: bytes) -> tuple[_Addresses, int] | None:
    if len(data) < _V2_FIXED_SIZE:
        return None
    size = _V2_FIXED_SIZE + int.from_bytes(data[14:16], "big")
    if size > MAX_V2_SIZE:
        raise InvalidProxyHeaderError(f"it is longer than {MAX_V2_SIZE} bytes")
    if len(data) < size:
        return None
    try:
        info = V2Parser.parse(data[:size])
    except Exception:  # noqa: BLE001 - it means to raise one kind, but that is what comes from outside
        raise InvalidProxyHeaderError("it is none of version 2") from None
    return (_canonical_address(info.source), _canonical_address(info.destination)), size


def _canonical_address(address: Any) -> IAddress | None:
    """The same, as it is usually written; ``None`` for one that is no address of TCP."""
    if getattr(address, "type", "") != "TCP":
        return None
    kind: Any = ipaddress.IPv4Address if isinstance(address, IPv4Address) else ipaddress.IPv6Address
    return _parse_address(kind, address.host, address.port)


def _parse_address(
    kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], host: str, port: int
) -> IPv4Address | IPv6Address:
    try:
        parsed = kind(host)
    except ValueError:
        raise InvalidProxyHeaderError("it has an address that is none") from None
    if port > 65535 or "%" in host:
        raise InvalidProxyHeaderError("it has an address or a port that is none")
    return (IPv4Address if parsed.version == 4 else IPv6Address)("TCP", str(parsed), port)


class ProxyHeaderErrors:
    """Counts them, and tells of them in the log now and then."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._log_limiter = LogLimiter(clock, LOG_INTERVAL)

    def record(self, address: object, problem: str) -> None:
        """One came from that address."""
        self._metrics.refused["proxy"] += 1
        untold = self._log_limiter.allow()
        if untold is None:
            return
        _log.warn(
            "a connection from {host} has no good PROXY header: {problem} ({untold} times more since this was last "
            "said); only a load balancer that sends one may connect to a haproxy: endpoint",
            host=getattr(address, "host", "here"),
            problem=problem,
            untold=untold,
        )


class ProxyProtocolWrapper(ProtocolWrapper):
    """One connection. It is let go of when its client is parked."""

    factory: ProxyProtocolFactory
    transport: Any
    #: what came of the header; ``None`` once it was all there, or was bad
    _header_buffer: bytes | None = b""
    _dropped = False
    _peer: IAddress | None = None
    _host: IAddress | None = None

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        if self._header_buffer is None:
            if not self._dropped:
                self.wrappedProtocol.dataReceived(data)
            return
        self._header_buffer += data
        try:
            found = parse_header(self._header_buffer)
        except InvalidProxyHeaderError as e:
            self._drop(str(e))
            return
        if found is None:
            return
        (self._peer, self._host), size = found
        rest, self._header_buffer = self._header_buffer[size:], None
        if rest:
            self.wrappedProtocol.dataReceived(rest)

    def _drop(self, problem: str) -> None:
        self._header_buffer, self._dropped = None, True
        if self.factory.header_errors is not None:
            self.factory.header_errors.record(self.transport.getPeer(), problem)
        self.transport.abortConnection()

    def getPeer(self) -> IAddress:
        """Where the client is."""
        peer: IAddress = self._peer or self.transport.getPeer()
        return peer

    def getHost(self) -> IAddress:
        """Where the client connected to."""
        host: IAddress = self._host or self.transport.getHost()
        return host


class ProxyProtocolFactory(WrappingFactory):
    """Puts the PROXY protocol between a transport and a protocol."""

    protocol: Callable[..., Any] = ProxyProtocolWrapper
    noisy = False

    def __init__(self, wrapped: IProtocolFactory, header_errors: ProxyHeaderErrors | None = None) -> None:
        super().__init__(wrapped)  # type: ignore[no-untyped-call]
        self.header_errors = header_errors

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Make the protocol of a connection; ``None``, as of the factory within, drops it."""
        within = self.wrappedFactory.buildProtocol(addr)
        return None if within is None else self.protocol(self, within)

    def registerProtocol(self, p: object) -> None:
        """Twisted keeps a list of its connections, at which nobody looks."""

    def unregisterProtocol(self, p: object) -> None:
        """See there."""


@implementer(IStreamServerEndpoint)
class ProxyProtocolEndpoint:
    """The PROXY protocol on another endpoint."""

    def __init__(self, wrapped: IStreamServerEndpoint, header_errors: ProxyHeaderErrors | None = None) -> None:
        self._wrapped = wrapped
        self._header_errors = header_errors

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen, with a factory for what is behind the header."""
        listening: Deferred[IListeningPort] = self._wrapped.listen(ProxyProtocolFactory(factory, self._header_errors))
        return listening
