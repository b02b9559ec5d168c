"""Tests for :mod:`gateway.rpc.location_cache`."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.interface import Location, RegistryUnavailable
from gateway.rpc.location_cache import AWAY, LOOK_UP_TIMEOUT, PATIENCE, PROBE_AGAIN, Locations
from tests.rpc.fakes import LEASE, FakeRegistry, elsewhere


class LocationsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.make()

    def make(self, most: int = 3) -> None:
        self.clock = Clock()
        self.registry = FakeRegistry()
        self.locations = Locations(self.registry, self.clock, node_id="this-node", lease=LEASE, most=most)

    def get(self, client_id: str = "x") -> Location | None:
        return self.locations.get(client_id, self.clock.seconds())

    def find(self, outcome: Any, client_id: str = "x", *, afresh: bool = False) -> Deferred[Location | None]:
        self.registry.outcome = outcome
        return self.locations.find(client_id, afresh=afresh)

    def assert_idle(self) -> None:
        self.assertEqual((self.locations._look_ups, self.clock.getDelayedCalls()), ({}, []))


class CacheTests(LocationsTestCase):
    def test_found(self) -> None:
        self.assertIsNone(self.get())
        self.assertEqual(self.successResultOf(self.find(elsewhere())), elsewhere())
        self.assertEqual((self.get(), self.locations.older("x"), len(self.locations)), (elsewhere(), elsewhere(), 1))
        self.assert_idle()

    def test_for_one_lease(self) -> None:
        self.find(elsewhere())
        self.clock.advance(LEASE - 0.01)
        self.assertEqual(self.get(), elsewhere())
        self.clock.advance(0.01)
        self.assertEqual((self.get(), self.locations.older("x")), (None, elsewhere()))

    def test_what_is_not_kept(self) -> None:
        """That it is nowhere, that it was here, or that the lease of its node ran out."""
        for outcome in (None, elsewhere("this-node"), elsewhere(live=False)):
            self.assertEqual(self.successResultOf(self.find(outcome)), outcome)
            self.assertEqual((self.get(), len(self.locations)), (None, 0))

    def test_what_the_registry_says_then(self) -> None:
        for outcome in (None, elsewhere("this-node")):
            self.find(elsewhere())
            self.find(outcome)
            self.assertEqual(len(self.locations), 0)
        # Should the registry go away, it is still better than nothing.
        self.find(elsewhere())
        self.find(elsewhere(live=False, generation=8))
        self.assertEqual((self.get(), self.locations.older("x")), (None, elsewhere(live=False, generation=8)))

    def test_an_older_one_within_the_life_of_a_newer_one(self) -> None:
        newer, older = elsewhere("b", generation=8), elsewhere("a", generation=7)
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
            self.find(elsewhere(client_id=client_id), client_id)
        self.get("a")
        self.find(elsewhere(client_id="b"), "b")
        self.find(elsewhere(client_id="d"), "d")
        self.assertEqual([client_id for client_id in "abcd" if self.get(client_id)], ["a", "b", "d"])

    def test_drop(self) -> None:
        self.find(elsewhere())
        self.locations.drop("x")
        self.locations.drop("nobody")
        self.assertIsNone(self.locations.older("x"))

    def test_drop_node(self) -> None:
        for client_id, node_id in (("a", "one"), ("b", "two"), ("c", "one")):
            self.find(elsewhere(node_id, client_id), client_id)
        self.locations.drop_node("one")
        self.locations.drop_node("three")
        self.assertEqual([client_id for client_id in "abc" if self.locations.older(client_id)], ["b"])

    def test_missed(self) -> None:
        """Only what was meant is forgotten."""
        self.find(elsewhere(generation=8))
        self.locations.missed(elsewhere(generation=7))
        self.locations.missed(elsewhere(client_id="y"))
        self.assertEqual(self.get(), elsewhere(generation=8))
        self.locations.missed(elsewhere(generation=8))
        self.assertIsNone(self.locations.older("x"))

    def test_doubt(self) -> None:
        self.find(elsewhere(generation=8))
        self.locations.doubt(elsewhere(generation=7))
        self.locations.doubt(elsewhere(client_id="y"))
        self.assertEqual(self.get(), elsewhere(generation=8))
        self.locations.doubt(elsewhere(generation=8))
        self.assertEqual((self.get(), self.locations.older("x")), (None, elsewhere(generation=8)))

    def test_texts_of_a_node_are_shared(self) -> None:
        for client_id in "ab":
            fresh = "".join(["node-", "1"])
            self.find(Location(client_id, fresh, "n", "ws://p", 7, 0.0, "a"), client_id)
        first, second = self.get("a"), self.get("b")
        assert first is not None
        assert second is not None
        self.assertIs(first.node_id, second.node_id)

    @given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(("find", "get", "drop")))))
    def test_bounded(self, steps: list[tuple[str, str]]) -> None:
        """It is what a list would be that is kept in the order of use."""
        self.make()
        expected: list[str] = []
        for client_id, step in steps:
            used = step == "find" or (step == "get" and client_id in expected)
            if client_id in expected and (used or step == "drop"):
                expected.remove(client_id)
            if used:
                expected = [*expected, client_id][-3:]
            if step == "find":
                self.find(elsewhere(client_id=client_id), client_id)
            elif step == "get":
                self.assertEqual(self.get(client_id) is not None, used)
            else:
                self.locations.drop(client_id)
            self.assertEqual(list(self.locations._known), expected)


class LookUpTests(LocationsTestCase):
    def test_one_for_all(self) -> None:
        asked: Deferred[Location | None] = Deferred()
        waiting = [self.find(asked) for _ in range(3)]
        self.assertEqual(self.registry.asked, ["x"])
        asked.callback(elsewhere())
        self.assertEqual([self.successResultOf(each) for each in waiting], [elsewhere()] * 3)
        self.find(None)
        self.assertEqual(self.registry.asked, ["x", "x"])
        self.assert_idle()

    def test_afresh(self) -> None:
        """Not by a question that may be answered already; what that one brings is not kept."""
        first: Deferred[Location | None] = Deferred()
        second: Deferred[Location | None] = Deferred()
        old, new = self.find(first), self.find(second, afresh=True)
        self.assertEqual(self.registry.asked, ["x", "x"])
        joined = self.find(second)
        self.assertEqual(len(self.registry.asked), 2)
        second.callback(elsewhere("b", generation=8))
        first.callback(elsewhere("a", generation=9))
        self.assertEqual(self.successResultOf(old), elsewhere("a", generation=9))
        self.assertEqual(self.successResultOf(new), self.successResultOf(joined))
        self.assertEqual(self.get(), elsewhere("b", generation=8))
        self.assert_idle()

    def test_what_was_missed_meanwhile_is_not_kept(self) -> None:
        for forget in (
            lambda: self.locations.drop("x"),
            lambda: self.locations.missed(elsewhere()),
            lambda: self.locations.doubt(elsewhere()),
        ):
            asked: Deferred[Location | None] = Deferred()
            waiting = self.find(asked)
            forget()
            asked.callback(elsewhere())
            self.assertEqual(self.successResultOf(waiting), elsewhere())
            self.assertIsNone(self.get())
            self.assert_idle()

    def test_one_of_those_who_wait_goes(self) -> None:
        cancelled: list[object] = []
        asked: Deferred[Location | None] = Deferred(cancelled.append)
        first, second = self.find(asked), self.find(asked)
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertEqual(cancelled, [])
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.assertEqual(len(cancelled), 1)
        self.assertFalse(self.locations.away(self.clock.seconds()), "nobody asked for long")
        self.assert_idle()

    def test_time_out(self) -> None:
        waiting = self.find(Deferred())
        self.clock.advance(1)
        later = self.find(Deferred())
        self.clock.advance(LOOK_UP_TIMEOUT - 1.01)
        self.assertNoResult(waiting)
        self.clock.advance(0.01)
        self.failureResultOf(waiting, RegistryUnavailable)
        self.failureResultOf(later, RegistryUnavailable)
        self.assertTrue(self.locations.away(self.clock.seconds()))
        self.assert_idle()

    def test_failures(self) -> None:
        self.failureResultOf(self.find(RegistryUnavailable("gone")), RegistryUnavailable)
        self.failureResultOf(self.find(ZeroDivisionError()), RegistryUnavailable)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.registry.find = lambda client_id: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        self.failureResultOf(self.locations.find("x"), RegistryUnavailable)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_idle()


class AwayTests(LocationsTestCase):
    """The registry does not answer."""

    def setUp(self) -> None:
        super().setUp()
        self.find(elsewhere())
        self.clock.advance(LEASE)
        self.registry.asked.clear()

    def away(self) -> bool:
        return self.locations.away(self.clock.seconds())

    def go_away(self) -> None:
        self.failureResultOf(self.find(RegistryUnavailable("gone")), RegistryUnavailable)

    def test_older_ones_count(self) -> None:
        self.assertIsNone(self.get())
        self.go_away()
        self.assertTrue(self.away())
        self.assertEqual(self.get(), elsewhere())
        self.assertIsNone(self.get("nobody"))

    def test_until_it_answers(self) -> None:
        """About whomever it is asked."""
        self.go_away()
        self.find(None, "y")
        self.assertFalse(self.away())
        self.assertIsNone(self.get())

    def test_not_for_ever(self) -> None:
        self.go_away()
        self.clock.advance(AWAY)
        self.assertFalse(self.away())
        self.assertIsNone(self.get())

    def test_asked_again_while_older_ones_are_used(self) -> None:
        """Once a second, by whoever comes then, who need not wait for the answer."""
        self.go_away()
        self.clock.advance(PROBE_AGAIN - 0.01)
        self.get()
        self.assertEqual(len(self.registry.asked), 1)
        self.clock.advance(0.01)
        for _ in range(3):
            self.get()
        self.assertEqual(len(self.registry.asked), 2)
        self.registry.outcome = Deferred()
        self.clock.advance(PROBE_AGAIN)
        for _ in range(3):
            self.assertEqual(self.get(), elsewhere())
            self.clock.advance(1)
        self.assertEqual(len(self.registry.asked), 3, "one at a time")
        self.registry.outcome.callback(elsewhere(generation=8))
        self.assertFalse(self.away())
        self.assertEqual(self.get(), elsewhere(generation=8))
        self.assert_idle()

    def test_it_hangs(self) -> None:
        """It counts as away throughout, though every question takes its time."""
        self.registry.outcome = Deferred()
        failed = self.locations.find("x")
        self.clock.advance(LOOK_UP_TIMEOUT)
        self.failureResultOf(failed, RegistryUnavailable)
        for _ in range(100):
            self.registry.outcome = Deferred()
            self.assertEqual(self.get(), elsewhere())
            self.clock.advance(0.5)
        self.assertLess(len(self.registry.asked), 12)

    def test_nobody_waited_to_the_end(self) -> None:
        """But for long enough to know."""
        waiting = self.find(Deferred())
        self.clock.advance(PATIENCE)
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.assertTrue(self.away())
        self.assert_idle()
