"""Tests of the methods of gateway.api.peer_server."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from gateway.api.peer_server import CLAIM_TIMEOUT, RELEASE_TIMEOUT, IPeerConnection
from gateway.cluster.features import Feature
from gateway.protocol.errors import ErrorKind
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import SessionKey
from gateway.rpc.pending import Reply
from tests.builders.api_case import BackendTestCase, PeerConnectionTestCase, call, nothing_forwarded, notification
from tests.builders.endpoint import EndpointHarness, PeerWebSocket, rpc_error
from tests.fakes.api import NODE_ID, authenticate_peer
from tests.fakes.cluster import FakeRebalancer


def send_fence(peer):
    """Send a fence for client x, and take its response."""
    peer.send_message({"jsonrpc": "2.0", "id": "f", "method": "peer.fence", "params": {"client": "x"}})
    assert peer.messages() == [{"jsonrpc": "2.0", "id": "f", "result": None}]


class CallTests(PeerConnectionTestCase):
    """client.call."""

    def delivered(self):
        """Return the calls that reached a client since the last time."""
        calls = [call for _, call in self.dispatcher.session_calls]
        self.dispatcher.session_calls.clear()
        return calls

    def test_interface(self):
        self.assertTrue(verifyObject(IPeerConnection, self.peer.protocol._protocol))

    def test_byte_for_byte(self):
        form = b'{"jsonrpc":"2.0","id":"u\\u00e9","method":"client.call","params":{"client":"x","generation":7,'
        self.peer.send_message(form + b'"method":"d\\u00e9","params":{"n": 1.500},"timeout":4.5}}')
        ((pending, delivered),) = self.dispatcher.session_calls
        self.assertEqual(delivered, ("x", "d\xe9", b'{"n": 1.500}', 4.5))
        pending.complete(Reply(b"[ 1.0e2 ]", None))
        self.assertEqual(self.peer.frames(), [(1, b'{"jsonrpc":"2.0","id":"u\\u00e9","result":[ 1.0e2 ]}')])

    def test_error_of_the_client(self):
        self.call()
        self.dispatcher.session_calls[0][0].complete(Reply(None, b'{"code": -32001, "message":"no"}'))
        response = b'{"jsonrpc":"2.0","id":"u","error":{"code": -32001, "message":"no"},"from":"client"}'
        self.assertEqual(self.peer.frames(), [(1, response)])

    def test_errors_of_the_gateway(self):
        self.call()
        self.dispatcher.session_calls[0][0].complete(rpc_error(ErrorKind.CONNECTION_LOST))
        self.assert_failed(-32003, sent=True)
        self.dispatcher.errors.append(rpc_error(ErrorKind.TOO_MANY_CALLS, detail="many"))
        self.call()
        self.assertEqual(self.assert_failed(-32005), "many")

    def test_another_generation(self):
        """A newer one too: the caller looks the client up again."""
        self.call(generation=6)
        self.assert_failed(-32001)
        self.call(client="y")
        self.assert_failed(-32001, "y")
        self.assertEqual(self.delivered(), [])

    def test_older_session_while_the_newer_is_claimed(self):
        self.sessions.claims["x"] = Deferred()
        self.call(generation=8, timeout=5)
        self.clock.advance(1)
        self.assertEqual((self.peer.messages(), self.delivered()), ([], []))
        self.sessions.finish_claim("x", 8)
        self.assertEqual(self.delivered(), [("x", "m", None, 4.0)])

    def test_waits_for_a_handoff(self):
        """The caller then looks the client up again."""
        handoff = self.dispatcher.handoffs["x"] = Deferred()
        del self.sessions.clients["x"]
        self.call()
        self.assertEqual((self.peer.messages(), self.delivered()), ([], []))
        handoff.callback(None)
        self.assert_failed(-32001)
        self.assertEqual(self.delivered(), [])

    def test_waits_for_a_handoff_until_the_deadline(self):
        self.dispatcher.accepts_session_calls = False
        self.dispatcher.handoffs["x"] = Deferred()
        self.call(timeout=2)
        self.clock.advance(2)
        self.assert_failed(-32001)

    def test_older_session_without_a_claim(self):
        self.call(generation=8)
        self.assert_failed(-32001)
        self.assertEqual(self.delivered(), [])

    def test_waits_for_a_claim_in_progress(self):
        for generation, reached in ((9, True), (10, False), (8, False), (0, False)):
            del self.sessions.clients["x"]
            self.sessions.claims["x"] = Deferred()
            self.call(generation=9, timeout=5)
            self.clock.advance(1)
            self.assertEqual((self.peer.messages(), self.delivered()), ([], []))
            self.sessions.finish_claim("x", generation)
            if reached:
                self.assertEqual(self.delivered(), [("x", "m", None, 4.0)])
            else:
                self.assert_failed(-32001)
            self.sessions.add("x")
        self.assertEqual(self.delivered(), [])

    def test_waits_for_a_claim_until_the_deadline(self):
        del self.sessions.clients["x"]
        opening = self.sessions.claims["x"] = Deferred()
        self.call(timeout=2)
        self.clock.advance(2)
        self.assert_failed(-32001)
        opening.callback(None)
        self.assertEqual((self.peer.messages(), self.delivered()), ([], []))

    def test_dead_session(self):
        self.dispatcher.accepts_session_calls = False
        self.call()
        self.assert_failed(-32001)
        self.assertEqual(
            (self.peer.protocol._protocol._in_progress, self.peer.protocol._protocol._requests_by_id), ({}, {})
        )

    def test_without_the_lease(self):
        self.endpoint.membership.lease_held = False
        self.call()
        self.assertIn("lease", self.assert_failed(-32007))
        self.call(stale=False)
        self.assert_failed(-32007)
        self.call(client="y")
        self.assert_failed(-32001, "y")
        self.assertEqual(self.delivered(), [])
        send_fence(self.peer)
        self.call(stale=True)
        self.assertEqual(len(self.delivered()), 1)

    def test_lease_is_lost_during_the_claim(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.call()
        self.endpoint.membership.lease_held = False
        self.sessions.finish_claim("x")
        self.assert_failed(-32007)

    def test_timeouts(self):
        del self.sessions.clients["x"]
        for timeout, effective in ((None, 30), (1000, 300)):
            self.sessions.claims["x"] = Deferred()
            self.call(timeout=timeout)
            self.sessions.finish_claim("x")
            self.assertEqual(self.delivered(), [("x", "m", None, float(effective))])
            del self.sessions.clients["x"]

    def test_bad_params(self):
        good = {"client": "x", "generation": 7, "method": "m"}
        for params, named, client in (
            (None, "client", None),
            ([], "object", None),
            ({**good, "client": "a b"}, "client", None),
            ({"client": "x", "method": "m"}, "generation", None),
            ({**good, "generation": 0}, "generation", None),
            ({**good, "generation": 7.5}, "generation", None),
            ({**good, "generation": "7"}, "generation", None),
            ({**good, "method": None}, "method", None),
            ({**good, "params": 1}, "params", "x"),
            ({**good, "timeout": 0}, "timeout", None),
            ({**good, "timeout": "5"}, "timeout", None),
            ({**good, "stale": 1}, "stale", None),
        ):
            self.peer.send_message(call("u", "client.call", params))
            self.assertIn(named, self.assert_failed(-32602, client))
        self.assertEqual(self.delivered(), [])


class OrderTests(PeerConnectionTestCase):
    """Messages of one peer to one client, while the first of them waits for the client's claim."""

    def setUp(self):
        super().setUp()
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.request("a", "client.notify", {"client": "x", "generation": 9, "method": "first"})

    def request(self, id, method, params):
        self.peer.send_message({"jsonrpc": "2.0", "id": id, "method": method, "params": params})

    def delivered(self):
        return [method for _, method, _ in self.dispatcher.session_notifications]

    def test_later_messages_wait(self):
        self.request("b", "client.notify", {"client": "x", "generation": 9, "method": "second"})
        self.sessions.add("x", 9)
        self.request("c", "client.notify", {"client": "x", "generation": 9, "method": "third"})
        self.assertEqual(self.delivered(), [])
        self.sessions.claims.pop("x").callback(None)
        self.clock.pump([0, 0])
        self.assertEqual(self.delivered(), ["first", "second", "third"])
        self.assertEqual([message["id"] for message in self.peer.messages()], ["a", "b", "c"])
        self.request("d", "client.notify", {"client": "x", "generation": 9, "method": "fourth"})
        self.assertEqual(self.delivered()[-1], "fourth")

    def test_other_clients_do_not_wait(self):
        self.sessions.add("y", 7)
        self.request("b", "client.notify", {"client": "y", "generation": 7, "method": "other"})
        self.assertEqual(self.delivered(), ["other"])

    def test_fence_waits_for_what_came_before(self):
        self.request("b", "client.notify", {"client": "x", "generation": 8, "method": "second"})
        self.request("f", "peer.fence", {"client": "x"})
        self.request("g", "peer.fence", {"client": "y"})
        self.assertEqual(self.peer.messages(), [{"jsonrpc": "2.0", "id": "g", "result": None}])
        self.sessions.finish_claim("x", 9)
        self.clock.pump([0, 0])
        first, second, fence = self.peer.messages()
        self.assertEqual((first["id"], second["error"]["code"], fence["id"]), ("a", -32001, "f"))

    def test_request_that_is_cancelled_while_it_waits(self):
        self.request("b", "client.notify", {"client": "x", "generation": 9, "method": "second"})
        self.peer.send_message({"jsonrpc": "2.0", "method": "peer.cancel", "params": {"id": "b"}})
        self.request("c", "client.notify", {"client": "x", "generation": 9, "method": "third"})
        self.sessions.finish_claim("x", 9)
        self.clock.advance(0)
        self.assertEqual(self.delivered(), ["first", "third"])

    def test_first_one_is_cancelled(self):
        self.request("b", "client.notify", {"client": "x", "generation": 9, "method": "second"})
        self.peer.send_message({"jsonrpc": "2.0", "method": "peer.cancel", "params": {"id": "a"}})
        self.clock.advance(0)
        self.sessions.finish_claim("x", 9)
        self.assertEqual(self.delivered(), ["second"])

    def test_deadline_passes_while_it_waits(self):
        self.request("b", "client.call", {"client": "x", "generation": 9, "method": "second", "timeout": 1})
        self.clock.advance(2)
        self.sessions.finish_claim("x", 9)
        self.clock.advance(0)
        error = next(message["error"] for message in self.peer.messages() if message["id"] == "b")
        self.assertEqual((error["code"], error["data"]["sent"]), (-32004, False))
        self.assertEqual(self.dispatcher.session_calls, [])

    def test_peer_that_is_gone(self):
        self.request("b", "client.notify", {"client": "x", "generation": 9, "method": "second"})
        self.peer.disconnect()
        self.sessions.finish_claim("x", 9)
        self.assertEqual(self.delivered(), [])

    def test_bad_params(self):
        for params in ({}, {"client": "?"}, []):
            self.request("f", "peer.fence", params)
            (message,) = self.peer.messages()
            self.assertEqual(message["error"]["code"], -32602)


