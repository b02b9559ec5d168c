"""Tests for :mod:`gateway.rpc.pending`."""

from __future__ import annotations

import uuid

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.rpc.pending import PendingCalls, Reply, random_uuids

REPLY = Reply(b"1", None)
TICK = 0.05


def lost(client_id: str) -> RpcError:
    return RpcError(ErrorKind.CONNECTION_LOST, client_id)


class PendingCallsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.pending = PendingCalls(self.clock, max_calls=10, max_per_owner=4, tick=TICK)

    def assert_idle(self) -> None:
        """Assert that nothing is left of any call: neither a timer nor an entry."""
        self.assertEqual(len(self.pending), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual((self.pending._calls, self.pending._owners, self.pending._slots), ({}, {}, {}))

    def error_of(self, call: Deferred[Reply]) -> RpcError:
        error = self.failureResultOf(call, RpcError).value
        assert isinstance(error, RpcError)
        return error

    def test_uuid_version_4(self) -> None:
        made = random_uuids()
        texts = {next(made) for _ in range(1000)}
        self.assertEqual(len(texts), 1000)
        for text in texts:
            parsed = uuid.UUID(text)
            self.assertEqual((str(parsed), parsed.version, parsed.variant), (text, 4, uuid.RFC_4122))

    def test_resolve(self) -> None:
        id, call = self.pending.add("a", "x", 5)
        self.assertNoResult(call)
        self.assertTrue(self.pending.resolve("a", id, REPLY))
        self.assertIs(self.successResultOf(call), REPLY)
        self.assert_idle()

    def test_resolve_twice(self) -> None:
        id, call = self.pending.add("a", "x", 5)
        self.pending.resolve("a", id, REPLY)
        self.assertFalse(self.pending.resolve("a", id, Reply(b"2", None)))
        self.assertIs(self.successResultOf(call), REPLY)

    def test_unknown(self) -> None:
        self.assertFalse(self.pending.resolve("a", "nothing", REPLY))
        self.assertFalse(self.pending.fail("a", "nothing", lost("x")))

    def test_another_owner(self) -> None:
        id, call = self.pending.add(("x", 1), "x", 5)
        for owner in (("x", 2), ("y", 1), "x"):
            self.assertFalse(self.pending.resolve(owner, id, REPLY))
            self.assertFalse(self.pending.fail(owner, id, lost("x")))
            self.assertEqual(self.pending.fail_owner(owner, lost), 0)
        self.assertNoResult(call)
        self.assertEqual(len(self.pending), 1)
        self.assertTrue(self.pending.resolve(("x", 1), id, REPLY))
        self.successResultOf(call)

    def test_fail(self) -> None:
        id, call = self.pending.add("a", "x", 5)
        error = lost("x")
        self.assertTrue(self.pending.fail("a", id, error))
        self.assertIs(self.error_of(call), error)
        self.assert_idle()

    def test_timeout(self) -> None:
        id, call = self.pending.add("a", "x", 5)
        self.clock.advance(4.99)
        self.assertNoResult(call)
        self.clock.advance(0.02)
        error = self.error_of(call)
        self.assertEqual((error.kind, error.client_id, error.sent), (ErrorKind.TIMEOUT, "x", True))
        self.assertFalse(self.pending.resolve("a", id, REPLY))
        self.assert_idle()

    def test_cancel(self) -> None:
        id, call = self.pending.add("a", "x", 5)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.assertFalse(self.pending.resolve("a", id, REPLY))
        self.assert_idle()

    def test_one_timer(self) -> None:
        calls = [self.pending.add("ab"[n % 2], "x", 1 + n) for n in range(8)]
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.clock.pump([0.5] * 3)
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.assertEqual(len(self.pending), 7)
        self.error_of(calls[0][1])
        for n, (id, _) in enumerate(calls):
            self.pending.resolve("ab"[n % 2], id, REPLY)
        self.assert_idle()

    def test_completed_calls_leave_the_wheel(self) -> None:
        """Nothing of a call with a far deadline is kept once it is completed."""
        kept, _ = self.pending.add("a", "x", 300)
        for _ in range(1000):
            id, _call = self.pending.add("b", "x", 300)
            self.pending.resolve("b", id, REPLY)
        self.assertEqual(sum(map(len, self.pending._slots.values())), 1)
        self.assertEqual(list(self.pending._owners), ["a"])
        self.pending.resolve("a", kept, REPLY)
        self.assert_idle()

    def test_in_flight(self) -> None:
        first, _ = self.pending.add("a", "x", 5)
        self.pending.add("a", "x", 5)
        self.pending.add("b", "y", 5)
        self.assertEqual((self.pending.in_flight("a"), self.pending.in_flight("b")), (2, 1))
        self.pending.resolve("a", first, REPLY)
        self.assertEqual((self.pending.in_flight("a"), self.pending.in_flight("c")), (1, 0))
        self.assertEqual(len(self.pending), 2)

    def test_too_many_for_an_owner(self) -> None:
        first, _ = self.pending.add("a", "x", 5)
        for _ in range(3):
            self.pending.add("a", "x", 5)
        with self.assertRaises(RpcError) as caught:
            self.pending.add("a", "x", 5)
        self.assertEqual((caught.exception.kind, caught.exception.client_id), (ErrorKind.TOO_MANY_CALLS, "x"))
        self.assertFalse(caught.exception.sent)
        self.pending.add("b", "x", 5)
        self.pending.resolve("a", first, REPLY)
        self.pending.add("a", "x", 5)

    def test_too_many_in_all(self) -> None:
        ids = [(owner, self.pending.add(owner, "x", 5)[0]) for owner in "aaabbbccdd"]
        with self.assertRaises(RpcError) as caught:
            self.pending.add("e", "x", 5)
        self.assertEqual(caught.exception.kind, ErrorKind.TOO_MANY_CALLS)
        for owner, id in ids:
            self.pending.resolve(owner, id, REPLY)
        self.assert_idle()

    def test_fail_owner(self) -> None:
        calls = [self.pending.add("a", client, 5)[1] for client in "xyz"]
        _, other = self.pending.add("b", "x", 5)
        self.assertEqual(self.pending.fail_owner("a", lost), 3)
        self.assertEqual([self.error_of(call).client_id for call in calls], ["x", "y", "z"])
        self.assertNoResult(other)
        self.assertEqual(self.pending.fail_owner("a", lost), 0)
        self.assertEqual(self.pending.fail_owner("b", lost), 1)
        self.error_of(other)
        self.assert_idle()

    def test_reentrancy(self) -> None:
        """The callback of a failed call may start a call at once, or cancel other calls."""
        _, first = self.pending.add("a", "x", 5)
        _, second = self.pending.add("a", "x", 5)
        again = []

        def call_again(failure: object) -> None:
            second.cancel()
            again.append(self.pending.add("a", "x", 5))

        first.addErrback(call_again)
        self.assertEqual(self.pending.fail_owner("a", lost), 1)
        self.failureResultOf(second, CancelledError)
        self.assertEqual(self.pending.in_flight("a"), 1)
        again[0][1].addErrback(call_again)
        self.clock.advance(5 + TICK)
        self.assertEqual((len(again), len(self.pending)), (2, 1))
        self.assertNoResult(again[1][1])
        self.clock.advance(5 + TICK)
        self.error_of(again[1][1])
        self.assert_idle()

    def test_failure_that_cancels_a_later_call(self) -> None:
        """Both are due in the same iteration, at different ticks."""
        _, first = self.pending.add("a", "x", 1)
        _, second = self.pending.add("a", "x", 2)
        first.addErrback(lambda _: second.cancel())
        self.clock.advance(5)
        self.failureResultOf(second, CancelledError)
        self.assert_idle()

    def test_clock_that_jumps(self) -> None:
        _, call = self.pending.add("a", "x", 5)
        self.clock.advance(1e9)
        self.error_of(call)
        _, call = self.pending.add("a", "x", 5)
        self.clock.advance(5 + TICK)
        self.error_of(call)
        self.assert_idle()

    def test_timeout_of_zero(self) -> None:
        for timeout in (0, -1):
            _, call = self.pending.add("a", "x", timeout)
            self.assertNoResult(call)
            self.clock.advance(TICK)
            self.assertEqual(self.error_of(call).kind, ErrorKind.TIMEOUT)
        self.assert_idle()

    @settings(deadline=None, max_examples=100)
    @given(
        st.sampled_from([0.0, 0.1, 1.7e9]),
        st.lists(st.tuples(st.floats(0, 0.3), st.floats(0.01, 3)), min_size=1, max_size=10),
        st.floats(0.001, 0.2),
    )
    def test_never_early_and_at_most_a_tick_late(
        self, start: float, calls: list[tuple[float, float]], step: float
    ) -> None:
        clock = Clock()
        clock.advance(start)
        pending = PendingCalls(clock, max_calls=10, max_per_owner=10, tick=TICK)
        over: dict[int, float] = {}
        deadlines = {}
        for n, (pause, timeout) in enumerate(calls):
            clock.advance(pause)
            deadlines[n] = clock.seconds() + timeout
            _, call = pending.add("a", "x", timeout)
            call.addErrback(lambda _, n=n: over.__setitem__(n, clock.seconds()))
        # As in a reactor: the timer runs when it is due, with other events in between.
        while timers := clock.getDelayedCalls():
            self.assertEqual(len(timers), 1)
            clock.advance(max(0.0, min(step, timers[0].getTime() - clock.seconds())))
        # 2**-22 s is the resolution of a float that holds the present time.
        slack = 1e-6
        for n, deadline in deadlines.items():
            late = over[n] - deadline
            self.assertTrue(late >= -slack, (n, late))
            # Calls were added, and the clock moved on, in steps of up to 0.3 s before the timer could run.
            if deadline >= deadlines[len(calls) - 1] - calls[-1][1]:
                self.assertTrue(late <= TICK + slack, (n, late))
        self.assertEqual(len(pending), 0)
