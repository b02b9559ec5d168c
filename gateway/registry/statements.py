"""The SQL statements of the registry. Each function blocks and runs in a thread, with a DB-API connection or cursor.

A batch of claims and releases is read, resolved and written in one transaction.

Assignments (the table ``placements``) say which node a migrated client should connect to, in one row for each client:

    assign                lock the rows, select the clients that may be moved, write those: one transaction
    claim                 read the assignments of the batch's clients, if the policy honors them
    purge_assignments     remove expired rows, one segment of the table at a time

An assignment is valid until it expires. ``moved_at`` in its row keeps every node from moving the client again before
:data:`MIGRATION_COOLDOWN` is over.

Every cursor is closed before its function returns or raises: otherwise it would be freed in the reactor's thread, which
would wait for the connection, which may be waiting for a lock.

Times are microseconds since 1970 by the database's clock, which alone decides whether a lease is valid.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import attrs

from gateway.registry.claims import ClaimRequest, Outcome, Owner, ReleaseRequest, Resolution, Row, resolve
from gateway.registry.clock import DatabaseClock, UnobservedClock
from gateway.registry.dialect import Dialect
from gateway.registry.generations import TOLERANCE, GenerationFloor
from gateway.registry.interface import Assignment, Location, NodeInfo, NodeStatus, SessionKey
from gateway.registry.schema_versions import transaction

#: characters
MAX_CLIENT_ID_LENGTH = 128
#: sorts behind every client_id
CLIENT_ID_UPPER_BOUND = "\x7f" * (MAX_CLIENT_ID_LENGTH + 1)
#: microseconds for which an assignment is valid
ASSIGNMENT_TTL = 120_000_000
#: microseconds for which a client is not moved again
MIGRATION_COOLDOWN = 600_000_000
#: rows that one statement scans: the size of a segment of a table
MAX_SCANNED_ROWS = 5000
#: rows that one statement removes, at most
MAX_REMOVED_ROWS = 500
#: dead nodes whose rows are removed in one scan, at most
MAX_DEAD_NODES = 100

#: the columns of a Location
_LOCATION_COLUMNS = (
    "c.client_id, n.node_id, n.name, n.peer_url, c.generation, c.connected_at, c.address, n.public_url, n.state"
)

MaybeWritten = list[SessionKey]


@attrs.frozen
class LocalNode:
    """This node, after it has joined."""

    info: NodeInfo
    #: its ``id`` in the table ``nodes``
    number: int
    started_at: int
    #: the last heartbeat that this node has written
    heartbeat_at: int = 0


class HeartbeatResult(NamedTuple):
    """What a heartbeat has found."""

    #: whether the lease was valid, so that no other node can have claimed clients of this one
    lease_held: bool
    #: whether this node's row was gone, or older than what was written last: the database has lost commits
    lost_commits: bool
    #: the database's clock, in microseconds since 1970
    now: int


def placeholders(values: Collection[object]) -> str:
    """Return the parameters of ``IN (…)`` for these values."""
    return ",".join("?" * len(values))


def padded_placeholders(keys: list[str]) -> tuple[str, list[str]]:
    """Return the parameters of ``IN (…)``, and their values, padded with the last key to a power of two: the database
    caches each distinct statement with its plan."""
    size = 1 << (len(keys) - 1).bit_length() if keys else 0
    padded = [*keys, *keys[-1:] * (size - len(keys))]
    return placeholders(padded), padded


def read_client_rows(cursor: Any, client_ids: list[str]) -> dict[str, Row]:
    """Read the rows of clients, by client_id, without placeholder rows (node 0)."""
    parameters, values = padded_placeholders(client_ids)
    cursor.execute(
        "SELECT client_id, node, generation, connected_at, address FROM clients"
        f" WHERE client_id IN ({parameters}) AND node > 0",
        values,
    )
    return {
        client_id: Row(node, generation, connected_at, address)
        for client_id, node, generation, connected_at, address in cursor.fetchall()
    }


class Owners(NamedTuple):
    """Nodes by number, without those that have left; the time at which they were read, and the highest generation that
    any node has told, are 0 if none of them has a row."""

    by_number: dict[int, Owner]
    now: int
    max_generation: int


def read_owners(cursor: Any, dialect: Dialect, clock: DatabaseClock, numbers: set[int]) -> Owners:
    """Read the clock and nodes. ``clock`` judges their leases."""
    cursor.execute(
        f"SELECT {dialect.now_expression}, (SELECT MAX(max_generation) FROM nodes), heartbeat_at, id, node_id, name,"
        f" peer_url, public_url, state, clients < capacity FROM nodes WHERE id IN ({placeholders(numbers)})",
        sorted(numbers),
    )
    owners, now, max_generation = {}, 0, 0
    for row in cursor.fetchall():
        now, max_generation, heartbeat, number, node_id, name, peer_url, public_url, state, room = row
        if heartbeat:
            live = clock.is_live(heartbeat, now)
            owners[number] = Owner(node_id, name, peer_url, public_url, state, live, bool(room), heartbeat)
    return Owners(owners, now, max_generation or 0)


def assign(
    cursor: Any, dialect: Dialect, clock: DatabaseClock, client_ids: Sequence[str], node_id: str, *, binding: bool
) -> list[str]:
    """Assign clients to a node, and return those that were assigned.

    Clients that were moved within :data:`MIGRATION_COOLDOWN` are left out; all are, if the node is gone or does not
    accept clients. ``client_ids`` are sorted. Without ``binding`` the clients are only marked as moved.
    """
    cursor.execute("SELECT id FROM nodes WHERE node_id = ?", (node_id,))
    row = cursor.fetchone()
    if row is None:
        return []
    number = int(row[0])
    dialect.lock_assignments(cursor, client_ids)
    # The clock is read after the wait for locks.
    owners, now, _ = read_owners(cursor, dialect, clock, {number})
    parameters, values = padded_placeholders(list(client_ids))
    cursor.execute(
        f"SELECT client_id FROM placements WHERE client_id IN ({parameters}) AND moved_at > ? AND moved_at <= ?",
        # Not in the future, where a clock that was set back leaves it.
        [*values, dialect.to_timestamp(now - MIGRATION_COOLDOWN), dialect.to_timestamp(now)],
    )
    moved_recently = {client_id for (client_id,) in cursor.fetchall()}
    assigned = [client_id for client_id in client_ids if client_id not in moved_recently]
    if number not in owners or not owners[number].accepts_clients:
        assigned = []
    if assigned:
        dialect.write_assignments(cursor, assigned, number, now + ASSIGNMENT_TTL if binding else now, now)
    return assigned


def read_assignments(cursor: Any, client_ids: list[str]) -> dict[str, tuple[int, int]]:
    """Read the assignments of clients, valid or not: the number of the node, and the time of expiry."""
    parameters, values = padded_placeholders(client_ids)
    cursor.execute(
        f"SELECT client_id, node, until FROM placements WHERE client_id IN ({parameters}) AND node > 0",
        values,
    )
    return {client_id: (node, expires_at) for client_id, node, expires_at in cursor.fetchall()}


def find_assignments(cursor: Any, dialect: Dialect, clock: DatabaseClock, client_ids: list[str]) -> dict[str, Owner]:
    """Find the nodes that clients are assigned to, where the assignment is valid and the node accepts clients."""
    rows = read_assignments(cursor, client_ids)
    if not rows:
        return {}
    owners, now, _ = read_owners(cursor, dialect, clock, {number for number, _ in rows.values()})
    return {
        client_id: owners[number]
        for client_id, (number, expires_at) in rows.items()
        if is_assignment_valid(expires_at, now) and number in owners and owners[number].accepts_clients
    }


def read_max_generation(cursor: Any) -> int:
    """Read the highest generation that any node has told."""
    cursor.execute("SELECT MAX(max_generation) FROM nodes")
    return cursor.fetchone()[0] or 0


def is_assignment_valid(expires_at: int, now: int) -> bool:
    """Whether an assignment has not expired. One that expires too late was written before the clock was set back."""
    return now < expires_at <= now + ASSIGNMENT_TTL


def purge_assignments(cursor: Any, dialect: Dialect, first: str, limit: int) -> str | None:
    """Remove up to ``limit`` expired assignments from the segment of the table that begins at ``first``. Returns where
    to continue, or ``None`` at the end of the table."""
    cursor.execute(
        "SELECT client_id FROM placements WHERE client_id >= ? ORDER BY client_id LIMIT 1 OFFSET ?",
        (first, MAX_SCANNED_ROWS),
    )
    row = cursor.fetchone()
    following = row[0] if row else None
    cursor.execute(f"SELECT {dialect.now_expression}")
    now: int = cursor.fetchone()[0]
    limits = (dialect.to_timestamp(now - MIGRATION_COOLDOWN), dialect.to_timestamp(now))
    # Without locks, so that no transaction waits for rows that stay.
    cursor.execute(
        "SELECT client_id FROM placements WHERE client_id >= ? AND client_id < ? AND moved_at <= ? AND until <= ?"
        " ORDER BY client_id LIMIT ?",
        (first, following or CLIENT_ID_UPPER_BOUND, *limits, limit),
    )
    expired = [client_id for (client_id,) in cursor.fetchall()]
    if expired:
        dialect.remove_assignments(cursor, expired, now - MIGRATION_COOLDOWN)
    return expired[-1] if len(expired) == limit else following


def write_batch(
    cursor: Any,
    dialect: Dialect,
    clock: DatabaseClock,
    floor: GenerationFloor,
    local_node: LocalNode,
    batch: list[ClaimRequest | ReleaseRequest],
    maybe_written: MaybeWritten,
) -> list[Outcome]:
    """Write a batch, as :func:`~gateway.registry.claims.resolve` decides. ``clock`` judges leases; new generations are
    higher than ``floor``, which they raise.

    Appends to ``maybe_written`` each claim that may be written even if this, or the commit after it, raises. The claims
    that it already has are of an earlier try of the same batch: their rows are removed unless this try writes them too.
    """
    addresses = {request.client_id: request.address if isinstance(request, ClaimRequest) else "" for request in batch}
    clients = sorted(addresses.items())
    inserted = dialect.lock_clients(cursor, clients)
    rows = {} if inserted == len(clients) else read_client_rows(cursor, [client_id for client_id, _ in clients])
    claims = [request for request in batch if isinstance(request, ClaimRequest)]
    assignable = sorted({request.client_id for request in claims if request.policy.honor_assignment})
    assignments = read_assignments(cursor, assignable) if assignable else {}
    # The clock is read after the wait for locks: the generation of a claim is its time.
    dialect.lock_node_shared(cursor, local_node.info.node_id)
    numbers = {row.node for row in rows.values()} | {number for number, _ in assignments.values()}
    sent_at = clock.seconds()
    owners, now, max_generation = read_owners(cursor, dialect, clock, {local_node.number, *numbers})
    own = owners.pop(local_node.number, None)
    # A row that is older than what this node wrote last is that of a database that has lost commits.
    lease_valid = (
        own is not None
        and own.live
        and own.node_id == local_node.info.node_id
        and own.heartbeat_at >= local_node.heartbeat_at
    )
    valid = {
        client_id: number
        for client_id, (number, expires_at) in assignments.items()
        if is_assignment_valid(expires_at, now)
    }
    horizon = clock.horizon(now, sent_at)
    floor.raise_to(max(horizon, max_generation))
    is_behind = floor.is_ahead_of(now, 0 if horizon else TOLERANCE)
    resolution = resolve(
        batch, rows, local_node.number, now, lease_valid, owners, valid, floor.value if is_behind else 0
    )
    highest = max((row.generation for row in resolution.written.values()), default=0)
    (floor.give if is_behind and highest else floor.raise_to)(highest)
    if resolution.written and (is_behind or clock.was_set(now)):
        # The other nodes need not know what the clock has said.
        cursor.execute("UPDATE nodes SET max_generation = ? WHERE id = ?", (floor.value, local_node.number))
    removed = {client_id: row.node for client_id, row in resolution.removed.items()}
    if maybe_written:
        removed |= _orphaned_claims(rows, local_node.number, resolution, maybe_written)
    if inserted:
        removed |= dict.fromkeys(addresses.keys() - rows.keys() - resolution.written.keys(), 0)
    if removed:
        dialect.remove_clients(cursor, sorted(removed.items()))
    if resolution.written:
        placeholder_addresses = addresses if inserted else {}
        _write_claims(cursor, dialect, local_node.number, now, resolution.written, placeholder_addresses, rows)
    # A reclaim that is written although the batch failed is right: the client is still connected.
    reclaims = {request.client_id: request.generation for request in claims if request.generation}
    maybe_written += [
        SessionKey(client_id, row.generation)
        for client_id, row in resolution.written.items()
        if reclaims.get(client_id) != row.generation
    ]
    return resolution.outcomes


def _orphaned_claims(
    rows: dict[str, Row], node: int, resolution: Resolution, maybe_written: MaybeWritten
) -> dict[str, int]:
    """Return the rows (client_id -> node) that an earlier try has written, and that this one does not overwrite."""
    earlier = set(maybe_written)
    return {
        client_id: row.node
        for client_id, row in rows.items()
        if row.node == node and (client_id, row.generation) in earlier and client_id not in resolution.written
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
    """Write rows in the order of their ids, so that two nodes never deadlock.

    ``addresses`` are those in the placeholder rows, which were inserted for clients that are not in ``rows``.
    """
    if not addresses:
        dialect.write_clients(cursor, [(client_id, *row) for client_id, row in written.items()])
        return
    placeholder_ids, others = [], []
    for client_id, row in written.items():
        if client_id not in rows and row == (node, now, now, addresses[client_id]):
            placeholder_ids.append(client_id)
        else:
            others.append((client_id, *row))
    if placeholder_ids:
        dialect.fill_clients(cursor, placeholder_ids, node, now)
    if others:
        dialect.write_clients(cursor, others)


class Statements:
    """The statements of one registry. ``lease`` is in seconds. By default the clock and the generations are judged by
    what each transaction reads."""

    def __init__(
        self,
        dialect: Dialect,
        lease: float,
        clock: DatabaseClock | None = None,
        floor: GenerationFloor | None = None,
    ) -> None:
        self._dialect = dialect
        self._lease = round(lease * 1e6)
        self._clock = clock or UnobservedClock(lease)
        self._floor = floor or GenerationFloor()

    def _read_clock(self, cursor: Any) -> int:
        cursor.execute(f"SELECT {self._dialect.now_expression}")
        now: int = cursor.fetchone()[0]
        return now

    def join(self, connection: Any, info: NodeInfo) -> LocalNode:
        """Insert this node's row."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            now = self._read_clock(cursor)
            number = self._insert_node(cursor, LocalNode(info, 0, now), None, "up", 0, now)
            self._floor.raise_to(read_max_generation(cursor))
            # This node has given none yet, so that any difference is one of the clock.
            self._floor.is_ahead_of(now, tolerance=0)
            return LocalNode(info, number, now, now)

    def _insert_node(
        self, cursor: Any, local_node: LocalNode, number: int | None, state: str, clients: int, now: int
    ) -> int:
        info, to_timestamp = local_node.info, self._dialect.to_timestamp
        cursor.execute("DELETE FROM nodes WHERE node_id = ?", (info.node_id,))
        self._expire_predecessors(cursor, info)
        cursor.execute(
            "INSERT INTO nodes (id, node_id, name, public_url, peer_url, state, clients, capacity, started_at,"
            " heartbeat_at, version, max_generation) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                info.node_id,
                info.name,
                info.public_url,
                info.peer_url,
                state,
                clients,
                info.capacity,
                to_timestamp(local_node.started_at),
                to_timestamp(now),
                info.version,
                self._floor.value,
            ),
        )
        return number or int(cursor.lastrowid)

    def _expire_predecessors(self, cursor: Any, info: NodeInfo) -> None:
        """End the leases of nodes that had this node's peer URL: this node listens there now, so they are gone.

        One that lives, because of a wrong configuration, renews its lease at its next heartbeat.
        """
        # Read first: an update would wait for the locks of rows that do not match.
        cursor.execute(
            "SELECT id FROM nodes WHERE peer_url = ? AND peer_url <> '' AND node_id <> ? ORDER BY id",
            (info.peer_url, info.node_id),
        )
        numbers = [number for (number,) in cursor.fetchall()]
        if numbers:
            cursor.execute(
                f"UPDATE nodes SET heartbeat_at = ? WHERE id IN ({placeholders(numbers)})",
                (self._dialect.to_timestamp(0), *numbers),
            )

    def heartbeat(
        self, connection: Any, local_node: LocalNode, state: str, clients: int, lease_lost: list[bool] | None = None
    ) -> tuple[HeartbeatResult, LocalNode]:
        """Renew the lease, and tell the highest generation that is known.

        ``True`` is appended to ``lease_lost`` if the lease had expired, or the row was gone or is older than what was
        written last, even if this raises, since the lease may have been renewed all the same. An item that it already
        has counts as well.
        """
        lease_lost = [] if lease_lost is None else lease_lost
        with transaction(connection, self._dialect.begin_statement) as cursor:
            sent_at = self._clock.seconds()
            # By number only: claims lock the index on node_id.
            cursor.execute(
                f"SELECT {self._dialect.now_expression}, heartbeat_at, node_id FROM nodes WHERE id = ?"
                f"{self._dialect.lock_clause}",
                (local_node.number,),
            )
            row = cursor.fetchone()
            exists = row is not None and row[2] == local_node.info.node_id
            now = row[0] if row else self._read_clock(cursor)
            lost_commits = not exists or row[1] < local_node.heartbeat_at
            if lost_commits or not self._clock.is_live(row[1], now):
                lease_lost.append(True)
            self._floor.raise_to(max(self._clock.horizon(now, sent_at), read_max_generation(cursor)))
            # The clock may be behind by less at the next claim.
            self._floor.is_ahead_of(now)
            if exists:
                cursor.execute(
                    "UPDATE nodes SET state = ?, clients = ?, heartbeat_at = ?, max_generation = ? WHERE id = ?",
                    (state, clients, self._dialect.to_timestamp(now), self._floor.value, local_node.number),
                )
                local_node = attrs.evolve(local_node, heartbeat_at=now)
                return HeartbeatResult(not lease_lost, lost_commits, now), local_node
            # With its old number, if that is free, so that it owns the remaining rows of its clients again.
            number = self._insert_node(cursor, local_node, None if row else local_node.number, state, clients, now)
            return HeartbeatResult(False, True, now), attrs.evolve(local_node, number=number, heartbeat_at=now)

    def write_batch(
        self,
        connection: Any,
        local_node: LocalNode,
        batch: list[ClaimRequest | ReleaseRequest],
        maybe_written: MaybeWritten,
    ) -> list[Outcome]:
        """Write a batch of claims and releases: :func:`write_batch`."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            return write_batch(cursor, self._dialect, self._clock, self._floor, local_node, batch, maybe_written)

    def find(self, connection: Any, client_ids: list[str]) -> dict[str, Location]:
        """Find the locations of clients, without those that are not connected, or whose node has left."""
        with closing(connection.cursor()) as cursor:
            rows = read_client_rows(cursor, client_ids)
            if not rows:
                return {}
            owners, _, _ = read_owners(cursor, self._dialect, self._clock, {row.node for row in rows.values()})
            return {
                client_id: owners[row.node].location(client_id, row)
                for client_id, row in rows.items()
                if row.node in owners
            }

    def assign(self, connection: Any, client_ids: list[str], node_id: str, binding: bool) -> list[str]:
        """Assign clients, sorted, to a node: :func:`assign`."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            return assign(cursor, self._dialect, self._clock, client_ids, node_id, binding=binding)

    def assignments(self, connection: Any, client_ids: list[str]) -> dict[str, Assignment]:
        """Find the assignments of clients: :func:`find_assignments`."""
        with closing(connection.cursor()) as cursor:
            owners = find_assignments(cursor, self._dialect, self._clock, client_ids)
            return {client_id: owner.assignment() for client_id, owner in owners.items()}

    def purge_assignments(self, connection: Any, first: str, limit: int = MAX_REMOVED_ROWS) -> str | None:
        """Remove expired assignments: :func:`purge_assignments`."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            return purge_assignments(cursor, self._dialect, first, limit)

    def clients(
        self, connection: Any, first: str, end: str, limit: int, node_id: str | None
    ) -> tuple[list[Location], str | None]:
        """List up to ``limit`` clients of live nodes with ``first`` <= client_id < ``end``, in order, from one segment
        of the table. Returns them, and where the next segment begins, or ``None`` at the end."""
        with closing(connection.cursor()) as cursor:
            live = self._live_numbers(cursor, node_id)
            following = self._end_of_scan(cursor, first, end, MAX_SCANNED_ROWS)
            if not live:
                return [], following
            cursor.execute(
                f"SELECT {_LOCATION_COLUMNS} FROM clients c JOIN nodes n ON n.id = c.node"
                f" WHERE c.client_id >= ? AND c.client_id < ? AND c.node IN ({placeholders(live)})"
                " ORDER BY c.client_id LIMIT ?",
                (first, following or end, *live, limit),
            )
            return [_location(row) for row in cursor.fetchall()], following

    def _live_numbers(self, cursor: Any, node_id: str | None) -> list[int]:
        """Read the numbers of the live nodes, or of one node if it is live."""
        cursor.execute(f"SELECT {self._dialect.now_expression}, heartbeat_at, id, node_id FROM nodes ORDER BY id")
        return [
            number
            for now, heartbeat_at, number, each in cursor.fetchall()
            if heartbeat_at and node_id in (None, each) and self._clock.is_live(heartbeat_at, now)
        ]

    def own_rows(
        self, connection: Any, local_node: LocalNode, first: str, limit: int
    ) -> tuple[list[SessionKey], str | None]:
        """List this node's rows in the segment of ``limit`` rows of all nodes that begins at ``first``. Returns them,
        and where the next segment begins, or ``None`` at the end of the table."""
        with closing(connection.cursor()) as cursor:
            following = self._end_of_scan(cursor, first, CLIENT_ID_UPPER_BOUND, limit)
            cursor.execute(
                "SELECT client_id, generation FROM clients WHERE client_id >= ? AND client_id < ? AND node = ?",
                (first, following or CLIENT_ID_UPPER_BOUND, local_node.number),
            )
            return [SessionKey(client_id, generation) for client_id, generation in cursor.fetchall()], following

    def _end_of_scan(self, cursor: Any, first: str, end: str, limit: int) -> str | None:
        cursor.execute(
            "SELECT client_id FROM clients WHERE client_id >= ? AND client_id < ? ORDER BY client_id LIMIT 1 OFFSET ?",
            (first, end, limit),
        )
        row = cursor.fetchone()
        return row[0] if row else None

    def nodes(self, connection: Any) -> list[NodeStatus]:
        """List the live nodes, in the order in which they joined."""
        with closing(connection.cursor()) as cursor:
            now = self._read_clock(cursor)
            cursor.execute(
                "SELECT node_id, name, public_url, peer_url, clients, capacity, state, heartbeat_at, version FROM nodes"
                " ORDER BY id"
            )
            return [_status(row, now) for row in cursor.fetchall() if row[7] and self._clock.is_live(row[7], now)]

    def expire_lease(self, connection: Any, local_node: LocalNode) -> None:
        """End this node's lease: from now on its rows have no owner, and no more can be written."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            cursor.execute(
                "UPDATE nodes SET heartbeat_at = ? WHERE id = ? AND node_id = ?",
                (self._dialect.to_timestamp(0), local_node.number, local_node.info.node_id),
            )
            self._dialect.wait_for_claims(cursor, [local_node.info.node_id])

    def remove_own_clients(
        self, connection: Any, local_node: LocalNode, first: str, limit: int = MAX_REMOVED_ROWS
    ) -> str | None:
        """Remove up to ``limit`` of this node's client rows from the segment that begins at ``first``. Returns where to
        continue, or ``None`` at the end, when this node's own row is removed as well."""
        with transaction(connection, self._dialect.begin_statement) as cursor:
            _, following = self._remove_clients(cursor, [local_node.number], first, limit)
            if following is None:
                self._hand_on_max_generation(cursor, [local_node.number])
                cursor.execute(
                    "DELETE FROM nodes WHERE id = ? AND node_id = ?", (local_node.number, local_node.info.node_id)
                )
            return following

    def _hand_on_max_generation(self, cursor: Any, numbers: list[int]) -> None:
        """Write what the rows of nodes that are to be removed say of generations into the row of another node, if the
        clock is behind."""
        cursor.execute(
            f"SELECT {self._dialect.now_expression}, max_generation FROM nodes WHERE id IN ({placeholders(numbers)})",
            numbers,
        )
        now, max_generation = max(cursor.fetchall(), default=(0, 0))
        if max_generation <= now:
            return
        cursor.execute(
            f"SELECT MAX(id) FROM nodes WHERE heartbeat_at > ? AND id NOT IN ({placeholders(numbers)})",
            (self._dialect.to_timestamp(0), *numbers),
        )
        heir = cursor.fetchone()[0]
        # By number only, as heartbeats do.
        cursor.execute(
            "UPDATE nodes SET max_generation = ? WHERE id = ? AND max_generation < ?",
            (max_generation, heir, max_generation),
        )

    def _remove_clients(self, cursor: Any, numbers: list[int], first: str, limit: int) -> tuple[int, str | None]:
        """Remove up to ``limit`` client rows of these nodes from the segment that begins at ``first``. Returns how many
        were removed, and where to continue, or ``None`` at the end of the table."""
        following = self._end_of_scan(cursor, first, CLIENT_ID_UPPER_BOUND, MAX_SCANNED_ROWS)
        # Without locks, so that no claim waits for rows that stay.
        cursor.execute(
            "SELECT client_id, node FROM clients WHERE client_id >= ? AND client_id < ?"
            f" AND node IN ({placeholders(numbers)}) ORDER BY client_id LIMIT ?",
            (first, following or CLIENT_ID_UPPER_BOUND, *numbers, limit),
        )
        rows = cursor.fetchall()
        if rows:
            self._dialect.remove_clients(cursor, rows)
        return len(rows), rows[-1][0] if len(rows) == limit else following

    def dead_nodes(self, connection: Any, local_node: LocalNode | None, limit: int = MAX_DEAD_NODES) -> dict[int, int]:
        """Find up to ``limit`` dead nodes, except this one: number -> heartbeat_at."""
        with closing(connection.cursor()) as cursor:
            now = self._read_clock(cursor)
            cursor.execute("SELECT id, node_id, heartbeat_at FROM nodes ORDER BY id")
            dead = [
                row
                for row in cursor.fetchall()
                if (local_node is None or row[0] != local_node.number)
                and not (row[2] and self._clock.is_live(row[2], now))
            ][:limit]
        if dead:
            # Claims that began while the lease was valid. One that begins later finds it expired.
            with transaction(connection, self._dialect.begin_statement) as cursor:
                self._dialect.wait_for_claims(cursor, [node_id for _, node_id, _ in dead])
        return {number: heartbeat for number, _, heartbeat in dead}

    def reap(self, connection: Any, dead_nodes: dict[int, int], first: str, limit: int) -> tuple[int, str | None]:
        """Remove up to ``limit`` client rows of dead nodes from the segment that begins at ``first``.

        ``dead_nodes`` is the result of :meth:`dead_nodes` from before the scan of the table; nodes that have sent a
        heartbeat since are left out. Returns how many rows were removed and where to continue, or ``None`` at the end
        of the table, when the rows of the nodes themselves are removed as well.
        """
        with transaction(connection, self._dialect.begin_statement) as cursor:
            # Locked: a node that sends a heartbeat now, and then reclaims its clients, does so after this.
            cursor.execute(
                f"SELECT id, heartbeat_at FROM nodes WHERE id IN ({placeholders(list(dead_nodes))}) ORDER BY id"
                f"{self._dialect.lock_clause}",
                list(dead_nodes),
            )
            still_dead = [number for number, heartbeat in cursor.fetchall() if dead_nodes[number] == heartbeat]
            if not still_dead:
                return 0, None
            count, following = self._remove_clients(cursor, still_dead, first, min(limit, MAX_REMOVED_ROWS))
            if following is None:
                # They have not claimed anything since the scan began, since a claim needs a lease.
                self._hand_on_max_generation(cursor, still_dead)
                cursor.execute(f"DELETE FROM nodes WHERE id IN ({placeholders(still_dead)})", still_dead)
            return count, following


def _location(row: Sequence[Any]) -> Location:
    client_id, node_id, name, peer_url, generation, connected_at, address, public_url, state = row
    seconds = connected_at / 1e6
    return Location(client_id, node_id, name, peer_url, generation, seconds, address, True, public_url, state)


def _status(row: tuple[Any, ...], now: int) -> NodeStatus:
    node_id, name, public_url, peer_url, clients, capacity, state, heartbeat_at, version = row
    age = max(0.0, (now - heartbeat_at) / 1e6)
    return NodeStatus(node_id, name, public_url, peer_url, clients, capacity, state, age, version)
