"""PyMySQL, as the registry wants it: a DB-API module for ``adbapi.ConnectionPool``.

Parameters are written ``?``; a DATETIME is read as microseconds since 1970; COMMIT and ROLLBACK are sent only in a
transaction; a connection can be broken off by another thread, which ends the wait for a server that does not answer.

The texts of statements are made here, with each value written as a literal of its own kind. That is safe, because each
session's ``sql_mode`` is known to leave the backslash its meaning, and quick.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import pymysql.connections
import pymysql.converters
import pymysql.cursors
from pymysql.constants import FIELD_TYPE, SERVER_STATUS

from gateway.registry.dialect import ClientRow

apilevel = "2.0"
threadsafety = 1

#: seconds
CONNECT_TIMEOUT, READ_TIMEOUT, WRITE_TIMEOUT = 3.0, 4.0, 4.0

#: errors after which a connection is made anew, though it is still there: the server goes away, or is read-only now
#: (behind its name there may be another by now)
RECONNECT_ERRORS = frozenset({1047, 1053, 1079, 1290, 1792, 1836, 1927})

_EPOCH = datetime(1970, 1, 1)
_MICROSECOND = timedelta(microseconds=1)
#: what cannot stand in a literal as it is
_SPECIAL = re.compile(r"[\\'\0\n\r\x1a]")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\0": "\\0", "\n": "\\n", "\r": "\\r", "\x1a": "\\Z"}


def format_datetime(microseconds: int) -> str:
    """The text of a DATETIME(6)."""
    return (_EPOCH + timedelta(microseconds=microseconds)).isoformat(" ", "microseconds")


def parse_datetime(text: str) -> int:
    """The opposite of :func:`moment`; the fraction may be left out. What is no date, such as MySQL's 0000-00-00, is
    long ago: the batch in which it stands is not to suffer."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return 0
    return (at - _EPOCH) // _MICROSECOND


def escape(text: str) -> str:
    """A text as it stands between the quotation marks of a literal."""
    return _SPECIAL.sub(lambda match: _ESCAPES[match[0]], text)


def literal(value: str | int | None) -> str:
    """A value, as it stands in a statement. Raises ``TypeError`` for one of another kind."""
    if isinstance(value, str):
        return f"'{escape(value)}'"
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(int(value))
    raise TypeError(f"{value!r} is no value of a statement")


def format_statement(text: str, values: Sequence[Any]) -> str:
    """Put values in the places of ``?``, of which a text has as many, and none of another meaning."""
    first, *rest = text.split("?")
    return first + "".join([literal(value) + part for value, part in zip(values, rest, strict=True)])


def format_client_rows(clients: Sequence[ClientRow]) -> str:
    """Rows of ``clients`` as they stand behind VALUES."""
    if _SPECIAL.search("".join([client_id + address for client_id, _, _, _, address in clients])):
        clients = [(escape(client_id), *rest, escape(address)) for client_id, *rest, address in clients]  # type: ignore[misc]
    moments = {at: format_datetime(at) for at in {row[3] for row in clients}}
    return ",".join(
        [
            f"('{client_id}',{node},{generation},'{moments[at]}','{address}')"
            for client_id, node, generation, at, address in clients
        ]
    )


def format_strings(values: Sequence[str]) -> str:
    """Texts as they stand in the brackets of IN."""
    if _SPECIAL.search("".join(values)):
        values = [escape(value) for value in values]
    return "'" + "','".join(values) + "'"


class Cursor(pymysql.cursors.Cursor):  # type: ignore[misc]
    """A cursor that takes ``?``."""

    def execute(self, text: str, values: Sequence[Any] | None = None) -> int:
        """Carry out a statement. The connection remembers an error after which it is of no use."""
        try:
            count: int = super().execute(format_statement(text, values) if values else text)
        except pymysql.MySQLError as e:
            if e.args and e.args[0] in RECONNECT_ERRORS:
                self.connection.needs_reconnect = True
            raise
        return count


class Connection(pymysql.connections.Connection):  # type: ignore[misc]
    """A connection that is made later, by ``connect``."""

    #: whether it should be made anew
    needs_reconnect = False

    def __init__(self, **options: Any) -> None:
        conversions = {
            **pymysql.converters.conversions,
            FIELD_TYPE.DATETIME: parse_datetime,
            # VARBINARY: texts of ASCII
            FIELD_TYPE.VAR_STRING: _decode,
        }
        super().__init__(
            defer_connect=True,
            conv=conversions,
            cursorclass=Cursor,
            charset="utf8mb4",
            collation="utf8mb4_bin",
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            write_timeout=WRITE_TIMEOUT,
            **options,
        )
        self.last_used_at = time.monotonic()

    def _in_transaction(self) -> bool:
        return self.open and bool(self.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS)

    def commit(self) -> None:
        """Commit, if there is a transaction."""
        self.last_used_at = time.monotonic()
        if self._in_transaction():
            super().commit()

    def rollback(self) -> None:
        """Roll back, if there is a transaction. A connection that is lost has rolled back."""
        if self._in_transaction():
            try:
                super().rollback()
            except pymysql.MySQLError:
                self.needs_reconnect = True

    def is_usable(self, max_idle: float) -> bool:
        """Whether it is there, and was used within so many seconds."""
        return self.open and not self.needs_reconnect and time.monotonic() - self.last_used_at < max_idle

    def abort(self) -> None:
        """Break it off, from another thread: whoever waits for the server there gets an error."""
        connected = self._sock
        if connected is not None:
            # Not TLS's own shutdown, which would wait for an answer.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _decode(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("ascii", "replace")


def connect(make_connection: Callable[[], Connection]) -> Connection:
    """Connect, as ``adbapi`` has it done in a thread."""
    connection = make_connection()
    connection.connect()
    return connection
