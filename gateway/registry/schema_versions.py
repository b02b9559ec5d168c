"""Bring the schema up to date: numbered SQL files, applied in order, each in one transaction.

A program knows the files that it contains. It also works on tables to which a newer program has applied more files, as
long as each of these allows it. The first line of a file states which programs work on its tables::

    -- Oldest program: 1

that is, the programs that know file 1: all statements of theirs work, with the same meaning. A column with a default is
such a change. A file that allows only the programs that know it gives its own number.

Two tables record this:

    schema_files      the numbers of the files that were applied
    schema_version    the oldest program for all of them: it knows the file with the highest number here

Programs that know only file 1 read ``schema_version`` alone, and take its number for the last file applied.

Several processes may do this to one database at once, so each step reads the tables again inside its own transaction.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import resources
from typing import Any

import attrs

from gateway.settings import ConfigError

_OLDEST_PROGRAM = re.compile(r"-- Oldest program: ([1-9][0-9]*)\n")


@attrs.frozen
class SchemaFile:
    """A file of ``schema/<dialect>``."""

    number: int
    #: the number of a file: the programs that know it work on the tables that this file leaves
    oldest_program: int
    statements: tuple[str, ...]


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


@functools.cache
def load_files(dialect: str) -> tuple[SchemaFile, ...]:
    """Return the files of ``schema/<dialect>``, in order. They are read once: a program that runs while its files are
    replaced keeps the schema that it knows.

    Raises ``ValueError`` for a file that does not state its oldest program.
    """
    folder = resources.files("gateway.registry") / "schema" / dialect
    return tuple(
        sorted(
            (
                parse_file(int(file.name[:4]), file.read_text(encoding="utf-8"))
                for file in folder.iterdir()
                if file.name.endswith(".sql")
            ),
            key=lambda file: file.number,
        )
    )


def parse_file(number: int, text: str) -> SchemaFile:
    """Parse a file. Raises ``ValueError`` if its first line does not state its oldest program."""
    match = _OLDEST_PROGRAM.match(text)
    if match is None or int(match[1]) > number:
        raise ValueError(f"schema file {number}: its first line should be '-- Oldest program: N', up to {number}")
    return SchemaFile(number, int(match[1]), tuple(split_statements(text)))


def split_statements(text: str) -> list[str]:
    """Split a file into its statements: each ends with a semicolon at the end of a line; ``--`` begins a comment."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("--")]
    return [statement.strip() for statement in "\n".join([*lines, ""]).split(";\n") if statement.strip()]


def is_current(cursor: Any, dialect: str) -> bool:
    """Whether all files that this program knows were applied.

    Raises ``ConfigError`` if the tables need a newer program, and an error of the database if they do not exist.
    """
    newest = load_files(dialect)[-1].number
    _, applied = _read_versions(cursor, newest)
    return applied >= newest


def apply(
    connection: Any,
    dialect: str,
    begin_statement: str,
    is_repetition: Callable[[Exception], bool] = lambda error: False,
) -> None:
    """Apply the files that this database does not have yet, on a DB-API connection that is not in a transaction.

    ``is_repetition`` tells whether an error means that a statement was carried out before, by a program that ended
    before its file was complete. Raises ``ConfigError`` if the tables need a newer program.
    """
    files = load_files(dialect)
    while True:
        with transaction(connection, begin_statement) as cursor:
            cursor.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL PRIMARY KEY)")
            cursor.execute("CREATE TABLE IF NOT EXISTS schema_files (number INTEGER NOT NULL PRIMARY KEY)")
            oldest_program, applied = _read_versions(cursor, files[-1].number)
            missing = [file for file in files if file.number > applied]
            if not missing:
                return
            file = missing[0]
            for statement in file.statements:
                try:
                    cursor.execute(statement)
                except Exception as e:
                    if not is_repetition(e):
                        raise
            # In this order: without transactions, a file is applied again rather than its oldest program forgotten.
            if file.oldest_program > oldest_program:
                cursor.execute(f"REPLACE INTO schema_version (version) VALUES ({file.oldest_program})")
            cursor.execute(f"REPLACE INTO schema_files (number) VALUES ({file.number})")


def _read_versions(cursor: Any, newest: int) -> tuple[int, int]:
    """Return the oldest program, and the last file applied."""
    cursor.execute("SELECT (SELECT MAX(version) FROM schema_version), (SELECT MAX(number) FROM schema_files)")
    oldest_program, applied = (0 if number is None else number for number in cursor.fetchone())
    if not isinstance(oldest_program, int) or oldest_program > newest:
        raise ConfigError(
            "registry",
            f"its tables need a program that knows version {oldest_program!r} of the schema, and this one knows up to "
            f"{newest}: run the newer program, or name another registry",
        )
    # A program that knows only file 1 writes no schema_files.
    return oldest_program, max(oldest_program, applied)
