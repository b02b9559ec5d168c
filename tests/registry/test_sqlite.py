"""The registry in an SQLite file."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.metrics import Metrics
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import SessionKey
from gateway.registry.job_queue import ErrorKind
from gateway.registry.sqlite import SQLite, SQLiteRegistry
from gateway.settings import ConfigError
from tests.builders.registry_contract import (
    LEASE,
    ClaimPolicyContractMixin,
    RegistryContractMixin,
    RegistryMixin,
    node_info,
)
from tests.builders.sqlite_registry import ManualPoolTestCase, make_sqlite_registry


class SQLiteMixin(RegistryMixin):
    def set_up_database(self) -> None:
        self.path = os.path.abspath(self.mktemp() + " of tests.sqlite")

    def make_registry(self) -> SQLiteRegistry:
        return make_sqlite_registry(self.path, self.clock)


class SQLiteClaimPolicyTests(SQLiteMixin, ClaimPolicyContractMixin, SynchronousTestCase):
    pass


class SQLiteContractTests(SQLiteMixin, RegistryContractMixin, SynchronousTestCase):
    def test_rows_of_a_node_that_was_killed_are_taken_over_and_reaped(self) -> None:
        self.result_of(self.a.claim("x", "h:1"))
        self.result_of(self.a.claim("y", "h:1"))
        b = self.start_node("b")  # the next process on the same file
        self.result_of(b.claim("x", "h:2"))
        self.clock.advance(LEASE)
        self.result_of(b.heartbeat("up", 1))
        self.assertEqual(self.result_of(b.reap(10)), 1)
        self.assertEqual([location.client_id for location in self.result_of(b.clients("", 10))], ["x"])
        self.assertEqual([node.name for node in self.result_of(b.nodes())], ["b"])


class ErrorTests(ManualPoolTestCase):
    """Errors of a database that cannot be written."""

    def test_a_full_disk(self) -> None:
        self.execute("PRAGMA max_page_count = 1")
        claims = [self.registry.claim(f"{i:0100}", "h:1") for i in range(150)]
        self.step(0.003)
        self.assertIn("is full", str(self.failureResultOf(claims[0], RegistryUnavailableError).value))
        for claim in claims[1:]:
            self.failureResultOf(claim, RegistryUnavailableError)
        self.assertEqual(self.metrics.registry_errors, {"batch": 1})
        claim = self.registry.claim("x", "h:1")  # on a new connection, without that limit
        self.step(0.003)
        self.successResultOf(claim)

    def test_a_database_that_cannot_be_written(self) -> None:
        self.execute("PRAGMA query_only = 1")
        heartbeat = self.registry.heartbeat("up", 0)
        self.step()
        self.assertIn("readonly", str(self.failureResultOf(heartbeat, RegistryUnavailableError).value))


class OpenTests(SynchronousTestCase):
    """Errors of the path have one line."""

    def refused(self, path: str) -> str:
        registry = make_sqlite_registry(path, Clock())
        text = str(self.failureResultOf(registry.open(), ConfigError).value)
        self.assertTrue(text.startswith("--registry: "), text)
        self.assertNotIn("\n", text)
        self.failureResultOf(registry.find("x"), RegistryUnavailableError)
        self.successResultOf(registry.close())
        return text

    def write(self, content: bytes) -> str:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def test_a_missing_folder(self) -> None:
        self.assertIn("nowhere does not exist", self.refused("/nowhere/registry.sqlite"))

    def test_a_folder(self) -> None:
        self.assertIn("is a folder", self.refused("."))

    def test_a_read_only_folder(self) -> None:
        self.assertIn("cannot be written", self.refused("/proc/registry.sqlite"))

    def test_a_file_that_is_not_a_database(self) -> None:
        self.assertIn("not an SQLite database", self.refused(self.write(b"Dear diary, " * 100)))

    def test_a_damaged_database(self) -> None:
        path = self.write(b"")
        registry = make_sqlite_registry(path, Clock())
        self.successResultOf(registry.open())
        self.successResultOf(registry.close())
        with open(path, "r+b") as file:
            file.seek(100)
            file.write(b"\xff" * 3000)
        self.assertIn("cannot be used: ", self.refused(path))

    def execute(self, path: str, *texts: str) -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        for text in texts:
            connection.execute(text)
        connection.close()

    def test_the_database_of_another_program(self) -> None:
        path = self.mktemp()
        self.execute(path, "CREATE TABLE nodes (a)")
        self.assertIn("another program", self.refused(path))

    def test_a_newer_schema(self) -> None:
        path = self.mktemp()
        self.execute(path, "CREATE TABLE schema_version (version)", "INSERT INTO schema_version VALUES (99)")
        self.assertIn("version 99", self.refused(path))

    def test_kinds_of_errors(self) -> None:
        sqlite = SQLite(self.mktemp(), lambda: 0)
        for kind, errors in {
            ErrorKind.RETRYABLE: [sqlite3.OperationalError("database is locked")],
            ErrorKind.UNAVAILABLE: [
                sqlite3.OperationalError("database or disk is full"),
                sqlite3.OperationalError("disk I/O error"),
                sqlite3.OperationalError("attempt to write a readonly database"),
                sqlite3.OperationalError("no such table: clients"),
                sqlite3.DatabaseError("database disk image is malformed"),
                sqlite3.ProgrammingError("Cannot operate on a closed database."),
                *(ConfigError("registry", "no"), RegistryUnavailableError("not joined"), OSError(), None),
            ],
            ErrorKind.REFUSED: [
                sqlite3.OperationalError("too many SQL variables"),
                sqlite3.DataError("string or blob too big"),
                sqlite3.IntegrityError("CHECK constraint failed"),
                sqlite3.ProgrammingError("Error binding parameter 1: type 'list' is not supported"),
                *(OverflowError(), ValueError(), UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates")),
            ],
        }.items():
            for error in errors:
                self.assertIs(sqlite.classify(error), kind, error)

    def test_an_unprintable_path(self) -> None:
        self.assertIn(r"nowhere\nb", self.refused("/nowhere\nb/a\nb"))

    def test_no_path(self) -> None:
        for path in (":memory:", "a\0b"):
            self.assertIn("write sqlite:PATH", str(self.assertRaises(ConfigError, make_sqlite_registry, path, Clock())))

    def test_a_relative_path_is_resolved_at_the_start(self) -> None:
        path = self.mktemp()
        registry = make_sqlite_registry(path, Clock())
        self.addCleanup(os.chdir, os.getcwd())
        absolute = os.path.abspath(path)
        os.chdir("/")
        self.successResultOf(registry.open())
        self.successResultOf(registry.close())
        self.assertTrue(os.path.exists(absolute))

    def test_it_can_be_reopened(self) -> None:
        registry = make_sqlite_registry(self.mktemp(), Clock())
        for _ in range(2):
            self.successResultOf(registry.open())
            self.successResultOf(registry.close())


class ThreadedTests(TestCase):
    """With adbapi's own pool and the real reactor."""

    def setUp(self) -> None:
        self.path = os.path.abspath(self.mktemp())
        self.metrics = Metrics()

    def make(self, **options: Any) -> SQLiteRegistry:
        return SQLiteRegistry(self.path, lease=LEASE, reactor=reactor, metrics=self.metrics, **options)

    async def start(self, name: str) -> SQLiteRegistry:
        registry = self.make()
        await registry.open()
        self.addCleanup(registry.close)
        await registry.join(node_info(name))
        return registry

    def test_two_registries_on_one_file_at_once(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._two_registries())

    async def _two_registries(self) -> None:
        a, b = await gatherResults([Deferred.fromCoroutine(self.start(name)) for name in "ab"])
        names = [f"c{i:03}" for i in range(300)]
        claims = await gatherResults([registry.claim(name, "h:1") for name in names for registry in (a, b)])
        found = await gatherResults([a.find(name) for name in names])
        for of_a, of_b, location in zip(claims[::2], claims[1::2], found, strict=True):
            self.assertEqual(location.generation, max(of_a.generation, of_b.generation))
            self.assertNotEqual(of_a.generation, of_b.generation)
            self.assertEqual(location.node_name, "a" if of_a.generation > of_b.generation else "b")
        released = zip((a, b) * 300, claims, [name for name in names for _ in "ab"], strict=True)
        await gatherResults(
            [registry.release(SessionKey(name, claim.generation)) for registry, claim, name in released]
        )
        self.assertEqual(await b.clients("", 10), [])
        self.assertEqual(self.metrics.registry_errors, {})

    def test_an_unusable_path(self) -> Deferred[Any]:
        self.path = "/nowhere/registry.sqlite"
        return self.assertFailure(self.make().open(), ConfigError)

    def test_the_pragmas(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._pragmas())

    async def _pragmas(self) -> None:
        registry = await self.start("a")
        wanted = {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 5000, "cache_size": -512}
        (pool,) = registry._pools
        for name, value in wanted.items():

            def read(connection: Any, name: str = name) -> Any:
                return connection.execute(f"PRAGMA {name}").fetchone()[0]

            self.assertEqual(await pool.run(read, False), value)

    def test_a_removed_file_is_created_again(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._removed())

    async def _removed(self) -> None:
        registry = await self.start("a")
        claim = await registry.claim("x", "h:1")
        for end in ("", "-wal", "-shm"):
            os.remove(self.path + end)
        self.assertFalse(await registry.heartbeat("up", 1))
        self.assertEqual(
            (await registry.reclaim(SessionKey("x", claim.generation), "h:1")).generation, claim.generation
        )
        other = await self.start("b")
        self.assertEqual((await other.find("x")).node_name, "a")

    def test_another_process_has_the_lock(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._locked())

    async def _locked(self) -> None:
        registry = await self.start("a")
        locker = (
            "import sqlite3, sys\n"
            "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "connection.execute('BEGIN EXCLUSIVE')\n"
            "print('locked', flush=True)\n"
            "sys.stdin.readline()\n"
            "connection.execute('COMMIT')\n"
            "connection.close()\n"
        )
        command = [sys.executable, "-c", locker, self.path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            self.assertEqual(process.stdout.readline(), b"locked\n")
            # Readers do not wait; a writer does, up to the busy timeout.
            self.assertIsNone(await registry.find("x"))
            (pool,) = registry._pools
            await pool.run(lambda connection: connection.execute("PRAGMA busy_timeout = 0").fetchall(), False)
            error = await self.assertFailure(registry.claim("x", "h:1"), RegistryUnavailableError)
            self.assertIn("locked", str(error))
            waiting = registry.claim("x", "h:1")
            process.stdin.close()
            self.assertEqual(process.wait(), 0)
        claim = await waiting
        self.assertEqual((await registry.find("x")).generation, claim.generation)

    def test_several_processes_start_at_once_on_a_new_file(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._starting_at_once())

    async def _starting_at_once(self) -> None:
        starter = (
            "import sqlite3, sys, time\n"
            "from gateway.registry.job_queue import ErrorKind\n"
            "from gateway.registry.sqlite import SQLite\n"
            "sqlite = SQLite(sys.argv[1], time.time_ns)\n"
            "print('ready', flush=True)\n"
            "sys.stdin.readline()\n"
            "for attempt in range(50):\n"
            "    connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "    try:\n"
            "        sqlite.prepare(connection)\n"
            "        break\n"
            "    except sqlite3.OperationalError as error:\n"
            "        assert sqlite.classify(error) is ErrorKind.RETRYABLE, error\n"
            "connection.close()\n"
        )
        command = [sys.executable, "-c", starter, self.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) for _ in range(3)
        ]
        for process in processes:
            assert process.stdout is not None
            self.assertEqual(process.stdout.readline(), b"ready\n")
        for process in processes:
            process.communicate(b"\n")
        registry = await self.start("a")
        self.assertEqual([process.returncode for process in processes], [0, 0, 0])
        self.assertEqual(len(await registry.nodes()), 1)
