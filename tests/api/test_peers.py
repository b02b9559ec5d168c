"""What another node can ask over its link."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from gateway.api.peer_server import CLAIM_WITHIN, ILink
from gateway.protocol.errors import Kind
from gateway.registry.interface import RegistryUnavailable
from gateway.rpc.pending import Reply
from tests.api.case import BackendTestCase, LinkTestCase, call, note, nothing_is_sent_on
from tests.api.fakes import Endpoint, Link, peer_ok, rpc_error


class CallTests(LinkTestCase):
    """A client that is asked."""

    def asked(self):
        """What reached a client, and is taken from the list."""
        found = [what for _, what in self.hub.asked]
        self.hub.asked.clear()
        return found

    def test_interface(self):
        self.assertTrue(verifyObject(ILink, self.link.protocol._inner))

    def test_byte_for_byte(self):
        form = b'{"jsonrpc":"2.0","id":"u\\u00e9","method":"client.call","params":{"client":"x","generation":7,'
        self.link.tell(form + b'"method":"d\\u00e9","params":{"n": 1.500},"timeout":4.5}}')
        ((asked, what),) = self.hub.asked
        self.assertEqual(what, ("x", "d\xe9", b'{"n": 1.500}', 4.5))
        asked.settle(Reply(b"[ 1.0e2 ]", None))
        self.assertEqual(self.link.frames(), [(1, b'{"jsonrpc":"2.0","id":"u\\u00e9","result":[ 1.0e2 ]}')])

    def test_the_clients_own_error(self):
        self.call()
        self.hub.asked[0][0].settle(Reply(None, b'{"code": -32001, "message":"no"}'))
        answer = b'{"jsonrpc":"2.0","id":"u","error":{"code": -32001, "message":"no"},"from":"client"}'
        self.assertEqual(self.link.frames(), [(1, answer)])

    def test_errors_of_the_gateway(self):
        self.call()
        self.hub.asked[0][0].settle(rpc_error(Kind.CONNECTION_LOST))
        self.failed(-32003, sent=True)
        self.hub.problems.append(rpc_error(Kind.TOO_MANY_CALLS, detail="many"))
        self.call()
        self.assertEqual(self.failed(-32005), "many")

    def test_another_generation(self):
        """A newer one, too: the asker looks up afresh."""
        self.call(generation=6)
        self.failed(-32001)
        self.call(client="y")
        self.failed(-32001, "y")
        self.assertEqual(self.asked(), [])

    def test_an_older_connection_while_the_newer_is_claimed(self):
        self.edge.openings["x"] = Deferred()
        self.call(generation=8, timeout=5)
        self.clock.advance(1)
        self.assertEqual((self.link.heard(), self.asked()), ([], []))
        self.edge.opened("x", 8)
        self.assertEqual(self.asked(), [("x", "m", None, 4.0)])

    def test_one_that_was_told_to_go_is_waited_for(self):
        """Whoever asked looks then where it is."""
        arrival = self.hub.arrivals["x"] = Deferred()
        del self.edge.here["x"]
        self.call()
        self.assertEqual((self.link.heard(), self.asked()), ([], []))
        arrival.callback(None)
        self.failed(-32001)
        self.assertEqual(self.asked(), [])

    def test_one_that_was_told_to_go_is_not_waited_for_beyond_the_deadline(self):
        self.hub.here = False
        self.hub.arrivals["x"] = Deferred()
        self.call(timeout=2)
        self.clock.advance(2)
        self.failed(-32001)

    def test_an_older_connection_alone(self):
        self.call(generation=8)
        self.failed(-32001)
        self.assertEqual(self.asked(), [])

    def test_a_claim_under_way(self):
        for generation, reached in ((9, True), (10, False), (8, False), (0, False)):
            del self.edge.here["x"]
            self.edge.openings["x"] = Deferred()
            self.call(generation=9, timeout=5)
            self.clock.advance(1)
            self.assertEqual((self.link.heard(), self.asked()), ([], []))
            self.edge.opened("x", generation)
            if reached:
                self.assertEqual(self.asked(), [("x", "m", None, 4.0)])
            else:
                self.failed(-32001)
            self.edge.add("x")
        self.assertEqual(self.asked(), [])

    def test_a_claim_that_takes_too_long(self):
        del self.edge.here["x"]
        opening = self.edge.openings["x"] = Deferred()
        self.call(timeout=2)
        self.clock.advance(2)
        self.failed(-32001)
        opening.callback(None)
        self.assertEqual((self.link.heard(), self.asked()), ([], []))

    def test_a_connection_that_turns_out_to_be_dead(self):
        self.hub.here = False
        self.call()
        self.failed(-32001)
        self.assertEqual((self.link.protocol._inner._work, self.link.protocol._inner._asked), (set(), {}))

    def test_without_the_lease(self):
        self.node.leased = False
        self.call()
        self.assertIn("lease", self.failed(-32007))
        self.call(stale=False)
        self.failed(-32007)
        self.call(client="y")
        self.failed(-32001, "y")
        self.assertEqual(self.asked(), [])
        self.call(stale=True)
        self.assertEqual(len(self.asked()), 1)

    def test_the_lease_is_lost_meanwhile(self):
        del self.edge.here["x"]
        self.edge.openings["x"] = Deferred()
        self.call()
        self.node.leased = False
        self.edge.opened("x")
        self.failed(-32007)

    def test_time_outs(self):
        del self.edge.here["x"]
        for given_timeout, taken in ((None, 30), (1000, 300)):
            self.edge.openings["x"] = Deferred()
            self.call(timeout=given_timeout)
            self.edge.opened("x")
            self.assertEqual(self.asked(), [("x", "m", None, float(taken))])
            del self.edge.here["x"]

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
            self.link.tell(call("u", "client.call", params))
            self.assertIn(named, self.failed(-32602, client))
        self.assertEqual(self.asked(), [])


class NotifyTests(LinkTestCase):
    """A client that is told."""

    def notify(self, client="x", generation=7, **more):
        params = {"client": client, "generation": generation, "method": "m", **more}
        self.link.tell(call("u", "client.notify", params))

    def test_told(self):
        self.notify(params=[3])
        self.assertEqual(self.link.heard(), [{"jsonrpc": "2.0", "id": "u", "result": None}])
        self.assertEqual(self.hub.told, [("x", "m", b"[3]")])

    def test_another_generation(self):
        self.notify(generation=6)
        self.failed(-32001)
        self.notify("y")
        self.failed(-32001, "y")
        self.assertEqual(self.hub.told, [])

    def test_a_claim_under_way(self):
        del self.edge.here["x"]
        self.edge.openings["x"] = Deferred()
        self.notify()
        self.assertEqual(self.link.heard(), [])
        self.edge.opened("x")
        self.assertEqual([answer["result"] for answer in self.link.heard()], [None])
        self.assertEqual(self.hub.told, [("x", "m", None)])

    def test_without_the_lease(self):
        self.node.leased = False
        self.notify()
        self.failed(-32007)
        self.notify(stale=True)
        self.assertEqual([answer["result"] for answer in self.link.heard()], [None])

    def test_errors(self):
        self.hub.problems.append(rpc_error(Kind.TOO_LARGE))
        self.notify()
        self.failed(-32006)
        self.hub.here = False
        self.notify()
        self.failed(-32001)

    def test_without_an_id(self):
        self.link.tell(note("client.notify", {"client": "x", "generation": 7, "method": "m"}))
        self.link.tell(note("client.notify", {"client": "x", "generation": 6, "method": "m"}))
        self.assertEqual((self.link.heard(), len(self.hub.told)), ([], 1))


class CancelTests(LinkTestCase):
    """A caller that has gone away from the other node."""

    def cancel(self, id="u", link=None):
        (link or self.link).tell(note("peer.cancel", {"id": id}))

    def test_a_call_in_flight(self):
        self.call("u")
        self.call("v")
        self.cancel("u")
        self.assertEqual(self.hub.forgotten, [self.hub.asked[0][0]])
        self.cancel("u")
        self.hub.asked[1][0].settle(Reply(b"1", None))
        self.cancel("v")
        self.assertEqual(len(self.hub.forgotten), 1)
        self.assertEqual([answer["id"] for answer in self.link.heard()], ["v"])

    def test_a_call_that_waits(self):
        del self.edge.here["x"]
        self.edge.openings["x"] = Deferred()
        self.call("u")
        self.cancel("u")
        self.assertEqual(self.edge.waiters, [])
        self.assertEqual((self.link.heard(), self.hub.asked), ([], []))
        self.assertEqual((self.link.protocol._inner._work, self.link.protocol._inner._asked), (set(), {}))
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_a_call_that_waited(self):
        del self.edge.here["x"]
        self.edge.openings["x"] = Deferred()
        self.call("u")
        self.edge.opened("x")
        self.cancel("u")
        self.assertEqual(self.hub.forgotten, [self.hub.asked[0][0]])
        self.assertEqual(self.link.heard(), [])
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_only_its_own(self):
        other = Link(self.endpoint, "another")
        self.call("u")
        self.cancel("u", other)
        self.assertEqual(self.hub.forgotten, [])

    def test_an_id_is_compared_as_it_came(self):
        self.call(1)
        for id in ("1", None, 1.0):
            self.cancel(id)
        self.assertEqual(self.hub.forgotten, [])
        self.link.tell(b'{"jsonrpc":"2.0","id":5,"method":"peer.cancel","params":{"id": 1 }}')
        self.assertEqual(self.link.heard(), [{"jsonrpc": "2.0", "id": 5, "result": None}])
        self.assertEqual(len(self.hub.forgotten), 1)


class NodeTests(LinkTestCase):
    """What is asked of the node itself."""

    def result(self, method, params=None):
        response = self.asked(method, params)
        self.assertNotIn("error", response)
        return response["result"]

    def test_has(self):
        """It does not wait for a claim."""
        self.assertIs(self.result("peer.has", {"client": "x", "generation": 7}), True)
        for client, generation in (("x", 6), ("x", 8), ("y", 7)):
            self.assertIs(self.result("peer.has", {"client": client, "generation": generation}), False)
        for why in ("draining", "registry", "starting"):
            self.node.why = why
            self.assertIs(self.result("peer.has", {"client": "x", "generation": 7}), False)

    def close(self, generation=7):
        params = {"client": "x", "generation": generation, "code": 4003, "reason": "why"}
        self.link.tell(call("u", "peer.close", params))
        return [answer["result"] for answer in self.link.heard()]

    def test_close(self):
        self.assertEqual(self.close(6), [False])
        self.assertEqual(self.close(7), [True])
        self.assertEqual(self.close(7), [False])
        self.assertEqual(self.edge.closed, [("x", 4003, "why")])

    def test_close_with_1012_is_no_close_but_a_wish(self):
        """Whoever relays a client's bytes ends: the client is told to come by another way."""
        params = {"client": "x", "generation": 7, "code": 1012, "reason": "drain"}
        self.assertIs(self.result("peer.close", params), True)
        self.assertIs(self.result("peer.close", {**params, "generation": 6}), False)
        self.assertEqual((self.edge.closed, self.node.away), ([], [("x", 7, "drain")]))

    def test_close_answers_when_the_row_is_gone(self):
        self.edge.closing = Deferred()
        self.assertEqual(self.close(), [])
        self.edge.closing.callback(True)
        self.assertEqual([answer["result"] for answer in self.link.heard()], [True])

    def test_close_whose_row_cannot_be_removed(self):
        self.edge.closing = fail(RegistryUnavailable("away"))
        self.link.tell(call("u", "peer.close", {"client": "x", "generation": 7, "code": 4003, "reason": ""}))
        self.assertIn("row", self.failed(-32007, sent=True))

    def test_close_waits_for_a_connection_that_opens(self):
        del self.edge.here["x"]
        self.edge.openings["x"] = Deferred()
        self.assertEqual(self.close(), [])
        self.edge.opened("x")
        self.assertEqual([answer["result"] for answer in self.link.heard()], [True])
        self.edge.openings["x"] = Deferred()
        self.assertEqual(self.close(), [])
        self.clock.advance(CLAIM_WITHIN)
        self.assertEqual([answer["result"] for answer in self.link.heard()], [False])

    def test_moved(self):
        moved = {"client": "x", "generation": 8, "node": "n"}
        self.assertIsNone(self.result("peer.moved", moved))
        self.assertEqual(self.edge.moved, [("x", 8)])
        self.assertIsNone(self.result("peer.taken_back", moved))
        self.assertEqual(self.edge.restored, [("x", 8)])

    def test_notify_prefix(self):
        self.assertEqual(self.result("peer.notify_prefix", {"prefix": "a/", "method": "m"}), {"reached": 3})
        self.assertEqual(self.result("peer.notify_prefix", {"prefix": "", "method": "m", "params": [1]})["reached"], 3)
        self.assertEqual(self.hub.prefixes, [("a/", "m", None), ("", "m", b"[1]")])
        self.hub.prefix_outcome = rpc_error(Kind.INVALID_REQUEST, None)
        self.link.tell(call("u", "peer.notify_prefix", {"prefix": "", "method": "gateway.x"}))
        self.failed(-32600, None)

    def test_drain(self):
        """It answers when that has begun."""
        self.assertIsNone(self.result("peer.drain", {}))
        self.assertEqual(self.node.drains, 1)
        self.node.draining.errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_what_backends_may(self):
        for method in ("client.get", "events.subscribe", "upstream.serve", "gateway.goaway", "peer.nothing", ""):
            self.link.tell(call("u", method, {"client": "x", "kinds": ["message"]}))
            self.assertIn("peer.has", self.failed(-32601, None))
        self.endpoint.upstream.message("x", "m", None)
        self.assertEqual(self.link.heard(), [])


class BackendTests(BackendTestCase):
    def test_what_nodes_may(self):
        for method in (*OF_NODES, "drain", "rebalance"):
            params = {"client": "x", "generation": 7, "code": 4003, "reason": "", "prefix": "", "method": "m", "id": 1}
            self.assertNotIn("peer.", self.error(self.asked(f"peer.{method}", params), -32601))
        self.assertEqual((self.endpoint.node.drains, self.hub.prefixes, self.endpoint.edge.closed), (0, [], []))


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
        endpoint = Endpoint(peer_ok=peer_ok)
        endpoint.edge.add("x")
        link = Link(endpoint)
        link.tell(msgspec.json.encode(call("u", method, params)))
        endpoint.clock.advance(CLAIM_WITHIN)
        (response,) = link.heard()
        self.assertEqual(response["id"], "u")
        self.assertIn(response.get("error", {}).get("code"), (None, -32602, -32001))
        self.assertTrue(nothing_is_sent_on(endpoint.hub))
