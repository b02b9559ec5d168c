"""A batch of claims and releases, written in one transaction."""

from __future__ import annotations

from typing import Any

from gateway.registry.dialect import Dialect
from gateway.registry.placements import read
from gateway.registry.rows import Me, read_owners, read_rows
from gateway.registry.settling import Outcome, Release, Request, Row, Settled, settle

#: a client_id and a generation
Tried = list[tuple[str, int]]


def write(
    cursor: Any, dialect: Dialect, lease: int, me: Me, batch: list[Request | Release], tried: Tried
) -> list[Outcome]:
    """Write a batch; see :func:`~gateway.registry.settling.settle`. ``lease`` is in microseconds.

    ``tried`` takes each claim that may be in even if this, or the commit after it, raises. Those that it has already
    are of an earlier try: what is in of them, and is not what this one comes to, is removed.
    """
    addresses = {each.client_id: each.address if isinstance(each, Request) else "" for each in batch}
    clients = sorted(addresses.items())
    placed = dialect.lock_clients(cursor, clients)
    rows = {} if placed == len(clients) else read_rows(cursor, [client_id for client_id, _ in clients])
    wanted = sorted({each.client_id for each in batch if isinstance(each, Request) and each.placed})
    placements = read(cursor, wanted) if wanted else {}
    # Only now, when all that is to be waited for has been waited for: a claim's generation is its time.
    dialect.hold_node(cursor, me.info.node_id)
    numbers = {row.node for row in rows.values()} | {number for number, _ in placements.values()}
    now, owners = read_owners(cursor, dialect, lease, {me.number, *numbers})
    own = owners.pop(me.number, None)
    leased = own is not None and own.live and own.node_id == me.info.node_id
    valid = {client_id: number for client_id, (number, until) in placements.items() if until > now}
    settled = settle(batch, rows, me.number, now, leased, owners, valid)
    gone = {client_id: row.node for client_id, row in settled.removed.items()}
    if tried:
        gone |= _left_behind(rows, me.number, settled, tried)
    if placed:
        gone |= dict.fromkeys(addresses.keys() - rows.keys() - settled.written.keys(), 0)
    if gone:
        dialect.remove_clients(cursor, sorted(gone.items()))
    if settled.written:
        _fill(cursor, dialect, me.number, now, settled.written, {} if placed == 0 else addresses, rows)
    # A reclaim that is in although it failed is right: the connection is there.
    reclaims = {each.client_id: each.generation for each in batch if isinstance(each, Request) and each.generation}
    tried += [
        (client_id, row.generation)
        for client_id, row in settled.written.items()
        if reclaims.get(client_id) != row.generation
    ]
    return settled.outcomes


def _left_behind(rows: dict[str, Row], node: int, settled: Settled, tried: Tried) -> dict[str, int]:
    """Claims of an earlier try that are in, and that nobody will know of."""
    known = set(tried)
    return {
        client_id: row.node
        for client_id, row in rows.items()
        if row.node == node and (client_id, row.generation) in known and client_id not in settled.written
    }


def _fill(
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
