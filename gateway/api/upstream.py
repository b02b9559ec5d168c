"""Messages from clients to the backends that are connected to this node.

    <- {"jsonrpc":"2.0","method":"events.connected","params":{"client":"x","node":"…","generation":7}}
    <- {"jsonrpc":"2.0","method":"events.disconnected","params":{"client":"x","node":"…","generation":7}}
    <- {"jsonrpc":"2.0","method":"events.message","params":{"client":"x","method":"job.done","params":{"job":9}}}
    <- {"jsonrpc":"2.0","id":"<UUID>","method":"upstream.call","params":{"client":"x","method":"policy.get"}}
    -> {"jsonrpc":"2.0","id":"<UUID>","result":{…}}

An event goes to every backend that subscribed to its kind; a call to one of those that serve, in turn; and both to such
alone whose tokens are for that client at that time. A backend that does not read gets no calls; it is closed with 1013
rather than left with a gap in its events that it cannot see. For both it is not enough that much waits for it, since a
burst within one turn of the reactor says nothing of who reads.
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
from gateway.rpc.interface import IUpstream
from gateway.rpc.pending import PendingCalls, Reply
from gateway.settings import Settings

#: what a backend may subscribe to
EVENT_KINDS: Final = ("connected", "disconnected", "message")

_encode = msgspec.json.Encoder().encode


class IBackendConnection(Interface):
    """A backend's connection, as what is sent to it of its own accord sees it."""

    is_reading: bool = Attribute(
        "Whether it reads what it was sent without being asked, or has had no time to, or not much to read."
    )

    grant: Grant = Attribute("What its token is for.")

    def push(payload: bytes) -> None:
        """Send one message that it did not ask for."""

    def drop_slow_consumer() -> None:
        """Close the connection, since it does not read: it would miss an event, and not know."""


@implementer(IUpstream)
class BackendDispatcher:
    """The backends that subscribed, and those that serve.

    Calls may wait ``settings.call_timeout`` for their response; there may be ``settings.max_calls`` of them.
    """

    def __init__(self, *, clock: IReactorTime, metrics: Metrics, settings: Settings, node_id: str) -> None:
        self._metrics = metrics
        self._timeout = settings.call_timeout
        self._node_json = _encode(node_id)
        self._pending = PendingCalls(clock, max_calls=settings.max_calls, max_per_owner=settings.max_calls)
        #: kind -> backends, in the order in which they subscribed
        self._subscribers: dict[str, dict[IBackendConnection, None]] = {kind: {} for kind in EVENT_KINDS}
        #: those that serve, the one that was asked last at the end
        self._serving: dict[IBackendConnection, None] = {}

    def subscribe(self, backend: IBackendConnection, kinds: list[str]) -> None:
        """Send a backend events of these kinds too. Raises ``KeyError`` for one that is none of ``KINDS``."""
        for kind in kinds:
            self._subscribers[kind][backend] = None

    def serve(self, backend: IBackendConnection) -> None:
        """Let a backend have clients' calls, from now on."""
        self._serving.setdefault(backend)

    def remove(self, backend: IBackendConnection) -> None:
        """A backend is gone: it gets nothing more, and what it had not answered fails."""
        for subscribers in self._subscribers.values():
            subscribers.pop(backend, None)
        self._serving.pop(backend, None)
        self._pending.fail_owner(backend, lambda client_id: RpcError(ErrorKind.CONNECTION_LOST, client_id))

    def response_received(self, backend: IBackendConnection, response: jsonrpc.Response) -> None:
        """A backend sent a response. It counts only if that very backend was asked; otherwise it is dropped."""
        if not self._pending.resolve(backend, response.id, Reply(response.result, response.error)):
            self._metrics.late_responses += 1

    def response_unreadable(self, backend: IBackendConnection, uuid: str) -> bool:
        """A backend's response cannot be read, but for its id: that call fails now, not at its deadline.

        ``False`` when no such call was waiting for this backend.
        """
        detail = "the backend's response could not be read"
        return self._pending.fail(backend, b'"%b"' % uuid.encode(), RpcError(ErrorKind.CONNECTION_LOST, detail=detail))

    # IUpstream

    def call(self, client_id: str, method: str, params: bytes | None) -> Deferred[Reply]:
        """See :class:`~gateway.rpc.interface.IUpstream`."""
        serving = [each for each in self._serving if each.grant.allows("serve", client_id)]
        if not serving:
            return fail(RpcError(ErrorKind.METHOD_NOT_FOUND, client_id, detail="no backend serves clients' calls here"))
        backend = next((each for each in serving if each.is_reading), None)
        if backend is None:
            detail = "the backends that serve clients' calls do not read them"
            return fail(RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail=detail))
        try:
            id, waiting = self._pending.add(backend, client_id, self._timeout)
        except RpcError as e:
            return fail(e)
        del self._serving[backend]
        self._serving[backend] = None
        waiting.addCallbacks(_recheck_grant, _add_client_id, (backend, client_id), errbackArgs=(client_id,))
        backend.push(jsonrpc.encode_request(id, "upstream.call", _message_params(client_id, method, params)))
        return waiting

    def message(self, client_id: str, method: str, params: bytes | None) -> None:
        """See :class:`~gateway.rpc.interface.IUpstream`."""
        if self._subscribers["message"]:
            self._publish("message", client_id, _message_params(client_id, method, params))

    def connected(self, client_id: str, generation: int) -> None:
        """See :class:`~gateway.rpc.interface.IUpstream`."""
        self._publish_presence("connected", client_id, generation)

    def disconnected(self, client_id: str, generation: int) -> None:
        """See :class:`~gateway.rpc.interface.IUpstream`."""
        self._publish_presence("disconnected", client_id, generation)

    def _publish_presence(self, kind: str, client_id: str, generation: int) -> None:
        if self._subscribers[kind]:
            params = b'{"client":%b,"node":%b,"generation":%d}' % (_encode(client_id), self._node_json, generation)
            self._publish(kind, client_id, params)

    def _publish(self, kind: str, client_id: str, params: bytes) -> None:
        payload = jsonrpc.encode_notification(f"events.{kind}", params)
        # Sending may end a connection, and that its subscription.
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
    """Let the answer of a backend pass that may still give it."""
    if backend.grant.allows("serve", client_id):
        return reply
    detail = "the backend that has the call serves this client no more"
    raise RpcError(ErrorKind.CONNECTION_LOST, client_id, detail=detail)


def _add_client_id(failure: Failure, client_id: str) -> Failure:
    """Say whose call it was that failed, where that was not known."""
    error = failure.value
    if isinstance(error, RpcError) and error.client_id is None:
        raise RpcError(error.kind, client_id, sent=error.sent, detail=error.detail)
    return failure
