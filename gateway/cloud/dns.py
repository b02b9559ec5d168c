"""The option ``--dns``: the name service, the name, and the address of this node's record.

    route53:zone=Z0123456789:name=gw.example.com[:ttl=30][:address=192.0.2.7][:health-check=ID]
    rfc2136:server=192.0.2.1:zone=example.com:name=gw.example.com:key-file=/etc/wsgateway/dns.key
        [:port=53][:ttl=30][:address=192.0.2.7]

``server`` is ``HOST``, ``HOST:PORT`` or, for IPv6, ``[2001:db8::1]:53``. The address is the first of these that exists:

1. ``address=``
2. the host of ``--public-url`` if it is an address; without ``--public-url``, the interface of the first ``--listen``
3. the address that the cloud's metadata service returns
4. the address that the host of ``--public-url`` resolves to when the node starts, unless that host is the name itself

Use one name for one fleet only: each fleet withdraws the nodes that it does not know.

Domain names follow RFC 1035, section 2.3.1, and RFC 1123, section 2.1.
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

#: letters, digits and hyphens, without a hyphen at either end; may begin with a digit (RFC 1123)
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
#: characters, without the trailing dot: 255 octets on the wire
MAX_DOMAIN_LENGTH = 253


def parse_domain(text: str) -> str:
    """Return a domain name in lower case, without the trailing dot. Raises ``ValueError``."""
    name = text[:-1] if text.endswith(".") else text
    name = name.lower()
    if not name.isascii() or len(name) > MAX_DOMAIN_LENGTH or not _DOMAIN.fullmatch(name):
        raise ValueError(
            f"{text!r} is not a domain name such as gw.example.com: labels of 1 to 63 letters, digits and hyphens, "
            f"at most {MAX_DOMAIN_LENGTH} characters in total"
        )
    return name


def is_in_zone(name: str, zone: str) -> bool:
    """Whether a name is in a zone or equal to the name of the zone."""
    return name == zone or name.endswith(f".{zone}")


def parse_address(text: str) -> str:
    """Return an IPv4 or IPv6 address in canonical form.

    Raises ``ValueError`` if the text is not an address, or not the address of a single host.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv4 or IPv6 address") from None
    if address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255" or "%" in text:
        raise ValueError(f"{text!r} is not an address that a name can resolve to")
    return str(address)


def literal_address(host: str) -> str | None:
    """Return the address if a host is one, also in brackets as in a url; ``None`` if it is a name."""
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return None


def parse_public_address(text: str) -> str:
    """Return an address that is not loopback or link-local, in canonical form. Raises ``ValueError``."""
    address = ipaddress.ip_address(parse_address(text))
    if address.is_loopback or address.is_link_local:
        raise ValueError(f"{text} cannot be reached from other machines")
    return str(address)


_log = Logger(namespace="gateway.cloud.dns")

_OPTION = "dns"
#: seconds
DEFAULT_TTL = "30"
#: seconds
_MAX_TTL = 86400

#: in an endpoint string, where a colon in a value is escaped by a backslash
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
    """Make the DNS registrar of a node, or return ``None`` without ``--dns``. Sends no requests.

    ``live_nodes`` and ``refresh_live_nodes`` are those of :class:`~gateway.cloud.registrar.DnsRegistrar`.
    ``instance_address()`` fires with the address of this machine from the cloud's metadata service, or fails with
    ``AwsError``; ``None`` outside of a cloud.

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
    """Make the name service of a spec. Sends no requests. Raises :class:`~gateway.settings.ConfigError`."""
    return _make_service(spec, reactor)[0]


def _make_service(spec: str, reactor: Any) -> tuple[INameService, dict[str, str]]:
    kind = spec.partition(":")[0]
    make = {"route53": _make_route53, "rfc2136": _make_rfc2136}.get(kind)
    if make is None:
        raise ConfigError(_OPTION, f"{kind!r} is not a name service; write route53:zone=…:name=… or rfc2136:server=…")
    return make(spec, reactor)


def _make_route53(spec: str, reactor: Any) -> tuple[INameService, dict[str, str]]:
    values = parse_spec(_OPTION, spec, required=("zone", "name"), optional=("ttl", "address", "health-check"))
    zone = _ZONE_ID.fullmatch(values["zone"])
    if zone is None:
        raise ConfigError(_OPTION, f"zone={values['zone']!r} is not a hosted zone id such as Z0123456789ABCDEFGHIJ")
    health_check = values.get("health-check", "")
    if health_check and not _HEALTH_CHECK.fullmatch(health_check):
        raise ConfigError(_OPTION, f"health-check={health_check!r} is not the id of a health check")
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
        raise ConfigError(_OPTION, f"name={name} is too long: {rfc2136.NOTE_LABEL}.{name} must be a domain name too")
    try:
        # Fail at the start if the file is invalid; it is read again for each request.
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
        raise ConfigError(_OPTION, f"server={text!r} has a port, and port= is given as well")
    number = _parse_integer(port or values.get("port", "53"), minimum=1, maximum=65535, name="port")
    try:
        return literal_address(host) or parse_domain(host), number
    except ValueError:
        raise ConfigError(_OPTION, rf"server={text!r} is not a host; write HOST, HOST\:PORT or [IPv6]\:PORT") from None


def _domain_value(values: dict[str, str], key: str) -> str:
    try:
        return parse_domain(values[key])
    except ValueError as e:
        raise ConfigError(_OPTION, f"{key}={e}") from None


def _ttl_value(values: dict[str, str]) -> int:
    return _parse_integer(values.get("ttl", DEFAULT_TTL), minimum=1, maximum=_MAX_TTL, name="ttl")


def _parse_integer(text: str, *, minimum: int, maximum: int, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not minimum <= int(text) <= maximum:
        raise ConfigError(_OPTION, f"{name} {text!r} is not an integer from {minimum} to {maximum}")
    return int(text)


# The address of this node.


def _make_address_finder(
    values: dict[str, str], settings: Settings, instance_address: Callable[[], Deferred[str]] | None, reactor: Any
) -> Callable[[], Deferred[str]]:
    """Return a function that finds the address of this node; it fails with ``NameServiceError``.

    Raises :class:`~gateway.settings.ConfigError` if there is no way to find the address.
    """
    hint = "write address=… with the address at which clients reach this node"
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
        find_address = instance_address
        return lambda: find_address().addErrback(_raise_address_unknown)
    if not host or host.rstrip(".").lower() == values["name"]:
        problem = f"--public-url is {values['name']} itself" if host else "--public-url is not given"
        raise ConfigError(_OPTION, f"the address for {values['name']} is unknown, as {problem}; {hint}")
    return lambda: _resolve_host(reactor, host)


def _listen_interface(endpoint: str) -> str:
    """Return the interface of an endpoint string, or an empty text."""
    match = _INTERFACE.search(endpoint)
    return match[1].replace("\\", "") if match else ""


def _warn_if_local(address: str, name: str) -> str:
    try:
        return parse_public_address(address)
    except ValueError as e:
        _log.warn("DNS: the address of this node for {name}: {problem}", name=name, problem=str(e))
        return address


def _constant_address(address: str) -> Callable[[], Deferred[str]]:
    return lambda: succeed(address)


def _raise_address_unknown(failure: Failure) -> NoReturn:
    failure.trap(AwsError)
    raise NameServiceError(f"the address of this machine is unknown: {failure.getErrorMessage()}")


def _resolve_host(reactor: Any, host: str) -> Deferred[str]:
    """Resolve a host to its first address, IPv4 before IPv6. Fails with ``NameServiceError``."""
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
        # Stable sort: keeps the resolver's order within each address family.
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
