"""Errors of delivery to other nodes."""

from __future__ import annotations

import enum


class NotDelivered(enum.Enum):
    """Why a node that was asked for a client did not pass a message on: the client certainly did not get it."""

    #: it does not have the client, or not by that generation
    NOT_HERE = "not here"
    #: its own lease ran out: somebody else may have the client by now
    LEASE_LOST = "lease lost"


class NotDeliveredError(Exception):
    """A message was not passed on by the node that was asked."""

    def __init__(self, reason: NotDelivered) -> None:
        self.reason = reason
        super().__init__(reason.value)
