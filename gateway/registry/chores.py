"""What is removed that counts no more: rows of dead nodes, and placements that are over. In pieces, so that no
statement takes long: each goes on where the last one ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred

from gateway.registry.lane import Work, piece
from gateway.registry.rows import Me
from gateway.registry.statements import Statements
from gateway.telemetry.metrics import Metrics


@attrs.define
class _Walk:
    """A walk through the table of clients, in search of those of dead nodes."""

    dead: dict[int, int]
    first: str = ""


class Chores:
    """The walks of one node; ``do`` carries out a named piece of work when its turn has come."""

    def __init__(self, do: Callable[[str, Work[Any]], Deferred[Any]], statements: Statements, metrics: Metrics) -> None:
        self._do = do
        self._statements = statements
        self._metrics = metrics
        self._walk: _Walk | None = None
        #: where the walk through the placements goes on
        self._first = ""

    async def reap(self, me: Me | None, limit: int) -> int:
        """Remove up to ``limit`` rows of dead nodes. Returns how many: fewer than ``limit`` when there are no more."""
        removed = 0
        walk = self._walk
        if walk is None:
            dead = await self._do("reap", lambda connection: self._statements.dead(connection, me))
            if not dead:
                return 0
            walk = self._walk = _Walk(dead)
        while removed < limit:
            dead, first, left = walk.dead, walk.first, limit - removed
            count, following = await self._do("reap", piece(self._statements.reap, dead, first, left))
            removed += count
            self._metrics.reaped += count
            if following is None:
                self._walk = None
                break
            walk.first = following
        return removed

    async def tidy(self) -> bool:
        """Remove placements that are over, from one piece of the table. Returns whether that was the last one."""
        following: str | None = await self._do("tidy", piece(self._statements.tidy, self._first))
        self._first = following or ""
        return following is None
