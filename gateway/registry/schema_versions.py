"""Bring the schema up to date: numbered SQL files, applied in order, each in one transaction.

The table ``schema_version`` has the number of the last file applied. Several processes may do this to one database at
once, so each step reads that number again inside its own transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import resources
from typing import Any

from gateway.settings import ConfigError


@contextmanager
def transaction(connection: Any, begin_statement: str) -> Iterator[Any]:
    """Yield a cursor in a transaction, which is committed at the end, or rolled back if anything raises.

    ``begin_statement`` begins a transaction that may write.
    """
    with closing(connection.cursor()) as cursor:
        cursor.execute(begin_statement)
        try:
            yield cursor
            connection.commit()
        except BaseException:
            connection.rollback()
            raise


def load_migrations(dialect: str) -> list[tuple[int, list[str]]]:
    """Return the number and the statements of each file of ``schema/<dialect>``, in order."""
    folder = resources.files("gateway.registry") / "schema" / dialect
    steps = []
    for file in folder.iterdir():
        if file.name.endswith(".sql"):
            steps.append((int(file.name[:4]), split_statements(file.read_text(encoding="utf-8"))))
    return sorted(steps)


def split_statements(text: str) -> list[str]:
    """Split a file into its statements: each ends with a semicolon at the end of a line; ``--`` begins a comment."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("--")]
    return [statement.strip() for statement in "\n".join([*lines, ""]).split(";\n") if statement.strip()]


def apply(connection: Any, dialect: str, begin_statement: str) -> None:
    """Apply the files that this database does not have yet, on a DB-API connection that is not in a transaction.

    Raises ``ConfigError`` if a newer release of this program has changed the schema.
    """
    steps = load_migrations(dialect)
    while True:
        with transaction(connection, begin_statement) as cursor:
            version = _schema_version(cursor, steps[-1][0])
            missing = [step for step in steps if step[0] > version]
            if not missing:
                return
            number, statements = missing[0]
            for statement in statements:
                cursor.execute(statement)
            cursor.execute(f"INSERT INTO schema_version (version) VALUES ({number})")


def _schema_version(cursor: Any, newest: int) -> int:
    cursor.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL PRIMARY KEY)")
    cursor.execute("SELECT COALESCE(MAX(version), 0) FROM schema_version")
    version = cursor.fetchone()[0]
    if not isinstance(version, int) or version > newest:
        raise ConfigError(
            "registry",
            f"its tables are of version {version!r} and this program knows up to {newest}: run the newer program, "
            "or name another registry",
        )
    return version
