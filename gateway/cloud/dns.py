"""Names of hosts and zones (RFC 1035, section 2.3.1; RFC 1123, section 2.1), and addresses that a name may lead to.

The option ``--dns``: which name service, which name, and the address that it is to lead to for this node.

    route53:zone=Z0123456789:name=gw.example.com[:ttl=30][:address=192.0.2.7][:health-check=ID]
    rfc2136:server=192.0.2.1:zone=example.com:name=gw.example.com:key-file=/etc/wsgateway/dns.key
        [:port=53][:ttl=30][:address=192.0.2.7]

A server may be ``HOST``, ``HOST:PORT`` or, for IPv6, ``[2001:db8::1]:53``. The address is, in this order: what is
given; the host of ``--public-url`` if that is an address; that which the machine's cloud tells; that which the host of
``--public-url`` has, looked up when the node starts, unless that host is the very name. Without ``--public-url`` it is
the one that the first ``--listen`` listens on.

One name is for one fleet: each withdraws there whom it does not know.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any, NoReturn

import hyperlink
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IHostResolution, IResolutionReceiver
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.cloud.errors import AwsError, KeyFileError, NameServiceError
from gateway.cloud.registrar import DnsRegistrar, INameService
from gateway.metrics import Metrics
from gateway.settings import ConfigError, Settings, parse_spec

#: letters, digits and hyphens, but no hyphen at either end; a digit may come first (RFC 1123)
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
#: with their dots, less the last one: 255 octets on the wire
MAX_DOMAIN_LENGTH = 253


def parse_domain(text: str) -> str:
    """A name in small letters and without a dot at its end.

    Raises ``ValueError``, which says what would be right.
    """
    name = text[:-1] if text.endswith(".") else text
    name = name.lower()
    if not name.isascii() or len(name) > MAX_DOMAIN_LENGTH or not _DOMAIN.fullmatch(name):
        raise ValueError(
            f"{text!r} is no name such as gw.example.com: labels of 1 to 63 letters, digits and hyphens, at most "
            f"{MAX_DOMAIN_LENGTH} characters in all"
        )
    return name


def is_in_zone(name: str, zone: str) -> bool:
    """Whether a name is in a zone, or is its own name."""
    return name == zone or name.endswith(f".{zone}")


def parse_address(text: str) -> str:
    """An IPv4 or IPv6 address, in the one way in which programs write it.

    Raises ``ValueError`` for what is none, and for one that is not of one host.
    """
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is no IPv4 or IPv6 address") from None
    if found.is_unspecified or found.is_multicast or str(found) == "255.255.255.255" or "%" in text:
        raise ValueError(f"{text!r} is no address that a name can lead to")
    return str(found)


def literal_address(host: str) -> str | None:
    """A host as an address, or ``None`` if it is a name; ``[::1]`` as in a url, too."""
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return None


def parse_public_address(text: str) -> str:
    """An address that others can reach: not one of this machine alone. Raises ``ValueError``."""
    found = ipaddress.ip_address(parse_address(text))
    if found.is_loopback or found.is_link_local:
        raise ValueError(f"{text} is an address of this machine alone")
    return str(found)


_log = Logger(namespace="gateway.cloud.dns")

_OPTION = "dns"
#: seconds: how long others may believe an answer, when no ttl is given
DEFAULT_TTL = "30"
_MAX_TTL = 86400

#: of an endpoint string, where a colon in a value has a backslash before it
_INTERFACE = re.compile(r":interface=((?:[^:\\]|\\.)+)")
_ZONE_ID = re.compile(r"(?:/hostedzone/)?([A-Z0-9]{1,32})")
_HEALTH_CHECK = re.compile(r"[A-Za-z0-9-]{1,64}")


def make_registrar(
    settings: Settings,
    *,
    node_id: str,
    reactor: Any,
    metrics: Metrics,
    live_nodes: Callable[[], list[str]],
    refresh_live_nodes: Callable[[], Deferred[list[str] | None]],
    instance_address: Callable[[], Deferred[str]] | None = None,
) -> DnsRegistrar | None:
    """What a node with these settings does about DNS, or ``None`` if that is nothing; nothing is asked yet.

    ``live`` and ``look`` are as for :class:`~gateway.cloud.registrar.Names`. ``machine`` asks the cloud for this machine's
    address, and fails with ``AwsError``; it is given where there is a cloud to ask.

    Raises :class:`~gateway.settings.ConfigError`.
    """
    if not settings.dns:
        return None
    service, values = _make_service(settings.dns, reactor)
    return DnsRegistrar(
        service,
        node_id,
        reactor,
        name=values["name"],
        address=_make_address_finder(values, settings, instance_address, reactor),
        live_nodes=live_nodes,
        refresh_live_nodes=refresh_live_nodes,
        lease=settings.lease,
        metrics=metrics,
    )


def make_name_service(spec: str, reactor: Any) -> INameService:
    """The name service that this spec names; nothing is asked yet. Raises :class:`~gateway.settings.ConfigError`."""
    return _make_service(spec, reactor)[0]


def _make_service(spec: str, reactor: Any) -> tuple[INameService, dict[str, str]]:
    kind = spec.partition(":")[0]
    make = {"route53": _make_route53, "rfc2136": _make_rfc2136}.get(kind)
    if make is None:
        raise ConfigError(_OPTION, f"{kind!r} is no name service; write route53:zone=…:name=… or rfc2136:server=…")
    return make(spec, reactor)


def _make_route53(spec: str, reactor: Any) -> tuple[INameService, dict[str, str]]:
    values = parse_spec(_OPTION, spec, required=("zone", "name"), optional=("ttl", "address", "health-check"))
    zone = _ZONE_ID.fullmatch(values["zone"])
    if zone is None:
        raise ConfigError(_OPTION, f"zone={values['zone']!r} is no id of a hosted zone, such as Z0123456789ABCDEFGHIJ")
    health_check = values.get("health-check", "")
    if health_check and not _HEALTH_CHECK.fullmatch(health_check):
        raise ConfigError(_OPTION, f"health-check={health_check!r} is no id of a health check")
    values["name"], ttl = _domain_value(values, "name"), _ttl_value(values)
    try:
        from gateway.cloud.route53 import Route53NameService
    except ImportError:
        raise ConfigError(_OPTION, "route53: needs boto3: pip install 'wsgateway[aws]'") from None
    return Route53NameService(reactor, zone=zone[1], name=values["name"], ttl=ttl, health_check=health_check), values


def _make_rfc2136(spec: str, reactor: Any) -> tuple[INameService, dict[str, str]]:
    values = parse_spec(
        _OPTION, spec, required=("server", "zone", "name", "key-file"), optional=("port", "ttl", "address")
    )
    host, port = _server_value(values)
    zone, ttl = _domain_value(values, "zone"), _ttl_value(values)
    values["name"] = name = _domain_value(values, "name")
    if not is_in_zone(name, zone):
        raise ConfigError(_OPTION, f"name={name} is not in zone={zone}")
    try:
        from gateway.cloud import rfc2136
    except ImportError:
        raise ConfigError(_OPTION, "rfc2136: needs dnspython: pip install 'wsgateway[dns]'") from None
    if len(f"{rfc2136.NOTE_LABEL}.{name}") > MAX_DOMAIN_LENGTH:
        raise ConfigError(_OPTION, f"name={name} is too long: {rfc2136.NOTE_LABEL}.{name} must be a name, too")
    try:
        # So that a file that will not do is told of at once; it is read again for each request.
        rfc2136.read_key_file(values["key-file"])
    except KeyFileError as e:
        raise ConfigError(_OPTION, f"key-file= {e}") from None
    return rfc2136.Rfc2136NameService(
        reactor, rfc2136.UpdateServer(host, port, zone, name, values["key-file"]), ttl=ttl
    ), values


def _server_value(values: dict[str, str]) -> tuple[str, int]:
    text = values["server"]
    host, port = text, ""
    bracketed = re.fullmatch(r"\[(.*)\](?::(.*))?", text)
    if bracketed:
        host, port = bracketed[1], bracketed[2] or ""
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if port and "port" in values:
        raise ConfigError(_OPTION, f"server={text!r} has a port, and port= is given, too")
    number = _parse_integer(port or values.get("port", "53"), minimum=1, maximum=65535, name="port")
    try:
        return literal_address(host) or parse_domain(host), number
    except ValueError:
        raise ConfigError(_OPTION, rf"server={text!r} is no host; write HOST, HOST\:PORT or [IPv6]\:PORT") from None


def _domain_value(values: dict[str, str], key: str) -> str:
    try:
        return parse_domain(values[key])
    except ValueError as e:
        raise ConfigError(_OPTION, f"{key}={e}") from None


def _ttl_value(values: dict[str, str]) -> int:
    return _parse_integer(values.get("ttl", DEFAULT_TTL), minimum=1, maximum=_MAX_TTL, name="ttl")


def _parse_integer(text: str, *, minimum: int, maximum: int, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not minimum <= int(text) <= maximum:
        raise ConfigError(_OPTION, f"{name} {text!r} is no whole number from {minimum} to {maximum}")
    return int(text)


# Which address.


def _make_address_finder(
    values: dict[str, str], settings: Settings, instance_address: Callable[[], Deferred[str]] | None, reactor: Any
) -> Callable[[], Deferred[str]]:
    """How this node's address is found out. Raises :class:`~gateway.settings.ConfigError` if it cannot be."""
    hint = "write address=… with the one that clients reach this node at"
    url = settings.public_url
    host = hyperlink.URL.from_text(url).host if url else _listen_interface(settings.listen[0])
    try:
        if "address" in values:
            return _constant_address(parse_address(values["address"]))
        if host == "localhost":
            host = "127.0.0.1"
        if literal_address(host) is not None:
            return _constant_address(_warn_if_local(parse_address(host), values["name"]))
    except ValueError as e:
        raise ConfigError(_OPTION, f"{e}; {hint}") from None
    if instance_address is not None:
        ask = instance_address
        return lambda: ask().addErrback(_raise_address_unknown)
    if not host or host.rstrip(".").lower() == values["name"]:
        problem = f"--public-url is {values['name']} itself" if host else "--public-url is not given"
        raise ConfigError(_OPTION, f"which address {values['name']} is to lead to is not known, as {problem}; {hint}")
    return lambda: _resolve_host(reactor, host)


