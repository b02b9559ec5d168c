"""The registry in MySQL or MariaDB, for a fleet on several machines.

    mysql://user@host:3306/database?ssl_ca=…&ssl_cert=…&ssl_key=…&ssl_verify=…

Special characters in the URL are percent-encoded; an IPv6 address is written in square brackets. The URL never has the
password.

With any ``ssl_`` parameter TLS is required. ``ssl_ca`` is a file of trusted CA certificates (default: those of the
system), ``ssl_cert`` and ``ssl_key`` are this node's own certificate and its key, and ``ssl_verify=false`` accepts any
server certificate.

There are five connections, each with a thread, so that no kind of job waits for another: one for heartbeats, two for
claims and releases (the database works on a batch while the node builds the next), one for lookups, one for
maintenance.

A batch of claims and releases is one transaction, in READ COMMITTED, its rows sorted by client_id:

    INSERT … ON DUPLICATE KEY UPDATE client_id = client_id     lock each row; insert a placeholder (node 0) if missing
    SELECT … FROM clients, SELECT … FROM nodes                 read the owners, their leases, and the clock
    DELETE, INSERT … ON DUPLICATE KEY UPDATE                   write the outcome

A statement that gets no response within a few seconds fails. The server closes a connection that is idle for a lease,
and so ends the transaction of a node that hangs: its locks would block the claims of other nodes.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs
import pymysql
from twisted.enterprise import adbapi
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.registry import mysql_driver, schema_versions
from gateway.registry.dialect import ClientRow
from gateway.registry.errors import RegistryError
from gateway.registry.interface import IRegistry, OnClaimRevoked, ignore_claim_revoked
from gateway.registry.job_queue import ErrorKind, Priority
from gateway.registry.mysql_driver import RECONNECT_ERRORS, Connection
from gateway.registry.sql import BATCH_DELAY, CollectFloors, SQLRegistry, no_floors
from gateway.settings import ConfigError

DEFAULT_PORT = 3306
URL_HINT = "write mysql://user@host:3306/database"
TLS_PARAMETERS = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_verify")

#: Errors after which the work may succeed at the next try: a lock held by another transaction (1205, 1213), a
#: connection that was lost or refused (0: closed), too many connections, and a server that shuts down or is read-only.
RETRYABLE_ERRORS = frozenset({0, 1040, 1205, 1213, 1317, 2003, 2006, 2013, 2055, 4031}) | RECONNECT_ERRORS
#: those of the above that say that the connection was lost, perhaps because of what was sent
LOST_CONNECTION_ERRORS = frozenset({0, 2006, 2013, 2055})
#: Errors of a database that cannot be used now, by this user or at all: its tables, the user's password and rights, the
#: disk, limits on connections, and the client's own errors.
UNAVAILABLE_ERRORS = frozenset(
    {
        *(1021, 1044, 1045, 1049, 1054, 1114, 1129, 1130, 1142, 1143, 1146, 1203, 1226, 1227, 1698),
        *(2000, 2001, 2002, 2005, 2026),
    }
)
#: oldest supported versions
MIN_MYSQL_VERSION = (8, 0)
MIN_MARIADB_VERSION = (10, 3)
#: errors of a statement in a schema file that was carried out before: the column (1060) or key (1061) exists, or is
#: gone (1091). MySQL has no ADD COLUMN IF NOT EXISTS.
REPEATED_STATEMENT_ERRORS = frozenset({1060, 1061, 1091})
#: seconds that a statement waits for a lock
LOCK_TIMEOUT = 1
#: seconds that a starting node waits for another one that creates the tables
SCHEMA_TIMEOUT = 3
#: seconds for which retryable errors are retried: less than a client waits for its claim
RETRY_TIMEOUT = 2.0
#: claims and releases in one batch: see benchmarks/registry.py
MAX_BATCH_SIZE = 500

_COLUMNS = "client_id, node, generation, connected_at, address"


@attrs.frozen
class TLSOptions:
    """The ``ssl_`` parameters of the URL: paths, or empty."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    verify: bool = True

    def make_context(self) -> ssl.SSLContext:
        """Make a context for one connection, from the current content of the files. Raises ``ConfigError``."""
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ssl.SSLError) as e:
            raise _tls_file_error("ssl_ca", self.ca, e) from None
        # The certificates that servers generate for themselves are not strict X.509; Python 3.13 would refuse them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert:
            try:
                # With an empty password, or OpenSSL would prompt for one on the terminal.
                context.load_cert_chain(self.cert, self.key or None, password="")
            except (OSError, ssl.SSLError) as e:
                raise _tls_file_error("ssl_cert", f"{self.cert} with ssl_key={self.key or self.cert}", e) from None
        return context


