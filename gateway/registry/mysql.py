"""The URL of a database: ``mysql://user@host:3306/database?ssl_ca=…&ssl_cert=…&ssl_key=…&ssl_verify=…``

A part with other characters than a URL has is percent-encoded; an IPv6 address stands in square brackets. The password
is never part of it.

With any ``ssl_`` parameter the connection is by TLS, and never without: ``ssl_ca`` is a file of the authorities that
are trusted (those of the system if it is not given), ``ssl_cert`` and ``ssl_key`` are this node's own certificate and
its key, and ``ssl_verify=false`` takes any certificate.

What the errors of MySQL and MariaDB mean.

The registry in MySQL or MariaDB: the one of a fleet of several machines.

Five connections, each with a thread: one for heartbeats, two for claims and releases (the database works on a batch
while the node makes another), one for look-ups, one for chores; so that none waits for another kind.

A batch of claims and releases is one transaction, in READ COMMITTED, its rows sorted by client_id:

    INSERT … ON DUPLICATE KEY UPDATE client_id = client_id     locks each row, or puts one of node 0 in its place
    SELECT … FROM clients, SELECT … FROM nodes                 whose they are, whether they live, and what time it is
    DELETE, INSERT … ON DUPLICATE KEY UPDATE                   what comes of it

A statement that waits for an answer for longer than a few seconds fails. A server that sees nothing of a connection for
a lease ends it, and with it the transaction of a node that stands still: its locks would keep others from its clients.
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
from gateway.registry import migrations, mysql_driver
from gateway.registry.dialect import ClientRow
from gateway.registry.interface import IRegistry, OnClaimRevoked, ignore_claim_revoked
from gateway.registry.job_queue import Priority
from gateway.registry.mysql_driver import RECONNECT_ERRORS, Connection
from gateway.registry.sql import BATCH_DELAY, SQLRegistry
from gateway.settings import ConfigError

DEFAULT_PORT = 3306
URL_HINT = "write mysql://user@host:3306/database"
TLS_PARAMETERS = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_verify")


@attrs.frozen
class TLSOptions:
    """How a connection is encrypted. Texts are paths; an empty one is none."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    verify: bool = True

    def make_context(self) -> ssl.SSLContext:
        """A context for one connection, of what is in the files now. Raises ``ConfigError``."""
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ssl.SSLError) as e:
            raise _tls_file_error("ssl_ca", self.ca, e) from None
        # Servers make certificates for themselves that are no strict X.509; Python 3.13 would refuse them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert:
            try:
                # Without a password: it would be asked for on the terminal.
                context.load_cert_chain(self.cert, self.key or None, password="")
            except (OSError, ssl.SSLError) as e:
                raise _tls_file_error("ssl_cert", f"{self.cert} with ssl_key={self.key or self.cert}", e) from None
        return context


