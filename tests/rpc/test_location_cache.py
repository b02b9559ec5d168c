"""Tests for :mod:`gateway.rpc.location_cache`."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location
from gateway.rpc.location_cache import FALLBACK_TIMEOUT, LOOKUP_TIMEOUT, OUTAGE_WINDOW, PROBE_INTERVAL, LocationCache
from tests.builders.dispatcher import LEASE, remote_location
from tests.fakes.rpc import FakeRegistry


class LocationCacheTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.make()

    def make(self, max_locations: int = 3) -> None:
        self.clock = Clock()
        self.registry = FakeRegistry()
        self.locations = LocationCache(
            self.registry, self.clock, node_id="this-node", lease=LEASE, max_locations=max_locations
        )

    def get(self, client_id: str = "x") -> Location | None:
        return self.locations.get(client_id, self.clock.seconds())

    def find(self, result: Any, client_id: str = "x", *, fresh: bool = False) -> Deferred[Location | None]:
        self.registry.result = result
        return self.locations.find(client_id, fresh=fresh)

    def assert_idle(self) -> None:
        self.assertEqual((self.locations._lookups, self.clock.getDelayedCalls()), ({}, []))


class CacheTests(LocationCacheTestCase):
    def test_found(self) -> None:
        self.assertIsNone(self.get())
        self.assertEqual(self.successResultOf(self.find(remote_location())), remote_location())
        self.assertEqual(
            (self.get(), self.locations.get_expired("x"), len(self.locations)),
            (remote_location(), remote_location(), 1),
        )
        self.assert_idle()

    def test_valid_for_one_lease(self) -> None:
        self.find(remote_location())
        self.clock.advance(LEASE - 0.01)
        self.assertEqual(self.get(), remote_location())
        self.clock.advance(0.01)
        self.assertEqual((self.get(), self.locations.get_expired("x")), (None, remote_location()))

    def test_not_cached(self) -> None:
        """Clients that are not connected, or connected here, or to a node whose lease has expired."""
        for result in (None, remote_location("this-node"), remote_location(live=False)):
            self.assertEqual(self.successResultOf(self.find(result)), result)
            self.assertEqual((self.get(), len(self.locations)), (None, 0))

    def test_expired_location_is_replaced(self) -> None:
        for result in (None, remote_location("this-node")):
            self.find(remote_location())
            self.find(result)
            self.assertEqual(len(self.locations), 0)
        # It is the fallback, should the registry become unavailable.
        self.find(remote_location())
        self.find(remote_location(live=False, generation=8))
        self.assertEqual(
            (self.get(), self.locations.get_expired("x")), (None, remote_location(live=False, generation=8))
        )

    def test_older_location_does_not_replace_a_newer_one(self) -> None:
        newer, older = remote_location("b", generation=8), remote_location("a", generation=7)
        self.find(newer)
        self.assertEqual(self.successResultOf(self.find(older)), newer)
        self.assertEqual(self.get(), newer)
        self.clock.advance(LEASE)
        self.assertEqual(self.successResultOf(self.find(older)), older)
        self.assertEqual(self.get(), older)
        self.find(newer)
        self.assertEqual(self.get(), newer)

    def test_least_recently_used(self) -> None:
        for client_id in "abc":
            self.find(remote_location(client_id=client_id), client_id)
        self.get("a")
        self.find(remote_location(client_id="b"), "b")
        self.find(remote_location(client_id="d"), "d")
        self.assertEqual([client_id for client_id in "abcd" if self.get(client_id)], ["a", "b", "d"])

    def test_drop(self) -> None:
        self.find(remote_location())
        self.locations.drop("x")
        self.locations.drop("nobody")
        self.assertIsNone(self.locations.get_expired("x"))

    def test_drop_node(self) -> None:
        for client_id, node_id in (("a", "one"), ("b", "two"), ("c", "one")):
            self.find(remote_location(node_id, client_id), client_id)
        self.locations.drop_node("one")
        self.locations.drop_node("three")
        self.assertEqual([client_id for client_id in "abc" if self.locations.get_expired(client_id)], ["b"])

    def test_invalidate(self) -> None:
        """Only that location is dropped."""
        self.find(remote_location(generation=8))
        self.locations.invalidate(remote_location(generation=7))
        self.locations.invalidate(remote_location(client_id="y"))
        self.assertEqual(self.get(), remote_location(generation=8))
        self.locations.invalidate(remote_location(generation=8))
        self.assertIsNone(self.locations.get_expired("x"))

    def test_expire(self) -> None:
        self.find(remote_location(generation=8))
        self.locations.expire(remote_location(generation=7))
        self.locations.expire(remote_location(client_id="y"))
        self.assertEqual(self.get(), remote_location(generation=8))
        self.locations.expire(remote_location(generation=8))
        self.assertEqual((self.get(), self.locations.get_expired("x")), (None, remote_location(generation=8)))

    def test_strings_of_a_node_are_shared(self) -> None:
        for client_id in "ab":
            fresh = "".join(["node-", "1"])
            self.find(Location(client_id, fresh, "n", "ws://p", 7, 0.0, "a"), client_id)
        first, second = self.get("a"), self.get("b")
        assert first is not None
        assert second is not None
        self.assertIs(first.node_id, second.node_id)

    @given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(("find", "get", "drop")))))
    def test_bounded(self, steps: list[tuple[str, str]]) -> None:
        """Compared with a list kept in the order of use."""
        self.make()
        expected: list[str] = []
        for client_id, step in steps:
            used = step == "find" or (step == "get" and client_id in expected)
            if client_id in expected and (used or step == "drop"):
                expected.remove(client_id)
            if used:
                expected = [*expected, client_id][-3:]
            if step == "find":
                self.find(remote_location(client_id=client_id), client_id)
            elif step == "get":
                self.assertEqual(self.get(client_id) is not None, used)
            else:
                self.locations.drop(client_id)
            self.assertEqual(list(self.locations._entries), expected)


class LookupTests(LocationCacheTestCase):
    def test_shared_lookup(self) -> None:
        query: Deferred[Location | None] = Deferred()
        waiter = [self.find(query) for _ in range(3)]
        self.assertEqual(self.registry.queries, ["x"])
        query.callback(remote_location())
        self.assertEqual([self.successResultOf(each) for each in waiter], [remote_location()] * 3)
        self.find(None)
        self.assertEqual(self.registry.queries, ["x", "x"])
        self.assert_idle()

    def test_fresh(self) -> None:
        """Not by a lookup in progress, whose result is not cached."""
        first: Deferred[Location | None] = Deferred()
        second: Deferred[Location | None] = Deferred()
        old, new = self.find(first), self.find(second, fresh=True)
        self.assertEqual(self.registry.queries, ["x", "x"])
        joined = self.find(second)
        self.assertEqual(len(self.registry.queries), 2)
        second.callback(remote_location("b", generation=8))
        first.callback(remote_location("a", generation=9))
        self.assertEqual(self.successResultOf(old), remote_location("a", generation=9))
        self.assertEqual(self.successResultOf(new), self.successResultOf(joined))
        self.assertEqual(self.get(), remote_location("b", generation=8))
        self.assert_idle()

    def test_result_invalidated_meanwhile_is_not_cached(self) -> None:
        for forget in (
            lambda: self.locations.drop("x"),
            lambda: self.locations.invalidate(remote_location()),
            lambda: self.locations.expire(remote_location()),
        ):
            query: Deferred[Location | None] = Deferred()
            waiter = self.find(query)
            forget()
            query.callback(remote_location())
            self.assertEqual(self.successResultOf(waiter), remote_location())
            self.assertIsNone(self.get())
            self.assert_idle()

    def test_one_waiter_cancels(self) -> None:
        cancelled: list[object] = []
        query: Deferred[Location | None] = Deferred(cancelled.append)
        first, second = self.find(query), self.find(query)
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertEqual(cancelled, [])
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.assertEqual(len(cancelled), 1)
        self.assertFalse(self.locations.registry_unavailable(self.clock.seconds()), "no caller waited for long")
        self.assert_idle()

    def test_time_out(self) -> None:
        waiter = self.find(Deferred())
        self.clock.advance(1)
        later = self.find(Deferred())
        self.clock.advance(LOOKUP_TIMEOUT - 1.01)
        self.assertNoResult(waiter)
        self.clock.advance(0.01)
        self.failureResultOf(waiter, RegistryUnavailableError)
        self.failureResultOf(later, RegistryUnavailableError)
        self.assertTrue(self.locations.registry_unavailable(self.clock.seconds()))
        self.assert_idle()

    def test_failures(self) -> None:
        self.failureResultOf(self.find(RegistryUnavailableError("gone")), RegistryUnavailableError)
        self.failureResultOf(self.find(ZeroDivisionError()), RegistryUnavailableError)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.registry.find = lambda client_id: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        self.failureResultOf(self.locations.find("x"), RegistryUnavailableError)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_idle()


class OutageTests(LocationCacheTestCase):
    """The registry is unavailable."""

    def setUp(self) -> None:
        super().setUp()
        self.find(remote_location())
        self.clock.advance(LEASE)
        self.registry.queries.clear()

    def is_unavailable(self) -> bool:
        return self.locations.registry_unavailable(self.clock.seconds())

    def fail_lookup(self) -> None:
        self.failureResultOf(self.find(RegistryUnavailableError("gone")), RegistryUnavailableError)

    def test_expired_locations_are_valid(self) -> None:
        self.assertIsNone(self.get())
        self.fail_lookup()
        self.assertTrue(self.is_unavailable())
        self.assertEqual(self.get(), remote_location())
        self.assertIsNone(self.get("nobody"))

    def test_until_a_lookup_succeeds(self) -> None:
        """Of any client."""
        self.fail_lookup()
        self.find(None, "y")
        self.assertFalse(self.is_unavailable())
        self.assertIsNone(self.get())

    def test_ends_after_a_while(self) -> None:
        self.fail_lookup()
        self.clock.advance(OUTAGE_WINDOW)
        self.assertFalse(self.is_unavailable())
        self.assertIsNone(self.get())

    def test_probe_while_expired_locations_are_used(self) -> None:
        """Once a second, by the next caller, which does not wait for the result."""
        self.fail_lookup()
        self.clock.advance(PROBE_INTERVAL - 0.01)
        self.get()
        self.assertEqual(len(self.registry.queries), 1)
        self.clock.advance(0.01)
        for _ in range(3):
            self.get()
        self.assertEqual(len(self.registry.queries), 2)
        self.registry.result = Deferred()
        self.clock.advance(PROBE_INTERVAL)
        for _ in range(3):
            self.assertEqual(self.get(), remote_location())
            self.clock.advance(1)
        self.assertEqual(len(self.registry.queries), 3, "one at a time")
        self.registry.result.callback(remote_location(generation=8))
        self.assertFalse(self.is_unavailable())
        self.assertEqual(self.get(), remote_location(generation=8))
        self.assert_idle()

    def test_registry_hangs(self) -> None:
        """It counts as unavailable throughout, though each lookup takes its time."""
        self.registry.result = Deferred()
        failed = self.locations.find("x")
        self.clock.advance(LOOKUP_TIMEOUT)
        self.failureResultOf(failed, RegistryUnavailableError)
        for _ in range(100):
            self.registry.result = Deferred()
            self.assertEqual(self.get(), remote_location())
            self.clock.advance(0.5)
        self.assertLess(len(self.registry.queries), 12)

    def test_cancelled_after_a_while(self) -> None:
        """After the fallback timeout, a cancelled lookup counts as failed."""
        waiter = self.find(Deferred())
        self.clock.advance(FALLBACK_TIMEOUT)
        waiter.cancel()
        self.failureResultOf(waiter, CancelledError)
        self.assertTrue(self.is_unavailable())
        self.assert_idle()
