"""What is said to the database, in threads: each function is given a DB-API connection and blocks.

Every cursor is closed before its function ends, come what may: one that lived on would be freed in the reactor's
thread, which then waits for the connection, and that may be waiting for somebody's lock.

Times are microseconds since 1970 by the database's clock, which alone decides whether a lease holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, Protocol

import attrs

from gateway.registry.batches import Outcome, Release, Request, Row, settle
from gateway.registry.interface import Location, NodeInfo, NodeStatus
from gateway.registry.migrations import transaction

#: how many rows of the table ``clients`` one statement walks
PIECE = 5000
#: behind every client_id
TOP = "\U0010ffff"

#: the columns of a Location, in its order
_LOCATION = "c.client_id, n.node_id, n.name, n.peer_url, c.generation, c.connected_at, c.address"


class Dialect(Protocol):
    """What differs between databases, as far as statements go. Their parameters are written ``?``."""

    #: begins a transaction that may write
    begin: str
    #: selects the clock
    now: str
    #: writes a row of ``clients``, whether or not it is there: client_id, node, generation, connected_at, address
    write_client: str


@attrs.frozen
class Me:
    """This node, once it has joined."""

    info: NodeInfo
    #: its ``id`` in the table ``nodes``
    number: int
    started_at: int


class Statements:
    """The statements of one registry."""

    def __init__(self, dialect: Dialect, lease: float) -> None:
        self._dialect = dialect
        self._lease = round(lease * 1e6)

    def _now(self, cursor: Any) -> int:
        cursor.execute(self._dialect.now)
        now: int = cursor.fetchone()[0]
        return now

    def join(self, connection: Any, info: NodeInfo) -> Me:
        """Insert this node's row."""
        with transaction(connection, self._dialect.begin) as cursor:
            now = self._now(cursor)
            cursor.execute("DELETE FROM nodes WHERE node_id = ?", (info.node_id,))
            number = self._insert(cursor, Me(info, 0, now), None, "up", 0, now)
            return Me(info, number, now)

    def _insert(self, cursor: Any, me: Me, number: int | None, state: str, clients: int, now: int) -> int:
        info = me.info
        cursor.execute(
            "INSERT INTO nodes (id, node_id, name, public_url, peer_url, state, clients, capacity, started_at,"
            " heartbeat_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                info.node_id,
                info.name,
                info.public_url,
                info.peer_url,
                state,
                clients,
                info.capacity,
                me.started_at,
                now,
            ),
        )
        return number or int(cursor.lastrowid)

    def heartbeat(self, connection: Any, me: Me, state: str, clients: int) -> tuple[bool, Me]:
        """Renew the lease. ``False`` when it had run out, or the row was gone: clients may have been taken."""
        with transaction(connection, self._dialect.begin) as cursor:
            now = self._now(cursor)
            held = self._holds_lease(cursor, me, now)
            cursor.execute(
                "UPDATE nodes SET state = ?, clients = ?, heartbeat_at = ? WHERE id = ? AND node_id = ?",
                (state, clients, now, me.number, me.info.node_id),
            )
            if cursor.rowcount == 0:
                # With its old number, so that rows of its clients that are still there are its own again.
                cursor.execute("SELECT 1 FROM nodes WHERE id = ?", (me.number,))
                number = None if cursor.fetchone() else me.number
                me = attrs.evolve(me, number=self._insert(cursor, me, number, state, clients, now))
            return held, me

    def _holds_lease(self, cursor: Any, me: Me, now: int) -> bool:
        cursor.execute("SELECT heartbeat_at FROM nodes WHERE id = ? AND node_id = ?", (me.number, me.info.node_id))
        row = cursor.fetchone()
        return row is not None and row[0] > now - self._lease

    def write(
        self, connection: Any, me: Me, batch: list[Request | Release], tried: list[tuple[str, int]]
    ) -> list[Outcome]:
        """Write a batch of claims and releases; see :func:`~gateway.registry.batches.settle`.

        ``tried`` takes the client_id and generation of each claim that may be in even if this raises.
        """
        with transaction(connection, self._dialect.begin) as cursor:
            now = self._now(cursor)
            lease = self._holds_lease(cursor, me, now)
            keys = sorted({each.client_id for each in batch})
            marks, values = _any_of(keys)
            cursor.execute(
                f"SELECT client_id, node, generation, connected_at, address FROM clients WHERE client_id IN ({marks})",
                values,
            )
            rows = {client_id: Row(*rest) for client_id, *rest in cursor.fetchall()}
            settled = settle(batch, rows, me.number, now, lease)
            # Rows go in sorted by client_id: then two nodes never wait for each other.
            if settled.removed:
                cursor.executemany(
                    "DELETE FROM clients WHERE client_id = ? AND node = ? AND generation = ?",
                    [(client_id, row.node, row.generation) for client_id, row in settled.removed.items()],
                )
            if settled.written:
                cursor.executemany(
                    self._dialect.write_client,
                    [
                        (client_id, row.node, row.generation, row.connected_at, row.address)
                        for client_id, row in settled.written.items()
                    ],
                )
            tried += [(client_id, row.generation) for client_id, row in settled.written.items()]
        return settled.outcomes

    def find(self, connection: Any, client_ids: list[str]) -> dict[str, Location]:
        """Where clients are; one that is nowhere, or whose node has left, is left out."""
        with closing(connection.cursor()) as cursor:
            oldest = self._now(cursor) - self._lease
            marks, values = _any_of(client_ids)
            cursor.execute(
                f"SELECT n.heartbeat_at > ?, {_LOCATION} FROM clients c JOIN nodes n ON n.id = c.node"
                f" WHERE c.client_id IN ({marks}) AND n.heartbeat_at > 0",
                (oldest, *values),
            )
            return {row[0]: _location(row, bool(live)) for live, *row in cursor.fetchall()}

    def clients(
        self, connection: Any, first: str, end: str, limit: int, node_id: str | None
    ) -> tuple[list[Location], str | None]:
        """Up to ``limit`` clients of ``first`` <= client_id < ``end``, in order, out of one piece of the table; and
        where the next piece begins, or ``None``."""
        with closing(connection.cursor()) as cursor:
            oldest = self._now(cursor) - self._lease
            following = self._end_of_piece(cursor, first, end)
            node = "" if node_id is None else " AND n.node_id = ?"
            cursor.execute(
                f"SELECT {_LOCATION} FROM clients c JOIN nodes n ON n.id = c.node"
                f" WHERE c.client_id >= ? AND c.client_id < ? AND n.heartbeat_at > ?{node}"
                " ORDER BY c.client_id LIMIT ?",
                (first, following or end, oldest, *([] if node_id is None else [node_id]), limit),
            )
            return [_location(row) for row in cursor.fetchall()], following

    def _end_of_piece(self, cursor: Any, first: str, end: str) -> str | None:
        cursor.execute(
            "SELECT client_id FROM clients WHERE client_id >= ? AND client_id < ? ORDER BY client_id LIMIT 1 OFFSET ?",
            (first, end, PIECE),
        )
        row = cursor.fetchone()
        return row[0] if row else None

    def nodes(self, connection: Any) -> list[NodeStatus]:
        """The live nodes, in the order in which they joined."""
        with closing(connection.cursor()) as cursor:
            now = self._now(cursor)
            cursor.execute(
                "SELECT node_id, name, public_url, peer_url, clients, capacity, state, heartbeat_at FROM nodes"
                " WHERE heartbeat_at > ? ORDER BY id",
                (now - self._lease,),
            )
            return [_status(row, now) for row in cursor.fetchall()]

    def retire(self, connection: Any, me: Me) -> None:
        """End this node's lease: from now on its rows count for nothing."""
        with transaction(connection, self._dialect.begin) as cursor:
            cursor.execute(
                "UPDATE nodes SET heartbeat_at = 0 WHERE id = ? AND node_id = ?", (me.number, me.info.node_id)
            )

    def empty(self, connection: Any, me: Me, first: str) -> str | None:
        """Remove this node's rows of one piece of the table that begins at ``first``. Returns where the next piece
        begins, or, when this node's own row is gone as well, ``None``."""
        with transaction(connection, self._dialect.begin) as cursor:
            following = self._end_of_piece(cursor, first, TOP)
            cursor.execute(
                "DELETE FROM clients WHERE client_id >= ? AND client_id < ? AND node = ?",
                (first, following or TOP, me.number),
            )
            if following is None:
                cursor.execute("DELETE FROM nodes WHERE id = ? AND node_id = ?", (me.number, me.info.node_id))
            return following

    def dead(self, connection: Any, me: Me | None) -> dict[int, int]:
        """The nodes whose leases ran out, except this one: number -> heartbeat_at."""
        with closing(connection.cursor()) as cursor:
            cursor.execute(
                "SELECT id, heartbeat_at FROM nodes WHERE heartbeat_at <= ? ORDER BY id LIMIT 100",
                (self._now(cursor) - self._lease,),
            )
            return {number: heartbeat for number, heartbeat in cursor.fetchall() if me is None or number != me.number}

    def reap(self, connection: Any, dead: dict[int, int], first: str, limit: int) -> tuple[int, str | None]:
        """Remove up to ``limit`` rows of dead nodes from one piece of the table that begins at ``first``.

        ``dead`` is as :meth:`dead` gave it when its walk through the table began; a node that has heartbeaten since is
        spared. Returns how many rows were removed and where to go on, or, when the walk has come to its end and those
        nodes' own rows are gone as well, ``None``.
        """
        with transaction(connection, self._dialect.begin) as cursor:
            cursor.execute(f"SELECT id, heartbeat_at FROM nodes WHERE id IN ({_marks(list(dead))})", list(dead))
            still = [number for number, heartbeat in cursor.fetchall() if dead[number] == heartbeat]
            if not still:
                return 0, None
            following = self._end_of_piece(cursor, first, TOP)
            cursor.execute(
                "SELECT client_id, node FROM clients WHERE client_id >= ? AND client_id < ?"
                f" AND node IN ({_marks(still)}) ORDER BY client_id LIMIT ?",
                (first, following or TOP, *still, limit),
            )
            found = cursor.fetchall()
            cursor.executemany("DELETE FROM clients WHERE client_id = ? AND node = ?", found)
            if len(found) == limit:
                return limit, found[-1][0]
            if following is None:
                # None of them has claimed since the walk began, for a claim needs a lease.
                cursor.execute(f"DELETE FROM nodes WHERE id IN ({_marks(still)})", still)
            return len(found), following


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _any_of(keys: list[str]) -> tuple[str, list[str]]:
    """What is written in the brackets of ``IN``, and the values for it: the last key fills them up to a power of two,
    since a database keeps each text of a statement, with its plan."""
    size = 1 << (len(keys) - 1).bit_length() if keys else 0
    filled = [*keys, *keys[-1:] * (size - len(keys))]
    return _marks(filled), filled


def _location(row: Sequence[Any], live: bool = True) -> Location:
    client_id, node_id, name, peer_url, generation, connected_at, address = row
    return Location(client_id, node_id, name, peer_url, generation, connected_at / 1e6, address, live)


def _status(row: tuple[Any, ...], now: int) -> NodeStatus:
    node_id, name, public_url, peer_url, clients, capacity, state, heartbeat_at = row
    age = max(0.0, (now - heartbeat_at) / 1e6)
    return NodeStatus(node_id, name, public_url, peer_url, clients, capacity, state, age)
