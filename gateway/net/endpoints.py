"""Bind the endpoints of a node before it accepts connections, and check from where they can be reached.

Several nodes can share one port, to use all cores of a machine, by endpoint strings that Twisted does not have:

* ``tcp:8080:reuseport=yes``, and the same with ``tcp6:``, ``ssl:``, ``mtls:``, ``haproxy:tcp:`` and so on: each node
  has its own socket with SO_REUSEPORT (socket(7)), and the kernel distributes connections over the sockets;
* ``fd:3``, ``haproxy:fd:3``: a listening socket inherited from the parent process as that file descriptor. All
  processes with this socket accept connections from one queue. Twisted's ``systemd:`` does the same.

With the prefix ``haproxy:`` every connection begins with a PROXY header, before TLS if there is TLS
(proxy_protocol.py).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Sequence
from typing import Any

from twisted.internet.abstract import isIPv6Address
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IStreamServerEndpoint
from twisted.logger import Logger

from gateway.metrics import Metrics
from gateway.net import tls
from gateway.net.certificates import CertificateReloader, describe_file_error
from gateway.net.errors import FileContentError
from gateway.net.proxy_protocol import ProxyHeaderErrors, ProxyProtocolEndpoint
from gateway.net.tls import TLSHandshakeErrors
from gateway.settings import ConfigError, Settings

#: listen queue length below which a reconnect storm is slowed down
MIN_BACKLOG = 1024

_PROXY_PREFIX = "haproxy:"
_REUSEPORT = re.compile(r"(?<!\\):reuseport=([^:]*)")
_REUSEPORT_KINDS = ("tcp:", "tcp6:", "ssl:", "mtls:")
_FUNCTION_NAME = re.compile(r"^[\w.]+\(\) (?:got |takes )?")
_INHERITED_KINDS = ("fd:", "systemd:")
#: offset of tcpi_sacked in struct tcp_info (tcp(7)): for a listening socket, the maximum length of its queue
_TCPI_SACKED_OFFSET = 28

_log = Logger()


async def listen(
    option: str,
    descriptions: Sequence[str],
    factory: IProtocolFactory,
    reactor: Any,
    proxied_factory: IProtocolFactory | None = None,
    *,
    certificate_reloader: CertificateReloader | None = None,
    header_errors: ProxyHeaderErrors | None = None,
    metrics: Metrics | None = None,
) -> list[IListeningPort]:
    """Bind every endpoint string of an option. No connection is accepted before the next reactor iteration.

    ``proxied_factory`` is the factory for endpoints with the PROXY protocol, by default ``factory``.
    ``certificate_reloader`` gets the certificates of TLS endpoints, ``header_errors`` the invalid PROXY headers;
    ``metrics`` counts failed TLS handshakes.

    Raises :class:`~gateway.settings.ConfigError` if an endpoint cannot be bound. Ports that were bound are then closed
    in the next reactor iteration.
    """
    ports: list[IListeningPort] = []
    handshake_errors = None if metrics is None else TLSHandshakeErrors(option, metrics, reactor.seconds)
    try:
        for description in descriptions:
            _warn_of_small_backlog(option, description)
            is_proxied = description.startswith(_PROXY_PREFIX)
            endpoint = _checked_endpoint(option, description, reactor, header_errors, handshake_errors)
            chosen = proxied_factory if proxied_factory and is_proxied else factory
            ports.append(await _listen_one(option, description, chosen, endpoint))
            if certificate_reloader is not None and isinstance(endpoint, tls.TLSEndpoint):
                certificate_reloader.add(option, endpoint.certificates)
    except ConfigError:
        for port in ports:
            port.stopListening()
        raise
    return ports


def _checked_endpoint(
    option: str,
    description: str,
    reactor: object,
    header_errors: ProxyHeaderErrors | None,
    handshake_errors: TLSHandshakeErrors | None,
) -> IStreamServerEndpoint:
    """Parse an endpoint string. Raises :class:`~gateway.settings.ConfigError` if it is invalid."""
    try:
        return _parse_endpoint(option, reactor, description, header_errors, handshake_errors)
    except _InheritedSocketError as e:
        raise ConfigError(option, f"{description} cannot be bound: {e}") from None
    except Exception as e:  # noqa: BLE001 - each kind of endpoint has its own exceptions
        raise invalid_endpoint_error(option, description, e) from None


async def _listen_one(
    option: str, description: str, factory: IProtocolFactory, endpoint: IStreamServerEndpoint
) -> IListeningPort:
    try:
        port: IListeningPort = await endpoint.listen(factory)
    except CannotListenError as e:
        raise _bind_error(option, description, e.socketError) from None
    except OSError as e:
        raise _bind_error(option, description, e) from None
    except Exception as e:  # noqa: BLE001 - such as a port beyond 65535
        raise invalid_endpoint_error(option, description, e) from None
    return port


#: error of bind(2) -> remedy
_BIND_REMEDIES = {
    errno.EADDRINUSE: "choose another port, or stop the process that uses it",
    errno.EADDRNOTAVAIL: "interface= must be an address of this machine",
    errno.EACCES: "a port below 1024 needs the capability CAP_NET_BIND_SERVICE (of systemd: "
    "AmbientCapabilities=CAP_NET_BIND_SERVICE), or choose a port of 1024 or more",
}


def _bind_error(option: str, description: str, error: object) -> ConfigError:
    """Make the error for an endpoint that cannot be bound. ``error`` is that of the socket."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    remedy = _BIND_REMEDIES.get(number, "") if isinstance(number, int) else ""
    if description.removeprefix(_PROXY_PREFIX).startswith("unix:"):
        remedy = "let this user write to its folder" if number == errno.EACCES else ""
    return ConfigError(option, f"{description} cannot be bound: {reason}" + (remedy and f"; {remedy}"))


