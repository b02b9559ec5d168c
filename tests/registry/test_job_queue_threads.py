"""No cursor outlives its job, and each is closed and freed in the database's thread.

SQLite resets a statement when its cursor is closed or freed, and waits for the connection to do so. In the reactor's
thread, this would block the reactor for as long as the next job waits for a lock.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable
from typing import Any

from twisted.enterprise import adbapi
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from gateway.metrics import Metrics
from gateway.registry import job_queue, sqlite
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import SessionKey
from gateway.registry.sqlite import SQLiteRegistry
from gateway.settings import ConfigError
from tests.builders.registry_contract import LEASE, node_info


class CursorRecorder:
    """Record how the cursors of a test are closed and freed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed: set[int] = set()
        #: the cursors that are alive, by weak references whose callbacks record where they are freed
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.threads: set[int] = set()

    def add(self, cursor: Any) -> int:
        self.made += 1
        number = self.made
        self.threads.add(threading.get_ident())

        def gone(_: object) -> None:
            self.threads.add(threading.get_ident())
            del self.alive[number]

        self.alive[number] = weakref.ref(cursor, gone)
        return number

    def close(self, number: int) -> None:
        self.closed.add(number)
        self.threads.add(threading.get_ident())


class CursorTests(TestCase):
    def setUp(self) -> None:
        self.path = os.path.abspath(self.mktemp())
        self.record = record = CursorRecorder()
        self.patch(job_queue, "RETRY_TIMEOUT", 0.0)
        self.patch(sqlite, "BUSY_TIMEOUT", 0)
        self.patch(sqlite, "_PRAGMAS", ("journal_mode = WAL",))

        class Cursor(sqlite3.Cursor):
            def __init__(self, connection: sqlite3.Connection) -> None:
                super().__init__(connection)
                self.number = record.add(self)

            def close(self) -> None:
                record.close(self.number)
                super().close()

        class Connection(sqlite3.Connection):
            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

        self.registry = SQLiteRegistry(
            self.path,
            lease=LEASE,
            reactor=reactor,
            metrics=Metrics(),
            make_pool=lambda *args, **kwargs: adbapi.ConnectionPool(*args, factory=Connection, **kwargs),
        )
        self.addCleanup(self.registry.close)
        self.other = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(self.other.close)

    def check(self) -> None:
        """Check the cursors of a job that has just returned to the reactor."""
        self.assertGreater(self.record.made, 0)
        self.assertEqual(self.record.alive, {})
        self.assertEqual(self.record.closed, set(range(1, self.record.made + 1)))
        self.assertEqual(len(self.record.threads), 1)
        self.assertNotIn(threading.get_ident(), self.record.threads)
        self.record.__init__()  # type: ignore[misc]

    async def fails(self, job: Callable[[], Deferred[Any]], kind: type[Exception] = RegistryUnavailableError) -> None:
        caught = []
        try:
            await job()
        except kind as e:
            self.check()
            caught.append(e)
        self.assertEqual(len(caught), 1)

    async def start(self) -> None:
        await self.registry.open()
        await self.registry.join(node_info("a"))
        self.check()

    def test_a_lock_while_opening(self) -> Deferred[None]:
        self.other.execute("BEGIN EXCLUSIVE")
        return Deferred.fromCoroutine(self.fails(self.registry.open, ConfigError))

    def test_a_lock(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._lock())

    async def _lock(self) -> None:
        await self.start()
        self.other.execute("BEGIN EXCLUSIVE")
        await self.fails(lambda: self.registry.heartbeat("up", 0))
        await self.fails(lambda: self.registry.release(SessionKey("x", 1)))
        await self.fails(lambda: self.registry.claim("x", "h:1"))
        self.other.execute("ROLLBACK")
        await self.registry.claim("x", "h:1")
        self.check()

    def test_missing_tables(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._no_tables())

    async def _no_tables(self) -> None:
        await self.start()
        self.other.execute("DROP TABLE clients")
        self.other.execute("INSERT INTO nodes SELECT 99, 'gone', 'gone', '', '', 'up', 0, 1, 0, 0, '', 0")
        for job in (
            lambda: self.registry.claim("x", "h:1"),
            lambda: self.registry.find("x"),
            lambda: self.registry.clients("", 10),
            lambda: self.registry.reap(10),
        ):
            await self.fails(job)
        self.other.execute("DROP TABLE nodes")
        await self.fails(self.registry.nodes)
        await self.fails(lambda: self.registry.reap(10))
        await self.fails(lambda: self.registry.heartbeat("up", 0))
        await self.fails(self.registry.leave)

    def test_jobs_that_succeed(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._success())

    async def _success(self) -> None:
        await self.start()
        claim = await self.registry.claim("x", "h:1")
        self.assertIsNotNone(await self.registry.find("x"))
        self.assertEqual(len(await self.registry.clients("", 10)), 1)
        self.assertEqual(len(await self.registry.nodes()), 1)
        await self.registry.release(SessionKey("x", claim.generation))
        await self.registry.reap(10)
        await self.registry.leave()
        self.check()

    def test_a_job_that_does_not_close_its_cursor(self) -> Deferred[None]:
        """The frames of an exception are cleared, and its traceback can still be formatted."""
        return Deferred.fromCoroutine(self._forgetful())

    async def _forgetful(self) -> None:
        await self.start()
        (pool,) = self.registry._pools

        def clumsy(connection: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("NONSENSE")

        def forgetful(connection: Any) -> None:
            try:
                clumsy(connection)
            except sqlite3.OperationalError:
                cursor = connection.cursor()
                cursor.execute("MORE NONSENSE")

        failure = await pool.run(forgetful, False).addErrback(lambda failure: [failure])
        self.assertEqual(self.record.alive, {})
        self.assertIn("in forgetful", failure[0].getTraceback())
