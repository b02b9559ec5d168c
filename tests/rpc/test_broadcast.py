"""Tests for :mod:`gateway.rpc.broadcast`."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred

from gateway.protocol.errors import ErrorKind
from gateway.registry.interface import SessionKey
from gateway.rpc.broadcast import (
    IDS_PER_CLOCK_CHECK,
    MAX_BYTES_PER_SECOND,
    MAX_PAUSE,
    MAX_SLICE_BYTES,
    MAX_SLICE_CLIENTS,
    MAX_SLICE_TIME,
    MAX_UNSENT,
    MIN_ROOM,
    PAUSE_FACTOR,
    TIMER_RESOLUTION,
    UNSENT_TIMEOUT,
)
from tests.builders.dispatcher import MAX_MESSAGE_SIZE, DispatcherTestCase


class BroadcastTests(DispatcherTestCase):
    def test_prefix(self) -> None:
        for client_id in ("acme/1", "acme/2", "acm", "other/acme/", "acme/"):
            self.connect(client_id)
        self.assertEqual(self.successResultOf(self.dispatcher.notify_prefix("acme/", "m", None)), 3)
        self.assertCountEqual([to for to, _, _ in self.sessions.sent], ["acme/1", "acme/2", "acme/"])
        self.assertEqual(self.metrics.notifications, {"to_client": 3})
        self.assertEqual(self.successResultOf(self.dispatcher.notify_prefix("nobody", "m", None)), 0)
        self.assertEqual(self.successResultOf(self.dispatcher.notify_prefix("", "m", None)), 5)

    def test_superseded_client_is_skipped(self) -> None:
        """The node that it is connected to now notifies it; here it stays only for a call in flight."""
        self.connect("acme/1")
        _, call = self.start_call("acme/1")
        self.dispatcher.begin_goaway(SessionKey("acme/1", 1), True)
        self.assertEqual(self.successResultOf(self.dispatcher.notify_prefix("acme/", "m", None)), 1)
        self.dispatcher.client_superseded(SessionKey("acme/1", 2))
        self.assertEqual(self.successResultOf(self.dispatcher.notify_prefix("acme/", "m", None)), 0)
        self.disconnect("acme/1")
        self.assertEqual(self.dispatcher._superseded, set())
        self.error_of(call)

    def test_slices(self) -> None:
        """The reactor runs between them; clients that disconnect meanwhile are not counted."""
        for n in range(2 * MAX_SLICE_CLIENTS + 5):
            self.connect(f"c{n}")
        done = self.dispatcher.notify_prefix("c", "m", None)
        self.assertEqual(len(self.sessions.sent), MAX_SLICE_CLIENTS)
        self.assertNoResult(done)
        recipients, others = (
            self.sessions.sent[0][0],
            set(self.sessions.generations) - {to for to, _, _ in self.sessions.sent},
        )
        self.disconnect(recipients)
        self.disconnect(min(others))
        self.connect("c-late")
        pause = MAX_SLICE_CLIENTS * len(self.sessions.sent[0][2]) / MAX_BYTES_PER_SECOND
        self.clock.advance(pause)
        self.assertEqual(len(self.sessions.sent), 2 * MAX_SLICE_CLIENTS)
        self.clock.advance(pause)
        self.assertEqual(self.successResultOf(done), 2 * MAX_SLICE_CLIENTS + 4)
        self.assertEqual(others - set(self.recipients()), {min(others)})
        self.assertNotIn("c-late", self.recipients())
        self.assert_nothing_left()

    def recipients(self) -> list[str]:
        """Return the clients that got it, each once."""
        recipients = [to for to, _, _ in self.sessions.sent]
        self.assertEqual(len(set(recipients)), len(recipients))
        return recipients

    def test_cancel(self) -> None:
        for n in range(MAX_SLICE_CLIENTS + 1):
            self.connect(f"c{n}")
        done = self.dispatcher.notify_prefix("c", "m", None)
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.assert_nothing_left()
        self.assertEqual(len(self.sessions.sent), MAX_SLICE_CLIENTS)

    def test_slices_by_bytes(self) -> None:
        self.make(2 * MAX_SLICE_BYTES)
        for n in range(9):
            self.connect(f"c{n}")
        done = self.dispatcher.notify_prefix("c", "m", b'["%b"]' % (b"x" * (MAX_SLICE_BYTES // 3)))
        for sent in (3, 6):
            self.assertEqual(len(self.sessions.sent), sent)
            self.clock.advance(0.009)
            self.assertEqual(len(self.sessions.sent), sent)
            self.clock.advance(0.0011)
        self.assertEqual(len(self.sessions.sent), 9)
        self.assertEqual(self.successResultOf(done), 9)

    def broadcast_with_slow_readers(self, count: int = 4) -> Deferred[int]:
        """Each message is a slice of its own, and stays in the buffer."""
        self.make(2 * MAX_SLICE_BYTES)
        for n in range(count):
            self.connect(f"c{n}")

        def stays(client_id: str, payload: bytes) -> None:
            self.sessions.buffered_bytes += len(payload)

        self.sessions.on_send = stays
        return self.dispatcher.notify_prefix("c", "m", b'["%b"]' % (b"x" * MAX_SLICE_BYTES))

    def test_waits_for_slow_readers(self) -> None:
        done = self.broadcast_with_slow_readers()
        self.sessions.buffered_bytes = MAX_UNSENT
        self.clock.pump([0.011, 0.05, 0.05, 0.05])
        self.assertEqual(len(self.sessions.sent), 1)
        self.sessions.buffered_bytes = MAX_UNSENT - 1
        self.clock.advance(0.05)
        self.assertEqual(len(self.sessions.sent), 2)
        self.clock.advance(0.011)
        self.assertEqual(len(self.sessions.sent), 2)
        self.sessions.buffered_bytes = 0
        self.clock.pump([0.05, 0.011])
        self.assertEqual(self.successResultOf(done), 4)
        self.assert_nothing_left()

    def test_unsent_bytes_are_not_queried_while_there_is_room(self) -> None:
        """A query takes time linear in the number of clients."""
        many = 2 * (MAX_UNSENT // MAX_SLICE_BYTES)
        done = self.broadcast_with_slow_readers(many)
        self.sessions.on_send = lambda client_id, payload: None
        self.clock.pump([0.011] * many)
        self.assertEqual(self.successResultOf(done), many)
        self.assertIn(self.sessions.buffer_queries, (2, 3))

    def test_broadcasts_share_the_room(self) -> None:
        self.broadcast_with_slow_readers(MAX_UNSENT // MAX_SLICE_BYTES + 9)
        for _ in range(3):
            self.dispatcher.notify_prefix("c", "m", b'["%b"]' % (b"x" * MAX_SLICE_BYTES))
        self.clock.pump([0.011] * 70)
        self.assertLess(self.sessions.buffered_bytes, MAX_UNSENT + 5 * MAX_SLICE_BYTES)

    def test_continues_slowly_past_clients_that_do_not_read(self) -> None:
        """They may not stop it: it goes on, a number of bytes at a time."""
        at_a_time = MIN_ROOM // MAX_SLICE_BYTES
        done = self.broadcast_with_slow_readers(1 + 2 * at_a_time)
        self.sessions.buffered_bytes = 2 * MAX_UNSENT
        self.clock.advance(0.011)
        for sent in (1, 1 + at_a_time):
            for _ in range(round(UNSENT_TIMEOUT / 0.05) - 1):
                self.assertEqual(len(self.sessions.sent), sent)
                self.clock.advance(0.05)
            self.clock.pump([0.05, 0.05, *[0.011] * at_a_time])
        self.assertEqual(self.successResultOf(done), 1 + 2 * at_a_time)

    def test_small_notifications_wait_once_for_clients_that_do_not_read(self) -> None:
        for n in range(5 * MAX_SLICE_CLIENTS):
            self.connect(f"c{n}")
        self.sessions.buffered_bytes = 2 * MAX_UNSENT
        done = self.dispatcher.notify_prefix("c", "m", None)
        self.clock.pump([0.05] * (round(UNSENT_TIMEOUT / 0.05) + 10))
        self.assertEqual(self.successResultOf(done), 5 * MAX_SLICE_CLIENTS)

    def test_other_clients_cause_no_pause(self) -> None:
        for n in range(5 * MAX_SLICE_CLIENTS):
            self.connect(f"c{n}")
        self.sessions.buffered_bytes = 2 * MAX_UNSENT
        done = self.dispatcher.notify_prefix("d", "m", None)
        self.clock.pump([0.001] * 6)
        self.assertEqual(self.successResultOf(done), 0)

    def test_cancel_while_it_waits(self) -> None:
        done = self.broadcast_with_slow_readers()
        self.sessions.buffered_bytes = MAX_UNSENT
        self.clock.pump([0.011, 0.05])
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.assert_nothing_left()

    def test_too_large(self) -> None:
        error = self.error_of(self.dispatcher.notify_prefix("c", "m", b'["%b"]' % (b"x" * MAX_MESSAGE_SIZE)))
        self.assertEqual((error.kind, error.client_id), (ErrorKind.TOO_LARGE, None))


class PacingTests(DispatcherTestCase):
    """Time of slices and pauses"""

    def start(self, each: float, clients: int = 400) -> Deferred[int]:
        """Notify clients; sending to one takes that many seconds."""
        for n in range(clients):
            self.connect(f"c{n}")
        # Advance the time without calling timers.
        self.sessions.on_send = lambda client_id, payload: setattr(self.clock, "rightNow", self.clock.seconds() + each)
        return self.dispatcher.notify_prefix("c", "m", None)

    def pause(self) -> float:
        """Return the length of the next pause."""
        (call,) = self.clock.getDelayedCalls()
        return call.getTime() - self.clock.seconds()

    def test_pause_is_longer_than_the_slice(self) -> None:
        done = self.start(MAX_SLICE_TIME / 9.5)
        for slices in range(1, 40):
            self.assertEqual(len(self.sessions.sent), 10 * slices)
            self.assertAlmostEqual(self.pause(), 10 * MAX_SLICE_TIME / 9.5 * PAUSE_FACTOR)
            self.clock.advance(self.pause())
        self.assertEqual(self.successResultOf(done), 400)

    def test_client_that_takes_long(self) -> None:
        """Such as the first message to a parked client that must be woken for it."""
        done = self.start(0.01, 3)
        for sent in (1, 2):
            self.assertEqual(len(self.sessions.sent), sent)
            self.assertAlmostEqual(self.pause(), 0.01 * PAUSE_FACTOR)
            self.clock.advance(self.pause())
        self.assertEqual(self.successResultOf(done), 3)

    def test_pause_is_longer_while_the_reactor_is_late(self) -> None:
        self.start(MAX_SLICE_TIME * 2)
        for late, expected in (
            (0.004, 0.004),
            (0.006, 0.006),
            (9.0, MAX_PAUSE),
            (0.0, MAX_SLICE_TIME * 2 * PAUSE_FACTOR),
        ):
            self.clock.advance(self.pause() + late + TIMER_RESOLUTION)
            self.assertAlmostEqual(self.pause(), expected)

    def test_clock_that_goes_back(self) -> None:
        done = self.start(-1.0)
        self.assertEqual(len(self.sessions.sent), MAX_SLICE_CLIENTS)
        self.assertGreaterEqual(self.pause(), 0)
        self.clock.advance(self.pause())
        self.assertEqual(self.successResultOf(done), 400)

    def test_other_clients_take_time_too(self) -> None:
        """There may be a million of them."""
        for n in range(10 * IDS_PER_CLOCK_CHECK):
            self.connect(f"c{n}")
        now = self.clock.seconds

        def seconds() -> float:
            self.clock.rightNow += MAX_SLICE_TIME / 3
            return now()

        self.patch(self.clock, "seconds", seconds)
        done = self.dispatcher.notify_prefix("d", "m", None)
        self.assertNoResult(done)
        rests = 0
        while not done.called:
            rests += 1
            self.clock.advance(MAX_SLICE_TIME * PAUSE_FACTOR)
        self.assertGreater(rests, 2)
        self.assertEqual(self.successResultOf(done), 0)
