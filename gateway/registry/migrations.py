"""The tables, brought up to date: numbered files of SQL, applied in order, each in one transaction.

The number of the last file that was applied is kept in the table ``schema_version``. Several processes may start on one
database at once: each step looks at that number again inside its own transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import resources
from typing import Any

from gateway.settings import ConfigError


@contextmanager
def transaction(connection: Any, begin_statement: str) -> Iterator[Any]:
    """A cursor in a transaction of its own: committed at the end, rolled back when anything raises.

    ``begin`` is the statement that begins a transaction which may write.
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
    found = []
    for file in folder.iterdir():
        if file.name.endswith(".sql"):
            found.append((int(file.name[:4]), split_statements(file.read_text(encoding="utf-8"))))
    return sorted(found)


def split_statements(text: str) -> list[str]:
    """Split a file into its statements: each ends with a semicolon at the end of a line; ``--`` begins a comment."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("--")]
    return [part.strip() for part in "\n".join([*lines, ""]).split(";\n") if part.strip()]


def apply(connection: Any, dialect: str, begin_statement: str) -> None:
    """Apply the files that this database has not seen, on a DB-API connection without a transaction.

    Raises ``ConfigError`` when the database is of a newer program.
    """
    known = load_migrations(dialect)
    while True:
        with transaction(connection, begin_statement) as cursor:
            version = _schema_version(cursor, known[-1][0])
            missing = [step for step in known if step[0] > version]
            if not missing:
                return
            number, texts = missing[0]
            for text in texts:
                cursor.execute(text)
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