@attrs.frozen
class MySQLServer:
    """The address of a database."""

    host: str
    port: int
    user: str
    database: str
    tls: TLSOptions | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        text = f"{host}:{self.port}/{self.database}"
        return text if text.isprintable() else repr(text)


def parse_url(url: str) -> MySQLServer:
    """Parse a URL. Raises ``ConfigError``, whose text never shows a password in it."""
    try:
        parts = urlsplit(url)
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError as e:
        raise ConfigError("registry", f"not a URL ({e}); {URL_HINT}") from None
    if parts.password is not None:
        raise ConfigError(
            "registry",
            "a password in the URL would be visible in the list of processes; put it in a file and name that with "
            "--registry-password-file, or in the environment variable WSGATEWAY_REGISTRY_PASSWORD",
        )
    user, host = unquote(parts.username or ""), unquote(parts.hostname or "")
    database = unquote(parts.path[1:])
    for what, value in (("user", user), ("host", host), ("database", database)):
        if not value:
            raise ConfigError("registry", f"the {what} is missing; {URL_HINT}")
        if not value.isprintable():
            raise ConfigError("registry", f"the {what} {value!r} has characters that cannot be printed; {URL_HINT}")
    if "/" in parts.path[1:] or parts.fragment or port == 0:
        raise ConfigError("registry", f"{url!r} is not valid; {URL_HINT}")
    return MySQLServer(host, port, user, database, _parse_tls_options(parts.query))


def _parse_tls_options(query: str) -> TLSOptions | None:
    values: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in TLS_PARAMETERS:
            raise ConfigError("registry", f"{name!r} is no parameter of its URL; there are {', '.join(TLS_PARAMETERS)}")
        if name in values or not value:
            raise ConfigError("registry", f"the parameter {name} of its URL should be given once, with a value")
        values[name] = value
    if query and not values:
        raise ConfigError("registry", f"{query!r} is no parameter of its URL; there are {', '.join(TLS_PARAMETERS)}")
    if not values:
        return None
    verify = values.get("ssl_verify", "true")
    if verify not in ("true", "false"):
        raise ConfigError("registry", f"ssl_verify={verify} is neither true nor false; write one of these")
    if "ssl_key" in values and "ssl_cert" not in values:
        raise ConfigError("registry", "ssl_key is the key of a certificate; give ssl_cert as well, or neither")
    tls = TLSOptions(values.get("ssl_ca", ""), values.get("ssl_cert", ""), values.get("ssl_key", ""), verify == "true")
    tls.make_context()
    return tls


def _tls_file_error(parameter: str, value: str, error: OSError) -> ConfigError:
    return ConfigError("registry", f"{parameter}={value} cannot be used: {error.strerror or error}")


def explain(server: MySQLServer, error: BaseException | None) -> str:
    """Describe an error in one line for the log, or return an empty text if it is not the database's or network's."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, pymysql.MySQLError | OSError):
        return f"{server}: {_error_message(error)}"
    return ""


def to_config_error(server: MySQLServer, has_password: bool, error: BaseException) -> ConfigError:
    """Describe an error that occurred while the registry was opened, in one line."""
    if isinstance(error, ConfigError):
        text = str(error).removeprefix("--registry: ")
        # Some name the server already.
        return (
            error
            if error.option != "registry" or text.startswith(str(server))
            else ConfigError("registry", f"{server}: {text}")
        )
    code = error.args[0] if isinstance(error, pymysql.MySQLError) and error.args else None
    text, database, user = _error_message(error), repr(server.database), repr(server.user)
    known = {
        1040: "has too many connections; raise its max_connections, or stop what holds them",
        1044: f"does not let {user} use {database}, or has none of that name: CREATE DATABASE {server.database}; "
        f"GRANT ALL ON {server.database}.* TO {user}@'…'",
        1049: f"has no database {database}: CREATE DATABASE {server.database}, or name another",
        1142: f"does not let {user} do what is needed ({text}): GRANT ALL ON {server.database}.* TO {user}@'…'",
        1290: f"cannot be written ({text}); name the server that can be",
        1836: f"cannot be written ({text}); name the server that can be",
        2026: f"has no TLS ({text}); let it have a certificate, or leave the ssl_ parameters out",
    }
    cause = getattr(error, "original_exception", None)
    if code in (1045, 1698):
        problem = f"does not let {user} in ({text}): " + (
            "the password is wrong, or that user may not come from here, or only with TLS (ssl_ca) or a certificate "
            "(ssl_cert, ssl_key)"
            if has_password
            else "no password was given; put it in a file and name that with --registry-password-file, or in the "
            "environment variable WSGATEWAY_REGISTRY_PASSWORD"
        )
    elif isinstance(cause, ssl.SSLError):
        problem = f"has no certificate that will do ({cause}); see ssl_ca and ssl_verify"
    elif code == 2003 or isinstance(error, OSError):
        problem = f"cannot be reached ({cause or text}); is it up, and are host and port right?"
    else:
        problem = known.get(code or 0) or f"cannot be used: {text}"
    return ConfigError("registry", f"{server} {problem}")


def _error_message(error: BaseException) -> str:
    """Return the database's error message, in one line and without its number."""
    message = error.args[1] if isinstance(error, pymysql.MySQLError) and len(error.args) > 1 else str(error)
    return " ".join(str(message).split()) or "the connection was closed"


