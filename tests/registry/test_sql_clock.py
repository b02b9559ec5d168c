"""Tests for :mod:`gateway.registry.sql`: a database whose clock is set, or that loses commits."""

from __future__ import annotations

import sqlite3

from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.registry.interface import SessionKey
from gateway.registry.memory import EPOCH, InlinePool
from gateway.registry.sql import SQLRegistry
from gateway.registry.sqlite import SQLiteRegistry
from gateway.util.deferred import detached
from tests.builders.registry_contract import LEASE, RegistryMixin

HOUR = 3600.0
HEARTBEAT = 5.0


class ClockCase(RegistryMixin, SynchronousTestCase):
    """Three nodes that send heartbeats, on one SQLite file."""

    def set_up_database(self) -> None:
        self.path = self.mktemp()
        #: how far the database's clock was set, in seconds
        self.offset = 0.0
        #: what the other nodes know of
        self.floors: Deferred[list[int]] = succeed([])

    def setUp(self) -> None:
        super().setUp()
        self.b, self.c = self.start_node("b"), self.start_node("c")
        self.nodes = [self.a, self.b, self.c]

    def make_registry(self) -> SQLRegistry:
        return SQLiteRegistry(
            self.path,
            lease=LEASE,
            heartbeat=HEARTBEAT,
            reactor=self.clock,
            metrics=Metrics(),
            clock=self.clock.seconds,
            database_clock=lambda: EPOCH + round((self.clock.seconds() + self.offset) * 1e6),
            make_pool=InlinePool,
            collect_floors=lambda: detached(self.floors),
        )

    def heartbeats(self, seconds: float, nodes: list[SQLRegistry] | None = None) -> None:
        """Let time pass, with heartbeats that all find their leases held."""
        for _ in range(round(seconds / HEARTBEAT)):
            self.clock.advance(HEARTBEAT)
            for node in nodes or self.nodes:
                self.assertTrue(self.result_of(node.heartbeat("up", 0)))

    def names(self, node: SQLRegistry) -> str:
        return "".join(status.name for status in self.result_of(node.nodes()))


class StepTests(ClockCase):
    def test_nothing_happens_to_three_living_nodes(self) -> None:
        self.heartbeats(2 * LEASE)
        claims = [self.result_of(node.claim(f"x{index}", "h")) for index, node in enumerate(self.nodes)]
        for step in (HOUR, -HOUR, -HOUR, HOUR):
            self.offset += step
            # Before any node has sent a heartbeat.
            for node in self.nodes:
                self.assertEqual(self.names(node), "abc")
                self.assertEqual(self.result_of(node.reap(100)), 0)
                self.assertTrue(self.result_of(node.find("x1")).live)
            for _ in range(4):
                self.heartbeats(HEARTBEAT)
                self.assertEqual([self.names(node) for node in self.nodes], ["abc"] * 3)
                self.assertEqual([self.result_of(node.reap(100)) for node in self.nodes], [0] * 3)
                self.assertEqual(len(self.result_of(self.a.clients("", 10))), 3)
            self.assertTrue(self.a.clock_is_steady())
        found = [self.result_of(self.a.find(f"x{index}")).generation for index in range(3)]
        self.assertEqual(found, [claim.generation for claim in claims])

    def test_claims_go_on(self) -> None:
        self.heartbeats(2 * LEASE)
        for step in (HOUR, -HOUR):
            self.offset += step
            self.result_of(self.a.claim("x", "h"))

    def test_unsteady_after_a_step(self) -> None:
        self.heartbeats(2 * LEASE)
        self.assertTrue(self.a.clock_is_steady())
        self.offset -= HOUR
        self.heartbeats(HEARTBEAT)
        self.assertFalse(self.a.clock_is_steady())
        self.heartbeats(LEASE)
        self.assertTrue(self.a.clock_is_steady())

    def test_dead_node_whose_heartbeat_lies_in_the_future(self) -> None:
        self.heartbeats(2 * LEASE)
        self.result_of(self.c.claim("x", "h"))
        self.offset -= HOUR
        self.heartbeats(HEARTBEAT, [self.a, self.b])
        self.assertEqual(self.names(self.a), "abc")
        self.heartbeats(LEASE, [self.a, self.b])
        self.assertEqual(self.names(self.a), "ab")
        self.assertFalse(self.result_of(self.a.find("x")).live)
        self.assertEqual(self.result_of(self.a.clients("", 10)), [])
        self.assertEqual(self.result_of(self.b.reap(100)), 1)
        self.assertIsNone(self.result_of(self.a.find("x")))

    def test_node_that_joins_after_the_step(self) -> None:
        """It cannot tell a dead node from one that is about to send its next heartbeat, for one lease."""
        self.offset -= HOUR
        d = self.start_node("d")
        self.assertEqual(self.names(d), "abcd")
        self.heartbeats(LEASE, [d])
        self.assertEqual(self.names(d), "d")

    def test_assignment_of_before_the_step(self) -> None:
        self.heartbeats(LEASE)
        self.result_of(self.a.assign(["x"], self.result_of(self.a.nodes())[1].node_id))
        self.assertIsNotNone(self.result_of(self.a.assignment("x")))
        self.offset -= HOUR
        self.assertIsNone(self.result_of(self.a.assignment("x")))
        # Nor does it keep the client from being moved.
        self.heartbeats(HEARTBEAT)
        moved = self.result_of(self.a.assign(["x"], self.result_of(self.a.nodes())[1].node_id))
        self.assertEqual(moved, ["x"])


