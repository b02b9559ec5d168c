"""The seam between the parked connections and the table of clients that they belong to."""

from __future__ import annotations

from typing import Any

import attrs
from zope.interface import Interface

from gateway.edge.client import Client


@attrs.define(eq=False)
class Leaver:
    """A connection that has just left the table, and what goes with it."""

    client: Client
    fd: int
    #: of its socket: ``AF_INET``, ``AF_INET6`` or ``AF_UNIX``
    family: int
    #: when bytes last came, and when they did before what it was woken by, by the node's clock
    heard_at: float
    heard_before: float
    #: what came and was not handled
    unread: bytes
    #: what was sent and the kernel did not take
    unsent: bytes


class IKeeper(Interface):
    """Whose connections these are."""

    def message_received(client_id: str, generation: int, payload: bytes) -> int:
        """See :meth:`~gateway.edge.interface.IClientHandler.message_received`."""

    def wake(leaver: Leaver) -> Any:
        """Take a connection back; returns its protocol (``IProtocol``), or ``None`` if it is lost."""

    def lost(client: Client) -> None:
        """A connection is lost. It has left the table, and its socket is closed."""

    def end(client_id: str, generation: int, code: int, reason: str) -> None:
        """Close a connection with that close code, if it is still the client's."""

    def pause(client_id: str, generation: int) -> None:
        """Read no more for a while from a connection that sent more than its rate, if it is still the client's."""