def _is_repetition(error: Exception) -> bool:
    return isinstance(error, pymysql.MySQLError) and error.args[:1] in [(code,) for code in REPEATED_STATEMENT_ERRORS]


class MySQL:
    """A database of MySQL or MariaDB, as a :class:`~gateway.registry.sql.Database`.

    ``password`` is called for each connection. ``lease`` is in seconds.
    """

    begin_statement = "START TRANSACTION"
    now_expression = "UTC_TIMESTAMP(6)"
    lock_clause = " FOR UPDATE"
    queue_priorities: tuple[tuple[Priority, ...], ...] = (
        (Priority.HEARTBEAT,),
        (Priority.WRITES,),
        (Priority.WRITES,),
        (Priority.READS,),
        (Priority.MAINTENANCE,),
    )
    max_batch_size = MAX_BATCH_SIZE
    retry_timeout: float | None = RETRY_TIMEOUT

    def __init__(self, server: MySQLServer, password: Callable[[], bytes], lease: float) -> None:
        self.server = server
        self._password = password
        # About when the other nodes consider this one dead.
        self._idle_timeout = max(1, math.ceil(lease))

    def make_connection(self) -> Connection:
        """Make a connection that is not connected yet. Raises ``ConfigError`` for files that cannot be used."""
        server = self.server
        tls: dict[str, Any] = {"ssl": server.tls.make_context()} if server.tls else {"ssl_disabled": True}
        return Connection(
            host=server.host,
            port=server.port,
            user=server.user,
            password=self._password(),
            database=server.database,
            **tls,
        )

    def make_pool(self, pool_factory: Callable[..., Any], reactor: Any) -> Any:
        """Make a pool of one connection, which is reopened when it was idle for too long, and aborted by ``close``."""
        latest: list[Connection] = []

        def make_connection() -> Connection:
            latest[:] = [self.make_connection()]
            return latest[0]

        pool = pool_factory(
            mysql_driver.__name__, make_connection, cp_min=1, cp_max=1, cp_openfun=self.prepare, cp_reactor=reactor
        )
        connect, close = pool.connectionFactory, pool.finalClose

        def connect_usable(pool: Any) -> Any:
            connection = connect(pool)
            if not connection.is_usable(self._idle_timeout / 2):
                connection.reconnect()
            return connection

        def abort_and_close() -> None:
            # Otherwise this would wait for the thread, and the thread for a server that does not respond.
            for connection in latest:
                connection.abort()
            if pool.finalClose is abort_and_close:
                pool.finalClose = lambda: None
                close()

        pool.connectionFactory, pool.finalClose = connect_usable, abort_and_close
        return pool

    def prepare(self, connection: Connection) -> None:
        """Set up the session of a new connection, regardless of the server's defaults, and bring the schema up to
        date."""
        try:
            self._check_version(str(connection.server_version))
            with closing(connection.cursor()) as cursor:
                cursor.execute(
                    "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', time_zone = '+00:00',"
                    f" innodb_lock_wait_timeout = {LOCK_TIMEOUT}, lock_wait_timeout = {LOCK_TIMEOUT},"
                    f" wait_timeout = {self._idle_timeout}"
                )
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
                if not self._is_schema_current(cursor):
                    self._migrate(connection, cursor)
        except BaseException:
            connection.close()
            raise

    def _is_schema_current(self, cursor: Any) -> bool:
        try:
            return schema_versions.is_current(cursor, "mysql")
        except pymysql.ProgrammingError:
            return False

    def _migrate(self, connection: Connection, cursor: Any) -> None:
        """Bring the schema up to date under a named lock, since the server commits at each CREATE or ALTER TABLE."""
        cursor.execute("SELECT GET_LOCK(CONCAT('wsgateway ', LEFT(MD5(DATABASE()), 32)), ?)", (SCHEMA_TIMEOUT,))
        if cursor.fetchone()[0] != 1:
            raise pymysql.OperationalError(1205, "another node is still bringing the tables up to date")
        schema_versions.apply(connection, "mysql", self.begin_statement, _is_repetition)
        cursor.execute("SELECT RELEASE_LOCK(CONCAT('wsgateway ', LEFT(MD5(DATABASE()), 32)))")

    def _check_version(self, server_version: str) -> None:
        maria = "mariadb" in server_version.lower()
        oldest = MIN_MARIADB_VERSION if maria else MIN_MYSQL_VERSION
        # MariaDB may report 5.5.5-10.11.2-MariaDB, for old replicas.
        numbers = server_version.removeprefix("5.5.5-").partition("-")[0].split(".")
        try:
            version = tuple(int(number) for number in numbers[:2])
        except ValueError:
            version = oldest
        if version < oldest:
            name = "MariaDB" if maria else "MySQL"
            required = ".".join(map(str, oldest))
            raise ConfigError("registry", f"{self.server} is {name} {server_version}; {required} or newer is needed")

    def check(self) -> None:
        """Connect in this thread, bring the schema up to date, and disconnect. Raises ``ConfigError``."""
        deadline = time.monotonic() + mysql_driver.CONNECT_TIMEOUT
        while True:
            try:
                connection = mysql_driver.connect(self.make_connection)
                self.prepare(connection)
                connection.close()
                return
            except (pymysql.MySQLError, RuntimeError, OSError, ConfigError) as e:
                # Another node may be creating the tables.
                locked = isinstance(e, pymysql.MySQLError) and e.args[:1] in ((1205,), (1213,))
                if not locked or time.monotonic() > deadline:
                    raise self.to_config_error(e) from None

    # Dialect

    def to_timestamp(self, microseconds: int) -> str:
        """Convert a time to a statement parameter."""
        return mysql_driver.format_datetime(microseconds)

    def lock_clients(self, cursor: Any, clients: Sequence[tuple[str, str]]) -> int:
        """Lock these rows, and insert placeholder rows of node 0 for missing ones."""
        rows = mysql_driver.format_client_rows([(client_id, 0, 0, 0, address) for client_id, address in clients])
        # Existing rows are not changed, and not counted.
        count: int = cursor.execute(
            f"INSERT INTO clients ({_COLUMNS}) VALUES {rows} ON DUPLICATE KEY UPDATE client_id = clients.client_id"
        )
        return count

    def fill_clients(self, cursor: Any, client_ids: Sequence[str], node: int, now: int) -> None:
        """Turn placeholder rows into rows of claims made now, at half the cost of :meth:`write_clients`."""
        cursor.execute(
            f"UPDATE clients FORCE INDEX (PRIMARY) SET node = {int(node)}, generation = {int(now)},"
            f" connected_at = '{self.to_timestamp(now)}' WHERE client_id IN ({mysql_driver.format_strings(client_ids)})"
        )

    def write_clients(self, cursor: Any, rows: Sequence[ClientRow]) -> None:
        """Insert or overwrite rows of ``clients``."""
        cursor.execute(
            f"INSERT INTO clients ({_COLUMNS}) VALUES {mysql_driver.format_client_rows(rows)} ON DUPLICATE KEY UPDATE"
            " node = VALUES(node), generation = VALUES(generation), connected_at = VALUES(connected_at),"
            " address = VALUES(address)"
        )

    def remove_clients(self, cursor: Any, rows: Sequence[tuple[str, int]]) -> None:
        """Remove rows of ``clients``, without reading or waiting for any other row."""
        nodes = ",".join([str(int(node)) for node in {node for _, node in rows}])
        ids = mysql_driver.format_strings([client_id for client_id, _ in rows])
        cursor.execute(
            f"DELETE c FROM clients c FORCE INDEX (PRIMARY) WHERE c.client_id IN ({ids}) AND c.node IN ({nodes})"
        )

    def lock_assignments(self, cursor: Any, client_ids: Sequence[str]) -> None:
        """Lock these rows, and insert placeholder rows of node 0 for missing ones."""
        values = f",0,'{self.to_timestamp(0)}','{self.to_timestamp(0)}')"
        rows = ",".join([f"({mysql_driver.literal(client_id)}{values}" for client_id in client_ids])
        cursor.execute(
            f"INSERT INTO placements (client_id, node, until, moved_at) VALUES {rows}"
            " ON DUPLICATE KEY UPDATE client_id = placements.client_id"
        )

    def write_assignments(self, cursor: Any, client_ids: Sequence[str], node: int, expires_at: int, now: int) -> None:
        """Overwrite locked rows of ``placements``."""
        cursor.execute(
            f"UPDATE placements FORCE INDEX (PRIMARY) SET node = {int(node)},"
            f" until = '{self.to_timestamp(expires_at)}', moved_at = '{self.to_timestamp(now)}'"
            f" WHERE client_id IN ({mysql_driver.format_strings(client_ids)})"
        )

    def remove_assignments(self, cursor: Any, client_ids: Sequence[str], moved_by: int) -> None:
        """Remove rows of ``placements`` that were not written after ``moved_by``, without reading or waiting for any
        other row."""
        cursor.execute(
            "DELETE p FROM placements p FORCE INDEX (PRIMARY)"
            f" WHERE p.client_id IN ({mysql_driver.format_strings(client_ids)})"
            f" AND p.moved_at <= '{self.to_timestamp(moved_by)}'"
        )

    def lock_node_shared(self, cursor: Any, node_id: str) -> None:
        """Lock this node's entry in the index on node_id, which is all that this reads: a heartbeat changes the row
        but not the index, and a transaction that removes the row must wait."""
        cursor.execute("SELECT node_id FROM nodes WHERE node_id = ? LOCK IN SHARE MODE", (node_id,))

    def wait_for_claims(self, cursor: Any, node_ids: list[str]) -> None:
        """Wait for the locks of :meth:`lock_node_shared`."""
        cursor.execute(
            f"SELECT node_id FROM nodes WHERE node_id IN ({mysql_driver.format_strings(node_ids)}) FOR UPDATE"
        )

    # Errors

    def classify(self, error: BaseException | None) -> ErrorKind:
        """Return the kind of an error. What is not known to be the state of the database is a refusal: limits have many
        numbers (1105, 1153, 1180, 1390, 3100 and more)."""
        if isinstance(error, pymysql.MySQLError):
            code = error.args[0] if error.args else None
            if code in LOST_CONNECTION_ERRORS:
                return ErrorKind.CONNECTION_LOST
            if code in RETRYABLE_ERRORS:
                return ErrorKind.RETRYABLE
            return ErrorKind.UNAVAILABLE if code in UNAVAILABLE_ERRORS else ErrorKind.REFUSED
        state = isinstance(error, ConfigError | RegistryError | OSError | RuntimeError | MemoryError | None)
        return ErrorKind.UNAVAILABLE if state else ErrorKind.REFUSED

    def explain(self, error: BaseException | None) -> str:
        """Describe an error in one line for the log: :func:`explain`."""
        return explain(self.server, error)

    def to_config_error(self, error: BaseException) -> ConfigError:
        """Describe an error that occurred while the registry was opened: :func:`to_config_error`."""
        return to_config_error(self.server, bool(self._password()), error)


@implementer(IRegistry)
class MySQLRegistry(SQLRegistry):
    """A registry in a database of MySQL or MariaDB.

    ``password`` is called for each connection. The other arguments are those of
    :class:`~gateway.registry.sql.SQLRegistry`.
    """

    def __init__(
        self,
        server: MySQLServer,
        *,
        password: Callable[[], bytes] = bytes,
        lease: float,
        reactor: Any,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        make_pool: Callable[..., Any] = adbapi.ConnectionPool,
        batch_delay: float = BATCH_DELAY,
        on_claim_revoked: OnClaimRevoked = ignore_claim_revoked,
        heartbeat: float | None = None,
        collect_floors: CollectFloors = no_floors,
    ) -> None:
        super().__init__(
            MySQL(server, password, lease),
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
