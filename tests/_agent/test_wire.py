"""Tests of gateway.testing."""

from __future__ import annotations

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, ITransport
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.testing import HIGH_WATER_MARK, MemoryConnection, MemoryTransport

HERE, THERE = IPv4Address("TCP", "192.0.2.1", 1), IPv4Address("TCP", "192.0.2.2", 2)


class FakeProducer:
    def __init__(self) -> None:
        self.told: list[str] = []

    def pauseProducing(self) -> None:
        self.told.append("pause")

    def resumeProducing(self) -> None:
        self.told.append("resume")


class MemoryTransportTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.end = MemoryTransport(HERE, THERE)

    def test_interfaces(self) -> None:
        verifyObject(ITransport, self.end)
        verifyObject(IConsumer, self.end)

    def test_addresses(self) -> None:
        self.assertEqual((self.end.getHost(), self.end.getPeer()), (HERE, THERE))

    def test_what_was_written_is_taken_once(self) -> None:
        self.end.write(b"a")
        self.end.writeSequence([b"b", b"c"])
        self.assertEqual([self.end.take_unsent(), self.end.take_unsent()], [b"abc", b""])

    def test_what_was_written_before_the_end_is_delivered_and_nothing_after(self) -> None:
        self.end.write(b"a")
        self.end.loseConnection()
        self.end.write(b"b")
        self.assertEqual(self.end.take_unsent(), b"a")
        self.assertFalse(self.end.is_aborted)

    def test_an_abort_drops_what_waits(self) -> None:
        self.end.write(b"a")
        self.end.abortConnection()
        self.end.write(b"b")
        self.assertEqual(self.end.take_unsent(), b"")
        self.assertTrue(self.end.is_aborted)

    def test_a_producer_is_paused_once_and_resumed_once(self) -> None:
        producer = FakeProducer()
        self.end.registerProducer(producer, True)
        self.end.write(b"x" * HIGH_WATER_MARK)
        self.assertEqual(producer.told, [])
        self.end.write(b"x")
        self.end.write(b"x")
        self.assertEqual(producer.told, ["pause"])
        self.end.take_unsent()
        self.end.take_unsent()
        self.assertEqual(producer.told, ["pause", "resume"])

    def test_a_producer_that_left_is_told_nothing(self) -> None:
        producer = FakeProducer()
        self.end.registerProducer(producer, True)
        self.end.write(b"x" * (HIGH_WATER_MARK + 1))
        self.end.unregisterProducer()
        self.end.write(b"x")
        self.end.take_unsent()
        self.assertEqual(producer.told, ["pause"])


class RecordingProtocol(Protocol):
    """Notes what it is told, in a list that it shares with the other side."""

    def __init__(self, name: str, told: list[tuple[str, object]]) -> None:
        self.name = name
        self.events = told

    def connectionMade(self) -> None:
        self.events.append((self.name, "made"))

    def dataReceived(self, data: bytes) -> None:
        self.events.append((self.name, data))

    def connectionLost(self, reason: Failure) -> None:
        self.events.append((self.name, reason.type))


class MemoryConnectionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.events: list[tuple[str, object]] = []
        self.client, self.server = RecordingProtocol("near", self.events), RecordingProtocol("far", self.events)
        self.connection = MemoryConnection(self.client, self.server)

    def take_events(self) -> list[tuple[str, object]]:
        told = self.events[:]
        self.events.clear()
        return told

    def deliver_all(self) -> list[tuple[str, object]]:
        self.take_events()
        moves = sum(1 for _ in range(10) if self.connection.deliver())
        self.assertLess(moves, 10, "it does not settle")
        return self.take_events()

    def test_the_one_that_connects_is_told_last(self) -> None:
        self.assertEqual(self.take_events(), [("far", "made"), ("near", "made")])
        self.assertFalse(self.connection.deliver())

    def test_the_addresses_are_each_others(self) -> None:
        near, far = self.client.transport, self.server.transport
        self.assertEqual((near.getHost(), near.getPeer()), (far.getPeer(), far.getHost()))
        self.assertNotEqual(near.getHost(), near.getPeer())

    def test_both_ways(self) -> None:
        self.client.transport.write(b"a")
        self.server.transport.write(b"b")
        self.assertEqual(self.deliver_all(), [("far", b"a"), ("near", b"b")])

    def test_its_ends(self) -> None:
        self.assertTrue(self.connection.has_transport(self.client.transport))
        self.assertTrue(self.connection.has_transport(self.server.transport))
        self.assertFalse(self.connection.has_transport(MemoryTransport(HERE, THERE)))

    def test_a_clean_end_comes_after_what_was_written(self) -> None:
        self.server.transport.write(b"bye")
        self.server.transport.loseConnection()
        self.assertEqual(self.deliver_all(), [("near", b"bye"), ("near", ConnectionDone), ("far", ConnectionDone)])
        self.assertTrue(self.connection.is_closed)

    def test_an_abort_is_told_to_each_as_what_it_is(self) -> None:
        self.server.transport.write(b"never")
        self.client.transport.abortConnection()
        self.assertEqual(self.deliver_all(), [("near", ConnectionAborted), ("far", ConnectionLost)])

    def test_what_is_gone_stays_so(self) -> None:
        self.client.transport.loseConnection()
        self.deliver_all()
        self.server.transport.write(b"x")
        self.assertEqual(self.deliver_all(), [])

    def test_frozen(self) -> None:
        """Neither bytes pass nor the other side's end; they do once it thaws."""
        self.connection.is_frozen = True
        self.client.transport.write(b"a")
        self.server.transport.loseConnection()
        self.assertEqual(self.deliver_all(), [])
        self.connection.is_frozen = False
        self.assertEqual(self.deliver_all(), [("far", b"a"), ("near", ConnectionDone), ("far", ConnectionDone)])

    def test_one_that_gives_a_frozen_connection_up(self) -> None:
        self.connection.is_frozen = True
        self.client.transport.abortConnection()
        self.assertEqual(self.deliver_all(), [("near", ConnectionAborted), ("far", ConnectionLost)])
