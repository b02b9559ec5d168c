"""gateway.cluster.peer_pool: how links are kept, and how they end."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.peer_pool import ABSENCES
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.frames import PING, PONG, encode
from tests.cluster.far import B, C, Far, location, status
from tests.cluster.peers_case import Asking, PeersCase


class SilenceTests(PeersCase):
    def pass_time(self, seconds: float) -> None:
        self.net.pump([1.0] * int(seconds))

    def test_pinged(self) -> None:
        far = self.link()
        self.pass_time(9)
        self.assertEqual(far.frames(), [])
        self.pass_time(1)
        self.assertEqual(far.frames(), [(PING, b"")])
        for _ in range(20):
            far.send(encode(b"", PONG))
            self.pass_time(5)
        self.assertEqual(self.peers.count(), 1)

    def test_not_pinged_while_it_answers(self) -> None:
        far = self.link()
        for _ in range(10):
            call = self.ask()
            far.answer(far.asked()[0])
            self.assertEqual(len(call.outcomes), 1)
            self.pass_time(5)
        self.assertEqual(far.frames(), [])

    def test_cut(self) -> None:
        far, call = self.asked()
        self.pass_time(19)
        self.assertEqual((self.peers.count(), call.outcomes), (1, []))
        self.pass_time(1)
        self.assertEqual(self.peers.count(), 0)
        self.assert_failed(call, Kind.CONNECTION_LOST, True, None)
        self.assertTrue(far.transport.aborted)
        self.assertEqual(self.metrics.link_failures, 1)
        far.lose()
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_this_process_was_stopped(self) -> None:
        """Nobody is cut for what was not read meanwhile."""
        self.link()
        self.pass_time(14)
        for _ in range(3):
            self.net.advance(1000)
        self.assertEqual(self.peers.count(), 1)
        self.pass_time(20)
        self.assertEqual(self.peers.count(), 0)

    def test_each_alone(self) -> None:
        self.link()
        self.pass_time(3)
        self.peers.connect(location(node_id=C))
        other = self.net.open()
        for _ in range(20):
            other.send(encode(b"", PONG))
            self.pass_time(1)
        self.assertEqual(list(self.peers._open), [C])


class NodesTests(PeersCase):
    def changed(self, *nodes: str) -> None:
        self.peers.nodes_changed([status(node_id) for node_id in nodes])

    def test_live(self) -> None:
        self.link()
        for _ in range(5):
            self.changed(C, B)
        self.assertEqual(self.peers.count(), 1)

    def test_gone(self) -> None:
        far = self.link()
        for _ in range(ABSENCES):
            self.assertEqual(self.peers.count(), 1)
            self.changed(C)
        self.assertEqual(self.peers.count(), 0)
        self.assertEqual(far.frames(), [(8, b"\x03\xe9going away")])
        self.assertEqual((self.peers._links._peers, self.metrics.link_failures), ({}, 0))

    def test_there_again(self) -> None:
        self.link()
        for _ in range(3):
            self.changed(C)
            self.changed(B)
        self.assertEqual(self.peers.count(), 1)

    def test_what_is_in_flight_goes_on(self) -> None:
        far, call = self.asked()
        for _ in range(5):
            self.changed()
        self.assertEqual(self.peers.count(), 1)
        far.answer(far.last)
        self.assertEqual(len(call.outcomes), 1)
        self.changed()
        self.assertEqual(self.peers.count(), 0)

    def test_attempt_ends(self) -> None:
        waiting = self.peers.connect(location())
        for _ in range(ABSENCES):
            self.changed()
        self.failureResultOf(waiting, RpcError)
        self.assertEqual(self.peers._links._peers, {})
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_failures_are_forgotten(self) -> None:
        self.peers.connect(location()).addErrback(lambda _: None)
        self.net.refuse()
        for _ in range(ABSENCES):
            self.changed()
        self.peers.connect(location())
        self.assertEqual(self.net.attempts(), 2)


class StopTests(PeersCase):
    def test_stop(self) -> None:
        far, call = self.asked()
        self.peers.connect(location(node_id=C))
        other = self.net.open()
        stopping = self.peers.stop()
        self.assert_failed(call, Kind.CONNECTION_LOST, True, None)
        for each in (far, other):
            self.assertEqual(each.frames()[-1], (8, b"\x03\xe9going away"))
            self.assertNoResult(stopping)
            each.lose()
        self.successResultOf(stopping)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_nothing_afterwards(self) -> None:
        self.link()
        self.peers.stop()
        self.assertFalse(self.ask().asked)
        self.failureResultOf(self.peers.connect(location()), RpcError)
        self.failureResultOf(self.peers.has(location(), 1.0), PeerUnreachable)
        self.peers.moved(location(), 8)
        self.net.advance(2)
        self.assertEqual(self.net.attempts(), 1)

    def test_who_is_told_asks_another_node(self) -> None:
        far, _ = self.asked()
        again = []
        self.patch(Asking, "settle", lambda call, outcome: again.append(self.peers.connect(location(node_id=C))))
        stopping = self.peers.stop()
        self.failureResultOf(again[0], RpcError)
        far.lose()
        self.successResultOf(stopping)
        self.assertEqual((self.net.attempts(), self.metrics.link_failures), (1, 0))

    def test_stop_while_it_connects(self) -> None:
        waiting = self.peers.connect(location())
        self.successResultOf(self.peers.stop())
        self.failureResultOf(waiting, RpcError)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_a_link_that_ends_late(self) -> None:
        """One that broke is waited for too."""
        far = self.link()
        far.send(b"\x88\x02\x03\xe9")
        stopping: Deferred[None] = self.peers.stop()
        self.assertNoResult(stopping)
        far.lose()
        self.successResultOf(stopping)


class AgainTests(PeersCase):
    def test_broken(self) -> None:
        first: Far = self.link()
        self.net.advance(3)
        first.lose()
        self.assertEqual(self.peers.count(), 0)
        self.peers.connect(location())
        self.net.advance(0.1)
        self.peers.connect(location())
        self.net.open()
        self.assertTrue(self.ask().asked)
        self.assertEqual((self.net.attempts(), self.peers.count()), (2, 1))

    def test_who_is_told_asks_at_once(self) -> None:
        """What settles a call may ask for the node again."""
        far, _ = self.asked()
        again = []
        self.net.advance(3)
        self.patch(Asking, "settle", lambda call, outcome: again.append(self.peers.connect(location())))
        far.lose()
        self.net.open()
        self.successResultOf(again[0])
