"""The endpoints of a node: bound before anything is accepted, and checked for who could reach them.

Several nodes share one port, and so use all cores of a machine, in ways that Twisted's endpoint strings do not have:

* ``tcp:8080:reuseport=yes``, or ``tcp6:``, ``ssl:``, ``mtls:``, ``haproxy:tcp:`` and so on: each node has a socket of
  its own, with SO_REUSEPORT (socket(7)), and the kernel spreads the connections over them;
* ``fd:3``, or ``haproxy:fd:3``: a listening socket that whoever started the node made, and passed on as that open file;
  all that have it take connections from one queue. ``systemd:`` is Twisted's own for the same.

``haproxy:`` before any of them: a PROXY header comes first, before TLS where there is TLS (proxied.py).
"""

from __future__ import annotations

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
from gateway.net.certificates import CertificateReloader
from gateway.net.proxy_protocol import ProxyHeaderErrors, ProxyProtocolEndpoint
from gateway.net.tls import TLSHandshakeErrors
from gateway.settings import ConfigError, Settings

#: A shorter queue of connections that await accept() lets a storm of reconnects crawl.
MIN_BACKLOG = 1024

_PROXY_PREFIX = "haproxy:"
_REUSEPORT = re.compile(r"(?<!\\):reuseport=([^:]*)")
_REUSEPORT_KINDS = ("tcp:", "tcp6:", "ssl:", "mtls:")
_INHERITED_KINDS = ("fd:", "systemd:")
#: where TCP_INFO of a listening socket has the length of its queue: tcpi_sacked of struct tcp_info (tcp(7))
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
    """Bind every endpoint string of an option; nothing is accepted before the reactor's next turn. ``behind_proxy`` is
    the factory for those with the PROXY protocol, if they need one of their own. ``renewals`` is given the certificates
    of those with TLS; ``bad_headers`` is told of what is no PROXY header; ``metrics`` count where TLS failed.

    Raises :class:`~gateway.settings.ConfigError`, at once, with all of them about to be closed again.
    """
    ports: list[IListeningPort] = []
    failures = None if metrics is None else TLSHandshakeErrors(option, metrics, reactor.seconds)
    try:
        for description in descriptions:
            _warn_of_small_backlog(option, description)
            chosen = proxied_factory if proxied_factory and description.startswith(_PROXY_PREFIX) else factory
            endpoint = _checked_endpoint(option, description, reactor, header_errors)
            if isinstance(endpoint, tls.TLSEndpoint):
                endpoint.handshake_errors = failures
            ports.append(await _listen_one(option, description, chosen, endpoint))
            if certificate_reloader is not None and isinstance(endpoint, tls.TLSEndpoint):
                certificate_reloader.add(option, endpoint.certificates)
    except ConfigError:
        for port in ports:
            port.stopListening()
        raise
    return ports


def _checked_endpoint(
    option: str, description: str, reactor: object, header_errors: ProxyHeaderErrors | None
) -> IStreamServerEndpoint:
    try:
        return _parse_endpoint(option, reactor, description, header_errors)
    except _InheritedSocketError as e:
        raise ConfigError(option, f"{description} cannot be listened on: {e}") from None
    except Exception as e:  # noqa: BLE001 - each kind of endpoint has exceptions of its own
        raise invalid_endpoint_error(option, description, e) from None


async def _listen_one(
    option: str, description: str, factory: IProtocolFactory, endpoint: IStreamServerEndpoint
) -> IListeningPort:
    try:
        port: IListeningPort = await endpoint.listen(factory)
    except CannotListenError as e:
        why = getattr(e.socketError, "strerror", None) or str(e.socketError)
        raise ConfigError(
            option, f"{description} cannot be listened on: {why}; choose another port or end who has it"
        ) from None
    except OSError as e:
        raise ConfigError(option, f"{description} cannot be listened on: {e.strerror or e}") from None
    except Exception as e:  # noqa: BLE001 - such as a port beyond 65535
        raise invalid_endpoint_error(option, description, e) from None
    return port


