"""What is said to the database, in threads: each function is given a DB-API connection and blocks.

Every cursor is closed before its function ends, come what may: one that lived on would be freed in the reactor's
thread, which then waits for the connection, and that may be waiting for somebody's lock.

Times are microseconds since 1970 by the database's clock, which alone decides whether a lease holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import attrs

from gateway.registry import placements, writes
from gateway.registry.dialect import Dialect
from gateway.registry.interface import Location, NodeInfo, NodeStatus, Place
from gateway.registry.migrations import transaction
from gateway.registry.rows import TOP, Me, marks, read_owners, read_rows
from gateway.registry.settling import Outcome, Release, Request

#: how many rows of the table ``clients`` one statement walks
PIECE = 5000
#: the most rows that one statement removes
CHUNK = 500
#: what a Location is made of
_LOCATION = "c.client_id, n.node_id, n.name, n.peer_url, c.generation, c.connected_at, c.address, n.public_url, n.state"


class Statements:
    """The statements of one registry."""

    def __init__(self, dialect: Dialect, lease: float) -> None:
        self._dialect = dialect
        self._lease = round(lease * 1e6)

    def _now(self, cursor: Any) -> int:
        cursor.execute(f"SELECT {self._dialect.now}")
        now: int = cursor.fetchone()[0]
        return now

    def join(self, connection: Any, info: NodeInfo) -> Me:
        """Insert this node's row."""
        with transaction(connection, self._dialect.begin) as cursor:
            now = self._now(cursor)
            number = self._insert(cursor, Me(info, 0, now), None, "up", 0, now)
            return Me(info, number, now)

    def _insert(self, cursor: Any, me: Me, number: int | None, state: str, clients: int, now: int) -> int:
        info, moment = me.info, self._dialect.moment
        cursor.execute("DELETE FROM nodes WHERE node_id = ?", (info.node_id,))
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
                moment(me.started_at),
                moment(now),
            ),
        )
        return number or int(cursor.lastrowid)

    def heartbeat(
        self, connection: Any, me: Me, state: str, clients: int, lost: list[bool] | None = None
    ) -> tuple[bool, Me]:
        """Renew the lease. ``False`` when it had run out, or the row was gone: clients may have been taken.

        ``lost`` takes something in that case, also if this raises, for it may be renewed all the same; what is in it
        already counts as well.
        """
        lost = [] if lost is None else lost
        with transaction(connection, self._dialect.begin) as cursor:
            # By its number alone: the index of node_ids is what claims lock.
            cursor.execute(
                f"SELECT {self._dialect.now}, heartbeat_at, node_id FROM nodes WHERE id = ?{self._dialect.locking}",
                (me.number,),
            )
            row = cursor.fetchone()
            there = row is not None and row[2] == me.info.node_id
            now = row[0] if row else self._now(cursor)
            if not there or row[1] <= now - self._lease:
                lost.append(True)
            if there:
                cursor.execute(
                    "UPDATE nodes SET state = ?, clients = ?, heartbeat_at = ? WHERE id = ?",
                    (state, clients, self._dialect.moment(now), me.number),
                )
                return not lost, me
            # With its old number, so that rows of its clients that are still there are its own again.
            number = None if row else me.number
            return False, attrs.evolve(me, number=self._insert(cursor, me, number, state, clients, now))

    def write(
        self, connection: Any, me: Me, batch: list[Request | Release], tried: list[tuple[str, int]]
    ) -> list[Outcome]:
        """Write a batch of claims and releases: :func:`~gateway.registry.writes.write`."""
        with transaction(connection, self._dialect.begin) as cursor:
            return writes.write(cursor, self._dialect, self._lease, me, batch, tried)

    def find(self, connection: Any, client_ids: list[str]) -> dict[str, Location]:
        """Where clients are; one that is nowhere, or whose node has left, is left out."""
        with closing(connection.cursor()) as cursor:
            rows = read_rows(cursor, client_ids)
            if not rows:
                return {}
            _, owners = read_owners(cursor, self._dialect, self._lease, {row.node for row in rows.values()})
            return {
                client_id: owners[row.node].location(client_id, row)
                for client_id, row in rows.items()
                if row.node in owners
            }

    def place(self, connection: Any, client_ids: list[str], node_id: str, binding: bool) -> list[str]:
        """Place clients, sorted, on a node: :func:`~gateway.registry.placements.place`."""
        with transaction(connection, self._dialect.begin) as cursor:
            return placements.place(cursor, self._dialect, self._lease, client_ids, node_id, binding=binding)

    def placed(self, connection: Any, client_ids: list[str]) -> dict[str, Place]:
        """The nodes that clients are placed on; one that is placed nowhere, or where it does not count, is left out."""
        with closing(connection.cursor()) as cursor:
            found = placements.find(cursor, self._dialect, self._lease, client_ids)
            return {client_id: owner.place() for client_id, owner in found.items()}

    def tidy(self, connection: Any, first: str) -> str | None:
        """Remove placements that are over: :func:`~gateway.registry.placements.tidy`."""
        with transaction(connection, self._dialect.begin) as cursor:
            return placements.tidy(cursor, self._dialect, first)

    def clients(
        self, connection: Any, first: str, end: str, limit: int, node_id: str | None
    ) -> tuple[list[Location], str | None]:
        """Up to ``limit`` clients of ``first`` <= client_id < ``end``, in order, out of one piece of the table; and
        where the next piece begins, or ``None``."""
        with closing(connection.cursor()) as cursor:
            oldest = self._dialect.moment(self._now(cursor) - self._lease)
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
                (self._dialect.moment(now - self._lease),),
            )
            return [_status(row, now) for row in cursor.fetchall()]

    def retire(self, connection: Any, me: Me) -> None:
        """End this node's lease: from now on its rows count for nothing, and there will be no more of them."""
        with transaction(connection, self._dialect.begin) as cursor:
            cursor.execute(
                "UPDATE nodes SET heartbeat_at = ? WHERE id = ? AND node_id = ?",
                (self._dialect.moment(0), me.number, me.info.node_id),
            )
            self._dialect.await_claims(cursor, [me.info.node_id])

    def empty(self, connection: Any, me: Me, first: str) -> str | None:
        """Remove this node's rows of one piece of the table that begins at ``first``. Returns where the next piece
        begins, or, when this node's own row is gone as well, ``None``."""
        with transaction(connection, self._dialect.begin) as cursor:
            _, following = self._remove(cursor, [me.number], first, CHUNK)
            if following is None:
                cursor.execute("DELETE FROM nodes WHERE id = ? AND node_id = ?", (me.number, me.info.node_id))
            return following

    def _remove(self, cursor: Any, numbers: list[int], first: str, limit: int) -> tuple[int, str | None]:
        """Remove up to ``limit`` rows of these nodes from one piece of the table. Returns how many, and where to go on,
        or ``None`` at the end of the table."""
        following = self._end_of_piece(cursor, first, TOP)
        # Without locks, so that nobody's claim waits for what is not removed.
        cursor.execute(
            "SELECT client_id, node FROM clients WHERE client_id >= ? AND client_id < ?"
            f" AND node IN ({marks(numbers)}) ORDER BY client_id LIMIT ?",
            (first, following or TOP, *numbers, limit),
        )
        found = cursor.fetchall()
        if found:
            self._dialect.remove_clients(cursor, found)
        return len(found), found[-1][0] if len(found) == limit else following

    def dead(self, connection: Any, me: Me | None) -> dict[int, int]:
        """The nodes whose leases ran out, except this one: number -> heartbeat_at."""
        with closing(connection.cursor()) as cursor:
            cursor.execute(
                "SELECT id, node_id, heartbeat_at FROM nodes WHERE heartbeat_at <= ? ORDER BY id LIMIT 100",
                (self._dialect.moment(self._now(cursor) - self._lease),),
            )
            found = [row for row in cursor.fetchall() if me is None or row[0] != me.number]
        if found:
            # Of claims that began while the lease held. Whoever begins later finds that it does not.
            with transaction(connection, self._dialect.begin) as cursor:
                self._dialect.await_claims(cursor, [node_id for _, node_id, _ in found])
        return {number: heartbeat for number, _, heartbeat in found}

    def reap(self, connection: Any, dead: dict[int, int], first: str, limit: int) -> tuple[int, str | None]:
        """Remove up to ``limit`` rows of dead nodes from one piece of the table that begins at ``first``.

        ``dead`` is as :meth:`dead` gave it when its walk through the table began; a node that has heartbeaten since is
        spared. Returns how many rows were removed and where to go on, or, when the walk has come to its end and those
        nodes' own rows are gone as well, ``None``.
        """
        with transaction(connection, self._dialect.begin) as cursor:
            # Locked: whoever heartbeats now, and claims again, finds it done.
            cursor.execute(
                f"SELECT id, heartbeat_at FROM nodes WHERE id IN ({marks(list(dead))}) ORDER BY id"
                f"{self._dialect.locking}",
                list(dead),
            )
            still = [number for number, heartbeat in cursor.fetchall() if dead[number] == heartbeat]
            if not still:
                return 0, None
            count, following = self._remove(cursor, still, first, min(limit, CHUNK))
            if following is None:
                # None of them has claimed since the walk began, for a claim needs a lease.
                cursor.execute(f"DELETE FROM nodes WHERE id IN ({marks(still)})", still)
            return count, following


def _location(row: Sequence[Any]) -> Location:
    client_id, node_id, name, peer_url, generation, connected_at, address, public_url, state = row
    at = connected_at / 1e6
    return Location(client_id, node_id, name, peer_url, generation, at, address, True, public_url, state)


def _status(row: tuple[Any, ...], now: int) -> NodeStatus:
    node_id, name, public_url, peer_url, clients, capacity, state, heartbeat_at = row
    age = max(0.0, (now - heartbeat_at) / 1e6)
    return NodeStatus(node_id, name, public_url, peer_url, clients, capacity, state, age)
