"""Faults of a real server: locks, lost connections, and a server that is read-only, down, or hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pymysql
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from gateway.registry import mysql, mysql_driver
from gateway.registry.errors import RegistryRefusedError, RegistryUnavailableError
from gateway.registry.interface import ClaimPolicy, SessionKey
from gateway.registry.job_queue import ErrorKind, Priority
from gateway.registry.mysql import MySQLRegistry
from gateway.registry.schema_versions import load_files
from tests.builders import mariadb
from tests.builders.mysql_registry import ThreadedRegistryMixin
from tests.builders.registry_contract import LEASE, node_info


class FaultCase(ThreadedRegistryMixin, TestCase):
    """Record the errors that a registry classifies."""

    def setUp(self) -> None:
        self.server = mariadb.server()
        self.url = self.server.new_database()
        self.database = self.url.rpartition("/")[2]
        self.errors: list[int] = []
        #: called at the first error, before the retry
        self.repair: Callable[[], object] = lambda: None
        original = mysql.MySQL.classify

        def classify(database: mysql.MySQL, error: BaseException | None) -> ErrorKind:
            self.errors.append(error.args[0] if error is not None and error.args else None)
            if len(self.errors) == 1:
                self.repair()
            return original(database, error)

        self.patch(mysql.MySQL, "classify", classify)

    def execute(self, *texts: str) -> Any:
        return self.server.execute(*texts, database=self.database)

    def rows(self) -> list[str]:
        return [row[0].decode() for row in self.execute("SELECT client_id FROM clients ORDER BY client_id")]

    def connections(self) -> list[int]:
        text = f"SELECT id FROM information_schema.processlist WHERE db = '{self.database}' AND id <> CONNECTION_ID()"
        return [number for (number,) in self.execute(text)]

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            # The server caches information_schema.innodb_trx while it is queried again within 0.1 s.
            await deferLater(reactor, 0.15)

    def locked(self) -> bool:
        """Whether a transaction waits for a lock."""
        return bool(self.execute("SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"))


class RetryTests(FaultCase):
    def setUp(self) -> None:
        super().setUp()
        # Enough for a slow machine.
        self.patch(mysql.MySQL, "retry_timeout", 60.0)

    def test_a_connection_that_was_killed(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._killed())

    async def _killed(self) -> None:
        registry = await self.start_node("a")
        first = await registry.claim("x", "h:1")
        await registry.find("x")
        killed = self.connections()
        self.assertEqual(len(killed), 3)
        for number in killed:
            self.server.execute(f"KILL {number}")
        claim, found, renewed = await gatherResults(
            [registry.claim("y", "h:1"), registry.find("x"), registry.heartbeat("up", 1)]
        )
        self.assertEqual((found.generation, renewed), (first.generation, True))
        self.assertEqual((await registry.find("y")).generation, claim.generation)
        self.assertEqual(self.metrics.registry_errors, {})
        self.assertEqual(len(self.errors), 3)

    def test_a_deadlock(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._deadlock())

    async def _deadlock(self) -> None:
        registry = await self.start_node("a")
        await gatherResults([registry.claim(name, "h:1") for name in ("a", "b")])
        other = self.server.connect(self.database, autocommit=False)
        self.addCleanup(other.close)
        with other.cursor() as cursor:
            # It has written more, so it is not chosen as the deadlock victim.
            cursor.execute("INSERT INTO placements SELECT seq, 1, NOW(), NOW() FROM seq_1_to_1000")
            cursor.execute("UPDATE clients SET address = 'other' WHERE client_id = 'b'")
            claims = [registry.claim(name, "h:2") for name in ("a", "b")]
            await self.until(self.locked)
            await deferToThread(cursor.execute, "UPDATE clients SET address = 'other' WHERE client_id = 'a'")
        other.commit()
        await gatherResults(claims)
        self.assertEqual(self.errors[0], 1213)
        self.assertEqual((await registry.find("a")).address, "h:2")
        self.assertEqual(self.metrics.registry_errors, {})

    def test_a_lock_held_by_another_connection(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._lock())

    async def _lock(self) -> None:
        registry = await self.start_node("a")
        await registry.claim("x", "h:1")
        other = self.server.connect(self.database, autocommit=False)
        self.addCleanup(other.close)
        with other.cursor() as cursor:
            cursor.execute("UPDATE clients SET address = 'other' WHERE client_id = 'x'")
        claim = registry.claim("x", "h:2")
        await self.until(self.locked)
        # Nothing else waits for it: neither heartbeats, nor lookups, nor maintenance.
        self.assertTrue(await registry.heartbeat("up", 1))
        self.assertEqual((await registry.find("x")).address, "h:1")
        self.assertEqual(await registry.reap(10), 0)
        self.assertNoResult(claim)
        other.rollback()
        await claim

    def test_a_lock_timeout_is_retried(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._lock_again())

    async def _lock_again(self) -> None:
        registry = await self.start_node("a")
        await registry.claim("x", "h:1")
        other = self.server.connect(self.database, autocommit=False)
        self.addCleanup(other.close)
        with other.cursor() as cursor:
            cursor.execute("UPDATE clients SET address = 'other' WHERE client_id = 'x'")
        self.repair = other.rollback
        await registry.claim("x", "h:2")
        self.assertEqual(self.errors, [1205])
        self.assertEqual((await registry.find("x")).address, "h:2")

    def test_a_lock_of_all_tables(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._all_tables())

    async def _all_tables(self) -> None:
        server = mariadb.MariaDBServer()
        self.addCleanup(server.close)
        registry = await self.start_node("a", server.new_database())
        await registry.claim("x", "h:1")
        other = server.connect()
        self.addCleanup(other.close)
        with other.cursor() as cursor:
            cursor.execute("FLUSH TABLES WITH READ LOCK")
            self.repair = lambda: other.cursor().execute("UNLOCK TABLES")
            claim = registry.claim("x", "h:2")
            self.assertEqual((await registry.find("x")).address, "h:1")
            await claim
        self.assertEqual(self.errors, [1205])

    def test_a_server_that_is_read_only(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._read_only())

    async def _read_only(self) -> None:
        server = mariadb.MariaDBServer()
        self.addCleanup(server.close)
        url = server.new_database()
        server.execute("CREATE USER gw@'127.0.0.1'", "GRANT ALL ON fresh1.* TO gw@'127.0.0.1'")
        registry = await self.start_node("a", url.replace("root@", "gw@"))
        claim = await registry.claim("x", "h:1")
        server.execute("SET GLOBAL read_only = 1")
        self.repair = lambda: server.execute("SET GLOBAL read_only = 0")
        await registry.claim("x", "h:2")
        self.assertEqual(self.errors, [1290])
        server.execute("SET GLOBAL read_only = 1")
        registry._queues[Priority.HEARTBEAT]._retry_timeout = 0.0
        error = await self.assertFailure(registry.heartbeat("up", 1), RegistryUnavailableError)
        self.assertIn("read-only", str(error))
        self.assertGreater((await registry.find("x")).generation, claim.generation)
        server.execute("SET GLOBAL read_only = 0")
        self.assertTrue(await registry.heartbeat("up", 1))

    def test_other_errors_are_not_retried(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._not_passing())

    async def _not_passing(self) -> None:
        registry = await self.start_node("a")
        self.execute("DROP TABLE clients")
        error = await self.assertFailure(registry.find("x"), RegistryUnavailableError)
        self.assertIn("clients' doesn't exist", str(error))
        self.assertEqual(self.errors, [1146])
        self.assertEqual(self.metrics.registry_errors, {"find": 1})


class CommitTests(FaultCase):
    """The connection breaks at the commit, so it is unknown whether the batch was written."""

    def setUp(self) -> None:
        super().setUp()
        self.breaking = 0
        #: whether the commit reaches the server
        self.reaches = True
        commit = mysql_driver.Connection.commit

        def breaks(connection: mysql_driver.Connection) -> None:
            if self.breaking and connection._in_transaction():
                self.breaking -= 1
                if self.reaches:
                    commit(connection)
                connection._force_close()
                raise pymysql.OperationalError(2013, "Lost connection to MySQL server during query")
            commit(connection)

        self.patch(mysql_driver.Connection, "commit", breaks)

    def test_a_retried_claim_keeps_its_previous_owner(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._again())

    async def _again(self) -> None:
        a, b = await self.start_node("a"), await self.start_node("b")
        for self.reaches in (True, False):
            had = await a.claim("x", "h:1")
            self.breaking = 1
            claim = await b.claim("x", "h:2", ClaimPolicy(takeover_up_to=had.generation))
            self.assertEqual(claim.previous_owner.generation, had.generation)
            self.assertEqual((await a.find("x")).generation, claim.generation)
        self.assertEqual(self.errors, [2013, 2013])

    def test_a_claim_that_fails_leaves_nothing(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._nothing())

    async def _nothing(self) -> None:
        self.patch(mysql.MySQL, "retry_timeout", 0.0)
        for self.reaches in (True, False):
            registry = await self.start_node(str(self.reaches))
            self.breaking = 1
            await self.assertFailure(registry.claim("x", "h:1"), RegistryUnavailableError)
            # Closing writes the queued release of that claim.
            await registry.close()
            self.assertEqual(self.rows(), [])

    def test_a_lease_that_expires_between_the_tries(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._lease())

    async def _lease(self) -> None:
        registry = await self.start_node("a")
        await registry.claim("mine", "h:1")
        self.breaking = 1
        self.repair = lambda: self.execute("UPDATE nodes SET heartbeat_at = '1970-01-02'")
        error = await self.assertFailure(registry.claim("x", "h:1"), RegistryUnavailableError)
        self.assertIn("lease", str(error))
        self.assertEqual(self.rows(), ["mine"])

    def test_an_expired_lease_is_reported_although_its_heartbeat_failed(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._told())

    async def _told(self) -> None:
        registry = await self.start_node("a")
        for patience in (None, 0.0):
            self.execute("UPDATE nodes SET heartbeat_at = '1970-01-02'")
            self.breaking = 1
            if patience is not None:
                registry._queues[Priority.HEARTBEAT]._retry_timeout = patience
                await self.assertFailure(registry.heartbeat("up", 0), RegistryUnavailableError)
            self.assertFalse(await registry.heartbeat("up", 0))
            self.assertTrue(await registry.heartbeat("up", 0))


class OutageTests(FaultCase):
    """The test's own server goes down, or hangs, and comes back."""

    def setUp(self) -> None:
        super().setUp()
        self.server = mariadb.MariaDBServer()
        self.addCleanup(self.server.close)
        self.url = self.server.new_database()
        self.database = "fresh1"
        self.patch(mysql, "RETRY_TIMEOUT", 0.0)
        self.patch(mysql.MySQL, "retry_timeout", 0.0)

    async def away(self, registry: MySQLRegistry, generation: int) -> None:
        """Check that everything fails, with an error of one line."""
        for deferred in (
            registry.claim("y", "h:1"),
            registry.release(SessionKey("x", generation)),
            registry.find("x"),
            registry.nodes(),
            registry.clients("", 1),
            registry.heartbeat("up", 1),
            registry.reap(1),
        ):
            error = await self.assertFailure(deferred, RegistryUnavailableError)
            self.assertIn(f"127.0.0.1:{self.server.port}/fresh1", str(error))
            self.assertNotIn("\n", str(error))

    def extend_retries(self, registry: MySQLRegistry) -> None:
        """Extend the retries after the server is back, since not every queue has noticed yet that its connection is lost."""
        for queue in [*registry._queues.values(), *registry._write_queues]:
            queue._retry_timeout = 60.0

    def test_killed_and_restarted(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._started_again())

    async def _started_again(self) -> None:
        registry = await self.start_node("a")
        x, z = await gatherResults([registry.claim(name, "h:1") for name in "xz"])
        self.server.kill()
        await self.away(registry, x.generation)
        self.server.start()
        self.extend_retries(registry)
        self.assertTrue(await registry.heartbeat("up", 1))
        # The queued release was sent at once.
        await registry.claim("w", "h:1")
        self.assertEqual(self.rows(), ["w", "z"])
        self.assertEqual((await registry.find("z")).generation, z.generation)

    def test_shut_down(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._in_good_order())

    async def _in_good_order(self) -> None:
        registry = await self.start_node("a")
        x = await registry.claim("x", "h:1")
        self.server.stop()
        await self.away(registry, x.generation)
        await registry.close()

    def test_a_server_that_hangs(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._standing_still())

    async def _standing_still(self) -> None:
        self.patch(mysql_driver, "READ_TIMEOUT", 0.3)
        self.patch(mysql_driver, "CONNECT_TIMEOUT", 0.3)
        registry = await self.start_node("a")
        x = await registry.claim("x", "h:1")
        self.server.pause()
        try:
            await self.away(registry, x.generation)
        finally:
            self.server.resume()
        self.extend_retries(registry)
        self.assertTrue(await registry.heartbeat("up", 1))
        await registry.claim("w", "h:1")
        self.assertEqual(self.rows(), ["w"])

    def test_closing_does_not_wait_for_a_server_that_hangs(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._at_the_end())

    async def _at_the_end(self) -> None:
        self.patch(mysql_driver, "READ_TIMEOUT", 3600.0)
        registry = await self.start_node("a")
        await registry.claim("x", "h:1")
        await registry.find("x")
        self.server.pause()
        try:
            waiting = [registry.claim("y", "h:1"), registry.find("x"), registry.heartbeat("up", 1)]
            await self.until(
                lambda: (
                    all(
                        queue._running
                        for queue in [registry._queues[priority] for priority in (Priority.HEARTBEAT, Priority.READS)]
                    )
                    and any(queue._running for queue in registry._write_queues)
                )
            )
            # As at the end of the reactor, which joins the threads.
            for pool in registry._pools:
                pool.close()
            for deferred in waiting:
                await self.assertFailure(deferred, RegistryUnavailableError)
        finally:
            self.server.resume()

    def test_the_locks_of_a_node_that_hangs_end_with_its_lease(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._its_locks())

    async def _its_locks(self) -> None:
        still = await self.start_node("a", lease=1.0)
        await still.claim("x", "h:1")
        # It hangs between two statements of a batch.
        connection = mysql_driver.connect(still._database.make_connection)  # type: ignore[attr-defined]
        still._database.prepare(connection)  # type: ignore[attr-defined]
        self.addCleanup(connection.close)
        with connection.cursor() as cursor:
            cursor.execute("START TRANSACTION")
            still._database.lock_clients(cursor, [("x", ""), ("y", "")])
            still._database.lock_node_shared(cursor, node_info("a").node_id)
            # Its own heartbeats do not wait for the locks.
            for _ in range(20):
                await still.heartbeat("up", 1)
        other = await self.start_node("b", lease=LEASE)
        for queue in other._write_queues:
            queue._retry_timeout = 60.0
        claim = await other.claim("x", "h:2")
        self.assertEqual((await other.find("x")).generation, claim.generation)
        self.assertEqual(self.rows(), ["x"])


