"""Fakes of what the backend endpoint depends on."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from gateway.clients.interface import IClientSessions, SessionInfo
from gateway.cluster.errors import PeerAuthenticationError
from gateway.cluster.interface import INode, IPeerClient
from gateway.protocol.errors import RpcError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, Location, NodeStatus, SessionKey
from gateway.rpc.interface import IDispatcher, IOrphanedRows
from gateway.rpc.pending import Call, Reply

NODE_ID = "11111111-1111-4111-8111-111111111111"
OTHER_ID = "22222222-2222-4222-8222-222222222222"


@implementer(IDispatcher)
class FakeDispatcher:
    """Record calls and notifications. A call fires with the next of ``results``, else its Deferred is kept in
    ``pending``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bytes | None, float | None]] = []
        self.notifications: list[tuple[str, str, bytes | None]] = []
        self.prefix_notifications: list[tuple[str, str, bytes | None]] = []
        self.results: deque[Reply | Exception] = deque()
        self.notify_results: deque[Exception | None] = deque()
        self.prefix_result: int | Exception = 3
        self.pending: list[Deferred[Reply]] = []
        self.cancel_count = 0
        #: client_id -> what wait_for_handoff() returns
        self.handoffs: dict[str, Deferred[None]] = {}
        #: set by the harness
        self.sessions: FakeClientSessions
        #: whether call_session() and notify_session() deliver to connected clients
        self.accepts_session_calls = False
        #: calls delivered by call_session()
        self.session_calls: list[tuple[Call, tuple[str, str, bytes | None, float | None]]] = []
        self.session_notifications: list[tuple[str, str, bytes | None]] = []
        self.cancelled_calls: list[Call] = []
        #: what call_session() and notify_session() raise next
        self.errors: deque[RpcError] = deque()

    def call(self, client_id, method, params, timeout=None):
        self.calls.append((client_id, method, params, timeout))
        if self.results:
            result = self.results.popleft()
            return succeed(result) if isinstance(result, Reply) else fail(result)
        pending: Deferred[Reply] = Deferred(self._cancelled)
        self.pending.append(pending)
        return pending

    def try_call(self, call, client_id, method, params, timeout=None):
        return False

    def call_session(self, call, session, method, params, timeout=None):
        client_id, generation = session
        accepted = self._accepts(client_id, generation)
        if accepted:
            self.session_calls.append((call, (client_id, method, params, timeout)))
        return accepted

    def _accepts(self, client_id, generation):
        if not generation or self.sessions.generation(client_id) != generation:
            return False
        if self.errors:
            raise self.errors.popleft()
        return self.accepts_session_calls

    def cancel(self, call):
        self.cancelled_calls.append(call)

    def _cancelled(self, pending):
        self.cancel_count += 1

    def notify(self, client_id, method, params):
        self.notifications.append((client_id, method, params))
        error = self.notify_results.popleft() if self.notify_results else None
        return succeed(None) if error is None else fail(error)

    def try_notify(self, client_id, method, params):
        return False

    def wait_for_handoff(self, client_id):
        return self.handoffs.get(client_id)

    def notify_session(self, session, method, params):
        client_id, generation = session
        accepted = self._accepts(client_id, generation)
        if accepted:
            self.session_notifications.append((client_id, method, params))
        return accepted

    def notify_prefix(self, prefix, method, params):
        self.prefix_notifications.append((prefix, method, params))
        return fail(self.prefix_result) if isinstance(self.prefix_result, Exception) else succeed(self.prefix_result)


@implementer(IClientSessions)
class FakeClientSessions:
    """Clients connected to this node; claims are finished by hand."""

    def __init__(self) -> None:
        self.clients: dict[str, SessionInfo] = {}
        self.closed: list[tuple[str, int, str]] = []
        self.close_result: Deferred[bool] | None = None
        self.claims: dict[str, Deferred[None]] = {}
        #: Deferreds returned by claim_in_progress() that have not fired
        self.waiters: list[Deferred[None]] = []
        self.superseded_by: list[SessionKey] = []
        self.restored: list[SessionKey] = []

    def add(self, client_id, generation=7):
        self.clients[client_id] = SessionInfo(client_id, generation, 1700000000.25, "192.0.2.7:4711")

    def get(self, client_id):
        return self.clients.get(client_id)

    def generation(self, client_id):
        return self.clients[client_id].generation if client_id in self.clients else 0

    def claim_in_progress(self, client_id, newer_than=0):
        claim = self.claims.get(client_id)
        if claim is None or claim.called or self.generation(client_id) > newer_than:
            return None
        waiter: Deferred[None] = Deferred(lambda waiter: self.waiters.remove(waiter))
        self.waiters.append(waiter)
        claim.addCallback(lambda _: waiter in self.waiters and waiter.callback(None))
        return waiter

    def close(self, client_id, code, reason, generation=0, *, keep_row=False):
        if generation not in (0, self.generation(client_id)):
            return succeed(False)
        self.closed.append((client_id, code, reason))
        closed = self.clients.pop(client_id, None) is not None
        return self.close_result if self.close_result is not None else succeed(closed)

    def close_superseded(self, key):
        self.superseded_by.append(key)

    def restore_claim(self, key):
        self.restored.append(key)

    def finish_claim(self, client_id, generation=7):
        """Finish a claim, and open its session; with generation 0 the claim failed."""
        if generation:
            self.add(client_id, generation)
        self.claims.pop(client_id).callback(None)

    def renew(self, key, expires_at):
        raise NotImplementedError

    def ticket_identity(self, client_id, generation):
        raise NotImplementedError

    def send(self, client_id, payload, generation=0):
        raise NotImplementedError

    def client_ids(self):
        return list(self.clients)

    def count(self):
        return len(self.clients)


