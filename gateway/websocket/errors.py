"""Errors of WebSocket connections that this side opens.

ConnectionClosedError      the connection closed before the awaited event
HandshakeError             no valid response to the opening handshake
HandshakeRefusedError      a response with a status other than 101
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

_REDIRECT_STATUSES = frozenset({301, 302, 307, 308})
_RETRY_AFTER_STATUSES = frozenset({429, 503})
_ERROR_WORD = re.compile(r"[a-z_]{1,32}")
_DELAY_SECONDS = re.compile(r"[0-9]{1,9}")
#: seconds that a gateway can ask to wait, at most
MAX_DELAY = 3600.0


class ConnectionClosedError(Exception):
    """The connection closed before the awaited event."""


class HandshakeError(Exception):
    """The opening handshake failed: no response, or an invalid one."""


class HandshakeRefusedError(Exception):
    """The opening handshake was answered with a status other than 101 (RFC 6455, section 4.1), by the gateway or by a
    proxy in front of it.

    Names in ``headers`` are in lower case. The text has the error word and message of a JSON body, cut and escaped.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        try:
            refusal = msgspec.json.decode(body, type=_RefusalBody)
        except (msgspec.DecodeError, RecursionError):
            refusal = _RefusalBody()
        #: the error word of the body; empty if that is not the gateway's JSON
        self.word = refusal.error if _ERROR_WORD.fullmatch(refusal.error) else ""
        detail = ": ".join(ascii(text[:200])[1:-1] for text in (refusal.error, refusal.message) if text)
        what = f"the gateway answered {status}" if self.word else f"the response is {status}, and not the gateway's"
        super().__init__(what + (f" ({detail})" if detail else ""))

    @property
    def location(self) -> str | None:
        """The target of a redirect; ``None`` if this is not one."""
        return self.headers.get("location") or None if self.status in _REDIRECT_STATUSES else None

    @property
    def retry_after(self) -> float:
        """The seconds that the gateway asked to wait, 0 if it did not (RFC 9110, section 10.2.3; no dates)."""
        match = _DELAY_SECONDS.fullmatch(self.headers.get("retry-after", ""))
        return parse_delay(int(match[0])) if match and self.status in _RETRY_AFTER_STATUSES else 0.0


def parse_delay(value: object) -> float:
    """Convert an untrusted value to seconds, from 0 to ``MAX_DELAY``; 0 if it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return 0.0
    return float(min(max(value, 0), MAX_DELAY))


class _RefusalBody(msgspec.Struct, forbid_unknown_fields=True):
    error: str = ""
    message: str = ""