class GenerationTests(ClockCase):
    def claim_and_release(self, node: SQLRegistry) -> int:
        claim = self.result_of(node.claim("x", "h"))
        self.result_of(node.release(SessionKey("x", claim.generation)))
        return int(claim.generation)

    def test_generations_grow_after_a_step_back(self) -> None:
        """From node to node, with heartbeats in between or without."""
        self.heartbeats(LEASE)
        for step in (-HOUR, -HOUR, HOUR, -30.0):
            generations = [self.claim_and_release(self.a)]
            self.offset += step
            for node in (self.b, self.a, self.c, self.b, self.a, self.b):
                generations.append(self.claim_and_release(node))
                self.clock.advance(0.5)
            self.heartbeats(HEARTBEAT)
            generations += [self.claim_and_release(node) for node in (self.c, self.b, self.a, self.c)]
            self.assertEqual(generations, sorted(set(generations)))

    def test_clock_that_catches_up(self) -> None:
        self.heartbeats(LEASE)
        generations = [self.claim_and_release(self.a)]
        self.offset -= 4.0
        for node in (self.a, self.b, self.c) * 5:
            generations.append(self.claim_and_release(node))
            self.clock.advance(0.5)
        self.assertEqual(generations, sorted(set(generations)))

    def test_clock_that_is_set_ahead_and_back_between_two_heartbeats(self) -> None:
        """Only one of the nodes has claimed a client meanwhile."""
        self.heartbeats(LEASE)
        self.offset += 3.0
        generations = [self.claim_and_release(self.a)]
        self.clock.advance(0.5)
        self.offset -= 3.0
        generations += [self.claim_and_release(node) for node in (self.b, self.c, self.a)]
        self.assertEqual(generations, sorted(set(generations)))

    def test_clock_that_is_set_ahead_and_back_after_a_heartbeat_of_one_node(self) -> None:
        self.heartbeats(LEASE)
        self.offset += 3.0
        self.result_of(self.a.heartbeat("up", 0))
        self.clock.advance(1.0)
        generations = [self.claim_and_release(self.a)]
        self.offset -= 3.0
        generations += [self.claim_and_release(node) for node in (self.b, self.c, self.a)]
        self.assertEqual(generations, sorted(set(generations)))

    def test_clock_that_has_almost_caught_up(self) -> None:
        """A node that claims nothing meanwhile knows from its heartbeats that the clock is behind."""
        self.heartbeats(LEASE)
        self.offset -= 6.0
        self.heartbeats(HEARTBEAT)
        given = self.claim_and_release(self.a)
        while EPOCH + round((self.clock.seconds() + self.offset) * 1e6) < given - 500_000:
            self.clock.advance(0.1)
        self.result_of(self.b.heartbeat("up", 0))
        self.assertGreater(self.claim_and_release(self.b), given)

    def test_node_that_joins_after_a_step_back(self) -> None:
        before = self.claim_and_release(self.a)
        self.heartbeats(HEARTBEAT)
        self.offset -= HOUR
        self.assertGreater(self.claim_and_release(self.start_node("d")), before)

    def test_node_that_joins_after_another_has_left(self) -> None:
        """What only the other one has given, while the clock was behind, is not forgotten."""
        self.heartbeats(LEASE)
        before = self.claim_and_release(self.a)
        self.offset -= HOUR
        given = [self.claim_and_release(self.a) for _ in range(3)]
        self.result_of(self.a.leave())
        joined = self.claim_and_release(self.start_node("d"))
        self.assertEqual(sorted([before, *given, joined]), [before, *given, joined])

    def test_node_that_joins_after_another_has_died(self) -> None:
        self.heartbeats(LEASE)
        self.claim_and_release(self.a)
        self.offset -= HOUR
        given = [self.claim_and_release(self.a) for _ in range(3)][-1]
        # The others have not heard of it.
        self.heartbeats(2 * LEASE + 2 * HEARTBEAT, [self.b, self.c])
        with sqlite3.connect(self.path) as connection:
            connection.execute("UPDATE nodes SET max_generation = 0 WHERE name <> 'a'")
        self.result_of(self.b.reap(100))
        with sqlite3.connect(self.path) as connection:
            self.assertEqual(connection.execute("SELECT COUNT(*) FROM nodes").fetchone(), (2,))
        self.assertGreater(self.claim_and_release(self.start_node("d")), given)

    def test_generation_of_another_node(self) -> None:
        floor = self.claim_and_release(self.a) + round(HOUR * 1e6)
        self.b.raise_generation_floor(floor)
        self.assertEqual(self.b.generation_floor, floor)
        self.assertEqual(self.claim_and_release(self.b), floor + 1)
        # Written with the claim, for all.
        self.heartbeats(HEARTBEAT)
        self.assertGreater(self.claim_and_release(self.a), floor + 1)

    def test_generations_counted_upwards_are_told_at_once(self) -> None:
        """A fail-over may lose them."""
        told: list[int] = []

        def collect() -> Deferred[list[int]]:
            told.append(self.a.generation_floor)
            return detached(self.floors)

        self.a._collect_floors = collect
        self.heartbeats(LEASE)
        before = self.claim_and_release(self.a)
        self.assertEqual(told, [])
        self.offset -= HOUR
        answer = self.floors = Deferred()
        first = self.claim_and_release(self.a)
        self.assertTrue(before < first == told[0])
        # Those given meanwhile are told together.
        last = [self.claim_and_release(self.a) for _ in range(3)][-1]
        self.assertEqual(len(told), 1)
        self.floors = succeed([])
        answer.callback([last + 60_000_000])
        self.assertEqual(told, [first, last + 60_000_000])
        self.assertEqual(self.claim_and_release(self.a), last + 60_000_001)

    def test_usually_a_generation_is_the_time(self) -> None:
        started_at = EPOCH + round(self.clock.seconds() * 1e6)
        self.assertTrue(0 <= self.claim_and_release(self.a) - started_at < 10_000)


