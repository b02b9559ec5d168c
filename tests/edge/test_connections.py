"""Tests of gateway.clients.sessions: the table, and all of it at once."""

from __future__ import annotations

import struct
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.clients.interface import IClientSessions, SessionInfo
from gateway.clients.sessions import MAX_BAD_MESSAGES
from gateway.registry.interface import RegistryUnavailableError
from tests.edge.fakes import FakeNode, build_request, close_frame, text_frame


class ClientSessionsTest(SynchronousTestCase):
    """IEdge on open connections"""

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

    def test_send_to_nobody(self) -> None:
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
        # The row is yet to go.
        self.assertNoResult(closed)
        self.node.registry.pending_releases[0].callback(None)
        self.assertIs(self.successResultOf(closed), True)
        client.send(close_frame(4003))
        client.lose()
        self.assertEqual(len(self.node.handler.connection_events), 2)
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertEqual(self.node.metrics.closed, {"4003": 1})

    def test_close_whose_row_is_left_to_the_caller(self) -> None:
        client = self.node.connect("a")
        closed = self.sessions.close("a", 1012, "drain", keep_row=True)
        self.assertTrue(self.successResultOf(closed))
        self.assertEqual(client.close_code(), 1012)
        client.lose()
        self.assertEqual((self.sessions.count(), self.node.registry.released), (0, []))

    def test_close_nobody(self) -> None:
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
        """The table stays whole."""

        def fail(client_id: str, generation: int) -> None:
            raise ZeroDivisionError

        self.node.handler.client_disconnected = fail
        client = self.node.connect("a")
        client.lose()
        self.assertEqual(self.sessions.count(), 0)
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_ends_while_it_is_announced(self) -> None:
        client = self.node.dial()
        self.node.handler.client_connected = lambda client_id, generation: client.protocol.close_with(1013)
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

    def test_close_all_of_none(self) -> None:
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
        # Nobody is disconnected because the registry is away; but b is known to be elsewhere.
        self.assertEqual(sorted(self.sessions.client_ids()), ["a", "c"])

    def test_ended_while_it_was_reclaimed(self) -> None:
        """Its release may have been written before its row was there again."""
        client = self.node.connect("a")
        waiting: Deferred[Any] = Deferred()
        self.node.registry.reclaim_results["a"] = waiting
        done = self.sessions.reclaim_all()
        client.lose()
        self.assertEqual(self.node.registry.released, [("a", 1)])
        waiting.callback(object())
        self.successResultOf(done)
        self.assertEqual(self.node.registry.released, [("a", 1), ("a", 1)])
        self.assertEqual(len(self.node.handler.connection_events), 2)

    def test_many_are_reclaimed_in_slices(self) -> None:
        self.node = FakeNode(capacity=600, openings_per_address=0)
        for number in range(501):
            self.node.connect(f"c{number}")
        waiting: Deferred[Any] = Deferred()
        self.node.registry.reclaim_results["c0"] = waiting
        self.node.sessions.reclaim_all()
        self.assertEqual(len(self.node.registry.reclaimed), 500)
        waiting.callback(object())
        self.assertEqual(len(self.node.registry.reclaimed), 501)


class CycleTest(SynchronousTestCase):
    """Many connections, one after the other"""

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
