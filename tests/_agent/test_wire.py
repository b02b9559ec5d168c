"""Tests of gateway.testing."""

from __future__ import annotations

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, ITransport
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.testing import BUFFER, End, Wire

HERE, THERE = IPv4Address("TCP", "192.0.2.1", 1), IPv4Address("TCP", "192.0.2.2", 2)


class Producer:
    def __init__(self) -> None:
        self.told: list[str] = []

    def pauseProducing(self) -> None:
        self.told.append("pause")

    def resumeProducing(self) -> None:
        self.told.append("resume")


class EndTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.end = End(HERE, THERE)

    def test_interfaces(self) -> None:
        verifyObject(ITransport, self.end)
        verifyObject(IConsumer, self.end)

    def test_addresses(self) -> None:
        self.assertEqual((self.end.getHost(), self.end.getPeer()), (HERE, THERE))

    def test_what_was_written_is_taken_once(self) -> None:
        self.end.write(b"a")
        self.end.writeSequence([b"b", b"c"])
        self.assertEqual([self.end.take(), self.end.take()], [b"abc", b""])

    def test_what_was_written_before_the_end_is_delivered_and_nothing_after(self) -> None:
        self.end.write(b"a")
        self.end.loseConnection()
        self.end.write(b"b")
        self.assertEqual(self.end.take(), b"a")
        self.assertFalse(self.end.aborted)

    def test_an_abort_drops_what_waits(self) -> None:
        self.end.write(b"a")
        self.end.abortConnection()
        self.end.write(b"b")
        self.assertEqual(self.end.take(), b"")
        self.assertTrue(self.end.aborted)

    def test_a_producer_is_paused_once_and_resumed_once(self) -> None:
        producer = Producer()
        self.end.registerProducer(producer, True)
        self.end.write(b"x" * BUFFER)
        self.assertEqual(producer.told, [])
        self.end.write(b"x")
        self.end.write(b"x")
        self.assertEqual(producer.told, ["pause"])
        self.end.take()
        self.end.take()
        self.assertEqual(producer.told, ["pause", "resume"])

    def test_a_producer_that_left_is_told_nothing(self) -> None:
        producer = Producer()
        self.end.registerProducer(producer, True)
        self.end.write(b"x" * (BUFFER + 1))
        self.end.unregisterProducer()
        self.end.write(b"x")
        self.end.take()
        self.assertEqual(producer.told, ["pause"])


class Noting(Protocol):
    """Notes what it is told, in a list that it shares with the other side."""

    def __init__(self, name: str, told: list[tuple[str, object]]) -> None:
        self.name = name
        self.told = told

    def connectionMade(self) -> None:
        self.told.append((self.name, "made"))

    def dataReceived(self, data: bytes) -> None:
        self.told.append((self.name, data))

    def connectionLost(self, reason: Failure) -> None:
        self.told.append((self.name, reason.type))


class WireTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.told: list[tuple[str, object]] = []
        self.near, self.far = Noting("near", self.told), Noting("far", self.told)
        self.wire = Wire(self.near, self.far)

    def heard(self) -> list[tuple[str, object]]:
        told = self.told[:]
        self.told.clear()
        return told

    def settle(self) -> list[tuple[str, object]]:
        self.heard()
        moves = sum(1 for _ in range(10) if self.wire.move())
        self.assertLess(moves, 10, "it does not settle")
        return self.heard()

    def test_the_one_that_connects_is_told_last(self) -> None:
        self.assertEqual(self.heard(), [("far", "made"), ("near", "made")])
        self.assertFalse(self.wire.move())

    def test_the_addresses_are_each_others(self) -> None:
        near, far = self.near.transport, self.far.transport
        self.assertEqual((near.getHost(), near.getPeer()), (far.getPeer(), far.getHost()))
        self.assertNotEqual(near.getHost(), near.getPeer())

    def test_both_ways(self) -> None:
        self.near.transport.write(b"a")
        self.far.transport.write(b"b")
        self.assertEqual(self.settle(), [("far", b"a"), ("near", b"b")])

    def test_its_ends(self) -> None:
        self.assertTrue(self.wire.has(self.near.transport))
        self.assertTrue(self.wire.has(self.far.transport))
        self.assertFalse(self.wire.has(End(HERE, THERE)))

    def test_a_clean_end_comes_after_what_was_written(self) -> None:
        self.far.transport.write(b"bye")
        self.far.transport.loseConnection()
        self.assertEqual(self.settle(), [("near", b"bye"), ("near", ConnectionDone), ("far", ConnectionDone)])
        self.assertTrue(self.wire.gone)

    def test_an_abort_is_told_to_each_as_what_it_is(self) -> None:
        self.far.transport.write(b"never")
        self.near.transport.abortConnection()
        self.assertEqual(self.settle(), [("near", ConnectionAborted), ("far", ConnectionLost)])

    def test_what_is_gone_stays_so(self) -> None:
        self.near.transport.loseConnection()
        self.settle()
        self.far.transport.write(b"x")
        self.assertEqual(self.settle(), [])

    def test_frozen(self) -> None:
        """Neither bytes pass nor the other side's end; they do once it thaws."""
        self.wire.frozen = True
        self.near.transport.write(b"a")
        self.far.transport.loseConnection()
        self.assertEqual(self.settle(), [])
        self.wire.frozen = False
        self.assertEqual(self.settle(), [("far", b"a"), ("near", ConnectionDone), ("far", ConnectionDone)])

    def test_one_that_gives_a_frozen_connection_up(self) -> None:
        self.wire.frozen = True
        self.near.transport.abortConnection()
        self.assertEqual(self.settle(), [("near", ConnectionAborted), ("far", ConnectionLost)])
