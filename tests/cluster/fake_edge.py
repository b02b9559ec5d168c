"""An edge of clients that are told to go, and closed."""

import json

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from zope.interface import implementer

from gateway.clients.interface import IEdge, Presence
from gateway.registry.interface import RegistryUnavailable


@implementer(IEdge)
class FakeEdge:
    def __init__(self, clock: Clock, count: int) -> None:
        self._clock = clock
        self.here = {f"c-{i}" for i in range(count)}
        self.heard: set[tuple[str, int]] = set()
        self.told: dict[str, dict[str, object]] = {}
        self.closed: dict[str, tuple[float, int]] = {}
        self.registry_is_away = False
        #: the connections whose rows stay
        self.rows: set[tuple[str, int]] = set()
        #: of those whose connection is not of generation 1
        self.generations: dict[str, int] = {}

    def client_ids(self) -> list[str]:
        return list(self.here)

    def count(self) -> int:
        return len(self.here)

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        if client_id not in self.here:
            return 0
        assert (client_id, self.generation(client_id)) not in self.heard, "told twice"
        self.heard.add((client_id, self.generation(client_id)))
        self.told[client_id] = json.loads(payload)
        return 1

    def close(
        self, client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False
    ) -> Deferred[bool]:
        if client_id not in self.here or generation not in (0, self.generation(client_id)):
            return succeed(False)
        if keep_row:
            self.rows.add((client_id, self.generation(client_id)))
        self.here.discard(client_id)
        self.closed[client_id] = (self._clock.seconds(), code)
        return fail(RegistryUnavailable()) if self.registry_is_away else succeed(True)

    def release(self, client_id: str, generation: int) -> Deferred[None]:
        self.rows.discard((client_id, generation))
        return fail(RegistryUnavailable()) if self.registry_is_away else succeed(None)

    def get(self, client_id: str) -> Presence | None:
        return None

    def renew(self, client_id: str, generation: int, until: float) -> bool:
        raise NotImplementedError

    def generation(self, client_id: str) -> int:
        return self.generations.get(client_id, 1) if client_id in self.here else 0

    def opening(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        return None
