"""The last calls of a node that ends."""

import json

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.drain import BACKEND_GRACE_PERIOD, POLL_INTERVAL, BackendDrain


class BackendDrainTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.calls = 0
        self.backends = 0
        self.seen: list[object] = []

    def start_drain(self) -> Deferred[None]:
        last = BackendDrain(
            self.clock,
            max_call_timeout=10.0,
            refuse_new_calls=lambda: self.seen.append("refuse"),
            in_flight=lambda: self.calls,
            send_to_backends=self.send_to_backends,
        )
        return Deferred.fromCoroutine(last.run())

    def send_to_backends(self, message: bytes) -> int:
        self.seen.append(json.loads(message))
        return self.backends

    def test_none(self) -> None:
        self.successResultOf(self.start_drain())
        goaway = {"jsonrpc": "2.0", "method": "gateway.goaway", "params": {"reason": "drain"}}
        self.assertEqual(self.seen, [goaway, "refuse"])

    def test_those_in_flight_are_waited_for(self) -> None:
        self.calls = 2
        over = self.start_drain()
        self.clock.pump([POLL_INTERVAL] * 20)
        self.assertNoResult(over)
        self.calls = 0
        self.clock.advance(POLL_INTERVAL)
        self.successResultOf(over)

    def test_not_for_ever(self) -> None:
        self.calls = 1
        over = self.start_drain()
        self.clock.pump([POLL_INTERVAL] * 199)
        self.assertNoResult(over)
        self.clock.pump([POLL_INTERVAL] * 2)
        self.successResultOf(over)

    def test_backends_have_a_moment_for_going(self) -> None:
        """What they send until they have read it is answered; what they send then is refused for a while."""
        self.backends = 1
        over = self.start_drain()
        self.clock.advance(BACKEND_GRACE_PERIOD - 0.01)
        self.assertEqual(len(self.seen), 1)
        self.clock.advance(0.01)
        self.assertEqual(self.seen[1], "refuse")
        self.clock.advance(BACKEND_GRACE_PERIOD - 0.01)
        self.assertNoResult(over)
        self.clock.advance(0.01)
        self.successResultOf(over)
