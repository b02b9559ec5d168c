"""The registry in a real MariaDB: the contract of every registry, and what only concerns a server."""

from __future__ import annotations

import os
import ssl
import threading
import time
from typing import Any
from urllib.parse import quote

import pymysql
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.registry import mysql_driver
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import ClaimPolicy, SessionKey
from gateway.registry.job_queue import ErrorKind
from gateway.registry.mysql import (
    RETRYABLE_ERRORS,
    MySQL,
    MySQLRegistry,
    MySQLServer,
    TLSOptions,
    explain,
    parse_url,
    to_config_error,
)
from gateway.registry.schema_versions import load_files
from gateway.registry.statements import Statements
from gateway.settings import ConfigError
from tests.builders import mariadb
from tests.builders.first_schema import FirstProgram
from tests.builders.mysql_registry import ThreadedRegistryMixin, make_mysql_registry
from tests.builders.registry_contract import (
    LEASE,
    ClaimPolicyContractMixin,
    RegistryContractMixin,
    RegistryMixin,
    node_info,
)
from tests.registry.test_schema_versions import TABLES


class MySQLMixin(RegistryMixin):
    def set_up_database(self) -> None:
        self.url = mariadb.server().new_database()

    def make_registry(self) -> MySQLRegistry:
        return make_mysql_registry(self.url, self.clock)


class MySQLContractTests(MySQLMixin, RegistryContractMixin, SynchronousTestCase):
    pass


class MySQLClaimPolicyTests(MySQLMixin, ClaimPolicyContractMixin, SynchronousTestCase):
    def test_no_placeholder_rows_are_left(self) -> None:
        self.result_of(self.b.release(SessionKey("nobody", 5)))
        self.clock.advance(LEASE - 1)
        self.result_of(self.b.heartbeat("up", 0))
        self.result_of(self.a.release(SessionKey("x", self.claim_of_a.generation)))
        pending = [self.a.claim("y", "h:1", ClaimPolicy(takeover_up_to=0)), self.a.release(SessionKey("z", 1))]
        self.clock.advance(2)  # its lease expires before they reach the database
        for each in pending:
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

    def test_files_can_be_applied_again(self) -> None:
        self.check()
        self.ask("INSERT INTO clients VALUES ('x', 1, 1, '2020-01-01', 'h')")
        # As if the server had ended after the first statement.
        self.ask("DROP TABLE placements")
        self.ask("DELETE FROM schema_version")
        self.ask("DELETE FROM schema_files")
        self.check()
        self.assertEqual(self.ask("SELECT * FROM placements"), ())
        self.assertEqual(self.ask("SELECT client_id FROM clients"), ((b"x",),))

    def start_first_program(self) -> FirstProgram:
        connection = mysql_driver.connect(MySQL(parse_url(self.url), bytes, LEASE).make_connection)
        self.addCleanup(connection.close)
        program = FirstProgram(connection, "mysql")
        program.open()
        return program

    def test_a_program_of_the_first_file_runs_and_starts_on_the_newest_tables(self) -> None:
        running = self.start_first_program()
        running.join("old", "2020-01-01")
        self.check()
        running.open()
        running.heartbeat("old", "2020-01-02")
        started = self.start_first_program()
        started.join("older", "2020-01-01")
        self.assertEqual(started.nodes(), ["old", "older"])
        self.assertEqual(self.ask("SELECT DISTINCT version FROM nodes"), (("",),))

    def test_an_upgrade_that_was_interrupted_after_each_statement(self) -> None:
        """The server commits each statement that changes a table."""
        for file in load_files("mysql")[1:]:
            for count in range(1, len(file.statements) + 1):
                self.setUp()
                program = self.start_first_program()
                self.ask("CREATE TABLE schema_files (number INTEGER NOT NULL PRIMARY KEY)")
                for earlier in load_files("mysql")[1 : file.number - 1]:
                    for statement in earlier.statements:
                        self.ask(statement)
                    self.ask(f"INSERT INTO schema_files VALUES ({earlier.number})")
                for statement in file.statements[:count]:
                    self.ask(statement)
                program.open()
                program.join("old", "2020-01-01")
                self.check()
                self.assertEqual(self.ask("SELECT MAX(number) FROM schema_files"), ((load_files("mysql")[-1].number,),))

    def test_tables_that_need_a_program_of_a_newer_file(self) -> None:
        self.check()
        newest = load_files("mysql")[-1].number
        self.ask(f"INSERT INTO schema_files VALUES ({newest + 1})")
        self.check()
        self.ask(f"INSERT INTO schema_version VALUES ({newest + 1})")
        self.assertIn(f"version {newest + 1} of the schema", str(self.assertRaises(ConfigError, self.check)))

    def test_ten_nodes_migrate_at_once(self) -> None:
        for old in (False, True, True):
            self.setUp()
            program = self.start_first_program() if old else None
            problems: list[BaseException] = []
            together = threading.Barrier(10)

            threads = [
                threading.Thread(target=self.start_one, args=(str(number), together, problems)) for number in range(10)
            ]
            for thread in threads:
                thread.start()
            while program is not None and any(thread.is_alive() for thread in threads):
                program.open()
                program.join("old", "2020-01-01")
                program.nodes()
            for thread in threads:
                thread.join()
            self.assertEqual(problems, [])
            self.assertEqual(self.ask("SELECT version FROM schema_version"), ((1,),))
            self.assertEqual(
                self.ask("SELECT COUNT(*), COUNT(DISTINCT id) FROM nodes WHERE node_id <> 'old'"), ((10, 10),)
            )
            self.assertEqual(self.ask("SELECT COUNT(*) FROM nodes WHERE version LIKE '%.1'"), ((10,),))

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

    def test_a_server_that_is_too_old(self) -> None:
        mysql = MySQL(parse_url(self.url), bytes, LEASE)
        for text in ("5.7.44-log", "10.2.44-MariaDB", "5.5.5-10.1.48-MariaDB", "5.5.62"):
            self.assertIn("or newer is needed", str(self.assertRaises(ConfigError, mysql._check_version, text)))
        for text in ("8.0.36", "9.1.0", "5.5.5-10.11.2-MariaDB-log", "11.4.2-MariaDB", "8.0.11-TiDB-v7.5.1", "?"):
            mysql._check_version(text)


