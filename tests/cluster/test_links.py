"""gateway.cluster.peer_pool: how links are kept, and how they end."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from gateway.cluster.interface import PeerUnreachableError
from gateway.cluster.peer_pool import MIN_ABSENCES
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.frames import PING, PONG, encode
from tests.cluster.far import B, C, RemotePeer, location, node_status
from tests.cluster.peers_case import PeerClientCase, RecordingCall


class KeepAliveTests(PeerClientCase):
    def pass_time(self, seconds: float) -> None:
        self.net.pump([1.0] * int(seconds))

    def test_pinged(self) -> None:
        far = self.connected_peer()
        self.pass_time(9)
        self.assertEqual(far.frames(), [])
        self.pass_time(1)
        self.assertEqual(far.frames(), [(PING, b"")])
        for _ in range(20):
            far.send(encode(b"", PONG))
            self.pass_time(5)
        self.assertEqual(self.peer_client.count(), 1)

    def test_not_pinged_while_it_answers(self) -> None:
        far = self.connected_peer()
        for _ in range(10):
            call = self.start_call()
            far.respond(far.requests()[0])
            self.assertEqual(len(call.results), 1)
            self.pass_time(5)
        self.assertEqual(far.frames(), [])

    def test_cut(self) -> None:
        far, call = self.start_connected_call()
        self.pass_time(19)
        self.assertEqual((self.peer_client.count(), call.results), (1, []))
        self.pass_time(1)
        self.assertEqual(self.peer_client.count(), 0)
        self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, None)
        self.assertTrue(far.transport.is_aborted)
        self.assertEqual(self.metrics.link_failures, 1)
        far.disconnect()
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_this_process_was_stopped(self) -> None:
        """Nobody is cut for what was not read meanwhile."""
        self.connected_peer()
        self.pass_time(14)
        for _ in range(3):
            self.net.advance(1000)
        self.assertEqual(self.peer_client.count(), 1)
        self.pass_time(20)
        self.assertEqual(self.peer_client.count(), 0)

    def test_each_alone(self) -> None:
        self.connected_peer()
        self.pass_time(3)
        self.peer_client.connect(location(node_id=C))
        other = self.net.open()
        for _ in range(20):
            other.send(encode(b"", PONG))
            self.pass_time(1)
        self.assertEqual(list(self.peer_client._connections), [C])


class NodesChangedTests(PeerClientCase):
    def nodes_changed(self, *nodes: str) -> None:
        self.peer_client.nodes_changed([node_status(node_id) for node_id in nodes])

    def test_live(self) -> None:
        self.connected_peer()
        for _ in range(5):
            self.nodes_changed(C, B)
        self.assertEqual(self.peer_client.count(), 1)

    def test_gone(self) -> None:
        far = self.connected_peer()
        for _ in range(MIN_ABSENCES):
            self.assertEqual(self.peer_client.count(), 1)
            self.nodes_changed(C)
        self.assertEqual(self.peer_client.count(), 0)
        self.assertEqual(far.frames(), [(8, b"\x03\xe9going away")])
        self.assertEqual((self.peer_client._pool._connectors, self.metrics.link_failures), ({}, 0))

    def test_there_again(self) -> None:
        self.connected_peer()
        for _ in range(3):
            self.nodes_changed(C)
            self.nodes_changed(B)
        self.assertEqual(self.peer_client.count(), 1)

    def test_what_is_in_flight_goes_on(self) -> None:
        far, call = self.start_connected_call()
        for _ in range(5):
            self.nodes_changed()
        self.assertEqual(self.peer_client.count(), 1)
        far.respond(far.last)
        self.assertEqual(len(call.results), 1)
        self.nodes_changed()
        self.assertEqual(self.peer_client.count(), 0)

    def test_attempt_ends(self) -> None:
        waiting = self.peer_client.connect(location())
        for _ in range(MIN_ABSENCES):
            self.nodes_changed()
        self.failureResultOf(waiting, RpcError)
        self.assertEqual(self.peer_client._pool._connectors, {})
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_failures_are_forgotten(self) -> None:
        self.peer_client.connect(location()).addErrback(lambda _: None)
        self.net.refuse()
        for _ in range(MIN_ABSENCES):
            self.nodes_changed()
        self.peer_client.connect(location())
        self.assertEqual(self.net.attempts(), 2)


class StopTests(PeerClientCase):
    def test_stop(self) -> None:
        far, call = self.start_connected_call()
        self.peer_client.connect(location(node_id=C))
        other = self.net.open()
        stopping = self.peer_client.stop()
        self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, None)
        for each in (far, other):
            self.assertEqual(each.frames()[-1], (8, b"\x03\xe9going away"))
            self.assertNoResult(stopping)
            each.disconnect()
        self.successResultOf(stopping)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_nothing_afterwards(self) -> None:
        self.connected_peer()
        self.peer_client.stop()
        self.assertFalse(self.start_call().asked)
        self.failureResultOf(self.peer_client.connect(location()), RpcError)
        self.failureResultOf(self.peer_client.has_client(location(), 1.0), PeerUnreachableError)
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(2)
        self.assertEqual(self.net.attempts(), 1)

    def test_who_is_told_asks_another_node(self) -> None:
        far, _ = self.start_connected_call()
        again = []
        self.patch(
            RecordingCall, "complete", lambda call, outcome: again.append(self.peer_client.connect(location(node_id=C)))
        )
        stopping = self.peer_client.stop()
        self.failureResultOf(again[0], RpcError)
        far.disconnect()
        self.successResultOf(stopping)
        self.assertEqual((self.net.attempts(), self.metrics.link_failures), (1, 0))

    def test_stop_while_it_connects(self) -> None:
        waiting = self.peer_client.connect(location())
        self.successResultOf(self.peer_client.stop())
        self.failureResultOf(waiting, RpcError)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_a_link_that_ends_late(self) -> None:
        """One that broke is waited for too."""
        far = self.connected_peer()
        far.send(b"\x88\x02\x03\xe9")
        stopping: Deferred[None] = self.peer_client.stop()
        self.assertNoResult(stopping)
        far.disconnect()
        self.successResultOf(stopping)


class ReconnectTests(PeerClientCase):
    def test_broken(self) -> None:
        first: RemotePeer = self.connected_peer()
        self.net.advance(3)
        first.disconnect()
        self.assertEqual(self.peer_client.count(), 0)
        self.peer_client.connect(location())
        self.net.advance(0.1)
        self.peer_client.connect(location())
        self.net.open()
        self.assertTrue(self.start_call().asked)
        self.assertEqual((self.net.attempts(), self.peer_client.count()), (2, 1))

    def test_who_is_told_asks_at_once(self) -> None:
        """What settles a call may ask for the node again."""
        far, _ = self.start_connected_call()
        again = []
        self.net.advance(3)
        self.patch(RecordingCall, "complete", lambda call, outcome: again.append(self.peer_client.connect(location())))
        far.disconnect()
        self.net.open()
        self.successResultOf(again[0])
