"""The nodes, over HTTP, and how this one is.

-> GET /v1/nodes                    <- 200 {"nodes":[{"node_id":…,"state":"up",…}]}
-> POST /v1/nodes/<node_id>/drain   <- 202 {"node_id":…}, and that node sends its clients away, then ends
-> POST /v1/rebalance               <- 202 {"nodes":{"<node_id>":250,"<node_id>":0},"failed":{"<node_id>":"why"}}
                                    each moves so many clients; no "failed" where none did
                                    <- 409 {"error":"off",…}: --rebalance-rate is 0
-> GET /healthz                     <- 200 {"healthy":true}
-> GET /readyz                      <- 200 {"ready":true}, or 503 {"error":"draining",…}
-> GET /metrics                     <- 200 the text that Prometheus reads
"""

from __future__ import annotations

from typing import Final

import attrs
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from gateway.api import every_node
from gateway.api.answer import Answer, json_answer, refusal
from gateway.api.channel import Request
from gateway.cluster.interface import IBalance, INode, IPeers, PeerUnreachable
from gateway.registry.interface import IRegistry
from gateway.telemetry.metrics import Metrics

_UNREADY: Final = {
    "starting": "this node is starting",
    "draining": "this node is sending its clients away and takes no new ones",
    "registry": "this node takes no clients while its registry does not answer",
}
#: the exposition format that Metrics.text() writes
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Nodes:
    """What operators ask."""

    log = Logger()

    def __init__(
        self,
        *,
        registry: IRegistry,
        node: INode,
        metrics: Metrics,
        peers: IPeers | None = None,
        balance: IBalance | None = None,
    ) -> None:
        """Without ``peers`` the node is alone; without ``balance`` it moves no clients."""
        self._balance = balance
        self._registry = registry
        self._node = node
        self._peers = peers
        self._metrics = metrics

    async def page(self, request: Request) -> Answer:
        """``GET /v1/nodes``; for who may read, be it of a few clients: events are to be had at every node."""
        request.grant.check("read")
        return json_answer(200, {"nodes": [attrs.asdict(status) for status in await self._registry.nodes()]})

    async def drain(self, request: Request, raw_id: bytes) -> Answer:
        """``POST /v1/nodes/{node_id}/drain``."""
        request.grant.check_unlimited()
        node_id = raw_id.decode("latin-1")
        if node_id == self._node.node_id:
            self._node.drain().addErrback(lambda failure: self.log.failure("the drain failed", failure=failure))
            return json_answer(202, {"node_id": node_id})
        status = next((one for one in await self._registry.nodes() if one.node_id == node_id), None)
        if status is None:
            return refusal(404, "node", "no live node has this node_id; GET /v1/nodes lists them")
        if self._peers is None:
            return refusal(503, "node", "that is another node, which cannot be reached from here: ask it itself")
        try:
            await self._peers.drain(status)
        except PeerUnreachable as e:
            return refusal(503, "node", f"the node {status.name} could not be asked: {every_node.why(e)}")
        return json_answer(202, {"node_id": node_id})

    async def rebalance(self, request: Request) -> Answer:
        """``POST /v1/rebalance``."""
        request.grant.check_unlimited()
        if self._balance is None or not self._balance.rate:
            return refusal(409, "off", "--rebalance-rate is 0 at this node: it moves no clients, nor has others do so")
        why = self._node.unready()
        if why:
            return refusal(503, why, _UNREADY.get(why, "this node takes no clients"))
        others = [] if self._peers is None else await self._registry.nodes()
        asked: dict[str, Deferred[int]] = {self._node.node_id: self._balance.now()}
        for status in others:
            if self._peers is not None and status.state == "up" and status.node_id != self._node.node_id:
                asked[status.node_id] = self._peers.rebalance(status)
        moving, unreachable = await every_node.answers(asked)
        failed = {node_id: every_node.why(error) for node_id, error in unreachable.items()}
        return json_answer(202, {"nodes": moving, "failed": failed} if failed else {"nodes": moving})

    async def healthy(self, request: Request) -> Answer:
        """``GET /healthz``."""
        return json_answer(200, {"healthy": True})

    async def ready(self, request: Request) -> Answer:
        """``GET /readyz``."""
        why = self._node.unready()
        if why:
            return refusal(503, why, _UNREADY.get(why, "this node takes no clients"))
        return json_answer(200, {"ready": True})

    async def metrics(self, request: Request) -> Answer:
        """``GET /metrics``, which are about everybody."""
        request.grant.check("read", "")
        return Answer(200, self._metrics.text(), _METRICS_TYPE)
