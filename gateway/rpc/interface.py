"""What the API needs of the hub."""

from __future__ import annotations

from typing import Protocol

from twisted.internet.defer import Deferred
from zope.interface import Interface

from gateway.registry.interface import Location
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
    """The way of one call or notification to the client that it is for."""

    def call(client_id: str, method: str, params: bytes | None, timeout: float | None = None) -> Deferred[Reply]:
        """Ask one client.

        ``params`` are raw JSON and passed on byte for byte. ``timeout`` is in seconds; ``None`` is the node's default,
        and more than the node's maximum is clamped to it. Cancelling the Deferred forgets the call: a late response
        is dropped. Fails with :class:`~gateway.protocol.errors.RpcError` alone.
        """

    def try_call(call: Call, client_id: str, method: str, params: bytes | None, timeout: float | None = None) -> bool:
        """The same without a Deferred, for a client that can be asked at once: it is connected to this node, or this
        node knows where it is, and has a link there. ``call`` will be settled.

        ``False`` when that is not so, which is told before anything else is looked at; then nothing was done. Raises
        ``RpcError``.
        """

    def cancel(call: Call) -> None:
        """Give up what was asked: it is not settled, and a late response is dropped."""

    def notify(client_id: str, method: str, params: bytes | None) -> Deferred[None]:
        """Tell one client; fires when the message was handed to its transport. Fails with ``RpcError`` alone."""

    def try_notify(client_id: str, method: str, params: bytes | None) -> bool:
        """Tell a client that is connected to this node, at once. ``False`` when it is not, and nothing was done; that
        is told from the client's id alone, before anything else is looked at. Raises ``RpcError``."""

    def notify_prefix(prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        """Tell every client of this node whose id begins with ``prefix``, in small slices so that calls keep
        their latency; fires with the number of clients it was handed to."""

    # For what another node asks, which never leaves this one again. What is meant is one connection of a client.

    def call_session(
        call: Call,
        client_id: str,
        generation: int,
        method: str,
        params: bytes | None,
        timeout: float | None = None,
    ) -> bool:
        """As :meth:`ask`, by that generation alone; ``False`` when it is not here by that, and nothing was done."""

    def wait_for_handoff(client_id: str) -> Deferred[None] | None:
        """``None`` unless this node told the client to go to another one, and it is not there yet; else a new Deferred
        that fires when it is, or when that takes too long. Cancelling it only stops the wait."""

    def notify_session(client_id: str, generation: int, method: str, params: bytes | None) -> bool:
        """As :meth:`notify_here`, by that generation alone."""


class IUpstream(Interface):
    """Where messages from clients go: the backends that subscribed, or that serve."""

    def call(client_id: str, method: str, params: bytes | None) -> Deferred[Reply]:
        """Hand a client's call to a backend that serves. Fails with ``RpcError`` alone (``METHOD_NOT_FOUND`` when
        nobody serves). Cancelled when the client goes away."""

    def message(client_id: str, method: str, params: bytes | None) -> None:
        """Hand a client's notification to the backends that subscribed to ``message``."""

    def connected(client_id: str, generation: int) -> None:
        """Tell the subscribers of ``connected``."""

    def disconnected(client_id: str, generation: int) -> None:
        """Tell the subscribers of ``disconnected``."""


class IRemoteNodes(Interface):
    """The way to clients that other nodes hold. A message that came from another node never goes this way."""

    def connect(location: Location) -> Deferred[None]:
        """Have a link open to the node that has a client. Fails with ``RpcError`` (``NODE_UNREACHABLE``, not sent)."""

    def try_call(
        call: Call, location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> bool:
        """Ask a client through the open link to its node; ``False`` when none is open, and nothing was done.

        ``call`` is settled with what the client answered, or with ``RpcError``: ``NODE_UNREACHABLE`` (sent) when the
        node was silent until the deadline, ``CONNECTION_LOST`` when the link broke; or
        ``call.not_delivered()`` is called. ``stale``: the node is to pass it on even if its lease ran out. Raises
        ``RpcError`` (``TOO_MANY_CALLS``).
        """

    def cancel(call: Call) -> None:
        """Give up what was asked, here and at the node; nothing happens if it was not asked here, or is over."""

    def notify(
        location: Location, method: str, params: bytes | None, timeout: float, *, stale: bool = False
    ) -> Deferred[None]:
        """Tell a client, by a link that is opened if need be; fires when its node has handed it to its transport.
        Fails with ``RpcError``, or with ``Missed``."""
