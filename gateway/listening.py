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

from gateway.settings import ConfigError

#: A shorter queue of connections that await accept() lets a storm of reconnects crawl.
LEAST_BACKLOG = 1024

_log = Logger()


async def listen(
    option: str, descriptions: Sequence[str], factory: IProtocolFactory, reactor: object
) -> list[IListeningPort]:
    """Bind every endpoint string of an option; nothing is accepted before the reactor's next turn.

    Raises :class:`~gateway.settings.ConfigError`, with all of them closed again.
    """
    ports: list[IListeningPort] = []
    try:
        for description in descriptions:
            _warn_of_backlog(option, description)
            ports.append(await _listen_one(option, description, factory, reactor))
    except ConfigError:
        await close(ports)
        raise
    return ports


async def _listen_one(option: str, description: str, factory: IProtocolFactory, reactor: object) -> IListeningPort:
    try:
        endpoint = serverFromString(reactor, description)
    except (ValueError, TypeError, KeyError, OSError) as e:
        raise ConfigError(
            option, f"{description!r} is no endpoint ({e}); write for example tcp:8080:interface=127.0.0.1"
        ) from None
    try:
        port: IListeningPort = await endpoint.listen(factory)
    except CannotListenError as e:
        why = getattr(e.socketError, "strerror", None) or str(e.socketError)
        raise ConfigError(
            option, f"{description} cannot be listened on: {why}; choose another port or end who has it"
        ) from None
    except OSError as e:
        raise ConfigError(option, f"{description} cannot be listened on: {e.strerror or e}") from None
    return port


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


def beyond_loopback(port: IListeningPort) -> str:
    """The address by which others than this machine can reach a port, or an empty text."""
    address = port.getHost()
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return ""
    host = address.host.partition("%")[0]
    return "" if ipaddress.ip_address(host).is_loopback else f"{address.host}:{address.port}"


def url_of(option: str, description: str, port: IListeningPort) -> str:
    """The ``ws://`` or ``wss://`` url by which a port can be reached, as far as the port itself can tell.

    Raises :class:`~gateway.settings.ConfigError` when it cannot.
    """
    address = port.getHost()
    if not isinstance(address, (IPv4Address, IPv6Address)):
        raise ConfigError(option, f"cannot be told from {description}; write ws://host[:port] or wss://host[:port]")
    host = address.host
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = socket.getfqdn()
    elif isinstance(address, IPv6Address):
        host = f"[{host}]"
    scheme = "wss" if description.startswith(("ssl:", "mtls:")) else "ws"
    return f"{scheme}://{host}:{address.port}"