class RefusalTests(FaultCase):
    """A server that accepts only small statements: it refuses others with an error, or closes the connection."""

    def setUp(self) -> None:
        super().setUp()
        self.server = mariadb.MariaDBServer("--max-allowed-packet=4096")
        self.addCleanup(self.server.close)
        self.url = self.server.new_database()
        self.database = "fresh1"

    def test_batches_that_are_too_large(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._too_large())

    async def _too_large(self) -> None:
        registry = await self.start_node("a")
        names = [f"{number:0120}" for number in range(300)]
        claims = await gatherResults([registry.claim(name, "h:1") for name in names])
        # The server says 1153, or closes the connection before that can be read.
        self.assertLessEqual(set(self.errors), {1153, 2006, 2013})
        found = await gatherResults([registry.find(name) for name in names])
        self.assertEqual([each.generation for each in found], [claim.generation for claim in claims])
        other = await self.start_node("b")
        assigned = await registry.assign(names, node_info("b").node_id)
        self.assertEqual(assigned, names)
        await gatherResults(
            [
                registry.release(SessionKey(*key))
                for key in zip(names[:50], [c.generation for c in claims], strict=False)
            ]
        )
        self.assertEqual(len(self.rows()), 250)
        self.execute("UPDATE nodes SET heartbeat_at = '1970-01-02' WHERE name = 'a'")
        self.assertEqual(await other.reap(500), 250)
        self.assertEqual((self.rows(), await other.reap(500)), ([], 0))

    def test_a_single_row_that_is_refused(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._single_row())

    async def _single_row(self) -> None:
        registry = await self.start_node("a")
        self.execute(
            "CREATE TRIGGER refusal BEFORE INSERT ON clients FOR EACH ROW"
            " IF NEW.client_id = 'bad' THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not this one'; END IF"
        )
        names = [f"c{number}" for number in range(20)]
        claims = [registry.claim(name, "h:1") for name in [*names, "bad"]]
        error = await self.assertFailure(claims.pop(), RegistryRefusedError)
        self.assertIn("not this one", str(error))
        await gatherResults(claims)
        self.assertEqual(self.rows(), sorted(names))

    def test_a_row_for_which_the_connection_is_closed(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._closed())

    async def _closed(self) -> None:
        execute = mysql_driver.Cursor.execute

        def closes(cursor: mysql_driver.Cursor, text: str, values: Any = None) -> int:
            if "'bad'" in f"{text} {values}":
                cursor.connection._force_close()
                raise pymysql.OperationalError(2006, "MySQL server has gone away")
            return execute(cursor, text, values)

        self.patch(mysql_driver.Cursor, "execute", closes)
        registry = await self.start_node("a")
        names = [f"c{number}" for number in range(20)]
        claims = [registry.claim(name, "h:1") for name in [*names, "bad"]]
        await self.assertFailure(claims.pop(), RegistryRefusedError)
        await gatherResults(claims)
        self.assertEqual(self.rows(), sorted(names))
        lookups = [registry.find(name) for name in [*names, "bad"]]
        await self.assertFailure(lookups.pop(), RegistryRefusedError)
        await gatherResults(lookups)


