"""What differs between databases, as far as statements go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

#: a row of ``clients``: client_id, node, generation, connected_at, address
ClientRow = tuple[str, int, int, int, str]


class Dialect(Protocol):
    """The way a database is spoken to. Parameters of statements are written ``?``.

    Each method is given a cursor whose transaction it is part of.
    """

    #: begins a transaction that may write
    begin_statement: str
    #: an expression: the clock. Read, it is microseconds since 1970, as are all times that are read.
    now_expression: str
    #: makes a SELECT lock the rows that it finds, against all but plain SELECTs
    lock_clause: str

    def to_timestamp(self, microseconds: int) -> Any:
        """A time as a parameter."""

    def lock_clients(self, cursor: Any, clients: Sequence[tuple[str, str]]) -> int:
        """Let nobody else write these rows (client_id, address), sorted by client_id, until the end of the transaction.

        Returns how many rows were put where there were none: of node 0, and to be removed, filled or written over.
        """

    def fill_clients(self, cursor: Any, client_ids: Sequence[str], node: int, now: int) -> None:
        """Make rows that :meth:`lock_clients` has put, sorted by client_id, those of a claim that was made now."""

    def write_clients(self, cursor: Any, rows: Sequence[ClientRow]) -> None:
        """Write rows of ``clients``, sorted by client_id, whether or not they are there."""

    def remove_clients(self, cursor: Any, rows: Sequence[tuple[str, int]]) -> None:
        """Remove the rows of ``clients`` with these client_ids, sorted, that are of one of these nodes."""

    def lock_assignments(self, cursor: Any, client_ids: Sequence[str]) -> None:
        """Let nobody else write these clients' rows of ``placements``, sorted, until the end of the transaction. A row
        may be put where there is none: of node 0, and of long ago."""

    def write_assignments(self, cursor: Any, client_ids: Sequence[str], node: int, expires_at: int, now: int) -> None:
        """Write rows of ``placements`` that are locked: these clients, sorted, are placed on a node now."""

    def remove_assignments(self, cursor: Any, client_ids: Sequence[str], moved_by: int) -> None:
        """Remove these rows of ``placements``, sorted, unless they were written after ``latest``."""

    def lock_node_shared(self, cursor: Any, node_id: str) -> None:
        """Let nobody bury this node until the end of the transaction. It does not keep its heartbeat waiting."""

    def wait_for_claims(self, cursor: Any, node_ids: list[str]) -> None:
        """Wait until no transaction holds these nodes."""
