"""Interfaces and data of client sessions.

No module outside ``clients`` holds the protocol or the socket of a client. A client is named by its ``client_id``, and
one connection of it by a ``SessionKey``. Methods that are called for every message take the ``client_id`` and the
``generation`` as plain arguments.
"""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from gateway.auth.interface import AuthMethod, Identity
from gateway.registry.interface import Assignment, Location, SessionKey


@attrs.frozen
class SessionInfo:
    """A connected client of this node."""

    client_id: str
    generation: int
    #: seconds since 1970, UTC
    connected_at: float
    #: ``host:port`` of the client's end, ``[host]:port`` for IPv6, ``unix`` for a UNIX socket
    address: str

    @property
    def key(self) -> SessionKey:
        return SessionKey(self.client_id, self.generation)


class IClientSessions(Interface):
    """Client sessions of this node."""

    def get(client_id: str) -> SessionInfo | None:
        """Return the open session of a client, or ``None``."""

    def generation(client_id: str) -> int:
        """Return the generation of a client's open connection, or 0 if it is not connected here."""

    def send(client_id: str, payload: bytes, generation: int = 0) -> int:
        """Write one text message to a client's transport.

        Returns the generation of the connection that the message was written to, or 0 if the client is not connected
        here (or, with ``generation`` given, not by that connection). ``payload`` must be UTF-8; the caller checks its
        size.
        """

    def claim_in_progress(client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        """Return a Deferred if a claim of this client is in progress and no connection of a generation above
        ``newer_than`` is open; else ``None``.

        The Deferred fires with ``None``, never with a failure, when a connection has opened, or no claim is in progress
        any more. Cancelling it only stops the wait.
        """

    def close(client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False) -> Deferred[bool]:
        """Close a client's connection with this close code.

        From this call on, no message can be sent to it, and the calls in flight on it fail. The Deferred fires when its
        registry row is removed too: with ``True``, or with ``False`` if the client was not connected here. Fails with
        ``RegistryUnavailableError`` if the row could not be removed; the connection is closed nevertheless, and the
        registry removes the row when it is available again. ``keep_row`` leaves the row to the caller, which has to
        release it.
        """

    def renew(key: SessionKey, expires_at: float) -> bool:
        """Set when a session expires, in seconds since 1970 (0: never), after the client has presented a new token.
        Returns ``False`` if that session is not open here."""

    def ticket_identity(client_id: str, generation: int) -> Identity | None:
        """Return what a client has proved, for a ticket with which it can connect to another node; ``None`` if it gets
        none, or that session is not open here."""

    def close_superseded(key: SessionKey) -> None:
        """Close an older connection of the client with 4001, because that session is open on another node."""

    def restore_claim(key: SessionKey) -> None:
        """Reclaim an older connection of the client after that claim was revoked, on this node or another one, or if
        there is no claim at all."""

    def client_ids() -> list[str]:
        """Return the ids of all connected clients as a new list, in no particular order."""

    def count() -> int:
        """Return the number of connected clients."""

    def unsent_bytes() -> int:
        """Return the bytes sent to clients that wait in this process, as far as their transports report them."""


class IClientHandler(Interface):
    """Receiver of client events and messages; provided by the dispatcher."""

    def client_connected(key: SessionKey) -> None:
        """A connection has opened. If it replaced an older one, ``client_disconnected`` was called for that first."""

    def client_disconnected(key: SessionKey) -> None:
        """A connection has closed, for any reason. Called once for each ``client_connected``."""

    def client_superseded(key: SessionKey) -> None:
        """A newer session, with that key, is open on another node; an older one that is open here may be closed
        next."""

    def is_finishing_calls(key: SessionKey) -> bool:
        """Return whether a connection was sent ``gateway.goaway`` and is kept only until the calls on it have ended. It
        is kept even while a newer connection of the same client is open on another node."""

    def message_received(client_id: str, generation: int, payload: bytes) -> int | None:
        """Handle one text message, already validated as UTF-8.

        Returns the number of messages to charge (a batch counts each of its messages), 0 if it was not JSON-RPC 2.0, or
        a negative number if something in a batch was not. ``None``: charge nothing, since it was the response to a call
        in flight. The caller counts invalid messages and closes a connection after too many in a row.
        """


@attrs.frozen
class ConnectRequest:
    """Request of an authenticated client to connect."""

    client_id: str
    #: ``host:port`` of the client's end
    address: str
    #: redirected or relayed by another node: never routed again
    redirected_here: bool = False
    #: the client follows a 307
    accepts_redirect: bool = False
    #: the subprotocols that the client offered
    subprotocols: tuple[str, ...] = ()
    #: when the presented credentials expire, in seconds since 1970; 0: never
    expires_at: float = 0.0
    #: upper limit of ``expires_at``, whatever tokens are presented later; 0: none
    max_expires_at: float = 0.0
    #: how the client has authenticated itself, if it gets tickets for other nodes; else ``NONE``
    ticket_method: AuthMethod = AuthMethod.NONE


class IRelay(Interface):
    """Relay of one client's connection to another node; its bytes pass through this node."""

    def attach(protocol: Any) -> None:
        """Take over an open connection. From now on all its bytes go to the other node and back."""

    def abandon() -> None:
        """Close the relay, because the connection could not be opened."""


@attrs.frozen
class RouteDecision:
    """How a client reaches the node that serves it: one of the two is set."""

    #: the complete URL to redirect the client to; it may have a ticket
    url: str = attrs.field(default="", repr=False)
    #: the relay for its bytes
    relay: IRelay | None = None


class IClientRouter(Interface):
    """Decides whether an arriving client is served by this node or by another one."""

    routes_to_owner = Attribute("Whether a client owned by another node is routed there instead of taken over.")

    def may_evict_expired() -> bool:
        """Return whether this node may consider a node dead whose lease has expired."""

    def route_to_owner(request: ConnectRequest, owner: Location) -> Deferred[RouteDecision | None]:
        """Route a client to the node that owns it.

        Fires with ``None`` if that node is dead or draining, does not answer within a second, or no longer owns the
        client; then the client is to be claimed here. Fails with ``RequestRefusedError`` (such as 429) if that node
        refused it in a way that applies here too.
        """

    def has_peers() -> bool:
        """Return whether there are other nodes that clients may be assigned to."""

    def route_to(request: ConnectRequest, assignment: Assignment) -> Deferred[RouteDecision | None]:
        """Route a client to the node that it is assigned to.

        Fires with ``None`` if that node does not answer within a second, or accepts no clients. Fails with
        ``RequestRefusedError`` like :meth:`route_to_owner`.
        """

    def route_overflow(request: ConnectRequest) -> Deferred[RouteDecision | None]:
        """Route a client away from this node, which is full: to the node that it is assigned to, or else to the live
        node with the most free capacity. Fires with ``None`` if there is none."""

    def notify_takeover(key: SessionKey, previous_owner: Location) -> None:
        """Notify the previous owner that a client which it had claimed is open on this node."""

    def notify_claim_revoked(key: SessionKey, previous_owner: Location) -> None:
        """Notify the previous owner that such a claim was revoked."""


class IConnection(Interface):
    """Open connection of a client, as the session table uses it."""

    last_received_at = Attribute("Time of the last bytes from the client, in seconds of the node's clock.")
    unsent_bytes = Attribute("Bytes sent that wait in this process.")

    parkable = Attribute("Whether it can ever be parked.")

    fd = Attribute("File descriptor of the socket, -1 if it has none.")

    def detach_idle() -> tuple[int, int] | None:
        """Detach the socket; returns its file descriptor and address family, or ``None`` while the connection is not
        idle."""

    def send_text(payload: bytes) -> bool:
        """Send one text message. Returns ``False`` if the connection is not open."""

    def close_with(code: int, reason: str) -> None:
        """Start the closing handshake. The end is reported to ``ClientSessions.closed``, at once or later."""

    def abort() -> None:
        """Drop the connection at once; its end is reported too."""

    def ping() -> None:
        """Send a ping frame."""

    def pause_reading() -> None:
        """Deliver no more messages."""

    def resume_reading() -> None:
        """Deliver messages again."""


@attrs.define(eq=False)
class Session:
    """One connection of a client, from before its claim until it is closed."""

    client_id: str
    address: str
    generation: int = 0
    connected_at: float = 0.0
    #: whether the registry has, or may have, a row to be released
    claimed: bool = False
    connection: IConnection | None = None
    #: the other node's claim that was taken over, until that node is notified
    previous_owner: Location | None = None
    #: the claim in progress
    pending_claim: Deferred[Any] | None = None
    #: consecutive messages that were not JSON-RPC 2.0
    consecutive_bad: int = 0
    #: state of the client's :class:`~gateway.util.rate_limit.TokenBucket`
    tat: float = 0.0
    pinged_at: float = 0.0
    #: when the token expires, in seconds since 1970; 0: never
    expires_at: float = 0.0
    #: upper limit for later tokens: when the client certificate expires; 0: none
    max_expires_at: float = 0.0
    #: see :class:`ConnectRequest`
    ticket_method: AuthMethod = AuthMethod.NONE
    #: whether reading is paused because the client exceeded its rate
    paused: bool = False
    #: seconds without input before the connection is parked
    idle_before_park: float = 0.0

    @property
    def key(self) -> SessionKey:
        return SessionKey(self.client_id, self.generation)


@attrs.define(eq=False)
class UnparkedSession:
    """Session that has just left the table of parked sessions, with its socket and buffered bytes."""

    session: Session
    fd: int
    #: address family of the socket: ``AF_INET``, ``AF_INET6`` or ``AF_UNIX``
    family: int
    #: times of the last bytes, and of the last bytes before those that woke it, in seconds of the node's clock
    last_received_at: float
    previously_received_at: float
    #: received but not handled
    unread: bytes
    #: sent but not accepted by the kernel
    unsent: bytes

    @property
    def key(self) -> SessionKey:
        return self.session.key


class IParkingOwner(Interface):
    """Callbacks from ParkedSessions to the session table."""

    def message_received(client_id: str, generation: int, payload: bytes) -> int | None:
        """Handle one text message; returns what :meth:`IClientHandler.message_received` returns."""

    def wake(unparked: UnparkedSession) -> Any:
        """Take a session back. Returns its protocol (``IProtocol``), or ``None`` if the connection is lost."""

    def connection_lost(session: Session) -> None:
        """A connection is lost: its row is removed, and its socket is closed."""

    def close_session(key: SessionKey, code: int, reason: str) -> None:
        """Close a session with this close code, if it is still open."""

    def pause_session(key: SessionKey) -> None:
        """Pause reading from a client that exceeded its rate, if that session is still open."""
