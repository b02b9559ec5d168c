"""Tests of gateway.api.directory."""

from __future__ import annotations

from collections import deque

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.api.directory import gather_nodes, peer_error_text
from gateway.cluster.errors import PeerUnreachableError
from gateway.registry.errors import RegistryUnavailableError
from tests.builders.endpoint import EndpointHarness
from tests.builders.http import request
from tests.fakes.api import NODE_ID, OTHER_ID, FakePeerClient


class FindTests(TestCase):
    """GET /v1/clients/{client_id}."""

    def setUp(self):
        self.endpoint = EndpointHarness()

    def test_local_client(self):
        self.endpoint.sessions.add("a/b")
        response = self.endpoint.request("GET", "/v1/clients/a%2Fb")
        self.assertEqual(response.status, 200)
        self.assertEqual(
            response.json,
            {
                "client_id": "a/b",
                "node": NODE_ID,
                "node_name": "here",
                "generation": 7,
                "connected_at": "2023-11-14T22:13:20.250Z",
                "address": "192.0.2.7:4711",
            },
        )
        self.assertEqual(self.endpoint.registry.queries, [])

    def test_remote_client(self):
        self.endpoint.registry.add("x")
        response = self.endpoint.request("GET", "/v1/clients/x")
        self.assertEqual(response.json["node"], OTHER_ID)
        self.assertEqual(response.json["node_name"], "other")
        self.assertEqual(response.json["generation"], 9)
        self.assertEqual(response.json["connected_at"], "2023-11-14T22:13:21.000Z")
        self.assertEqual(response.json["address"], "[2001:db8::1]:80")

    def test_liveness_of_the_node_is_unknown(self):
        """A new node does not know at first whether that node is dead."""
        self.endpoint.registry.add("x", live=False)
        self.endpoint.membership.stable = False
        for method in ("GET", "DELETE"):
            response = self.endpoint.request(method, "/v1/clients/x")
            self.assertEqual((response.status, response.json["error"]), (503, "registry"))
            self.assertIn("not known yet whether the client's node is alive", response.json["message"])
        self.endpoint.membership.stable = True
        for method in ("GET", "DELETE"):
            self.assertEqual(self.endpoint.request(method, "/v1/clients/x").status, 404)

    def test_unknown_client(self):
        response = self.endpoint.request("GET", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (404, "not_connected"))

    def test_row_of_this_node_without_a_session(self):
        for method in ("GET", "DELETE"):
            self.endpoint.registry.add("x", NODE_ID)
            self.assertEqual(self.endpoint.request(method, "/v1/clients/x").status, 404)
            self.assertEqual(self.endpoint.registry.rows, {}, method)


class FindRemoteTests(TestCase):
    """GET /v1/clients/{client_id} with peers: the client's node confirms that it has the client."""

    def setUp(self):
        self.peers = FakePeerClient()
        self.endpoint = EndpointHarness(peers=self.peers)
        self.registry = self.endpoint.registry
        self.registry.add("x")

    def get(self):
        response = self.endpoint.request("GET", "/v1/clients/x")
        return response.status, response.json.get("generation")

    def asked(self):
        return ("has_client", OTHER_ID, "x", 9)

    def test_confirmed(self):
        self.peers.results.append(True)
        self.assertEqual(self.get(), (200, 9))
        self.assertEqual((self.peers.requests, len(self.registry.queries)), ([self.asked()], 1))

    def test_node_does_not_have_the_client(self):
        """It removes the row before it answers."""
        self.peers.results.append(self.answer(lambda: self.registry.rows.clear()))
        self.assertEqual(self.get(), (404, None))

    def answer(self, action):
        """Do something while the node is asked; it answers that it does not have the client."""

        def act(_):
            action()
            return False

        deferred = Deferred()
        deferred.addCallback(act)
        self.endpoint.clock.callLater(0, deferred.callback, None)
        return deferred

    def test_node_that_drains(self):
        """It says that it does not take clients, and the row is still there."""
        self.peers.results.append(False)
        self.assertEqual(self.get(), (200, 9))
        self.assertEqual(self.peers.requests, [self.asked()])

    def test_client_that_moves(self):
        self.peers.results.append(self.answer(lambda: self.registry.add("x", "third", 10)))
        self.assertEqual(self.get(), (200, 10))
        self.assertEqual(self.peers.requests, [self.asked()])

    def test_client_that_moves_here(self):
        def come():
            self.registry.add("x", NODE_ID, 10)
            self.endpoint.sessions.add("x", 10)

        self.peers.results.append(self.answer(come))
        self.assertEqual(self.get(), (200, 10))

    def test_node_that_cannot_be_asked(self):
        """The registry decides, until its lease has expired."""
        self.peers.results.append(PeerUnreachableError("silent"))
        self.assertEqual(self.get(), (200, 9))
        self.registry.add("x", live=False)
        self.assertEqual(self.get(), (404, None))


