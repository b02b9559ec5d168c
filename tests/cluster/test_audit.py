"""Tests of gateway.cluster.reconcile."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.reconcile import EVERY, SETTLED, SLICE, Audit
from gateway.registry.interface import Location, RegistryUnavailable


def row(client_id: str, generation: int) -> Location:
    return Location(client_id, "n", "n", "ws://n", generation, 0.0, "h:1")


class FakeEdge:
    def __init__(self) -> None:
        self.here: dict[str, int] = {}
        self.told: list[tuple[str, int]] = []
        self.restored: list[tuple[str, int]] = []

    def client_ids(self) -> list[str]:
        return list(self.here)

    def generation(self, client_id: str) -> int:
        return self.here.get(client_id, 0)

    def superseded(self, client_id: str, generation: int) -> None:
        self.told.append((client_id, generation))

    def restore(self, client_id: str, generation: int) -> None:
        self.restored.append((client_id, generation))


class FakeRegistry:
    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.asked: list[str] = []

    def find(self, client_id: str) -> Deferred[Location | None]:
        self.asked.append(client_id)
        found = self.rows.get(client_id)
        if isinstance(found, Deferred):
            return found
        return fail(found) if isinstance(found, Exception) else succeed(found)


class AuditTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.edge = FakeEdge()
        self.registry = FakeRegistry()
        self.is_alone = False
        self.audit = Audit(
            edge=self.edge,  # type: ignore[arg-type]
            registry=self.registry,  # type: ignore[arg-type]
            clock=self.clock,
            alone=lambda: self.is_alone,
        )
        self.audit.start()
        self.addCleanup(self.audit.stop)

    def test_what_is_right_is_left_alone(self) -> None:
        self.edge.here["a"] = 5
        for generation in (5, 4):
            self.registry.rows["a"] = row("a", generation)
            self.clock.advance(EVERY)
        self.assertEqual((self.registry.asked, self.edge.told), (["a", "a"], []))

    def test_what_is_taken_or_has_no_row(self) -> None:
        self.edge.here.update(a=5, b=6)
        self.registry.rows["a"] = row("a", 9)
        self.clock.advance(EVERY)
        self.assertEqual((self.edge.told, self.edge.restored), ([], [("b", 7)]))
        self.registry.rows["b"] = row("b", 6)
        self.clock.pump([EVERY] * round(SETTLED / EVERY - 1))
        self.assertEqual(self.edge.told, [])
        self.clock.advance(EVERY)
        self.assertEqual((self.edge.told, self.edge.restored), ([("a", 9)], [("b", 7)]))

    def test_a_newer_claim_that_is_taken_back(self) -> None:
        self.edge.here["a"] = 5
        for _ in range(3):
            self.registry.rows["a"] = row("a", 9)
            self.clock.pump([EVERY] * round(SETTLED / EVERY - 1))
            self.registry.rows["a"] = row("a", 5)
            self.clock.advance(EVERY)
        self.assertEqual((self.edge.told, self.audit._suspects), ([], {}))

    def test_of_those_that_are_gone_nothing_is_kept(self) -> None:
        self.edge.here["a"] = 5
        self.registry.rows["a"] = row("a", 9)
        self.clock.advance(EVERY)
        self.edge.here["a"] = 10
        self.registry.rows["a"] = row("a", 10)
        self.clock.advance(EVERY)
        self.assertEqual(self.audit._suspects, {})

    def test_one_that_was_replaced_meanwhile_is_left_alone(self) -> None:
        self.edge.here.update(a=5, b=6)
        self.registry.rows.update(a=Deferred(), b=Deferred())
        self.clock.advance(EVERY)
        self.edge.here["a"] = 8
        del self.edge.here["b"]
        self.registry.rows["a"].callback(row("a", 7))
        self.registry.rows["b"].callback(None)
        self.assertEqual(self.edge.told, [])

    def test_all_have_their_turn_a_few_at_a_time(self) -> None:
        self.edge.here.update({f"c{number}": 1 for number in range(SLICE + 50)})
        self.registry.rows.update({client_id: row(client_id, 1) for client_id in self.edge.here})
        self.clock.advance(EVERY)
        self.assertEqual(len(self.registry.asked), SLICE)
        self.clock.advance(EVERY)
        self.assertEqual(sorted(self.registry.asked), sorted(self.edge.here))
        self.clock.advance(EVERY)
        self.assertEqual(len(self.registry.asked), 2 * SLICE + 50)

    def test_a_slow_registry_is_asked_once_at_a_time(self) -> None:
        self.edge.here["a"] = 5
        self.registry.rows["a"] = Deferred()
        self.clock.pump([EVERY] * 5)
        self.assertEqual(self.registry.asked, ["a"])
        self.registry.rows["a"].callback(row("a", 5))
        self.registry.rows["a"] = row("a", 5)
        self.clock.advance(EVERY)
        self.assertEqual(self.registry.asked, ["a", "a"])

    def test_a_registry_that_is_away_says_nothing(self) -> None:
        self.edge.here["a"] = 5
        self.registry.rows["a"] = RegistryUnavailable("away")
        self.clock.advance(EVERY)
        self.registry.rows["a"] = ZeroDivisionError()
        self.clock.advance(EVERY)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.registry.rows["a"] = None
        self.clock.advance(EVERY)
        self.assertEqual(self.edge.restored, [("a", 6)])

    def test_a_node_that_is_alone_asks_nothing(self) -> None:
        self.is_alone = True
        self.edge.here["a"] = 5
        self.clock.pump([EVERY] * 3)
        self.assertEqual(self.registry.asked, [])
