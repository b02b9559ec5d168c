"""A batch that is tried again: nothing of the first try stays that nobody knows of."""

from __future__ import annotations

import sqlite3
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.claims import ClaimRequest, ReleaseRequest
from gateway.registry.interface import Claim, LeaseLostError, OwnedElsewhereError
from gateway.registry.sqlite import SQLite
from gateway.registry.statements import LocalNode, Statements
from tests.registry.contract import LEASE, node_info


class RetriedBatchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = 1_000_000_000
        sqlite = SQLite(self.mktemp(), lambda: self.now)
        self.connection = sqlite3.connect(sqlite.path, isolation_level=None)
        self.addCleanup(self.connection.close)
        sqlite.prepare(self.connection)
        self.statements = Statements(sqlite, LEASE)
        self.a, self.b = (self.statements.join(self.connection, node_info(name)) for name in "ab")

    def write(self, local_node: LocalNode, maybe_written: list[tuple[str, int]], *batch: Any) -> list[Any]:
        self.now += 1
        return self.statements.write_batch(self.connection, local_node, list(batch), maybe_written)

    def rows(self) -> list[tuple[str, int]]:
        return self.connection.execute("SELECT client_id, generation FROM clients ORDER BY client_id").fetchall()

    def claim(self, client_id: str = "x", takeover_up_to: int | None = None) -> ClaimRequest:
        return ClaimRequest(client_id, "h:1", None, Deferred(), False, takeover_up_to)

    def test_the_second_try_is_what_counts(self) -> None:
        tried: list[tuple[str, int]] = []
        request = self.claim()
        for _ in range(2):
            (claim,) = self.write(self.a, tried, request)
        self.assertEqual(self.rows(), [("x", claim.generation)])
        self.assertEqual(len(tried), 2)

    def test_a_lease_that_ran_out_between_them(self) -> None:
        tried: list[tuple[str, int]] = []
        request, other = self.claim(), self.claim("y")
        self.write(self.a, [], other)
        self.write(self.a, tried, request)
        self.connection.execute("UPDATE nodes SET heartbeat_at = 1")
        (outcome,) = self.write(self.a, tried, request)
        self.assertIsInstance(outcome, LeaseLostError)
        self.assertEqual([name for name, _ in self.rows()], ["y"])

    def test_somebody_claimed_it_between_them(self) -> None:
        tried: list[tuple[str, int]] = []
        request = self.claim(takeover_up_to=0)
        self.write(self.a, tried, request)
        (theirs,) = self.write(self.b, [], self.claim())
        (outcome,) = self.write(self.a, tried, request)
        self.assertIsInstance(outcome, OwnedElsewhereError)
        self.assertEqual(self.rows(), [("x", theirs.generation)])

    def test_an_earlier_claim_of_this_node_is_none_of_its_tries(self) -> None:
        (first,) = self.write(self.a, [], self.claim())
        self.connection.execute("UPDATE nodes SET heartbeat_at = 1")
        self.write(self.a, [("x", first.generation + 5)], self.claim())
        self.assertEqual(self.rows(), [("x", first.generation)])

    def test_a_reclaim_stays(self) -> None:
        tried: list[tuple[str, int]] = []
        for batch in (
            [ClaimRequest("x", "h:1", 7, Deferred())],
            [ClaimRequest("x", "h:1", 7, Deferred()), ReleaseRequest("y", 1)],
        ):
            outcome = self.write(self.a, tried, *batch)[0]
            self.assertEqual(outcome, Claim(7, 7 / 1e6))
            self.assertEqual((self.rows(), tried), ([("x", 7)], []))
