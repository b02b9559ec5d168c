"""Tests of gateway.clients.table: when awake connections are looked at."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.interface import Session
from gateway.clients.table import IDLE_CHECK_BATCH, IDLE_CHECK_INTERVAL, IdleDetector


class IdleDetectorTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.checked: list[str] = []
        self.busy: set[str] = set()
        self.detector = IdleDetector(self.clock, self.park)
        self.one, self.two = Session("one", "unix"), Session("two", "unix")

    def park(self, session: Session) -> bool:
        self.checked.append(session.client_id)
        if session.client_id == "broken":
            raise ZeroDivisionError
        return session.client_id not in self.busy

    def advance(self, seconds: float) -> list[str]:
        """Who was looked at meanwhile."""
        self.checked.clear()
        self.clock.advance(seconds)
        return list(self.checked)

    def timers(self) -> int:
        return len(self.clock.getDelayedCalls())

    def test_in_the_next_turn(self) -> None:
        self.detector.watch(self.one)
        self.detector.watch(self.two)
        self.detector.watch(self.one)
        self.assertEqual(self.checked, [])
        self.assertEqual(self.timers(), 1)
        self.assertEqual(self.advance(0), ["one", "two"])
        self.assertEqual(self.timers(), 0)
        self.assertEqual(self.advance(10), [])

    def test_later_again(self) -> None:
        self.busy = {"one"}
        self.detector.watch(self.one)
        self.detector.watch(self.two)
        self.assertEqual(self.advance(0), ["one", "two"])
        for _ in range(3):
            self.assertEqual(self.advance(IDLE_CHECK_INTERVAL - 0.01), [])
            self.assertEqual(self.advance(0.01), ["one"])
        self.busy.clear()
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])
        self.assertEqual(self.timers(), 0)

    def test_many_are_looked_at_in_slices(self) -> None:
        clients = [Session(f"c{number}", "unix") for number in range(IDLE_CHECK_BATCH * 2 + 1)]
        self.busy = {client.client_id for client in clients}
        for client in clients:
            self.detector.watch(client)
        self.advance(0)
        turns: list[int] = []
        look = self.detector._recheck_busy

        def turn() -> None:
            before = len(self.checked)
            look()
            turns.append(len(self.checked) - before)

        self.detector._recheck_busy = turn  # type: ignore[method-assign]
        self.advance(IDLE_CHECK_INTERVAL)
        self.busy.clear()
        self.advance(IDLE_CHECK_INTERVAL)
        # The first one was set before.
        self.assertEqual(turns, [IDLE_CHECK_BATCH, 1, IDLE_CHECK_BATCH, IDLE_CHECK_BATCH, 1])
        self.assertEqual(self.timers(), 0)

    def test_one_timer_for_all(self) -> None:
        clients = [Session(f"c{number}", "unix") for number in range(20)]
        self.busy = {client.client_id for client in clients}
        for client in clients:
            self.detector.watch(client)
            self.clock.advance(0)
        self.assertEqual(self.timers(), 1)
        self.assertEqual(len(self.advance(IDLE_CHECK_INTERVAL)), 20)
        self.assertEqual(self.timers(), 1)

    def test_rested(self) -> None:
        """It is looked at in the next turn again, if it waits to be."""
        self.busy = {"one"}
        self.detector.watch(self.one)
        self.detector.on_idle(self.two)
        self.assertEqual(self.advance(0), ["one"])
        self.busy.clear()
        self.detector.on_idle(self.one)
        self.detector.on_idle(self.one)
        self.assertEqual(self.advance(0), ["one"])
        self.detector.on_idle(self.one)
        self.assertEqual(self.advance(10), [])
        self.assertEqual(self.timers(), 0)

    def test_rested_while_it_lingers(self) -> None:
        """Its time is not up."""
        self.busy = {"one"}
        self.one.idle_before_park = 1.0
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.on_idle(self.one)
        self.assertEqual(self.advance(0), [])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])

    def test_watched_again(self) -> None:
        """It is looked at once, not twice."""
        self.busy = {"one"}
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.watch(self.one)
        self.assertEqual(self.advance(0), ["one"])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])

    def test_discard(self) -> None:
        self.busy = {"two"}
        self.detector.watch(self.one)
        self.detector.watch(self.two)
        self.detector.discard(self.one)
        self.detector.discard(self.one)
        self.assertEqual(self.advance(0), ["two"])
        self.detector.discard(self.two)
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), [])
        self.detector.on_idle(self.two)
        self.assertEqual(self.advance(10), [])
        self.assertEqual(self.timers(), 0)

    def test_watched_while_they_are_looked_at(self) -> None:
        """One that is woken meanwhile is not forgotten."""
        self.detector = IdleDetector(self.clock, lambda client: (self.park(client), self.again(client))[0])
        self.detector.watch(self.one)
        self.assertEqual(self.advance(0), ["one", "two"])
        self.assertEqual(self.timers(), 0)

    def again(self, session: Session) -> None:
        if session is self.one:
            self.detector.watch(self.two)

    def test_parked_while_the_others_are_looked_at(self) -> None:
        self.busy = {"one", "two"}
        self.detector = IdleDetector(self.clock, lambda client: (self.detector.discard(self.two), self.park(client))[1])
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.watch(self.two)
        self.clock.advance(0)
        self.assertIn("one", self.advance(IDLE_CHECK_INTERVAL))
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])

    def test_error(self) -> None:
        """The others do not suffer; it is looked at again, like one that is busy."""
        broken = Session("broken", "unix")
        for client in (broken, self.one):
            self.detector.watch(client)
        self.assertEqual(self.advance(0), ["broken", "one"])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["broken"])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["broken"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_stop(self) -> None:
        self.busy = {"one"}
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.watch(self.two)
        self.assertEqual(self.timers(), 2)
        self.detector.stop()
        self.detector.stop()
        self.assertEqual(self.timers(), 0)