def invalid_endpoint_error(option: str, description: str, error: Exception) -> ConfigError:
    """The error for a description that Twisted cannot make an endpoint of."""
    why = " ".join(str(error).split()) or type(error).__name__
    example, inner = "tcp:8080:interface=127.0.0.1", description.removeprefix(_PROXY_PREFIX)
    if tls.is_tls(inner):
        clients = ":clientCAs=ca.pem" if inner.startswith("mtls:") else ""
        kind = description[: -len(inner)] + inner.partition(":")[0]
        example = f"{kind}:8443:privateKey=key.pem:certKey=cert.pem{clients}:backlog=4096, with files of your own"
    return ConfigError(option, f"{description!r} is no endpoint ({why}); write for example {example}")


def _parse_endpoint(
    option: str, reactor: object, description: str, header_errors: ProxyHeaderErrors | None
) -> IStreamServerEndpoint:
    """The endpoint of an endpoint string. Raises what its kind raises for one that will not do."""
    if _wants_reuseport(description):
        reactor = _ReusePortReactor(reactor)
    proxied = description.startswith(_PROXY_PREFIX)
    inner = _REUSEPORT.sub("", description).removeprefix(_PROXY_PREFIX)
    if inner.startswith(_PROXY_PREFIX):
        raise ValueError("haproxy: is there twice")

    def behind(endpoint: IStreamServerEndpoint) -> IStreamServerEndpoint:
        return ProxyProtocolEndpoint(endpoint, header_errors) if proxied else endpoint

    if tls.is_tls(inner):
        return tls.parse_endpoint(reactor, inner, behind)
    if inner.startswith(_INHERITED_KINDS):
        return behind(_inherited_endpoint(option, reactor, inner))
    return behind(serverFromString(reactor, inner))


def _wants_reuseport(description: str) -> bool:
    values = _REUSEPORT.findall(description)
    if not values:
        return False
    if values not in (["yes"], ["no"]):
        raise ValueError("reuseport is yes or no")
    if values == ["yes"] and not description.removeprefix(_PROXY_PREFIX).startswith(_REUSEPORT_KINDS):
        raise ValueError(f"reuseport is for {', '.join(_REUSEPORT_KINDS)}")
    return values == ["yes"]


class _ReusePortReactor:
    """A reactor that lets others listen on its TCP ports, too, if they do so in the same way."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def listenTCP(self, port: int, factory: IProtocolFactory, backlog: int = 50, interface: str = "") -> IListeningPort:
        """See ``IReactorTCP.listenTCP``."""
        family = socket.AF_INET6 if isIPv6Address(interface) else socket.AF_INET
        try:
            # Twisted works on a duplicate.
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
    # With the number of the interface that fe80::1%eth0 names.
    return socket.getaddrinfo(interface, port, family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)[0][4]


class _InheritedSocketError(Exception):
    """An open file that is no listening socket as it should be. Its text says what it is instead."""


def _inherited_endpoint(option: str, reactor: object, description: str) -> AdoptedStreamServerEndpoint:
    """The endpoint of a socket that was passed on: ``fd:3``, or one of Twisted's ``systemd:``."""
    try:
        if description.startswith("fd:"):
            number = _parse_fd(description)
            endpoint = AdoptedStreamServerEndpoint(reactor, number, _address_family(number))
        else:
            endpoint = serverFromString(reactor, description)
    except LookupError:
        raise _InheritedSocketError("systemd passed no such socket on") from None
    family = _address_family(endpoint.fileno)
    if family != endpoint.addressFamily:
        raise _InheritedSocketError(f"the socket is one of domain={family.name.removeprefix('AF_')}")
    if family != socket.AF_UNIX:
        _warn_of_small_inherited_backlog(option, description, endpoint.fileno)
    elif description.startswith("fd:"):
        # Twisted would remove it from the file system when the first of those that share it ends.
        raise _InheritedSocketError("it is no TCP socket")
    return endpoint


def _parse_fd(description: str) -> int:
    number = description.removeprefix("fd:")
    if not re.fullmatch("[0-9]{1,9}", number):
        raise ValueError("fd: is followed by the number of an open file alone, such as fd:3")
    return int(number)


def _address_family(fd: int) -> socket.AddressFamily:
    """The address family of a listening socket. Raises :class:`_NotInherited` for an open file that is none."""
    with _duplicate_socket(fd) as duplicate:
        if not duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise _InheritedSocketError(f"the socket that is file {fd} does not listen")
        return socket.AddressFamily(duplicate.family)


