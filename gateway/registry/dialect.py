"""The interface to what differs between databases in statements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

#: a row of ``clients``: client_id, node, generation, connected_at, address
ClientRow = tuple[str, int, int, int, str]


class Dialect(Protocol):
    """Statements of one kind of database. Parameters are written ``?``.

    Each method is part of the transaction of the cursor that is passed to it.
    """

    #: begins a transaction that may write
    begin_statement: str
    #: expression for the clock, read as microseconds since 1970, like all times
    now_expression: str
    #: suffix of a SELECT that locks the rows found against everything but plain SELECTs
    lock_clause: str

    def to_timestamp(self, microseconds: int) -> Any:
        """Convert a time to a statement parameter."""

    def lock_clients(self, cursor: Any, clients: Sequence[tuple[str, str]]) -> int:
        """Lock the rows (client_id, address), sorted by client_id, against other writers until the transaction ends.

        Returns how many placeholder rows, of node 0, were inserted for missing rows. They must be removed, filled or
        overwritten.
        """

    def fill_clients(self, cursor: Any, client_ids: Sequence[str], node: int, now: int) -> None:
        """Turn placeholder rows of :meth:`lock_clients`, sorted by client_id, into rows of claims made now."""

    def write_clients(self, cursor: Any, rows: Sequence[ClientRow]) -> None:
        """Insert or overwrite rows of ``clients``, sorted by client_id."""

    def remove_clients(self, cursor: Any, rows: Sequence[tuple[str, int]]) -> None:
        """Remove rows of ``clients``, given as (client_id, node) and sorted.

        A row may also be removed if it belongs to the node of another given row.
        """

    def lock_assignments(self, cursor: Any, client_ids: Sequence[str]) -> None:
        """Lock these clients' rows of ``placements``, sorted, against other writers until the transaction ends. May
        insert expired placeholder rows, of node 0, for missing ones."""

    def write_assignments(self, cursor: Any, client_ids: Sequence[str], node: int, expires_at: int, now: int) -> None:
        """Overwrite locked rows of ``placements``, sorted: assign these clients to a node now."""

    def remove_assignments(self, cursor: Any, client_ids: Sequence[str], moved_by: int) -> None:
        """Remove these rows of ``placements``, sorted, unless they were written after ``moved_by``."""

    def lock_node_shared(self, cursor: Any, node_id: str) -> None:
        """Keep this node's row from being removed until the transaction ends. Does not block its heartbeat."""

    def wait_for_claims(self, cursor: Any, node_ids: list[str]) -> None:
        """Wait until no transaction holds a lock of :meth:`lock_node_shared` on these nodes."""
