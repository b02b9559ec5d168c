"""Handlers of HTTP requests about clients.

    -> POST /v1/clients/x/rpc {"jsonrpc":"2.0","id":1,"method":"disk.usage"}
    <- 200 {"jsonrpc":"2.0","id":1,"result":{"free":12}}
    -> POST /v1/clients/x/rpc {"jsonrpc":"2.0","method":"policy.changed"}            <- 202
    -> POST /v1/clients/x/rpc [{…}, {…}]                                             <- 200 [{…}, {…}]
    -> POST /v1/clients?prefix=acme/ {"jsonrpc":"2.0","method":"policy.changed"}
    <- 202 {"nodes":{"<node_id>":12,"<node_id>":7},"failed":{"<node_id>":"why"}}     "failed" only if a node failed
    -> GET /v1/clients/x                                                             <- 200 {"client_id":"x",…}
    -> DELETE /v1/clients/x                                                          <- 204
    -> POST /v1/rpc?client_id=x, GET and DELETE /v1/client?client_id=x               the same, with the id in the query
    -> GET /v1/clients?after=w&limit=1                                               <- 200 {"clients":[…],"next":"x"}

The timeout of a call is given in seconds, by the query parameter ``timeout`` or the header ``Request-Timeout``; the
query takes precedence.

The grant is checked before any lookup of the client, so that a backend cannot distinguish a client that its token
does not allow from one that does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import attrs
from twisted.internet.defer import Deferred, FirstError, fail, gatherResults, succeed
from twisted.python.failure import Failure

from gateway.api import http_server
from gateway.api.directory import ClientDirectory, gather_nodes, peer_error_text
from gateway.api.errors import BadRequestError, RemoteNodeError
from gateway.api.http_server import HTTPRequest
from gateway.api.responses import (
    Response,
    encode_reply,
    error_object,
    error_response,
    invalid_message_error,
    json_response,
    nodes_response,
    require,
    rpc_error_response,
)
from gateway.auth.backend_tokens import Grant
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import INode, IPeerClient
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.protocol.client_id import is_client_id
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import IRegistry
from gateway.rpc.interface import IDispatcher
from gateway.rpc.pending import Reply

#: clients on a page by default
DEFAULT_LIMIT = 100
#: clients on the largest page
MAX_LIMIT = 1000

_NULL = b"null"

#: of one message of a batch: the response, or the error of a notification
_ItemResult: TypeAlias = bytes | RpcError | None


@attrs.frozen
class _Target:
    """The client that messages are for, the timeout of calls in seconds, and the grant of the backend."""

    client_id: str
    timeout: float | None
    grant: Grant


class ClientHandlers:
    """Handle requests to clients and about clients."""

    def __init__(
        self,
        *,
        dispatcher: IDispatcher,
        directory: ClientDirectory,
        registry: IRegistry,
        node: INode,
        metrics: Metrics,
        peers: IPeerClient | None = None,
    ) -> None:
        """Without ``peers`` this node is the only one."""
        self._registry = registry
        self._peers = peers
        self._dispatcher = dispatcher
        self._directory = directory
        self._node = node
        self._metrics = metrics

    # One client.

    # ``raw_id`` is from the path. ``None``: the client_id is in the query.

    async def get(self, request: HTTPRequest, raw_id: bytes | None = None) -> Response:
        """Handle ``GET /v1/clients/{client_id}`` and ``GET /v1/client?client_id=``."""
        client_id = _client_id(request, raw_id)
        request.grant.check("read", client_id)
        client = await self._directory.find(client_id)
        return _not_connected() if client is None else json_response(200, client)

    async def delete(self, request: HTTPRequest, raw_id: bytes | None = None) -> Response:
        """Handle ``DELETE /v1/clients/{client_id}`` and ``DELETE /v1/client?client_id=``. Only the latter reaches a
        client of an earlier release whose id is none any more: a proxy may change a path into that of another client.
        """
        client_id = request.query.get_client_id(or_former=True) if raw_id is None else _client_id(request, raw_id)
        request.grant.check("disconnect", client_id)
        disconnect = self._directory.disconnect if is_client_id(client_id) else self._directory.disconnect_former
        try:
            disconnected = await disconnect(client_id)
        except RemoteNodeError as e:
            return error_response(503, "node", str(e))
        return Response(204) if disconnected else _not_connected()

    async def rpc(self, request: HTTPRequest, raw_id: bytes | None = None) -> Response:
        """Handle ``POST /v1/clients/{client_id}/rpc`` and ``POST /v1/rpc?client_id=``."""
        message = jsonrpc.decode(request.body())
        id = _NULL if isinstance(message, (list, jsonrpc.Notification)) else message.id
        client_id = None
        try:
            client_id = _client_id(request, raw_id)
            target = _Target(client_id, _timeout(request), request.grant)
            if isinstance(message, list):
                return await self._handle_batch(target, message)
            return await self._handle_single(target, message)
        except BadRequestError as e:
            return rpc_error_response(RpcError(ErrorKind.INVALID_REQUEST, client_id, detail=str(e)), id)
        except RpcError as e:
            return rpc_error_response(e, id)

    async def _handle_single(self, target: _Target, message: jsonrpc.Message) -> Response:
        if isinstance(message, jsonrpc.Request):
            return Response(200, encode_reply(await self._call(target, message), message.id))
        if isinstance(message, jsonrpc.Notification):
            await self._notify(target, message)
            return Response(202)
        self._metrics.bad_messages["backend"] += 1
        raise invalid_message_error(message, target.client_id)

    async def _handle_batch(self, target: _Target, messages: list[jsonrpc.Message]) -> Response:
        try:
            results = await gatherResults(
                [self._handle_batch_item(target, message) for message in messages], consumeErrors=True
            )
        except FirstError as e:
            raise (e.subFailure.value or e) from None
        responses = [result for result in results if isinstance(result, bytes)]
        if responses:
            return Response(200, jsonrpc.encode_batch(responses))
        # A batch of notifications has no responses, but the failure of one must not look like success.
        error = next((result for result in results if result is not None), None)
        return rpc_error_response(error) if isinstance(error, RpcError) else Response(202)

    def _handle_batch_item(self, target: _Target, message: jsonrpc.Message) -> Deferred[_ItemResult]:
        client_id = target.client_id
        if isinstance(message, jsonrpc.Request):
            return self._call(target, message).addCallbacks(
                encode_reply, _encode_failure, callbackArgs=(message.id,), errbackArgs=(message.id, client_id)
            )
        if isinstance(message, jsonrpc.Notification):
            return self._notify(target, message).addCallbacks(_no_response, _notification_error)
        self._metrics.bad_messages["backend"] += 1
        return succeed(jsonrpc.encode_gateway_error(message.id, invalid_message_error(message, client_id).to_json()))

    def _call(self, target: _Target, message: jsonrpc.Request) -> Deferred[Reply]:
        try:
            require(target.grant, "call", target.client_id)
        except RpcError as e:
            return fail(e)
        return self._dispatcher.call(target.client_id, message.method, message.params, target.timeout)

    def _notify(self, target: _Target, message: jsonrpc.Notification) -> Deferred[None]:
        try:
            require(target.grant, "notify", target.client_id)
        except RpcError as e:
            return fail(e)
        return self._dispatcher.notify(target.client_id, message.method, message.params)

    # Many clients.

    async def list_clients(self, request: HTTPRequest) -> Response:
        """Handle ``GET /v1/clients``. The default prefix is that of the backend's token."""
        parameters = request.query
        prefix = parameters.get_client_id_part("prefix")
        if prefix is None:
            prefix = request.grant.prefix
        request.grant.check("read", prefix)
        clients, next_after = await self._directory.list_clients(
            parameters.get_client_id_part("after") or "",
            parameters.get_int("limit", DEFAULT_LIMIT, 1, MAX_LIMIT),
            parameters.get_node_id("node"),
            prefix,
        )
        return json_response(200, {"clients": clients, "next": next_after})

    async def notify_prefix(self, request: HTTPRequest) -> Response:
        """Handle ``POST /v1/clients?prefix=``."""
        prefix = request.query.get_client_id_part("prefix")
        if prefix is None:
            raise BadRequestError("prefix", "give a ?prefix= of client_ids: acme/, or an empty one for every client")
        request.grant.check("notify", prefix)
        message = jsonrpc.decode(request.body())
        if not isinstance(message, jsonrpc.Notification):
            self._metrics.bad_messages["backend"] += 1
            return _not_a_notification(message)
        try:
            reached, unreachable = await self._notify_all(prefix, message)
        except RpcError as e:
            return rpc_error_response(e)
        return nodes_response(reached, {node_id: _notify_failure(error) for node_id, error in unreachable.items()})

    async def _notify_all(
        self, prefix: str, message: jsonrpc.Notification
    ) -> tuple[dict[str, int], dict[str, PeerUnreachableError]]:
        """Notify the clients of every node. Returns how many each node reached, and the errors of unreachable nodes, by
        node_id.

        Raises ``RpcError`` for a message that no node delivers, and ``RegistryUnavailableError``, having sent nothing,
        if the nodes are not known.
        """
        nodes = [] if self._peers is None else await self._registry.nodes()
        requests = {
            self._node.node_id: self._dispatcher.notify_prefix(prefix, message.method, message.params),
        }
        for status in nodes:
            if self._peers is not None and status.node_id != self._node.node_id:
                requests[status.node_id] = self._peers.notify_prefix(status, prefix, message.method, message.params)
        return await gather_nodes(requests)


