"""Tests of gateway.clients.table: when awake connections are looked at."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.interface import Client
from gateway.clients.table import LOOK_AGAIN, SLICE, QuietWatch


class QuietWatchTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.looked: list[str] = []
        self.busy: set[str] = set()
        self.watch = QuietWatch(self.clock, self.park)
        self.one, self.two = Client("one", "unix"), Client("two", "unix")

    def park(self, client: Client) -> bool:
        self.looked.append(client.client_id)
        if client.client_id == "broken":
            raise ZeroDivisionError
        return client.client_id not in self.busy

    def looks(self, seconds: float) -> list[str]:
        """Who was looked at meanwhile."""
        self.looked.clear()
        self.clock.advance(seconds)
        return list(self.looked)

    def timers(self) -> int:
        return len(self.clock.getDelayedCalls())

    def test_in_the_next_turn(self) -> None:
        self.watch.watch(self.one)
        self.watch.watch(self.two)
        self.watch.watch(self.one)
        self.assertEqual(self.looked, [])
        self.assertEqual(self.timers(), 1)
        self.assertEqual(self.looks(0), ["one", "two"])
        self.assertEqual(self.timers(), 0)
        self.assertEqual(self.looks(10), [])

    def test_later_again(self) -> None:
        self.busy = {"one"}
        self.watch.watch(self.one)
        self.watch.watch(self.two)
        self.assertEqual(self.looks(0), ["one", "two"])
        for _ in range(3):
            self.assertEqual(self.looks(LOOK_AGAIN - 0.01), [])
            self.assertEqual(self.looks(0.01), ["one"])
        self.busy.clear()
        self.assertEqual(self.looks(LOOK_AGAIN), ["one"])
        self.assertEqual(self.timers(), 0)

    def test_many_are_looked_at_in_slices(self) -> None:
        clients = [Client(f"c{number}", "unix") for number in range(SLICE * 2 + 1)]
        self.busy = {client.client_id for client in clients}
        for client in clients:
            self.watch.watch(client)
        self.looks(0)
        turns: list[int] = []
        look = self.watch._look_later

        def turn() -> None:
            before = len(self.looked)
            look()
            turns.append(len(self.looked) - before)

        self.watch._look_later = turn  # type: ignore[method-assign]
        self.looks(LOOK_AGAIN)
        self.busy.clear()
        self.looks(LOOK_AGAIN)
        # The first one was set before.
        self.assertEqual(turns, [SLICE, 1, SLICE, SLICE, 1])
        self.assertEqual(self.timers(), 0)

    def test_one_timer_for_all(self) -> None:
        clients = [Client(f"c{number}", "unix") for number in range(20)]
        self.busy = {client.client_id for client in clients}
        for client in clients:
            self.watch.watch(client)
            self.clock.advance(0)
        self.assertEqual(self.timers(), 1)
        self.assertEqual(len(self.looks(LOOK_AGAIN)), 20)
        self.assertEqual(self.timers(), 1)

    def test_rested(self) -> None:
        """It is looked at in the next turn again, if it waits to be."""
        self.busy = {"one"}
        self.watch.watch(self.one)
        self.watch.rested(self.two)
        self.assertEqual(self.looks(0), ["one"])
        self.busy.clear()
        self.watch.rested(self.one)
        self.watch.rested(self.one)
        self.assertEqual(self.looks(0), ["one"])
        self.watch.rested(self.one)
        self.assertEqual(self.looks(10), [])
        self.assertEqual(self.timers(), 0)

    def test_rested_while_it_lingers(self) -> None:
        """Its time is not up."""
        self.busy = {"one"}
        self.one.linger = 1.0
        self.watch.watch(self.one)
        self.clock.advance(0)
        self.watch.rested(self.one)
        self.assertEqual(self.looks(0), [])
        self.assertEqual(self.looks(LOOK_AGAIN), ["one"])

    def test_watched_again(self) -> None:
        """It is looked at once, not twice."""
        self.busy = {"one"}
        self.watch.watch(self.one)
        self.clock.advance(0)
        self.watch.watch(self.one)
        self.assertEqual(self.looks(0), ["one"])
        self.assertEqual(self.looks(LOOK_AGAIN), ["one"])

    def test_discard(self) -> None:
        self.busy = {"two"}
        self.watch.watch(self.one)
        self.watch.watch(self.two)
        self.watch.discard(self.one)
        self.watch.discard(self.one)
        self.assertEqual(self.looks(0), ["two"])
        self.watch.discard(self.two)
        self.assertEqual(self.looks(LOOK_AGAIN), [])
        self.watch.rested(self.two)
        self.assertEqual(self.looks(10), [])
        self.assertEqual(self.timers(), 0)

    def test_watched_while_they_are_looked_at(self) -> None:
        """One that is woken meanwhile is not forgotten."""
        self.watch = QuietWatch(self.clock, lambda client: (self.park(client), self.again(client))[0])
        self.watch.watch(self.one)
        self.assertEqual(self.looks(0), ["one", "two"])
        self.assertEqual(self.timers(), 0)

    def again(self, client: Client) -> None:
        if client is self.one:
            self.watch.watch(self.two)

    def test_parked_while_the_others_are_looked_at(self) -> None:
        self.busy = {"one", "two"}
        self.watch = QuietWatch(self.clock, lambda client: (self.watch.discard(self.two), self.park(client))[1])
        self.watch.watch(self.one)
        self.clock.advance(0)
        self.watch.watch(self.two)
        self.clock.advance(0)
        self.assertIn("one", self.looks(LOOK_AGAIN))
        self.assertEqual(self.looks(LOOK_AGAIN), ["one"])

    def test_error(self) -> None:
        """The others do not suffer; it is looked at again, like one that is busy."""
        broken = Client("broken", "unix")
        for client in (broken, self.one):
            self.watch.watch(client)
        self.assertEqual(self.looks(0), ["broken", "one"])
        self.assertEqual(self.looks(LOOK_AGAIN), ["broken"])
        self.assertEqual(self.looks(LOOK_AGAIN), ["broken"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_stop(self) -> None:
        self.busy = {"one"}
        self.watch.watch(self.one)
        self.clock.advance(0)
        self.watch.watch(self.two)
        self.assertEqual(self.timers(), 2)
        self.watch.stop()
        self.watch.stop()
        self.assertEqual(self.timers(), 0)