class SchemaTests(FaultCase):
    """The schema is changed while a node runs, and its connections are lost."""

    def test_a_running_node_goes_on_if_the_schema_allows_it(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._allowed())

    async def _allowed(self) -> None:
        registry = await self.start_node("a")
        await registry.claim("x", "h:1")
        newest = load_files("mysql")[-1].number
        self.execute(
            "ALTER TABLE nodes ADD COLUMN more TEXT NOT NULL DEFAULT ''",
            f"INSERT INTO schema_files VALUES ({newest + 1})",
        )
        self.kill_connections()
        self.assertTrue(await registry.heartbeat("up", 1))
        await registry.claim("y", "h:1")
        await self.start_node("b")
        self.assertEqual([status.version for status in await registry.nodes()], ["a.1", "b.1"])

    def test_a_running_node_fails_if_it_does_not(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._not_allowed())

    async def _not_allowed(self) -> None:
        registry = await self.start_node("a")
        newest = load_files("mysql")[-1].number
        self.execute(f"INSERT INTO schema_version VALUES ({newest + 1})")
        self.kill_connections()
        error = await self.assertFailure(registry.heartbeat("up", 1), RegistryUnavailableError)
        self.assertIn(f"knows version {newest + 1} of the schema", str(error))
        self.assertNotIsInstance(error, RegistryRefusedError)
        self.execute(f"DELETE FROM schema_version WHERE version = {newest + 1}")
        self.assertTrue(await registry.heartbeat("up", 1))

    def kill_connections(self) -> None:
        for number in self.connections():
            self.server.execute(f"KILL {number}")
