"""Where a client is, as whoever asks over HTTP sees it."""

from __future__ import annotations

from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import TestCase

from gateway.registry.interface import RegistryUnavailable
from tests.api.fakes import NODE_ID, OTHER_ID, Endpoint, request


class FindTests(TestCase):
    """One client."""

    def setUp(self):
        self.endpoint = Endpoint()

    def test_get_here(self):
        self.endpoint.edge.add("a/b")
        response = self.endpoint.ask("GET", "/v1/clients/a%2Fb")
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
        self.assertEqual(self.endpoint.registry.asked, [])

    def test_get_elsewhere(self):
        self.endpoint.registry.add("x")
        response = self.endpoint.ask("GET", "/v1/clients/x")
        self.assertEqual(response.json["node"], OTHER_ID)
        self.assertEqual(response.json["node_name"], "other")
        self.assertEqual(response.json["generation"], 9)
        self.assertEqual(response.json["connected_at"], "2023-11-14T22:13:21.000Z")
        self.assertEqual(response.json["address"], "[2001:db8::1]:80")

    def test_one_whose_node_has_not_been_heard_of(self):
        """Who has just come cannot tell whether it is dead; later it can."""
        self.endpoint.registry.add("x", live=False)
        self.endpoint.node.judges = False
        for method in ("GET", "DELETE"):
            response = self.endpoint.ask(method, "/v1/clients/x")
            self.assertEqual((response.status, response.json["error"]), (503, "registry"))
        self.endpoint.node.judges = True
        for method in ("GET", "DELETE"):
            self.assertEqual(self.endpoint.ask(method, "/v1/clients/x").status, 404)

    def test_get_nowhere(self):
        response = self.endpoint.ask("GET", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (404, "not_connected"))

    def test_a_row_of_this_node_is_no_connection(self):
        self.endpoint.registry.add("x", NODE_ID)
        self.assertEqual(self.endpoint.ask("GET", "/v1/clients/x").status, 404)


class PageTests(TestCase):
    """Many clients."""

    def setUp(self):
        self.endpoint = Endpoint()

    def test_page(self):
        for client_id in ("a", "b", "c"):
            self.endpoint.registry.add(client_id)
        first = self.endpoint.ask("GET", "/v1/clients?limit=2").json
        self.assertEqual([client["client_id"] for client in first["clients"]], ["a", "b"])
        self.assertEqual(
            set(first["clients"][0]), {"client_id", "node", "node_name", "generation", "connected_at", "address"}
        )
        self.assertEqual(first["next"], "b")
        second = self.endpoint.ask("GET", "/v1/clients?limit=2&after=b").json
        self.assertEqual([client["client_id"] for client in second["clients"]], ["c"])
        self.assertIsNone(second["next"])

    def test_a_full_last_page_has_no_next(self):
        for client_id in ("a", "b"):
            self.endpoint.registry.add(client_id)
        self.assertIsNone(self.endpoint.ask("GET", "/v1/clients?limit=2").json["next"])

    def test_what_is_asked_of_the_registry(self):
        self.endpoint.ask("GET", f"/v1/clients?after=a%2Fb&limit=5&node={NODE_ID}&prefix=a+")
        self.assertEqual(self.endpoint.registry.asked, [("clients", "a/b", 6, NODE_ID, "a+")])
        self.endpoint.ask("GET", "/v1/clients")
        self.assertEqual(self.endpoint.registry.asked[-1], ("clients", "", 101, None, ""))


class DisconnectTests(TestCase):
    """Disconnecting a client, wherever it is."""

    def setUp(self):
        self.endpoint = Endpoint()

    def test_delete(self):
        self.endpoint.edge.add("x")
        response = self.endpoint.ask("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.body), (204, b""))
        self.assertNotIn("content-length", response.headers)
        self.assertEqual(self.endpoint.edge.closed, [("x", 4003, "disconnected by an operator")])

    def test_delete_answers_when_the_row_is_gone(self):
        self.endpoint.edge.closing = Deferred()
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(connection.responses(), [])
        self.endpoint.edge.closing.callback(True)
        self.assertEqual(connection.responses()[0].status, 204)

    def test_delete_whose_row_cannot_be_removed(self):
        self.endpoint.edge.closing = fail(RegistryUnavailable("away"))
        response = self.endpoint.ask("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "registry"))

    def test_delete_waits_for_a_connection_that_opens(self):
        opening = self.endpoint.edge.openings["x"] = Deferred()
        connection = self.endpoint.connect()
        connection.send(request("DELETE", "/v1/clients/x"))
        self.assertEqual(self.endpoint.edge.closed, [])
        self.endpoint.edge.add("x")
        opening.callback(None)
        self.assertEqual(connection.responses()[0].status, 204)

    def test_delete_nowhere(self):
        self.assertEqual(self.endpoint.ask("DELETE", "/v1/clients/x").status, 404)

    def test_delete_elsewhere(self):
        self.endpoint.registry.add("x")
        response = self.endpoint.ask("DELETE", "/v1/clients/x")
        self.assertEqual((response.status, response.json["error"]), (503, "node"))
        self.assertIn("other", response.json["message"])
