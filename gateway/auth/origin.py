"""``--origin PATTERN``: the web sites whose pages may connect.

    https://app.example.com          that one alone
    https://*.example.com            * is any run of characters but /
    http://localhost:*               any port
    null                             pages without an origin of their own, such as local files
    *                                all of them, null too

An origin is what a browser says in the Origin header (RFC 6454, section 7); who sends none is no browser.
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
    """Whether a text is the pattern, with any run of characters for each ``*``; in linear time per ``*``."""
    first, *rest = pattern.split("*")
    if not rest:
        return text == first
    last = rest.pop()
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for piece in rest:
        found = text.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


class AllowedOrigins:
    """The patterns that were given."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for one that no origin could match."""
        self._allow_any = "*" in patterns
        self._allow_null = self._allow_any or "null" in patterns
        self._patterns = [self._parse(pattern) for pattern in patterns if pattern not in ("*", "null")]

    @staticmethod
    def _parse(pattern: str) -> tuple[str, str]:
        found = _PATTERN.fullmatch(pattern.lower())
        if found is None:
            raise ConfigError(
                "origin", f"{pattern!a} is no pattern of an origin; write scheme://host[:port] such as https://*.a.com"
            )
        return _without_default_port(found)

    def is_allowed(self, origin: str) -> bool:
        """Whether a page of that origin may connect."""
        if origin == "null":
            return self._allow_null
        if self._allow_any:
            return True
        found = _ORIGIN.fullmatch(origin.lower()) if len(origin) <= _MAX_LENGTH else None
        if found is None:
            return False
        parts = _without_default_port(found)
        # Neither part has a / in it, so that no * can match one.
        return any(all(map(_matches_glob, parts, pattern)) for pattern in self._patterns)


def _without_default_port(match: re.Match[str]) -> tuple[str, str]:
    """Scheme, and host with the port where that is not the scheme's own."""
    scheme, host, port = match[1], match[2], match[3]
    return scheme, host if port in (None, _DEFAULT_PORTS.get(scheme)) else f"{host}:{port}"
