"""One connection of a client, as the table of connections and its upkeep see it."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from gateway.registry.interface import Location


class IConnection(Interface):
    """What the table needs of one open connection."""

    heard_at = Attribute("When bytes last came from the client, by the node's clock, in seconds.")
    unsent = Attribute("How many bytes that were sent wait in this process.")

    parkable = Attribute("Whether it can ever be parked.")

    fd = Attribute("The file descriptor of its socket, -1 where it has none.")

    def detach() -> tuple[int, int] | None:
        """Give up the socket: its file descriptor and address family. ``None`` while it is not quiet."""

    def send_text(payload: bytes) -> bool:
        """Send one text message; ``False`` if the connection is not open."""

    def close_with(code: int, reason: str) -> None:
        """Begin to close; the end is reported to :meth:`Edge.ended`, at once or later."""

    def abort() -> None:
        """Drop it at once; the end is reported too."""

    def ping() -> None:
        """Ask for a sign of life."""

    def pause_reading() -> None:
        """Hand on no further message."""

    def resume_reading() -> None:
        """Go on."""


@attrs.define(eq=False)
class Client:
    """One connection of a client, from before its claim to its end."""

    client_id: str
    address: str
    generation: int = 0
    connected_at: float = 0.0
    #: whether the registry has, or may have, a row that is to be released
    claimed: bool = False
    connection: IConnection | None = None
    #: the claim of another node's that its own was made over, until that node is told
    before: Location | None = None
    #: the claim on its way
    claiming: Deferred[Any] | None = None
    #: messages in a row that were no JSON-RPC 2.0
    bad: int = 0
    #: the state of its :class:`~gateway.edge.limits.Rate`
    full_at: float = 0.0
    pinged_at: float = 0.0
    #: when its token expires, in seconds since 1970; 0: never
    until: float = 0.0
    #: what no later token outlasts: the end of its certificate
    cap: float = 0.0
    #: whether its reading is paused, because it sent too much
    paused: bool = False
    #: for how many seconds it must be silent before it is parked
    linger: float = 0.0