@attrs.frozen
class MySQLServer:
    """A database, and how it is reached."""

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
    """Read a URL. Raises ``ConfigError``, whose text never shows the password that somebody wrote in it."""
    try:
        parts = urlsplit(url)
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError as e:
        raise ConfigError("registry", f"no URL ({e}); {URL_HINT}") from None
    if parts.password is not None:
        raise ConfigError(
            "registry",
            "a password in the URL would be seen by whoever lists processes; put it in a file and name that with "
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
        raise ConfigError("registry", f"{url!r} will not do; {URL_HINT}")
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


#: Errors that may be gone at the next try: somebody else's locks (1205, 1213), a connection that is lost or cannot be
#: made (0: it was closed), too many of them, and those of a server that goes away or is read-only.
RETRYABLE_ERRORS = frozenset({0, 1040, 1205, 1213, 1317, 2003, 2006, 2013, 2055, 4031}) | RECONNECT_ERRORS


def explain(server: MySQLServer, error: BaseException | None) -> str:
    """One line for a log, or an empty text for what is no error of the database or of the way to it."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, pymysql.MySQLError | OSError):
        return f"{server}: {_error_message(error)}"
    return ""


def to_config_error(server: MySQLServer, has_password: bool, error: BaseException) -> ConfigError:
    """What to tell of an error that came when the registry was opened, in one line."""
    if isinstance(error, ConfigError):
        text = str(error).removeprefix("--registry: ")
        # Some know of the server, some of the URL.
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
    """What the database said, in one line and without its number."""
    said = error.args[1] if isinstance(error, pymysql.MySQLError) and len(error.args) > 1 else str(error)
    return " ".join(str(said).split()) or "the connection was closed"


#: the oldest versions that keep what they are asked for
MIN_MYSQL_VERSION, MIN_MARIADB_VERSION = (8, 0), (10, 3)
#: seconds that a statement waits for somebody else's locks, and a node at its start for others that make the tables
LOCK_TIMEOUT, SCHEMA_TIMEOUT = 1, 3
#: seconds for which deadlocks, lost connections and the like are tried again: within those that a client waits
RETRY_TIMEOUT = 2.0
#: the most rows of a batch: benchmarks/registry.py
MAX_BATCH_SIZE = 500

_COLUMNS = "client_id, node, generation, connected_at, address"


class MySQL:
    """What is special about MySQL and MariaDB. ``lease`` is in seconds."""

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
        # Before the others call this node dead, or soon after.
        self._idle_timeout = max(1, math.ceil(lease))

    def make_connection(self) -> Connection:
        """A connection that is not connected yet. Raises ``ConfigError`` for files that cannot be used."""
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
        """Make a pool of one connection."""
        latest: list[Connection] = []

        def connection() -> Connection:
            latest[:] = [self.make_connection()]
            return latest[0]

        pool = pool_factory(
            mysql_driver.__name__, connection, cp_min=1, cp_max=1, cp_openfun=self.prepare, cp_reactor=reactor
        )
        connect, close = pool.connectionFactory, pool.finalClose

        def usable(pool: Any) -> Any:
            connection = connect(pool)
            if not connection.is_usable(self._idle_timeout / 2):
                connection.reconnect()
            return connection

        def break_off() -> None:
            # Else whoever ends waits for the thread, and that for a server that does not answer.
            for each in latest:
                each.abort()
            if pool.finalClose is break_off:
                pool.finalClose = lambda: None
                close()

        pool.connectionFactory, pool.finalClose = usable, break_off
        return pool

    def prepare(self, connection: Connection) -> None:
        """Make a new connection ready: whatever the server's defaults are, the session has what is needed."""
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
            cursor.execute("SELECT MAX(version) FROM schema_version")
        except pymysql.ProgrammingError:
            return False
        return bool(cursor.fetchone()[0] == migrations.load_migrations("mysql")[-1][0])

    def _migrate(self, connection: Connection, cursor: Any) -> None:
        """Bring the schema up to date, while nobody else does: a server commits at each CREATE TABLE."""
        cursor.execute("SELECT GET_LOCK(CONCAT('wsgateway ', LEFT(MD5(DATABASE()), 32)), ?)", (SCHEMA_TIMEOUT,))
        if cursor.fetchone()[0] != 1:
            raise pymysql.OperationalError(1205, "another node brings the tables up to date; it is not done yet")
        migrations.apply(connection, "mysql", self.begin_statement)
        cursor.execute("SELECT RELEASE_LOCK(CONCAT('wsgateway ', LEFT(MD5(DATABASE()), 32)))")

    def _check_version(self, server_version: str) -> None:
        maria = "mariadb" in server_version.lower()
        oldest = MIN_MARIADB_VERSION if maria else MIN_MYSQL_VERSION
        # MariaDB may call itself 5.5.5-10.11.2-MariaDB, for old replicas.
        numbers = server_version.removeprefix("5.5.5-").partition("-")[0].split(".")
        try:
            version = tuple(int(number) for number in numbers[:2])
        except ValueError:
            version = oldest
        if version < oldest:
            name = "MariaDB" if maria else "MySQL"
            wanted = ".".join(map(str, oldest))
            raise ConfigError("registry", f"{self.server} is {name} {server_version}; {wanted} or newer is needed")

    def check(self) -> None:
        """Connect in this thread, bring the schema up to date, and disconnect. Raises ``ConfigError``."""
        end = time.monotonic() + mysql_driver.CONNECT_TIMEOUT
        while True:
            try:
                connection = mysql_driver.connect(self.make_connection)
                self.prepare(connection)
                connection.close()
                return
            except (pymysql.MySQLError, RuntimeError, OSError, ConfigError) as e:
                # Others may be making the tables.
                if (
                    not (isinstance(e, pymysql.MySQLError) and e.args[:1] in ((1205,), (1213,)))
                    or time.monotonic() > end
                ):
                    raise self.to_config_error(e) from None

    # What is said.

    def to_timestamp(self, microseconds: int) -> str:
        """A time as a parameter."""
        return mysql_driver.format_datetime(microseconds)

    def lock_clients(self, cursor: Any, clients: Sequence[tuple[str, str]]) -> int:
        """Lock these rows, and put rows of node 0 where there are none."""
        rows = mysql_driver.format_client_rows([(client_id, 0, 0, 0, address) for client_id, address in clients])
        # What is there stays as it is, and does not count.
        count: int = cursor.execute(
            f"INSERT INTO clients ({_COLUMNS}) VALUES {rows} ON DUPLICATE KEY UPDATE client_id = clients.client_id"
        )
        return count

    def fill_clients(self, cursor: Any, client_ids: Sequence[str], node: int, now: int) -> None:
        """Make rows of node 0 those of a claim: at half the cost of :meth:`write_clients`."""
        cursor.execute(
            f"UPDATE clients FORCE INDEX (PRIMARY) SET node = {int(node)}, generation = {int(now)},"
            f" connected_at = '{self.to_timestamp(now)}' WHERE client_id IN ({mysql_driver.format_strings(client_ids)})"
        )

    def write_clients(self, cursor: Any, rows: Sequence[ClientRow]) -> None:
        """Write rows of ``clients``."""
        cursor.execute(
            f"INSERT INTO clients ({_COLUMNS}) VALUES {mysql_driver.format_client_rows(rows)} ON DUPLICATE KEY UPDATE"
            " node = VALUES(node), generation = VALUES(generation), connected_at = VALUES(connected_at),"
            " address = VALUES(address)"
        )

    def remove_clients(self, cursor: Any, rows: Sequence[tuple[str, int]]) -> None:
        """Remove rows of ``clients``; no row of another is looked at, nor waited for."""
        nodes = ",".join([str(int(node)) for node in {node for _, node in rows}])
        ids = mysql_driver.format_strings([client_id for client_id, _ in rows])
        cursor.execute(
            f"DELETE c FROM clients c FORCE INDEX (PRIMARY) WHERE c.client_id IN ({ids}) AND c.node IN ({nodes})"
        )

    def lock_assignments(self, cursor: Any, client_ids: Sequence[str]) -> None:
        """Lock these rows, and put rows of node 0 where there are none."""
        rest = f",0,'{self.to_timestamp(0)}','{self.to_timestamp(0)}')"
        rows = ",".join([f"({mysql_driver.literal(client_id)}{rest}" for client_id in client_ids])
        cursor.execute(
            f"INSERT INTO placements (client_id, node, until, moved_at) VALUES {rows}"
            " ON DUPLICATE KEY UPDATE client_id = placements.client_id"
        )

    def write_assignments(self, cursor: Any, client_ids: Sequence[str], node: int, expires_at: int, now: int) -> None:
        """Write rows of ``placements``."""
        cursor.execute(
            f"UPDATE placements FORCE INDEX (PRIMARY) SET node = {int(node)}, until = '{self.to_timestamp(expires_at)}',"
            f" moved_at = '{self.to_timestamp(now)}' WHERE client_id IN ({mysql_driver.format_strings(client_ids)})"
        )

    def remove_assignments(self, cursor: Any, client_ids: Sequence[str], moved_by: int) -> None:
        """Remove rows of ``placements``; no other row is looked at, nor waited for."""
        cursor.execute(
            "DELETE p FROM placements p FORCE INDEX (PRIMARY)"
            f" WHERE p.client_id IN ({mysql_driver.format_strings(client_ids)}) AND p.moved_at <= '{self.to_timestamp(moved_by)}'"
        )

    def lock_node_shared(self, cursor: Any, node_id: str) -> None:
        """Lock the entry of this node in the index of node_ids, which is all that this reads: a heartbeat changes the
        row, not that; whoever removes the row waits."""
        cursor.execute("SELECT node_id FROM nodes WHERE node_id = ? LOCK IN SHARE MODE", (node_id,))

    def wait_for_claims(self, cursor: Any, node_ids: list[str]) -> None:
        """Wait for the locks of :meth:`hold_node`."""
        cursor.execute(
            f"SELECT node_id FROM nodes WHERE node_id IN ({mysql_driver.format_strings(node_ids)}) FOR UPDATE"
        )

    # What is answered.

    def retryable(self, error: BaseException | None) -> bool:
        """Whether an error may be gone at the next try."""
        return isinstance(error, pymysql.MySQLError) and bool(error.args) and error.args[0] in RETRYABLE_ERRORS

    def explain(self, error: BaseException | None) -> str:
        """One line for a log, or an empty text for what is no error of the database or of the way to it."""
        return explain(self.server, error)

    def to_config_error(self, error: BaseException) -> ConfigError:
        """What to tell of an error that came when the registry was opened."""
        return to_config_error(self.server, bool(self._password()), error)


@implementer(IRegistry)
class MySQLRegistry(SQLRegistry):
    """A registry in a database of MySQL or MariaDB.

    ``password`` is asked for each connection. Everything else is as for :class:`~gateway.registry.sql.SQLRegistry`.
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
        )
