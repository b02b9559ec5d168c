"""Tests for :mod:`tests.simulation.database`."""

from __future__ import annotations

import sqlite3
from typing import Any

from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.database import DRIVER_TIMEOUT, EPOCH, ConnectionLostError, SimulatedDatabase, TooLargeError
from tests.simulation.network import Network
from tests.simulation.scheduler import Scheduler

NODE = "10.0.0.1"


class DatabaseTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.scheduler = Scheduler(1)
        network = Network(self.scheduler)
        self.addCleanup(network.close)
        self.database = SimulatedDatabase(self.scheduler, network)
        self.addCleanup(self.database.connection.close)
        self.results: list[Any] = []

    def insert(self, *client_ids: str) -> None:
        def work(connection: Any) -> str:
            cursor = connection.cursor()
            cursor.execute("BEGIN")
            try:
                for client_id in client_ids:
                    cursor.execute("INSERT INTO clients VALUES (?, 1, 1, 1, '')", (client_id,))
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
            return "done"

        self.database.submit(NODE, work, self.results.append)

    def advance(self, seconds: float = 1.0) -> None:
        self.scheduler.run(self.scheduler.now + seconds)

    def ids(self) -> list[str]:
        return [client_id for (client_id,) in self.database.rows("SELECT client_id FROM clients ORDER BY 1")]

    def assert_failed(self, kind: type[Exception]) -> None:
        (failure,) = self.results
        self.assertIsInstance(failure, Failure)
        self.assertIsInstance(failure.value, kind)
        self.results.clear()

    def test_job(self) -> None:
        self.insert("x")
        self.assertEqual(self.results, [])
        self.advance()
        self.assertEqual((self.results, self.ids()), (["done"], ["x"]))

    def test_away(self) -> None:
        self.insert("x")
        self.database.set_away(True)
        self.assert_failed(ConnectionLostError)
        self.insert("y")
        self.advance()
        self.assert_failed(ConnectionLostError)
        self.database.set_away(False)
        self.insert("z")
        self.advance()
        self.assertEqual((self.results, self.ids()), (["done"], ["z"]))

    def test_hanging_server_carries_out_later_what_has_timed_out(self) -> None:
        self.database.set_hanging(True)
        self.insert("x")
        self.advance(DRIVER_TIMEOUT + 1)
        self.assert_failed(ConnectionLostError)
        self.assertEqual(self.ids(), [])
        self.database.set_hanging(False)
        self.advance()
        self.assertEqual((self.results, self.ids()), ([], ["x"]))

    def test_lost_result(self) -> None:
        self.database.lost_result_share = 1.0
        self.insert("x")
        self.advance()
        self.assert_failed(ConnectionLostError)
        self.assertEqual(self.ids(), ["x"])

    def test_dead_lock(self) -> None:
        self.database.deadlock_share = 1.0
        self.insert("x")
        self.advance()
        self.assert_failed(sqlite3.OperationalError)
        self.assertEqual(self.ids(), [])

    def test_fail_over(self) -> None:
        self.database.keeps_snapshots = True
        for client_id in "abcd":
            self.insert(client_id)
            self.advance()
        self.database.fail_over(2)
        self.assertEqual(self.ids(), ["a", "b"])

    def test_clock(self) -> None:
        self.advance(2.0)
        self.database.clock_offset -= 10.0
        self.assertEqual(self.database.now(), EPOCH - 8_000_000)

    def test_size_limit(self) -> None:
        self.database.max_changes = 2
        self.insert("a", "b", "c")
        self.advance()
        self.assert_failed(TooLargeError)
        self.insert("a", "b")
        self.advance()
        self.assertEqual(self.ids(), ["a", "b"])
