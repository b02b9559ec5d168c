"""Check the Origin header (RFC 6454, section 7) against the patterns of ``--origin PATTERN`` and the node's own urls.

    https://app.example.com          only this origin
    https://*.example.com            * matches any characters except /
    http://localhost:*               any port
    null                             pages with an opaque origin, such as local files
    *                                all origins, including null

Clients that send no Origin header are not browsers, and are not checked. Some libraries that are not browsers send the
origin of the url that they connect to. It is accepted if it is certainly the node's own:

    --public-url                     its origin
    --dns                            the name, with the scheme and port of --public-url
    --listen on a loopback address   its port at that address and at localhost, for connections to that port

The Host header proves nothing: a page can have any name lead to this node (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from twisted.internet.address import IPv4Address, IPv6Address

from gateway.settings import ConfigError

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/\\@?#\s:\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PATTERN = re.compile(r"([a-z*][a-z0-9+.*-]*)://([^/\\@?#\s:\[\]]+|\[[0-9a-f:.*]+\])(?::([0-9*]{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}
_MAX_LENGTH = 1024
#: an origin without characters that mean something else in a pattern or to a shell
_PLAIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
#: the scheme of a WebSocket url -> that of the pages at its origin
_PAGE_SCHEMES = {"ws": "http", "wss": "https"}


def _matches_glob(text: str, pattern: str) -> bool:
    """Whether a text matches a pattern, in which each ``*`` is any characters. In linear time per ``*``."""
    first, *rest = pattern.split("*")
    if not rest:
        return text == first
    last = rest.pop()
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    start, end = len(first), len(text) - len(last)
    for part in rest:
        index = text.find(part, start, end)
        if index < 0:
            return False
        start = index + len(part)
    return True


class AllowedOrigins:
    """The origins that match any of the patterns."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for a pattern that no origin could match."""
        self._allow_any = "*" in patterns
        self._allow_null = self._allow_any or "null" in patterns
        self._patterns = [self._parse(pattern) for pattern in patterns if pattern not in ("*", "null")]

    @staticmethod
    def _parse(pattern: str) -> tuple[str, str]:
        match = _PATTERN.fullmatch(pattern.lower())
        if match is None:
            raise ConfigError(
                "origin", f"{pattern!a} is no pattern of an origin; write scheme://host[:port] such as https://*.a.com"
            )
        return _without_default_port(match)

    def is_allowed(self, origin: str) -> bool:
        """Whether pages of this origin may connect."""
        if origin == "null":
            return self._allow_null
        if self._allow_any:
            return True
        match = _ORIGIN.fullmatch(origin.lower()) if len(origin) <= _MAX_LENGTH else None
        if match is None:
            return False
        parts = _without_default_port(match)
        # Neither part contains a /, so no * can match one.
        return any(all(map(_matches_glob, parts, pattern)) for pattern in self._patterns)


def suggest_pattern(origin: str) -> str | None:
    """Return the pattern that allows an origin and nothing else; ``None`` if there is none that is safe to quote."""
    if origin == "null":
        return origin
    plain = _PLAIN.fullmatch(origin.lower()) if len(origin) <= _MAX_LENGTH else None
    match = None if plain is None else _ORIGIN.fullmatch(plain[0])
    return None if match is None else "://".join(_without_default_port(match))


class OwnOrigins:
    """The origins of the urls at which clients reach this node."""

    def __init__(self, public_url: str = "") -> None:
        """``public_url`` is ``ws://`` or ``wss://``, or empty."""
        self._public_url = public_url
        self._public: set[str] = set()
        #: address and port of a loopback port -> its origins
        self._loopback: dict[tuple[str, int], set[str]] = {}
        if public_url:
            parts = urlsplit(public_url)
            self._public.add(_origin_of(parts.scheme, parts.hostname or "", parts.port))

    def add_dns_name(self, name: str) -> None:
        """Add a DNS name of the fleet, with the scheme and port of the public url; nothing without a public url."""
        if self._public_url:
            parts = urlsplit(self._public_url)
            self._public.add(_origin_of(parts.scheme, name, parts.port))

    def add_loopback_url(self, url: str) -> None:
        """Add the url of a port on a loopback address, for connections to that port."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 0
        self._loopback[host, port] = {_origin_of(parts.scheme, name, port) for name in (host, "localhost")}

    def includes(self, origin: str, address: object = None) -> bool:
        """Whether an Origin header names this node. ``address`` is the one at which the connection was accepted."""
        # Browsers send international names in ASCII.
        match = _ORIGIN.fullmatch(origin.lower()) if len(origin) <= _MAX_LENGTH and origin.isascii() else None
        if match is None:
            return False
        own = _origin_of(match[1], match[2].strip("[]"), int(match[3]) if match[3] else None)
        if own in self._public:
            return True
        if not isinstance(address, (IPv4Address, IPv6Address)):
            return False
        return own in self._loopback.get((address.host, address.port), ())


def _origin_of(scheme: str, host: str, port: int | None) -> str:
    """Return the origin of the pages of a server, in one form: RFC 6454, section 6.2, and the schemes of pages."""
    scheme = _PAGE_SCHEMES.get(scheme, scheme)
    try:
        address = ipaddress.ip_address(host)
        host = f"[{address}]" if address.version == 6 else str(address)
    except ValueError:
        host = host.lower() if host.isascii() else _to_ascii(host)
    return f"{scheme}://{host}" + ("" if port is None or str(port) == _DEFAULT_PORTS.get(scheme) else f":{port}")


def _to_ascii(host: str) -> str:
    """Return an international host name as browsers send it."""
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host


def _without_default_port(match: re.Match[str]) -> tuple[str, str]:
    """Return the scheme, and the host with its port unless that is the default port of the scheme."""
    scheme, host, port = match[1], match[2], match[3]
    return scheme, host if port in (None, _DEFAULT_PORTS.get(scheme)) else f"{host}:{port}"