class LostCommitsTests(ClockCase):
    def lose_commits(self) -> None:
        """Go back to an older state of the nodes."""
        with sqlite3.connect(self.path) as connection:
            connection.execute("UPDATE nodes SET heartbeat_at = heartbeat_at - 1000000")
        connection.close()

    def test_claims_wait_for_the_floors_of_the_other_nodes(self) -> None:
        self.heartbeats(LEASE)
        self.floors = Deferred()
        self.lose_commits()
        self.clock.advance(HEARTBEAT)
        self.assertFalse(self.result_of(self.a.heartbeat("up", 0)))
        claiming = self.a.claim("x", "h")
        cancelled = self.a.claim("y", "h")
        cancelled.cancel()
        cancelled.addErrback(lambda failure: None)
        self.clock.pump([0.01] * 5)
        self.assertNoResult(claiming)
        floor = EPOCH * 2
        self.floors.callback([5, floor])
        self.assertEqual(self.result_of(claiming).generation, floor + 1)
        self.assertIsNone(self.result_of(self.a.find("y")))
        self.result_of(self.a.claim("z", "h"))

    def test_no_floors(self) -> None:
        self.heartbeats(LEASE)
        self.floors = Deferred()
        self.lose_commits()
        self.clock.advance(HEARTBEAT)
        self.result_of(self.a.heartbeat("up", 0))
        claiming = self.a.claim("x", "h")
        self.floors.errback(ZeroDivisionError())
        self.floors.addErrback(lambda _: None)
        self.result_of(claiming)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_claim_before_the_next_heartbeat(self) -> None:
        """The row of this node is older than what it wrote: others may have taken over its clients."""
        self.heartbeats(LEASE)
        self.lose_commits()
        claiming = self.a.claim("x", "h")
        self.clock.pump([0.01] * 5)
        self.failureResultOf(claiming)
