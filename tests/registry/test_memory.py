"""Tests of gateway.registry.memory."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Claim, SessionKey
from gateway.registry.memory import MemoryRegistry
from tests.builders.registry_contract import (
    LEASE,
    ClaimPolicyContractMixin,
    RegistryContractMixin,
    RegistryMixin,
    node_info,
)


class MemoryMixin(RegistryMixin):
    def set_up_database(self) -> None:
        self.first: MemoryRegistry | None = None

    def make_registry(self) -> MemoryRegistry:
        registry = MemoryRegistry(self.clock, LEASE, shared_with=self.first)
        self.first = self.first or registry
        return registry


class MemoryContractTests(MemoryMixin, RegistryContractMixin, SynchronousTestCase):
    pass


class MemoryClaimPolicyTests(MemoryMixin, ClaimPolicyContractMixin, SynchronousTestCase):
    pass


class MemoryRegistryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.registry = MemoryRegistry(self.clock)
        self.successResultOf(self.registry.open())
        self.successResultOf(self.registry.join(node_info("a")))

    def test_a_claim_is_written_at_the_next_tick(self) -> None:
        claim = self.registry.claim("x", "h:1")
        self.assertNoResult(claim)
        self.clock.advance(0)
        self.assertIsInstance(self.successResultOf(claim), Claim)

    def test_only_claims_and_releases_are_held(self) -> None:
        self.registry.hold_writes()
        claim, cancelled = self.registry.claim("x", "h:1"), self.registry.claim("y", "h:1")
        self.clock.advance(1)
        self.assertNoResult(claim)
        self.assertIsNone(self.successResultOf(self.registry.find("x")))
        self.assertTrue(self.successResultOf(self.registry.heartbeat("up", 0)))
        cancelled.cancel()
        self.failureResultOf(cancelled)
        self.registry.release_writes()
        self.successResultOf(claim)
        self.assertIsNone(self.successResultOf(self.registry.find("y")))

    def test_closing_releases_held_writes(self) -> None:
        claim = self.registry.claim("x", "h:1")
        self.clock.advance(0)
        self.registry.hold_writes()
        release = self.registry.release(SessionKey("x", self.successResultOf(claim).generation))
        self.successResultOf(self.registry.close())
        self.successResultOf(release)

    def test_while_unavailable_everything_fails_and_releases_stay_queued(self) -> None:
        claim = self.registry.claim("x", "h:1")
        self.clock.advance(0)
        generation = self.successResultOf(claim).generation
        self.registry.available = False
        pending = [
            self.registry.claim("y", "h:1"),
            self.registry.release(SessionKey("x", generation)),
            self.registry.find("x"),
            self.registry.nodes(),
            self.registry.clients("", 1),
            self.registry.heartbeat("up", 1),
            self.registry.reap(1),
        ]
        self.clock.advance(0)
        for each in pending:
            self.failureResultOf(each, RegistryUnavailableError)
        self.registry.available = True
        self.clock.advance(0)
        self.assertIsNone(self.successResultOf(self.registry.find("x")))
