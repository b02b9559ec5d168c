"""Tests for :mod:`tests.simulation.network`."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.network import WINDOW, ActorEnd, Network, SimulatedSocket
from tests.simulation.scheduler import Scheduler

CLIENT, NODE = "192.168.0.1", "10.0.0.1"


class Recorder:
    """Records what an actor receives."""

    def __init__(self) -> None:
        self.data = b""
        self.is_lost = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self) -> None:
        self.is_lost = True


class NetworkCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.scheduler = Scheduler(1)
        self.network = Network(self.scheduler)
        self.addCleanup(self.network.close)
        self.accepted: list[SimulatedSocket] = []
        self.ends: list[ActorEnd] = []
        self.refusals = 0
        self.network.listen((NODE, 80), lambda sock, client: self.accepted.append(sock))

    def refused(self) -> None:
        self.refusals += 1

    def connect(self) -> tuple[ActorEnd, SimulatedSocket]:
        """Connect an actor with a node."""
        self.network.connect_actor(CLIENT, (NODE, 80), self.ends.append, self.refused)
        self.advance(1.0)
        self.recorder = Recorder()
        self.ends[-1].actor = self.recorder
        self.addCleanup(self.accepted[-1].close)
        return self.ends[-1], self.accepted[-1]

    def advance(self, seconds: float) -> None:
        self.network.is_dirty = True
        self.scheduler.run(self.scheduler.now + seconds)

    def read(self, sock: SimulatedSocket) -> bytes | None:
        """Read what is there: ``None`` if there is nothing, empty at the end."""
        try:
            return sock.recv(2**20)
        except BlockingIOError:
            return None


class ConnectionTests(NetworkCase):
    def test_both_ways(self) -> None:
        end, sock = self.connect()
        end.send(b"a")
        end.send(b"b")
        self.assertIsNone(self.read(sock))
        self.advance(1.0)
        self.assertEqual(self.read(sock), b"ab")
        sock.send(b"c")
        self.advance(1.0)
        self.assertEqual(self.recorder.data, b"c")

    def test_refused(self) -> None:
        self.network.connect_actor(CLIENT, (NODE, 81), self.ends.append, self.refused)
        self.advance(1.0)
        self.assertEqual((self.refusals, self.ends), (1, []))

    def test_the_node_closes(self) -> None:
        _, sock = self.connect()
        sock.send(b"last")
        sock.close()
        self.advance(1.0)
        self.assertEqual((self.recorder.data, self.recorder.is_lost), (b"last", True))

    def test_the_actor_closes(self) -> None:
        end, sock = self.connect()
        end.send(b"last")
        end.close()
        self.advance(1.0)
        self.assertEqual((self.read(sock), self.read(sock)), (b"last", b""))

    def test_cut(self) -> None:
        end, sock = self.connect()
        end.send(b"lost")
        self.network.connections_of(NODE)[0].cut()
        self.advance(1.0)
        self.assertEqual((self.read(sock), self.recorder.is_lost), (b"", True))

    def test_lost_without_notice(self) -> None:
        end, sock = self.connect()
        self.network.connections_of(NODE)[0].vanish()
        end.send(b"lost")
        sock.send(b"lost")
        self.advance(100.0)
        self.assertEqual((self.read(sock), self.recorder.data, self.recorder.is_lost), (None, b"", False))

    def test_reader_that_does_not_read(self) -> None:
        end, sock = self.connect()
        end.set_reading(False)
        sent = 0
        for _ in range(1000):
            try:
                sent += sock.send(bytes(1000))
            except BlockingIOError:
                break
            self.advance(0.001)
        self.assertGreater(sent, WINDOW)
        self.assertLess(sent, 1000 * 1000)
        self.assertEqual(self.recorder.data, b"")
        end.set_reading(True)
        self.advance(10.0)
        self.assertEqual(len(self.recorder.data), sent)


class PartitionTests(NetworkCase):
    def test_one_way(self) -> None:
        end, sock = self.connect()
        self.network.block(CLIENT, NODE)
        end.send(b"a")
        sock.send(b"b")
        self.advance(10.0)
        self.assertEqual((self.read(sock), self.recorder.data), (None, b"b"))
        self.network.unblock(CLIENT, NODE)
        self.advance(1.0)
        self.assertEqual(self.read(sock), b"a")

    def test_connecting(self) -> None:
        self.network.block(CLIENT, NODE)
        self.network.connect_actor(CLIENT, (NODE, 80), self.ends.append, self.refused)
        self.advance(10.0)
        self.assertEqual((self.ends, self.refusals), ([], 0))
        self.network.unblock(CLIENT, NODE)
        self.advance(1.0)
        self.assertEqual(len(self.ends), 1)
        self.accepted[0].close()
