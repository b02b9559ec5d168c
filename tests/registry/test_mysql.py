"""The registry in MariaDB: what every registry promises, and what is special about a server, on a real one."""

from __future__ import annotations

import os
import threading
import time
from typing import Any
from urllib.parse import quote

import trustme
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.registry import migrations
from gateway.registry.mysql import MySQL, MySQLRegistry, parse_url
from gateway.registry.statements import Statements
from gateway.settings import ConfigError
from tests import mariadb
from tests.registry.claims import ClaimPolicyContractMixin
from tests.registry.contract import LEASE, RegistryContractMixin, RegistryMixin, node_info
from tests.registry.mysql_case import ThreadedRegistryMixin, make_mysql_registry
from tests.registry.test_migrations import TABLES


class MySQLMixin(RegistryMixin):
    def set_up_database(self) -> None:
        self.url = mariadb.server().new_database()

    def make_registry(self) -> MySQLRegistry:
        return make_mysql_registry(self.url, self.clock)


class MySQLContractTests(MySQLMixin, RegistryContractMixin, SynchronousTestCase):
    pass


class MySQLClaimPolicyTests(MySQLMixin, ClaimPolicyContractMixin, SynchronousTestCase):
    def test_nothing_is_left_of_what_came_to_nothing(self) -> None:
        self.result_of(self.b.release("nobody", 5))
        self.clock.advance(LEASE - 1)
        self.result_of(self.b.heartbeat("up", 0))
        self.result_of(self.a.release("x", self.claim_of_a.generation))
        asked = [self.a.claim("y", "h:1", takeover_up_to=0), self.a.release("z", 1)]
        self.clock.advance(2)  # its lease runs out on the way
        for each in asked:
            each.addErrback(lambda _: None)
        self.result_of(self.b.heartbeat("up", 0))
        database = self.url.rpartition("/")[2]
        self.assertEqual(mariadb.server().execute("SELECT client_id FROM clients", database=database), ())


class SchemaTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.url = mariadb.server().new_database()
        self.database = self.url.rpartition("/")[2]

    def ask(self, text: str) -> Any:
        return mariadb.server().execute(text, database=self.database)

    def check(self) -> None:
        MySQL(parse_url(self.url), bytes, LEASE).check()

    def test_the_columns_are_those_of_every_registry(self) -> None:
        self.check()
        for table, columns in TABLES.items():
            found = self.ask(
                "SELECT column_name, table_collation FROM information_schema.columns JOIN information_schema.tables"
                f" USING (table_schema, table_name) WHERE table_schema = '{self.database}' AND table_name = '{table}'"
                " AND engine = 'InnoDB' ORDER BY ordinal_position"
            )
            self.assertEqual(found, tuple((column, "utf8mb4_bin") for column in columns))
        self.assertEqual(self.ask("SELECT version FROM schema_version"), ((1,),))

    def test_files_are_numbered_without_gaps_and_can_be_applied_again(self) -> None:
        steps = migrations.load_migrations("mysql")
        self.assertEqual([number for number, _ in steps], list(range(1, len(steps) + 1)))
        self.check()
        self.ask("INSERT INTO clients VALUES ('x', 1, 1, '2020-01-01', 'h')")
        # A server that ended behind the first of its statements.
        self.ask("DROP TABLE placements")
        self.ask("DELETE FROM schema_version")
        self.check()
        self.assertEqual(self.ask("SELECT * FROM placements"), ())
        self.assertEqual(self.ask("SELECT client_id FROM clients"), ((b"x",),))

    def test_ten_at_once(self) -> None:
        for _ in range(3):
            self.setUp()
            problems: list[BaseException] = []
            together = threading.Barrier(10)

            threads = [
                threading.Thread(target=self.start_one, args=(str(number), together, problems)) for number in range(10)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(problems, [])
            self.assertEqual(self.ask("SELECT version FROM schema_version"), ((1,),))
            self.assertEqual(self.ask("SELECT COUNT(*), COUNT(DISTINCT id) FROM nodes"), ((10, 10),))

    def start_one(self, name: str, together: threading.Barrier, problems: list[BaseException]) -> None:
        mysql = MySQL(parse_url(self.url), bytes, LEASE)
        try:
            together.wait()
            mysql.check()
            connection = mysql.make_connection()
            connection.connect()
            mysql.prepare(connection)
            Statements(mysql, LEASE).join(connection, node_info(name))
            connection.close()
        except BaseException as e:  # noqa: BLE001
            problems.append(e)

    def test_a_newer_schema(self) -> None:
        self.check()
        self.ask("INSERT INTO schema_version VALUES (99)")
        error = str(self.assertRaises(ConfigError, self.check))
        self.assertIn("version 99", error)
        self.assertTrue(error.startswith("--registry: 127.0.0.1:"), error)

    def test_too_old_a_server(self) -> None:
        mysql = MySQL(parse_url(self.url), bytes, LEASE)
        for text in ("5.7.44-log", "10.2.44-MariaDB", "5.5.5-10.1.48-MariaDB", "5.5.62"):
            self.assertIn("or newer is needed", str(self.assertRaises(ConfigError, mysql._check_version, text)))
        for text in ("8.0.36", "9.1.0", "5.5.5-10.11.2-MariaDB-log", "11.4.2-MariaDB", "8.0.11-TiDB-v7.5.1", "?"):
            mysql._check_version(text)


class ConfigErrorTests(SynchronousTestCase):
    """What cannot be used is told of in one line, before the reactor runs and when it does."""

    def setUp(self) -> None:
        self.server = mariadb.server()
        self.url = self.server.new_database()
        self.database = self.url.rpartition("/")[2]

    def refused(self, url: str, password: bytes = b"") -> str:
        registry = MySQLRegistry(
            parse_url(url),
            password=lambda: password,
            lease=LEASE,
            reactor=Clock(),
            metrics=None,
            make_pool=None,  # type: ignore[arg-type]
        )
        text = str(self.assertRaises(ConfigError, registry.check))
        self.assertTrue(text.startswith("--registry: 127.0.0.1:"), text)
        self.assertNotIn("\n", text)
        return text

    def user(self, grants: str, more: str = "") -> str:
        name = self.database
        self.server.execute(
            f"CREATE OR REPLACE USER {name}@'127.0.0.1' IDENTIFIED BY 'secret'",
            *([f"GRANT {grants} ON {name}.* TO {name}@'127.0.0.1'"] if grants else []),
        )
        self.addCleanup(self.server.execute, f"DROP USER IF EXISTS {name}@'127.0.0.1'")
        return self.url.replace("root@", f"{name}@")

    def test_nobody_there(self) -> None:
        text = self.refused("mysql://root@127.0.0.1:1/d")
        self.assertIn("127.0.0.1:1/d cannot be reached", text)
        self.assertIn("refused", text)

    def test_a_database_that_is_not_there(self) -> None:
        self.assertIn("has no database 'nowhere': CREATE", self.refused(self.server.url_of("nowhere")))

    def test_the_wrong_password_and_none(self) -> None:
        url = self.user("ALL")
        self.assertIn("the password is wrong", self.refused(url, b"wrong"))
        self.assertIn("no password was given; put it in a file", self.refused(url))
        MySQL(parse_url(url), lambda: b"secret", LEASE).check()

    def test_a_password_beyond_ascii(self) -> None:
        url = self.user("ALL")
        self.server.execute(f"SET PASSWORD FOR {self.database}@'127.0.0.1' = PASSWORD('schl\u00fcssel\u2713')")
        MySQL(parse_url(url), "schl\u00fcssel\u2713".encode, LEASE).check()

    def test_a_user_without_rights(self) -> None:
        self.assertIn("does not let", self.refused(self.user(""), b"secret"))
        self.assertIn("GRANT ALL ON", self.refused(self.user("SELECT"), b"secret"))

    def test_what_is_no_database(self) -> None:
        text = self.refused(f"mysql://root@127.0.0.1:{self.server.port}/{self.database}?ssl_verify=true")
        self.assertIn("TLS", text)


class SessionTests(ThreadedRegistryMixin, TestCase):
    """A server whose defaults are others."""

    def test_a_strange_server(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._strange())

    async def _strange(self) -> None:
        modes = (
            "ANSI_QUOTES,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT,IGNORE_SPACE,STRICT_ALL_TABLES,NO_ZERO_DATE,NO_ZERO_IN_DATE,"
            "ERROR_FOR_DIVISION_BY_ZERO,ONLY_FULL_GROUP_BY,NO_AUTO_VALUE_ON_ZERO,EMPTY_STRING_IS_NULL,NO_UNSIGNED_SUBTRACTION"
        )
        server = mariadb.MariaDBServer(
            f"--sql-mode={modes}",
            "--default-time-zone=-09:30",
            "--character-set-server=latin1",
            "--default-storage-engine=MyISAM",
            "--transaction-isolation=SERIALIZABLE",
            "--autocommit=0",
            "--lower-case-table-names=1",
            "--init-connect=SET NAMES latin1",
        )
        self.addCleanup(server.close)
        registry = await self.start_node("a", server.new_database())
        before = time.time()
        claim = await registry.claim("x", "'\u00e9\\\U0001f600")
        found = await registry.find("x")
        assert found is not None
        self.assertEqual(found.address, "'\u00e9\\\U0001f600")
        self.assertLess(abs(claim.connected_at - before), 60)
        self.assertEqual(found.connected_at, claim.connected_at)
        self.assertEqual(claim.generation, round(claim.connected_at * 1e6))
        self.assertTrue(await registry.heartbeat("up", 1))
        (node,) = await registry.nodes()
        self.assertLess(node.heartbeat_age, LEASE)
        await registry.leave()
        self.assertEqual(server.execute("SELECT * FROM clients", database="fresh1"), ())

    def test_the_session(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._session())

    async def _session(self) -> None:
        self.url = mariadb.server().new_database()
        registry = await self.start_node("a")
        await registry.claim("x", "h:1")
        await registry.find("x")
        await registry.reap(1)
        names = ("tx_isolation", "autocommit", "wait_timeout", "innodb_lock_wait_timeout", "collation_connection")

        def read(connection: Any) -> Any:
            with connection.cursor() as cursor:
                cursor.execute("SELECT " + ", ".join(f"@@SESSION.{name}" for name in names))
                return cursor.fetchone()

        self.assertEqual(len(registry._pools), 5)
        for pool in registry._pools:
            self.assertEqual(await pool.run(read, False), ("READ-COMMITTED", 1, 15, 1, "utf8mb4_bin"))


class TlsTests(ThreadedRegistryMixin, TestCase):
    def setUp(self) -> None:
        authority, self.other = trustme.CA(), trustme.CA()
        self.ca = self.write(authority.cert_pem)
        self.own = self.write(authority.issue_cert("gw").private_key_and_cert_chain_pem)
        self.authority = authority

    def write(self, blob: trustme.Blob) -> str:
        path = os.path.abspath(self.mktemp())
        blob.write_to_path(path)
        return path

    def serve(self, *names: str) -> str:
        """The URL of a server with a certificate for these names."""
        cert = self.authority.issue_cert(*names)
        chain = self.write(cert.cert_chain_pems[0])
        key = self.write(cert.private_key_pem)
        self.server = mariadb.MariaDBServer(f"--ssl-ca={self.ca}", f"--ssl-cert={chain}", f"--ssl-key={key}")
        self.addCleanup(self.server.close)
        return self.server.new_database()

    async def claims(self, url: str) -> str:
        """Claim a client; what the connection is encrypted with."""
        registry = await self.start_node("a", url)
        await registry.claim("x", "h:1")

        def read(connection: Any) -> str:
            with connection.cursor() as cursor:
                cursor.execute("SHOW STATUS LIKE 'Ssl_version'")
                return str(cursor.fetchone()[1])

        return await registry._pools[1].run(read, False)

    def test_the_name_of_the_server_is_verified(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._verified())

    async def _verified(self) -> None:
        url = self.serve("127.0.0.1")
        self.assertIn("TLSv1.", await self.claims(f"{url}?ssl_ca={quote(self.ca)}"))
        self.assertEqual(await self.claims(url), "")
        other = self.write(self.other.cert_pem)
        text = str(await self.assertFailure(self.make_registry(f"{url}?ssl_ca={quote(other)}").open(), ConfigError))
        self.assertIn("has no certificate that will do", text)
        self.assertIn("see ssl_ca and ssl_verify", text)

    def test_another_name(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._another())

    async def _another(self) -> None:
        url = self.serve("db.example")
        text = str(await self.assertFailure(self.make_registry(f"{url}?ssl_ca={quote(self.ca)}").open(), ConfigError))
        self.assertIn("has no certificate that will do", text)
        self.assertIn("TLSv1.", await self.claims(f"{url}?ssl_ca={quote(self.ca)}&ssl_verify=false"))

    def test_a_certificate_of_one_s_own(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._own())

    async def _own(self) -> None:
        url = self.serve("127.0.0.1")
        self.server.execute(
            "CREATE USER gw@'127.0.0.1' REQUIRE X509",
            "GRANT ALL ON fresh1.* TO gw@'127.0.0.1'",
        )
        url = f"{url.replace('root@', 'gw@')}?ssl_ca={quote(self.ca)}"
        self.assertIn(
            "does not let 'gw' in", str(await self.assertFailure(self.make_registry(url).open(), ConfigError))
        )
        self.assertIn("TLSv1.", await self.claims(f"{url}&ssl_cert={quote(self.own)}&ssl_key={quote(self.own)}"))
