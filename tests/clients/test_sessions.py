"""Tests of gateway.clients.sessions: open sessions, close_all, reclaim_all, claims and replacement."""

from __future__ import annotations

import struct
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.clients.admission import CLAIM_TIMEOUT
from gateway.clients.interface import IClientSessions, SessionInfo
from gateway.clients.sessions import MAX_BAD_MESSAGES, RECLAIM_RETRY_INTERVAL
from gateway.registry.errors import (
    ClaimSupersededError,
    LeaseLostError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from gateway.registry.interface import SessionKey
from tests.builders.frames import build_frame, build_request, close_frame, text_frame
from tests.fakes.clients import FakeNode


class ClientSessionsTest(SynchronousTestCase):
    """IClientSessions with open connections"""

    def setUp(self) -> None:
        self.node = FakeNode()
        self.sessions = self.node.sessions

    def test_interface(self) -> None:
        verifyObject(IClientSessions, self.sessions)

    def test_get(self) -> None:
        self.assertIsNone(self.sessions.get("a"))
        self.node.connect("a")
        self.assertEqual(self.sessions.get("a"), SessionInfo("a", 1, 1001.0, "192.0.2.1:4711"))

    def test_ids_and_count(self) -> None:
        for name in "abc":
            self.node.connect(name)
        self.assertEqual(sorted(self.sessions.client_ids()), ["a", "b", "c"])
        self.assertEqual(self.sessions.count(), 3)
        self.assertEqual(self.node.metrics.opened, 3)

    def test_unsent(self) -> None:
        clients = [self.node.connect(name) for name in "abc"]
        self.assertEqual(self.sessions.unsent_bytes(), 0)
        for client in clients[:2]:
            transport = client.protocol.transport
            transport.dataBuffer, transport.offset, transport._tempDataLen = bytes(1000), 100, 7
        self.assertEqual(self.sessions.unsent_bytes(), 2 * 907)
        clients[0].send(close_frame(1000))
        self.assertEqual(self.sessions.unsent_bytes(), 907)

    def test_send(self) -> None:
        client = self.node.connect("a")
        self.assertEqual(self.sessions.send("a", b"hello"), 1)
        self.assertEqual(self.sessions.send("a", b"again", 1), 1)
        self.assertEqual(client.frames(), [(1, b"hello"), (1, b"again")])

    def test_send_to_an_unknown_client(self) -> None:
        client = self.node.connect("a")
        self.assertEqual(self.sessions.send("b", b"x"), 0)
        self.assertEqual(self.sessions.send("a", b"x", 2), 0)
        client.send(close_frame(1000))
        self.assertEqual(self.sessions.send("a", b"x"), 0)

    def test_close(self) -> None:
        client = self.node.connect("a")
        self.node.registry.pending_releases = []
        closed = self.sessions.close("a", 4003, "go")
        self.assertEqual(client.frames(), [(8, struct.pack("!H", 4003) + b"go")])
        self.assertIsNone(self.sessions.get("a"))
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 1), ("disconnected", "a", 1)])
        # The row is not removed yet.
        self.assertNoResult(closed)
        self.node.registry.pending_releases[0].callback(None)
        self.assertIs(self.successResultOf(closed), True)
        client.send(close_frame(4003))
        client.lose()
        self.assertEqual(len(self.node.handler.connection_events), 2)
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertEqual(self.node.metrics.closed, {"4003": 1})

    def test_close_with_keep_row(self) -> None:
        client = self.node.connect("a")
        closed = self.sessions.close("a", 1012, "drain", keep_row=True)
        self.assertTrue(self.successResultOf(closed))
        self.assertEqual(client.close_code(), 1012)
        client.lose()
        self.assertEqual((self.sessions.count(), self.node.registry.released), (0, []))

    def test_close_an_unknown_client(self) -> None:
        self.assertIs(self.successResultOf(self.sessions.close("a", 4003, "go")), False)
        self.node.connect("a")
        self.assertIs(self.successResultOf(self.sessions.close("a", 4003, "go", 7)), False)
        self.assertEqual(self.sessions.count(), 1)
        self.assertIs(self.successResultOf(self.sessions.close("a", 4003, "go", 1)), True)

    def test_close_without_registry(self) -> None:
        client = self.node.connect("a")
        self.node.registry.release_error = RegistryUnavailableError("away")
        self.failureResultOf(self.sessions.close("a", 4003, "go"), RegistryUnavailableError)
        self.assertEqual(client.close_code(), 4003)
        self.assertEqual(self.sessions.count(), 0)

    def test_disconnect_without_registry(self) -> None:
        client = self.node.connect("a")
        self.node.registry.release_error = RegistryUnavailableError("away")
        client.lose()
        self.assertEqual(self.sessions.count(), 0)

    def test_disconnect(self) -> None:
        client = self.node.connect("a")
        client.lose()
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 1), ("disconnected", "a", 1)])
        self.assertEqual(self.node.registry.released, [("a", 1)])

    def test_close_from_within_a_message(self) -> None:
        client = self.node.connect("a")
        self.node.handler.on_message = lambda payload: self.sessions.close("a", 4003, "go")
        client.send(text_frame(b"one") + text_frame(b"two"))
        self.assertEqual(self.node.handler.messages, [b"one"])
        self.assertEqual(client.close_code(), 4003)

    def test_bad_messages(self) -> None:
        client = self.node.connect("a")
        client.send(
            text_frame(b"bad") * (MAX_BAD_MESSAGES - 1)
            + text_frame(b"{}")
            + text_frame(b"bad") * (MAX_BAD_MESSAGES - 1)
        )
        self.assertIsNone(client.close_code())
        client.send(text_frame(b"bad") * 3)
        self.assertEqual(client.close_code(), 1008)
        self.assertEqual(len(self.node.handler.messages), 2 * MAX_BAD_MESSAGES)
        self.assertEqual(self.sessions.count(), 0)

    def test_error_in_the_handler(self) -> None:
        """The table stays consistent."""

        def fail(key: SessionKey) -> None:
            raise ZeroDivisionError

        self.node.handler.client_disconnected = fail
        client = self.node.connect("a")
        client.lose()
        self.assertEqual(self.sessions.count(), 0)
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_lost_while_the_handler_is_notified(self) -> None:
        client = self.node.dial()
        self.node.handler.client_connected = lambda key: client.protocol.close_with(1013)
        client.send(build_request("/v1/connect?client_id=a"))
        client.expect_open()
        self.assertEqual(client.close_code(), 1013)
        self.assertEqual(self.sessions.count(), 0)
        self.assertEqual(self.node.handler.events, [("disconnected", "a", 1)])
        self.assertEqual(self.node.registry.released, [("a", 1)])