@implementer(IRegistry)
class FakeRegistry:
    """Rows of clients and nodes in memory."""

    def __init__(self) -> None:
        self.rows: dict[str, Location] = {}
        self.statuses: list[NodeStatus] = []
        self.unavailable = False
        self.queries: list[tuple[Any, ...]] = []
        self.generation_floor = 0

    def raise_generation_floor(self, generation):
        self.generation_floor = max(self.generation_floor, generation)

    def add(self, client_id, node_id=OTHER_ID, generation=9, live=True):
        self.rows[client_id] = Location(
            client_id, node_id, "other", "ws://other:8081", generation, 1700000001.0, "[2001:db8::1]:80", live
        )

    def _result(self, value):
        return fail(RegistryUnavailableError("away")) if self.unavailable else succeed(value)

    def find(self, client_id):
        self.queries.append(("find", client_id))
        return self._result(self.rows.get(client_id))

    def clients(self, after, limit, node_id=None, prefix=""):
        self.queries.append(("clients", after, limit, node_id, prefix))
        rows = [
            row
            for client_id, row in sorted(self.rows.items())
            if client_id > after and client_id.startswith(prefix) and node_id in (None, row.node_id)
        ]
        return self._result(rows[:limit])

    def nodes(self):
        return self._result(self.statuses)

    def add_node(self, node_id, name="other"):
        self.statuses.append(NodeStatus(node_id, name, "ws://a", f"ws://{name}:8081", 3, 100, "up", 1.5))


@implementer(IOrphanedRows)
class FakeOrphanedRows:
    """Remove the rows of sessions that are not connected here, at once or when ``result`` fires."""

    def __init__(self, registry: FakeRegistry, sessions: FakeClientSessions) -> None:
        self._registry = registry
        self._sessions = sessions
        self.checked: list[SessionKey] = []
        self.result: Deferred[bool] | None = None

    def check(self, key):
        self.checked.append(key)
        if self.result is not None:
            return self.result
        row = self._registry.rows.get(key.client_id)
        orphaned = (
            row is not None
            and (row.node_id, row.generation) == (NODE_ID, key.generation)
            and self._sessions.generation(key.client_id) < key.generation
        )
        if orphaned:
            del self._registry.rows[key.client_id]
        return succeed(orphaned)


@implementer(IPeerClient)
class FakePeerClient:
    """Record requests to other nodes. Each request takes the next of ``results``."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, ...]] = []
        self.results: deque[Any] = deque()

    def _request(self, *request):
        self.requests.append(request)
        result = self.results.popleft()
        if isinstance(result, Deferred):
            return result
        return fail(result) if isinstance(result, Exception) else succeed(result)

    def unused(self, *args):
        raise NotImplementedError

    def has_client(self, location, timeout):
        return self._request("has_client", location.node_id, location.client_id, location.generation)

    has_room = notify_claim_revoked = notify_takeover = unused

    def close_session(self, location, code, reason):
        return self._request("close", location.node_id, location.client_id, location.generation, code, reason)

    def notify_prefix(self, node, prefix, method, params):
        return self._request("notify_prefix", node.node_id, prefix, method, params)

    def drain(self, node):
        return self._request("drain", node.node_id)

    def rebalance(self, node):
        return self._request("rebalance", node.node_id)


@implementer(INode)
class FakeNode:
    """This node."""

    node_id = NODE_ID
    name = "here"
    public_url = "ws://127.0.0.1:8080"
    peer_url = "ws://127.0.0.1:8081"

    def __init__(self) -> None:
        self.not_ready_reason = ""
        self.drain_count = 0
        #: arguments of send_goaway()
        self.goaways: list[tuple[str, int, str]] = []
        self.draining: Deferred[None] = Deferred()

    def unready_reason(self):
        return self.not_ready_reason

    def send_goaway(self, key, reason):
        self.goaways.append((*key, reason))
        return True

    def drain(self):
        self.drain_count += 1
        return self.draining


def authenticate_peer(authorization, method, target, client_id, address):
    """Accept the node_id that the credentials give, without a signature."""
    scheme, _, node_id = authorization.partition(" ")
    assert scheme.lower() == "wsgateway-peer", scheme
    if not node_id or (method, target, client_id, address) != ("GET", "/v1/backend", "", ""):
        raise PeerAuthenticationError("the signature is wrong")
    return node_id
