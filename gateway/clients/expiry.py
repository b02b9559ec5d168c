"""Expiry of sessions: a connection ends when its token or client certificate expires (close code 1008).

The keep-alive sweep checks awake sessions (``keepalive.py``) and parked ones (``parked.py``), so that a session may
outlive its token by one round of the sweep.
"""

from __future__ import annotations

import math

#: the latest time in 32 bits, in seconds since 1970
MAX_TIMESTAMP = 0xFFFFFFFF
#: close reason of a connection whose token has expired
EXPIRED_REASON = "the token, or the certificate, has expired"


def has_expired(expires_at: float, wall_time: float) -> bool:
    """Return whether a session ends at ``wall_time``; both are in seconds since 1970, and 0 means no expiry."""
    return 0 < expires_at <= wall_time


def pack_expiry(expires_at: float) -> int:
    """Return an expiry time as an unsigned 32-bit integer, 0 being never. Later times than that can hold are never,
    too."""
    return math.ceil(expires_at) if expires_at <= MAX_TIMESTAMP else 0
