"""Tests for :mod:`gateway.rpc.remote`: calls to clients that other nodes hold."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed

from gateway.protocol.errors import Kind, RpcError
from gateway.registry.interface import Location
from gateway.rpc.interface import Miss
from gateway.rpc.pending import Call, Reply
from tests.rpc.fakes import LEASE, SeekingTestCase, Told, elsewhere, result

REPLY = Reply(b"1", None)
UNREACHABLE = RpcError(Kind.NODE_UNREACHABLE, "x", sent=False)


class AtOnceTests(SeekingTestCase):
    """A location is remembered, and the link is open."""

    def setUp(self) -> None:
        super().setUp()
        self.know(elsewhere())

    def test_answered(self) -> None:
        call = self.asked_there()
        self.assertEqual(self.elsewhere.asked, [(elsewhere(), "m", b"[1]", 5.0, False)])
        self.assertEqual((call.outcomes, self.hub.calls_in_flight()), ([], 1))
        self.elsewhere.answers(REPLY)
        self.assertEqual((call.outcomes, self.counted()), ([REPLY], (1, 1, {})))
        self.assertEqual(self.registry.asked, [])
        self.assert_nothing_left()

    def test_error_of_the_client(self) -> None:
        reply = Reply(None, b'{"code":1,"message":"no"}')
        call = self.asked_there()
        self.elsewhere.answers(reply)
        self.assertEqual((call.outcomes, self.counted()), ([reply], (1, 1, {})))

    def test_as_a_deferred(self) -> None:
        call = self.hub.call("x", "m", None)
        self.assertEqual(self.elsewhere.asked, [(elsewhere(), "m", None, 30.0, False)])
        self.elsewhere.answers(REPLY)
        self.assertEqual((self.successResultOf(call), self.counted()), (REPLY, (1, 1, {})))

    def test_timeout_is_clamped(self) -> None:
        self.hub.ask(Told(), "x", "m", None, 1e9)
        self.assertEqual(self.elsewhere.asked[0][3], 300.0)

    def test_failed(self) -> None:
        """What the node says, or what becomes of the link, is passed on."""
        for kind, sent in (
            (Kind.TIMEOUT, True),
            (Kind.CONNECTION_LOST, True),
            (Kind.NODE_UNREACHABLE, True),
            (Kind.TOO_MANY_CALLS, False),
        ):
            self.know(elsewhere())
            call = self.asked_there()
            error = RpcError(kind, "x", sent=sent, detail="why")
            self.elsewhere.fails(error)
            self.assertIs(self.error_of(call), error)
            # Where the client is may no longer be true.
            doubted = kind in (Kind.CONNECTION_LOST, Kind.NODE_UNREACHABLE)
            self.assertEqual(self.remembered(), None if doubted else elsewhere())
        codes = {"-32002": 1, "-32003": 1, "-32004": 1, "-32005": 1}
        self.assertEqual(self.counted(), (4, 0, codes))
        self.assert_nothing_left()

    def test_not_possible_at_once(self) -> None:
        """Nothing is done."""
        self.elsewhere.open.clear()
        self.assertFalse(self.hub.ask(Told(), "x", "m", None))
        self.assertFalse(self.hub.ask(Told(), "y", "m", None))
        self.clock.advance(LEASE)
        self.elsewhere.open.add("other-node")
        self.assertFalse(self.hub.ask(Told(), "x", "m", None))
        self.hub.elsewhere = None
        self.assertFalse(self.hub.ask(Told(), "x", "m", None))
        self.assertEqual((self.counted(), self.registry.asked, self.elsewhere.asked), ((0, 0, {}), [], []))
        self.assert_nothing_left()

    def test_refused(self) -> None:
        for ask in (self.hub.ask, lambda call, *args: self.hub._seeking.seek(call, *args, 5.0)):
            for method, kind in (("gateway.x", Kind.INVALID_REQUEST), ("m" * 2000, Kind.TOO_LARGE)):
                with self.assertRaises(RpcError) as caught:
                    ask(Told(), "x", method, None)
                self.assertEqual((caught.exception.kind, caught.exception.sent), (kind, False))
        self.assertEqual(self.counted(), (4, 0, {"-32600": 2, "-32006": 2}))
        self.assertEqual(self.elsewhere.asked, [])
        self.assert_nothing_left()

    def test_this_node_is_going_away(self) -> None:
        """What is in flight goes on; clients that are here are called all the same."""
        self.hub.ask(Told(), "x", "m", None)
        self.hub.end()
        for client_id in ("x", "z"):
            error = self.error_of(self.hub.call(client_id, "m", None))
            self.assertEqual((error.kind, error.sent), (Kind.NODE_UNREACHABLE, False))
            error = self.error_of(self.hub.notify(client_id, "m", None))
            self.assertEqual((error.kind, error.sent), (Kind.NODE_UNREACHABLE, False))
        self.connect("y")
        self.assertTrue(self.hub.ask(Told(), "y", "m", None))
        self.assertEqual(self.hub.calls_in_flight(), 2)

    def test_too_many(self) -> None:
        """On this node, with those to clients that are here; and on the link."""
        self.connect("y")
        for _ in range(4):
            self.hub.ask(Told(), "y", "m", None)
            self.asked_there()
        for client_id in ("x", "y"):
            with self.assertRaises(RpcError) as caught:
                self.hub.ask(Told(), client_id, "m", None)
            self.assertEqual(caught.exception.kind, Kind.TOO_MANY_CALLS)
        self.assertEqual(self.error_of(self.hub.notify("z", "m", None)).kind, Kind.TOO_MANY_CALLS)
        self.elsewhere.answers(REPLY)
        self.elsewhere.pending.set_aside(5)
        with self.assertRaises(RpcError) as caught:
            self.hub.ask(Told(), "x", "m", None)
        self.assertEqual(caught.exception.kind, Kind.TOO_MANY_CALLS)
        self.assertEqual(self.counted(), (11, 1, {"-32005": 3}))
        self.assertEqual(self.hub.calls_in_flight(), 7)
        self.connect("z")
        self.assertTrue(self.hub.ask(Told(), "z", "m", None))

    def test_link_at_fault(self) -> None:
        def broken(call: Call) -> None:
            self.elsewhere.pending.forget(call)
            raise ZeroDivisionError

        self.elsewhere.on_ask = broken
        with self.assertRaises(RpcError) as caught:
            self.hub.ask(Told(), "x", "m", None)
        self.assertEqual((caught.exception.kind, caught.exception.sent), (Kind.NODE_UNREACHABLE, True))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.counted(), (1, 0, {"-32004": 1}))
        self.assert_nothing_left()

    def test_a_node_that_does_not_read(self) -> None:
        """Its link is open, but takes nothing: the client may have gone elsewhere for that."""

        def stuck(call: Call) -> None:
            if call.owner == "other-node":
                self.elsewhere.pending.forget(call)
                raise UNREACHABLE

        self.elsewhere.on_ask = stuck
        self.assertFalse(self.hub.ask(Told(), "x", "m", None))
        self.registry.outcome = elsewhere("third-node", generation=8)
        self.elsewhere.open.add("third-node")
        call = self.hub.call("x", "m", None)
        self.elsewhere.answers(REPLY)
        self.assertEqual((self.successResultOf(call), self.counted()), (REPLY, (1, 1, {})))
        self.assert_nothing_left()

    def test_who_asked_is_at_fault(self) -> None:
        class Raises(Told):
            def settle(self, outcome: Reply | RpcError) -> None:
                raise ZeroDivisionError

        call = Raises()
        self.hub.ask(call, "x", "m", None)
        self.elsewhere.answers(REPLY)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_nothing_left()

    def test_over_before_it_was_asked(self) -> None:
        """In the same turn: it is settled or missed while it is sent, or who asked goes."""
        self.elsewhere.on_ask = lambda call: self.elsewhere.fails(RpcError(Kind.CONNECTION_LOST, "x"))
        self.assertEqual(self.error_of(self.asked_there()).kind, Kind.CONNECTION_LOST)
        self.assertEqual(self.counted(), (1, 0, {"-32003": 1}))
        self.know(elsewhere())
        call = Told()
        self.elsewhere.on_ask = lambda _: self.hub.forget(call)
        self.assertTrue(self.hub.ask(call, "x", "m", None))
        self.assertEqual((call.outcomes, self.counted()), ([], (2, 0, {"-32003": 1})))
        self.assert_nothing_left()

    def test_a_client_that_comes_here(self) -> None:
        """It is no longer looked for elsewhere."""
        self.connect("x")
        self.disconnect("x")
        self.assertFalse(self.hub.ask(Told(), "x", "m", None))
        self.know(elsewhere())
        self.hub.node_gone("other-node")
        self.assertFalse(self.hub.ask(Told(), "x", "m", None))


class FirstTests(SeekingTestCase):
    """Nothing is remembered, or no link is open."""

    def test_looked_up(self) -> None:
        call = self.hub.call("x", "m", b"[1]", 9.0)
        self.assertEqual(self.elsewhere.asked, [(elsewhere(), "m", b"[1]", 9.0, False)])
        self.elsewhere.answers(REPLY)
        self.assertEqual((self.successResultOf(call), self.counted()), (REPLY, (1, 1, {})))
        self.asked_there()
        self.assertEqual(self.registry.asked, ["x"])

    def test_connected(self) -> None:
        self.elsewhere.open.clear()
        call = self.hub.call("x", "m", None, 9.0)
        ((location, connecting),) = self.elsewhere.connecting
        self.assertEqual((location, self.elsewhere.asked), (elsewhere(), []))
        self.clock.advance(2)
        self.elsewhere.open.add("other-node")
        connecting.callback(None)
        self.assertEqual(self.elsewhere.asked, [(elsewhere(), "m", None, 7.0, False)])
        self.elsewhere.answers(REPLY)
        self.assertEqual((self.successResultOf(call), self.counted()), (REPLY, (1, 1, {})))
        self.assert_nothing_left()

    def test_many_at_once(self) -> None:
        """One look-up for all."""
        found: Deferred[Location | None] = Deferred()
        self.registry.outcome = found
        calls = [self.hub.call("x", "m", None) for _ in range(5)]
        self.assertEqual((self.registry.asked, self.hub.calls_in_flight()), (["x"], 5))
        found.callback(elsewhere())
        self.assertEqual(len(self.elsewhere.asked), 5)
        for call in calls:
            self.elsewhere.answers(REPLY, 0)
            self.assertEqual(self.successResultOf(call), REPLY)
        self.assert_nothing_left()

    def test_all_wait_for_the_same_claim(self) -> None:
        """And none is refused for the place that it has itself."""
        self.edge.claiming["x"] = []
        calls = [self.hub.call("x", "m", None) for _ in range(8)]
        self.assertEqual(self.error_of(self.hub.call("x", "m", None)).kind, Kind.TOO_MANY_CALLS)
        self.edge.generations["x"] = 3
        self.edge.claimed("x")
        self.assertEqual(len(self.sent("x")), 4)
        self.assertEqual({self.error_of(call).detail for call in calls[4:]}, {None}, "too many for the client")

    def test_a_connection_that_turns_out_to_be_dead(self) -> None:
        """It was about to be sent here, and goes on to be sought."""
        self.edge.claiming["x"] = []
        call = self.hub.call("x", "m", None)
        self.edge.on_send = lambda client_id, payload: self.disconnect("x")
        self.connect("x")
        self.edge.claimed("x")
        self.assertEqual(len(self.elsewhere.asked), 1)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assertEqual(len(self.elsewhere.forgotten), 1)
        self.assert_nothing_left()

    def test_deadline_while_it_connects(self) -> None:
        self.elsewhere.open.clear()
        call = self.hub.call("x", "m", None, 5.0)
        self.clock.advance(4.99)
        self.assertNoResult(call)
        self.clock.advance(0.06)
        error = self.error_of(call)
        self.assertEqual((error.kind, error.sent), (Kind.NODE_UNREACHABLE, False))
        self.assertEqual((self.elsewhere.cancelled, self.counted()), (1, (1, 0, {"-32004": 1})))
        self.assert_nothing_left()

    def test_deadline_in_the_turn_in_which_it_is_connected(self) -> None:
        self.elsewhere.open.clear()
        call = self.hub.call("x", "m", None, 4.99)
        self.clock.rightNow = 4.995
        self.elsewhere.open.add("other-node")
        self.elsewhere.connecting[0][1].callback(None)
        self.assertEqual((self.error_of(call).kind, self.elsewhere.asked), (Kind.NODE_UNREACHABLE, []))
        self.assert_nothing_left()

    def test_a_link_that_is_gone_again(self) -> None:
        self.elsewhere.open.clear()
        self.elsewhere.connects = lambda location: succeed(None)
        error = self.error_of(self.hub.call("x", "m", None))
        self.assertEqual((error.kind, error.sent), (Kind.NODE_UNREACHABLE, False))
        self.assertEqual(error.detail, "node other cannot be reached")
        self.assert_nothing_left()

    def test_connect_at_fault(self) -> None:
        self.elsewhere.open.clear()
        self.elsewhere.connects = lambda location: fail(ZeroDivisionError())
        error = self.error_of(self.hub.call("x", "m", None))
        self.assertEqual(error.kind, Kind.NODE_UNREACHABLE)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        lost = RpcError(Kind.CONNECTION_LOST, "x")
        self.elsewhere.connects = lambda location: fail(lost)
        self.assertIs(self.error_of(self.hub.call("x", "m", None)), lost)
        self.assert_nothing_left()


class ForgetTests(SeekingTestCase):
    """Who asked goes: nothing stays, and nothing comes."""

    def forget(self, call: Deferred[Any]) -> None:
        self.assertEqual(self.hub.calls_in_flight(), 1)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assertEqual(self.counted(), (1, 0, {}))
        self.assert_nothing_left()

    def test_at_the_node(self) -> None:
        self.know(elsewhere())
        call = self.hub.call("x", "m", None)
        (at_the_node,) = self.elsewhere.calls
        self.forget(call)
        self.assertEqual(self.elsewhere.forgotten, [at_the_node])
        # What comes of it all the same.
        at_the_node.settle(REPLY)
        self.elsewhere.missed(at_the_node, Miss.NOT_HERE)
        self.hub.forget(call)
        self.assertEqual(len(self.elsewhere.forgotten), 1)
        self.assertEqual(self.counted(), (1, 0, {}))
        self.assert_nothing_left()

    def test_while_it_is_looked_up(self) -> None:
        cancelled: list[object] = []
        self.registry.outcome = Deferred(cancelled.append)
        self.forget(self.hub.call("x", "m", None))
        self.assertEqual((len(cancelled), self.elsewhere.forgotten), (1, []))

    def test_while_it_connects(self) -> None:
        self.elsewhere.open.clear()
        self.forget(self.hub.call("x", "m", None))
        self.assertEqual((self.elsewhere.cancelled, self.elsewhere.forgotten), (1, []))

    def test_while_it_is_looked_up_again(self) -> None:
        self.know(elsewhere())
        self.registry.outcome = Deferred()
        call = self.hub.call("x", "m", None)
        self.elsewhere.misses(Miss.NOT_HERE)
        self.forget(call)

    def test_here_by_now(self) -> None:
        self.know(elsewhere())
        call = self.hub.call("x", "m", None)
        self.connect("x")
        self.elsewhere.misses(Miss.NOT_HERE)
        (request,) = self.sent("x")
        self.forget(call)
        self.receive("x", result(request["id"]))
        self.assertEqual(self.metrics.late_responses, 1)

    def test_missed_twice(self) -> None:
        """Not by the same node."""
        self.know(elsewhere())
        self.registry.outcome = Deferred()
        self.hub.call("x", "m", None).addErrback(lambda failure: None)
        (at_the_node,) = self.elsewhere.calls
        self.elsewhere.misses(Miss.NOT_HERE)
        self.elsewhere.missed(at_the_node, Miss.NOT_HERE)
        self.assertEqual((self.registry.asked, self.hub.calls_in_flight()), (["x"], 1))

    def test_what_is_not_the_hubs(self) -> None:
        """A call of somebody else's that was missed, or one that was settled."""
        self.elsewhere.missed(Told(), Miss.NOT_HERE)
        self.know(elsewhere())
        call = self.asked_there()
        self.elsewhere.answers(REPLY)
        self.hub.forget(call)
        self.assertEqual((call.outcomes, self.elsewhere.forgotten), ([REPLY], []))
