"""Where clients of other nodes are, as this node remembers it: a cache in front of the registry's look-ups.

Only what was found is kept, never that somebody is nowhere. While the registry answers, a location counts for one
lease; while it is away, for as long as it is kept, and one look-up a second finds out whether it is back.
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

#: seconds that a look-up in the registry may take
LOOKUP_TIMEOUT = 5.0
#: after so many seconds without an answer the registry counts as away, if there is another way to go on
FALLBACK_TIMEOUT = 1.0
#: for so many seconds after a look-up that failed the registry counts as away, unless one succeeds
OUTAGE_WINDOW = 10.0
#: how long after such a failure it is asked again on behalf of those who can do without, in seconds
PROBE_INTERVAL = 1.0
#: The most locations; beyond that those go first which were not used for longest. One takes 520 bytes (8.5 MB when they
#: are full), and 0.1 µs of each full garbage collection.
MAX_LOCATIONS = 16384


class _Entry(msgspec.Struct, gc=False):
    """A location, and until when it counts while the registry answers."""

    location: Location
    expires_at: float


class _Lookup:
    """One question to the registry, for all who ask it at the same time."""

    __slots__ = ("client_id", "query", "started_at", "waiters")

    def __init__(self, client_id: str, started_at: float) -> None:
        self.client_id = client_id
        self.started_at = started_at
        self.waiters: dict[Deferred[Location | None], None] = {}
        self.query: Deferred[Any] | None = None


class LocationCache:
    """The locations of clients of other nodes than ``node_id``. ``lease`` is in seconds."""

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
        """Whether the registry did not answer when it was asked last; ``now`` is the clock's time."""
        return now < self._unavailable_until

    def get(self, client_id: str, now: float) -> Location | None:
        """A location that can be used without asking the registry; ``now`` is the clock's time."""
        known = self._entries.get(client_id)
        if known is None:
            return None
        if known.expires_at <= now:
            if now >= self._unavailable_until:
                return None
            self._probe(client_id, now)
        self._entries.move_to_end(client_id)
        return known.location

    def get_expired(self, client_id: str) -> Location | None:
        """A location to be used if the registry turns out to be away."""
        known = self._entries.get(client_id)
        return None if known is None else known.location

    def find(self, client_id: str, *, fresh: bool = False) -> Deferred[Location | None]:
        """Ask the registry, once for all who ask for the same client meanwhile; ``afresh``: not by a question that
        is under way already.

        Fails with ``RegistryUnavailable`` alone, after 5 seconds at the latest. Cancelling it stops the wait, and the
        question if nobody else waits for its answer.
        """
        look_up = None if fresh else self._lookups.get(client_id)
        if look_up is not None:
            return self._join(look_up)
        self._lookups[client_id] = look_up = _Lookup(client_id, self._clock.seconds())
        waiter = self._join(look_up)
        look_up.query = asking = maybeDeferred(self._registry.find, client_id)
        asking.addTimeout(LOOKUP_TIMEOUT, self._clock)
        asking.addBoth(self._lookup_done, look_up)
        return waiter

    def put(self, location: Location) -> Location:
        """Remember a location, unless a newer one is known that counts; returns the one that is known then."""
        client_id = location.client_id
        now = self._clock.seconds()
        known = self._entries.get(client_id)
        if known is not None and known.expires_at > now and known.location.generation > location.generation:
            return known.location
        # A node is the same for thousands of clients, and every look-up brings its texts anew.
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
        """Forget where a client is, and what is being looked up."""
        self._entries.pop(client_id, None)
        self._lookups.pop(client_id, None)

    def drop_node(self, node_id: str) -> None:
        """Forget all clients of a node. It takes some milliseconds when there are many locations."""
        of_it = [client_id for client_id, known in self._entries.items() if known.location.node_id == node_id]
        for client_id in of_it:
            del self._entries[client_id]

    def invalidate(self, location: Location) -> None:
        """A client is not there, or no longer."""
        if not self._has_newer(location):
            self.drop(location.client_id)

    def expire(self, location: Location) -> None:
        """A location may be wrong: it counts only while the registry is away."""
        if self._has_newer(location):
            return
        self._lookups.pop(location.client_id, None)
        known = self._entries.get(location.client_id)
        if known is not None:
            known.expires_at = 0.0

    def _has_newer(self, location: Location) -> bool:
        known = self._entries.get(location.client_id)
        return known is not None and known.location.generation > location.generation

    # Look-ups.

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
        latest = self._lookups.get(client_id) is lookup
        if latest:
            del self._lookups[client_id]
        waiting, lookup.waiters = lookup.waiters, {}
        if isinstance(result, Failure):
            self._lookup_failed(result, lookup)
            for waiter in waiting:
                waiter.errback(RegistryUnavailableError("the client could not be looked up"))
            return
        self._unavailable_until = 0.0
        if latest:
            result = self._store(client_id, result)
        for waiter in waiting:
            waiter.callback(result)

    def _lookup_failed(self, failure: Failure, lookup: _Lookup) -> None:
        now = self._clock.seconds()
        if failure.check(CancelledError) and now - lookup.started_at < 0.9 * FALLBACK_TIMEOUT:
            # Nobody wanted to know any more.
            return
        if not failure.check(CancelledError, TimeoutError, RegistryUnavailableError):
            self._log.failure("The registry failed to look up a client", failure)
        self._unavailable_until = now + OUTAGE_WINDOW
        self._probe_at = now + PROBE_INTERVAL

    def _store(self, client_id: str, location: Location | None) -> Location | None:
        """Keep what the registry said, as far as it is to be kept; returns what is known by now."""
        if location is None or location.node_id == self._node_id:
            self._entries.pop(client_id, None)
            return location
        if location.live:
            return self.put(location)
        if client_id in self._entries and not self._has_newer(location):
            # Better than nothing, should the registry go away.
            self._entries[client_id] = _Entry(location, 0.0)
        return location

    def _probe(self, client_id: str, now: float) -> None:
        """Find out whether the registry is back."""
        if self._probing or now < self._probe_at:
            return
        self._probing = True
        self.find(client_id).addBoth(self._probed)

    def _probed(self, _: object) -> None:
        self._probing = False