def _duplicate_socket(fd: int) -> socket.socket:
    try:
        copy = os.dup(fd)
    except OSError:
        raise _InheritedSocketError(
            f"file {fd} is not open; who starts the node passes a listening socket on"
        ) from None
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise _InheritedSocketError(f"file {fd} is no socket; who starts the node passes a listening one on") from None


def _warn_of_small_inherited_backlog(option: str, description: str, fd: int) -> None:
    with _duplicate_socket(fd) as duplicate:
        info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_SACKED_OFFSET + 4)
    (backlog,) = struct.unpack_from("I", info, _TCPI_SACKED_OFFSET)
    if backlog < MIN_BACKLOG:
        _log.warn(
            "--{option} {description}: a backlog of {backlog} lets reconnecting clients wait; let who made the socket "
            "listen with 4096 (and no less in net.core.somaxconn)",
            option=option,
            description=description,
            backlog=backlog,
        )


def is_shared(description: str) -> bool:
    """Whether other nodes may take connections from the same port, so that its url leads to any of them."""
    inherited = description.removeprefix(_PROXY_PREFIX).startswith(_INHERITED_KINDS)
    return inherited or _REUSEPORT.findall(description) == ["yes"]


async def stop_listening(ports: list[IListeningPort]) -> None:
    """Stop listening on all of them."""
    while ports:
        await _stop_port(ports.pop())


async def _stop_port(port: IListeningPort) -> None:
    stopped = port.stopListening()
    if stopped is not None:
        await stopped


def _warn_of_small_backlog(option: str, description: str) -> None:
    if not description.removeprefix(_PROXY_PREFIX).startswith(("tcp:", "tcp4:", "tcp6:", "ssl:", "mtls:")):
        return
    given = re.search(r":backlog=(\d+)", description)
    backlog = int(given[1]) if given else 50
    if backlog < MIN_BACKLOG:
        _log.warn(
            "--{option} {description}: a backlog of {backlog} lets reconnecting clients wait; add :backlog=4096",
            option=option,
            description=description,
            backlog=backlog,
        )


def check_exposure(
    settings: Settings, backend_ports: Sequence[IListeningPort], client_ports: Sequence[IListeningPort]
) -> None:
    """Raise :class:`~gateway.settings.ConfigError` where others than this machine could do what nobody allowed them,
    and warn of what was allowed to everybody."""
    exposed = next(filter(None, map(exposed_address, backend_ports)), "")
    if exposed and not settings.backend_token_file:
        raise ConfigError(
            "backend",
            f"others than this machine can reach {exposed}: give --backend-token-file, or interface=127.0.0.1",
        )
    exposed = next(filter(None, map(exposed_address, client_ports)), "")
    if exposed and not settings.auth:
        raise ConfigError(
            "listen",
            f"others than this machine can reach {exposed}: give --auth (tokens:FILE, or none if anybody may "
            "connect under any client_id), or interface=127.0.0.1",
        )
    if exposed and "none" in settings.auth:
        _log.warn("--auth none on {exposed}: anybody can take any client's place", exposed=exposed)
    elif "none" in settings.auth and len(settings.auth) > 1:
        _log.warn("--auth none beside others: whoever sends no token is let in under any client_id")


def exposed_address(port: IListeningPort) -> str:
    """The address by which others than this machine can reach a port, or an empty text."""
    address = port.getHost()
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return ""
    host = address.host.partition("%")[0]
    return "" if ipaddress.ip_address(host).is_loopback else f"{address.host}:{address.port}"


def port_url(description: str, port: IListeningPort) -> tuple[str, bool]:
    """The ``ws://`` or ``wss://`` url by which a port can be reached, or an empty text, as far as the port can tell;
    and whether it is no guess: not behind a proxy, nor shared with other nodes, nor on every address that the machine
    has."""
    address = port.getHost()
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return "", False
    host = address.host
    certain = not description.startswith(_PROXY_PREFIX) and not is_shared(description)
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host, certain = socket.getfqdn(), False
    elif isinstance(address, IPv6Address):
        host = f"[{host}]"
    scheme = "wss" if tls.is_tls(description.removeprefix(_PROXY_PREFIX)) else "ws"
    return f"{scheme}://{host}:{address.port}", certain