def _listen_interface(endpoint: str) -> str:
    """The address that an endpoint is on, as far as its text says."""
    found = _INTERFACE.search(endpoint)
    return found[1].replace("\\", "") if found else ""


def _warn_if_local(address: str, name: str) -> str:
    try:
        return parse_public_address(address)
    except ValueError as e:
        _log.warn("DNS: {name} will lead to this node by {problem}", name=name, problem=str(e))
        return address


def _constant_address(address: str) -> Callable[[], Deferred[str]]:
    return lambda: succeed(address)


def _raise_address_unknown(failure: Failure) -> NoReturn:
    failure.trap(AwsError)
    raise NameServiceError(f"the address of this machine is not known: {failure.getErrorMessage()}")


def _resolve_host(reactor: Any, host: str) -> Deferred[str]:
    """The address of a host: of several the first, IPv4 before IPv6."""
    receiver = _FirstAddressReceiver(host)
    reactor.nameResolver.resolveHostName(receiver, host)
    return receiver.result


@implementer(IResolutionReceiver)
class _FirstAddressReceiver:
    def __init__(self, host: str) -> None:
        self._host = host
        self._addresses: list[str] = []
        self.result: Deferred[str] = Deferred()

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        pass

    def addressResolved(self, address: Any) -> None:
        if isinstance(address, (IPv4Address, IPv6Address)):
            self._addresses.append(address.host)

    def resolutionComplete(self) -> None:
        # The sort keeps the resolver's order within each kind.
        addresses = sorted(self._addresses, key=lambda address: ":" in address)
        if not addresses:
            problem = f"{self._host}, the host of --public-url, has no address: write address=… in --dns"
            self.result.errback(NameServiceError(problem))
            return
        try:
            self.result.callback(parse_public_address(addresses[0]))
        except ValueError as e:
            problem = f"{self._host}, the host of --public-url: {e}: write address=… in --dns"
            self.result.errback(NameServiceError(problem, permanent=True))
