"""Collections of bounded size."""

from __future__ import annotations


class BoundedSet(dict[str, None]):
    """A set of texts with at most ``max_size`` members: beyond that the oldest is forgotten."""

    def __init__(self, max_size: int) -> None:
        super().__init__()
        self._max_size = max_size

    def add(self, member: str) -> None:
        """Add a member, unless it is one already."""
        self[member] = None
        if len(self) > self._max_size:
            del self[next(iter(self))]

    def discard(self, member: str) -> None:
        """Remove a member, if it is one."""
        self.pop(member, None)
