"""Tests of gateway.cluster.drain."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.drain import CLOSING, Departures
from gateway.cluster.interface import PeerUnreachable
from gateway.registry.interface import Location, RegistryUnavailable
from tests.cluster.fakes import FakePeers, location


class FakeRegistry:
    """Finds what the test says."""

    def __init__(self) -> None:
        self.found: Any = location()

    def find(self, client_id: str) -> Deferred[Location | None]:
        return fail(self.found) if isinstance(self.found, Exception) else succeed(self.found)


class DeparturesTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.peers = FakePeers()
        self.registry = FakeRegistry()
        self.cut: list[str] = []
        self.departures = Departures(
            registry=self.registry,  # type: ignore[arg-type]
            peers=self.peers,
            clock=self.clock,
            cut=self.cut.append,
            longest_call=10.0,
        )

    def test_closed_by_its_node_and_cut_if_that_takes_too_long(self) -> None:
        self.departures.end("a")
        self.departures.end("a")
        self.assertEqual((self.peers.closed, self.cut), ([(location(), 1012, "drain")], []))
        self.clock.advance(10.0)
        self.assertEqual(self.cut, [])
        self.clock.advance(CLOSING)
        self.assertEqual(self.cut, ["a"])
        self.departures.end("a")
        self.assertEqual(len(self.peers.closed), 2)

    def test_cut_at_once_if_nobody_can_close_it(self) -> None:
        for found, here in (
            (RegistryUnavailable("away"), True),
            (None, True),
            (location(), False),
            (location(), PeerUnreachable("silent")),
        ):
            self.registry.found, self.peers.here = found, here
            self.departures.end("a")
        self.assertEqual(self.cut, ["a"] * 4)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_an_error_is_logged(self) -> None:
        self.peers.here = ZeroDivisionError()
        self.departures.end("a")
        self.assertEqual(self.cut, ["a"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
