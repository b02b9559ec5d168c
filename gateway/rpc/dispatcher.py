"""The way of a call or a notification to the client that it is for.

    client <- {"jsonrpc":"2.0","id":"<UUID4>","method":...,"params":...}     call(): asked under an id of the hub's own
    client -> {"jsonrpc":"2.0","id":"<UUID4>","result":...}                  or "error": settles the call of that id
    client <- {"jsonrpc":"2.0","method":...,"params":...}                    notify(), notify_prefix()

A client whose connection is here is sent to at once. One that is about to be (its claim is under way) is waited for;
any other is sought, and asked through the node that has it (seeking.py). A response counts only if it comes from the
very connection that was asked: a call's owner is the client's id together with the generation of its claim.

A node whose own lease ran out goes on to ask its clients, for its backends. Whether what another node asks is to be
passed on then is for who takes it to judge.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from gateway.clients.interface import IClientHandler, IClientSessions
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import encode_notification
from gateway.registry.interface import IRegistry
from gateway.rpc.broadcast import Broadcaster
from gateway.rpc.handoff import HandoffTracker
from gateway.rpc.inbound import Inbound
from gateway.rpc.interface import IDispatcher, IMembership, IRemoteNodes, IUpstream
from gateway.rpc.local import SAMPLE_ID, CallFailures, LocalDelivery
from gateway.rpc.location_cache import LocationCache
from gateway.rpc.pending import Call, DeferredCall, PendingCalls, Reply
from gateway.rpc.remote import RemoteDelivery, RetryPolicy
from gateway.rpc.token_renewal import TokenRenewal


@implementer(IDispatcher, IClientHandler)
class Dispatcher:
    """Call and notify clients, and handle what clients send. Times are in seconds, sizes in bytes; ``node_id`` is
    this node's own. Without ``remote_nodes`` the clients of other nodes cannot be reached; without ``token_renewal``
    ``gateway.token`` is a method like any other.
    """

    def __init__(
        self,
        *,
        sessions: IClientSessions,
        upstream: IUpstream,
        registry: IRegistry,
        membership: IMembership,
        clock: IReactorTime,
        metrics: Metrics,
        call_timeout: float,
        max_call_timeout: float,
        max_message_size: int,
        max_calls: int,
        max_calls_per_client: int,
        node_id: str,
        lease: float = 15.0,
        remote_nodes: IRemoteNodes | None = None,
        token_renewal: TokenRenewal | None = None,
    ) -> None:
        self._sessions = sessions
        self._ownership_uncertain = membership.ownership_uncertain
        self._metrics = metrics
        self._call_timeout = call_timeout
        self._max_call_timeout = max_call_timeout
        self._failures = outcomes = CallFailures(metrics)
        self._pending = pending = PendingCalls(
            clock, max_calls=max_calls, max_per_owner=max_calls_per_client, on_failure=outcomes.record
        )
        self._local = local = LocalDelivery(sessions, pending, metrics, max_message_size=max_message_size)
        self._safe_size = local.safe_size
        self._broadcaster = Broadcaster(local, outcomes, clock, self._is_superseded)
        self._handoffs = HandoffTracker(clock)
        #: the connections that stay for the calls on them, while their clients are at other nodes
        self._superseded: set[tuple[str, int]] = set()
        self._locations = LocationCache(registry, clock, node_id=node_id, lease=lease)
        self._remote = RemoteDelivery(
            local=local,
            locations=self._locations,
            handoffs=self._handoffs,
            retry_policy=RetryPolicy(self._locations, clock, node_id=node_id, membership=membership),
            pending=pending,
            failures=outcomes,
            clock=clock,
            metrics=metrics,
            max_calls=max_calls,
            membership=membership,
            remote_nodes=remote_nodes,
        )
        self._inbound = Inbound(
            sessions,
            upstream,
            pending,
            metrics,
            goaway_sessions=local.goaway_sessions,
            max_message_size=max_message_size,
            max_calls_per_client=max_calls_per_client,
            token_renewal=token_renewal,
        )

    def calls_in_flight(self) -> int:
        """How many calls await a response: those to clients, wherever they are, and those from clients of this node."""
        return len(self._pending) + len(self._remote) + self._inbound.calls_in_flight()

    def begin_goaway(self, client_id: str, generation: int, handoff: bool = False) -> None:
        """Begin no call on a connection of a client of this node any more, either way: the client was told to go, and
        goes when those in flight are over. ``onward``: it goes to another node, and who calls it waits for that."""
        if generation and self._sessions.generation(client_id) == generation:
            self._local.goaway_sessions.add((client_id, generation))
            if handoff:
                self._handoffs.start(client_id, generation)

    def _is_superseded(self, client_id: str) -> bool:
        return (client_id, self._sessions.generation(client_id)) in self._superseded

    def handoffs(self) -> int:
        """How many clients were told to go to another node, and are not known to be there yet, nor given up."""
        return len(self._handoffs)

    def refuse_new_calls(self) -> None:
        """Begin no call any more to a client that is not here: this node is going away."""
        self._remote.refusing_new_calls = True

    def calls_in_flight_on(self, client_id: str, generation: int) -> int:
        """How many calls on a connection of a client of this node, either way, await a response."""
        connection = (client_id, generation)
        return self._pending.in_flight(connection) + self._inbound.calls_in_flight_from(connection)

    def node_down(self, node_id: str) -> None:
        """Another node is gone: forget the clients that it had."""
        self._locations.drop_node(node_id)

    # IHub

    def call(self, client_id: str, method: str, params: bytes | None, timeout: float | None = None) -> Deferred[Reply]:
        """See :meth:`IHub.call`."""
        call = DeferredCall(self.cancel)
        try:
            if not self.try_call(call, client_id, method, params, timeout):
                self._remote.call(call, client_id, method, params, self._clamp_timeout(timeout))
        except RpcError as e:
            return fail(e)
        return call

    def try_call(
        self, call: Call, client_id: str, method: str, params: bytes | None, timeout: float | None = None
    ) -> bool:
        """See :meth:`IHub.ask`."""
        generation = self._sessions.generation(client_id)
        if not generation:
            return self._remote.try_call(call, client_id, method, params, self._clamp_timeout(timeout))
        return not self._ownership_uncertain() and self._call_local(
            call, client_id, generation, method, params, timeout
        )

    def _call_local(
        self, call: Call, client_id: str, generation: int, method: str, params: bytes | None, timeout: float | None
    ) -> bool:
        if timeout is None:
            timeout = self._call_timeout
        elif timeout > self._max_call_timeout:
            timeout = self._max_call_timeout
        try:
            if 6 * len(method) + (len(params) if params else 0) > self._safe_size or method.startswith("gateway."):
                self._local.validate(client_id, method, params, SAMPLE_ID)
            asked = self._local.call(call, (client_id, generation), method, params, timeout)
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            self._metrics.calls += 1
            raise self._failures.record_exception(e, client_id) from None
        if asked:
            self._metrics.calls += 1
        return asked

    def cancel(self, call: Any) -> None:
        """See :meth:`IHub.forget`. Also the canceller of those that are Deferreds."""
        if not self._remote.cancel(call):
            self._pending.discard(call)

    def notify(self, client_id: str, method: str, params: bytes | None) -> Deferred[None]:
        """See :meth:`IHub.notify`."""
        try:
            if self.try_notify(client_id, method, params):
                return succeed(None)
            return self._remote.notify(client_id, method, params, self._call_timeout)
        except RpcError as e:
            return fail(e)

    def try_notify(self, client_id: str, method: str, params: bytes | None) -> bool:
        """See :meth:`IHub.notify_here`."""
        generation = self._sessions.generation(client_id)
        return (
            bool(generation)
            and not self._ownership_uncertain()
            and self._notify_local(client_id, generation, method, params)
        )

    def notify_prefix(self, prefix: str, method: str, params: bytes | None) -> Deferred[int]:
        """See :meth:`IHub.notify_prefix`. Fails with ``RpcError`` alone."""
        return Deferred.fromCoroutine(self._broadcaster.broadcast(prefix, method, params))

    def call_session(
        self,
        call: Call,
        client_id: str,
        generation: int,
        method: str,
        params: bytes | None,
        timeout: float | None = None,
    ) -> bool:
        """See :meth:`IHub.ask_here`."""
        if not generation or self._sessions.generation(client_id) != generation:
            return False
        return self._call_local(call, client_id, generation, method, params, timeout)

    def wait_for_handoff(self, client_id: str) -> Deferred[None] | None:
        """See :meth:`IHub.arrival`."""
        return self._handoffs.wait(client_id)

    def notify_session(self, client_id: str, generation: int, method: str, params: bytes | None) -> bool:
        """See :meth:`IHub.notify_to`."""
        if not generation or self._sessions.generation(client_id) != generation:
            return False
        return self._notify_local(client_id, generation, method, params)

    def _notify_local(self, client_id: str, generation: int, method: str, params: bytes | None) -> bool:
        try:
            self._local.validate(client_id, method, params)
            return self._local.notify(client_id, encode_notification(method, params), generation)
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            raise self._failures.to_rpc_error(e, client_id) from None

    def _clamp_timeout(self, timeout: float | None) -> float:
        return self._call_timeout if timeout is None else min(timeout, self._max_call_timeout)

    # IClientHandler

    def client_connected(self, client_id: str, generation: int) -> None:
        """See :meth:`IClientHandler.client_connected`."""
        self._locations.drop(client_id)
        self._handoffs.connected(client_id, generation)
        self._inbound.connected((client_id, generation))

    def client_disconnected(self, client_id: str, generation: int) -> None:
        """See :meth:`IClientHandler.client_disconnected`."""
        connection = (client_id, generation)
        self._local.goaway_sessions.discard(connection)
        self._superseded.discard(connection)
        self._handoffs.disconnected(client_id, generation)
        self._pending.fail_owner(connection, _connection_lost)
        self._inbound.disconnected(connection)

    def client_superseded(self, client_id: str, generation: int) -> None:
        """See :meth:`IClientHandler.client_superseded`."""
        self._handoffs.connected(client_id, generation)
        if 0 < (here := self._sessions.generation(client_id)) < generation and self.is_finishing_calls(client_id, here):
            self._superseded.add((client_id, here))

    def is_finishing_calls(self, client_id: str, generation: int) -> bool:
        """See :meth:`IClientHandler.finishing`."""
        return (client_id, generation) in self._local.goaway_sessions and self.calls_in_flight_on(
            client_id, generation
        ) > 0

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        """See :meth:`IClientHandler.message_received`. No payload makes it raise."""
        return self._inbound.message_received((client_id, generation), payload)


def _connection_lost(client_id: str) -> RpcError:
    return RpcError(ErrorKind.CONNECTION_LOST, client_id)
