"""PROXY protocol: read the address of a client from the header that a load balancer sends first on a connection.

    -> PROXY TCP4 203.0.113.7 10.0.0.5 5555 443\r\n       version 1; or TCP6, or UNKNOWN
    -> \r\n\r\n\0\r\nQUIT\n …                             version 2, binary; PROXY, or LOCAL
    -> the bytes of the client, TLS included

UNKNOWN and LOCAL are the load balancer's own connections, such as health checks. The address is then that of the load
balancer, as it is if the header contains an address that is not TCP over IP. A connection that begins with anything
else is dropped.

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

#: maximum size of a header of version 1, with its line end, in bytes
MAX_V1_SIZE = 107
#: maximum size of a header of version 2, with extensions after the addresses, in bytes
MAX_V2_SIZE = 4096
#: minimum time between two log lines about invalid headers, in seconds
LOG_INTERVAL = 10.0

_V1_PREFIX = b"PROXY "
_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED_SIZE = 16
#: source and destination; ``None`` means that of the connection itself
_Addresses = tuple[IAddress | None, IAddress | None]
_V1_LINE = re.compile(rb"PROXY (?:UNKNOWN(?: [^\r\n]*)?|TCP([46]) (\S+) (\S+) ([0-9]{1,5}) ([0-9]{1,5}))")

_log = Logger()


def parse_header(data: bytes) -> tuple[_Addresses, int] | None:
    """Parse the PROXY header at the beginning of a connection.

    Returns the addresses and the size of the header in bytes, or ``None`` if it is incomplete. Raises
    :class:`InvalidProxyHeaderError`.
    """
    if data.startswith(_V1_PREFIX):
        return _parse_v1(data)
    if data.startswith(_V2_SIGNATURE):
        return _parse_v2(data)
    if _V1_PREFIX.startswith(data) or _V2_SIGNATURE.startswith(data):
        return None
    raise InvalidProxyHeaderError("the connection begins with something else")


def _parse_v1(data: bytes) -> tuple[_Addresses, int] | None:
    end = data.find(b"\r\n", 0, MAX_V1_SIZE)
    if end < 0:
        if len(data) >= MAX_V1_SIZE:
            raise InvalidProxyHeaderError(f"the line is longer than {MAX_V1_SIZE} bytes")
        return None
    # Twisted's parser accepts anything as an address, and everything that int() accepts as a port.
    match = _V1_LINE.fullmatch(data[:end])
    if match is None:
        raise InvalidProxyHeaderError("the line is not of version 1")
    if match[1] is None:
        return (None, None), end + 2
    kind: Any = ipaddress.IPv4Address if match[1] == b"4" else ipaddress.IPv6Address
    source, destination = (_parse_address(kind, match[i].decode("latin-1"), int(match[i + 2])) for i in (2, 3))
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
    except Exception:  # noqa: BLE001 - it does not catch every error that invalid input causes
        raise InvalidProxyHeaderError("it is not of version 2") from None
    return (_canonical_address(info.source), _canonical_address(info.destination)), size


def _canonical_address(address: Any) -> IAddress | None:
    """Return the canonical form of an address, or ``None`` if it is not TCP over IP."""
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
        raise InvalidProxyHeaderError("it contains an invalid address") from None
    if port > 65535 or "%" in host:
        raise InvalidProxyHeaderError("it contains an invalid address or port")
    return (IPv4Address if parsed.version == 4 else IPv6Address)("TCP", str(parsed), port)


class ProxyHeaderErrors:
    """Count connections without a valid PROXY header, and log them at most every :data:`LOG_INTERVAL` seconds."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._log_limiter = LogLimiter(clock, LOG_INTERVAL)

    def record(self, address: object, problem: str) -> None:
        """Record one from ``address``, which is that of the load balancer or of whatever connected instead of it."""
        self._metrics.refused["proxy"] += 1
        suppressed = self._log_limiter.allow()
        if suppressed is None:
            return
        _log.warn(
            "a connection from {host} has no good PROXY header: {problem} ({suppressed} more times since this was last "
            "logged); only a load balancer that sends this header may connect to a haproxy: endpoint",
            host=getattr(address, "host", "this machine"),
            problem=problem,
            suppressed=suppressed,
        )


class ProxyProtocolWrapper(ProtocolWrapper):
    """Read the header of one connection. The wrapper is dropped when its client is parked."""

    factory: ProxyProtocolFactory
    transport: Any
    #: received part of the header; ``None`` after a complete or invalid header
    _header_buffer: bytes | None = b""
    _dropped = False
    _peer: IAddress | None = None
    _host: IAddress | None = None

    def dataReceived(self, data: bytes) -> None:
        if self._header_buffer is None:
            if not self._dropped:
                self.wrappedProtocol.dataReceived(data)
            return
        self._header_buffer += data
        try:
            parsed = parse_header(self._header_buffer)
        except InvalidProxyHeaderError as e:
            self._drop(str(e))
            return
        if parsed is None:
            return
        (self._peer, self._host), size = parsed
        rest, self._header_buffer = self._header_buffer[size:], None
        if rest:
            self.wrappedProtocol.dataReceived(rest)

    def _drop(self, problem: str) -> None:
        self._header_buffer, self._dropped = None, True
        if self.factory.header_errors is not None:
            self.factory.header_errors.record(self.transport.getPeer(), problem)
        self.transport.abortConnection()

    def getPeer(self) -> IAddress:
        """Return the address of the client."""
        peer: IAddress = self._peer or self.transport.getPeer()
        return peer

    def getHost(self) -> IAddress:
        """Return the address that the client connected to."""
        host: IAddress = self._host or self.transport.getHost()
        return host


class ProxyProtocolFactory(WrappingFactory):
    """Wrap the protocols of a factory in the PROXY protocol."""

    protocol: Callable[..., Any] = ProxyProtocolWrapper
    noisy = False

    def __init__(self, wrapped: IProtocolFactory, header_errors: ProxyHeaderErrors | None = None) -> None:
        super().__init__(wrapped)  # type: ignore[no-untyped-call]
        self.header_errors = header_errors

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Make the protocol of a connection, or return ``None`` to drop it if the wrapped factory does."""
        wrapped = self.wrappedFactory.buildProtocol(addr)
        return None if wrapped is None else self.protocol(self, wrapped)

    def registerProtocol(self, p: object) -> None:
        """Do nothing: Twisted keeps a dict of all connections, which is not used here."""

    def unregisterProtocol(self, p: object) -> None:
        pass


@implementer(IStreamServerEndpoint)
class ProxyProtocolEndpoint:
    """Add the PROXY protocol to another endpoint."""

    def __init__(self, wrapped: IStreamServerEndpoint, header_errors: ProxyHeaderErrors | None = None) -> None:
        self._wrapped = wrapped
        self._header_errors = header_errors

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen. ``factory`` makes the protocols that receive the bytes after the header."""
        listening: Deferred[IListeningPort] = self._wrapped.listen(ProxyProtocolFactory(factory, self._header_errors))
        return listening
