"""Cache of the locations of clients of other nodes, in front of registry lookups.

Only locations are cached, never that a client is not connected. While the registry is available, a location is valid
for one lease. While it is unavailable, a location is valid as long as it is cached, and one lookup a second probes the
registry.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import attrs
import msgspec
from twisted.internet.defer import CancelledError, Deferred, TimeoutError, maybeDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, Location

#: timeout of a registry lookup, in seconds
LOOKUP_TIMEOUT = 5.0
#: timeout of a registry lookup if there is a fallback, in seconds
FALLBACK_TIMEOUT = 1.0
#: how long the registry counts as unavailable after a failed lookup, unless one succeeds, in seconds
OUTAGE_WINDOW = 10.0
#: delay of the next probe after a failed lookup, in seconds
PROBE_INTERVAL = 1.0
#: Beyond that, the least recently used locations are dropped. One takes 520 bytes (8.5 MB when the cache is full), and
#: 0.1 µs of each full garbage collection.
MAX_LOCATIONS = 16384


class _Entry(msgspec.Struct, gc=False):
    """A location, and until when it is valid while the registry is available."""

    location: Location
    expires_at: float


class _Lookup:
    """One registry lookup, shared by all concurrent callers."""

    __slots__ = ("client_id", "query", "started_at", "waiters")

    def __init__(self, client_id: str, started_at: float) -> None:
        self.client_id = client_id
        self.started_at = started_at
        self.waiters: dict[Deferred[Location | None], None] = {}
        self.query: Deferred[Any] | None = None


class LocationCache:
    """Locations of clients of nodes other than ``node_id``. ``lease`` is in seconds."""

    _log = Logger()

    def __init__(
        self,
        registry: IRegistry,
        clock: IReactorTime,
        *,
        node_id: str,
        lease: float,
        max_locations: int = MAX_LOCATIONS,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._node_id = node_id
        self._lease = lease
        self._max_locations = max_locations
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lookups: dict[str, _Lookup] = {}
        self._unavailable_until = 0.0
        self._probe_at = 0.0
        self._probing = False

    def __len__(self) -> int:
        return len(self._entries)

    def registry_unavailable(self, now: float) -> bool:
        """Return whether the last registry lookup failed; ``now`` is the clock's time."""
        return now < self._unavailable_until

    def get(self, client_id: str, now: float) -> Location | None:
        """Return a location that is valid without a lookup, or ``None``; ``now`` is the clock's time."""
        entry = self._entries.get(client_id)
        if entry is None:
            return None
        if entry.expires_at <= now:
            if now >= self._unavailable_until:
                return None
            self._probe(client_id, now)
        self._entries.move_to_end(client_id)
        return entry.location

    def get_expired(self, client_id: str) -> Location | None:
        """Return a location to fall back to if the registry is unavailable, or ``None``."""
        entry = self._entries.get(client_id)
        return None if entry is None else entry.location

    def find(self, client_id: str, *, fresh: bool = False) -> Deferred[Location | None]:
        """Look up a client in the registry; concurrent callers share one lookup. ``fresh`` starts a new lookup instead
        of joining one in progress.

        Fails only with ``RegistryUnavailableError``, after 5 seconds at the latest. Cancelling it stops the wait, and
        the lookup if no other caller waits for it.
        """
        lookup = None if fresh else self._lookups.get(client_id)
        if lookup is not None:
            return self._join(lookup)
        self._lookups[client_id] = lookup = _Lookup(client_id, self._clock.seconds())
        waiter = self._join(lookup)
        lookup.query = query = maybeDeferred(self._registry.find, client_id)
        query.addTimeout(LOOKUP_TIMEOUT, self._clock)
        query.addBoth(self._lookup_done, lookup)
        return waiter

    def put(self, location: Location) -> Location:
        """Cache a location, unless a newer one is valid. Returns the location that is cached then."""
        client_id = location.client_id
        now = self._clock.seconds()
        entry = self._entries.get(client_id)
        if entry is not None and entry.expires_at > now and entry.location.generation > location.generation:
            return entry.location
        # Thousands of clients share a node, and every lookup creates its strings anew.
        location = attrs.evolve(
            location,
            node_id=sys.intern(location.node_id),
            node_name=sys.intern(location.node_name),
            peer_url=sys.intern(location.peer_url),
            public_url=sys.intern(location.public_url),
            state=sys.intern(location.state),
        )
        self._entries[client_id] = _Entry(location, now + self._lease)
        self._entries.move_to_end(client_id)
        if len(self._entries) > self._max_locations:
            self._entries.popitem(last=False)
        return location

    def drop(self, client_id: str) -> None:
        """Forget a client's location. The result of a lookup in progress is not cached."""
        self._entries.pop(client_id, None)
        self._lookups.pop(client_id, None)

    def drop_node(self, node_id: str) -> None:
        """Forget all clients of a node. Takes some milliseconds with many locations."""
        client_ids = [client_id for client_id, entry in self._entries.items() if entry.location.node_id == node_id]
        for client_id in client_ids:
            del self._entries[client_id]

    def invalidate(self, location: Location) -> None:
        """Forget a location: the client is not, or no longer, connected there."""
        if not self._has_newer(location):
            self.drop(location.client_id)

    def expire(self, location: Location) -> None:
        """Mark a location as uncertain: it is valid only while the registry is unavailable."""
        if self._has_newer(location):
            return
        self._lookups.pop(location.client_id, None)
        entry = self._entries.get(location.client_id)
        if entry is not None:
            entry.expires_at = 0.0

    def _has_newer(self, location: Location) -> bool:
        entry = self._entries.get(location.client_id)
        return entry is not None and entry.location.generation > location.generation

    # Lookups.

    def _join(self, lookup: _Lookup) -> Deferred[Location | None]:
        waiter: Deferred[Location | None] = Deferred(lambda waiter: self._leave(lookup, waiter))
        lookup.waiters[waiter] = None
        return waiter

    def _leave(self, lookup: _Lookup, waiter: Deferred[Location | None]) -> None:
        lookup.waiters.pop(waiter, None)
        if not lookup.waiters and lookup.query is not None:
            lookup.query.cancel()

    def _lookup_done(self, result: Location | Failure | None, lookup: _Lookup) -> None:
        client_id = lookup.client_id
        is_latest = self._lookups.get(client_id) is lookup
        if is_latest:
            del self._lookups[client_id]
        waiters, lookup.waiters = lookup.waiters, {}
        if isinstance(result, Failure):
            self._lookup_failed(result, lookup)
            for waiter in waiters:
                waiter.errback(RegistryUnavailableError("the client could not be looked up"))
            return
        self._unavailable_until = 0.0
        if is_latest:
            result = self._store(client_id, result)
        for waiter in waiters:
            waiter.callback(result)

    def _lookup_failed(self, failure: Failure, lookup: _Lookup) -> None:
        now = self._clock.seconds()
        if failure.check(CancelledError) and now - lookup.started_at < 0.9 * FALLBACK_TIMEOUT:
            # All callers have cancelled.
            return
        if not failure.check(CancelledError, TimeoutError, RegistryUnavailableError):
            self._log.failure("Unexpected error in looking up a client in the registry", failure)
        self._unavailable_until = now + OUTAGE_WINDOW
        self._probe_at = now + PROBE_INTERVAL

    def _store(self, client_id: str, location: Location | None) -> Location | None:
        """Cache the result of a lookup, if it is a location of another node. Returns the location that is known
        then."""
        if location is None or location.node_id == self._node_id:
            self._entries.pop(client_id, None)
            return location
        if location.live:
            return self.put(location)
        if client_id in self._entries and not self._has_newer(location):
            # A fallback, should the registry become unavailable.
            self._entries[client_id] = _Entry(location, 0.0)
        return location

    def _probe(self, client_id: str, now: float) -> None:
        """Look up a client to find out whether the registry is available again."""
        if self._probing or now < self._probe_at:
            return
        self._probing = True
        self.find(client_id).addBoth(self._probed)

    def _probed(self, _: object) -> None:
        self._probing = False
