"""Handlers of HTTP requests about nodes, health and metrics.

-> GET /v1/nodes                    <- 200 {"nodes":[{"node_id":…,"state":"up",…,"version":"0.1.0"}],"version":"0.1.0"}
                                    each node's version, null if it does not tell; and that of this node
-> POST /v1/nodes/<node_id>/drain   <- 202 {"node_id":…}; that node drains, then exits
-> POST /v1/rebalance               <- 202 {"nodes":{"<node_id>":250,"<node_id>":0},"failed":{"<node_id>":"why"}}
                                    how many clients each node moves; "failed" only if a node failed
                                    <- 409 {"error":"off",…}: --rebalance-rate is 0
-> GET /healthz                     <- 200 {"healthy":true}
-> GET /readyz                      <- 200 {"ready":true}, or 503 {"error":"draining",…}
-> GET /metrics                     <- 200, Prometheus text
"""

from __future__ import annotations

from typing import Final

import attrs
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from gateway import __version__
from gateway.api.directory import gather_nodes, peer_error_text
from gateway.api.http_server import HTTPRequest
from gateway.api.responses import (
    Response,
    error_response,
    json_response,
    nodes_response,
)
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import INode, IPeerClient, IRebalancer
from gateway.metrics import Metrics
from gateway.registry.interface import IRegistry

_UNREADY_MESSAGES: Final = {
    "starting": "this node is starting",
    "draining": "this node is draining and takes no new clients",
    "registry": "this node takes no new clients while its registry does not answer",
}


class NodeHandlers:
    """Handle requests about nodes, and report the state of this one."""

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
        """Without ``peers`` this node is the only one; without a ``rebalancer`` it does not move clients."""
        self._rebalancer = rebalancer
        self._registry = registry
        self._node = node
        self._peers = peers
        self._metrics = metrics

    async def list_nodes(self, request: HTTPRequest) -> Response:
        """Handle ``GET /v1/nodes``. A token limited to a prefix may read it too, to subscribe to events at every
        node."""
        request.grant.check("read")
        nodes = [{**attrs.asdict(status), "version": status.version or None} for status in await self._registry.nodes()]
        return json_response(200, {"nodes": nodes, "version": __version__})

    async def drain(self, request: HTTPRequest, raw_id: bytes) -> Response:
        """Handle ``POST /v1/nodes/{node_id}/drain``."""
        request.grant.check_unlimited()
        node_id = raw_id.decode("latin-1")
        if node_id == self._node.node_id:
            self._node.drain().addErrback(lambda failure: self._log.failure("the drain failed", failure=failure))
            return json_response(202, {"node_id": node_id})
        status = next((status for status in await self._registry.nodes() if status.node_id == node_id), None)
        if status is None:
            return error_response(404, "node", "no live node has this node_id; GET /v1/nodes lists them")
        if self._peers is None:
            return error_response(
                503, "node", "that is another node, and this node has no peers: send the request to that node"
            )
        try:
            await self._peers.drain(status)
        except PeerUnreachableError as e:
            message = f"the request to node {status.name} failed: {peer_error_text(e)}"
            return error_response(503, "node", message)
        return json_response(202, {"node_id": node_id})

    async def rebalance(self, request: HTTPRequest) -> Response:
        """Handle ``POST /v1/rebalance``."""
        request.grant.check_unlimited()
        if self._rebalancer is None or not self._rebalancer.rate:
            return error_response(
                409, "off", "--rebalance-rate is 0 at this node: it does not move clients, nor ask other nodes to"
            )
        reason = self._node.unready_reason()
        if reason:
            return _unready(reason)
        nodes = [] if self._peers is None else await self._registry.nodes()
        requests: dict[str, Deferred[int]] = {self._node.node_id: self._rebalancer.rebalance_now()}
        for status in nodes:
            if self._peers is not None and status.state == "up" and status.node_id != self._node.node_id:
                requests[status.node_id] = self._peers.rebalance(status)
        moving, unreachable = await gather_nodes(requests)
        return nodes_response(moving, {node_id: peer_error_text(error) for node_id, error in unreachable.items()})

    async def healthz(self, request: HTTPRequest) -> Response:
        """Handle ``GET /healthz``."""
        return json_response(200, {"healthy": True})

    async def readyz(self, request: HTTPRequest) -> Response:
        """Handle ``GET /readyz``."""
        reason = self._node.unready_reason()
        return _unready(reason) if reason else json_response(200, {"ready": True})

    async def metrics(self, request: HTTPRequest) -> Response:
        """Handle ``GET /metrics``. They cover all clients, so the token must not be limited to a prefix."""
        request.grant.check("read", "")
        return Response(200, self._metrics.text(), _METRICS_TYPE)


#: the exposition format that Metrics.text() writes
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _unready(reason: str) -> Response:
    return error_response(503, reason, _UNREADY_MESSAGES.get(reason, "this node takes no clients"))
