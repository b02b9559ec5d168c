"""Tests of gateway.cluster.reconcile."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.reconcile import (
    BATCH_SIZE,
    CHECK_INTERVAL,
    CONFLICT_GRACE_PERIOD,
    REPAIR_BATCH_SIZE,
    ROWS_PER_CHECK,
    Reconciler,
)
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location, SessionKey


def location(client_id: str, generation: int, node_id: str = "other") -> Location:
    return Location(client_id, node_id, "n", "ws://n", generation, 0.0, "h:1")


class FakeClientSessions:
    def __init__(self) -> None:
        self.generations: dict[str, int] = {}
        self.superseded_sessions: list[SessionKey] = []
        self.restored_sessions: list[SessionKey] = []

    def client_ids(self) -> list[str]:
        return list(self.generations)

    def generation(self, client_id: str) -> int:
        return self.generations.get(client_id, 0)

    def close_superseded(self, key: SessionKey) -> None:
        self.superseded_sessions.append(key)

    def restore_claim(self, key: SessionKey) -> None:
        self.restored_sessions.append(key)


class FakeRegistry:
    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.lookups: list[str] = []
        #: the rows of this node
        self.own: dict[str, int] = {}
        self.segments: list[tuple[str, int]] = []

    def own_rows(self, first: str, limit: int) -> Deferred[tuple[list[SessionKey], str | None]]:
        self.segments.append((first, limit))
        rows = sorted(key for key in self.own.items() if key[0] >= first)
        following = rows[limit][0] if len(rows) > limit else None
        return succeed(([SessionKey(*row) for row in rows[:limit]], following))

    def find(self, client_id: str) -> Deferred[Location | None]:
        self.lookups.append(client_id)
        found = self.rows.get(client_id)
        if isinstance(found, Deferred):
            return found
        return fail(found) if isinstance(found, Exception) else succeed(found)


class FakeOrphanedRows:
    def __init__(self) -> None:
        self.checked: list[SessionKey] = []
        self.result: Deferred[bool] | None = None

    def check(self, key: SessionKey) -> Deferred[bool]:
        self.checked.append(key)
        return succeed(True) if self.result is None else self.result


class ReconcilerTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.sessions = FakeClientSessions()
        self.registry = FakeRegistry()
        self.orphaned_rows = FakeOrphanedRows()
        self.reconciler = Reconciler(
            node_id="this",
            sessions=self.sessions,  # type: ignore[arg-type]
            registry=self.registry,  # type: ignore[arg-type]
            orphaned_rows=self.orphaned_rows,  # type: ignore[arg-type]
            clock=self.clock,
        )
        self.reconciler.start()
        self.addCleanup(self.reconciler.stop)

    def test_matching_rows_change_nothing(self) -> None:
        self.sessions.generations["a"] = 5
        self.registry.rows["a"] = location("a", 5, "this")
        self.registry.own["a"] = 5
        self.clock.pump([CHECK_INTERVAL] * 2)
        self.assertEqual((self.registry.lookups, self.sessions.superseded_sessions), (["a", "a"], []))
        self.assertEqual((self.sessions.restored_sessions, self.orphaned_rows.checked), ([], []))

    def test_row_of_an_older_claim(self) -> None:
        """The database has lost the claim of the session that is open."""
        self.sessions.generations.update(a=5, b=6)
        self.registry.rows.update(a=location("a", 4), b=location("b", 5, "this"))
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(sorted(self.sessions.restored_sessions), [("a", 6), ("b", 7)])

    def test_newer_claim_of_this_node(self) -> None:
        """It is in progress, or its row was not removed: the session that is open stays."""
        self.sessions.generations["a"] = 5
        self.registry.rows["a"] = location("a", 9, "this")
        self.clock.pump([CHECK_INTERVAL] * round(2 * CONFLICT_GRACE_PERIOD / CHECK_INTERVAL))
        self.assertEqual((self.sessions.superseded_sessions, self.sessions.restored_sessions), ([], []))
        self.assertEqual(set(self.orphaned_rows.checked), {("a", 9)})

    def test_newer_claim_or_missing_row(self) -> None:
        self.sessions.generations.update(a=5, b=6)
        self.registry.rows["a"] = location("a", 9)
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual((self.sessions.superseded_sessions, self.sessions.restored_sessions), ([], [("b", 7)]))
        self.registry.rows["b"] = location("b", 6)
        self.clock.pump([CHECK_INTERVAL] * round(CONFLICT_GRACE_PERIOD / CHECK_INTERVAL - 1))
        self.assertEqual(self.sessions.superseded_sessions, [])
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual((self.sessions.superseded_sessions, self.sessions.restored_sessions), ([("a", 9)], [("b", 7)]))

    def test_newer_claim_that_is_revoked(self) -> None:
        self.sessions.generations["a"] = 5
        for _ in range(3):
            self.registry.rows["a"] = location("a", 9)
            self.clock.pump([CHECK_INTERVAL] * round(CONFLICT_GRACE_PERIOD / CHECK_INTERVAL - 1))
            self.registry.rows["a"] = location("a", 5)
            self.clock.advance(CHECK_INTERVAL)
        self.assertEqual((self.sessions.superseded_sessions, self.reconciler._conflicts), ([], {}))

    def test_conflicts_of_closed_sessions_are_dropped(self) -> None:
        self.sessions.generations["a"] = 5
        self.registry.rows["a"] = location("a", 9)
        self.clock.advance(CHECK_INTERVAL)
        self.sessions.generations["a"] = 10
        self.registry.rows["a"] = location("a", 10)
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(self.reconciler._conflicts, {})

    def test_session_replaced_during_the_check_is_left_alone(self) -> None:
        self.sessions.generations.update(a=5, b=6)
        self.registry.rows.update(a=Deferred(), b=Deferred())
        self.clock.advance(CHECK_INTERVAL)
        self.sessions.generations["a"] = 8
        del self.sessions.generations["b"]
        self.registry.rows["a"].callback(location("a", 7))
        self.registry.rows["b"].callback(None)
        self.assertEqual(self.sessions.superseded_sessions, [])

    def test_all_sessions_are_checked_in_batches(self) -> None:
        self.sessions.generations.update({f"c{number}": 1 for number in range(BATCH_SIZE + 50)})
        self.registry.rows.update({client_id: location(client_id, 1) for client_id in self.sessions.generations})
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(len(self.registry.lookups), BATCH_SIZE)
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(sorted(self.registry.lookups), sorted(self.sessions.generations))
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(len(self.registry.lookups), 2 * BATCH_SIZE + 50)

    def test_one_check_at_a_time(self) -> None:
        self.sessions.generations["a"] = 5
        self.registry.rows["a"] = Deferred()
        self.clock.pump([CHECK_INTERVAL] * 5)
        self.assertEqual(self.registry.lookups, ["a"])
        self.registry.rows["a"].callback(location("a", 5))
        self.registry.rows["a"] = location("a", 5)
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(self.registry.lookups, ["a", "a"])

    def test_unavailable_registry_changes_nothing(self) -> None:
        self.sessions.generations["a"] = 5
        self.registry.rows["a"] = RegistryUnavailableError("away")
        self.clock.advance(CHECK_INTERVAL)
        self.registry.rows["a"] = ZeroDivisionError()
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.registry.rows["a"] = None
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(self.sessions.restored_sessions, [("a", 6)])

    def test_rows_without_a_session(self) -> None:
        self.sessions.generations.update(b=5, c=4, d=6)
        self.registry.rows.update(b=location("b", 5), c=location("c", 4), d=location("d", 6))
        self.registry.own.update(a=5, b=5, c=5, d=5)
        self.clock.advance(CHECK_INTERVAL)
        self.assertEqual(self.orphaned_rows.checked, [("a", 5), ("c", 5)])
        self.assertEqual(self.sessions.restored_sessions, [("d", 7)])

    def test_rows_in_segments(self) -> None:
        self.registry.own.update({f"c{number:05}": 1 for number in range(2 * ROWS_PER_CHECK + 1)})
        self.clock.pump([CHECK_INTERVAL] * 4)
        firsts = ["", f"c{ROWS_PER_CHECK:05}", f"c{2 * ROWS_PER_CHECK:05}", ""]
        self.assertEqual(self.registry.segments, [(first, ROWS_PER_CHECK) for first in firsts])
        self.assertEqual(len(set(self.orphaned_rows.checked)), 2 * ROWS_PER_CHECK + 1)

    def test_rows_are_repaired_in_batches(self) -> None:
        self.registry.own.update({f"c{number:05}": 1 for number in range(REPAIR_BATCH_SIZE + 1)})
        checking: Deferred[bool] = Deferred()
        self.orphaned_rows.result = checking
        self.clock.pump([CHECK_INTERVAL] * 3)
        self.assertEqual((len(self.orphaned_rows.checked), len(self.registry.segments)), (REPAIR_BATCH_SIZE, 1))
        self.orphaned_rows.result = None
        checking.callback(True)
        self.assertEqual(len(self.orphaned_rows.checked), REPAIR_BATCH_SIZE + 1)