class ConfigErrorTests(SynchronousTestCase):
    """Errors of a registry that cannot be used have one line, both from check() and from open()."""

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

    def test_no_server(self) -> None:
        text = self.refused("mysql://root@127.0.0.1:1/d")
        self.assertIn("127.0.0.1:1/d cannot be reached", text)
        self.assertIn("refused", text)

    def test_a_missing_database(self) -> None:
        self.assertIn("has no database 'nowhere': CREATE", self.refused(self.server.url_of("nowhere")))

    def test_a_wrong_or_missing_password(self) -> None:
        url = self.user("ALL")
        self.assertIn("the password is wrong", self.refused(url, b"wrong"))
        self.assertIn("no password was given; put it in a file", self.refused(url))
        MySQL(parse_url(url), lambda: b"secret", LEASE).check()

    def test_a_non_ascii_password(self) -> None:
        url = self.user("ALL")
        self.server.execute(f"SET PASSWORD FOR {self.database}@'127.0.0.1' = PASSWORD('schl\u00fcssel\u2713')")
        MySQL(parse_url(url), "schl\u00fcssel\u2713".encode, LEASE).check()

    def test_a_user_without_rights(self) -> None:
        self.assertIn("does not let", self.refused(self.user(""), b"secret"))
        self.assertIn("GRANT ALL ON", self.refused(self.user("SELECT"), b"secret"))

    def test_a_server_that_is_not_a_database(self) -> None:
        text = self.refused(f"mysql://root@127.0.0.1:{self.server.port}/{self.database}?ssl_verify=true")
        self.assertIn("TLS", text)


class SessionTests(ThreadedRegistryMixin, TestCase):
    """A server with other defaults."""

    def test_a_server_with_other_defaults(self) -> Deferred[None]:
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
        """Start a server with a certificate for these names, and return its URL."""
        cert = self.authority.issue_cert(*names)
        chain = self.write(cert.cert_chain_pems[0])
        key = self.write(cert.private_key_pem)
        self.server = mariadb.MariaDBServer(f"--ssl-ca={self.ca}", f"--ssl-cert={chain}", f"--ssl-key={key}")
        self.addCleanup(self.server.close)
        return self.server.new_database()

    async def claims(self, url: str) -> str:
        """Claim a client, and return the cipher of the connection."""
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

    def test_a_certificate_for_another_name(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._another())

    async def _another(self) -> None:
        url = self.serve("db.example")
        text = str(await self.assertFailure(self.make_registry(f"{url}?ssl_ca={quote(self.ca)}").open(), ConfigError))
        self.assertIn("has no certificate that will do", text)
        self.assertIn("TLSv1.", await self.claims(f"{url}?ssl_ca={quote(self.ca)}&ssl_verify=false"))

    def test_a_client_certificate(self) -> Deferred[None]:
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


SERVER = MySQLServer("db.example", 3306, "gw", "fleet")


