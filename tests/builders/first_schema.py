"""A program that knows only the first schema file: the statements of version 0.1.0 that concern the schema and nodes.

They are a copy, and stay as they are: nodes of that version run in one fleet with newer ones.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

from gateway.registry.schema_versions import load_files, transaction

NEWEST = 1


class SchemaError(Exception):
    """This program would not start, or fail at its next connection to the database."""


class FirstProgram:
    """The program on one DB-API connection. ``dialect`` is ``sqlite`` or ``mysql``."""

    def __init__(self, connection: Any, dialect: str) -> None:
        self.connection = connection
        self.dialect = dialect
        self.begin_statement = "BEGIN IMMEDIATE" if dialect == "sqlite" else "START TRANSACTION"

    def open(self) -> None:
        """Create the tables, or check them, as at each new connection."""
        while True:
            with transaction(self.connection, self.begin_statement) as cursor:
                cursor.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL PRIMARY KEY)")
                cursor.execute("SELECT COALESCE(MAX(version), 0) FROM schema_version")
                version = cursor.fetchone()[0]
                if version > NEWEST:
                    raise SchemaError(f"its tables are of version {version}")
                if version == NEWEST:
                    return
                for statement in load_files(self.dialect)[0].statements:
                    cursor.execute(statement)
                cursor.execute("INSERT INTO schema_version (version) VALUES (1)")

    def join(self, node_id: str, now: object) -> None:
        """Insert the row of a node."""
        with transaction(self.connection, self.begin_statement) as cursor:
            cursor.execute("DELETE FROM nodes WHERE node_id = ?", (node_id,))
            cursor.execute(
                "INSERT INTO nodes (id, node_id, name, public_url, peer_url, state, clients, capacity, started_at,"
                " heartbeat_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (None, node_id, "old", "ws://old", "ws://old:81", "up", 3, 100, now, now),
            )

    def heartbeat(self, node_id: str, now: object) -> None:
        """Renew its lease."""
        with transaction(self.connection, self.begin_statement) as cursor:
            cursor.execute(
                "UPDATE nodes SET state = ?, clients = ?, heartbeat_at = ? WHERE node_id = ?", ("up", 4, now, node_id)
            )

    def nodes(self) -> list[str]:
        """Return the ids of all nodes."""
        with closing(self.connection.cursor()) as cursor:
            cursor.execute(
                "SELECT node_id, name, public_url, peer_url, clients, capacity, state, heartbeat_at FROM nodes ORDER BY id"
            )
            return [row[0] for row in cursor.fetchall()]