def invalid_endpoint_error(option: str, description: str, error: Exception) -> ConfigError:
    """Make the error for an endpoint string that Twisted cannot parse or bind."""
    if isinstance(error, FileContentError) or (isinstance(error, OSError) and error.filename):
        return ConfigError(option, f"{description}: {describe_file_error(error)}")
    escaped = _escape_address(description)
    if escaped is not None:
        problem = "each colon of an address needs a backslash"
        return ConfigError(option, f"{description!r} is not a valid endpoint: {problem}; write '{escaped}'")
    # Without the name of Twisted's function.
    reason = _FUNCTION_NAME.sub("", " ".join(str(error).split())) or type(error).__name__
    example, inner = "tcp:8080:interface=127.0.0.1", description.removeprefix(_PROXY_PREFIX)
    if tls.is_tls(inner):
        clients = ":clientCAs=ca.pem" if inner.startswith("mtls:") else ""
        kind = description[: -len(inner)] + inner.partition(":")[0]
        example = f"{kind}:8443:privateKey=key.pem:certKey=cert.pem{clients}:backlog=4096, with your own files"
    return ConfigError(option, f"{description!r} is not a valid endpoint ({reason}); write for example {example}")


def _escape_address(description: str) -> str | None:
    """Return an endpoint string with the colons of an IPv6 address in ``interface=`` escaped, as Twisted requires.

    Returns ``None`` if there is no such address.
    """
    before, name, rest = description.partition(":interface=")
    parts = rest.split(":")
    for length in range(len(parts), 1, -1):
        address = ":".join(parts[:length]).removeprefix("[").removesuffix("]")
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            continue
        return ":".join([before + name + address.replace(":", r"\:"), *parts[length:]])
    return None


def _parse_endpoint(
    option: str,
    reactor: object,
    description: str,
    header_errors: ProxyHeaderErrors | None,
    handshake_errors: TLSHandshakeErrors | None,
) -> IStreamServerEndpoint:
    """Parse an endpoint string. Raises the exceptions of its kind of endpoint if it is invalid."""
    if _wants_reuseport(description):
        reactor = _ReusePortReactor(reactor)
    is_proxied = description.startswith(_PROXY_PREFIX)
    inner = _REUSEPORT.sub("", description).removeprefix(_PROXY_PREFIX)
    if inner.startswith(_PROXY_PREFIX):
        raise ValueError("haproxy: is given twice")

    def wrap(endpoint: IStreamServerEndpoint) -> IStreamServerEndpoint:
        return ProxyProtocolEndpoint(endpoint, header_errors) if is_proxied else endpoint

    if tls.is_tls(inner):
        return tls.parse_endpoint(reactor, inner, wrap, handshake_errors)
    if inner.startswith(_INHERITED_KINDS):
        return wrap(_inherited_endpoint(option, reactor, inner))
    return wrap(serverFromString(reactor, inner))


