"""Fakes of what the dispatcher uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from zope.interface import implementer

from gateway.auth.interface import Identity
from gateway.clients.interface import IClientSessions, SessionInfo
from gateway.protocol.errors import RpcError
from gateway.registry.interface import Location, SessionKey
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.interface import IRemoteNodes, IUpstream
from gateway.rpc.pending import Call, PendingCalls, Reply


class RecordingCall(Call):
    """Records its results."""

    __slots__ = ("results",)

    def __init__(self) -> None:
        self.results: list[Reply | RpcError] = []

    def complete(self, result: Reply | RpcError) -> None:
        self.results.append(result)


@implementer(IClientSessions)
class FakeClientSessions:
    """Sessions that are a generation each, and a list of what was sent to them."""

    def __init__(self) -> None:
        self.generations: dict[str, int] = {}
        self.sent: list[tuple[str, int, bytes]] = []
        self.claiming: dict[str, list[Deferred[None]]] = {}
        self.renewed: list[tuple[str, int, float]] = []
        #: bytes that wait for slow readers, and the number of queries for them
        self.buffered_bytes = self.buffer_queries = 0
        #: called while a message is sent
        self.on_send: Callable[[str, bytes], None] = lambda client_id, payload: None
        #: the arguments of restore_claim()
        self.restored: list[SessionKey] = []

    def get(self, client_id: str) -> SessionInfo | None:
        generation = self.generations.get(client_id)
        return None if generation is None else SessionInfo(client_id, generation, 0.0, "192.0.2.1:5")

    def generation(self, client_id: str) -> int:
        return self.generations.get(client_id, 0)

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        current = self.generations.get(client_id, 0)
        if not current or generation not in (0, current):
            return 0
        self.on_send(client_id, payload)
        if self.generations.get(client_id) != current:
            return 0
        self.sent.append((client_id, current, payload))
        return current

    def claim_in_progress(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        if client_id not in self.claiming or self.generation(client_id) > newer_than:
            return None
        waiter: Deferred[None] = Deferred(lambda d: self.claiming[client_id].remove(d))
        self.claiming[client_id].append(waiter)
        return waiter

    def finish_claim(self, client_id: str) -> None:
        """Finish a claim."""
        for waiter in self.claiming.pop(client_id):
            waiter.callback(None)

    def close(
        self, client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False
    ) -> Deferred[bool]:
        raise NotImplementedError

    def renew(self, key: SessionKey, expires_at: float) -> bool:
        if key.generation != self.generation(key.client_id):
            return False
        self.renewed.append((*key, expires_at))
        return True

    def ticket_identity(self, client_id: str, generation: int) -> Identity | None:
        raise NotImplementedError

    def close_superseded(self, key: SessionKey) -> None:
        raise NotImplementedError

    def restore_claim(self, key: SessionKey) -> None:
        self.restored.append(key)

    def client_ids(self) -> list[str]:
        return list(self.generations)

    def count(self) -> int:
        return len(self.generations)

    def unsent_bytes(self) -> int:
        self.buffer_queries += 1
        return self.buffered_bytes


@implementer(IUpstream)
class FakeUpstream:
    """Records events; the test answers the calls."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.calls: list[tuple[str, str, bytes | None, Deferred[Reply]]] = []
        self.cancelled = 0

    def call(self, client_id: str, method: str, params: bytes | None) -> Deferred[Reply]:
        def cancel(_: Deferred[Reply]) -> None:
            self.cancelled += 1

        call: Deferred[Reply] = Deferred(cancel)
        self.calls.append((client_id, method, params, call))
        return call

    def message(self, client_id: str, method: str, params: bytes | None) -> None:
        self.events.append(("message", client_id, method, params))

    def connected(self, key: SessionKey) -> None:
        self.events.append(("connected", *key))

    def disconnected(self, key: SessionKey) -> None:
        self.events.append(("disconnected", *key))


class FakeNotifying:
    """A notification that a node has; the test says what becomes of it."""

    def __init__(self, remote_nodes: FakeRemoteNodes, call: Call) -> None:
        self._remote_nodes = remote_nodes
        self._call = call

    @property
    def called(self) -> bool:
        """Whether it is settled."""
        return getattr(self._call, "id", b"") not in self._remote_nodes.pending._calls

    def callback(self, _: None) -> None:
        """Report that the client was notified."""
        assert self._remote_nodes.pending.resolve(self._call.owner, self._call.id, Reply(b"null", None))

    def errback(self, error: Exception) -> None:
        """Report an error."""
        if isinstance(error, NotDeliveredError):
            assert not self.called
            self._remote_nodes.pending.discard(self._call)
            self._call.not_delivered(error.reason)
        else:
            assert isinstance(error, RpcError)
            assert self._remote_nodes.pending.fail(self._call.owner, self._call.id, error)


