"""gateway.cluster.peer_client"""

from __future__ import annotations

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster import peer_client
from gateway.cluster.interface import PeerUnreachableError
from gateway.cluster.peer_client import (
    INITIAL_BACKOFF,
    MAX_BACKOFF,
    NOTICE_BATCH_SIZE,
    OwnershipNotice,
    OwnershipOutbox,
)


class OwnershipOutboxTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.batches: list[list[OwnershipNotice]] = []
        self.respond = lambda some: succeed(some)
        self.times_empty = 0
        self.outbox = OwnershipOutbox(self.clock, self.send, self.on_empty)

    def send(self, notices: list[OwnershipNotice]) -> Deferred[list[OwnershipNotice]]:
        self.batches.append(notices)
        return self.respond(notices)

    def on_empty(self) -> None:
        self.times_empty += 1

    def test_together(self) -> None:
        self.outbox.add("x", 1)
        self.outbox.add("y", 2)
        self.outbox.add("x", 3)
        self.outbox.add("x", 2)
        self.assertEqual(self.batches, [])
        self.clock.advance(0)
        self.assertEqual(self.batches, [[("y", 2), ("x", 3)]])
        self.assertEqual((len(self.outbox), self.times_empty), (0, 1))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_many(self) -> None:
        for n in range(NOTICE_BATCH_SIZE + 1):
            self.outbox.add(f"c{n}", 1)
        self.clock.advance(0)
        self.assertEqual([len(some) for some in self.batches], [NOTICE_BATCH_SIZE, 1])

    def test_again_until_it_is_heard(self) -> None:
        self.respond = lambda some: fail(PeerUnreachableError("away"))
        self.outbox.add("x", 1)
        self.clock.advance(0)
        wait = INITIAL_BACKOFF
        for n in range(2, 8):
            self.clock.advance(wait - 0.01)
            self.assertEqual(len(self.batches), n - 1)
            self.clock.advance(0.01)
            self.assertEqual(len(self.batches), n)
            wait = min(2 * wait, MAX_BACKOFF)
        self.respond = succeed
        self.clock.advance(MAX_BACKOFF)
        self.assertEqual((len(self.batches), len(self.outbox), self.times_empty), (8, 0, 1))

    def test_a_part_is_heard(self) -> None:
        self.respond = lambda some: succeed(some[:1])
        self.outbox.add("x", 1)
        self.outbox.add("y", 1)
        self.clock.advance(0)
        self.assertEqual(self.batches, [[("x", 1), ("y", 1)], [("y", 1)]])

    def test_newer_one_meanwhile(self) -> None:
        waiting: Deferred[list[OwnershipNotice]] = Deferred()
        self.respond = lambda some: waiting
        self.outbox.add("x", 1)
        self.clock.advance(0)
        self.outbox.add("x", 2)
        self.respond = succeed
        waiting.callback([("x", 1)])
        self.assertEqual(self.batches, [[("x", 1)], [("x", 2)]])

    def test_bounded(self) -> None:
        self.patch(peer_client, "MAX_NOTICES", 3)
        for n in range(5):
            self.outbox.add(f"c{n}", 1)
        self.clock.advance(0)
        self.assertEqual(self.batches, [[("c2", 1), ("c3", 1), ("c4", 1)]])

    def test_stopped(self) -> None:
        cancelled = []
        self.respond = lambda some: Deferred(cancelled.append)
        self.outbox.add("x", 1)
        self.clock.advance(0)
        self.outbox.stop()
        self.assertEqual((len(cancelled), len(self.outbox), self.times_empty), (1, 0, 1))
        self.clock.advance(60)
        self.assertEqual(len(self.batches), 1)
        self.outbox.stop()

    def test_stopped_before_it_begins(self) -> None:
        self.outbox.add("x", 1)
        self.outbox.stop()
        self.clock.advance(60)
        self.assertEqual((self.batches, self.times_empty), ([], 1))

    def test_error_of_this_node(self) -> None:
        self.respond = lambda some: fail(ZeroDivisionError())
        self.outbox.add("x", 1)
        self.clock.advance(0)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        # It is tried again with the next one.
        self.respond = succeed
        self.outbox.add("y", 1)
        self.clock.advance(0)
        self.assertEqual(self.batches[-1], [("x", 1), ("y", 1)])
