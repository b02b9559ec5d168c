"""Tests of gateway.registry.schema_versions."""

from __future__ import annotations

import sqlite3

from twisted.trial.unittest import SynchronousTestCase

from gateway.registry import schema_versions
from gateway.registry.schema_versions import SchemaFile, load_files, parse_file
from gateway.registry.sqlite import SQLite
from gateway.registry.statements import Statements
from gateway.settings import ConfigError
from tests.builders.first_schema import FirstProgram
from tests.builders.registry_contract import LEASE, node_info

#: the columns of each table, which are part of the contract
TABLES = {
    "nodes": [
        "id",
        "node_id",
        "name",
        "public_url",
        "peer_url",
        "state",
        "clients",
        "capacity",
        "started_at",
        "heartbeat_at",
        "version",
        "max_generation",
    ],
    "clients": ["client_id", "node", "generation", "connected_at", "address"],
    "placements": ["client_id", "node", "until", "moved_at"],
}


class MigrationsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.addCleanup(self.connection.close)

    def apply(self) -> None:
        schema_versions.apply(self.connection, "sqlite", "BEGIN IMMEDIATE")

    def query(self, text: str) -> list[tuple[object, ...]]:
        return self.connection.execute(text).fetchall()

    def test_a_new_database_has_the_tables(self) -> None:
        self.apply()
        for table, columns in TABLES.items():
            self.assertEqual([row[1] for row in self.query(f"PRAGMA table_info({table})")], columns)
        for table in ("clients", "placements"):
            ((text,),) = self.query(f"SELECT sql FROM sqlite_master WHERE name = '{table}'")
            self.assertIn("WITHOUT ROWID", text)

    def test_applying_again_changes_nothing(self) -> None:
        self.apply()
        self.connection.execute("INSERT INTO clients VALUES ('x', 1, 1, 1, 'h')")
        before = self.query("SELECT * FROM sqlite_master")
        self.apply()
        self.assertEqual(self.query("SELECT * FROM sqlite_master"), before)
        self.assertEqual(self.query("SELECT client_id FROM clients"), [("x",)])

    def test_only_missing_steps_are_applied(self) -> None:
        self.apply()
        newest = load_files("sqlite")[-1].number
        self.add_file(newest + 1, newest + 1, "CREATE TABLE more (a)")
        self.apply()
        self.assertEqual(self.query("SELECT * FROM more"), [])
        self.assertEqual(self.query("SELECT MAX(number) FROM schema_files"), [(newest + 1,)])
        self.assertEqual(self.query("SELECT MAX(version) FROM schema_version"), [(newest + 1,)])

    def add_file(self, number: int, oldest_program: int, *statements: str) -> None:
        files = (*load_files("sqlite"), SchemaFile(number, oldest_program, statements))
        self.patch(schema_versions, "load_files", lambda dialect: files)

    def test_a_step_is_applied_completely_or_not_at_all(self) -> None:
        file = SchemaFile(1, 1, ("CREATE TABLE one (a)", "CREATE NONSENSE"))
        self.patch(schema_versions, "load_files", lambda dialect: (file,))
        self.assertRaises(sqlite3.OperationalError, self.apply)
        self.assertEqual(self.query("SELECT name FROM sqlite_master"), [])

    def test_a_newer_schema_is_refused(self) -> None:
        self.apply()
        self.connection.execute("INSERT INTO schema_version VALUES (99)")
        error = self.assertRaises(ConfigError, self.apply)
        self.assertIn("version 99", str(error))

    def test_an_invalid_version_is_refused(self) -> None:
        self.connection.execute("CREATE TABLE schema_version (version TEXT)")
        self.connection.execute("INSERT INTO schema_version VALUES ('v2')")
        self.assertIn("version 'v2'", str(self.assertRaises(ConfigError, self.apply)))

    def test_files_are_numbered_without_gaps(self) -> None:
        for dialect in ("sqlite", "mysql"):
            files = load_files(dialect)
            self.assertEqual([file.number for file in files], list(range(1, len(files) + 1)))

    def test_the_dialects_agree_on_the_oldest_program_of_each_file(self) -> None:
        oldest = [[file.oldest_program for file in load_files(dialect)] for dialect in ("sqlite", "mysql")]
        self.assertEqual(oldest[0], oldest[1])

    def test_a_file_states_its_oldest_program(self) -> None:
        self.assertEqual(parse_file(3, "-- Oldest program: 2\nSELECT 1;\n"), SchemaFile(3, 2, ("SELECT 1",)))
        for text in ("SELECT 1;\n", "-- Oldest program: 4\n", "-- Oldest program: 0\n", "-- Oldest program:\n", ""):
            self.assertRaises(ValueError, parse_file, 3, text)

    def test_statements_end_with_a_semicolon_at_the_end_of_a_line(self) -> None:
        text = "-- one; two\nCREATE TABLE a (\n    -- inside;\n    b CHECK (b <> ';x')\n);\n\nSELECT 1;\n"
        self.assertEqual(
            schema_versions.split_statements(text), ["CREATE TABLE a (\n    b CHECK (b <> ';x')\n)", "SELECT 1"]
        )

    def test_numbers_must_be_numbers(self) -> None:
        self.apply()
        for statement in (
            "INSERT INTO clients VALUES ('x', 1, 'one', 1, 'h')",
            "INSERT INTO nodes VALUES (1, 'a', 'a', '', '', 'up', 0, 1, 1, 'now', '', 0)",
            "INSERT INTO nodes VALUES (1, 'a', 'a', '', '', 'gone', 0, 1, 1, 1, '', 0)",
        ):
            self.assertRaises(sqlite3.IntegrityError, self.connection.execute, statement)