@implementer(IRemoteNodes)
class FakeRemoteNodes:
    """Connections to the nodes in ``connected``; the test decides what they answer."""

    def __init__(self, clock: Clock) -> None:
        #: keeps the deadlines, as the real one does
        self.pending = PendingCalls(clock, max_calls=8, max_per_owner=8)
        self.connected: set[str] = set()
        self.requests: list[tuple[Location, str, bytes | None, float, bool]] = []
        self.calls: list[Call] = []
        self.notifications: list[tuple[Location, str, bytes | None, float, bool]] = []
        self.connecting: list[tuple[Location, Deferred[None]]] = []
        self.notifying: list[FakeNotifying] = []
        #: fences, and whether they pass at once
        self.fences: list[tuple[Location, Deferred[None]]] = []
        self.fences_pass = True
        self.cancelled_calls: list[Call] = []
        self.cancel_count = 0
        #: result of connect(); ``None``: left to the test
        self.connect_result: Callable[[Location], Deferred[None]] | None = None
        #: called while a call is sent
        self.on_call: Callable[[Call], None] = lambda call: None

    def connect(self, location: Location) -> Deferred[None]:
        if location.node_id in self.connected:
            return succeed(None)
        if self.connect_result is not None:
            return self.connect_result(location)
        connecting: Deferred[None] = Deferred(self._cancelled)
        self.connecting.append((location, connecting))
        return connecting

    def _cancelled(self, _: object) -> None:
        self.cancel_count += 1

    def try_send(
        self,
        call: Call,
        location: Location,
        method: str,
        params: bytes | None,
        timeout: float,
        *,
        is_call: bool = True,
        stale: bool = False,
    ) -> bool:
        if location.node_id not in self.connected:
            return False
        self.pending.start(call, location.node_id, location.client_id, timeout)
        if is_call:
            self.requests.append((location, method, params, timeout, stale))
            self.calls.append(call)
        else:
            self.notifications.append((location, method, params, timeout, stale))
            self.notifying.append(FakeNotifying(self, call))
        self.on_call(call)
        self.pending.mark_sent(call)
        return True

    def fence(self, location: Location) -> Deferred[None]:
        self.fences.append((location, Deferred()))
        return succeed(None) if self.fences_pass else self.fences[-1][1]

    def cancel(self, call: Call) -> None:
        self.cancelled_calls.append(call)
        self.pending.discard(call)

    # Controlled by the test.

    def reply(self, result: Reply, n: int = -1) -> None:
        """Complete the last call with the client's response."""
        call = self.calls.pop(n)
        assert self.pending.resolve(call.owner, call.id, result)

    def fail(self, error: RpcError, n: int = -1) -> None:
        """Complete it with an error. Where this fails with ``TIMEOUT`` at the deadline, the real one fails with
        ``NODE_UNREACHABLE``."""
        call = self.calls.pop(n)
        assert self.pending.fail(call.owner, call.id, error)

    def not_deliver(self, reason: NotDelivered, n: int = -1) -> None:
        """Report that the node did not deliver the last call."""
        call = self.calls.pop(n)
        assert call.id in self.pending._calls
        self.pending.discard(call)
        call.not_delivered(reason)


class FakeMembership:
    """The lease of this node, as the test says."""

    def __init__(self, stable: bool = True, lease_held: bool = True, uncertain: bool = False) -> None:
        self.stable = stable
        self.lease_held = lease_held
        self.uncertain = uncertain

    def is_stable(self) -> bool:
        return self.stable

    def has_lease(self) -> bool:
        return self.lease_held

    def ownership_uncertain(self) -> bool:
        return self.uncertain


class FakeRegistry:
    """Lookups, and releases. A lookup returns ``result`` at once, or when the test fires it."""

    def __init__(self) -> None:
        #: the claims whose releases are queued
        self.writing: set[SessionKey] = set()
        self.released: list[SessionKey] = []
        #: what the next releases return
        self.release_result: Deferred[None] | Exception | None = None
        self.result: Location | Exception | Deferred[Location | None] | None = None
        self.queries: list[str] = []

    def find(self, client_id: str) -> Deferred[Location | None]:
        self.queries.append(client_id)
        if isinstance(self.result, Deferred):
            return self.result
        if isinstance(self.result, Exception):
            return fail(self.result)
        return succeed(self.result)

    def is_writing(self, key: SessionKey) -> bool:
        return key in self.writing

    def release(self, key: SessionKey) -> Deferred[None]:
        self.released.append(key)
        if isinstance(self.release_result, Exception):
            return fail(self.release_result)
        return succeed(None) if self.release_result is None else self.release_result
