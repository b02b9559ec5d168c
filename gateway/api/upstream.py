"""Dispatch clients' notifications, calls and presence events to the backends connected to this node.

    <- {"jsonrpc":"2.0","method":"events.connected","params":{"client":"x","node":"…","generation":7}}
    <- {"jsonrpc":"2.0","method":"events.disconnected","params":{"client":"x","node":"…","generation":7}}
    <- {"jsonrpc":"2.0","method":"events.message","params":{"client":"x","method":"job.done","params":{"job":9}}}
    <- {"jsonrpc":"2.0","id":"<UUID>","method":"upstream.call","params":{"client":"x","method":"policy.get"}}
    -> {"jsonrpc":"2.0","id":"<UUID>","result":{…}}

An event goes to every backend subscribed to its kind, a call to one serving backend, in round-robin order. Both go only
to backends whose tokens allow that client at that time.

A backend that does not read gets no calls. An event that it would miss closes it with 1013 instead, since it could not
see the gap. Queued bytes alone do not make it slow: a burst within one reactor iteration cannot have been read yet.
"""

from __future__ import annotations

from typing import Final

import msgspec
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from zope.interface import Attribute, Interface, implementer

from gateway.auth.backend_tokens import Grant
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import SessionKey
from gateway.rpc.interface import IUpstream
from gateway.rpc.pending import PendingCalls, Reply
from gateway.settings import Settings

#: kinds of events that a backend may subscribe to
EVENT_KINDS: Final = ("connected", "disconnected", "message")

_encode = msgspec.json.Encoder().encode


class IBackendConnection(Interface):
    """A backend's connection as the dispatcher of events and upstream calls sees it."""

    is_reading: bool = Attribute("Whether it reads, has room for more, or may not have had time to read yet.")

    grant: Grant = Attribute("What its token allows.")

    def push(payload: bytes) -> None:
        """Send an event or an upstream call."""

    def drop_slow_consumer() -> None:
        """Close the connection with 1013 because the backend does not read."""


@implementer(IUpstream)
class BackendDispatcher:
    """Dispatch events to subscribed backends, and clients' calls to serving backends.

    A call fails after ``settings.call_timeout`` seconds without a response. At most ``settings.max_calls`` are in
    flight.
    """

    def __init__(self, *, clock: IReactorTime, metrics: Metrics, settings: Settings, node_id: str) -> None:
        self._metrics = metrics
        self._timeout = settings.call_timeout
        self._node_json = _encode(node_id)
        self._pending = PendingCalls(clock, max_calls=settings.max_calls, max_per_owner=settings.max_calls)
        #: kind -> backends, in the order of their subscriptions
        self._subscribers: dict[str, dict[IBackendConnection, None]] = {kind: {} for kind in EVENT_KINDS}
        #: serving backends, the most recently called last
        self._serving: dict[IBackendConnection, None] = {}

    def subscribe(self, backend: IBackendConnection, kinds: list[str]) -> None:
        """Add kinds of events to a backend's subscription. Raises ``KeyError`` for one that is not in
        ``EVENT_KINDS``."""
        for kind in kinds:
            self._subscribers[kind][backend] = None

    def serve(self, backend: IBackendConnection) -> None:
        """Send clients' calls to a backend from now on."""
        self._serving.setdefault(backend)

    def remove(self, backend: IBackendConnection) -> None:
        """Remove a disconnected backend, and fail its calls in flight."""
        for subscribers in self._subscribers.values():
            subscribers.pop(backend, None)
        self._serving.pop(backend, None)
        self._pending.fail_owner(backend, lambda client_id: RpcError(ErrorKind.CONNECTION_LOST, client_id))

    def response_received(self, backend: IBackendConnection, response: jsonrpc.Response) -> None:
        """Complete the call that a response is for; drop it, and count it, if that call is not this backend's."""
        if not self._pending.resolve(backend, response.id, Reply(response.result, response.error)):
            self._metrics.late_responses += 1

    def response_unreadable(self, backend: IBackendConnection, uuid: str) -> bool:
        """Fail the call of a response of which only the id could be read, instead of waiting for its deadline.

        Returns ``False`` if this backend has no such call.
        """
        detail = "the backend's response could not be read"
        return self._pending.fail(backend, b'"%b"' % uuid.encode(), RpcError(ErrorKind.CONNECTION_LOST, detail=detail))

    # IUpstream

    def call(self, client_id: str, method: str, params: bytes | None) -> Deferred[Reply]:
        """Send a client's call to a serving backend. Fails with ``RpcError``; cancelling it forgets the call."""
        serving = [backend for backend in self._serving if backend.grant.allows("serve", client_id)]
        if not serving:
            return fail(RpcError(ErrorKind.METHOD_NOT_FOUND, client_id, detail="no backend serves clients' calls here"))
        backend = next((backend for backend in serving if backend.is_reading), None)
        if backend is None:
            detail = "the backends that serve clients' calls read too slowly"
            return fail(RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail=detail))
        try:
            id, result = self._pending.add(backend, client_id, self._timeout)
        except RpcError as e:
            return fail(e)
        del self._serving[backend]
        self._serving[backend] = None
        result.addCallbacks(_recheck_grant, _add_client_id, (backend, client_id), errbackArgs=(client_id,))
        backend.push(jsonrpc.encode_request(id, "upstream.call", _message_params(client_id, method, params)))
        return result

    def message(self, client_id: str, method: str, params: bytes | None) -> None:
        """Publish a client's notification."""
        if self._subscribers["message"]:
            self._publish("message", client_id, _message_params(client_id, method, params))

    def connected(self, key: SessionKey) -> None:
        """Publish a ``connected`` event."""
        self._publish_presence("connected", key)

    def disconnected(self, key: SessionKey) -> None:
        """Publish a ``disconnected`` event."""
        self._publish_presence("disconnected", key)

    def _publish_presence(self, kind: str, key: SessionKey) -> None:
        if self._subscribers[kind]:
            client_id, generation = key
            params = b'{"client":%b,"node":%b,"generation":%d}' % (_encode(client_id), self._node_json, generation)
            self._publish(kind, client_id, params)

    def _publish(self, kind: str, client_id: str, params: bytes) -> None:
        payload = jsonrpc.encode_notification(f"events.{kind}", params)
        # Pushing may close a connection, which ends its subscription.
        for backend in list(self._subscribers[kind]):
            if not backend.grant.allows("read", client_id):
                continue
            if backend.is_reading:
                backend.push(payload)
            else:
                self._metrics.events_dropped += 1
                backend.drop_slow_consumer()


def _message_params(client_id: str, method: str, params: bytes | None) -> bytes:
    if params is None:
        return b'{"client":%b,"method":%b}' % (_encode(client_id), _encode(method))
    return b'{"client":%b,"method":%b,"params":%b}' % (_encode(client_id), _encode(method), params)


def _recheck_grant(reply: Reply, backend: IBackendConnection, client_id: str) -> Reply:
    """Return the reply unless the backend's token no longer allows it to serve the client."""
    if backend.grant.allows("serve", client_id):
        return reply
    detail = "the backend that has the call may no longer serve this client"
    raise RpcError(ErrorKind.CONNECTION_LOST, client_id, detail=detail)


def _add_client_id(failure: Failure, client_id: str) -> Failure:
    """Add the client_id to an error without one."""
    error = failure.value
    if isinstance(error, RpcError) and error.client_id is None:
        raise RpcError(error.kind, client_id, sent=error.sent, detail=error.detail)
    return failure