class OlderProgramTests(SynchronousTestCase):
    """Programs that know different schema files use one database."""

    def setUp(self) -> None:
        self.path = self.mktemp()
        self.now = 1_000_000_000
        self.sqlite = SQLite(self.path, lambda: self.now)

    def connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(connection.close)
        return connection

    def start_first(self) -> FirstProgram:
        program = FirstProgram(self.connect(), "sqlite")
        program.open()
        return program

    def apply(self, *files: SchemaFile) -> None:
        """Apply these files after the real ones."""
        known = (*load_files("sqlite"), *files)
        patched = self.patch(schema_versions, "load_files", lambda dialect: known)
        try:
            schema_versions.apply(self.connect(), "sqlite", "BEGIN IMMEDIATE")
        finally:
            patched.restore()

    def test_a_program_of_the_first_file_runs_and_starts_on_the_newest_tables(self) -> None:
        running = self.start_first()
        running.join("old", self.now)
        connection = self.connect()
        self.sqlite.prepare(connection)
        statements = Statements(self.sqlite, LEASE)
        statements.join(connection, node_info("new"))
        running.open()  # its connection is opened again
        running.heartbeat("old", self.now + 1)
        started = self.start_first()
        started.join("older", self.now)
        self.assertEqual(started.nodes(), ["old", node_info("new").node_id, "older"])
        versions = {status.name: status.version for status in statements.nodes(connection)}
        self.assertEqual(versions, {"old": "", "new": node_info("new").version})

    def test_an_older_program_runs_and_starts_on_tables_that_allow_it(self) -> None:
        newest = load_files("sqlite")[-1].number
        running = self.connect()
        self.sqlite.prepare(running)
        self.apply(SchemaFile(newest + 1, newest, ("ALTER TABLE nodes ADD COLUMN more TEXT NOT NULL DEFAULT ''",)))
        for connection in (running, self.connect()):
            self.sqlite.prepare(connection)
            Statements(self.sqlite, LEASE).join(connection, node_info("a"))
        self.apply()  # nothing is applied again
        self.sqlite.check()

    def test_an_older_program_does_not_start_on_tables_that_do_not_allow_it(self) -> None:
        newest = load_files("sqlite")[-1].number
        self.apply(
            SchemaFile(newest + 1, newest + 1, ("ALTER TABLE nodes RENAME COLUMN name TO title",)),
            # A later file that would allow it does not take that back.
            SchemaFile(newest + 2, 1, ("ALTER TABLE nodes ADD COLUMN more TEXT",)),
        )
        error = str(self.assertRaises(ConfigError, self.sqlite.check))
        self.assertIn(f"knows version {newest + 1} of the schema, and this one knows up to {newest}", error)

    def test_a_file_that_failed_is_applied_by_the_next_program_and_older_ones_run_meanwhile(self) -> None:
        self.sqlite.check()
        newest = load_files("sqlite")[-1].number
        broken = SchemaFile(newest + 1, newest, ("ALTER TABLE nodes ADD COLUMN more TEXT", "NONSENSE"))
        self.assertRaises(sqlite3.OperationalError, self.apply, broken)
        self.sqlite.check()
        self.apply(SchemaFile(newest + 1, newest, broken.statements[:1]))
        self.sqlite.check()
