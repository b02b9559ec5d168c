"""Tests for :mod:`gateway.rpc.spreading`."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred

from gateway.rpc.errors import Kind
from gateway.rpc.spreading import LEAST_ROOM, LONGEST_WAIT, MAX_UNSENT, PACE, SLICE, SLICE_BYTES
from tests.rpc.fakes import MAX_MESSAGE_SIZE, HubTestCase


class PrefixTests(HubTestCase):
    def test_prefix(self) -> None:
        for client_id in ("acme/1", "acme/2", "acm", "other/acme/", "acme/"):
            self.connect(client_id)
        self.assertEqual(self.successResultOf(self.hub.notify_prefix("acme/", "m", None)), 3)
        self.assertEqual([to for to, _, _ in self.edge.sent], ["acme/1", "acme/2", "acme/"])
        self.assertEqual(self.metrics.notifications, {"to_client": 3})
        self.assertEqual(self.successResultOf(self.hub.notify_prefix("nobody", "m", None)), 0)
        self.assertEqual(self.successResultOf(self.hub.notify_prefix("", "m", None)), 5)

    def test_a_client_that_is_at_two_nodes_is_told_once(self) -> None:
        """By the one that it went to; it stays at this one for the call that it has."""
        self.connect("acme/1")
        _, call = self.ask("acme/1")
        self.hub.let_go("acme/1", 1, True)
        self.assertEqual(self.successResultOf(self.hub.notify_prefix("acme/", "m", None)), 1)
        self.hub.client_superseded("acme/1", 2)
        self.assertEqual(self.successResultOf(self.hub.notify_prefix("acme/", "m", None)), 0)
        self.disconnect("acme/1")
        self.assertEqual(self.hub._superseded, set())
        self.error_of(call)

    def test_prefix_goes_in_slices(self) -> None:
        """Between them the reactor gets its turn; who leaves meanwhile is not counted."""
        for n in range(2 * SLICE + 5):
            self.connect(f"c{n}")
        done = self.hub.notify_prefix("c", "m", None)
        self.assertEqual(len(self.edge.sent), SLICE)
        self.assertNoResult(done)
        self.disconnect("c0")
        self.disconnect(f"c{SLICE}")
        self.connect("c-late")
        pause = SLICE * len(self.edge.sent[0][2]) / PACE
        self.clock.advance(pause)
        self.assertEqual(len(self.edge.sent), 2 * SLICE - 1)
        self.clock.advance(pause)
        self.assertEqual(self.successResultOf(done), 2 * SLICE + 4)
        self.assert_nothing_left()

    def test_prefix_can_be_cancelled(self) -> None:
        for n in range(SLICE + 1):
            self.connect(f"c{n}")
        done = self.hub.notify_prefix("c", "m", None)
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.assert_nothing_left()
        self.assertEqual(len(self.edge.sent), SLICE)

    def test_prefix_goes_in_slices_of_bytes(self) -> None:
        self.make(2 * SLICE_BYTES)
        for n in range(9):
            self.connect(f"c{n}")
        done = self.hub.notify_prefix("c", "m", b'["%b"]' % (b"x" * (SLICE_BYTES // 3)))
        for sent in (3, 6):
            self.assertEqual(len(self.edge.sent), sent)
            self.clock.advance(0.009)
            self.assertEqual(len(self.edge.sent), sent)
            self.clock.advance(0.0011)
        self.assertEqual(len(self.edge.sent), 9)
        self.assertEqual(self.successResultOf(done), 9)

    def slow(self, count: int = 4) -> Deferred[int]:
        """Each message is a slice of its own, and stays where it is."""
        self.make(2 * SLICE_BYTES)
        for n in range(count):
            self.connect(f"c{n}")

        def stays(client_id: str, payload: bytes) -> None:
            self.edge.waiting += len(payload)

        self.edge.on_send = stays
        return self.hub.notify_prefix("c", "m", b'["%b"]' % (b"x" * SLICE_BYTES))

    def test_prefix_waits_for_slow_readers(self) -> None:
        done = self.slow()
        self.edge.waiting = MAX_UNSENT
        self.clock.pump([0.011, 0.05, 0.05, 0.05])
        self.assertEqual(len(self.edge.sent), 1)
        self.edge.waiting = MAX_UNSENT - 1
        self.clock.advance(0.05)
        self.assertEqual(len(self.edge.sent), 2)
        self.clock.advance(0.011)
        self.assertEqual(len(self.edge.sent), 2)
        self.edge.waiting = 0
        self.clock.pump([0.05, 0.011])
        self.assertEqual(self.successResultOf(done), 4)
        self.assert_nothing_left()

    def test_prefix_takes_no_look_while_there_is_room(self) -> None:
        """There are many clients to look at."""
        many = 2 * (MAX_UNSENT // SLICE_BYTES)
        done = self.slow(many)
        self.edge.on_send = lambda client_id, payload: None
        self.clock.pump([0.011] * many)
        self.assertEqual(self.successResultOf(done), many)
        self.assertIn(self.edge.looks, (2, 3))

    def test_prefixes_share_the_room(self) -> None:
        self.slow(MAX_UNSENT // SLICE_BYTES + 9)
        for _ in range(3):
            self.hub.notify_prefix("c", "m", b'["%b"]' % (b"x" * SLICE_BYTES))
        self.clock.pump([0.011] * 70)
        self.assertLess(self.edge.waiting, MAX_UNSENT + 5 * SLICE_BYTES)

    def test_prefix_goes_on_slowly_past_those_who_do_not_read(self) -> None:
        """They may not stop it: it goes on, so many bytes at a time."""
        at_a_time = LEAST_ROOM // SLICE_BYTES
        done = self.slow(1 + 2 * at_a_time)
        self.edge.waiting = 2 * MAX_UNSENT
        self.clock.advance(0.011)
        for sent in (1, 1 + at_a_time):
            for _ in range(round(LONGEST_WAIT / 0.05) - 1):
                self.assertEqual(len(self.edge.sent), sent)
                self.clock.advance(0.05)
            self.clock.pump([0.05, 0.05, *[0.011] * at_a_time])
        self.assertEqual(self.successResultOf(done), 1 + 2 * at_a_time)

    def test_small_notifications_wait_once_for_those_who_do_not_read(self) -> None:
        for n in range(5 * SLICE):
            self.connect(f"c{n}")
        self.edge.waiting = 2 * MAX_UNSENT
        done = self.hub.notify_prefix("c", "m", None)
        self.clock.pump([0.05] * (round(LONGEST_WAIT / 0.05) + 10))
        self.assertEqual(self.successResultOf(done), 5 * SLICE)

    def test_those_whom_it_is_not_for_cost_no_wait(self) -> None:
        for n in range(5 * SLICE):
            self.connect(f"c{n}")
        self.edge.waiting = 2 * MAX_UNSENT
        done = self.hub.notify_prefix("d", "m", None)
        self.clock.pump([0.001] * 6)
        self.assertEqual(self.successResultOf(done), 0)

    def test_prefix_can_be_cancelled_while_it_waits(self) -> None:
        done = self.slow()
        self.edge.waiting = MAX_UNSENT
        self.clock.pump([0.011, 0.05])
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.assert_nothing_left()

    def test_prefix_too_large(self) -> None:
        error = self.error_of(self.hub.notify_prefix("c", "m", b'["%b"]' % (b"x" * MAX_MESSAGE_SIZE)))
        self.assertEqual((error.kind, error.client_id), (Kind.TOO_LARGE, None))
