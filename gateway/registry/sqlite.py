"""The registry in an SQLite file: the default, for one node, or for several on one machine.

One connection, in write-ahead log mode: readers do not wait for the writer of another process. SQLite allows one writer
at a time; others wait for up to :data:`BUSY_TIMEOUT`.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from twisted.enterprise import adbapi
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.registry import schema_versions
from gateway.registry.batching import MAX_BATCH_SIZE
from gateway.registry.dialect import ClientRow
from gateway.registry.errors import RegistryError
from gateway.registry.interface import IRegistry, OnClaimRevoked, ignore_claim_revoked
from gateway.registry.job_queue import ErrorKind, Priority
from gateway.registry.sql import BATCH_DELAY, CollectFloors, SQLRegistry, no_floors
from gateway.settings import ConfigError

#: seconds to wait for the lock of another process
BUSY_TIMEOUT = 5

#: in the texts of errors of a file that cannot be used now: Python before 3.11 does not tell SQLite's error code
_UNAVAILABLE_TEXTS = (
    *("disk", "full", "readonly", "unable to open", "not a database", "malformed", "permission", "closed", "no such"),
)

_PRAGMAS = (
    f"busy_timeout = {BUSY_TIMEOUT * 1000}",
    "journal_mode = WAL",
    "synchronous = NORMAL",
    # 512 KiB: the page cache is part of the memory per client
    "cache_size = -512",
    "mmap_size = 0",
)


def system_clock() -> int:
    """Return the time in microseconds since 1970."""
    return time.time_ns() // 1000


class SQLite:
    """An SQLite file, as a :class:`~gateway.registry.sql.Database`. ``database_clock`` is in microseconds."""

    begin_statement = "BEGIN IMMEDIATE"
    # A subquery, so that it is evaluated once, not for each row.
    now_expression = "(SELECT now_us())"
    # A transaction that may write has locked the whole file.
    lock_clause = ""
    # All on one connection: with more, updates would be lost.
    queue_priorities: tuple[tuple[Priority, ...], ...] = (tuple(Priority),)
    max_batch_size = MAX_BATCH_SIZE
    retry_timeout: float | None = None
    upsert_statement = (
        "INSERT OR REPLACE INTO clients (client_id, node, generation, connected_at, address) VALUES (?, ?, ?, ?, ?)"
    )

    def __init__(self, path: str, database_clock: Callable[[], int]) -> None:
        self.path = path
        self._database_clock = database_clock
        self._file_identity: tuple[int, int] | None = None

    def make_pool(self, pool_factory: Callable[..., Any], reactor: Any) -> Any:
        """Make a pool of one connection, which is reopened when the file was replaced."""
        pool = pool_factory(
            "sqlite3",
            self.path,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
            cp_min=1,
            cp_max=1,
            cp_openfun=self.prepare,
            cp_reactor=reactor,
        )
        connect = pool.connectionFactory

        def connect_to_current_file(pool: Any) -> Any:
            connection = connect(pool)
            if self._file_identity is not None and _file_identity(self.path) != self._file_identity:
                # Removed, or replaced: other processes do not see what is written to the old file.
                connection.reconnect()
            return connection

        pool.connectionFactory = connect_to_current_file
        return pool

    def to_timestamp(self, microseconds: int) -> int:
        """Convert a time to a statement parameter."""
        return microseconds

    def lock_clients(self, cursor: Any, clients: Sequence[tuple[str, str]]) -> int:
        """Do nothing: the whole file is locked."""
        return 0

    def fill_clients(self, cursor: Any, client_ids: Sequence[str], node: int, now: int) -> None:
        """Do nothing: :meth:`lock_clients` inserts no placeholder rows."""

    def write_clients(self, cursor: Any, rows: Sequence[ClientRow]) -> None:
        """Insert or overwrite rows of ``clients``."""
        cursor.executemany(self.upsert_statement, rows)

    def remove_clients(self, cursor: Any, rows: Sequence[tuple[str, int]]) -> None:
        """Remove rows of ``clients``."""
        cursor.executemany("DELETE FROM clients WHERE client_id = ? AND node = ?", rows)

    def lock_assignments(self, cursor: Any, client_ids: Sequence[str]) -> None:
        """Do nothing: the whole file is locked."""

    def write_assignments(self, cursor: Any, client_ids: Sequence[str], node: int, expires_at: int, now: int) -> None:
        """Insert or overwrite rows of ``placements``."""
        cursor.executemany(
            "INSERT OR REPLACE INTO placements (client_id, node, until, moved_at) VALUES (?, ?, ?, ?)",
            [(client_id, node, expires_at, now) for client_id in client_ids],
        )

    def remove_assignments(self, cursor: Any, client_ids: Sequence[str], moved_by: int) -> None:
        """Remove rows of ``placements`` that were not written after ``moved_by``."""
        rows = [(client_id, moved_by) for client_id in client_ids]
        cursor.executemany("DELETE FROM placements WHERE client_id = ? AND moved_at <= ?", rows)

    def lock_node_shared(self, cursor: Any, node_id: str) -> None:
        """Do nothing: the whole file is locked."""

    def wait_for_claims(self, cursor: Any, node_ids: list[str]) -> None:
        """Do nothing: there are no other transactions while the file is locked."""

    def prepare(self, connection: Any) -> None:
        """Set up a new connection, and bring the schema up to date."""
        try:
            connection.create_function("now_us", 0, self._database_clock)
            with closing(connection.cursor()) as cursor:
                for pragma in _PRAGMAS:
                    cursor.execute(f"PRAGMA {pragma}").fetchall()
            schema_versions.apply(connection, "sqlite", self.begin_statement)
            self._file_identity = _file_identity(self.path)
        except BaseException:
            connection.close()
            raise

    def check(self) -> None:
        """Open the file in this thread, bring its schema up to date, and close it. Raises ``ConfigError``."""
        try:
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
            self.prepare(connection)
            connection.close()
        except (sqlite3.Error, ConfigError) as e:
            raise self.to_config_error(e) from None

    def classify(self, error: BaseException | None) -> ErrorKind:
        """Return the kind of an error: retryable if the lock of another connection was in the way."""
        text = str(error)
        if isinstance(error, sqlite3.OperationalError) and "locked" in text:
            return ErrorKind.RETRYABLE
        if isinstance(error, sqlite3.Error) and any(part in text for part in _UNAVAILABLE_TEXTS):
            return ErrorKind.UNAVAILABLE
        state = isinstance(error, ConfigError | RegistryError | OSError | MemoryError | None)
        return ErrorKind.UNAVAILABLE if state else ErrorKind.REFUSED

    def explain(self, error: BaseException | None) -> str:
        """Describe an error in one line for the log, or return an empty text if it is not SQLite's."""
        if isinstance(error, ConfigError | sqlite3.DatabaseError | sqlite3.InterfaceError | OSError):
            return f"{_printable(self.path)}: {error}"
        return ""

    def to_config_error(self, error: BaseException) -> ConfigError:
        """Describe an error that occurred while the file was opened."""
        path, folder = _printable(self.path), os.path.dirname(self.path)
        text = str(error)
        if isinstance(error, ConfigError):
            problem = f"{path}: {text.removeprefix('--registry: ')}"
        elif os.path.isdir(self.path):
            problem = f"{path} is a folder; name a file in it"
        elif not os.path.isdir(folder):
            problem = f"the folder {_printable(folder)} does not exist; create it, or name another path"
        elif "not a database" in text:
            problem = f"{path} is not an SQLite database; name another path"
        elif "locked" in text:
            problem = f"{path} is locked by another program; stop that program, or name another path"
        elif "unable to open" in text or "readonly" in text:
            problem = f"{path} cannot be written ({text}); let this user write to it and to its folder"
        elif "is full" in text:
            problem = f"there is no space left for {path} ({text})"
        elif "already exists" in text:
            problem = f"{path} is the database of another program ({text}); name another path"
        else:
            problem = f"{path} cannot be used: {text}"
        return ConfigError("registry", problem)


