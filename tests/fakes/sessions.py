"""Client sessions that record goaways and closes."""

import json

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from zope.interface import implementer

from gateway.auth.interface import Identity
from gateway.clients.interface import IClientSessions, SessionInfo
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import SessionKey


@implementer(IClientSessions)
class FakeClientSessions:
    def __init__(self, clock: Clock, count: int) -> None:
        self._clock = clock
        self.connected = {f"c-{i}" for i in range(count)}
        self._goaway_sent: set[SessionKey] = set()
        self.goaways: dict[str, dict[str, object]] = {}
        self.closed: dict[str, tuple[float, int]] = {}
        self.registry_unavailable = False
        #: the sessions whose rows are kept
        self.kept_rows: set[SessionKey] = set()
        #: client_id -> generation, if it is not 1
        self.generations: dict[str, int] = {}
        self.ticket_identities: dict[SessionKey, Identity] = {}

    def client_ids(self) -> list[str]:
        return list(self.connected)

    def count(self) -> int:
        return len(self.connected)

    def send(self, client_id: str, payload: bytes, generation: int = 0) -> int:
        if client_id not in self.connected:
            return 0
        key = SessionKey(client_id, self.generation(client_id))
        assert key not in self._goaway_sent, "goaway sent twice"
        self._goaway_sent.add(key)
        self.goaways[client_id] = json.loads(payload)
        return 1

    def close(
        self, client_id: str, code: int, reason: str, generation: int = 0, *, keep_row: bool = False
    ) -> Deferred[bool]:
        if client_id not in self.connected or generation not in (0, self.generation(client_id)):
            return succeed(False)
        if keep_row:
            self.kept_rows.add(SessionKey(client_id, self.generation(client_id)))
        self.connected.discard(client_id)
        self.closed[client_id] = (self._clock.seconds(), code)
        return fail(RegistryUnavailableError()) if self.registry_unavailable else succeed(True)

    def release(self, key: SessionKey) -> Deferred[None]:
        self.kept_rows.discard(key)
        return fail(RegistryUnavailableError()) if self.registry_unavailable else succeed(None)

    def get(self, client_id: str) -> SessionInfo | None:
        return None

    def renew(self, key: SessionKey, expires_at: float) -> bool:
        raise NotImplementedError

    def ticket_identity(self, client_id: str, generation: int) -> Identity | None:
        return self.ticket_identities.get(SessionKey(client_id, generation))

    def generation(self, client_id: str) -> int:
        return self.generations.get(client_id, 1) if client_id in self.connected else 0

    def claim_in_progress(self, client_id: str, newer_than: int = 0) -> Deferred[None] | None:
        return None
