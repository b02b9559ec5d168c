"""The registry in MySQL or MariaDB: the one of a fleet of several machines.

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
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pymysql
from twisted.enterprise import adbapi
from zope.interface import implementer

from gateway.registry import migrations, mysql_driver
from gateway.registry.dialect import ClientRow
from gateway.registry.interface import IRegistry
from gateway.registry.lane import Turn
from gateway.registry.mysql_driver import Connection
from gateway.registry.mysql_errors import PASSING, explain, unusable
from gateway.registry.mysql_url import Server
from gateway.registry.sql import GATHER, SQLRegistry
from gateway.settings import ConfigError
from gateway.telemetry.metrics import Metrics

#: the oldest versions that keep what they are asked for
OLDEST_MYSQL, OLDEST_MARIADB = (8, 0), (10, 3)
#: seconds that a statement waits for somebody else's locks, and a node at its start for others that make the tables
LOCK_TIMEOUT, SCHEMA_TIMEOUT = 1, 3
#: seconds for which deadlocks, lost connections and the like are tried again: within those that a client waits
PATIENCE = 2.0
#: the most rows of a batch: benchmarks/registry.py
BATCH = 500

_COLUMNS = "client_id, node, generation, connected_at, address"


class MySQL:
    """What is special about MySQL and MariaDB. ``lease`` is in seconds."""

    begin = "START TRANSACTION"
    now = "UTC_TIMESTAMP(6)"
    locking = " FOR UPDATE"
    lanes: tuple[tuple[Turn, ...], ...] = (
        (Turn.HEARTBEAT,),
        (Turn.WRITES,),
        (Turn.WRITES,),
        (Turn.READS,),
        (Turn.CHORES,),
    )
    batch = BATCH
    patience: float | None = PATIENCE

    def __init__(self, server: Server, password: Callable[[], bytes], lease: float) -> None:
        self.server = server
        self._password = password
        # Before the others call this node dead, or soon after.
        self._idle = max(1, math.ceil(lease))

    def make(self) -> Connection:
        """A connection that is not connected yet. Raises ``ConfigError`` for files that cannot be used."""
        server = self.server
        tls: dict[str, Any] = {"ssl": server.tls.context()} if server.tls else {"ssl_disabled": True}
        return Connection(
            host=server.host,
            port=server.port,
            user=server.user,
            password=self._password(),
            database=server.database,
            **tls,
        )

    def pool(self, make: Callable[..., Any], reactor: Any) -> Any:
        """Make a pool of one connection."""
        latest: list[Connection] = []

        def connection() -> Connection:
            latest[:] = [self.make()]
            return latest[0]

        pool = make(mysql_driver.__name__, connection, cp_min=1, cp_max=1, cp_openfun=self.prepare, cp_reactor=reactor)
        connect, close = pool.connectionFactory, pool.finalClose

        def usable(pool: Any) -> Any:
            connection = connect(pool)
            if not connection.usable(self._idle / 2):
                connection.reconnect()
            return connection

        def break_off() -> None:
            # Else whoever ends waits for the thread, and that for a server that does not answer.
            for each in latest:
                each.interrupt()
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
                    f" wait_timeout = {self._idle}"
                )
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
                if not self._is_current(cursor):
                    self._migrate(connection, cursor)
        except BaseException:
            connection.close()
            raise

    def _is_current(self, cursor: Any) -> bool:
        try:
            cursor.execute("SELECT MAX(version) FROM schema_version")
        except pymysql.ProgrammingError:
            return False
        return bool(cursor.fetchone()[0] == migrations.steps("mysql")[-1][0])

    def _migrate(self, connection: Connection, cursor: Any) -> None:
        """Bring the schema up to date, while nobody else does: a server commits at each CREATE TABLE."""
        cursor.execute("SELECT GET_LOCK(CONCAT('wsgateway ', LEFT(MD5(DATABASE()), 32)), ?)", (SCHEMA_TIMEOUT,))
        if cursor.fetchone()[0] != 1:
            raise pymysql.OperationalError(1205, "another node brings the tables up to date; it is not done yet")
        migrations.apply(connection, "mysql", self.begin)
        cursor.execute("SELECT RELEASE_LOCK(CONCAT('wsgateway ', LEFT(MD5(DATABASE()), 32)))")

    def _check_version(self, text: str) -> None:
        maria = "mariadb" in text.lower()
        oldest = OLDEST_MARIADB if maria else OLDEST_MYSQL
        # MariaDB may call itself 5.5.5-10.11.2-MariaDB, for old replicas.
        numbers = text.removeprefix("5.5.5-").partition("-")[0].split(".")
        try:
            version = tuple(int(number) for number in numbers[:2])
        except ValueError:
            version = oldest
        if version < oldest:
            name = "MariaDB" if maria else "MySQL"
            wanted = ".".join(map(str, oldest))
            raise ConfigError("registry", f"{self.server} is {name} {text}; {wanted} or newer is needed")

    def check(self) -> None:
        """Connect in this thread, bring the schema up to date, and disconnect. Raises ``ConfigError``."""
        end = time.monotonic() + mysql_driver.CONNECT_TIMEOUT
        while True:
            try:
                connection = mysql_driver.connect(self.make)
                self.prepare(connection)
                connection.close()
                return
            except (pymysql.MySQLError, RuntimeError, OSError, ConfigError) as e:
                # Others may be making the tables.
                if (
                    not (isinstance(e, pymysql.MySQLError) and e.args[:1] in ((1205,), (1213,)))
                    or time.monotonic() > end
                ):
                    raise self.unusable(e) from None

    # What is said.

    def moment(self, microseconds: int) -> str:
        """A time as a parameter."""
        return mysql_driver.moment(microseconds)

    def lock_clients(self, cursor: Any, clients: Sequence[tuple[str, str]]) -> int:
        """Lock these rows, and put rows of node 0 where there are none."""
        rows = mysql_driver.rows([(client_id, 0, 0, 0, address) for client_id, address in clients])
        # What is there stays as it is, and does not count.
        count: int = cursor.execute(
            f"INSERT INTO clients ({_COLUMNS}) VALUES {rows} ON DUPLICATE KEY UPDATE client_id = clients.client_id"
        )
        return count

    def fill_clients(self, cursor: Any, client_ids: Sequence[str], node: int, now: int) -> None:
        """Make rows of node 0 those of a claim: at half the cost of :meth:`write_clients`."""
        cursor.execute(
            f"UPDATE clients FORCE INDEX (PRIMARY) SET node = {int(node)}, generation = {int(now)},"
            f" connected_at = '{self.moment(now)}' WHERE client_id IN ({mysql_driver.texts(client_ids)})"
        )

    def write_clients(self, cursor: Any, rows: Sequence[ClientRow]) -> None:
        """Write rows of ``clients``."""
        cursor.execute(
            f"INSERT INTO clients ({_COLUMNS}) VALUES {mysql_driver.rows(rows)} ON DUPLICATE KEY UPDATE"
            " node = VALUES(node), generation = VALUES(generation), connected_at = VALUES(connected_at),"
            " address = VALUES(address)"
        )

    def remove_clients(self, cursor: Any, rows: Sequence[tuple[str, int]]) -> None:
        """Remove rows of ``clients``; no row of another is looked at, nor waited for."""
        nodes = ",".join([str(int(node)) for node in {node for _, node in rows}])
        ids = mysql_driver.texts([client_id for client_id, _ in rows])
        cursor.execute(
            f"DELETE c FROM clients c FORCE INDEX (PRIMARY) WHERE c.client_id IN ({ids}) AND c.node IN ({nodes})"
        )

    def lock_placements(self, cursor: Any, client_ids: Sequence[str]) -> None:
        """Lock these rows, and put rows of node 0 where there are none."""
        rest = f",0,'{self.moment(0)}','{self.moment(0)}')"
        rows = ",".join([f"({mysql_driver.literal(client_id)}{rest}" for client_id in client_ids])
        cursor.execute(
            f"INSERT INTO placements (client_id, node, until, moved_at) VALUES {rows}"
            " ON DUPLICATE KEY UPDATE client_id = placements.client_id"
        )

    def write_placements(self, cursor: Any, client_ids: Sequence[str], node: int, until: int, now: int) -> None:
        """Write rows of ``placements``."""
        cursor.execute(
            f"UPDATE placements FORCE INDEX (PRIMARY) SET node = {int(node)}, until = '{self.moment(until)}',"
            f" moved_at = '{self.moment(now)}' WHERE client_id IN ({mysql_driver.texts(client_ids)})"
        )

    def remove_placements(self, cursor: Any, client_ids: Sequence[str], latest: int) -> None:
        """Remove rows of ``placements``; no other row is looked at, nor waited for."""
        cursor.execute(
            "DELETE p FROM placements p FORCE INDEX (PRIMARY)"
            f" WHERE p.client_id IN ({mysql_driver.texts(client_ids)}) AND p.moved_at <= '{self.moment(latest)}'"
        )

    def hold_node(self, cursor: Any, node_id: str) -> None:
        """Lock the entry of this node in the index of node_ids, which is all that this reads: a heartbeat changes the
        row, not that; whoever removes the row waits."""
        cursor.execute("SELECT node_id FROM nodes WHERE node_id = ? LOCK IN SHARE MODE", (node_id,))

    def await_claims(self, cursor: Any, node_ids: list[str]) -> None:
        """Wait for the locks of :meth:`hold_node`."""
        cursor.execute(f"SELECT node_id FROM nodes WHERE node_id IN ({mysql_driver.texts(node_ids)}) FOR UPDATE")

    # What is answered.

    def retryable(self, error: BaseException | None) -> bool:
        """Whether an error may be gone at the next try."""
        return isinstance(error, pymysql.MySQLError) and bool(error.args) and error.args[0] in PASSING

    def explain(self, error: BaseException | None) -> str:
        """One line for a log, or an empty text for what is no error of the database or of the way to it."""
        return explain(self.server, error)

    def unusable(self, error: BaseException) -> ConfigError:
        """What to tell of an error that came when the registry was opened."""
        return unusable(self.server, bool(self._password()), error)


@implementer(IRegistry)
class MySQLRegistry(SQLRegistry):
    """A registry in a database of MySQL or MariaDB.

    ``password`` is asked for each connection. Everything else is as for :class:`~gateway.registry.sql.SQLRegistry`.
    """

    def __init__(
        self,
        server: Server,
        *,
        password: Callable[[], bytes] = bytes,
        lease: float,
        reactor: Any,
        metrics: Metrics,
        monotonic: Callable[[], float] = time.monotonic,
        make_pool: Callable[..., Any] = adbapi.ConnectionPool,
        gather: float = GATHER,
    ) -> None:
        super().__init__(
            MySQL(server, password, lease),
            lease=lease,
            reactor=reactor,
            metrics=metrics,
            monotonic=monotonic,
            make_pool=make_pool,
            gather=gather,
        )
