"""Tests of gateway.cluster.drain."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.drain import RELAY_CLOSE_TIMEOUT, RelayDrain
from gateway.cluster.interface import PeerUnreachableError
from gateway.registry.interface import Location, RegistryUnavailableError
from tests.cluster.fakes import FakePeerClient, location


class FakeRegistry:
    """Finds what the test says."""

    def __init__(self) -> None:
        self.result: Any = location()

    def find(self, client_id: str) -> Deferred[Location | None]:
        return fail(self.result) if isinstance(self.result, Exception) else succeed(self.result)


class RelayDrainTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.peer_client = FakePeerClient()
        self.registry = FakeRegistry()
        self.closed_relays: list[str] = []
        self.relay_drain = RelayDrain(
            registry=self.registry,  # type: ignore[arg-type]
            peer_client=self.peer_client,
            clock=self.clock,
            close_relay=self.closed_relays.append,
            max_call_timeout=10.0,
        )

    def test_closed_by_its_node_and_cut_if_that_takes_too_long(self) -> None:
        self.relay_drain.drain("a")
        self.relay_drain.drain("a")
        self.assertEqual((self.peer_client.closed, self.closed_relays), ([(location(), 1012, "drain")], []))
        self.clock.advance(10.0)
        self.assertEqual(self.closed_relays, [])
        self.clock.advance(RELAY_CLOSE_TIMEOUT)
        self.assertEqual(self.closed_relays, ["a"])
        self.relay_drain.drain("a")
        self.assertEqual(len(self.peer_client.closed), 2)

    def test_cut_at_once_if_nobody_can_close_it(self) -> None:
        for found, here in (
            (RegistryUnavailableError("away"), True),
            (None, True),
            (location(), False),
            (location(), PeerUnreachableError("silent")),
        ):
            self.registry.result, self.peer_client.result = found, here
            self.relay_drain.drain("a")
        self.assertEqual(self.closed_relays, ["a"] * 4)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_an_error_is_logged(self) -> None:
        self.peer_client.result = ZeroDivisionError()
        self.relay_drain.drain("a")
        self.assertEqual(self.closed_relays, ["a"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
