"""Tests for :mod:`gateway.rpc.broadcast`."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred

from gateway.protocol.errors import Kind
from gateway.rpc.broadcast import (
    LEAST_ROOM,
    LONGEST_REST,
    LONGEST_WAIT,
    LOOKED_AT,
    MAX_UNSENT,
    PACE,
    REST,
    SLICE,
    SLICE_BYTES,
    SLICE_CLIENTS,
    TIMER_STEP,
)
from tests.rpc.fakes import MAX_MESSAGE_SIZE, HubTestCase


class PrefixTests(HubTestCase):
    def test_prefix(self) -> None:
        for client_id in ("acme/1", "acme/2", "acm", "other/acme/", "acme/"):
            self.connect(client_id)
        self.assertEqual(self.successResultOf(self.hub.notify_prefix("acme/", "m", None)), 3)
        self.assertCountEqual([to for to, _, _ in self.edge.sent], ["acme/1", "acme/2", "acme/"])
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
        for n in range(2 * SLICE_CLIENTS + 5):
            self.connect(f"c{n}")
        done = self.hub.notify_prefix("c", "m", None)
        self.assertEqual(len(self.edge.sent), SLICE_CLIENTS)
        self.assertNoResult(done)
        told, untold = self.edge.sent[0][0], set(self.edge.generations) - {to for to, _, _ in self.edge.sent}
        self.disconnect(told)
        self.disconnect(min(untold))
        self.connect("c-late")
        pause = SLICE_CLIENTS * len(self.edge.sent[0][2]) / PACE
        self.clock.advance(pause)
        self.assertEqual(len(self.edge.sent), 2 * SLICE_CLIENTS)
        self.clock.advance(pause)
        self.assertEqual(self.successResultOf(done), 2 * SLICE_CLIENTS + 4)
        self.assertEqual(untold - set(self.told()), {min(untold)})
        self.assertNotIn("c-late", self.told())
        self.assert_nothing_left()

    def told(self) -> list[str]:
        """Who got it, each once."""
        told = [to for to, _, _ in self.edge.sent]
        self.assertEqual(len(set(told)), len(told))
        return told

    def test_prefix_can_be_cancelled(self) -> None:
        for n in range(SLICE_CLIENTS + 1):
            self.connect(f"c{n}")
        done = self.hub.notify_prefix("c", "m", None)
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.assert_nothing_left()
        self.assertEqual(len(self.edge.sent), SLICE_CLIENTS)

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
        for n in range(5 * SLICE_CLIENTS):
            self.connect(f"c{n}")
        self.edge.waiting = 2 * MAX_UNSENT
        done = self.hub.notify_prefix("c", "m", None)
        self.clock.pump([0.05] * (round(LONGEST_WAIT / 0.05) + 10))
        self.assertEqual(self.successResultOf(done), 5 * SLICE_CLIENTS)

    def test_those_whom_it_is_not_for_cost_no_wait(self) -> None:
        for n in range(5 * SLICE_CLIENTS):
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


class PaceTests(HubTestCase):
    """How long it works, and how long it rests, as the clock has it."""

    def start(self, each: float, clients: int = 400) -> Deferred[int]:
        """Notify clients; to send to one takes so many seconds."""
        for n in range(clients):
            self.connect(f"c{n}")
        # Time passes, but nothing else happens meanwhile.
        self.edge.on_send = lambda client_id, payload: setattr(self.clock, "rightNow", self.clock.seconds() + each)
        return self.hub.notify_prefix("c", "m", None)

    def rest(self) -> float:
        """How long it is going to rest."""
        (call,) = self.clock.getDelayedCalls()
        return call.getTime() - self.clock.seconds()

    def test_it_works_for_a_moment_and_rests_for_longer(self) -> None:
        done = self.start(SLICE / 9.5)
        for slices in range(1, 40):
            self.assertEqual(len(self.edge.sent), 10 * slices)
            self.assertAlmostEqual(self.rest(), 10 * SLICE / 9.5 * REST)
            self.clock.advance(self.rest())
        self.assertEqual(self.successResultOf(done), 400)

    def test_one_that_takes_long(self) -> None:
        """Such as the first message to a client that must be woken for it."""
        done = self.start(0.01, 3)
        for sent in (1, 2):
            self.assertEqual(len(self.edge.sent), sent)
            self.assertAlmostEqual(self.rest(), 0.01 * REST)
            self.clock.advance(self.rest())
        self.assertEqual(self.successResultOf(done), 3)

    def test_it_rests_longer_while_the_node_is_behind(self) -> None:
        self.start(SLICE * 2)
        for late, expected in ((0.004, 0.004), (0.006, 0.006), (9.0, LONGEST_REST), (0.0, SLICE * 2 * REST)):
            self.clock.advance(self.rest() + late + TIMER_STEP)
            self.assertAlmostEqual(self.rest(), expected)

    def test_a_clock_that_goes_back(self) -> None:
        done = self.start(-1.0)
        self.assertEqual(len(self.edge.sent), SLICE_CLIENTS)
        self.assertGreaterEqual(self.rest(), 0)
        self.clock.advance(self.rest())
        self.assertEqual(self.successResultOf(done), 400)

    def test_those_whom_it_is_not_for_take_time_as_well(self) -> None:
        """There may be a million of them."""
        for n in range(10 * LOOKED_AT):
            self.connect(f"c{n}")
        now = self.clock.seconds

        def seconds() -> float:
            self.clock.rightNow += SLICE / 3
            return now()

        self.patch(self.clock, "seconds", seconds)
        done = self.hub.notify_prefix("d", "m", None)
        self.assertNoResult(done)
        rests = 0
        while not done.called:
            rests += 1
            self.clock.advance(SLICE * REST)
        self.assertGreater(rests, 2)
        self.assertEqual(self.successResultOf(done), 0)
