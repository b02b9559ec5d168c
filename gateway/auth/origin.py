"""Check the Origin header of browsers (RFC 6454, section 7) against the patterns of ``--origin PATTERN``.

    https://app.example.com          only this origin
    https://*.example.com            * matches any characters except /
    http://localhost:*               any port
    null                             pages with an opaque origin, such as local files
    *                                all origins, including null

Clients that send no Origin header are not browsers, and are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gateway.settings import ConfigError

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/\\@?#\s:\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PATTERN = re.compile(r"([a-z*][a-z0-9+.*-]*)://([^/\\@?#\s:\[\]]+|\[[0-9a-f:.*]+\])(?::([0-9*]{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}
_MAX_LENGTH = 1024


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


def _without_default_port(match: re.Match[str]) -> tuple[str, str]:
    """Return the scheme, and the host with its port unless that is the default port of the scheme."""
    scheme, host, port = match[1], match[2], match[3]
    return scheme, host if port in (None, _DEFAULT_PORTS.get(scheme)) else f"{host}:{port}"
