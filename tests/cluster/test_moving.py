"""Moving clients to other nodes: how evenly, whom, and when it ends."""

from __future__ import annotations

from collections import Counter

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.rebalance import LONGEST, MOST, PAUSE, STUCK, TICK, Moving
from gateway.cluster.routing import connect_url
from gateway.metrics import Metrics
from gateway.registry.interface import NodeStatus
from tests.cluster.fake_edge import FakeEdge
from tests.cluster.fakes import FakePeers, status
from tests.cluster.movers import FakeFarewells, FakeRegistry


class MovingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.registry = FakeRegistry()
        self.peers = FakePeers()
        self.metrics = Metrics()
        self.calls: Counter[str] = Counter()
        self.nodes = {name: status(name) for name in ("b", "c")}
        self.goes_on = True
        #: those that were told to go before
        self.told: set[str] = set()
        self.ends: list[bool] = []

    def takes(self, node_id: str) -> NodeStatus | None:
        return self.nodes.get(node_id)

    def move(self, count: int, rate: float = 50.0, **plan: int) -> Moving:
        self.edge = FakeEdge(self.clock, count)
        self.farewells = FakeFarewells(self.clock, self.edge, self.calls)
        self.farewells.waiting |= self.told
        self.moving = Moving(
            plan,
            edge=self.edge,  # type: ignore[arg-type]
            registry=self.registry,  # type: ignore[arg-type]
            peers=self.peers,
            farewells=self.farewells,  # type: ignore[arg-type]
            clock=self.clock,
            metrics=self.metrics,
            rate=rate,
            in_flight=lambda client_id, generation: self.calls[client_id],
            public_url="ws://all",
            takes=self.takes,
            goes_on=lambda: self.goes_on,
            over=self.ends.append,
        )
        self.moving.start()
        return self.moving

    def advance(self, seconds: float) -> None:
        self.clock.pump([TICK] * round(seconds / TICK))

    def ended(self, complete: bool = True) -> None:
        self.assertEqual((self.ends, self.clock.getDelayedCalls()), ([complete], []))

    def test_a_node_with_the_same_url(self) -> None:
        """They are told none, and what is in front of the nodes decides; but it is written down that they were moved."""
        self.nodes["b"] = attrs.evolve(status("b"), public_url="ws://all")
        self.move(100, b=10)
        self.advance(2)
        self.assertEqual({url for _, _, url in self.farewells.said.values()}, {None})
        self.assertEqual((len(self.farewells.said), self.registry.unbound), (10, set(self.farewells.said)))
        self.ended()

    def test_nobody_is_told_while_the_registry_does_not_answer(self) -> None:
        self.registry.answers = []
        self.move(1000, b=500)
        self.registry.answers[0].callback(None)
        while len(self.registry.answers) < 2:
            self.advance(TICK)
        self.advance(STUCK + 2 * TICK)
        told = len(self.farewells.said)
        self.assertTrue(0 < told < 45)
        self.advance(5)
        self.assertEqual(len(self.farewells.said), told)
        self.registry.answers[1].callback(None)
        self.advance(0.5)
        self.assertGreater(len(self.farewells.said), told)

    def test_all_are_moved_where_they_should(self) -> None:
        moving = self.move(1000, b=100, c=50)
        self.assertEqual(moving.left, 150)
        self.advance(3.5)
        self.assertEqual(self.farewells.where(), {"ws://b": 100, "ws://c": 50})
        for client_id, (_, reason, url) in self.farewells.said.items():
            self.assertEqual(reason, "rebalance")
            self.assertIn(url, (connect_url("ws://b", client_id), connect_url("ws://c", client_id)))
        self.assertEqual((moving.left, moving.moved, self.metrics.rebalanced), (0, 150, 150))
        self.ended()

    def test_evenly(self) -> None:
        """No more in any tenth of a second than its share, and the whole in the time that the rate gives."""
        for rate in (7.0, 50.0, 333.0):
            self.setUp()
            self.move(5000, rate, b=round(rate * 6))
            self.advance(7)
            times = sorted(at for at, _, _ in self.farewells.said.values())
            self.assertEqual(len(times), round(rate * 6))
            self.assertTrue(5.8 < times[-1] - times[0] < 6.2)
            tenths = Counter(int((at - times[0]) * 10 + 1e-6) for at in times)
            self.assertLessEqual(max(tenths.values()), rate / 10 + 2 * rate * TICK + 1)
            self.assertLess(
                max(Counter(int(at - times[0] + 1e-6) for at in times).values()), rate + 2 * rate * TICK + 2
            )

    def test_a_fraction_a_second(self) -> None:
        self.move(5, 0.25, b=3)
        self.advance(13)
        times = [at - 1000 for at, _, _ in self.farewells.said.values()]
        self.assertEqual([round(at) for at in times], [0, 4, 8])
        self.ended()

    def test_thousands_a_second(self) -> None:
        self.move(9000, 4000, b=8000)
        self.advance(2.5)
        self.assertEqual(self.farewells.where(), {"ws://b": 8000})
        self.assertLessEqual(max(size for size, _ in self.registry.placed), MOST)

    def test_those_with_calls_go_last(self) -> None:
        self.calls.update(f"c-{number}" for number in range(60))
        self.move(100, b=50)
        self.advance(2)
        self.assertEqual(len(self.farewells.said), 50)
        busy = [client_id for client_id in self.farewells.said if self.calls[client_id]]
        self.assertEqual((len(busy), set(list(self.farewells.said)[40:]) >= set(busy)), (10, True))

    def test_others_stand_in_for_those_that_were_moved_a_short_time_ago(self) -> None:
        self.registry.moved.update(f"c-{number}" for number in range(80))
        self.move(100, b=15)
        # Whom it asks for is random; by now it has asked for all.
        self.advance(100 * PAUSE + 1)
        self.assertEqual(set(self.farewells.said) & {f"c-{number}" for number in range(80)}, set())
        self.assertEqual(len(self.farewells.said), 15)
        self.ended()

    def test_nobody_can_be_moved(self) -> None:
        """The registry is asked a few times a second, and each client once."""
        self.registry.moved.update(f"c-{number}" for number in range(300))
        self.move(300, b=100)
        self.advance(1)
        self.assertTrue(2 <= len(self.registry.placed) <= 5)
        self.advance(2)
        self.assertEqual((self.farewells.said, sum(size for size, _ in self.registry.placed)), ({}, 300))
        self.ended()

    def test_one_that_leaves_before_it_is_told(self) -> None:
        self.registry.answers = []
        self.move(3, b=2)
        self.edge.here -= {"c-0", "c-1"}
        self.registry.answers.pop().callback(None)
        self.advance(1)
        while self.registry.answers:
            self.registry.answers.pop().callback(None)
            self.advance(1)
        self.assertEqual(set(self.farewells.said), {"c-2"})
        self.ended()

    def test_one_that_was_told_already(self) -> None:
        self.told = {"c-0", "c-1"}
        self.calls["c-1"] = 1
        self.move(3, b=3)
        self.advance(1)
        self.assertEqual((self.registry.placed, set(self.farewells.said)), ([(1, "b")], {"c-2"}))
        self.ended()

    def test_nobody_is_here(self) -> None:
        self.move(0, b=1)
        self.advance(1)
        self.assertEqual(self.registry.placed, [])
        self.ended()

    def test_a_registry_that_is_away(self) -> None:
        self.registry.away = True
        self.move(100, b=50)
        self.advance(1)
        self.assertEqual(self.farewells.said, {})
        self.ended(complete=False)

    def test_a_registry_that_goes_away(self) -> None:
        """Those that are placed still go."""
        self.move(1000, b=500)
        self.advance(2)
        self.registry.away = True
        self.advance(3)
        self.assertEqual(len(self.farewells.said), sum(size for size, _ in self.registry.placed))
        self.ended(complete=False)

    def test_a_node_that_has_no_room_or_does_not_answer(self) -> None:
        for answer in (False, PeerUnreachable("silent")):
            self.setUp()
            self.peers.room["b"] = answer
            self.move(1000, b=100, c=50)
            self.advance(3)
            self.assertEqual(self.farewells.where(), {"ws://c": 50})
            self.ended(complete=False)

    def test_a_node_that_is_gone_in_the_middle(self) -> None:
        self.move(1000, b=200, c=100)
        self.advance(2)
        before = self.farewells.where()["ws://b"]
        del self.nodes["b"]
        self.advance(5)
        self.assertEqual(self.farewells.where(), {"ws://b": before, "ws://c": 100})
        self.ended(complete=False)

    def test_it_ends_when_it_should_not_go_on(self) -> None:
        self.move(1000, b=200)
        self.advance(1)
        self.goes_on = False
        told = len(self.farewells.said)
        self.advance(5)
        self.assertEqual(len(self.farewells.said), told)
        self.ended()

    def test_stop(self) -> None:
        self.registry.answers = []
        moving = self.move(1000, b=200)
        moving.stop()
        self.registry.answers.pop().callback(None)
        self.advance(5)
        moving.stop()
        self.assertEqual((self.farewells.said, self.ends, self.clock.getDelayedCalls()), ({}, [], []))

    def test_a_slow_registry_slows_it_down_and_nothing_is_made_up_for(self) -> None:
        self.registry.answers = []
        self.move(1000, b=200)
        self.advance(10)
        self.assertEqual((self.farewells.said, len(self.registry.answers)), ({}, 1))
        self.registry.answers.pop().callback(None)
        self.advance(2 * TICK)
        self.assertLessEqual(len(self.farewells.said), 4 * TICK * 50 + 1)

    def test_what_takes_too_long_is_given_up(self) -> None:
        self.move(1000, 0.1, b=100)
        self.clock.pump([1.0] * round(LONGEST + 1))
        self.assertTrue(50 < len(self.farewells.said) < 62)
        self.ended(complete=False)

    def test_an_error_ends_it(self) -> None:
        self.peers.room["b"] = Deferred()
        self.move(10, b=5)
        self.peers.room["b"].errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.ended(complete=False)