class PageTests(TestCase):
    """GET /v1/clients."""

    def setUp(self):
        self.endpoint = EndpointHarness()

    def test_page(self):
        for client_id in ("a", "b", "c"):
            self.endpoint.registry.add(client_id)
        first = self.endpoint.request("GET", "/v1/clients?limit=2").json
        self.assertEqual([client["client_id"] for client in first["clients"]], ["a", "b"])
        self.assertEqual(
            set(first["clients"][0]), {"client_id", "node", "node_name", "generation", "connected_at", "address"}
        )
        self.assertEqual(first["next"], "b")
        second = self.endpoint.request("GET", "/v1/clients?limit=2&after=b").json
        self.assertEqual([client["client_id"] for client in second["clients"]], ["c"])
        self.assertIsNone(second["next"])

    def test_full_last_page_has_no_next(self):
        for client_id in ("a", "b"):
            self.endpoint.registry.add(client_id)
        self.assertIsNone(self.endpoint.request("GET", "/v1/clients?limit=2").json["next"])

    def test_query_of_the_registry(self):
        self.endpoint.request("GET", f"/v1/clients?after=a%2Fb&limit=5&node={NODE_ID}&prefix=a+")
        self.assertEqual(self.endpoint.registry.queries, [("clients", "a/b", 6, NODE_ID, "a+")])
        self.endpoint.request("GET", "/v1/clients")
        self.assertEqual(self.endpoint.registry.queries[-1], ("clients", "", 101, None, ""))


class DisconnectTests(TestCase):
    """DELETE /v1/clients/{client_id} without peers."""

    def setUp(self):
        self.endpoint = EndpointHarness()

    def test_delete(self):
        self.endpoint.sessions.add("x")
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.body), (204, b""))
        self.assertNotIn("content-length", response.headers)
        self.assertEqual(self.endpoint.sessions.closed, [("x", 4003, "disconnected by an operator")])

    def test_response_waits_for_the_row(self):
        self.endpoint.sessions.close_result = Deferred()
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(connection.responses(), [])
        self.endpoint.sessions.close_result.callback(True)
        self.assertEqual(connection.responses()[0].status, 204)

    def test_row_cannot_be_removed(self):
        self.endpoint.sessions.close_result = fail(RegistryUnavailableError("away"))
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        # Without the text of the error, which may name the database.
        message = "the registry does not answer; try again later"
        self.assertEqual((response.status, response.json), (503, {"error": "registry", "message": message}))

    def test_waits_for_a_claim_in_progress(self):
        opening = self.endpoint.sessions.claims["x"] = Deferred()
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(self.endpoint.sessions.closed, [])
        self.endpoint.sessions.add("x")
        opening.callback(None)
        self.assertEqual(connection.responses()[0].status, 204)

    def test_unknown_client_is_not_disconnected(self):
        self.assertEqual(self.endpoint.request("DELETE", "/v1/clients/x").status, 404)

    def test_row_of_a_former_client_id(self):
        """204 if the row is gone, although no client was connected."""
        self.endpoint.registry.add("a//b", NODE_ID)
        self.endpoint.registry.add("a/b", NODE_ID)
        self.assertEqual(self.endpoint.request("DELETE", "/v1/clients/a%2F%2Fb").status, 400)
        self.assertEqual(self.endpoint.request("GET", "/v1/clients?after=a//").json["clients"][0]["client_id"], "a//b")
        self.assertEqual(self.endpoint.request("GET", "/v1/client?client_id=a//b").status, 400)
        self.assertEqual(self.endpoint.request("DELETE", "/v1/client?client_id=a//b").status, 204)
        self.assertEqual(list(self.endpoint.registry.rows), ["a/b"])
        self.assertEqual(self.endpoint.request("DELETE", "/v1/client?client_id=a//b").status, 404)

    def test_remote_client_without_peers(self):
        self.endpoint.registry.add("x")
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertIn("other", response.json["message"])