class AllSessionsTest(SynchronousTestCase):
    """close_all() and reclaim_all()"""

    def setUp(self) -> None:
        self.node = FakeNode()
        self.sessions = self.node.sessions

    def test_close_all(self) -> None:
        clients = [self.node.connect(name) for name in "ab"]
        self.node.registry.grants_at_once = False
        claiming = self.node.connect("c")
        self.node.registry.pending_releases = []
        closed = self.sessions.close_all(1001, "going away")
        self.assertEqual([client.close_code() for client in clients], [1001, 1001])
        self.assertEqual(claiming.refusal()[:2], (503, "draining"))
        self.assertEqual(self.node.registry.cancelled, ["c"])
        self.assertEqual(self.node.connect("d").refusal()[:2], (503, "draining"))
        self.node.registry.pending_releases[0].callback(None)
        self.assertNoResult(closed)
        self.node.registry.pending_releases[1].errback(RegistryUnavailableError("away"))
        self.assertIsNone(self.successResultOf(closed))
        self.assertEqual(self.sessions.count(), 0)

    def test_close_all_without_clients(self) -> None:
        self.assertIsNone(self.successResultOf(self.sessions.close_all(1001, "going away")))

    def test_reclaim(self) -> None:
        clients = {name: self.node.connect(name) for name in "abc"}
        self.node.registry.reclaim_results["b"] = None
        self.assertIsNone(self.successResultOf(self.sessions.reclaim_all()))
        self.assertEqual(
            sorted(self.node.registry.reclaimed), [(name, at, "192.0.2.1:4711") for at, name in enumerate("abc", 1)]
        )
        self.assertEqual([client.close_code() for client in clients.values()], [None, 4001, None])
        self.assertEqual(sorted(self.sessions.client_ids()), ["a", "c"])

    def test_reclaim_without_registry(self) -> None:
        for name in "abc":
            self.node.connect(name)
        self.node.registry.reclaim_results["a"] = RegistryUnavailableError("away")
        self.node.registry.reclaim_results["b"] = None
        self.failureResultOf(self.sessions.reclaim_all(), RegistryUnavailableError)
        # No client is disconnected because the registry is unavailable; but b is known to have a newer claim.
        self.assertEqual(sorted(self.sessions.client_ids()), ["a", "c"])

    def test_a_reclaim_that_the_registry_refuses_is_repeated_alone(self) -> None:
        for name in "abc":
            self.node.connect(name)
        self.node.registry.reclaim_results["a"] = RegistryRefusedError("too large")
        self.successResultOf(self.sessions.reclaim_all())
        self.assertEqual(sorted(self.sessions.client_ids()), ["a", "b", "c"])
        del self.node.registry.reclaimed[:]
        self.node.advance(RECLAIM_RETRY_INTERVAL)
        self.assertEqual([client_id for client_id, *_ in self.node.registry.reclaimed], ["a"])

    def test_closed_while_reclaimed(self) -> None:
        """Its release may have been written before its row was restored."""
        client = self.node.connect("a")
        waiter: Deferred[Any] = Deferred()
        self.node.registry.reclaim_results["a"] = waiter
        done = self.sessions.reclaim_all()
        client.lose()
        self.assertEqual(self.node.registry.released, [("a", 1)])
        waiter.callback(object())
        self.successResultOf(done)
        self.assertEqual(self.node.registry.released, [("a", 1), ("a", 1)])
        self.assertEqual(len(self.node.handler.connection_events), 2)

    def test_reclaim_in_batches(self) -> None:
        self.node = FakeNode(capacity=600, openings_per_address=0)
        for number in range(501):
            self.node.connect(f"c{number}")
        waiter: Deferred[Any] = Deferred()
        self.node.registry.reclaim_results["c0"] = waiter
        self.node.sessions.reclaim_all()
        self.assertEqual(len(self.node.registry.reclaimed), 500)
        waiter.callback(object())
        self.assertEqual(len(self.node.registry.reclaimed), 501)