@implementer(IRegistry)
class SQLiteRegistry(SQLRegistry):
    """A registry in the SQLite file ``path``.

    ``database_clock`` returns microseconds since 1970, and is only for tests: all registries in one file must have the
    same one. The other arguments are those of :class:`~gateway.registry.sql.SQLRegistry`.
    """

    def __init__(
        self,
        path: str,
        *,
        lease: float,
        reactor: Any,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        database_clock: Callable[[], int] = system_clock,
        make_pool: Callable[..., Any] = adbapi.ConnectionPool,
        batch_delay: float = BATCH_DELAY,
        on_claim_revoked: OnClaimRevoked = ignore_claim_revoked,
        heartbeat: float | None = None,
        collect_floors: CollectFloors = no_floors,
    ) -> None:
        if path == ":memory:" or "\0" in path:
            raise ConfigError("registry", f"{path!r} is not the path of a file; write sqlite:PATH")
        super().__init__(
            SQLite(os.path.abspath(path), database_clock),
            lease=lease,
            reactor=reactor,
            metrics=metrics,
            clock=clock,
            make_pool=make_pool,
            batch_delay=batch_delay,
            on_claim_revoked=on_claim_revoked,
            heartbeat=heartbeat,
            collect_floors=collect_floors,
        )


def _file_identity(path: str) -> tuple[int, int] | None:
    """Return the device and inode that a path names now, or ``None``."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _printable(path: str) -> str:
    return path if path.isprintable() else repr(path)
