"""What tests of gateway.cluster.peer_client share."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.auth import Credentials
from gateway.cluster.peer_client import Peers
from gateway.metrics import Metrics
from gateway.protocol.errors import Kind
from gateway.registry.interface import Location
from gateway.rpc.pending import Call
from gateway.util.cork import Turn
from tests.cluster.far import A, Far, Net, location

SECRET = b"the secret of these nodes"


class Asking(Call):
    """A call that keeps its outcome."""

    __slots__ = ("asked", "outcomes")

    def __init__(self) -> None:
        self.outcomes: list[Any] = []

    def settle(self, outcome: Any) -> None:
        self.outcomes.append(outcome)


class PeersCase(SynchronousTestCase):
    """One node's peers, on a network in memory."""

    node_id = A
    heartbeat, lease = 5.0, 15.0
    max_message_size, max_calls, max_waiting = 10000, 20, 100000

    def setUp(self) -> None:
        self.net = Net()
        self.turn = Turn(self.net.seconds)
        self.metrics = Metrics()
        self.peers = Peers(
            node_id=A,
            credentials=Credentials(A, lambda: SECRET, lambda: 1000.0),
            reactor=self.net,
            turn=self.turn,
            metrics=self.metrics,
            heartbeat=self.heartbeat,
            lease=self.lease,
            max_message_size=self.max_message_size,
            max_calls=self.max_calls,
            max_waiting=self.max_waiting,
        )
        self.misses: list[tuple[Call, object]] = []
        self.peers.missed = lambda call, miss: self.misses.append((call, miss))

    def link(self) -> Far:
        """Another node, to which there is a link."""
        connected = self.peers.connect(location())
        if self.peers.count() == 0:
            self.net.open()
        self.successResultOf(connected)
        return self.net.fars[-1]

    def ask(
        self,
        where: Location | None = None,
        params: bytes | None = None,
        timeout: float = 30.0,
        stale: bool = False,
    ) -> Asking:
        call = Asking()
        call.asked = self.peers.ask(call, where or location(), "m", params, timeout, stale=stale)
        return call

    def asked(self, timeout: float = 30.0) -> tuple[Any, Asking]:
        """Another node that was asked, and the call; ``last`` is what it was asked."""
        far = self.link()
        call = self.ask(timeout=timeout)
        self.assertTrue(call.asked)
        far.last = far.asked()[-1]
        return far, call

    def assert_failed(self, call: Asking, kind: Kind, sent: bool, detail: str | None) -> None:
        (error,) = call.outcomes
        self.assertEqual((error.kind, error.sent, error.detail, error.client_id), (kind, sent, detail, "x"))
