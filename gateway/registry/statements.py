"""Rows of the tables, read: who has a client, and who that is.

Placements: where clients are to be that were told to move to another node. Each is one row, by its client's key.

    place     lock the rows, look which of these clients may be moved, write those         one transaction
    claim     read those of the batch's clients                                            while there are other nodes
    tidy      remove those that are over, from one piece of the table at a time

A placement counts until its time is over, and nobody is moved again until it has rested: ``moved_at`` in the row is the
judge of that, whichever node asks.

A batch of claims and releases, written in one transaction.

What is said to the database, in threads: each function is given a DB-API connection and blocks.

Every cursor is closed before its function ends, come what may: one that lived on would be freed in the reactor's
thread, which then waits for the connection, and that may be waiting for somebody's lock.

Times are microseconds since 1970 by the database's clock, which alone decides whether a lease holds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from typing import Any

import attrs

from gateway.registry.claims import ClaimRequest, Outcome, Owner, ReleaseRequest, Resolution, Row, resolve
from gateway.registry.dialect import Dialect
from gateway.registry.interface import Assignment, Location, NodeInfo, NodeStatus
from gateway.registry.migrations import transaction

#: the longest client_id, and a text behind every one
MAX_CLIENT_ID_LENGTH = 128
CLIENT_ID_UPPER_BOUND = "\x7f" * (MAX_CLIENT_ID_LENGTH + 1)


@attrs.frozen
class LocalNode:
    """This node, once it has joined."""

    info: NodeInfo
    #: its ``id`` in the table ``nodes``
    number: int
    started_at: int


def placeholders(values: Collection[object]) -> str:
    """What is written in the brackets of ``IN``."""
    return ",".join("?" * len(values))


def padded_placeholders(keys: list[str]) -> tuple[str, list[str]]:
    """What is written in the brackets of ``IN``, and the values for it: the last key fills them up to a power of two,
    since a database keeps each text of a statement, with its plan."""
    size = 1 << (len(keys) - 1).bit_length() if keys else 0
    filled = [*keys, *keys[-1:] * (size - len(keys))]
    return placeholders(filled), filled


def read_client_rows(cursor: Any, client_ids: list[str]) -> dict[str, Row]:
    """The rows of clients, by client_id. A row of node 0 is none."""
    places, values = padded_placeholders(client_ids)
    cursor.execute(
        "SELECT client_id, node, generation, connected_at, address FROM clients"
        f" WHERE client_id IN ({places}) AND node > 0",
        values,
    )
    return {
        client_id: Row(node, generation, connected_at, address)
        for client_id, node, generation, connected_at, address in cursor.fetchall()
    }


def read_owners(cursor: Any, dialect: Dialect, lease: int, numbers: set[int]) -> tuple[int, dict[int, Owner]]:
    """The clock, and nodes by number, of which those are left out that have left. ``lease`` is in microseconds. The
    clock is 0 when there is none of these nodes."""
    cursor.execute(
        f"SELECT {dialect.now_expression}, heartbeat_at, id, node_id, name, peer_url, public_url, state, clients < capacity"
        f" FROM nodes WHERE id IN ({placeholders(numbers)})",
        sorted(numbers),
    )
    now, owners = 0, {}
    for now, heartbeat, number, node_id, name, peer_url, public_url, state, room in cursor.fetchall():
        if heartbeat:
            owners[number] = Owner(node_id, name, peer_url, public_url, state, heartbeat > now - lease, bool(room))
    return now, owners


#: how long a placement counts, and how long after a move a client is not moved again, in microseconds
ASSIGNMENT_TTL, MIGRATION_COOLDOWN = 120_000_000, 600_000_000
#: rows that one statement walks
MAX_SCANNED_ROWS = 5000
#: the most rows that one statement removes
MAX_REMOVED_ROWS = 500


def assign(
    cursor: Any, dialect: Dialect, lease: int, client_ids: Sequence[str], node_id: str, *, binding: bool
) -> list[str]:
    """Place clients on a node, and return those that are: none that was moved a short time ago, and none at all if that
    node is gone, or takes no clients. ``client_ids`` are sorted; ``lease`` is in microseconds. Without ``binding`` it
    is only written down that they were moved."""
    cursor.execute("SELECT id FROM nodes WHERE node_id = ?", (node_id,))
    found = cursor.fetchone()
    if found is None:
        return []
    number = int(found[0])
    dialect.lock_assignments(cursor, client_ids)
    # Only now, when all that is to be waited for has been waited for.
    now, owners = read_owners(cursor, dialect, lease, {number})
    places, values = padded_placeholders(list(client_ids))
    cursor.execute(
        f"SELECT client_id FROM placements WHERE client_id IN ({places}) AND moved_at > ?",
        [*values, dialect.to_timestamp(now - MIGRATION_COOLDOWN)],
    )
    resting = {client_id for (client_id,) in cursor.fetchall()}
    placed = [client_id for client_id in client_ids if client_id not in resting]
    if number not in owners or not owners[number].accepts_clients:
        placed = []
    if placed:
        dialect.write_assignments(cursor, placed, number, now + ASSIGNMENT_TTL if binding else now, now)
    return placed


def read_assignments(cursor: Any, client_ids: list[str]) -> dict[str, tuple[int, int]]:
    """Where clients are placed: the number of the node, and until when."""
    places, values = padded_placeholders(client_ids)
    cursor.execute(
        f"SELECT client_id, node, until FROM placements WHERE client_id IN ({places}) AND node > 0",
        values,
    )
    return {client_id: (node, until) for client_id, node, until in cursor.fetchall()}


def find_assignments(cursor: Any, dialect: Dialect, lease: int, client_ids: list[str]) -> dict[str, Owner]:
    """The nodes that clients are placed on, where that counts: a node that is live, and takes clients."""
    rows = read_assignments(cursor, client_ids)
    if not rows:
        return {}
    now, owners = read_owners(cursor, dialect, lease, {number for number, _ in rows.values()})
    return {
        client_id: owners[number]
        for client_id, (number, until) in rows.items()
        if until > now and number in owners and owners[number].accepts_clients
    }


def purge_assignments(cursor: Any, dialect: Dialect, first: str) -> str | None:
    """Remove what is over from one piece of the table, which begins at ``first``. Returns where the next one begins, or
    ``None`` at the end of the table."""
    cursor.execute(
        "SELECT client_id FROM placements WHERE client_id >= ? ORDER BY client_id LIMIT 1 OFFSET ?",
        (first, MAX_SCANNED_ROWS),
    )
    row = cursor.fetchone()
    following = row[0] if row else None
    cursor.execute(f"SELECT {dialect.now_expression}")
    now: int = cursor.fetchone()[0]
    over = (dialect.to_timestamp(now - MIGRATION_COOLDOWN), dialect.to_timestamp(now))
    # Without locks, so that nobody waits for what stays.
    cursor.execute(
        "SELECT client_id FROM placements WHERE client_id >= ? AND client_id < ? AND moved_at <= ? AND until <= ?"
        " ORDER BY client_id LIMIT ?",
        (first, following or CLIENT_ID_UPPER_BOUND, *over, MAX_REMOVED_ROWS),
    )
    found = [client_id for (client_id,) in cursor.fetchall()]
    if found:
        dialect.remove_assignments(cursor, found, now - MIGRATION_COOLDOWN)
    return found[-1] if len(found) == MAX_REMOVED_ROWS else following


#: a client_id and a generation
MaybeWritten = list[tuple[str, int]]


def write_batch(
    cursor: Any,
    dialect: Dialect,
    lease: int,
    local_node: LocalNode,
    batch: list[ClaimRequest | ReleaseRequest],
    maybe_written: MaybeWritten,
) -> list[Outcome]:
    """Write a batch; see :func:`~gateway.registry.claims.settle`. ``lease`` is in microseconds.

    ``tried`` takes each claim that may be in even if this, or the commit after it, raises. Those that it has already
    are of an earlier try: what is in of them, and is not what this one comes to, is removed.
    """
    addresses = {each.client_id: each.address if isinstance(each, ClaimRequest) else "" for each in batch}
    clients = sorted(addresses.items())
    placed = dialect.lock_clients(cursor, clients)
    rows = {} if placed == len(clients) else read_client_rows(cursor, [client_id for client_id, _ in clients])
    wanted = sorted({each.client_id for each in batch if isinstance(each, ClaimRequest) and each.honor_assignment})
    placements = read_assignments(cursor, wanted) if wanted else {}
    # Only now, when all that is to be waited for has been waited for: a claim's generation is its time.
    dialect.lock_node_shared(cursor, local_node.info.node_id)
    numbers = {row.node for row in rows.values()} | {number for number, _ in placements.values()}
    now, owners = read_owners(cursor, dialect, lease, {local_node.number, *numbers})
    own = owners.pop(local_node.number, None)
    leased = own is not None and own.live and own.node_id == local_node.info.node_id
    valid = {client_id: number for client_id, (number, until) in placements.items() if until > now}
    settled = resolve(batch, rows, local_node.number, now, leased, owners, valid)
    gone = {client_id: row.node for client_id, row in settled.removed.items()}
    if maybe_written:
        gone |= _orphaned_claims(rows, local_node.number, settled, maybe_written)
    if placed:
        gone |= dict.fromkeys(addresses.keys() - rows.keys() - settled.written.keys(), 0)
    if gone:
        dialect.remove_clients(cursor, sorted(gone.items()))
    if settled.written:
        _write_claims(cursor, dialect, local_node.number, now, settled.written, {} if placed == 0 else addresses, rows)
    # A reclaim that is in although it failed is right: the connection is there.
    reclaims = {each.client_id: each.generation for each in batch if isinstance(each, ClaimRequest) and each.generation}
    maybe_written += [
        (client_id, row.generation)
        for client_id, row in settled.written.items()
        if reclaims.get(client_id) != row.generation
    ]
    return settled.outcomes


def _orphaned_claims(
    rows: dict[str, Row], node: int, resolution: Resolution, maybe_written: MaybeWritten
) -> dict[str, int]:
    """Claims of an earlier try that are in, and that nobody will know of."""
    known = set(maybe_written)
    return {
        client_id: row.node
        for client_id, row in rows.items()
        if row.node == node and (client_id, row.generation) in known and client_id not in resolution.written
    }


def _write_claims(
    cursor: Any,
    dialect: Dialect,
    node: int,
    now: int,
    written: dict[str, Row],
    addresses: dict[str, str],
    rows: dict[str, Row],
) -> None:
    """Write rows, in the order of their ids: then two nodes never wait for each other. ``addresses`` are those that
    rows have that were put where none of ``rows`` was."""
    if not addresses:
        dialect.write_clients(cursor, [(client_id, *row) for client_id, row in written.items()])
        return
    fresh, others = [], []
    for client_id, row in written.items():
        if client_id not in rows and row == (node, now, now, addresses[client_id]):
            fresh.append(client_id)
        else:
            others.append((client_id, *row))
    if fresh:
        dialect.fill_clients(cursor, fresh, node, now)
    if others:
        dialect.write_clients(cursor, others)


#: what a Location is made of
_LOCATION_COLUMNS = (
    "c.client_id, n.node_id, n.name, n.peer_url, c.generation, c.connected_at, c.address, n.public_url, n.state"
)


class Statements:
    """The statements of one registry."""

    def __init__(self, dialect: Dialect, lease: float) -> None:
        self._dialect = dialect
        self._lease = round(lease * 1e6)

    def _read_clock(self, cursor: Any) -> int:
        cursor.execute(f"SELECT {self._dialect.now_expression}")
        now: int = cursor.fetchone()[0]
        return now

    def join(self, connection: Any, info: NodeInfo) -> LocalNode:
        """Insert this node's row."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            now = self._read_clock(cursor)
            number = self._insert_node(cursor, LocalNode(info, 0, now), None, "up", 0, now)
            return LocalNode(info, number, now)

    def _insert_node(
        self, cursor: Any, local_node: LocalNode, number: int | None, state: str, clients: int, now: int
    ) -> int:
        info, moment = local_node.info, self._dialect.to_timestamp
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
                moment(local_node.started_at),
                moment(now),
            ),
        )
        return number or int(cursor.lastrowid)

    def heartbeat(
        self, connection: Any, local_node: LocalNode, state: str, clients: int, lease_lost: list[bool] | None = None
    ) -> tuple[bool, LocalNode]:
        """Renew the lease. ``False`` when it had run out, or the row was gone: clients may have been taken.

        ``lost`` takes something in that case, also if this raises, for it may be renewed all the same; what is in it
        already counts as well.
        """
        lease_lost = [] if lease_lost is None else lease_lost
        with transaction(connection, self._dialect.begin_statement) as cursor:
            # By its number alone: the index of node_ids is what claims lock.
            cursor.execute(
                f"SELECT {self._dialect.now_expression}, heartbeat_at, node_id FROM nodes WHERE id = ?{self._dialect.lock_clause}",
                (local_node.number,),
            )
            row = cursor.fetchone()
            there = row is not None and row[2] == local_node.info.node_id
            now = row[0] if row else self._read_clock(cursor)
            if not there or row[1] <= now - self._lease:
                lease_lost.append(True)
            if there:
                cursor.execute(
                    "UPDATE nodes SET state = ?, clients = ?, heartbeat_at = ? WHERE id = ?",
                    (state, clients, self._dialect.to_timestamp(now), local_node.number),
                )
                return not lease_lost, local_node
            # With its old number, so that rows of its clients that are still there are its own again.
            number = None if row else local_node.number
            return False, attrs.evolve(
                local_node, number=self._insert_node(cursor, local_node, number, state, clients, now)
            )

    def write_batch(
        self,
        connection: Any,
        local_node: LocalNode,
        batch: list[ClaimRequest | ReleaseRequest],
        maybe_written: list[tuple[str, int]],
    ) -> list[Outcome]:
        """Write a batch of claims and releases: :func:`~gateway.registry.statements.write`."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            return write_batch(cursor, self._dialect, self._lease, local_node, batch, maybe_written)

    def find(self, connection: Any, client_ids: list[str]) -> dict[str, Location]:
        """Where clients are; one that is nowhere, or whose node has left, is left out."""
        with closing(connection.cursor()) as cursor:
            rows = read_client_rows(cursor, client_ids)
            if not rows:
                return {}
            _, owners = read_owners(cursor, self._dialect, self._lease, {row.node for row in rows.values()})
            return {
                client_id: owners[row.node].location(client_id, row)
                for client_id, row in rows.items()
                if row.node in owners
            }

    def assign(self, connection: Any, client_ids: list[str], node_id: str, binding: bool) -> list[str]:
        """Place clients, sorted, on a node: :func:`~gateway.registry.statements.place`."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            return assign(cursor, self._dialect, self._lease, client_ids, node_id, binding=binding)

    def assignments(self, connection: Any, client_ids: list[str]) -> dict[str, Assignment]:
        """The nodes that clients are placed on; one that is placed nowhere, or where it does not count, is left out."""
        with closing(connection.cursor()) as cursor:
            found = find_assignments(cursor, self._dialect, self._lease, client_ids)
            return {client_id: owner.assignment() for client_id, owner in found.items()}

    def purge_assignments(self, connection: Any, first: str) -> str | None:
        """Remove placements that are over: :func:`~gateway.registry.statements.tidy`."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            return purge_assignments(cursor, self._dialect, first)

    def clients(
        self, connection: Any, first: str, end: str, limit: int, node_id: str | None
    ) -> tuple[list[Location], str | None]:
        """Up to ``limit`` clients of ``first`` <= client_id < ``end``, in order, out of one piece of the table; and
        where the next piece begins, or ``None``."""
        with closing(connection.cursor()) as cursor:
            oldest = self._dialect.to_timestamp(self._read_clock(cursor) - self._lease)
            following = self._end_of_scan(cursor, first, end)
            node = "" if node_id is None else " AND n.node_id = ?"
            cursor.execute(
                f"SELECT {_LOCATION_COLUMNS} FROM clients c JOIN nodes n ON n.id = c.node"
                f" WHERE c.client_id >= ? AND c.client_id < ? AND n.heartbeat_at > ?{node}"
                " ORDER BY c.client_id LIMIT ?",
                (first, following or end, oldest, *([] if node_id is None else [node_id]), limit),
            )
            return [_location(row) for row in cursor.fetchall()], following

    def _end_of_scan(self, cursor: Any, first: str, end: str) -> str | None:
        cursor.execute(
            "SELECT client_id FROM clients WHERE client_id >= ? AND client_id < ? ORDER BY client_id LIMIT 1 OFFSET ?",
            (first, end, MAX_SCANNED_ROWS),
        )
        row = cursor.fetchone()
        return row[0] if row else None

    def nodes(self, connection: Any) -> list[NodeStatus]:
        """The live nodes, in the order in which they joined."""
        with closing(connection.cursor()) as cursor:
            now = self._read_clock(cursor)
            cursor.execute(
                "SELECT node_id, name, public_url, peer_url, clients, capacity, state, heartbeat_at FROM nodes"
                " WHERE heartbeat_at > ? ORDER BY id",
                (self._dialect.to_timestamp(now - self._lease),),
            )
            return [_status(row, now) for row in cursor.fetchall()]

    def expire_lease(self, connection: Any, local_node: LocalNode) -> None:
        """End this node's lease: from now on its rows count for nothing, and there will be no more of them."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            cursor.execute(
                "UPDATE nodes SET heartbeat_at = ? WHERE id = ? AND node_id = ?",
                (self._dialect.to_timestamp(0), local_node.number, local_node.info.node_id),
            )
            self._dialect.wait_for_claims(cursor, [local_node.info.node_id])

    def remove_own_clients(self, connection: Any, local_node: LocalNode, first: str) -> str | None:
        """Remove this node's rows of one piece of the table that begins at ``first``. Returns where the next piece
        begins, or, when this node's own row is gone as well, ``None``."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            _, following = self._remove_clients(cursor, [local_node.number], first, MAX_REMOVED_ROWS)
            if following is None:
                cursor.execute(
                    "DELETE FROM nodes WHERE id = ? AND node_id = ?", (local_node.number, local_node.info.node_id)
                )
            return following

    def _remove_clients(self, cursor: Any, numbers: list[int], first: str, limit: int) -> tuple[int, str | None]:
        """Remove up to ``limit`` rows of these nodes from one piece of the table. Returns how many, and where to go on,
        or ``None`` at the end of the table."""
        following = self._end_of_scan(cursor, first, CLIENT_ID_UPPER_BOUND)
        # Without locks, so that nobody's claim waits for what is not removed.
        cursor.execute(
            "SELECT client_id, node FROM clients WHERE client_id >= ? AND client_id < ?"
            f" AND node IN ({placeholders(numbers)}) ORDER BY client_id LIMIT ?",
            (first, following or CLIENT_ID_UPPER_BOUND, *numbers, limit),
        )
        found = cursor.fetchall()
        if found:
            self._dialect.remove_clients(cursor, found)
        return len(found), found[-1][0] if len(found) == limit else following

    def dead_nodes(self, connection: Any, local_node: LocalNode | None) -> dict[int, int]:
        """The nodes whose leases ran out, except this one: number -> heartbeat_at."""
        with closing(connection.cursor()) as cursor:
            cursor.execute(
                "SELECT id, node_id, heartbeat_at FROM nodes WHERE heartbeat_at <= ? ORDER BY id LIMIT 100",
                (self._dialect.to_timestamp(self._read_clock(cursor) - self._lease),),
            )
            found = [row for row in cursor.fetchall() if local_node is None or row[0] != local_node.number]
        if found:
            # Of claims that began while the lease held. Whoever begins later finds that it does not.
            with transaction(connection, self._dialect.begin_statement) as cursor:
                self._dialect.wait_for_claims(cursor, [node_id for _, node_id, _ in found])
        return {number: heartbeat for number, _, heartbeat in found}

    def reap(self, connection: Any, dead_nodes: dict[int, int], first: str, limit: int) -> tuple[int, str | None]:
        """Remove up to ``limit`` rows of dead nodes from one piece of the table that begins at ``first``.

        ``dead`` is as :meth:`dead` gave it when its walk through the table began; a node that has heartbeaten since is
        spared. Returns how many rows were removed and where to go on, or, when the walk has come to its end and those
        nodes' own rows are gone as well, ``None``.
        """
        with transaction(connection, self._dialect.begin_statement) as cursor:
            # Locked: whoever heartbeats now, and claims again, finds it done.
            cursor.execute(
                f"SELECT id, heartbeat_at FROM nodes WHERE id IN ({placeholders(list(dead_nodes))}) ORDER BY id"
                f"{self._dialect.lock_clause}",
                list(dead_nodes),
            )
            still = [number for number, heartbeat in cursor.fetchall() if dead_nodes[number] == heartbeat]
            if not still:
                return 0, None
            count, following = self._remove_clients(cursor, still, first, min(limit, MAX_REMOVED_ROWS))
            if following is None:
                # None of them has claimed since the walk began, for a claim needs a lease.
                cursor.execute(f"DELETE FROM nodes WHERE id IN ({placeholders(still)})", still)
            return count, following


def _location(row: Sequence[Any]) -> Location:
    client_id, node_id, name, peer_url, generation, connected_at, address, public_url, state = row
    at = connected_at / 1e6
    return Location(client_id, node_id, name, peer_url, generation, at, address, True, public_url, state)


def _status(row: tuple[Any, ...], now: int) -> NodeStatus:
    node_id, name, public_url, peer_url, clients, capacity, state, heartbeat_at = row
    age = max(0.0, (now - heartbeat_at) / 1e6)
    return NodeStatus(node_id, name, public_url, peer_url, clients, capacity, state, age)
