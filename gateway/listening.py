"""The endpoints of a node: bound before anything is accepted, and checked for who could reach them."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.logger import Logger

from gateway import tls
from gateway.settings import ConfigError, Settings

#: A shorter queue of connections that await accept() lets a storm of reconnects crawl.
LEAST_BACKLOG = 1024

_log = Logger()


async def listen(
    option: str,
    descriptions: Sequence[str],
    factory: IProtocolFactory,
    reactor: object,
    behind_proxy: IProtocolFactory | None = None,
) -> list[IListeningPort]:
    """Bind every endpoint string of an option; nothing is accepted before the reactor's next turn. ``behind_proxy`` is
    the factory for those with the PROXY protocol, if they need one of their own.

    Raises :class:`~gateway.settings.ConfigError`, at once, with all of them about to be closed again.
    """
    ports: list[IListeningPort] = []
    try:
        for description in descriptions:
            _warn_of_backlog(option, description)
            chosen = behind_proxy if behind_proxy and description.startswith("haproxy:") else factory
            ports.append(await _listen_one(option, description, chosen, reactor))
    except ConfigError:
        for port in ports:
            port.stopListening()
        raise
    return ports


async def _listen_one(option: str, description: str, factory: IProtocolFactory, reactor: object) -> IListeningPort:
    try:
        endpoint = (tls.endpoint if tls.is_tls(description) else serverFromString)(reactor, description)
    except Exception as e:  # noqa: BLE001 - each kind of endpoint has exceptions of its own
        raise no_endpoint(option, description, e) from None
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
        raise no_endpoint(option, description, e) from None
    return port


def no_endpoint(option: str, description: str, problem: Exception) -> ConfigError:
    """The error for a description that Twisted cannot make an endpoint of."""
    why = " ".join(str(problem).split()) or type(problem).__name__
    example = "tcp:8080:interface=127.0.0.1"
    if tls.is_tls(description):
        example = "ssl:8443:privateKey=key.pem:certKey=cert.pem:backlog=4096, with files of your own"
    return ConfigError(option, f"{description!r} is no endpoint ({why}); write for example {example}")


async def close(ports: list[IListeningPort]) -> None:
    """Stop listening on all of them."""
    while ports:
        await _stopped(ports.pop())


async def _stopped(port: IListeningPort) -> None:
    stopped = port.stopListening()
    if stopped is not None:
        await stopped


def _warn_of_backlog(option: str, description: str) -> None:
    if not description.startswith(("tcp:", "tcp4:", "tcp6:", "ssl:", "haproxy:tcp")):
        return
    given = re.search(r":backlog=(\d+)", description)
    backlog = int(given[1]) if given else 50
    if backlog < LEAST_BACKLOG:
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
    exposed = next(filter(None, map(beyond_loopback, backend_ports)), "")
    if exposed and not settings.backend_token_file:
        raise ConfigError(
            "backend",
            f"others than this machine can reach {exposed}: give --backend-token-file, or interface=127.0.0.1",
        )
    exposed = next(filter(None, map(beyond_loopback, client_ports)), "")
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


def beyond_loopback(port: IListeningPort) -> str:
    """The address by which others than this machine can reach a port, or an empty text."""
    address = port.getHost()
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return ""
    host = address.host.partition("%")[0]
    return "" if ipaddress.ip_address(host).is_loopback else f"{address.host}:{address.port}"


def url_of(description: str, port: IListeningPort) -> tuple[str, bool]:
    """The ``ws://`` or ``wss://`` url by which a port can be reached, or an empty text, as far as the port can tell;
    and whether it is no guess: not behind a proxy, nor on every address that the machine has."""
    address = port.getHost()
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return "", False
    host = address.host
    certain = not description.startswith("haproxy:")
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host, certain = socket.getfqdn(), False
    elif isinstance(address, IPv6Address):
        host = f"[{host}]"
    scheme = "wss" if description.startswith(("ssl:", "mtls:")) else "ws"
    return f"{scheme}://{host}:{address.port}", certain