def _wants_reuseport(description: str) -> bool:
    values = _REUSEPORT.findall(description)
    if not values:
        return False
    if values not in (["yes"], ["no"]):
        raise ValueError("reuseport must be yes or no")
    if values == ["yes"] and not description.removeprefix(_PROXY_PREFIX).startswith(_REUSEPORT_KINDS):
        raise ValueError(f"reuseport is only supported by {', '.join(_REUSEPORT_KINDS)}")
    return values == ["yes"]


class _ReusePortReactor:
    """Reactor whose TCP ports have SO_REUSEPORT."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def listenTCP(self, port: int, factory: IProtocolFactory, backlog: int = 50, interface: str = "") -> IListeningPort:
        family = socket.AF_INET6 if isIPv6Address(interface) else socket.AF_INET
        try:
            # adoptStreamPort() duplicates the file descriptor.
            with socket.socket(family, socket.SOCK_STREAM) as listening:
                listening.setblocking(False)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listening.bind(_socket_address(family, interface, port))
                listening.listen(backlog)
                adopted: IListeningPort = self._reactor.adoptStreamPort(listening.fileno(), family, factory)
                return adopted
        except OSError as e:
            raise CannotListenError(interface, port, e) from None


def _socket_address(family: int, interface: str, port: int) -> Any:
    if family == socket.AF_INET:
        return interface, port
    # Resolves the scope of an address such as fe80::1%eth0.
    return socket.getaddrinfo(interface, port, family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)[0][4]


class _InheritedSocketError(Exception):
    """An inherited file descriptor is not a suitable listening socket. The message gives the reason."""


def _inherited_endpoint(option: str, reactor: object, description: str) -> AdoptedStreamServerEndpoint:
    """Make the endpoint of an inherited socket: ``fd:3``, or Twisted's ``systemd:``."""
    try:
        if description.startswith("fd:"):
            fd = _parse_fd(description)
            endpoint = AdoptedStreamServerEndpoint(reactor, fd, _address_family(fd))
        else:
            endpoint = serverFromString(reactor, description)
    except LookupError:
        raise _InheritedSocketError("systemd passed no such socket") from None
    family = _address_family(endpoint.fileno)
    if family != endpoint.addressFamily:
        raise _InheritedSocketError(f"the socket has domain={family.name.removeprefix('AF_')}")
    if family != socket.AF_UNIX:
        _warn_of_small_inherited_backlog(option, description, endpoint.fileno)
    elif description.startswith("fd:"):
        # Twisted would remove its path from the file system when the first process that shares the socket ends.
        raise _InheritedSocketError("it is not a TCP socket")
    return endpoint


def _parse_fd(description: str) -> int:
    number = description.removeprefix("fd:")
    if not re.fullmatch("[0-9]{1,9}", number):
        raise ValueError("fd: must be followed only by the number of an open file, such as fd:3")
    return int(number)


def _address_family(fd: int) -> socket.AddressFamily:
    """Return the address family of a listening socket.

    Raises :class:`_InheritedSocketError` if the file descriptor is not a listening socket.
    """
    with _duplicate_socket(fd) as duplicate:
        if not duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise _InheritedSocketError(f"the socket with file descriptor {fd} does not listen")
        return socket.AddressFamily(duplicate.family)


def _duplicate_socket(fd: int) -> socket.socket:
    try:
        copy = os.dup(fd)
    except OSError:
        raise _InheritedSocketError(
            f"file descriptor {fd} is not open; the parent process must pass a listening socket"
        ) from None
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise _InheritedSocketError(
            f"file descriptor {fd} is not a socket; the parent process must pass a listening socket"
        ) from None


