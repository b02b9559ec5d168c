"""Tests of gateway.registry.statements."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry import statements
from gateway.registry.claims import ClaimRequest, ReleaseRequest
from gateway.registry.errors import LeaseLostError, OwnedElsewhereError
from gateway.registry.interface import Claim, ClaimPolicy, SessionKey
from gateway.registry.sqlite import SQLite
from gateway.registry.statements import HeartbeatResult, LocalNode, Statements
from tests.builders.registry_contract import LEASE, node_info


class StatementsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = 1_000_000_000
        self.sqlite = SQLite(self.mktemp(), lambda: self.now)
        self.connection: Any = sqlite3.connect(self.sqlite.path, isolation_level=None)
        self.addCleanup(self.connection.close)
        self.sqlite.prepare(self.connection)
        self.statements = Statements(self.sqlite, LEASE)

    def add(self, local_node: LocalNode, *client_ids: str) -> None:
        rows = [(client_id, local_node.number, 1, 1, "h") for client_id in client_ids]
        self.connection.executemany(self.sqlite.upsert_statement, rows)

    def ids(self) -> list[str]:
        return [row[0] for row in self.connection.execute("SELECT client_id FROM clients")]

    def test_node_numbers_are_not_reused(self) -> None:
        first = self.statements.join(self.connection, node_info("a"))
        self.connection.execute("DELETE FROM nodes")
        second = self.statements.join(self.connection, node_info("b"))
        self.assertGreater(second.number, first.number)

    def test_a_removed_row_is_inserted_with_its_old_number(self) -> None:
        me = self.statements.join(self.connection, node_info("a"))
        self.connection.execute("DELETE FROM nodes")
        self.now += 1
        result, renewed = self.statements.heartbeat(self.connection, me, "draining", 3)
        self.assertEqual(result, HeartbeatResult(lease_held=False, lost_commits=True, now=self.now))
        self.assertEqual(renewed, attrs.evolve(me, heartbeat_at=self.now))
        row = self.connection.execute("SELECT state, clients, started_at, heartbeat_at FROM nodes").fetchone()
        self.assertEqual(row, ("draining", 3, self.now - 1, self.now))

    def test_batches_of_all_sizes_use_few_distinct_statements(self) -> None:
        me = self.statements.join(self.connection, node_info("a"))
        names = [f"n{number:03}" for number in range(200)]
        self.add(me, *names)
        texts: set[str] = set()
        self.connection.set_trace_callback(lambda text: texts.add(re.sub(r"'n\d+'", "?", text)))
        for size in range(200):
            found = self.statements.find(self.connection, names[:size])
            self.assertEqual(sorted(found), names[:size])
        self.assertEqual(len([text for text in texts if "client_id IN (" in text]), 10)

    def test_a_number_of_another_node_is_not_reused(self) -> None:
        me = self.statements.join(self.connection, node_info("a"))
        self.connection.execute("UPDATE nodes SET node_id = 'somebody'")
        result, renewed = self.statements.heartbeat(self.connection, me, "up", 0)
        self.assertFalse(result.lease_held)
        self.assertNotEqual(renewed.number, me.number)
        result, again = self.statements.heartbeat(self.connection, renewed, "up", 0)
        self.assertEqual((result.lease_held, result.lost_commits, again), (True, False, renewed))

    def test_a_row_older_than_the_last_heartbeat(self) -> None:
        """The database has gone back to a state of some commits ago."""
        me = self.statements.join(self.connection, node_info("a"))
        self.now += 5
        _, renewed = self.statements.heartbeat(self.connection, me, "up", 0)
        self.connection.execute("UPDATE nodes SET heartbeat_at = heartbeat_at - 5")
        self.now += 1
        result, _ = self.statements.heartbeat(self.connection, renewed, "up", 0)
        self.assertEqual(result, HeartbeatResult(lease_held=False, lost_commits=True, now=self.now))

    def test_leaving_ends_the_lease_before_the_rows_are_removed(self) -> None:
        me = self.statements.join(self.connection, node_info("a"))
        self.add(me, "x")
        self.statements.expire_lease(self.connection, me)
        self.assertEqual(self.statements.find(self.connection, ["x"]), {})
        self.assertEqual(list(self.statements.dead_nodes(self.connection, None)), [me.number])

    def test_listing_scans_the_table_in_segments(self) -> None:
        self.patch(statements, "MAX_SCANNED_ROWS", 2)
        a, b = (self.statements.join(self.connection, node_info(name)) for name in "ab")
        self.add(a, "1", "2", "4", "6")
        self.add(b, "3", "5")
        found, following = self.statements.clients(
            self.connection, "", statements.CLIENT_ID_UPPER_BOUND, 10, a.info.node_id
        )
        self.assertEqual(([each.client_id for each in found], following), (["1", "2"], "3"))
        found, following = self.statements.clients(
            self.connection, "3", statements.CLIENT_ID_UPPER_BOUND, 10, a.info.node_id
        )
        self.assertEqual(([each.client_id for each in found], following), (["4"], "5"))
        first: str | None = ""
        left = []
        while first is not None:
            first = self.statements.remove_own_clients(self.connection, a, first)
            left.append("".join(self.ids()))
        self.assertEqual(left, ["3456", "356", "35"])
        self.assertEqual([node.name for node in self.statements.nodes(self.connection)], ["b"])

    def test_reaping_scans_the_table_in_segments(self) -> None:
        self.patch(statements, "MAX_SCANNED_ROWS", 2)
        a = self.statements.join(self.connection, node_info("a"))
        self.now += 20_000_000
        b = self.statements.join(self.connection, node_info("b"))
        self.add(a, "3", "4", "5")
        self.add(b, "1", "2")
        dead = self.statements.dead_nodes(self.connection, b)
        self.assertEqual(self.statements.reap(self.connection, dead, "", 10), (0, "3"))
        self.assertEqual(self.statements.reap(self.connection, dead, "3", 1), (1, "3"))
        self.assertEqual(self.statements.reap(self.connection, dead, "3", 10), (2, None))
        self.assertEqual((self.ids(), self.statements.dead_nodes(self.connection, b)), (["1", "2"], {}))

    def test_a_dead_node_is_spared_after_its_next_heartbeat(self) -> None:
        a = self.statements.join(self.connection, node_info("a"))
        self.add(a, "x")
        self.now += 20_000_000
        dead = self.statements.dead_nodes(self.connection, None)
        self.statements.heartbeat(self.connection, a, "up", 1)
        self.now += 20_000_000  # dead again, but it may have claimed clients behind the scan
        self.assertEqual(self.statements.reap(self.connection, dead, "", 10), (0, None))
        self.assertEqual(self.ids(), ["x"])

    def test_possibly_written_claims_are_known_when_the_commit_fails(self) -> None:
        class Failing:
            cursor = self.connection.cursor
            rollback = self.connection.rollback

            def commit(self) -> None:
                raise sqlite3.OperationalError("disk I/O error")

        me = self.statements.join(self.connection, node_info("a"))
        tried: list[SessionKey] = []
        batch: list[Any] = [ClaimRequest("x", "h", None, Deferred()), ReleaseRequest(SessionKey("y", 1))]
        self.assertRaises(sqlite3.OperationalError, self.statements.write_batch, Failing(), me, batch, tried)
        self.assertEqual((tried, self.ids()), ([("x", self.now)], []))

    def test_every_scan_uses_the_primary_key(self) -> None:
        texts: list[str] = []
        self.connection.set_trace_callback(texts.append)
        me = self.statements.join(self.connection, node_info("a"))
        self.statements.find(self.connection, ["x", "y"])
        self.statements.clients(self.connection, "a", "b", 10, None)
        self.statements.clients(self.connection, "a", "b", 10, me.info.node_id)
        self.statements.assign(self.connection, ["x", "y"], me.info.node_id, True)
        self.statements.assignments(self.connection, ["x", "y"])
        self.statements.purge_assignments(self.connection, "a")
        self.statements.remove_own_clients(self.connection, me, "a")
        self.connection.set_trace_callback(None)
        walks = [text for text in texts if "client_id" in text and not text.startswith("INSERT")]
        self.assertEqual(len(walks), 11)
        for text in walks:
            plan = " / ".join(row[3] for row in self.connection.execute(f"EXPLAIN QUERY PLAN {text}"))
            self.assertIn("USING PRIMARY KEY", plan)
            self.assertNotIn("TEMP B-TREE", plan)


class RetriedBatchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = 1_000_000_000
        sqlite = SQLite(self.mktemp(), lambda: self.now)
        self.connection = sqlite3.connect(sqlite.path, isolation_level=None)
        self.addCleanup(self.connection.close)
        sqlite.prepare(self.connection)
        self.statements = Statements(sqlite, LEASE)
        self.a, self.b = (self.statements.join(self.connection, node_info(name)) for name in "ab")

    def write(self, local_node: LocalNode, maybe_written: list[SessionKey], *batch: Any) -> list[Any]:
        self.now += 1
        return self.statements.write_batch(self.connection, local_node, list(batch), maybe_written)

    def rows(self) -> list[tuple[str, int]]:
        return self.connection.execute("SELECT client_id, generation FROM clients ORDER BY client_id").fetchall()

    def claim(self, client_id: str = "x", takeover_up_to: int | None = None) -> ClaimRequest:
        return ClaimRequest(client_id, "h:1", None, Deferred(), ClaimPolicy(takeover_up_to))

    def test_the_second_try_overwrites_the_first(self) -> None:
        tried: list[SessionKey] = []
        request = self.claim()
        for _ in range(2):
            (claim,) = self.write(self.a, tried, request)
        self.assertEqual(self.rows(), [("x", claim.generation)])
        self.assertEqual(len(tried), 2)

    def test_a_lease_that_expired_between_the_tries(self) -> None:
        tried: list[SessionKey] = []
        request, other = self.claim(), self.claim("y")
        self.write(self.a, [], other)
        self.write(self.a, tried, request)
        self.connection.execute("UPDATE nodes SET heartbeat_at = 1")
        (outcome,) = self.write(self.a, tried, request)
        self.assertIsInstance(outcome, LeaseLostError)
        self.assertEqual([name for name, _ in self.rows()], ["y"])

    def test_another_claim_between_the_tries(self) -> None:
        tried: list[SessionKey] = []
        request = self.claim(takeover_up_to=0)
        self.write(self.a, tried, request)
        (other,) = self.write(self.b, [], self.claim())
        (outcome,) = self.write(self.a, tried, request)
        self.assertIsInstance(outcome, OwnedElsewhereError)
        self.assertEqual(self.rows(), [("x", other.generation)])

    def test_an_earlier_claim_of_this_node_is_kept(self) -> None:
        (first,) = self.write(self.a, [], self.claim())
        self.connection.execute("UPDATE nodes SET heartbeat_at = 1")
        self.write(self.a, [SessionKey("x", first.generation + 5)], self.claim())
        self.assertEqual(self.rows(), [("x", first.generation)])

    def test_a_reclaim_stays(self) -> None:
        tried: list[SessionKey] = []
        for batch in (
            [ClaimRequest("x", "h:1", 7, Deferred())],
            [ClaimRequest("x", "h:1", 7, Deferred()), ReleaseRequest(SessionKey("y", 1))],
        ):
            outcome = self.write(self.a, tried, *batch)[0]
            self.assertEqual(outcome, Claim(7, 7 / 1e6))
            self.assertEqual((self.rows(), tried), ([("x", 7)], []))
