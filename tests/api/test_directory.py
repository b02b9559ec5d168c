"""Where a client is, as whoever asks over HTTP sees it.

What every node is asked at once.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.api.directory import gather_nodes, peer_error_text
from gateway.cluster.errors import PeerUnreachableError
from gateway.registry.errors import RegistryUnavailableError
from tests.builders.http import request
from tests.fakes.api import NODE_ID, OTHER_ID, EndpointHarness, FakePeerClient


class FindTests(TestCase):
    """One client."""

    def setUp(self):
        self.endpoint = EndpointHarness()

    def test_get_here(self):
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

    def test_get_elsewhere(self):
        self.endpoint.registry.add("x")
        response = self.endpoint.request("GET", "/v1/clients/x")
        self.assertEqual(response.json["node"], OTHER_ID)
        self.assertEqual(response.json["node_name"], "other")
        self.assertEqual(response.json["generation"], 9)
        self.assertEqual(response.json["connected_at"], "2023-11-14T22:13:21.000Z")
        self.assertEqual(response.json["address"], "[2001:db8::1]:80")

    def test_one_whose_node_has_not_been_heard_of(self):
        """Who has just come cannot tell whether it is dead; later it can."""
        self.endpoint.registry.add("x", live=False)
        self.endpoint.membership.stable = False
        for method in ("GET", "DELETE"):
            response = self.endpoint.request(method, "/v1/clients/x")
            self.assertEqual((response.status, response.json["error"]), (503, "registry"))
        self.endpoint.membership.stable = True
        for method in ("GET", "DELETE"):
            self.assertEqual(self.endpoint.request(method, "/v1/clients/x").status, 404)

    def test_get_nowhere(self):
        response = self.endpoint.request("GET", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (404, "not_connected"))

    def test_a_row_of_this_node_is_no_connection(self):
        self.endpoint.registry.add("x", NODE_ID)
        self.assertEqual(self.endpoint.request("GET", "/v1/clients/x").status, 404)


class PageTests(TestCase):
    """Many clients."""

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

    def test_a_full_last_page_has_no_next(self):
        for client_id in ("a", "b"):
            self.endpoint.registry.add(client_id)
        self.assertIsNone(self.endpoint.request("GET", "/v1/clients?limit=2").json["next"])

    def test_what_is_asked_of_the_registry(self):
        self.endpoint.request("GET", f"/v1/clients?after=a%2Fb&limit=5&node={NODE_ID}&prefix=a+")
        self.assertEqual(self.endpoint.registry.queries, [("clients", "a/b", 6, NODE_ID, "a+")])
        self.endpoint.request("GET", "/v1/clients")
        self.assertEqual(self.endpoint.registry.queries[-1], ("clients", "", 101, None, ""))


class DisconnectTests(TestCase):
    """Disconnecting a client, wherever it is."""

    def setUp(self):
        self.endpoint = EndpointHarness()

    def test_delete(self):
        self.endpoint.sessions.add("x")
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.body), (204, b""))
        self.assertNotIn("content-length", response.headers)
        self.assertEqual(self.endpoint.sessions.closed, [("x", 4003, "disconnected by an operator")])

    def test_delete_answers_when_the_row_is_gone(self):
        self.endpoint.sessions.close_result = Deferred()
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(connection.responses(), [])
        self.endpoint.sessions.close_result.callback(True)
        self.assertEqual(connection.responses()[0].status, 204)

    def test_delete_whose_row_cannot_be_removed(self):
        self.endpoint.sessions.close_result = fail(RegistryUnavailableError("away"))
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "registry"))

    def test_delete_waits_for_a_connection_that_opens(self):
        opening = self.endpoint.sessions.claims["x"] = Deferred()
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(self.endpoint.sessions.closed, [])
        self.endpoint.sessions.add("x")
        opening.callback(None)
        self.assertEqual(connection.responses()[0].status, 204)

    def test_delete_nowhere(self):
        self.assertEqual(self.endpoint.request("DELETE", "/v1/clients/x").status, 404)

    def test_delete_elsewhere(self):
        self.endpoint.registry.add("x")
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertIn("other", response.json["message"])


class DisconnectRemoteTests(TestCase):
    """Disconnecting a client that another node has."""

    def setUp(self):
        self.peers = FakePeerClient()
        self.endpoint = EndpointHarness(peers=self.peers)
        self.edge, self.registry = self.endpoint.sessions, self.endpoint.registry

    def delete(self):
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        return response.status, response.json["error"] if response.body else None

    def closed(self, node_id=OTHER_ID, generation=9):
        return ("close", node_id, "x", generation, 4003, "disconnected by an operator")

    def test_there(self):
        self.registry.add("x")
        answer = Deferred()
        self.peers.results.append(answer)
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(connection.responses(), [])
        answer.callback(True)
        self.assertEqual(connection.responses()[0].status, 204)
        self.assertEqual(self.peers.requests, [self.closed()])

    def test_here(self):
        self.edge.add("x")
        self.assertEqual(self.delete(), (204, None))
        self.assertEqual((self.peers.requests, self.edge.closed[0][0]), ([], "x"))

    def test_here_and_there(self):
        """It has moved, and this node has not been told yet."""
        self.edge.add("x")
        self.registry.add("x")
        self.peers.results.append(True)
        self.assertEqual(self.delete(), (204, None))
        self.assertEqual((self.peers.requests, self.edge.closed[0][0]), ([self.closed()], "x"))

    def test_nowhere(self):
        self.assertEqual(self.delete(), (404, "not_connected"))

    def moving(self, location):
        """An answer that the node which is asked does not have it; when it comes, the client is elsewhere."""

        def move(_):
            location()
            return False

        answer = Deferred()
        answer.addCallback(move)
        self.peers.results.append(answer)
        return answer

    def test_it_has_moved_to_a_third_node(self):
        self.registry.add("x")
        answer = self.moving(lambda: self.registry.add("x", "third", 10))
        self.peers.results.append(True)
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        answer.callback(None)
        self.assertEqual(connection.responses()[0].status, 204)
        self.assertEqual(self.peers.requests, [self.closed(), self.closed("third", 10)])

    def test_it_has_moved_here(self):
        def come():
            self.registry.add("x", NODE_ID, 10)
            self.edge.add("x", 10)

        self.registry.add("x")
        answer = self.moving(come)
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        answer.callback(None)
        self.assertEqual(connection.responses()[0].status, 204)
        self.assertEqual(self.edge.closed[0][0], "x")

    def test_not_there(self):
        """After one fresh look-up."""
        self.registry.add("x")
        self.peers.results += [False, False, True]
        self.assertEqual(self.delete(), (404, "not_connected"))
        self.assertEqual(self.registry.queries, [("find", "x")] * 2)

    def test_a_row_of_this_node_is_no_connection(self):
        self.registry.add("x", NODE_ID)
        self.assertEqual(self.delete(), (404, "not_connected"))

    def test_unreachable(self):
        self.registry.add("x")
        self.peers.results.append(PeerUnreachableError("peer.close: it was silent"))
        response = self.endpoint.request("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertIn("node other, which did not disconnect it: it was silent", response.json["message"])

    def test_nobody_listens_there_any_more(self):
        self.registry.add("x")
        self.peers.results += [PeerUnreachableError("refused", refused=True)] * 2
        self.assertEqual(self.delete(), (404, "not_connected"))

    def test_a_dead_node(self):
        self.registry.add("x", live=False)
        self.assertEqual(self.delete(), (404, "not_connected"))
        self.assertEqual(self.peers.requests, [])

    def test_one_whose_node_has_not_been_heard_of(self):
        """Who has just come cannot tell whether it is dead, but it can be asked."""
        self.registry.add("x", live=False)
        self.endpoint.membership.stable = False
        self.peers.results += [PeerUnreachableError("silent"), True, False, False]
        self.assertEqual(self.delete(), (503, "registry"))
        self.assertEqual(self.delete(), (204, None))
        self.assertEqual(self.delete(), (404, "not_connected"))

    def test_without_a_registry(self):
        self.registry.unavailable = True
        self.assertEqual(self.delete(), (503, "registry"))


class GatherNodesTests(SynchronousTestCase):
    def test_who_answered_and_who_could_not_be_asked(self) -> None:
        away = PeerUnreachableError("away")
        waiting: Deferred[int] = Deferred()
        found = Deferred.fromCoroutine(gather_nodes({"a": succeed(1), "b": fail(away), "c": waiting}))
        self.assertNoResult(found)
        waiting.callback(3)
        self.assertEqual(self.successResultOf(found), ({"a": 1, "c": 3}, {"b": away}))

    def test_what_else_goes_wrong_is_not_hidden(self) -> None:
        found = Deferred.fromCoroutine(gather_nodes({"a": fail(ZeroDivisionError()), "b": succeed(1)}))
        self.failureResultOf(found, ZeroDivisionError)


class PeerErrorTextTests(SynchronousTestCase):
    def test_what_nodes_call_it_is_no_concern_of_backends(self) -> None:
        for problem, told in (
            ("peer.notify_prefix: it was silent", "it was silent"),
            ("peer.has: peer.has: twice", "peer.has: twice"),
            ("node n at ws://peer.example: no link", "node n at ws://peer.example: no link"),
            ("the method peer.drain: not found", "the method peer.drain: not found"),
        ):
            self.assertEqual(peer_error_text(PeerUnreachableError(problem)), told)
