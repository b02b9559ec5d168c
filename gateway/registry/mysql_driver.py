"""A DB-API module over PyMySQL, for ``adbapi.ConnectionPool``.

Parameters are written ``?``. A DATETIME is read as microseconds since 1970. COMMIT and ROLLBACK are sent only within a
transaction. Another thread can abort a connection, and so end the wait for a server that does not respond.

Statements are formatted here, with values as literals, which is fast. It is safe because every session sets a
``sql_mode`` in which the backslash escapes.
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
CONNECT_TIMEOUT = 3.0
READ_TIMEOUT = 4.0
WRITE_TIMEOUT = 4.0

#: errors after which a connection is reopened although it is not lost: the server shuts down, or is read-only (its name
#: may resolve to another server by now)
RECONNECT_ERRORS = frozenset({1047, 1053, 1079, 1290, 1792, 1836, 1927})

_EPOCH = datetime(1970, 1, 1)
_MICROSECOND = timedelta(microseconds=1)
#: characters that must be escaped in a literal
_SPECIAL = re.compile(r"[\\'\0\n\r\x1a]")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\0": "\\0", "\n": "\\n", "\r": "\\r", "\x1a": "\\Z"}


def format_datetime(microseconds: int) -> str:
    """Format a DATETIME(6)."""
    return (_EPOCH + timedelta(microseconds=microseconds)).isoformat(" ", "microseconds")


def parse_datetime(text: str) -> int:
    """Parse a DATETIME, with or without a fraction. Returns 0 for an invalid date, such as MySQL's 0000-00-00, so that
    the rest of a batch does not fail."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return 0
    return (moment - _EPOCH) // _MICROSECOND


def escape(text: str) -> str:
    """Escape a text for use within the quotation marks of a literal."""
    return _SPECIAL.sub(lambda match: _ESCAPES[match[0]], text)


def literal(value: str | int | None) -> str:
    """Format a value as a literal. Raises ``TypeError`` for another type."""
    if isinstance(value, str):
        return f"'{escape(value)}'"
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(int(value))
    raise TypeError(f"{value!r} cannot be a value in a statement")


def format_statement(text: str, values: Sequence[Any]) -> str:
    """Replace each ``?`` with a value. There must be as many as values, and none in a literal."""
    first, *rest = text.split("?")
    return first + "".join([literal(value) + part for value, part in zip(values, rest, strict=True)])


def format_client_rows(clients: Sequence[ClientRow]) -> str:
    """Format rows of ``clients`` for VALUES."""
    if _SPECIAL.search("".join([client_id + address for client_id, _, _, _, address in clients])):
        clients = [
            (escape(client_id), node, generation, connected_at, escape(address))
            for client_id, node, generation, connected_at, address in clients
        ]
    datetimes = {connected_at: format_datetime(connected_at) for connected_at in {row[3] for row in clients}}
    return ",".join(
        [
            f"('{client_id}',{node},{generation},'{datetimes[connected_at]}','{address}')"
            for client_id, node, generation, connected_at, address in clients
        ]
    )


def format_strings(values: Sequence[str]) -> str:
    """Format texts for ``IN (…)``."""
    if _SPECIAL.search("".join(values)):
        values = [escape(value) for value in values]
    return "'" + "','".join(values) + "'"


class Cursor(pymysql.cursors.Cursor):  # type: ignore[misc]
    """A cursor with ``?`` as parameter style."""

    def execute(self, text: str, values: Sequence[Any] | None = None) -> int:
        """Execute a statement, and return the number of affected rows. After one of :data:`RECONNECT_ERRORS` the
        connection is not usable any more."""
        try:
            count: int = super().execute(format_statement(text, values) if values else text)
        except pymysql.MySQLError as e:
            if e.args and e.args[0] in RECONNECT_ERRORS:
                self.connection.needs_reconnect = True
            raise
        return count


class Connection(pymysql.connections.Connection):  # type: ignore[misc]
    """A connection that is not opened before its ``connect`` is called."""

    #: whether it must be reopened before the next use
    needs_reconnect = False

    def __init__(self, **options: Any) -> None:
        conversions = {
            **pymysql.converters.conversions,
            FIELD_TYPE.DATETIME: parse_datetime,
            # VARBINARY, with ASCII texts
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
        """Commit, if in a transaction."""
        self.last_used_at = time.monotonic()
        if self._in_transaction():
            super().commit()

    def rollback(self) -> None:
        """Roll back, if in a transaction. The server has done so already if the connection is lost."""
        if self._in_transaction():
            try:
                super().rollback()
            except pymysql.MySQLError:
                self.needs_reconnect = True

    def is_usable(self, max_idle: float) -> bool:
        """Whether it is open, and was used within ``max_idle`` seconds."""
        return self.open and not self.needs_reconnect and time.monotonic() - self.last_used_at < max_idle

    def abort(self) -> None:
        """Shut down the socket. May be called from another thread: the thread that waits for the server gets an
        error."""
        sock = self._sock
        if sock is not None:
            # Not the shutdown of TLS, which would wait for the server.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _decode(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("ascii", "replace")


def connect(make_connection: Callable[[], Connection]) -> Connection:
    """Make a connection and open it. Called by ``adbapi``, in a thread."""
    connection = make_connection()
    connection.connect()
    return connection
