"""Interfaces between the dispatcher, its callers, the backends and other nodes."""

from __future__ import annotations

from typing import Protocol

from twisted.internet.defer import Deferred
from zope.interface import Interface

from gateway.registry.interface import Location, SessionKey
from gateway.rpc.pending import Call, Reply


class IMembership(Protocol):
    """What this node knows of its own lease in the registry. All three are false before it has joined."""

    def has_lease(self) -> bool:
        """Whether this node's lease holds."""
        ...

    def is_stable(self) -> bool:
        """Whether this node may consider another node dead whose lease has expired."""
        ...

    def ownership_uncertain(self) -> bool:
        """Whether clients connected here may have been claimed by other nodes: look them up before calling them."""
        ...


class IDispatcher(Interface):
    """Dispatches calls and notifications to clients."""

    def call(client_id: str, method: str, params: bytes | None, timeout: float | None = None) -> Deferred[Reply]:
        """Call one client.

        ``params`` are raw JSON and passed on unchanged. ``timeout`` is in seconds; ``None`` is the node's default, and
        values above the node's maximum are clamped to it. Cancelling the Deferred forgets the call: a late response is
        dropped. Fails only with :class:`~gateway.protocol.errors.RpcError`.
        """

    def try_call(call: Call, client_id: str, method: str, params: bytes | None, timeout: float | None = None) -> bool:
        """Call a client without a Deferred, if it can be called at once: it is connected to this node, or its node is
        known and a peer connection there is open. ``call`` will be completed.

        Returns ``False`` if not; then nothing has been done, and the other arguments were not checked. Raises
        ``RpcError``.
        """

    def cancel(call: Call) -> None:
        """Forget a call: it is not completed, and a late response is dropped."""

    def notify(client_id: str, method: str, params: bytes | None) -> Deferred[None]:
        """Notify one client. Fires when the message was written to its transport. Fails only with ``RpcError``."""

    def try_notify(client_id: str, method: str, params: bytes | None) -> bool:
        """Notify a client at once, if it is connected to this node. Returns ``False`` if not; then nothing has been
        done, and the other arguments were not checked. Raises ``RpcError``."""

    def notify_prefix(prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        """Notify every client of this node whose id begins with ``prefix``, in small slices so that calls keep their
        latency. Fires with the number of clients that the message was written to."""

    # For requests of other nodes, which are never passed on. They address one connection of a client.

    def call_session(
        call: Call, session: tuple[str, int], method: str, params: bytes | None, timeout: float | None = None
    ) -> bool:
        """Call a client as :meth:`try_call` does, on one session only. Returns ``False`` if that is not open here; then
        nothing has been done.

        ``session`` is a ``SessionKey``, or the plain tuple of its values, which a caller makes faster for each message.
        """

    def wait_for_handoff(client_id: str) -> Deferred[None] | None:
        """Return a Deferred if the client is in handoff from this node to another one, else ``None``.

        It fires when the client is connected there, or after a timeout. Cancelling it only stops the wait.
        """

    def notify_session(session: tuple[str, int], method: str, params: bytes | None) -> bool:
        """Notify a client as :meth:`try_notify` does, on one session only. ``session`` is as for
        :meth:`call_session`."""


class IOrphanedRows(Interface):
    """Releases rows of this node in the registry whose sessions it does not have."""

    def check(key: SessionKey) -> Deferred[bool]:
        """Release the row of this session if there is one, it is this node's, and the session is not here.

        Fires with whether a row was released, once it is. Does not fail: with ``False`` if the registry is unavailable,
        or what is in progress for the client may change its row. Cancelling it only stops the wait.
        """


class IUpstream(Interface):
    """Receivers of messages from clients: backends that have subscribed, or that serve calls."""

    def call(client_id: str, method: str, params: bytes | None) -> Deferred[Reply]:
        """Pass a client's call to a backend that serves calls. Fails only with ``RpcError`` (``METHOD_NOT_FOUND`` if
        there is no such backend). Cancelled when the client disconnects."""

    def message(client_id: str, method: str, params: bytes | None) -> None:
        """Pass a client's notification to the backends subscribed to ``message``."""

    def connected(key: SessionKey) -> None:
        """Notify the backends subscribed to ``connected``."""

    def disconnected(key: SessionKey) -> None:
        """Notify the backends subscribed to ``disconnected``."""


class IRemoteNodes(Interface):
    """Delivery to clients of other nodes. A message that came from another node is never delivered this way."""

    def connect(location: Location) -> Deferred[None]:
        """Open a connection to the client's node, unless there is one. Fails with ``RpcError`` (``NODE_UNREACHABLE``,
        not sent)."""

    def try_send(
        call: Call,
        location: Location,
        method: str,
        params: bytes | None,
        timeout: float,
        *,
        is_call: bool = True,
        stale: bool = False,
    ) -> bool:
        """Call or notify a client through the open connection to its node. Returns ``False`` if there is none; then
        nothing has been done. Messages that are sent one after the other reach the client in that order, as far as they
        do.

        ``call`` is completed with the client's response, or, for a notification, with ``null`` once that node has
        written it to the client's transport; or with ``RpcError``: ``NODE_UNREACHABLE`` (sent) if the node did not
        answer until the deadline, ``CONNECTION_LOST`` if the connection broke; or ``call.not_delivered()`` is called.
        ``stale`` makes the node deliver the message even if its lease has expired. Raises ``RpcError``
        (``TOO_MANY_CALLS``).
        """

    def fence(location: Location) -> Deferred[None]:
        """Fire when all messages sent to the client's node so far have been written to the client's transport, or have
        failed or been given back: at once if there is no connection, or if the node cannot tell. Does not fail."""

    def cancel(call: Call) -> None:
        """Forget a message, here and at the other node. Does nothing if it is not pending here."""
