"""What another node can ask over its link.

What another node can ask of the balance of this one.
"""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from gateway.api.peer_server import CLAIM_TIMEOUT, IPeerConnection
from gateway.protocol.errors import ErrorKind
from gateway.registry.errors import RegistryUnavailableError
from gateway.rpc.pending import Reply
from tests.builders.api_case import BackendTestCase, PeerConnectionTestCase, call, nothing_forwarded, notification
from tests.fakes.api import EndpointHarness, PeerWebSocket, authenticate_peer, rpc_error
from tests.fakes.cluster import FakeRebalancer


class CallTests(PeerConnectionTestCase):
    """A client that is asked."""

    def asked(self):
        """What reached a client, and is taken from the list."""
        found = [what for _, what in self.hub.session_calls]
        self.hub.session_calls.clear()
        return found

    def test_interface(self):
        self.assertTrue(verifyObject(IPeerConnection, self.peer.protocol._protocol))

    def test_byte_for_byte(self):
        form = b'{"jsonrpc":"2.0","id":"u\\u00e9","method":"client.call","params":{"client":"x","generation":7,'
        self.peer.send_message(form + b'"method":"d\\u00e9","params":{"n": 1.500},"timeout":4.5}}')
        ((asked, what),) = self.hub.session_calls
        self.assertEqual(what, ("x", "d\xe9", b'{"n": 1.500}', 4.5))
        asked.complete(Reply(b"[ 1.0e2 ]", None))
        self.assertEqual(self.peer.frames(), [(1, b'{"jsonrpc":"2.0","id":"u\\u00e9","result":[ 1.0e2 ]}')])

    def test_the_clients_own_error(self):
        self.call()
        self.hub.session_calls[0][0].complete(Reply(None, b'{"code": -32001, "message":"no"}'))
        answer = b'{"jsonrpc":"2.0","id":"u","error":{"code": -32001, "message":"no"},"from":"client"}'
        self.assertEqual(self.peer.frames(), [(1, answer)])

    def test_errors_of_the_gateway(self):
        self.call()
        self.hub.session_calls[0][0].complete(rpc_error(ErrorKind.CONNECTION_LOST))
        self.assert_failed(-32003, sent=True)
        self.hub.errors.append(rpc_error(ErrorKind.TOO_MANY_CALLS, detail="many"))
        self.call()
        self.assertEqual(self.assert_failed(-32005), "many")

    def test_another_generation(self):
        """A newer one, too: the asker looks up afresh."""
        self.call(generation=6)
        self.assert_failed(-32001)
        self.call(client="y")
        self.assert_failed(-32001, "y")
        self.assertEqual(self.asked(), [])

    def test_an_older_connection_while_the_newer_is_claimed(self):
        self.sessions.claims["x"] = Deferred()
        self.call(generation=8, timeout=5)
        self.clock.advance(1)
        self.assertEqual((self.peer.messages(), self.asked()), ([], []))
        self.sessions.finish_claim("x", 8)
        self.assertEqual(self.asked(), [("x", "m", None, 4.0)])

    def test_one_that_was_told_to_go_is_waited_for(self):
        """Whoever asked looks then where it is."""
        arrival = self.hub.handoffs["x"] = Deferred()
        del self.sessions.clients["x"]
        self.call()
        self.assertEqual((self.peer.messages(), self.asked()), ([], []))
        arrival.callback(None)
        self.assert_failed(-32001)
        self.assertEqual(self.asked(), [])

    def test_one_that_was_told_to_go_is_not_waited_for_beyond_the_deadline(self):
        self.hub.accepts_session_calls = False
        self.hub.handoffs["x"] = Deferred()
        self.call(timeout=2)
        self.clock.advance(2)
        self.assert_failed(-32001)

    def test_an_older_connection_alone(self):
        self.call(generation=8)
        self.assert_failed(-32001)
        self.assertEqual(self.asked(), [])

    def test_a_claim_under_way(self):
        for generation, reached in ((9, True), (10, False), (8, False), (0, False)):
            del self.sessions.clients["x"]
            self.sessions.claims["x"] = Deferred()
            self.call(generation=9, timeout=5)
            self.clock.advance(1)
            self.assertEqual((self.peer.messages(), self.asked()), ([], []))
            self.sessions.finish_claim("x", generation)
            if reached:
                self.assertEqual(self.asked(), [("x", "m", None, 4.0)])
            else:
                self.assert_failed(-32001)
            self.sessions.add("x")
        self.assertEqual(self.asked(), [])

    def test_a_claim_that_takes_too_long(self):
        del self.sessions.clients["x"]
        opening = self.sessions.claims["x"] = Deferred()
        self.call(timeout=2)
        self.clock.advance(2)
        self.assert_failed(-32001)
        opening.callback(None)
        self.assertEqual((self.peer.messages(), self.asked()), ([], []))

    def test_a_connection_that_turns_out_to_be_dead(self):
        self.hub.accepts_session_calls = False
        self.call()
        self.assert_failed(-32001)
        self.assertEqual(
            (self.peer.protocol._protocol._in_progress, self.peer.protocol._protocol._requests_by_id), (set(), {})
        )

    def test_without_the_lease(self):
        self.endpoint.membership.lease_held = False
        self.call()
        self.assertIn("lease", self.assert_failed(-32007))
        self.call(stale=False)
        self.assert_failed(-32007)
        self.call(client="y")
        self.assert_failed(-32001, "y")
        self.assertEqual(self.asked(), [])
        self.call(stale=True)
        self.assertEqual(len(self.asked()), 1)

    def test_the_lease_is_lost_meanwhile(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.call()
        self.endpoint.membership.lease_held = False
        self.sessions.finish_claim("x")
        self.assert_failed(-32007)

    def test_time_outs(self):
        del self.sessions.clients["x"]
        for given_timeout, taken in ((None, 30), (1000, 300)):
            self.sessions.claims["x"] = Deferred()
            self.call(timeout=given_timeout)
            self.sessions.finish_claim("x")
            self.assertEqual(self.asked(), [("x", "m", None, float(taken))])
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
        self.assertEqual(self.asked(), [])


class NotifyTests(PeerConnectionTestCase):
    """A client that is told."""

    def notify(self, client="x", generation=7, **more):
        params = {"client": client, "generation": generation, "method": "m", **more}
        self.peer.send_message(call("u", "client.notify", params))

    def test_told(self):
        self.notify(params=[3])
        self.assertEqual(self.peer.messages(), [{"jsonrpc": "2.0", "id": "u", "result": None}])
        self.assertEqual(self.hub.session_notifications, [("x", "m", b"[3]")])

    def test_another_generation(self):
        self.notify(generation=6)
        self.assert_failed(-32001)
        self.notify("y")
        self.assert_failed(-32001, "y")
        self.assertEqual(self.hub.session_notifications, [])

    def test_a_claim_under_way(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.notify()
        self.assertEqual(self.peer.messages(), [])
        self.sessions.finish_claim("x")
        self.assertEqual([answer["result"] for answer in self.peer.messages()], [None])
        self.assertEqual(self.hub.session_notifications, [("x", "m", None)])

    def test_without_the_lease(self):
        self.endpoint.membership.lease_held = False
        self.notify()
        self.assert_failed(-32007)
        self.notify(stale=True)
        self.assertEqual([answer["result"] for answer in self.peer.messages()], [None])

    def test_errors(self):
        self.hub.errors.append(rpc_error(ErrorKind.TOO_LARGE))
        self.notify()
        self.assert_failed(-32006)
        self.hub.accepts_session_calls = False
        self.notify()
        self.assert_failed(-32001)

    def test_without_an_id(self):
        self.peer.send_message(notification("client.notify", {"client": "x", "generation": 7, "method": "m"}))
        self.peer.send_message(notification("client.notify", {"client": "x", "generation": 6, "method": "m"}))
        self.assertEqual((self.peer.messages(), len(self.hub.session_notifications)), ([], 1))


class CancelTests(PeerConnectionTestCase):
    """A caller that has gone away from the other node."""

    def cancel(self, id="u", link=None):
        (link or self.peer).send_message(notification("peer.cancel", {"id": id}))

    def test_a_call_in_flight(self):
        self.call("u")
        self.call("v")
        self.cancel("u")
        self.assertEqual(self.hub.cancelled_calls, [self.hub.session_calls[0][0]])
        self.cancel("u")
        self.hub.session_calls[1][0].complete(Reply(b"1", None))
        self.cancel("v")
        self.assertEqual(len(self.hub.cancelled_calls), 1)
        self.assertEqual([answer["id"] for answer in self.peer.messages()], ["v"])

    def test_a_call_that_waits(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.call("u")
        self.cancel("u")
        self.assertEqual(self.sessions.waiters, [])
        self.assertEqual((self.peer.messages(), self.hub.session_calls), ([], []))
        self.assertEqual(
            (self.peer.protocol._protocol._in_progress, self.peer.protocol._protocol._requests_by_id), (set(), {})
        )
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_a_call_that_waited(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.call("u")
        self.sessions.finish_claim("x")
        self.cancel("u")
        self.assertEqual(self.hub.cancelled_calls, [self.hub.session_calls[0][0]])
        self.assertEqual(self.peer.messages(), [])
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_only_its_own(self):
        other = PeerWebSocket(self.endpoint, "another")
        self.call("u")
        self.cancel("u", other)
        self.assertEqual(self.hub.cancelled_calls, [])

    def test_an_id_is_compared_as_it_came(self):
        self.call(1)
        for id in ("1", None, 1.0):
            self.cancel(id)
        self.assertEqual(self.hub.cancelled_calls, [])
        self.peer.send_message(b'{"jsonrpc":"2.0","id":5,"method":"peer.cancel","params":{"id": 1 }}')
        self.assertEqual(self.peer.messages(), [{"jsonrpc": "2.0", "id": 5, "result": None}])
        self.assertEqual(len(self.hub.cancelled_calls), 1)


class NodeTests(PeerConnectionTestCase):
    """What is asked of the node itself."""

    def result(self, method, params=None):
        response = self.request(method, params)
        self.assertNotIn("error", response)
        return response["result"]

    def test_has(self):
        """It does not wait for a claim."""
        self.assertIs(self.result("peer.has", {"client": "x", "generation": 7}), True)
        for client, generation in (("x", 6), ("x", 8), ("y", 7)):
            self.assertIs(self.result("peer.has", {"client": client, "generation": generation}), False)
        for why in ("draining", "registry", "starting"):
            self.node.not_ready_because = why
            self.assertIs(self.result("peer.has", {"client": "x", "generation": 7}), False)

    def close(self, generation=7):
        params = {"client": "x", "generation": generation, "code": 4003, "reason": "why"}
        self.peer.send_message(call("u", "peer.close", params))
        return [answer["result"] for answer in self.peer.messages()]

    def test_close(self):
        self.assertEqual(self.close(6), [False])
        self.assertEqual(self.close(7), [True])
        self.assertEqual(self.close(7), [False])
        self.assertEqual(self.sessions.closed, [("x", 4003, "why")])

    def test_close_with_1012_is_no_close_but_a_wish(self):
        """Whoever relays a client's bytes ends: the client is told to come by another way."""
        params = {"client": "x", "generation": 7, "code": 1012, "reason": "drain"}
        self.assertIs(self.result("peer.close", params), True)
        self.assertIs(self.result("peer.close", {**params, "generation": 6}), False)
        self.assertEqual((self.sessions.closed, self.node.sent_away), ([], [("x", 7, "drain")]))

    def test_close_answers_when_the_row_is_gone(self):
        self.sessions.close_result = Deferred()
        self.assertEqual(self.close(), [])
        self.sessions.close_result.callback(True)
        self.assertEqual([answer["result"] for answer in self.peer.messages()], [True])

    def test_close_whose_row_cannot_be_removed(self):
        self.sessions.close_result = fail(RegistryUnavailableError("away"))
        self.peer.send_message(call("u", "peer.close", {"client": "x", "generation": 7, "code": 4003, "reason": ""}))
        self.assertIn("row", self.assert_failed(-32007, sent=True))

    def test_close_waits_for_a_connection_that_opens(self):
        del self.sessions.clients["x"]
        self.sessions.claims["x"] = Deferred()
        self.assertEqual(self.close(), [])
        self.sessions.finish_claim("x")
        self.assertEqual([answer["result"] for answer in self.peer.messages()], [True])
        self.sessions.claims["x"] = Deferred()
        self.assertEqual(self.close(), [])
        self.clock.advance(CLAIM_TIMEOUT)
        self.assertEqual([answer["result"] for answer in self.peer.messages()], [False])

    def test_moved(self):
        moved = {"client": "x", "generation": 8, "node": "n"}
        self.assertIsNone(self.result("peer.moved", moved))
        self.assertEqual(self.sessions.superseded_by, [("x", 8)])
        self.assertIsNone(self.result("peer.taken_back", moved))
        self.assertEqual(self.sessions.restored, [("x", 8)])

    def test_notify_prefix(self):
        self.assertEqual(self.result("peer.notify_prefix", {"prefix": "a/", "method": "m"}), {"reached": 3})
        self.assertEqual(self.result("peer.notify_prefix", {"prefix": "", "method": "m", "params": [1]})["reached"], 3)
        self.assertEqual(self.hub.prefix_notifications, [("a/", "m", None), ("", "m", b"[1]")])
        self.hub.prefix_result = rpc_error(ErrorKind.INVALID_REQUEST, None)
        self.peer.send_message(call("u", "peer.notify_prefix", {"prefix": "", "method": "gateway.x"}))
        self.assert_failed(-32600, None)

    def test_drain(self):
        """It answers when that has begun."""
        self.assertIsNone(self.result("peer.drain", {}))
        self.assertEqual(self.node.drain_count, 1)
        self.node.draining.errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_what_backends_may(self):
        for method in ("client.get", "events.subscribe", "upstream.serve", "gateway.goaway", "peer.nothing", ""):
            self.peer.send_message(call("u", method, {"client": "x", "kinds": ["message"]}))
            self.assertIn("peer.has", self.assert_failed(-32601, None))
        self.endpoint.upstream.message("x", "m", None)
        self.assertEqual(self.peer.messages(), [])


class BackendTests(BackendTestCase):
    def test_what_nodes_may(self):
        for method in (*OF_NODES, "drain", "rebalance"):
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
OF_NODES = ("cancel", "has", "has_room", "close", "moved", "taken_back", "notify_prefix")
METHODS = ("client.call", "client.notify", *(f"peer.{name}" for name in OF_NODES))


class PropertyTests(TestCase):
    @given(st.sampled_from(METHODS), any_params)
    @settings(max_examples=300, deadline=None)
    def test_any_params(self, method, params):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
        endpoint.sessions.add("x")
        link = PeerWebSocket(endpoint)
        link.send_message(msgspec.json.encode(call("u", method, params)))
        endpoint.clock.advance(CLAIM_TIMEOUT)
        (response,) = link.messages()
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
        for why in ("draining", "registry", "starting"):
            self.node.not_ready_because = why
            self.assertIs(self.result("peer.has_room"), False)

    def test_rebalance(self):
        balance = FakeRebalancer(moving=250)
        self.peer = self.backend = PeerWebSocket(
            EndpointHarness(authenticate_peer=authenticate_peer, rebalancer=balance)
        )
        self.assertEqual((self.result("peer.rebalance"), balance.runs), ({"moving": 250}, 1))

    def test_rebalance_where_it_is_off(self):
        for balance in (None, FakeRebalancer(rate=0.0)):
            self.peer = self.backend = PeerWebSocket(
                EndpointHarness(authenticate_peer=authenticate_peer, rebalancer=balance)
            )
            self.peer.send_message(call("u", "peer.rebalance", {}))
            self.assertIn("--rebalance-rate", self.assert_failed(-32600, None))