def _warn_of_small_inherited_backlog(option: str, description: str, fd: int) -> None:
    with _duplicate_socket(fd) as duplicate:
        info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_SACKED_OFFSET + 4)
    (backlog,) = struct.unpack_from("I", info, _TCPI_SACKED_OFFSET)
    if backlog < MIN_BACKLOG:
        _log.warn(
            "--{option} {description}: a backlog of {backlog} delays reconnecting clients; listen with a backlog of "
            "4096 where the socket is made, and set net.core.somaxconn to at least 4096",
            option=option,
            description=description,
            backlog=backlog,
        )


def is_shared(description: str) -> bool:
    """Return whether several nodes may accept connections at this port, so that its URL can lead to any of them."""
    inherited = description.removeprefix(_PROXY_PREFIX).startswith(_INHERITED_KINDS)
    return inherited or _REUSEPORT.findall(description) == ["yes"]


async def stop_listening(ports: list[IListeningPort]) -> None:
    """Close all ports, and remove them from the list."""
    while ports:
        await _stop_port(ports.pop())


async def _stop_port(port: IListeningPort) -> None:
    stopped = port.stopListening()
    if stopped is not None:
        await stopped


def _warn_of_small_backlog(option: str, description: str) -> None:
    if not description.removeprefix(_PROXY_PREFIX).startswith(("tcp:", "tcp4:", "tcp6:", "ssl:", "mtls:")):
        return
    match = re.search(r":backlog=(\d+)", description)
    backlog = int(match[1]) if match else 50
    if backlog < MIN_BACKLOG:
        _log.warn(
            "--{option} {description}: a backlog of {backlog} delays reconnecting clients; add :backlog=4096",
            option=option,
            description=description,
            backlog=backlog,
        )


def check_exposure(
    settings: Settings, backend_ports: Sequence[IListeningPort], client_ports: Sequence[IListeningPort]
) -> None:
    """Refuse endpoints that other machines can reach without authentication, and warn of ``--auth none``.

    Raises :class:`~gateway.settings.ConfigError` if such an endpoint has no tokens configured.
    """
    exposed = next(filter(None, map(exposed_address, backend_ports)), "")
    if exposed and not settings.backend_token_file:
        raise ConfigError(
            "backend",
            f"{exposed} is reachable from other machines: set --backend-token-file, or add interface=127.0.0.1",
        )
    exposed = next(filter(None, map(exposed_address, client_ports)), "")
    if exposed and not settings.auth:
        raise ConfigError(
            "listen",
            f"{exposed} is reachable from other machines: set --auth (tokens:FILE, or none to let anyone connect "
            "with any client_id), or add interface=127.0.0.1",
        )
    if exposed and "none" in settings.auth:
        _log.warn(
            "--auth none on {exposed}: anyone can connect as any client and replace its connection", exposed=exposed
        )
    elif "none" in settings.auth and len(settings.auth) > 1:
        _log.warn("--auth none among others: a client without a token can connect under any client_id")


def exposed_address(port: IListeningPort) -> str:
    """Return the address at which other machines can reach a port, or an empty string."""
    address = port.getHost()
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return ""
    host = address.host.partition("%")[0]
    return "" if ipaddress.ip_address(host).is_loopback else f"{address.host}:{address.port}"


def loopback_url(description: str, port: IListeningPort) -> str:
    """Return the URL of a port at which only clients of this machine connect, and directly; or an empty string."""
    if description.startswith(_PROXY_PREFIX) or exposed_address(port):
        return ""
    return port_url(description, port)[0]


def port_url(description: str, port: IListeningPort) -> tuple[str, bool]:
    """Return the ``ws://`` or ``wss://`` URL of a port, and whether it is certain.

    The URL is a guess if the port is behind a proxy, shared with other nodes, or bound to all addresses of the machine.
    It is empty if the port has no IP address.
    """
    address = port.getHost()
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return "", False
    host = address.host
    is_certain = not description.startswith(_PROXY_PREFIX) and not is_shared(description)
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host, is_certain = socket.getfqdn(), False
    elif isinstance(address, IPv6Address):
        host = f"[{host}]"
    scheme = "wss" if tls.is_tls(description.removeprefix(_PROXY_PREFIX)) else "ws"
    return f"{scheme}://{host}:{address.port}", is_certain
