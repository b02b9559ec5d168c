"""Errors of delivery through other nodes."""

from __future__ import annotations

import enum


class NotDelivered(enum.Enum):
    """Why another node did not deliver a message. The client certainly did not get it."""

    #: the client is not connected there, or not with that generation
    NOT_HERE = "not here"
    #: the node's lease has expired: another node may own the client by now
    LEASE_LOST = "lease lost"


class NotDeliveredError(Exception):
    """Another node did not deliver a message."""

    def __init__(self, reason: NotDelivered) -> None:
        self.reason = reason
        super().__init__(reason.value)
