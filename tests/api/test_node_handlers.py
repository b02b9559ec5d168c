"""Tests of gateway.api.node_handlers."""

from __future__ import annotations

import attrs
from twisted.trial.unittest import TestCase

from gateway import __version__
from gateway.cluster.errors import PeerUnreachableError
from gateway.registry.interface import NodeStatus
from tests.builders.endpoint import EndpointHarness
from tests.fakes.api import NODE_ID, OTHER_ID, FakePeerClient
from tests.fakes.cluster import FakeRebalancer


class NodeTests(TestCase):
    """/v1/nodes, health and metrics."""

    def setUp(self):
        self.endpoint = EndpointHarness()

    def test_nodes(self):
        status = NodeStatus(NODE_ID, "here", "ws://a", "ws://b", 3, 100, "up", 1.5, "7.1")
        self.endpoint.registry.statuses = [status]
        response = self.endpoint.request("GET", "/v1/nodes")
        self.assertEqual(
            response.json,
            {
                "nodes": [
                    {
                        "node_id": NODE_ID,
                        "name": "here",
                        "public_url": "ws://a",
                        "peer_url": "ws://b",
                        "clients": 3,
                        "capacity": 100,
                        "state": "up",
                        "heartbeat_age": 1.5,
                        "version": "7.1",
                    }
                ],
                "version": __version__,
            },
        )

    def test_the_version_of_an_older_node_is_unknown(self):
        self.endpoint.registry.statuses = [NodeStatus(NODE_ID, "here", "ws://a", "ws://b", 3, 100, "up", 1.5)]
        self.assertIsNone(self.endpoint.request("GET", "/v1/nodes").json["nodes"][0]["version"])

    def test_drain(self):
        response = self.endpoint.request("POST", f"/v1/nodes/{NODE_ID}/drain")
        self.assertEqual((response.status, response.json), (202, {"node_id": NODE_ID}))
        self.assertEqual(self.endpoint.node.drain_count, 1)

    def test_drain_another(self):
        self.endpoint.registry.statuses = [NodeStatus(OTHER_ID, "o", "ws://a", "ws://b", 3, 100, "up", 1.5)]
        response = self.endpoint.request("POST", f"/v1/nodes/{OTHER_ID}/drain")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertEqual(self.endpoint.node.drain_count, 0)

    def test_drain_another_through_this_one(self):
        peers = FakePeerClient()
        self.endpoint = EndpointHarness(peers=peers)
        self.endpoint.registry.add_node(NODE_ID, "here")
        self.endpoint.registry.add_node(OTHER_ID)
        peers.results += [None, PeerUnreachableError("peer.drain: it was silent")]
        response = self.endpoint.request("POST", f"/v1/nodes/{OTHER_ID}/drain")
        self.assertEqual((response.status, response.json), (202, {"node_id": OTHER_ID}))
        response = self.endpoint.request("POST", f"/v1/nodes/{OTHER_ID}/drain")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertEqual(response.json["message"], "the request to node other failed: it was silent")
        self.assertEqual((peers.requests, self.endpoint.node.drain_count), ([("drain", OTHER_ID)] * 2, 0))
        self.endpoint.request("POST", f"/v1/nodes/{NODE_ID}/drain")
        self.assertEqual((len(peers.requests), self.endpoint.node.drain_count), (2, 1))
        self.assertEqual(self.endpoint.request("POST", "/v1/nodes/third/drain").status, 404)

    def test_drain_unknown_node(self):
        for node_id in ("unknown", "", "%00", "a/b"):
            response = self.endpoint.request("POST", f"/v1/nodes/{node_id}/drain")
            self.assertEqual((response.status, response.json["error"]), (404, "node"))

    def test_rebalance(self):
        balance, peers = FakeRebalancer(moving=250), FakePeerClient()
        self.endpoint = EndpointHarness(rebalancer=balance, peers=peers)
        self.endpoint.registry.add_node(NODE_ID, "here")
        for name in ("b", "c", "d"):
            self.endpoint.registry.add_node(name, name)
        self.endpoint.registry.statuses[-1] = attrs.evolve(self.endpoint.registry.statuses[-1], state="draining")
        peers.results += [12, PeerUnreachableError("peer.rebalance: its --rebalance-rate is 0")]
        response = self.endpoint.request("POST", "/v1/rebalance")
        moving = {"nodes": {NODE_ID: 250, "b": 12}, "failed": {"c": "its --rebalance-rate is 0"}}
        self.assertEqual((response.status, response.json), (202, moving))
        self.assertEqual((peers.requests, balance.runs), ([("rebalance", "b"), ("rebalance", "c")], 1))

    def test_rebalance_without_peers(self):
        self.endpoint = EndpointHarness(rebalancer=FakeRebalancer())
        response = self.endpoint.request("POST", "/v1/rebalance")
        self.assertEqual((response.status, response.json), (202, {"nodes": {NODE_ID: 0}}))

    def test_rebalance_is_off(self):
        peers = FakePeerClient()
        for balance in (None, FakeRebalancer(rate=0.0)):
            self.endpoint = EndpointHarness(rebalancer=balance, peers=peers)
            self.endpoint.registry.add_node(OTHER_ID)
            response = self.endpoint.request("POST", "/v1/rebalance")
            self.assertEqual((response.status, response.json["error"]), (409, "off"))
            self.assertIn("--rebalance-rate", response.json["message"])
        self.assertEqual(peers.requests, [])

    def test_rebalance_of_an_unready_node(self):
        balance = FakeRebalancer()
        self.endpoint = EndpointHarness(rebalancer=balance, peers=FakePeerClient())
        for reason in ("starting", "draining", "registry"):
            self.endpoint.node.not_ready_reason = reason
            response = self.endpoint.request("POST", "/v1/rebalance")
            self.assertEqual((response.status, response.json["error"]), (503, reason))
        self.endpoint.node.not_ready_reason, self.endpoint.registry.unavailable = "", True
        self.assertEqual(self.endpoint.request("POST", "/v1/rebalance").status, 503)
        self.assertEqual(balance.runs, 0)

    def test_rebalance_needs_post(self):
        self.endpoint = EndpointHarness(rebalancer=FakeRebalancer())
        for method in ("GET", "PUT", "DELETE"):
            response = self.endpoint.request(method, "/v1/rebalance")
            self.assertEqual((response.status, response.headers["allow"]), (405, "POST"))
        self.assertEqual(self.endpoint.request("POST", "/v1/rebalance/").status, 404)
        self.assertEqual(self.endpoint.request("POST", "/v1/rebalance", headers=[("Origin", "http://x")]).status, 403)

    def test_healthy(self):
        self.endpoint.node.not_ready_reason = "starting"
        response = self.endpoint.request("GET", "/healthz")
        self.assertEqual((response.status, response.json), (200, {"healthy": True}))

    def test_ready(self):
        response = self.endpoint.request("GET", "/readyz")
        self.assertEqual((response.status, response.json), (200, {"ready": True}))
        for reason in ("starting", "draining", "registry", "lease"):
            self.endpoint.node.not_ready_reason = reason
            response = self.endpoint.request("GET", "/readyz")
            self.assertEqual((response.status, response.json["error"]), (503, reason))

    def test_metrics(self):
        self.endpoint.request("GET", "/healthz")
        response = self.endpoint.request("GET", "/metrics")
        self.assertEqual(response.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8")
        self.assertIn(b'wsgateway_api_requests_total{status="200"} 1.0', response.body)