class DisconnectRemoteTests(TestCase):
    """DELETE /v1/clients/{client_id} with peers."""

    def setUp(self):
        self.peers = FakePeerClient()
        self.endpoint = EndpointHarness(peers=self.peers)
        self.sessions, self.registry = self.endpoint.sessions, self.endpoint.registry

    def delete(self):
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        return response.status, response.json["error"] if response.body else None

    def closed(self, node_id=OTHER_ID, generation=9):
        return ("close", node_id, "x", generation, 4003, "disconnected by an operator")

    def test_remote_client(self):
        self.registry.add("x")
        result = Deferred()
        self.peers.results.append(result)
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(connection.responses(), [])
        result.callback(True)
        self.assertEqual(connection.responses()[0].status, 204)
        self.assertEqual(self.peers.requests, [self.closed()])

    def test_former_client_id(self):
        """A node of an earlier release has the client; another node has only its row, and removes it."""
        for closed, removed, status in ((True, True, 204), (False, True, 204), (False, False, 404)):
            self.registry.add("a/../b")
            self.peers.requests.clear()
            self.peers.results = deque([result := Deferred(), False])
            connection = self.endpoint.connect()
            connection.send(request("DELETE", "/v1/client?client_id=a/../b"))
            if removed:
                self.registry.rows.clear()
            result.callback(closed)
            self.assertEqual(connection.responses()[0].status, status)
            self.assertEqual(self.peers.requests[0][:4], ("close", OTHER_ID, "a/../b", 9))

    def test_local_client(self):
        self.sessions.add("x")
        self.assertEqual(self.delete(), (204, None))
        self.assertEqual((self.peers.requests, self.sessions.closed[0][0]), ([], "x"))

    def test_local_session_and_newer_remote_row(self):
        """The client has moved, and this node does not know it yet."""
        self.sessions.add("x")
        self.registry.add("x")
        self.peers.results.append(True)
        self.assertEqual(self.delete(), (204, None))
        self.assertEqual((self.peers.requests, self.sessions.closed[0][0]), ([self.closed()], "x"))

    def test_unknown_client(self):
        self.assertEqual(self.delete(), (404, "not_connected"))

    def not_found_after(self, move_client):
        """Let the peer respond that it does not hold the client, which moves meanwhile."""

        def move(_):
            move_client()
            return False

        result = Deferred()
        result.addCallback(move)
        self.peers.results.append(result)
        return result

    def test_client_moves_to_a_third_node(self):
        self.registry.add("x")
        result = self.not_found_after(lambda: self.registry.add("x", "third", 10))
        self.peers.results.append(True)
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        result.callback(None)
        self.assertEqual(connection.responses()[0].status, 204)
        self.assertEqual(self.peers.requests, [self.closed(), self.closed("third", 10)])

    def test_client_moves_here(self):
        def come():
            self.registry.add("x", NODE_ID, 10)
            self.sessions.add("x", 10)

        self.registry.add("x")
        result = self.not_found_after(come)
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        result.callback(None)
        self.assertEqual(connection.responses()[0].status, 204)
        self.assertEqual(self.sessions.closed[0][0], "x")

    def test_peer_does_not_hold_the_client(self):
        """One more lookup follows."""
        self.registry.add("x")
        self.peers.results += [False, False, True]
        self.assertEqual(self.delete(), (404, "not_connected"))
        self.assertEqual(self.registry.queries, [("find", "x")] * 2)

    def test_row_of_this_node_without_a_session(self):
        self.registry.add("x", NODE_ID)
        self.assertEqual(self.delete(), (404, "not_connected"))

    def test_peer_is_unreachable(self):
        self.registry.add("x")
        self.peers.results.append(PeerUnreachableError("peer.close: it was silent"))
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertIn("node other, which did not disconnect it: it was silent", response.json["message"])

    def test_peer_refuses_connections(self):
        self.registry.add("x")
        self.peers.results += [PeerUnreachableError("refused", refused=True)] * 2
        self.assertEqual(self.delete(), (404, "not_connected"))

    def test_dead_node(self):
        self.registry.add("x", live=False)
        self.assertEqual(self.delete(), (404, "not_connected"))
        self.assertEqual(self.peers.requests, [])

    def test_liveness_of_the_node_is_unknown(self):
        """A new node does not know whether that node is dead, but can ask it."""
        self.registry.add("x", live=False)
        self.endpoint.membership.stable = False
        self.peers.results += [PeerUnreachableError("silent"), True, False, False]
        self.assertEqual(self.delete(), (503, "registry"))
        self.assertEqual(self.delete(), (204, None))
        self.assertEqual(self.delete(), (404, "not_connected"))

    def test_registry_unavailable(self):
        self.registry.unavailable = True
        self.assertEqual(self.delete(), (503, "registry"))


class GatherNodesTests(SynchronousTestCase):
    def test_results_and_unreachable_nodes(self) -> None:
        away = PeerUnreachableError("away")
        pending: Deferred[int] = Deferred()
        gathered = Deferred.fromCoroutine(gather_nodes({"a": succeed(1), "b": fail(away), "c": pending}))
        self.assertNoResult(gathered)
        pending.callback(3)
        self.assertEqual(self.successResultOf(gathered), ({"a": 1, "c": 3}, {"b": away}))

    def test_other_errors_are_raised(self) -> None:
        gathered = Deferred.fromCoroutine(gather_nodes({"a": fail(ZeroDivisionError()), "b": succeed(1)}))
        self.failureResultOf(gathered, ZeroDivisionError)


class PeerErrorTextTests(SynchronousTestCase):
    def test_method_name_is_removed(self) -> None:
        for error, text in (
            ("peer.notify_prefix: it was silent", "it was silent"),
            ("peer.has: peer.has: twice", "peer.has: twice"),
            ("node n at ws://peer.example: no link", "node n at ws://peer.example: no link"),
            ("the method peer.drain: not found", "the method peer.drain: not found"),
        ):
            self.assertEqual(peer_error_text(PeerUnreachableError(error)), text)
