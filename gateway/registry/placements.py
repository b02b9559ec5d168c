"""Placements: where clients are to be that were told to move to another node. Each is one row, by its client's key.

    place     lock the rows, look which of these clients may be moved, write those         one transaction
    claim     read those of the batch's clients                                            while there are other nodes
    tidy      remove those that are over, from one piece of the table at a time

A placement counts until its time is over, and nobody is moved again until it has rested: ``moved_at`` in the row is the
judge of that, whichever node asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.registry.dialect import Dialect
from gateway.registry.rows import TOP, any_of, read_owners
from gateway.registry.settling import Owner

#: how long a placement counts, and how long after a move a client is not moved again, in microseconds
VALID, REST = 120_000_000, 600_000_000
#: how many rows one statement walks, and how many it removes at most
PIECE, CHUNK = 5000, 500


def place(
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
    dialect.lock_placements(cursor, client_ids)
    # Only now, when all that is to be waited for has been waited for.
    now, owners = read_owners(cursor, dialect, lease, {number})
    places, values = any_of(list(client_ids))
    cursor.execute(
        f"SELECT client_id FROM placements WHERE client_id IN ({places}) AND moved_at > ?",
        [*values, dialect.moment(now - REST)],
    )
    resting = {client_id for (client_id,) in cursor.fetchall()}
    placed = [client_id for client_id in client_ids if client_id not in resting]
    if number not in owners or not owners[number].takes:
        placed = []
    if placed:
        dialect.write_placements(cursor, placed, number, now + VALID if binding else now, now)
    return placed


def read(cursor: Any, client_ids: list[str]) -> dict[str, tuple[int, int]]:
    """Where clients are placed: the number of the node, and until when."""
    places, values = any_of(client_ids)
    cursor.execute(
        f"SELECT client_id, node, until FROM placements WHERE client_id IN ({places}) AND node > 0",
        values,
    )
    return {client_id: (node, until) for client_id, node, until in cursor.fetchall()}


def find(cursor: Any, dialect: Dialect, lease: int, client_ids: list[str]) -> dict[str, Owner]:
    """The nodes that clients are placed on, where that counts: a node that is live, and takes clients."""
    rows = read(cursor, client_ids)
    if not rows:
        return {}
    now, owners = read_owners(cursor, dialect, lease, {number for number, _ in rows.values()})
    return {
        client_id: owners[number]
        for client_id, (number, until) in rows.items()
        if until > now and number in owners and owners[number].takes
    }


def tidy(cursor: Any, dialect: Dialect, first: str) -> str | None:
    """Remove what is over from one piece of the table, which begins at ``first``. Returns where the next one begins, or
    ``None`` at the end of the table."""
    cursor.execute(
        "SELECT client_id FROM placements WHERE client_id >= ? ORDER BY client_id LIMIT 1 OFFSET ?", (first, PIECE)
    )
    row = cursor.fetchone()
    following = row[0] if row else None
    cursor.execute(f"SELECT {dialect.now}")
    now: int = cursor.fetchone()[0]
    over = (dialect.moment(now - REST), dialect.moment(now))
    # Without locks, so that nobody waits for what stays.
    cursor.execute(
        "SELECT client_id FROM placements WHERE client_id >= ? AND client_id < ? AND moved_at <= ? AND until <= ?"
        " ORDER BY client_id LIMIT ?",
        (first, following or TOP, *over, CHUNK),
    )
    found = [client_id for (client_id,) in cursor.fetchall()]
    if found:
        dialect.remove_placements(cursor, found, now - REST)
    return found[-1] if len(found) == CHUNK else following