class CycleTest(SynchronousTestCase):
    """Many connections in sequence"""

    def test_nothing_is_left(self) -> None:
        node = FakeNode(openings_per_address=0)
        for number in range(300):
            client = node.connect(f"c{number % 7}")
            client.send(text_frame(b"{}"))
            client.lose()
        node.advance(10)
        self.assertEqual(node.sessions.count(), 0)
        self.assertEqual(len(node.registry.released), 300)
        self.assertEqual(node.factory.handshake_limiter.in_progress, 0)
        self.assertEqual(node.clock.getDelayedCalls(), [])
        left = {**vars(node.sessions), **vars(node.sessions._admission)}
        self.assertEqual([left[name] for name in ("_awake", "_claiming", "_waiters", "_claim_count")], [{}, {}, {}, 0])


class ClaimTest(SynchronousTestCase):
    """From the request to the result of the claim"""

    def setUp(self) -> None:
        self.node = FakeNode()
        self.node.registry.grants_at_once = False
        self.sessions = self.node.sessions

    def test_open_once_claimed(self) -> None:
        client = self.node.connect("a")
        self.assertEqual(client.transport.pop_written(), b"")
        self.assertIsNone(self.sessions.get("a"))
        self.node.registry.grant()
        client.expect_open()
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 1)])

    def test_claim_in_progress(self) -> None:
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

    def test_claim_in_progress_of_an_open_client(self) -> None:
        self.node.connect("a")
        self.node.registry.grant()
        self.node.connect("a")
        self.assertIsNone(self.sessions.claim_in_progress("a"))

    def test_claim_in_progress_that_fails(self) -> None:
        self.node.connect("a")
        waiter = self.sessions.claim_in_progress("a")
        assert waiter is not None
        self.node.registry.claims[0][2].errback(RegistryUnavailableError("away"))
        self.assertIsNone(self.successResultOf(waiter))
        self.assertIsNone(self.sessions.claim_in_progress("a"))

    def test_two_claims_in_progress(self) -> None:
        """Waiters are notified when one is open, or none can be any more."""
        first, second = self.node.connect("a"), self.node.connect("a")
        waiter = self.sessions.claim_in_progress("a")
        assert waiter is not None
        first.lose()
        self.assertNoResult(waiter)
        self.node.registry.grant()
        second.expect_open()
        self.assertIsNone(self.successResultOf(waiter))

    def test_two_claims_in_progress_of_which_one_is_open(self) -> None:
        self.node.connect("a")
        self.node.connect("a")
        waiter = self.sessions.claim_in_progress("a")
        assert waiter is not None
        self.node.registry.grant(0)
        self.assertIsNone(self.successResultOf(waiter))

    def test_registry_unavailable(self) -> None:
        for error, retry_after in (
            (RegistryUnavailableError("away"), "2"),
            (LeaseLostError("late"), "2"),
            (RegistryRefusedError("too large"), "5"),
        ):
            client = self.node.connect("a")
            self.node.registry.claims[-1][2].errback(error)
            status, word, headers = client.refusal()
            self.assertEqual((status, word), (503, "registry"))
            self.assertEqual(headers["Retry-After"], retry_after)
        self.assertEqual(self.node.registry.released, [])

    def test_claim_that_hangs(self) -> None:
        client = self.node.connect("a")
        self.node.advance(CLAIM_TIMEOUT - 0.25)
        self.assertEqual(client.transport.pop_written(), b"")
        self.node.advance(0.25)
        self.assertEqual(client.refusal()[:2], (503, "registry"))
        # Cancelled: the registry revokes the claim, if it was written after all.
        self.assertEqual(self.node.registry.cancelled, ["a"])
        self.assertIsNone(self.sessions.claim_in_progress("a"))

    def test_lost_meanwhile(self) -> None:
        client = self.node.connect("a")
        waiter = self.sessions.claim_in_progress("a")
        assert waiter is not None
        client.lose()
        self.assertEqual(self.node.registry.cancelled, ["a"])
        self.assertIsNone(self.successResultOf(waiter))
        self.assertEqual(client.transport.pop_written(), b"")
        self.assertEqual(self.node.handler.events, [])

    def revoke_newer_claim(self, generation: int = 99) -> None:
        """Let the registry release an abandoned claim."""
        self.sessions.restore_claim(SessionKey("a", generation))

    def test_revoked_claim_restores_the_row_of_the_older_connection(self) -> None:
        """The claim may have been written before it was cancelled; then its release removes the only row."""
        self.node.connect("a")
        self.node.registry.grant()
        for end in (
            lambda client: client.lose(),
            lambda client: self.node.advance(CLAIM_TIMEOUT),
            lambda client: self.node.registry.claims[-1][2].errback(RegistryUnavailableError("away")),
        ):
            self.node.registry.reclaimed.clear()
            end(self.node.connect("a"))
            # Not before the newer one's row is removed: it would look as if that had won.
            self.assertEqual(self.node.registry.reclaimed, [])
            self.revoke_newer_claim()
            self.assertEqual(self.node.registry.reclaimed, [("a", 1, "192.0.2.1:4711")])
        self.assertIsNotNone(self.sessions.get("a"))

    def test_row_is_restored_when_the_registry_is_available(self) -> None:
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

    def test_row_is_not_restored_for_a_closed_connection(self) -> None:
        older = self.node.connect("a")
        self.node.registry.grant()
        self.node.registry.reclaim_results["a"] = RegistryUnavailableError("away")
        self.node.connect("a").lose()
        self.revoke_newer_claim()
        older.lose()
        self.node.registry.reclaimed.clear()
        self.node.advance(2 * RECLAIM_RETRY_INTERVAL)
        self.assertEqual(self.node.registry.reclaimed, [])

    def test_older_connection_waits_for_a_newer_claim_of_this_node(self) -> None:
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
        """The claim is released, and the handler is not notified."""
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

    def test_full_node_accepts_a_connected_client_again(self) -> None:
        """The network may have lost its older connection."""
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
        self.node.handler.client_connected = lambda key: closed.append(old.close_code())
        seen_then: list[Any] = []
        self.node.handler.client_disconnected = lambda key: seen_then.append((key, self.sessions.get("a").generation))
        self.node.connect("a")
        # When the older one's calls fail, the newer one can be called already, and the handler has not been notified
        # of it.
        self.assertEqual(seen_then, [(("a", 1), 2)])
        self.assertEqual(closed, [None])
        self.assertEqual(old.close_code(), 4001)
        self.assertEqual(self.node.metrics.replaced, 1)

    def test_close_of_the_older_connection_removes_nothing(self) -> None:
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

    def test_late_older_claim(self) -> None:
        """The table has a newer generation than the one that opens."""
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
        """Claims in progress count: each will replace another."""
        self.node.registry.grants_at_once = False
        clients = [self.node.connect("a") for _ in range(20)]
        refused = [client for client in clients if client.transport.value()]
        self.assertEqual(refused, clients[6:])
        self.assertEqual(refused[0].refusal()[:2], (429, "replaced"))

    def test_dead_connections_are_not_counted(self) -> None:
        """One program on a bad line is not taken for two: its old connections do not answer."""
        clients = [self.node.connect("a") for _ in range(6)]
        for number in range(4):
            client = self.node.dial()
            client.send(build_request())
            self.node.advance(2)
            self.assertFalse(client.transport.value().startswith(b"HTTP/1.1 429"), number)
            self.node.advance(0.5)
            self.assertTrue(clients[-1].transport.aborted)
            client.expect_open()
            clients.append(client)
        self.assertEqual(self.node.sessions.count(), 1)

    def test_slowed_connection_is_not_taken_for_dead(self) -> None:
        """Its answer is not read."""
        self.node = FakeNode(messages_per_client=1)
        clients = [self.node.connect("a") for _ in range(6)]
        clients[-1].send(text_frame(b"{}") * 60)
        self.assertTrue(clients[-1].transport.paused)
        client = self.node.dial()
        client.send(build_request())
        self.node.advance(2.5)
        self.assertEqual(client.refusal()[:2], (429, "replaced"))
        self.assertFalse(clients[-1].transport.aborted)

    def test_too_often(self) -> None:
        """Two programs with one client_id would evict each other without end."""
        clients = [self.node.connect("a") for _ in range(6)]
        holder = clients[-1]
        self.node.registry.grants_at_once = False
        self.node.advance(19.5)
        client = self.node.connect("a")
        self.node.advance(0.25)
        self.assertEqual(client.transport.value(), b"")
        # The holder answers the ping.
        self.assertIn((9, b""), holder.frames())
        holder.send(build_frame(10, b""))
        self.node.advance(0.25)
        status, word, headers = client.refusal()
        self.assertEqual((status, word, headers["Retry-After"]), (429, "replaced", "40"))
        self.assertIsNone(holder.close_code())
        self.assertEqual(self.sessions.get("a").generation, 6)
        # Another client is not affected, nor is this one when it is no longer connected, or after the window.
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
