"""The drain: who is told what, and when."""

from collections import Counter

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.drain import LONGEST_WAIT, LONGEST_WAIT_AT_ONCE, TICK, Drain, Farewells
from tests.cluster.fake_edge import FakeEdge


def silent(edge: FakeEdge, clock: Clock) -> Farewells:
    """Nobody has a call."""
    return Farewells(
        edge,
        clock,
        longest_call=60,
        let_go=lambda *_: None,
        in_flight=lambda *_: 0,
        release=edge.release,
        alone=lambda: True,
    )


class DrainTests(SynchronousTestCase):
    def drain(self, count: int, seconds: float = 10, calls: tuple[str, ...] = ()) -> Deferred[None]:
        self.clock = Clock()
        self.edge = FakeEdge(self.clock, count)
        self.calls = Counter(calls)
        self.let_go: list[str] = []
        self.farewells = Farewells(
            self.edge,
            self.clock,
            longest_call=60,
            let_go=lambda one, *_: self.let_go.append(one),
            in_flight=lambda one, generation: self.calls[one],
            release=self.edge.release,
            alone=lambda: True,
        )
        return Drain(
            self.edge,
            self.clock,
            seconds,
            farewells=self.farewells,
            url_for=lambda one: None if one == "c-1" else f"ws://x/{one}",
        ).start()

    def advance(self, seconds: float) -> None:
        self.clock.pump([TICK] * round(seconds / TICK))

    def test_nobody_here_ends_at_once(self) -> None:
        self.successResultOf(self.drain(0))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_one_client_goes_at_once(self) -> None:
        drained = self.drain(1)
        self.advance(2 * TICK)
        self.successResultOf(drained)
        self.assertEqual(self.edge.told["c-0"]["method"], "gateway.goaway")
        params = self.edge.told["c-0"]["params"]
        self.assertEqual((params["reason"], params["url"]), ("drain", "ws://x/c-0"))
        self.assertTrue(0 <= params["after"] <= LONGEST_WAIT)
        self.assertEqual(self.edge.closed["c-0"][1], 1012)

    def test_a_node_that_does_not_know_its_url_names_none(self) -> None:
        self.drain(2, seconds=0)
        self.assertEqual(set(self.edge.told["c-1"]["params"]), {"reason", "after"})
        self.assertEqual(set(self.edge.told["c-0"]["params"]), {"reason", "url", "after"})

    def test_closes_are_spread_evenly(self) -> None:
        drained = self.drain(1000)
        self.advance(11)
        self.successResultOf(drained)
        tenths = Counter(min(9, int(at)) for at, _ in self.edge.closed.values())
        self.assertEqual(sum(tenths.values()), 1000)
        self.assertEqual(set(tenths), set(range(10)))
        self.assertLess(max(tenths.values()), 120)

    def test_calls_in_flight_end_first(self) -> None:
        drained = self.drain(2, calls=("c-0", "c-1"))
        self.advance(9)
        self.assertEqual(set(self.edge.told), {"c-0", "c-1"})
        self.assertEqual(set(self.let_go), {"c-0", "c-1"})
        self.assertEqual(self.edge.closed, {})
        self.calls["c-1"] = 0
        self.advance(2 * TICK)
        self.assertEqual(set(self.edge.closed), {"c-1"})
        self.assertNoResult(drained)
        self.advance(50)
        self.assertNoResult(drained)
        self.calls["c-0"] = 0
        self.advance(2 * TICK)
        self.assertEqual(set(self.edge.closed), {"c-0", "c-1"})
        self.successResultOf(drained)

    def test_a_call_that_does_not_end_in_time(self) -> None:
        drained = self.drain(1, calls=("c-0",))
        self.advance(60 + 3 * TICK)
        self.assertEqual(set(self.edge.closed), {"c-0"})
        self.successResultOf(drained)

    def test_one_that_was_told_to_go_before(self) -> None:
        """It is waited for, but not told again."""
        drained = self.drain(0, calls=("c-0",))
        self.successResultOf(drained)
        self.edge.here.add("c-0")
        self.farewells.say("c-0", "rebalance", None)
        drained = Drain(self.edge, self.clock, 0, farewells=self.farewells, url_for=lambda _: None).start()
        self.advance(10)
        self.assertNoResult(drained)
        self.calls.clear()
        self.advance(1)
        self.successResultOf(drained)

    def test_it_waits_until_all_are_known_to_be_elsewhere(self) -> None:
        clock = Clock()
        edge, on_their_way = FakeEdge(clock, 2), [2]
        farewells = silent(edge, clock)
        drained = Drain(
            edge, clock, 1, farewells=farewells, departing=lambda: on_their_way[0], url_for=lambda _: None
        ).start()
        clock.pump([TICK] * 40)
        self.assertEqual(len(edge.closed), 2)
        self.assertNoResult(drained)
        on_their_way[0] = 0
        clock.pump([TICK] * 2)
        self.successResultOf(drained)

    def test_clients_of_a_lone_node_come_back_when_it_has_ended(self) -> None:
        clock = Clock()
        edge = FakeEdge(clock, 100)
        Drain(
            edge, clock, 10, farewells=silent(edge, clock), alone=lambda: True, url_for=lambda one: f"ws://x/{one}"
        ).start()
        clock.pump([TICK] * round(11 / TICK))
        for client_id, (at, _) in edge.closed.items():
            after = edge.told[client_id]["params"]["after"]
            self.assertTrue(9.99 <= at + after <= 10.01 + 2 * TICK + LONGEST_WAIT, (at, after))

    def test_no_time_at_all(self) -> None:
        drained = self.drain(100, seconds=0)
        self.advance(2 * TICK)
        self.assertEqual(len(self.edge.closed), 100)
        self.successResultOf(drained)
        waits = [goaway["params"]["after"] for goaway in self.edge.told.values()]
        self.assertTrue(LONGEST_WAIT < max(waits) <= LONGEST_WAIT_AT_ONCE)

    def test_relayed_clients_are_ended_among_the_others(self) -> None:
        clock, edge = Clock(), FakeEdge(Clock(), 50)
        relayed = {f"r-{i}": 0.0 for i in range(50)}
        there = set(relayed)

        def end(client_id: str) -> None:
            relayed[client_id] = clock.seconds()
            there.discard(client_id)

        drained = Drain(
            edge,
            clock,
            10,
            farewells=silent(edge, clock),
            url_for=lambda _: None,
            relayed=lambda: list(there),
            end_relay=end,
        ).start()
        clock.pump([TICK] * round(5 / TICK))
        self.assertTrue(10 < len(there) < 40 and 10 < edge.count() < 40)
        clock.pump([TICK] * round(6 / TICK))
        self.assertEqual((there, edge.count()), (set(), 0))
        self.successResultOf(drained)

    def test_a_relay_that_does_not_end_is_ended_again(self) -> None:
        clock, asked = Clock(), []
        edge = FakeEdge(clock, 0)
        drained = Drain(
            edge,
            clock,
            1,
            farewells=silent(edge, clock),
            url_for=lambda _: None,
            relayed=lambda: ["r"] if len(asked) < 3 else [],
            end_relay=asked.append,
        ).start()
        clock.pump([TICK] * round(2 / TICK))
        self.assertEqual(asked, ["r"] * 3)
        self.successResultOf(drained)

    def test_a_client_that_leaves_by_itself(self) -> None:
        drained = self.drain(2)
        self.edge.here.clear()
        self.advance(6)
        self.successResultOf(drained)

    def test_a_client_that_was_still_opening(self) -> None:
        drained = self.drain(2)
        self.edge.here.add("late")
        self.advance(5 + 3 * TICK)
        self.assertIn("late", self.edge.closed)
        self.successResultOf(drained)

    def test_a_registry_that_is_away_does_not_stop_it(self) -> None:
        drained = self.drain(3)
        self.edge.registry_is_away = True
        self.advance(11)
        self.successResultOf(drained)
        self.flushLoggedErrors()
