"""Rows of the tables, read: who has a client, and who that is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import attrs

from gateway.registry.dialect import Dialect
from gateway.registry.interface import NodeInfo
from gateway.registry.settling import Owner, Row

#: the longest client_id, and a text behind every one
LONGEST = 128
TOP = "\x7f" * (LONGEST + 1)


@attrs.frozen
class Me:
    """This node, once it has joined."""

    info: NodeInfo
    #: its ``id`` in the table ``nodes``
    number: int
    started_at: int


def marks(values: Collection[object]) -> str:
    """What is written in the brackets of ``IN``."""
    return ",".join("?" * len(values))


def any_of(keys: list[str]) -> tuple[str, list[str]]:
    """What is written in the brackets of ``IN``, and the values for it: the last key fills them up to a power of two,
    since a database keeps each text of a statement, with its plan."""
    size = 1 << (len(keys) - 1).bit_length() if keys else 0
    filled = [*keys, *keys[-1:] * (size - len(keys))]
    return marks(filled), filled


def read_rows(cursor: Any, client_ids: list[str]) -> dict[str, Row]:
    """The rows of clients, by client_id. A row of node 0 is none."""
    places, values = any_of(client_ids)
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
        f"SELECT {dialect.now}, heartbeat_at, id, node_id, name, peer_url, public_url, state, clients < capacity"
        f" FROM nodes WHERE id IN ({marks(numbers)})",
        sorted(numbers),
    )
    now, owners = 0, {}
    for now, heartbeat, number, node_id, name, peer_url, public_url, state, room in cursor.fetchall():
        if heartbeat:
            owners[number] = Owner(node_id, name, peer_url, public_url, state, heartbeat > now - lease, bool(room))
    return now, owners
