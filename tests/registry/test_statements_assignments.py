"""The contract of every registry about assignments."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import attrs
from twisted.internet.defer import Deferred, gatherResults
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.registry import sql, statements
from gateway.registry.errors import AssignedElsewhereError, OwnedElsewhereError, RegistryUnavailableError
from gateway.registry.interface import Assignment, Claim, ClaimPolicy, SessionKey
from gateway.registry.job_queue import Priority
from gateway.registry.sql import SQLRegistry
from tests.builders import mariadb
from tests.builders.mysql_registry import ThreadedRegistryMixin
from tests.builders.registry_contract import LEASE, RegistryMixin, node_info
from tests.registry.test_mysql import MySQLMixin
from tests.registry.test_sqlite import SQLiteMixin

MINUTE = 60.0
POLICY = ClaimPolicy(takeover_up_to=0, ignore_expired_owner=True, honor_assignment=True)


def id_of(name: str) -> str:
    return node_info(name).node_id


class AssignmentsContractMixin(RegistryMixin):
    """Node ``a`` assigns clients to node ``b``; there is also a node ``c``."""

    def setUp(self) -> None:
        super().setUp()
        self.b, self.c = self.start_node("b"), self.start_node("c")
        self.assignment_to_b = Assignment(id_of("b"), "b", "ws://b/", "ws://b:81/")

    def pass_time(self, seconds: float, *dead: SQLRegistry) -> None:
        """Advance the clock (plus some milliseconds for each heartbeat), with heartbeats of all nodes but the dead."""
        while seconds > 0:
            self.clock.advance(min(seconds, LEASE / 3))
            seconds -= LEASE / 3
            for each in (self.a, self.b, self.c):
                if each not in dead:
                    self.result_of(each.heartbeat("up", 0))

    def assign(self, *client_ids: str, by: SQLRegistry | None = None, on: str = "b") -> list[str]:
        return sorted(self.result_of((by or self.a).assign(client_ids, id_of(on))))

    def claim(self, registry: SQLRegistry, client_id: str = "x", **options: Any) -> Deferred[Claim]:
        return registry.claim(client_id, "h:1", attrs.evolve(POLICY, **options))

    def error_assignment(self, deferred: Deferred[Any]) -> Assignment:
        place: Assignment = self.error_of(deferred, AssignedElsewhereError).assignment
        return place

    def test_a_client_that_is_only_marked_as_moved(self) -> None:
        """It is not routed, but not moved again either."""
        self.assertEqual(self.result_of(self.a.assign(["x"], id_of("b"), binding=False)), ["x"])
        self.assertIsNone(self.result_of(self.a.assignment("x")))
        self.result_of(self.claim(self.c))
        self.assertEqual(self.assign("x"), [])

    def test_an_assignment_is_honored_on_every_node(self) -> None:
        self.result_of(self.claim(self.a))
        self.assertEqual(self.assign("x", "y"), ["x", "y"])
        for registry in (self.a, self.c):
            self.assertEqual(self.error_assignment(self.claim(registry)), self.assignment_to_b)
            self.assertEqual(
                self.error_assignment(self.claim(registry, "y", takeover_up_to=None)), self.assignment_to_b
            )
            self.assertEqual(self.result_of(registry.assignment("x")), self.assignment_to_b)
        self.assertEqual((self.node_name_of("x"), self.node_name_of("y")), ("a", None))

    def test_the_assigned_node_takes_over_from_any_owner(self) -> None:
        had = self.result_of(self.claim(self.a))
        self.assign("x")
        claim = self.result_of(self.claim(self.b))
        self.assertEqual((claim.previous_owner.node_name, claim.previous_owner.generation), ("a", had.generation))
        self.assertEqual(self.node_name_of("x"), "b")
        self.assertEqual(self.error_assignment(self.claim(self.a)), self.assignment_to_b)

    def test_a_claim_that_does_not_honor_assignments_ignores_them(self) -> None:
        had = self.result_of(self.claim(self.a))
        self.assign("x", "y")
        self.error_of(self.claim(self.c, honor_assignment=False), OwnedElsewhereError)
        self.assertIsInstance(self.result_of(self.claim(self.c, "y", honor_assignment=False)), Claim)
        self.assertEqual(self.result_of(self.a.reclaim(SessionKey("x", had.generation), "h:1")), had)

    def test_a_client_without_an_assignment(self) -> None:
        self.assign("y")
        self.assertIsInstance(self.result_of(self.claim(self.c)), Claim)
        self.assertIsNone(self.result_of(self.c.assignment("x")))
        self.assertIsNone(self.result_of(self.c.assignment("\ud800")))

    def test_a_batch_of_all_kinds(self) -> None:
        self.result_of(self.claim(self.a, "owned"))
        own = self.result_of(self.claim(self.c, "own"))
        self.assign("placed", "own", "other")
        pending = [self.claim(self.c, name) for name in ("placed", "free", "owned")]
        released, forced = (
            self.c.release(SessionKey("own", own.generation)),
            self.claim(self.c, "other", honor_assignment=False),
        )
        self.assertEqual(self.error_assignment(pending[0]), self.assignment_to_b)
        self.assertIsInstance(self.result_of(pending[1]), Claim)
        self.error_of(pending[2], OwnedElsewhereError)
        self.result_of(released)
        self.assertIsInstance(self.result_of(forced), Claim)
        self.assertEqual([self.node_name_of(name) for name in ("placed", "own", "other")], [None, None, "c"])

    def test_a_newer_claim_that_fails_supersedes_no_older_one(self) -> None:
        self.assign("x")
        older, newer = self.claim(self.c, honor_assignment=False), self.claim(self.c)
        self.assertIsInstance(self.result_of(older), Claim)
        self.error_assignment(newer)

    def test_an_assignment_is_valid_for_two_minutes(self) -> None:
        self.assign("x")
        self.pass_time(2 * MINUTE - 3)
        self.assertEqual(self.error_assignment(self.claim(self.c)), self.assignment_to_b)
        self.pass_time(3)
        self.assertIsNone(self.result_of(self.c.assignment("x")))
        self.assertIsInstance(self.result_of(self.claim(self.c)), Claim)

    def test_no_client_is_moved_twice_within_ten_minutes(self) -> None:
        self.assign("x")
        for seconds in (0, 5 * MINUTE, 5 * MINUTE - 10):
            self.pass_time(seconds)
            for registry, name in ((self.a, "b"), (self.b, "c"), (self.c, "a")):
                self.assertEqual(self.assign("x", by=registry, on=name), [])
        self.assertEqual(self.assign("x", "y", by=self.b, on="c"), ["y"])
        self.pass_time(10)
        self.assertEqual(self.assign("x", by=self.b, on="c"), ["x"])
        self.assertEqual(self.error_assignment(self.claim(self.a)).name, "c")

    def test_of_two_assignments_at_once_one_wins(self) -> None:
        names = [f"c{number:02}" for number in range(20)]
        first, second = self.a.assign(names[:15], id_of("c")), self.b.assign(names[5:], id_of("a"))
        self.assertEqual(sorted(self.result_of(first) + self.result_of(second)), names)
        self.assertEqual(len(self.result_of(self.b.assign(names, id_of("c")))), 0)

    def test_a_node_that_accepts_no_clients(self) -> None:
        self.result_of(self.b.heartbeat("draining", 1))
        self.assertEqual(self.assign("x"), [])
        self.result_of(self.b.heartbeat("up", 1000))
        self.assertEqual(self.assign("x"), [])
        self.assertEqual(self.assign("x", on="nobody"), [])
        # It can be assigned to another node at once.
        self.assertEqual(self.assign("x", on="c"), ["x"])

    def test_an_assignment_is_valid_only_while_its_node_accepts_clients(self) -> None:
        self.assign("x")
        for state, clients in (("draining", 1), ("up", 1000)):
            self.result_of(self.b.heartbeat(state, clients))
            self.assertIsNone(self.result_of(self.c.assignment("x")))
            self.result_of(self.c.release(SessionKey("x", self.result_of(self.claim(self.c)).generation)))
        self.result_of(self.b.heartbeat("up", 999))
        self.assertEqual(self.error_assignment(self.claim(self.c)), self.assignment_to_b)

    def test_a_node_with_an_expired_lease(self) -> None:
        self.assign("x", "y")
        self.pass_time(LEASE + 1, self.b)
        self.assertIsNone(self.result_of(self.c.assignment("x")))
        self.assertIsInstance(self.result_of(self.claim(self.c)), Claim)
        self.assertEqual(self.assign("z"), [])
        self.result_of(self.c.reap(10))
        self.assertIsInstance(self.result_of(self.claim(self.c, "y")), Claim)

    def test_a_node_that_has_left(self) -> None:
        self.assign("x")
        self.result_of(self.b.leave())
        self.assertIsInstance(self.result_of(self.claim(self.c)), Claim)
        self.assertEqual(self.assign("y"), [])

    def test_expired_assignments_are_purged(self) -> None:
        self.patch(statements, "MAX_SCANNED_ROWS", 4)
        self.patch(sql, "MAX_REMOVED_ROWS", 3)
        self.assign(*(f"c{number}" for number in range(10)))
        self.pass_time(5 * MINUTE)
        self.assign("c45", "d")
        self.assertEqual([self.result_of(self.c.purge_assignments()) for _ in range(3)], [False, False, True])
        self.assertEqual(len(self.left()), 12)
        self.pass_time(5 * MINUTE)
        # A call removes at most MAX_REMOVED_ROWS of a segment.
        tidied = [self.result_of(self.c.purge_assignments()) for _ in range(8)]
        self.assertIn(True, tidied)
        self.assertEqual(self.left(), ["c45", "d"])
        self.pass_time(10 * MINUTE)
        self.assertIs(self.result_of(self.b.purge_assignments()), True)
        self.assertEqual(self.left(), [])

    def left(self) -> list[str]:
        """Return the clients that have a row."""

        def read(connection: Any) -> list[str]:
            with closing(connection.cursor()) as cursor:
                cursor.execute("SELECT client_id FROM placements ORDER BY client_id")
                return [row[0] for row in cursor.fetchall()]

        found: list[str] = self.result_of(self.a._run_job(Priority.MAINTENANCE, "read", read))
        return found

    def test_text_that_has_a_meaning_in_sql(self) -> None:
        names = ["'", "\\", "%", "' OR '1'='1", '"', "\n", "\0"]
        self.assertEqual(self.assign(*names, "\ud800", "l" * 129), sorted(names))
        for name in names:
            self.assertEqual(self.error_assignment(self.claim(self.c, name)), self.assignment_to_b)
        self.assertEqual(self.assign("y", on="' OR '1'='1"), [])
        self.assertEqual(self.assign(), [])

    def test_when_it_is_closed(self) -> None:
        self.result_of(self.c.close())
        for deferred in (self.c.assign(["x"], id_of("b")), self.c.assignment("x"), self.c.purge_assignments()):
            self.error_of(deferred, RegistryUnavailableError)


class SQLiteAssignmentsTests(SQLiteMixin, AssignmentsContractMixin, SynchronousTestCase):
    pass


class MySQLAssignmentsTests(MySQLMixin, AssignmentsContractMixin, SynchronousTestCase):
    pass


class RaceTests(ThreadedRegistryMixin, TestCase):
    """Several nodes assign clients at once."""

    timeout = 60

    async def test_each_client_is_assigned_by_one_node(self) -> None:
        self.url = mariadb.server().new_database()
        nodes = [await self.start_node(f"n{number}", batch_delay=0.0) for number in range(4)]
        names = [f"c{number:03}" for number in range(300)]
        # Each node starts with other clients, and assigns them to the next node.
        pending = [
            node.assign((names * 2)[start : start + 60], id_of(f"n{(number + 1) % 4}"))
            for start in range(0, 300, 30)
            for number, node in enumerate(nodes)
        ]
        moved = [name for each in await gatherResults(pending) for name in each]
        self.assertEqual(sorted(moved), names)
        self.assertEqual(self.metrics.registry_errors, {})
        found = await gatherResults([nodes[0].assignment(name) for name in names])
        self.assertNotIn(None, found)
