"""Errors of WebSocket connections that this side opens."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

_REDIRECT_STATUSES = frozenset({301, 302, 307, 308})
_RETRY_AFTER_STATUSES = frozenset({429, 503})
_DELAY_SECONDS = re.compile(r"[0-9]{1,9}")
#: the longest wait that a gateway can ask for, in seconds
MAX_DELAY = 3600.0


class ConnectionClosedError(Exception):
    """The connection ended before what was awaited."""


class HandshakeError(Exception):
    """There was no opening handshake, or none that could be understood."""


class HandshakeRefusedError(Exception):
    """The gateway answered the opening handshake with another status than 101 (RFC 6455, section 4.1).

    ``headers`` have names in lower case.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        try:
            said = msgspec.json.decode(body, type=_RefusalBody)
        except (msgspec.DecodeError, RecursionError):
            said = _RefusalBody()
        detail = ": ".join(ascii(text[:200])[1:-1] for text in (said.error, said.message) if text)
        super().__init__(f"the gateway answered {status}" + (f" ({detail})" if detail else ""))

    @property
    def location(self) -> str | None:
        """Where a redirect leads, if this is one."""
        return self.headers.get("location") or None if self.status in _REDIRECT_STATUSES else None

    @property
    def retry_after(self) -> float:
        """The seconds that the gateway asked to wait, 0 if it did not (RFC 9110, section 10.2.3; no dates)."""
        found = _DELAY_SECONDS.fullmatch(self.headers.get("retry-after", ""))
        return parse_delay(int(found[0])) if found and self.status in _RETRY_AFTER_STATUSES else 0.0


def parse_delay(value: object) -> float:
    """Make a number of seconds, from 0 to ``LONGEST_WAIT``, of what came from outside."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return 0.0
    return float(min(max(value, 0), MAX_DELAY))


class _RefusalBody(msgspec.Struct):
    error: str = ""
    message: str = ""
