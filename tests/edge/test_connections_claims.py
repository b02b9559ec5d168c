"""Tests of gateway.clients.sessions: claims, and newer connections of the same client."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.admission import CLAIM_TIMEOUT
from gateway.clients.sessions import RECLAIM_RETRY_INTERVAL
from gateway.registry.interface import ClaimSupersededError, LeaseLostError, RegistryUnavailableError
from tests.edge.fakes import FakeNode, close_frame


class ClaimTest(SynchronousTestCase):
    """From the request to the outcome of the claim"""

    def setUp(self) -> None:
        self.node = FakeNode()
        self.node.registry.grants_at_once = False
        self.sessions = self.node.sessions

    def test_open_once_it_is_in(self) -> None:
        client = self.node.connect("a")
        self.assertEqual(client.transport.pop_written(), b"")
        self.assertIsNone(self.sessions.get("a"))
        self.node.registry.grant()
        client.expect_open()
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 1)])

    def test_opening(self) -> None:
        self.assertIsNone(self.sessions.claim_in_progress("a"))
        client = self.node.connect("a")
        first, second = self.sessions.claim_in_progress("a"), self.sessions.claim_in_progress("a")
        assert first is not None
        assert second is not None
        self.assertIsNone(self.sessions.claim_in_progress("b"))
        seen: list[Any] = []
        first.addCallback(
            lambda _: seen.append((self.sessions.get("a") is not None, self.sessions.claim_in_progress("a")))
        )
        second.cancel()
        self.failureResultOf(second)
        self.node.registry.grant()
        client.expect_open()
        self.assertEqual(seen, [(True, None)])

    def test_opening_of_one_that_is_open(self) -> None:
        self.node.connect("a")
        self.node.registry.grant()
        self.node.connect("a")
        self.assertIsNone(self.sessions.claim_in_progress("a"))

    def test_opening_that_fails(self) -> None:
        self.node.connect("a")
        waiting = self.sessions.claim_in_progress("a")
        assert waiting is not None
        self.node.registry.claims[0][2].errback(RegistryUnavailableError("away"))
        self.assertIsNone(self.successResultOf(waiting))
        self.assertIsNone(self.sessions.claim_in_progress("a"))

    def test_opening_of_two(self) -> None:
        """The outcome is known when one is open, or none can be any more."""
        first, second = self.node.connect("a"), self.node.connect("a")
        waiting = self.sessions.claim_in_progress("a")
        assert waiting is not None
        first.lose()
        self.assertNoResult(waiting)
        self.node.registry.grant()
        second.expect_open()
        self.assertIsNone(self.successResultOf(waiting))

    def test_opening_of_two_of_which_one_is_open(self) -> None:
        self.node.connect("a")
        self.node.connect("a")
        waiting = self.sessions.claim_in_progress("a")
        assert waiting is not None
        self.node.registry.grant(0)
        self.assertIsNone(self.successResultOf(waiting))

    def test_registry_away(self) -> None:
        for error in (RegistryUnavailableError("away"), LeaseLostError("late")):
            client = self.node.connect("a")
            self.node.registry.claims[-1][2].errback(error)
            status, word, headers = client.refusal()
            self.assertEqual((status, word), (503, "registry"))
            self.assertIn("Retry-After", headers)
        self.assertEqual(self.node.registry.released, [])

    def test_claim_that_hangs(self) -> None:
        client = self.node.connect("a")
        self.node.advance(CLAIM_TIMEOUT - 0.25)
        self.assertEqual(client.transport.pop_written(), b"")
        self.node.advance(0.25)
        self.assertEqual(client.refusal()[:2], (503, "registry"))
        # Taken back: the registry releases it, if it comes in after all.
        self.assertEqual(self.node.registry.cancelled, ["a"])
        self.assertIsNone(self.sessions.claim_in_progress("a"))

    def test_dies_meanwhile(self) -> None:
        client = self.node.connect("a")
        waiting = self.sessions.claim_in_progress("a")
        assert waiting is not None
        client.lose()
        self.assertEqual(self.node.registry.cancelled, ["a"])
        self.assertIsNone(self.successResultOf(waiting))
        self.assertEqual(client.transport.pop_written(), b"")
        self.assertEqual(self.node.handler.events, [])

    def revoke_newer_claim(self, generation: int = 99) -> None:
        """The registry has released a claim that nobody waited for."""
        self.sessions.restore_claim("a", generation)

    def test_a_claim_that_is_taken_back_leaves_the_older_connection_its_row(self) -> None:
        """It may have been written before it was cancelled, and then its release removes the only row there is."""
        self.node.connect("a")
        self.node.registry.grant()
        for end in (
            lambda client: client.lose(),
            lambda client: self.node.advance(CLAIM_TIMEOUT),
            lambda client: self.node.registry.claims[-1][2].errback(RegistryUnavailableError("away")),
        ):
            self.node.registry.reclaimed.clear()
            end(self.node.connect("a"))
            # Not before the newer one's row is gone: that would look as if it had won.
            self.assertEqual(self.node.registry.reclaimed, [])
            self.revoke_newer_claim()
            self.assertEqual(self.node.registry.reclaimed, [("a", 1, "192.0.2.1:4711")])
        self.assertIsNotNone(self.sessions.get("a"))

    def test_a_row_is_restored_when_the_registry_is_back(self) -> None:
        self.node.connect("a")
        self.node.registry.grant()
        self.node.registry.reclaim_results["a"] = RegistryUnavailableError("away")
        self.node.connect("a").lose()
        self.revoke_newer_claim()
        del self.node.registry.reclaim_results["a"]
        self.node.registry.reclaimed.clear()
        self.node.advance(RECLAIM_RETRY_INTERVAL)
        self.assertEqual(len(self.node.registry.reclaimed), 1)
        self.node.advance(5 * RECLAIM_RETRY_INTERVAL)
        self.assertEqual(len(self.node.registry.reclaimed), 1)

    def test_a_row_is_not_restored_for_a_connection_that_has_ended(self) -> None:
        older = self.node.connect("a")
        self.node.registry.grant()
        self.node.registry.reclaim_results["a"] = RegistryUnavailableError("away")
        self.node.connect("a").lose()
        self.revoke_newer_claim()
        older.lose()
        self.node.registry.reclaimed.clear()
        self.node.advance(2 * RECLAIM_RETRY_INTERVAL)
        self.assertEqual(self.node.registry.reclaimed, [])

    def test_an_older_connection_waits_for_what_becomes_of_a_newer_claim_of_this_node(self) -> None:
        older = self.node.connect("a")
        self.node.registry.grant()
        older.expect_open()
        self.node.registry.reclaim_results["a"] = ClaimSupersededError("under way")
        self.revoke_newer_claim()
        self.node.advance(RECLAIM_RETRY_INTERVAL - 0.25)
        self.assertEqual(len(self.node.registry.reclaimed), 1)
        del self.node.registry.reclaim_results["a"]
        self.node.advance(0.25)
        self.assertEqual(len(self.node.registry.reclaimed), 2)
        self.assertIsNone(older.close_code())
        self.node.registry.reclaim_results["a"] = ClaimSupersededError("under way")
        self.successResultOf(self.sessions.reclaim_all())
        self.assertIsNone(older.close_code())

    def test_superseded(self) -> None:
        first, second = self.node.connect("a"), self.node.connect("a")
        self.node.registry.claims[0][2].errback(ClaimSupersededError())
        self.node.registry.grant(1)
        first.expect_open()
        self.assertEqual(first.close_code(), 4001)
        second.expect_open()
        self.assertIsNone(second.close_code())
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 1)])
        first.lose()
        self.assertEqual(self.node.registry.released, [])
        self.assertEqual(self.sessions.get("a").generation, 1)

    def test_cannot_be_opened(self) -> None:
        """The claim is released, and nobody is told."""
        client = self.node.connect("a")
        client.protocol.succeedHandshake = lambda subprotocol: 1 / 0
        self.node.registry.grant()
        self.assertEqual(client.refusal()[:2], (500, "internal"))
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertEqual(self.node.handler.events, [])
        self.assertIsNone(self.sessions.claim_in_progress("a"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_unexpected_error(self) -> None:
        client = self.node.connect("a")
        self.node.registry.claims[0][2].errback(ZeroDivisionError())
        self.assertEqual(client.refusal()[:2], (500, "internal"))
        self.assertIsNone(self.sessions.claim_in_progress("a"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_capacity_counts_claims(self) -> None:
        self.node = FakeNode(capacity=2)
        self.node.registry.grants_at_once = False
        self.node.connect("a")
        self.node.registry.grant()
        self.node.connect("b")
        status, word, headers = self.node.connect("c").refusal()
        self.assertEqual((status, word, headers["Retry-After"]), (503, "full", "1"))
        self.node.registry.claims[1][2].errback(RegistryUnavailableError("away"))
        self.assertEqual(self.node.connect("c").transport.pop_written(), b"")

    def test_a_full_node_lets_a_client_come_back(self) -> None:
        """Its older connection may be one that the network has lost."""
        self.node = FakeNode(capacity=1)
        old = self.node.connect("a")
        new = self.node.connect("a")
        self.assertEqual(old.close_code(), 4001)
        self.assertIsNone(new.close_code())


class ReplacementTest(SynchronousTestCase):
    """A newer connection of the same client"""

    def setUp(self) -> None:
        self.node = FakeNode()
        self.sessions = self.node.sessions

    def test_order(self) -> None:
        old = self.node.connect("a")
        closed: list[int | None] = []
        self.node.handler.client_connected = lambda *args: closed.append(old.close_code())
        seen_then: list[Any] = []
        self.node.handler.client_disconnected = lambda *args: seen_then.append(
            (args, self.sessions.get("a").generation)
        )
        self.node.connect("a")
        # The older one's calls fail when the newer one can be called already, and before the newer is announced.
        self.assertEqual(seen_then, [(("a", 1), 2)])
        self.assertEqual(closed, [None])
        self.assertEqual(old.close_code(), 4001)
        self.assertEqual(self.node.metrics.replaced, 1)

    def test_the_older_ones_end_removes_nothing(self) -> None:
        old = self.node.connect("a")
        new = self.node.connect("a")
        old.send(close_frame(4001))
        old.lose()
        self.assertEqual(self.node.registry.released, [])
        self.assertEqual(self.sessions.get("a").generation, 2)
        self.assertEqual(self.sessions.send("a", b"x"), 2)
        self.assertIn((1, b"x"), new.frames())
        self.assertEqual(
            self.node.handler.connection_events,
            [("connected", "a", 1), ("disconnected", "a", 1), ("connected", "a", 2)],
        )
        new.lose()
        self.assertEqual(self.node.registry.released, [("a", 2)])

    def test_a_late_older_claim(self) -> None:
        """The table holds a newer generation than the one that comes in."""
        self.node.registry.grants_at_once = False
        first, second = self.node.connect("a"), self.node.connect("a")
        self.node.registry.grant(1, generation=9)
        self.node.registry.grant(0, generation=8)
        first.expect_open()
        self.assertEqual(first.close_code(), 4001)
        second.expect_open()
        self.assertIsNone(second.close_code())
        self.assertEqual(self.sessions.get("a").generation, 9)
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 9)])
        self.assertEqual(self.node.registry.released, [])

    def test_too_many_at_once(self) -> None:
        """Those whose claims are awaited count: each will replace another."""
        self.node.registry.grants_at_once = False
        clients = [self.node.connect("a") for _ in range(20)]
        refused = [client for client in clients if client.transport.value()]
        self.assertEqual(refused, clients[6:])
        self.assertEqual(refused[0].refusal()[:2], (429, "replaced"))

    def test_too_often(self) -> None:
        """Two programs with one client_id would evict each other for ever."""
        clients = [self.node.connect("a") for _ in range(6)]
        holder = clients[-1]
        self.node.registry.grants_at_once = False
        self.node.advance(20)
        status, word, headers = self.node.connect("a").refusal()
        self.assertEqual((status, word, headers["Retry-After"]), (429, "replaced", "40"))
        self.assertIsNone(holder.close_code())
        self.assertEqual(self.sessions.get("a").generation, 6)
        # Another client is another matter, and so is this one when it has gone or the minute is over.
        self.node.registry.grants_at_once = True
        self.node.connect("b")
        holder.lose()
        holder = self.node.connect("a")
        self.node.advance(40)
        self.node.connect("a")
        self.assertEqual(holder.close_code(), 4001)

    def test_now_and_then(self) -> None:
        self.node = FakeNode()
        for _ in range(30):
            self.node.connect("a")
            self.node.advance(13)
