"""Stand-ins for what moves clients, and what it is given."""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from gateway.registry.interface import RegistryUnavailable
from tests.cluster.fake_edge import FakeEdge


class FakeFarewells:
    """Tells clients to go; those with calls in flight stay until the test ends these."""

    def __init__(self, clock: Clock, edge: FakeEdge, calls: Counter[str]) -> None:
        self._clock = clock
        self._edge = edge
        self._calls = calls
        self.waiting: set[str] = set()
        #: client_id -> when it was told, why, and where it is to go
        self.said: dict[str, tuple[float, str, str | None]] = {}

    def __len__(self) -> int:
        return len(self.waiting)

    def told(self, client_id: str) -> int:
        return int(client_id in self.waiting)

    def say(self, client_id: str, reason: str, url: str | None) -> bool:
        if client_id not in self._edge.here or client_id in self.waiting:
            return False
        assert client_id not in self.said, f"{client_id} is told twice"
        self.said[client_id] = self._clock.seconds(), reason, url
        if self._calls[client_id]:
            self.waiting.add(client_id)
        else:
            self._edge.here.discard(client_id)
        return True

    def where(self) -> Counter[str]:
        """How many were told to go to each url."""
        return Counter(str(url).partition("/v1/")[0] for _, _, url in self.said.values())


class FakeRegistry:
    """Places all but those that were moved before."""

    def __init__(self) -> None:
        self.away = self.broken = False
        self.moved: set[str] = set()
        #: those that are sent nowhere
        self.unbound: set[str] = set()
        self.placed: list[tuple[int, str]] = []
        #: what is answered by the test, if it wishes
        self.answers: list[Deferred[Any]] | None = None
        self.tidied: list[bool] = []

    def place(self, client_ids: list[str], node_id: str, *, binding: bool = True) -> Deferred[list[str]]:
        if self.away:
            return fail(RegistryUnavailable("away"))
        found = [client_id for client_id in client_ids if client_id not in self.moved]
        self.moved.update(found)
        self.placed.append((len(client_ids), node_id))
        if not binding:
            self.unbound.update(found)
        if self.answers is not None:
            self.answers.append(Deferred())
            return self.answers[-1].addCallback(lambda _: found)
        return succeed(found)

    def tidy(self) -> Deferred[bool]:
        if self.broken:
            return fail(ZeroDivisionError())
        return fail(RegistryUnavailable("away")) if self.away else succeed(self.tidied.pop() if self.tidied else True)
