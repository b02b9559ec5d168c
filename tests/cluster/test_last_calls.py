"""The last calls of a node that ends."""

import json

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.drain import GRACE, TICK, LastCalls


class LastCallsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.calls = 0
        self.backends = 0
        self.seen: list[object] = []

    def begin(self) -> Deferred[None]:
        last = LastCalls(
            self.clock,
            longest_call=10.0,
            refuse=lambda: self.seen.append("refuse"),
            in_flight=lambda: self.calls,
            tell_backends=self.told,
        )
        return Deferred.fromCoroutine(last.over())

    def told(self, message: bytes) -> int:
        self.seen.append(json.loads(message))
        return self.backends

    def test_none(self) -> None:
        self.successResultOf(self.begin())
        goaway = {"jsonrpc": "2.0", "method": "gateway.goaway", "params": {"reason": "drain"}}
        self.assertEqual(self.seen, [goaway, "refuse"])

    def test_those_in_flight_are_waited_for(self) -> None:
        self.calls = 2
        over = self.begin()
        self.clock.pump([TICK] * 20)
        self.assertNoResult(over)
        self.calls = 0
        self.clock.advance(TICK)
        self.successResultOf(over)

    def test_not_for_ever(self) -> None:
        self.calls = 1
        over = self.begin()
        self.clock.pump([TICK] * 199)
        self.assertNoResult(over)
        self.clock.pump([TICK] * 2)
        self.successResultOf(over)

    def test_backends_have_a_moment_for_going(self) -> None:
        """What they send until they have read it is answered; what they send then is refused for a while."""
        self.backends = 1
        over = self.begin()
        self.clock.advance(GRACE - 0.01)
        self.assertEqual(len(self.seen), 1)
        self.clock.advance(0.01)
        self.assertEqual(self.seen[1], "refuse")
        self.clock.advance(GRACE - 0.01)
        self.assertNoResult(over)
        self.clock.advance(0.01)
        self.successResultOf(over)
