"""Base class and recording call for tests of gateway.cluster.peer_client."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.auth import PeerAuth
from gateway.cluster.peer_client import PeerClient
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind
from gateway.registry.interface import Location
from gateway.rpc.errors import NotDelivered
from gateway.rpc.pending import Call
from gateway.util.cork import Cork
from tests.fakes.peer import A, FakeNetwork, RemotePeer, location

SECRET = b"the secret of these nodes"


class RecordingCall(Call):
    """A call that keeps its results."""

    __slots__ = ("not_delivered_reasons", "results", "started")

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.not_delivered_reasons: list[NotDelivered] = []

    def complete(self, result: Any) -> None:
        self.results.append(result)

    def not_delivered(self, reason: NotDelivered) -> None:
        self.not_delivered_reasons.append(reason)


class PeerClientCase(SynchronousTestCase):
    """The peer client of one node, on a network in memory."""

    node_id = A
    heartbeat, lease = 5.0, 15.0
    max_message_size, max_calls, max_unsent = 10000, 20, 100000
    own_url = "ws://a.example:8081"

    def setUp(self) -> None:
        self.net = FakeNetwork()
        self.cork = Cork(self.net.seconds)
        self.metrics = Metrics()
        self.peer_client = PeerClient(
            node_id=A,
            peer_auth=PeerAuth(A, lambda: SECRET, lambda: 1000.0),
            reactor=self.net,
            cork=self.cork,
            metrics=self.metrics,
            heartbeat=self.heartbeat,
            lease=self.lease,
            max_message_size=self.max_message_size,
            max_calls=self.max_calls,
            max_unsent=self.max_unsent,
            own_url=lambda: self.own_url,
        )

    def connected_peer(self) -> RemotePeer:
        """Return a peer with an open connection."""
        connected = self.peer_client.connect(location())
        if self.peer_client.count() == 0:
            self.net.open()
        self.successResultOf(connected)
        return self.net.peers[-1]

    def start_call(
        self,
        target: Location | None = None,
        params: bytes | None = None,
        timeout: float = 30.0,
        stale: bool = False,
        is_call: bool = True,
    ) -> RecordingCall:
        call = RecordingCall()
        call.started = self.peer_client.try_send(
            call, target or location(), "m", params, timeout, is_call=is_call, stale=stale
        )
        return call

    def start_connected_call(self, timeout: float = 30.0) -> tuple[Any, RecordingCall]:
        """Return a connected peer and a call to one of its clients; ``peer.last`` is the request of the call."""
        peer = self.connected_peer()
        call = self.start_call(timeout=timeout)
        self.assertTrue(call.started)
        peer.last = peer.requests()[-1]
        return peer, call

    def assert_failed(self, call: RecordingCall, kind: ErrorKind, sent: bool, detail: str | None) -> None:
        (error,) = call.results
        self.assertEqual((error.kind, error.sent, error.detail, error.client_id), (kind, sent, detail, "x"))
