"""The clients, over HTTP.

    -> POST /v1/clients/x/rpc {"jsonrpc":"2.0","id":1,"method":"disk.usage"}
    <- 200 {"jsonrpc":"2.0","id":1,"result":{"free":12}}
    -> POST /v1/clients/x/rpc {"jsonrpc":"2.0","method":"policy.changed"}            <- 202
    -> POST /v1/clients/x/rpc [{…}, {…}]                                             <- 200 [{…}, {…}]
    -> POST /v1/clients?prefix=acme/ {"jsonrpc":"2.0","method":"policy.changed"}
    <- 202 {"nodes":{"<node_id>":12,"<node_id>":7},"failed":{"<node_id>":"why"}}     no "failed" where none did
    -> GET /v1/clients/x                                                             <- 200 {"client_id":"x",…}
    -> DELETE /v1/clients/x                                                          <- 204
    -> GET /v1/clients?after=w&limit=1                                               <- 200 {"clients":[…],"next":"x"}

A time for the call is in seconds, in the query (``timeout=5``) or in the header ``Request-Timeout``; the query wins.

Whether the backend's token is for that client, and for what is asked of it, is looked at before anything else is:
nobody can tell a client that is not his from one that does not exist.

The nodes, over HTTP, and how this one is.

-> GET /v1/nodes                    <- 200 {"nodes":[{"node_id":…,"state":"up",…}],"version":"0.1.0"}
-> POST /v1/nodes/<node_id>/drain   <- 202 {"node_id":…}, and that node sends its clients away, then ends
-> POST /v1/rebalance               <- 202 {"nodes":{"<node_id>":250,"<node_id>":0},"failed":{"<node_id>":"why"}}
                                    each moves so many clients; no "failed" where none did
                                    <- 409 {"error":"off",…}: --rebalance-rate is 0
-> GET /healthz                     <- 200 {"healthy":true}
-> GET /readyz                      <- 200 {"ready":true}, or 503 {"error":"draining",…}
-> GET /metrics                     <- 200 the text that Prometheus reads
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import attrs
from twisted.internet.defer import Deferred, FirstError, fail, gatherResults, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway import __version__
from gateway.api import directory, query
from gateway.api.directory import ClientDirectory
from gateway.api.errors import BadRequestError, RemoteNodeError
from gateway.api.http_server import HTTPRequest
from gateway.api.responses import (
    Response,
    encode_reply,
    error_object,
    error_response,
    invalid_message_error,
    json_response,
    require,
    rpc_error_response,
)
from gateway.auth.backend_tokens import Grant
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import INode, IPeerClient, IRebalancer
from gateway.metrics import Metrics
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import IRegistry
from gateway.rpc.interface import IDispatcher
from gateway.rpc.pending import Reply

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000

_NULL = b"null"

#: of one message of a batch: its response, or how its notification went
_ItemResult: TypeAlias = bytes | RpcError | None


class ClientHandlers:
    """What can be asked of clients, and about them."""

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
        """Without ``peers`` the node is alone."""
        self._registry = registry
        self._peers = peers
        self._dispatcher = dispatcher
        self._directory = directory
        self._node = node
        self._metrics = metrics

    # One client.

    async def get(self, request: HTTPRequest, raw_id: bytes) -> Response:
        """``GET /v1/clients/{client_id}``."""
        client_id = query.parse_client_id(raw_id)
        request.grant.check("read", client_id)
        found = await self._directory.find(client_id)
        return _not_connected() if found is None else json_response(200, found)

    async def delete(self, request: HTTPRequest, raw_id: bytes) -> Response:
        """``DELETE /v1/clients/{client_id}``."""
        client_id = query.parse_client_id(raw_id)
        request.grant.check("disconnect", client_id)
        try:
            found = await self._directory.disconnect(client_id)
        except RemoteNodeError as e:
            return error_response(503, "node", str(e))
        return Response(204) if found else _not_connected()

    async def rpc(self, request: HTTPRequest, raw_id: bytes) -> Response:
        """``POST /v1/clients/{client_id}/rpc``."""
        message = jsonrpc.decode(request.body())
        id = _NULL if isinstance(message, (list, jsonrpc.Notification)) else message.id
        client_id = None
        try:
            client_id = query.parse_client_id(raw_id)
            timeout = _timeout(request)
            if isinstance(message, list):
                return await self._handle_batch(request.grant, client_id, message, timeout)
            return await self._handle_single(request.grant, client_id, message, timeout)
        except BadRequestError as e:
            return rpc_error_response(RpcError(ErrorKind.INVALID_REQUEST, client_id, detail=str(e)), id)
        except RpcError as e:
            return rpc_error_response(e, id)

    async def _handle_single(
        self, grant: Grant, client_id: str, message: jsonrpc.Message, timeout: float | None
    ) -> Response:
        if isinstance(message, jsonrpc.Request):
            return Response(200, encode_reply(await self._call(grant, client_id, message, timeout), message.id))
        if isinstance(message, jsonrpc.Notification):
            await self._notify(grant, client_id, message)
            return Response(202)
        self._metrics.bad_messages["backend"] += 1
        raise invalid_message_error(message, client_id)

    async def _handle_batch(
        self, grant: Grant, client_id: str, messages: list[jsonrpc.Message], timeout: float | None
    ) -> Response:
        try:
            outcomes = await gatherResults(
                [self._handle_batch_item(grant, client_id, message, timeout) for message in messages],
                consumeErrors=True,
            )
        except FirstError as e:
            raise (e.subFailure.value or e) from None
        responses = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
        if responses:
            return Response(200, jsonrpc.encode_batch(responses))
        # Notifications alone: there are no responses, but neither may a failure pass for success.
        failed = next((outcome for outcome in outcomes if outcome is not None), None)
        return rpc_error_response(failed) if isinstance(failed, RpcError) else Response(202)

    def _handle_batch_item(
        self, grant: Grant, client_id: str, message: jsonrpc.Message, timeout: float | None
    ) -> Deferred[_ItemResult]:
        if isinstance(message, jsonrpc.Request):
            calling = self._call(grant, client_id, message, timeout)
            return calling.addCallbacks(
                encode_reply, _encode_failure, callbackArgs=(message.id,), errbackArgs=(message.id, client_id)
            )
        if isinstance(message, jsonrpc.Notification):
            telling = self._notify(grant, client_id, message)
            return telling.addCallbacks(_no_response, _notification_error)
        self._metrics.bad_messages["backend"] += 1
        return succeed(jsonrpc.encode_error(message.id, invalid_message_error(message, client_id).to_json()))

    def _call(self, grant: Grant, client_id: str, message: jsonrpc.Request, timeout: float | None) -> Deferred[Reply]:
        try:
            require(grant, "call", client_id)
        except RpcError as e:
            return fail(e)
        return self._dispatcher.call(client_id, message.method, message.params, timeout)

    def _notify(self, grant: Grant, client_id: str, message: jsonrpc.Notification) -> Deferred[None]:
        try:
            require(grant, "notify", client_id)
        except RpcError as e:
            return fail(e)
        return self._dispatcher.notify(client_id, message.method, message.params)

    # Many clients.

    async def list_clients(self, request: HTTPRequest) -> Response:
        """``GET /v1/clients``; of a token that is for some, without a prefix, all of those."""
        asked = request.query
        prefix = asked.get_client_id_part("prefix")
        if prefix is None:
            prefix = request.grant.prefix
        request.grant.check("read", prefix)
        found, last = await self._directory.list_clients(
            asked.get_client_id_part("after") or "",
            asked.get_int("limit", DEFAULT_LIMIT, 1, MAX_LIMIT),
            asked.get_node_id("node"),
            prefix,
        )
        return json_response(200, {"clients": found, "next": last})

    async def notify_prefix(self, request: HTTPRequest) -> Response:
        """``POST /v1/clients?prefix=``."""
        prefix = request.query.get_client_id_part("prefix")
        if prefix is None:
            raise BadRequestError("prefix", "say whom it is for: ?prefix=acme/, or an empty ?prefix= for every client")
        request.grant.check("notify", prefix)
        message = jsonrpc.decode(request.body())
        if not isinstance(message, jsonrpc.Notification):
            self._metrics.bad_messages["backend"] += 1
            return _not_a_notification(message)
        try:
            reached, failed = await self._notify_all(prefix, message)
        except RpcError as e:
            return rpc_error_response(e)
        return json_response(202, {"nodes": reached, "failed": failed} if failed else {"nodes": reached})

    async def _notify_all(self, prefix: str, message: jsonrpc.Notification) -> tuple[dict[str, int], dict[str, str]]:
        """How many clients each node reached, and why it is not known of a node; by node_id.

        Raises ``RpcError`` for what no node passes on, and ``RegistryUnavailable`` when the nodes are not known: then
        nobody was told.
        """
        asked = (prefix, message.method, message.params)
        others = [] if self._peers is None else await self._registry.nodes()
        telling = {self._node.node_id: self._dispatcher.notify_prefix(*asked)}
        for status in others:
            if self._peers is not None and status.node_id != self._node.node_id:
                telling[status.node_id] = self._peers.notify_prefix(status, *asked)
        reached, unreachable = await directory.gather_nodes(telling)
        return reached, {node_id: _unreachable_reason(error) for node_id, error in unreachable.items()}


def body_too_large(limit: int) -> Callable[[HTTPRequest], Response]:
    """What is answered to a body of more than ``limit`` bytes, before it was read."""

    def answer(request: HTTPRequest) -> Response:
        client_id = query.rpc_client_id(request.raw_path)
        return rpc_error_response(RpcError(ErrorKind.TOO_LARGE, client_id, detail=f"a body may be {limit} bytes"))

    return answer


def _timeout(request: HTTPRequest) -> float | None:
    asked = request.query.get("timeout")
    if asked is not None:
        return query.parse_seconds("timeout", asked)
    values = request.header_values("Request-Timeout")
    if not values:
        return None
    return query.parse_seconds("Request-Timeout", values[0] if len(values) == 1 else ", ".join(values))


def _unreachable_reason(error: PeerUnreachableError) -> str:
    why = directory.peer_error_text(error)
    return f"{why}; some of its clients may have been told" if error.sent else why


def _not_connected() -> Response:
    return error_response(404, "not_connected", "the client is not connected")


def _encode_failure(failure: Failure, id: bytes, client_id: str) -> bytes:
    return jsonrpc.encode_error(id, error_object(failure, client_id))


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
        return rpc_error_response(
            RpcError(ErrorKind.INVALID_REQUEST, detail="one notification is wanted here, not a batch")
        )
    if isinstance(message, jsonrpc.Request):
        detail = "a call is for one client, at /v1/clients/{client_id}/rpc; a notification has no id"
        return rpc_error_response(RpcError(ErrorKind.INVALID_REQUEST, detail=detail), message.id)
    return rpc_error_response(invalid_message_error(message), message.id)


_UNREADY_MESSAGES: Final = {
    "starting": "this node is starting",
    "draining": "this node is sending its clients away and takes no new ones",
    "registry": "this node takes no clients while its registry does not answer",
}
#: the exposition format that Metrics.text() writes
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class NodeHandlers:
    """What operators ask."""

    _log = Logger()

    def __init__(
        self,
        *,
        registry: IRegistry,
        node: INode,
        metrics: Metrics,
        peers: IPeerClient | None = None,
        rebalancer: IRebalancer | None = None,
    ) -> None:
        """Without ``peers`` the node is alone; without ``balance`` it moves no clients."""
        self._rebalancer = rebalancer
        self._registry = registry
        self._node = node
        self._peers = peers
        self._metrics = metrics

    async def list_nodes(self, request: HTTPRequest) -> Response:
        """``GET /v1/nodes``; for who may read, be it of a few clients: events are to be had at every node."""
        request.grant.check("read")
        nodes = [attrs.asdict(status) for status in await self._registry.nodes()]
        return json_response(200, {"nodes": nodes, "version": __version__})

    async def drain(self, request: HTTPRequest, raw_id: bytes) -> Response:
        """``POST /v1/nodes/{node_id}/drain``."""
        request.grant.check_unlimited()
        node_id = raw_id.decode("latin-1")
        if node_id == self._node.node_id:
            self._node.drain().addErrback(lambda failure: self._log.failure("the drain failed", failure=failure))
            return json_response(202, {"node_id": node_id})
        status = next((one for one in await self._registry.nodes() if one.node_id == node_id), None)
        if status is None:
            return error_response(404, "node", "no live node has this node_id; GET /v1/nodes lists them")
        if self._peers is None:
            return error_response(503, "node", "that is another node, which cannot be reached from here: ask it itself")
        try:
            await self._peers.drain(status)
        except PeerUnreachableError as e:
            return error_response(
                503, "node", f"the node {status.name} could not be asked: {directory.peer_error_text(e)}"
            )
        return json_response(202, {"node_id": node_id})

    async def rebalance(self, request: HTTPRequest) -> Response:
        """``POST /v1/rebalance``."""
        request.grant.check_unlimited()
        if self._rebalancer is None or not self._rebalancer.rate:
            return error_response(
                409, "off", "--rebalance-rate is 0 at this node: it moves no clients, nor has others do so"
            )
        why = self._node.unready_reason()
        if why:
            return error_response(503, why, _UNREADY_MESSAGES.get(why, "this node takes no clients"))
        others = [] if self._peers is None else await self._registry.nodes()
        asked: dict[str, Deferred[int]] = {self._node.node_id: self._rebalancer.rebalance_now()}
        for status in others:
            if self._peers is not None and status.state == "up" and status.node_id != self._node.node_id:
                asked[status.node_id] = self._peers.rebalance(status)
        moving, unreachable = await directory.gather_nodes(asked)
        failed = {node_id: directory.peer_error_text(error) for node_id, error in unreachable.items()}
        return json_response(202, {"nodes": moving, "failed": failed} if failed else {"nodes": moving})

    async def healthz(self, request: HTTPRequest) -> Response:
        """``GET /healthz``."""
        return json_response(200, {"healthy": True})

    async def readyz(self, request: HTTPRequest) -> Response:
        """``GET /readyz``."""
        why = self._node.unready_reason()
        if why:
            return error_response(503, why, _UNREADY_MESSAGES.get(why, "this node takes no clients"))
        return json_response(200, {"ready": True})

    async def metrics(self, request: HTTPRequest) -> Response:
        """``GET /metrics``, which are about everybody."""
        request.grant.check("read", "")
        return Response(200, self._metrics.text(), _METRICS_TYPE)