class ErrorTests(SynchronousTestCase):
    def test_retryable_errors(self) -> None:
        for code in (1205, 1213, 2003, 2006, 2013, 1053, 1047, 1290, 1792, 1836):
            self.assertIn(code, RETRYABLE_ERRORS)
        for code in (1045, 1049, 1062, 1064, 1146, 1406):
            self.assertNotIn(code, RETRYABLE_ERRORS)

    def test_kinds_of_errors(self) -> None:
        mysql = MySQL(SERVER, bytes, LEASE)
        for kind, errors in {
            ErrorKind.RETRYABLE: [pymysql.OperationalError(code, "") for code in (1205, 1213, 1290, 2003)],
            ErrorKind.CONNECTION_LOST: [
                pymysql.OperationalError(2006, ""),
                pymysql.OperationalError(2013, ""),
                pymysql.InterfaceError(0, ""),
            ],
            ErrorKind.UNAVAILABLE: [
                *(pymysql.OperationalError(code, "") for code in (1021, 1045, 1049, 1142, 1146)),
                *(ConfigError("registry", "no"), RegistryUnavailableError("not joined"), OSError(), None),
            ],
            # A packet, a transaction in a cluster, a statement, its time or memory, a limit of a proxy, a row.
            ErrorKind.REFUSED: [
                *(pymysql.OperationalError(code, "") for code in (1153, 1180, 3100, 1390, 3024, 1969, 1041, 1105)),
                *(pymysql.DataError(1406, ""), pymysql.IntegrityError(1062, ""), pymysql.MySQLError()),
                *(ValueError(), TypeError(), ZeroDivisionError()),
            ],
        }.items():
            for error in errors:
                self.assertIs(mysql.classify(error), kind, error)

    def test_the_log_text_has_one_line(self) -> None:
        error = pymysql.OperationalError(1205, "Lock wait\ntimeout exceeded")
        self.assertEqual(explain(SERVER, error), "db.example:3306/fleet: Lock wait timeout exceeded")
        self.assertEqual(
            explain(SERVER, pymysql.InterfaceError(0, "")), "db.example:3306/fleet: the connection was closed"
        )
        self.assertEqual(explain(SERVER, OSError("broken")), "db.example:3306/fleet: broken")
        self.assertEqual(explain(SERVER, ConfigError("registry", "no")), "--registry: no")
        for other in (ZeroDivisionError(), ValueError("x"), None):
            self.assertEqual(explain(SERVER, other), "")

    def error_text(self, error: BaseException, has_password: bool = True) -> str:
        message = to_config_error(SERVER, has_password, error)
        self.assertIsInstance(message, ConfigError)
        self.assertNotIn("\n", str(message))
        return str(message)

    def test_errors_say_what_to_do(self) -> None:
        for code, text in (
            (1040, "too many connections"),
            (1044, "GRANT ALL ON fleet.* TO 'gw'"),
            (1049, "CREATE DATABASE fleet"),
            (1142, "GRANT ALL"),
            (1290, "name the server that can be"),
            (1836, "name the server that can be"),
            (2003, "cannot be reached"),
            (2026, "no TLS"),
            (1205, "cannot be used: said\u00b7so"),
        ):
            message = self.error_text(pymysql.OperationalError(code, "said\u00b7so"))
            self.assertTrue(message.startswith("--registry: db.example:3306/fleet "), message)
            self.assertIn(text, message)

    def test_passwords(self) -> None:
        for code in (1045, 1698):
            error = pymysql.OperationalError(code, "Access denied")
            self.assertIn("the password is wrong", self.error_text(error))
            self.assertIn("no password was given", self.error_text(error, False))

    def test_certificates(self) -> None:
        error = pymysql.OperationalError(2003, "Can't connect")
        error.original_exception = ssl.SSLError("self-signed")  # type: ignore[attr-defined]
        self.assertIn("no certificate that will do", self.error_text(error))

    def test_config_errors_keep_their_text(self) -> None:
        own = ConfigError("registry-password-file", "cannot be read")
        self.assertIs(to_config_error(SERVER, False, own), own)
        self.assertEqual(
            self.error_text(ConfigError("registry", "its tables are newer")),
            "--registry: db.example:3306/fleet: its tables are newer",
        )

    def test_another_error(self) -> None:
        self.assertIn("cannot be used: 'cryptography' package", self.error_text(RuntimeError("'cryptography' package")))


NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)


