"""Tests of gateway.registry.schema_versions."""

from __future__ import annotations

import sqlite3

from twisted.trial.unittest import SynchronousTestCase

from gateway.registry import schema_versions
from gateway.settings import ConfigError

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
        newest = schema_versions.load_migrations("sqlite")[-1][0]
        steps = [*schema_versions.load_migrations("sqlite"), (newest + 1, ["CREATE TABLE more (a)"])]
        self.patch(schema_versions, "load_migrations", lambda dialect: steps)
        self.apply()
        self.assertEqual(self.query("SELECT * FROM more"), [])
        self.assertEqual(self.query("SELECT MAX(version) FROM schema_version"), [(newest + 1,)])

    def test_a_step_is_applied_completely_or_not_at_all(self) -> None:
        self.patch(
            schema_versions, "load_migrations", lambda dialect: [(1, ["CREATE TABLE one (a)", "CREATE NONSENSE"])]
        )
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
        steps = schema_versions.load_migrations("sqlite")
        self.assertEqual([number for number, _ in steps], list(range(1, len(steps) + 1)))

    def test_statements_end_with_a_semicolon_at_the_end_of_a_line(self) -> None:
        text = "-- one; two\nCREATE TABLE a (\n    -- inside;\n    b CHECK (b <> ';x')\n);\n\nSELECT 1;\n"
        self.assertEqual(
            schema_versions.split_statements(text), ["CREATE TABLE a (\n    b CHECK (b <> ';x')\n)", "SELECT 1"]
        )

    def test_numbers_must_be_numbers(self) -> None:
        self.apply()
        for statement in (
            "INSERT INTO clients VALUES ('x', 1, 'one', 1, 'h')",
            "INSERT INTO nodes VALUES (1, 'a', 'a', '', '', 'up', 0, 1, 1, 'now')",
            "INSERT INTO nodes VALUES (1, 'a', 'a', '', '', 'gone', 0, 1, 1, 1)",
        ):
            self.assertRaises(sqlite3.IntegrityError, self.connection.execute, statement)
