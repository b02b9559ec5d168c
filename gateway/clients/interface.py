"""The seam between the connections of clients and everything else.

Nothing outside ``edge`` ever holds a protocol or a socket of a client: a client is named by its ``client_id``, and one
connection of it by that and the ``generation`` of its claim.

One connection of a client, as the table of connections and its upkeep see it.

The seam between the parked connections and the table of clients that they belong to.
"""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from gateway.registry.interface import Assignment, Location


@attrs.frozen
class SessionInfo:
    """A client that is connected here."""

    client_id: str
    generation: int
    #: seconds since 1970, UTC
    connected_at: float
    #: ``host:port`` of the client's end, ``[host]:port`` for IPv6, ``unix`` for a UNIX socket
    address: str


class IClientSessions(Interface):
    """The clients that are connected to this node."""

    def get(client_id: str) -> SessionInfo | None:
        """The open connection of a client, or ``None``."""

    def generation(client_id: str) -> int:
        """The generation of a client's open connection, or 0 when it is not here."""

    def send(client_id: str, payload: bytes, generation: int = 0) -> int:
        """Hand one text message to a client's transport.

        Returns the generation of the connection that took it, or 0 when the client is not here (or, where
        ``generation`` is given, not by that connection). ``payload`` must be UTF-8; its size is the caller's to check.
        """

    def claim_in_progress(client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        """``None`` unless a connection of this client awaits its claim and none is open of a generation above
        ``newer_than``; else a new Deferred that fires (with ``None``, never with a failure) when more is known.
        Cancelling it only stops the wait."""

    def close(client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False) -> Deferred[bool]:
        """Close a client's connection with that close code.

        At once it can no longer be sent to, and its calls fail; the Deferred fires when its row is gone from the
        registry as well: with ``True``, or ``False`` when it was not here. A failure is ``RegistryUnavailable``
        (then the connection is closed all the same, and the row follows when the registry is back). ``keep_row``: the
        row stays, for the caller to release it.
        """

    def renew(client_id: str, generation: int, expires_at: float) -> bool:
        """A client proved anew who it is, until then (in seconds since 1970; 0: for ever): its connection of that
        generation stays so long. ``False`` if it is not here."""

    def close_superseded(client_id: str, generation: int) -> None:
        """A connection of that generation is open elsewhere: an older one that is here is closed with 4001."""

    def restore_claim(client_id: str, generation: int) -> None:
        """A claim of that generation was taken back, here or elsewhere, or there is no claim at all: an older
        connection that is here is claimed again."""

    def client_ids() -> list[str]:
        """The ids of all clients that are connected here, as a new list, in no order."""

    def count() -> int:
        """How many clients are connected here."""

    def unsent_bytes() -> int:
        """How many bytes that were sent to clients wait in this process, as far as their transports tell."""


class IClientHandler(Interface):
    """What the edge tells of its clients; the hub provides it."""

    def client_connected(client_id: str, generation: int) -> None:
        """A connection is open. If it replaced an older one, ``client_disconnected`` for that one came first."""

    def client_disconnected(client_id: str, generation: int) -> None:
        """A connection is gone, for whatever reason; said once for each ``client_connected``."""

    def client_superseded(client_id: str, generation: int) -> None:
        """A newer connection, of that generation, is open elsewhere; one that is here may be closed next."""

    def is_finishing_calls(client_id: str, generation: int) -> bool:
        """Whether a connection was told to go, and stays only until the calls on it are over: it may, though a newer
        one of the same client is open elsewhere."""

    def message_received(client_id: str, generation: int, payload: bytes) -> int:
        """One whole text message, already checked as UTF-8. Returns how many messages it was, a batch being many, for
        the edge to charge; 0 when it was no JSON-RPC 2.0, and less than 0 when that is so of something in a batch: the
        edge counts those, and closes a connection after too many in a row."""


@attrs.frozen
class ConnectRequest:
    """A client that has proved who it is, and wants to connect."""

    client_id: str
    #: ``host:port`` of the client's end
    address: str
    #: it was sent here by a node: it is never sent on
    redirected_here: bool = False
    #: it follows a 307
    accepts_redirect: bool = False
    #: the subprotocols that it offered
    subprotocols: tuple[str, ...] = ()
    #: for how long it is proved who it is, in seconds since 1970; 0: for ever
    expires_at: float = 0.0
    #: for how long that can be at most, whatever tokens it shows later
    max_expires_at: float = 0.0


class IRelay(Interface):
    """An open way to another node for one connection of a client, whose bytes go through this node."""

    def attach(protocol: Any) -> None:
        """Take over an open connection: from here on its bytes go to the other node and back, nothing else."""

    def abandon() -> None:
        """The connection could not be opened: end it."""


@attrs.frozen
class RouteDecision:
    """What became of a client that is better served by another node."""

    #: the complete url that it is to be redirected to; or
    url: str = ""
    #: the way for its bytes
    relay: IRelay | None = None


class IClientRouter(Interface):
    """Where a client that arrives is to be: here, or on another node."""

    routes_to_owner = Attribute("Whether a client that another node holds is sent there, rather than taken over.")

    def may_evict_expired() -> bool:
        """Whether this node may call another dead whose lease has run out."""

    def route_to_owner(request: ConnectRequest, owner: Location) -> Deferred[RouteDecision | None]:
        """Send a client on to the node that holds it; ``None`` when that is dead, draining, does not answer within a
        second, or does not hold it any more: then it is to be claimed here. Fails with ``Refusal`` (such as 429) where
        that node refused it in a way that would be the same here."""

    def has_peers() -> bool:
        """Whether clients may be placed on other nodes: there are any."""

    def route_to(request: ConnectRequest, assignment: Assignment) -> Deferred[RouteDecision | None]:
        """Send a client on to the node that it is placed on; ``None`` when that does not answer within a second, or
        takes no clients. Fails with ``Refusal`` like :meth:`route`."""

    def route_overflow(request: ConnectRequest) -> Deferred[RouteDecision | None]:
        """Send a client on to the node that it is placed on, or else to the live node with the most room, since this
        one is full; ``None`` when none has any."""

    def notify_takeover(client_id: str, generation: int, previous_owner: Location) -> None:
        """A client is open here that was claimed over a claim of another node's."""

    def notify_claim_revoked(client_id: str, generation: int, previous_owner: Location) -> None:
        """Such a claim was taken back."""


class IConnection(Interface):
    """What the table needs of one open connection."""

    last_received_at = Attribute("When bytes last came from the client, by the node's clock, in seconds.")
    unsent_bytes = Attribute("How many bytes that were sent wait in this process.")

    parkable = Attribute("Whether it can ever be parked.")

    fd = Attribute("The file descriptor of its socket, -1 where it has none.")

    def detach_idle() -> tuple[int, int] | None:
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
class Session:
    """One connection of a client, from before its claim to its end."""

    client_id: str
    address: str
    generation: int = 0
    connected_at: float = 0.0
    #: whether the registry has, or may have, a row that is to be released
    claimed: bool = False
    connection: IConnection | None = None
    #: the claim of another node's that its own was made over, until that node is told
    previous_owner: Location | None = None
    #: the claim on its way
    pending_claim: Deferred[Any] | None = None
    #: messages in a row that were no JSON-RPC 2.0
    consecutive_bad: int = 0
    #: the state of its :class:`~gateway.util.rate_limit.Rate`
    tat: float = 0.0
    pinged_at: float = 0.0
    #: when its token expires, in seconds since 1970; 0: never
    expires_at: float = 0.0
    #: what no later token outlasts: the end of its certificate
    max_expires_at: float = 0.0
    #: whether its reading is paused, because it sent too much
    paused: bool = False
    #: for how many seconds it must be silent before it is parked
    idle_before_park: float = 0.0


@attrs.define(eq=False)
class UnparkedSession:
    """A connection that has just left the table, and what goes with it."""

    session: Session
    fd: int
    #: of its socket: ``AF_INET``, ``AF_INET6`` or ``AF_UNIX``
    family: int
    #: when bytes last came, and when they did before what it was woken by, by the node's clock
    last_received_at: float
    previously_received_at: float
    #: what came and was not handled
    unread: bytes
    #: what was sent and the kernel did not take
    unsent: bytes


class IParkingOwner(Interface):
    """Whose connections these are."""

    def message_received(client_id: str, generation: int, payload: bytes) -> int:
        """See :meth:`~gateway.clients.interface.IClientHandler.message_received`."""

    def wake(unparked: UnparkedSession) -> Any:
        """Take a connection back; returns its protocol (``IProtocol``), or ``None`` if it is lost."""

    def connection_lost(session: Session) -> None:
        """A connection is lost. It has left the table, and its socket is closed."""

    def close_session(client_id: str, generation: int, code: int, reason: str) -> None:
        """Close a connection with that close code, if it is still the client's."""

    def pause_session(client_id: str, generation: int) -> None:
        """Read no more for a while from a connection that sent more than its rate, if it is still the client's."""
