"""Fake collaborators of gateway.cluster.rebalance."""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from gateway.cluster.routing import Destination
from gateway.registry.errors import RegistryUnavailableError
from tests.fakes.sessions import FakeClientSessions


class FakeGracefulDisconnect:
    """Disconnects clients; those with calls in flight stay until the test ends the calls."""

    def __init__(self, clock: Clock, sessions: FakeClientSessions, calls: Counter[str]) -> None:
        self._clock = clock
        self._sessions = sessions
        self._calls = calls
        self.disconnecting: set[str] = set()
        #: client_id -> when the goaway was sent, its reason, and its URL
        self.goaways: dict[str, tuple[float, str, str | None]] = {}

    def __len__(self) -> int:
        return len(self.disconnecting)

    def goaway_sent(self, client_id: str) -> int:
        return int(client_id in self.disconnecting)

    def send_goaway(self, client_id: str, reason: str, destination: Destination | None) -> bool:
        if client_id not in self._sessions.connected or client_id in self.disconnecting:
            return False
        assert client_id not in self.goaways, f"{client_id} was sent two goaways"
        self.goaways[client_id] = self._clock.seconds(), reason, None if destination is None else destination.url
        if self._calls[client_id]:
            self.disconnecting.add(client_id)
        else:
            self._sessions.connected.discard(client_id)
        return True

    def destinations(self) -> Counter[str]:
        """Return the number of goaways to each URL."""
        return Counter(str(url).partition("/v1/")[0] for _, _, url in self.goaways.values())


class FakeAssignmentRegistry:
    """Assigns all clients except those that were assigned before."""

    def __init__(self) -> None:
        self.unavailable = self.broken = False
        self.recently_assigned: set[str] = set()
        #: clients whose assignment is not binding
        self.unbound: set[str] = set()
        self.assign_requests: list[tuple[int, str]] = []
        #: responses that the test sends itself, if it sets a list
        self.pending_responses: list[Deferred[Any]] | None = None
        self.purge_results: list[bool] = []

    def assign(self, client_ids: list[str], node_id: str, *, binding: bool = True) -> Deferred[list[str]]:
        if self.unavailable:
            return fail(RegistryUnavailableError("away"))
        assigned = [client_id for client_id in client_ids if client_id not in self.recently_assigned]
        self.recently_assigned.update(assigned)
        self.assign_requests.append((len(client_ids), node_id))
        if not binding:
            self.unbound.update(assigned)
        if self.pending_responses is not None:
            self.pending_responses.append(Deferred())
            return self.pending_responses[-1].addCallback(lambda _: assigned)
        return succeed(assigned)

    def purge_assignments(self) -> Deferred[bool]:
        if self.broken:
            return fail(ZeroDivisionError())
        return (
            fail(RegistryUnavailableError("away"))
            if self.unavailable
            else succeed(self.purge_results.pop() if self.purge_results else True)
        )