class ParseURLTests(SynchronousTestCase):
    def refused(self, url: str) -> str:
        text = str(self.assertRaises(ConfigError, parse_url, url))
        self.assertTrue(text.startswith("--registry: "), text)
        self.assertTrue(text.isprintable(), text)
        return text

    def test_the_parts_of_a_url(self) -> None:
        self.assertEqual(parse_url("mysql://gw@db.example:3307/fleet"), MySQLServer("db.example", 3307, "gw", "fleet"))
        self.assertEqual(parse_url("mysql://gw@db.example/fleet").port, 3306)

    def test_an_ipv6_address(self) -> None:
        server = parse_url("mysql://gw@[2001:db8::1]:3307/fleet")
        self.assertEqual((server.host, server.port, str(server)), ("2001:db8::1", 3307, "[2001:db8::1]:3307/fleet"))

    @given(NAMES, NAMES)
    def test_percent_encoding(self, user: str, database: str) -> None:
        server = parse_url(f"mysql://{quote(user, safe='')}@h/{quote(database, safe='')}")
        self.assertEqual((server.user, server.database), (user, database))

    def test_a_password_is_refused_and_not_shown(self) -> None:
        for url in ("mysql://gw:hunter2@h/d", "mysql://gw:@h/d", "mysql://gw:hunter2@h"):
            text = self.refused(url)
            self.assertIn("--registry-password-file", text)
            self.assertIn("WSGATEWAY_REGISTRY_PASSWORD", text)
            self.assertNotIn("hunter2", text)

    def test_missing_parts(self) -> None:
        for url, what in (
            ("mysql://h/d", "user"),
            ("mysql://gw@/d", "host"),
            ("mysql://gw@h", "database"),
            ("mysql://gw@h/", "database"),
            ("mysql:", "user"),
        ):
            self.assertIn(f"the {what} is missing; write mysql://", self.refused(url))

    def test_invalid_urls(self) -> None:
        for url in (
            "mysql://gw@h:port/d",
            "mysql://gw@h:99999/d",
            "mysql://gw@h:0/d",
            "mysql://gw@h/d/e",
            "mysql://gw@h/d#f",
            "mysql://gw@[::1/d",
            "mysql://gw@h/%00",
            "mysql://g%0aw@h/d",
        ):
            self.refused(url)

    def test_parameters(self) -> None:
        self.assertIn(
            "there are ssl_ca, ssl_cert, ssl_key, ssl_verify", self.refused("mysql://gw@h/d?sslca=/etc/ca.pem")
        )
        self.assertIn("no parameter", self.refused("mysql://gw@h/d?nonsense"))
        self.assertIn("given once", self.refused("mysql://gw@h/d?ssl_verify=true&ssl_verify=true"))
        self.assertIn("given once", self.refused("mysql://gw@h/d?ssl_verify="))
        self.assertIn("neither true nor false", self.refused("mysql://gw@h/d?ssl_verify=no"))
        self.assertIn("give ssl_cert as well", self.refused("mysql://gw@h/d?ssl_key=k"))

    def test_files_that_cannot_be_used(self) -> None:
        self.assertIn("ssl_ca=/nowhere cannot be used: No such file", self.refused("mysql://gw@h/d?ssl_ca=/nowhere"))
        self.assertIn("ssl_cert=/nowhere", self.refused("mysql://gw@h/d?ssl_cert=/nowhere"))
        self.assertIn("ssl_ca=", self.refused(f"mysql://gw@h/d?ssl_ca={quote(__file__)}"))

    def test_certificates(self) -> None:
        authority = trustme.CA()
        ca, cert = os.path.abspath(self.mktemp()), os.path.abspath(self.mktemp())
        authority.cert_pem.write_to_path(ca)
        authority.issue_cert("gw").private_key_and_cert_chain_pem.write_to_path(cert)
        tls = parse_url(f"mysql://gw@h/d?ssl_ca={quote(ca)}&ssl_cert={quote(cert)}&ssl_key={quote(cert)}").tls
        assert tls is not None
        self.assertEqual(tls, TLSOptions(ca, cert, cert, True))
        context = tls.make_context()
        self.assertEqual((context.check_hostname, context.verify_mode), (True, ssl.CERT_REQUIRED))
        self.assertEqual(len(context.get_ca_certs()), 1)

    def test_tls_is_verified_unless_disabled(self) -> None:
        self.assertIsNone(parse_url("mysql://gw@h/d").tls)
        for value, mode in (("true", ssl.CERT_REQUIRED), ("false", ssl.CERT_NONE)):
            tls = parse_url(f"mysql://gw@h/d?ssl_verify={value}").tls
            assert tls is not None
            self.assertEqual(tls.make_context().verify_mode, mode)
            self.assertEqual(tls.make_context().check_hostname, value == "true")

    @settings(max_examples=300)
    @given(st.text(st.sampled_from("mysql:/@?#[]%&=;.0 aZ\n\0\u00e9\ud800"), max_size=30))
    def test_any_text_is_a_server_or_an_error_of_one_line(self, text: str) -> None:
        try:
            server = parse_url("mysql:" + text)
        except ConfigError as e:
            self.assertNotIn("\n", str(e))
        else:
            self.assertTrue(server.user and server.host and server.database and server.port)