class RefusedClientTests(TestCase):
    """A node without its lease gives messages back, and renews the lease before the later ones arrive."""

    def setUp(self):
        self.endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
        self.endpoint.sessions.add("x", 7)
        self.endpoint.sessions.add("y", 7)
        self.endpoint.dispatcher.accepts_session_calls = True

    def connect(self, features):
        self.peer = PeerWebSocket(self.endpoint, features=features)
        self.endpoint.membership.lease_held = False
        self.assertEqual(self.notify(), -32007)
        self.endpoint.membership.lease_held = True

    def notify(self, client="x"):
        params = {"client": client, "generation": 7, "method": "m"}
        self.peer.send_message({"jsonrpc": "2.0", "id": "n", "method": "client.notify", "params": params})
        (message,) = self.peer.messages()
        return message["error"]["code"] if "error" in message else message["result"]

    def test_later_messages_are_refused_until_a_fence(self):
        self.connect({Feature.FENCE})
        self.assertEqual([self.notify(), self.notify("y")], [-32007, None])
        send_fence(self.peer)
        self.assertIsNone(self.notify())

    def test_older_peer_sends_no_fence(self):
        self.connect(frozenset())
        self.assertIsNone(self.notify())


class NotifyTests(PeerConnectionTestCase):
    """client.notify."""

    def notify(self, client="x", generation=7, **more):
        params = {"client": client, "generation": generation, "method": "m", **more}
        self.peer.send_message(call("u", "client.notify", params))

    def test_delivered(self):
        self.notify(params=[3])
        self.assertEqual(self.peer.messages(), [{"jsonrpc": "2.0", "id": "u", "result": None}])
        self.assertEqual(self.dispatcher.session_notifications, [("x", "m", b"[3]")])

    def test_another_generation(self):
        self.notify(generation=6)
        self.assert_failed(-32001)
        self.notify("y")
        self.assert_failed(-32001, "y")
        self.assertEqual(self.dispatcher.session_notifications, [])

    def test_waits_for_a_claim_in_progress(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.notify()
        self.assertEqual(self.peer.messages(), [])
        self.sessions.finish_claim("x")
        self.assertEqual([response["result"] for response in self.peer.messages()], [None])
        self.assertEqual(self.dispatcher.session_notifications, [("x", "m", None)])

    def test_without_the_lease(self):
        self.endpoint.membership.lease_held = False
        self.notify()
        self.assert_failed(-32007)
        send_fence(self.peer)
        self.notify(stale=True)
        self.assertEqual([response["result"] for response in self.peer.messages()], [None])

    def test_errors(self):
        self.dispatcher.errors.append(rpc_error(ErrorKind.TOO_LARGE))
        self.notify()
        self.assert_failed(-32006)
        self.dispatcher.accepts_session_calls = False
        self.notify()
        self.assert_failed(-32001)

    def test_without_an_id(self):
        self.peer.send_message(notification("client.notify", {"client": "x", "generation": 7, "method": "m"}))
        self.peer.send_message(notification("client.notify", {"client": "x", "generation": 6, "method": "m"}))
        self.assertEqual((self.peer.messages(), len(self.dispatcher.session_notifications)), ([], 1))


class CancelTests(PeerConnectionTestCase):
    """peer.cancel."""

    def cancel(self, id="u", peer=None):
        (peer or self.peer).send_message(notification("peer.cancel", {"id": id}))

    def test_call_in_flight(self):
        self.call("u")
        self.call("v")
        self.cancel("u")
        self.assertEqual(self.dispatcher.cancelled_calls, [self.dispatcher.session_calls[0][0]])
        self.cancel("u")
        self.dispatcher.session_calls[1][0].complete(Reply(b"1", None))
        self.cancel("v")
        self.assertEqual(len(self.dispatcher.cancelled_calls), 1)
        self.assertEqual([response["id"] for response in self.peer.messages()], ["v"])

    def test_call_that_waits_for_a_claim(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.call("u")
        self.cancel("u")
        self.assertEqual(self.sessions.waiters, [])
        self.assertEqual((self.peer.messages(), self.dispatcher.session_calls), ([], []))
        self.assertEqual(
            (self.peer.protocol._protocol._in_progress, self.peer.protocol._protocol._requests_by_id), ({}, {})
        )
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_call_after_its_claim(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.call("u")
        self.sessions.finish_claim("x")
        self.cancel("u")
        self.assertEqual(self.dispatcher.cancelled_calls, [self.dispatcher.session_calls[0][0]])
        self.assertEqual(self.peer.messages(), [])
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_request_of_another_peer(self):
        other = PeerWebSocket(self.endpoint, "another")
        self.call("u")
        self.cancel("u", other)
        self.assertEqual(self.dispatcher.cancelled_calls, [])

    def test_ids_are_compared_as_raw_bytes(self):
        self.call(1)
        for id in ("1", None, 1.0):
            self.cancel(id)
        self.assertEqual(self.dispatcher.cancelled_calls, [])
        self.peer.send_message(b'{"jsonrpc":"2.0","id":5,"method":"peer.cancel","params":{"id": 1 }}')
        self.assertEqual(self.peer.messages(), [{"jsonrpc": "2.0", "id": 5, "result": None}])
        self.assertEqual(len(self.dispatcher.cancelled_calls), 1)


class NodeTests(PeerConnectionTestCase):
    """Methods about the node and its sessions."""

    def result(self, method, params=None):
        response = self.request(method, params)
        self.assertNotIn("error", response)
        return response["result"]

    def test_has(self):
        """Does not wait for a claim."""
        self.assertIs(self.result("peer.has", {"client": "x", "generation": 7}), True)
        for client, generation in (("x", 6), ("x", 8), ("y", 7)):
            self.assertIs(self.result("peer.has", {"client": client, "generation": generation}), False)
        for reason in ("draining", "registry", "starting"):
            self.node.not_ready_reason = reason
            self.assertIs(self.result("peer.has", {"client": "x", "generation": 7}), False)

    def test_session_that_is_not_here_has_its_row_removed(self):
        """Whichever method asks about it: the peer has found the row in the registry."""
        rows, key = self.endpoint.registry.rows, SessionKey("y", 9)
        message = {"client": "y", "generation": 9, "method": "m"}
        for method, params, code in (
            ("peer.has", {"client": "y", "generation": 9}, None),
            ("peer.close", {"client": "y", "generation": 9, "code": 4003, "reason": ""}, None),
            ("client.call", message, -32001),
            ("client.notify", message, -32001),
        ):
            self.endpoint.registry.add("y", NODE_ID, 9)
            response = self.request(method, params)
            self.assertEqual(response.get("error", {"code": None})["code"], code)
            self.assertEqual(rows, {}, method)
        self.assertEqual(self.endpoint.orphaned_rows.checked, [key] * 4)

    def test_response_waits_for_the_row_of_a_session_that_is_not_here(self):
        """The peer may look the client up again."""
        for method, params in (
            ("peer.has", {"client": "y", "generation": 9}),
            ("peer.close", {"client": "y", "generation": 9, "code": 4003, "reason": ""}),
        ):
            for outcome in (True, None):
                self.endpoint.orphaned_rows.result = checking = Deferred()
                self.peer.send_message(call("u", method, params))
                self.clock.advance(RELEASE_TIMEOUT / 2)
                self.assertEqual(self.peer.messages(), [])
                if outcome:
                    checking.callback(True)
                else:
                    self.clock.advance(RELEASE_TIMEOUT / 2)
                self.assertEqual([response["result"] for response in self.peer.messages()], [False])

    def close(self, generation=7):
        params = {"client": "x", "generation": generation, "code": 4003, "reason": "why"}
        self.peer.send_message(call("u", "peer.close", params))
        return [response["result"] for response in self.peer.messages()]

    def test_close(self):
        self.assertEqual(self.close(6), [False])
        self.assertEqual(self.close(7), [True])
        self.assertEqual(self.close(7), [False])
        self.assertEqual(self.sessions.closed, [("x", 4003, "why")])

    def test_close_of_a_former_client_id(self):
        """The registry has a row that an operator removes."""
        self.endpoint.registry.add("a//b", NODE_ID, 9)
        params = {"client": "a//b", "generation": 9, "code": 4003, "reason": ""}
        self.assertIs(self.result("peer.close", params), False)
        self.assertEqual(self.endpoint.registry.rows, {})
        self.assertEqual(self.request("peer.close", {**params, "client": "a b"})["error"]["code"], -32602)

    def test_close_with_1012_sends_goaway(self):
        """The peer that relays the client drains: the client is to reconnect."""
        params = {"client": "x", "generation": 7, "code": 1012, "reason": "drain"}
        self.assertIs(self.result("peer.close", params), True)
        self.assertIs(self.result("peer.close", {**params, "generation": 6}), False)
        self.assertEqual((self.sessions.closed, self.node.goaways), ([], [("x", 7, "drain")]))

    def test_close_responds_once_the_row_is_gone(self):
        self.sessions.close_result = Deferred()
        self.assertEqual(self.close(), [])
        self.sessions.close_result.callback(True)
        self.assertEqual([response["result"] for response in self.peer.messages()], [True])

    def test_close_when_the_row_cannot_be_removed(self):
        self.sessions.close_result = fail(RegistryUnavailableError("away"))
        self.peer.send_message(call("u", "peer.close", {"client": "x", "generation": 7, "code": 4003, "reason": ""}))
        self.assertIn("row", self.assert_failed(-32007, sent=True))

    def test_close_waits_for_a_claim_in_progress(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.assertEqual(self.close(), [])
        self.sessions.finish_claim("x")
        self.assertEqual([response["result"] for response in self.peer.messages()], [True])
        self.sessions.claims["x"] = Deferred()
        self.assertEqual(self.close(), [])
        self.clock.advance(CLAIM_TIMEOUT)
        self.assertEqual([response["result"] for response in self.peer.messages()], [False])

    def test_moved(self):
        moved = {"client": "x", "generation": 8, "node": "n"}
        self.assertIsNone(self.result("peer.moved", moved))
        self.assertEqual(self.sessions.superseded_by, [("x", 8)])
        self.assertIsNone(self.result("peer.taken_back", moved))
        self.assertEqual(self.sessions.restored, [("x", 8)])

    def test_notify_prefix(self):
        self.assertEqual(self.result("peer.notify_prefix", {"prefix": "a/", "method": "m"}), {"reached": 3})
        self.assertEqual(self.result("peer.notify_prefix", {"prefix": "", "method": "m", "params": [1]})["reached"], 3)
        self.assertEqual(self.dispatcher.prefix_notifications, [("a/", "m", None), ("", "m", b"[1]")])
        self.dispatcher.prefix_result = rpc_error(ErrorKind.INVALID_REQUEST, None)
        self.peer.send_message(call("u", "peer.notify_prefix", {"prefix": "", "method": "gateway.x"}))
        self.assert_failed(-32600, None)

    def test_drain(self):
        """Responds once the drain has begun."""
        self.assertIsNone(self.result("peer.drain", {}))
        self.assertEqual(self.node.drain_count, 1)
        self.node.draining.errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_floor(self):
        self.endpoint.registry.generation_floor = 5
        self.assertEqual(self.result("peer.floor", {"generation": 7}), {"generation": 7})
        self.assertEqual(self.result("peer.floor", {"generation": 6}), {"generation": 7})
        for generation in (-1, 2**63, "7", None):
            self.peer.send_message(
                {"jsonrpc": "2.0", "id": "f", "method": "peer.floor", "params": {"generation": generation}}
            )
            (message,) = self.peer.messages()
            self.assertEqual(message["error"]["code"], -32602)

    def test_methods_of_backends(self):
        for method in ("client.get", "events.subscribe", "upstream.serve", "gateway.goaway", "peer.nothing", ""):
            self.peer.send_message(call("u", method, {"client": "x", "kinds": ["message"]}))
            self.assertIn("peer.has", self.assert_failed(-32601, None))
        self.endpoint.upstream.message("x", "m", None)
        self.assertEqual(self.peer.messages(), [])


class BackendTests(BackendTestCase):
    def test_methods_of_peers(self):
        for method in (*PEER_METHODS, "drain", "rebalance"):
            params = {"client": "x", "generation": 7, "code": 4003, "reason": "", "prefix": "", "method": "m", "id": 1}
            self.assertNotIn("peer.", self.assert_error(self.request(f"peer.{method}", params), -32601))
        self.assertEqual(
            (self.endpoint.node.drain_count, self.dispatcher.prefix_notifications, self.endpoint.sessions.closed),
            (0, [], []),
        )


any_params = st.fixed_dictionaries(
    {},
    optional={
        "client": st.sampled_from(["x", "y", "a b", "", "x" * 200, "\xe9"]) | st.none(),
        "generation": st.sampled_from([7, 6, 0, -1, 2**70, 7.5, "7", None]),
        "method": st.text(max_size=3) | st.none(),
        "params": st.recursive(st.none() | st.integers(), st.lists),
        "timeout": st.floats(allow_nan=False) | st.none(),
        "stale": st.booleans() | st.none(),
        "code": st.integers(0, 6000),
        "reason": st.text(max_size=3),
        "prefix": st.text(max_size=3) | st.integers(),
        "node": st.text(max_size=3),
        "id": st.integers() | st.text(max_size=3),
    },
)
PEER_METHODS = ("cancel", "has", "has_room", "close", "moved", "taken_back", "notify_prefix")
METHODS = ("client.call", "client.notify", *(f"peer.{name}" for name in PEER_METHODS))


class PropertyTests(TestCase):
    @given(st.sampled_from(METHODS), any_params)
    @settings(max_examples=300, deadline=None)
    def test_any_params(self, method, params):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
        endpoint.sessions.add("x")
        peer = PeerWebSocket(endpoint)
        peer.send_message(msgspec.json.encode(call("u", method, params)))
        endpoint.clock.advance(CLAIM_TIMEOUT)
        (response,) = peer.messages()
        self.assertEqual(response["id"], "u")
        self.assertIn(response.get("error", {}).get("code"), (None, -32602, -32001))
        self.assertTrue(nothing_forwarded(endpoint.dispatcher))


class RebalanceTests(PeerConnectionTestCase):
    def result(self, method):
        return self.request(method, {})["result"]

    def test_has_room(self):
        self.assertIs(self.result("peer.has_room"), True)
        for number in range(98):
            self.sessions.add(f"c{number}")
        self.assertIs(self.result("peer.has_room"), True)
        self.sessions.add("last")
        self.assertIs(self.result("peer.has_room"), False)
        del self.sessions.clients["last"]
        for reason in ("draining", "registry", "starting"):
            self.node.not_ready_reason = reason
            self.assertIs(self.result("peer.has_room"), False)

    def test_rebalance(self):
        rebalancer = FakeRebalancer(moving=250)
        self.peer = self.backend = PeerWebSocket(
            EndpointHarness(authenticate_peer=authenticate_peer, rebalancer=rebalancer)
        )
        self.assertEqual((self.result("peer.rebalance"), rebalancer.runs), ({"moving": 250}, 1))

    def test_rebalance_is_off(self):
        for rebalancer in (None, FakeRebalancer(rate=0.0)):
            self.peer = self.backend = PeerWebSocket(
                EndpointHarness(authenticate_peer=authenticate_peer, rebalancer=rebalancer)
            )
            self.peer.send_message(call("u", "peer.rebalance", {}))
            self.assertIn("--rebalance-rate", self.assert_failed(-32600, None))
