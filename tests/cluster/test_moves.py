"""gateway.cluster.peer_client"""

from __future__ import annotations

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster import peer_client
from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.peer_client import AT_ONCE, FIRST_WAIT, LONGEST_WAIT, Move, Moves


class MovesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.told: list[list[Move]] = []
        self.answer = lambda some: succeed(some)
        self.done = 0
        self.moves = Moves(self.clock, self.tell, self.count)

    def tell(self, some: list[Move]) -> Deferred[list[Move]]:
        self.told.append(some)
        return self.answer(some)

    def count(self) -> None:
        self.done += 1

    def test_together(self) -> None:
        self.moves.add("x", 1)
        self.moves.add("y", 2)
        self.moves.add("x", 3)
        self.moves.add("x", 2)
        self.assertEqual(self.told, [])
        self.clock.advance(0)
        self.assertEqual(self.told, [[("y", 2), ("x", 3)]])
        self.assertEqual((len(self.moves), self.done), (0, 1))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_many(self) -> None:
        for n in range(AT_ONCE + 1):
            self.moves.add(f"c{n}", 1)
        self.clock.advance(0)
        self.assertEqual([len(some) for some in self.told], [AT_ONCE, 1])

    def test_again_until_it_is_heard(self) -> None:
        self.answer = lambda some: fail(PeerUnreachable("away"))
        self.moves.add("x", 1)
        self.clock.advance(0)
        wait = FIRST_WAIT
        for n in range(2, 8):
            self.clock.advance(wait - 0.01)
            self.assertEqual(len(self.told), n - 1)
            self.clock.advance(0.01)
            self.assertEqual(len(self.told), n)
            wait = min(2 * wait, LONGEST_WAIT)
        self.answer = succeed
        self.clock.advance(LONGEST_WAIT)
        self.assertEqual((len(self.told), len(self.moves), self.done), (8, 0, 1))

    def test_a_part_is_heard(self) -> None:
        self.answer = lambda some: succeed(some[:1])
        self.moves.add("x", 1)
        self.moves.add("y", 1)
        self.clock.advance(0)
        self.assertEqual(self.told, [[("x", 1), ("y", 1)], [("y", 1)]])

    def test_newer_one_meanwhile(self) -> None:
        waiting: Deferred[list[Move]] = Deferred()
        self.answer = lambda some: waiting
        self.moves.add("x", 1)
        self.clock.advance(0)
        self.moves.add("x", 2)
        self.answer = succeed
        waiting.callback([("x", 1)])
        self.assertEqual(self.told, [[("x", 1)], [("x", 2)]])

    def test_bounded(self) -> None:
        self.patch(peer_client, "MOST", 3)
        for n in range(5):
            self.moves.add(f"c{n}", 1)
        self.clock.advance(0)
        self.assertEqual(self.told, [[("c2", 1), ("c3", 1), ("c4", 1)]])

    def test_stopped(self) -> None:
        cancelled = []
        self.answer = lambda some: Deferred(cancelled.append)
        self.moves.add("x", 1)
        self.clock.advance(0)
        self.moves.stop()
        self.assertEqual((len(cancelled), len(self.moves), self.done), (1, 0, 1))
        self.clock.advance(60)
        self.assertEqual(len(self.told), 1)
        self.moves.stop()

    def test_stopped_before_it_begins(self) -> None:
        self.moves.add("x", 1)
        self.moves.stop()
        self.clock.advance(60)
        self.assertEqual((self.told, self.done), ([], 1))

    def test_error_of_this_node(self) -> None:
        self.answer = lambda some: fail(ZeroDivisionError())
        self.moves.add("x", 1)
        self.clock.advance(0)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        # It is tried again with the next one.
        self.answer = succeed
        self.moves.add("y", 1)
        self.clock.advance(0)
        self.assertEqual(self.told[-1], [("x", 1), ("y", 1)])