def body_too_large(limit: int) -> Callable[[HTTPRequest], Response]:
    """Return a handler that answers a request with a body of more than ``limit`` bytes, before the body is read."""

    def respond(request: HTTPRequest) -> Response:
        client_id = http_server.rpc_client_id(request.uri)
        return rpc_error_response(
            RpcError(ErrorKind.TOO_LARGE, client_id, detail=f"the limit of a body is {limit} bytes")
        )

    return respond


def _client_id(request: HTTPRequest, raw_id: bytes | None) -> str:
    """Return the client_id of the path, or that of the query if there is none in the path."""
    return request.query.get_client_id() if raw_id is None else http_server.parse_client_id(raw_id)


def _timeout(request: HTTPRequest) -> float | None:
    parameter = request.query.get("timeout")
    if parameter is not None:
        return http_server.parse_seconds("the query parameter timeout", parameter)
    values = request.header_values("Request-Timeout")
    if not values:
        return None
    return http_server.parse_seconds("the header Request-Timeout", values[0] if len(values) == 1 else ", ".join(values))


def _notify_failure(error: PeerUnreachableError) -> str:
    reason = peer_error_text(error)
    return f"{reason}; some of its clients may have been notified" if error.sent else reason


def _not_connected() -> Response:
    return error_response(404, "not_connected", "the client is not connected")


def _encode_failure(failure: Failure, id: bytes, client_id: str) -> bytes:
    return jsonrpc.encode_gateway_error(id, error_object(failure, client_id))


def _no_response(_: None) -> _ItemResult:
    return None


def _notification_error(failure: Failure) -> _ItemResult:
    failure.trap(RpcError)
    assert isinstance(failure.value, RpcError)
    return failure.value


def _not_a_notification(
    message: jsonrpc.Request | jsonrpc.Response | jsonrpc.Invalid | list[jsonrpc.Message],
) -> Response:
    if isinstance(message, list):
        return rpc_error_response(RpcError(ErrorKind.INVALID_REQUEST, detail="send one notification, not a batch"))
    if isinstance(message, jsonrpc.Request):
        detail = "send a notification, without an id; calls go to one client, at /v1/clients/{client_id}/rpc"
        return rpc_error_response(RpcError(ErrorKind.INVALID_REQUEST, detail=detail), message.id)
    return rpc_error_response(invalid_message_error(message), message.id)
