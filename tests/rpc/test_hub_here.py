"""Tests for what :mod:`gateway.rpc.dispatcher` does for other nodes: it reaches one connection of a client, which is here."""

from __future__ import annotations

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.rpc.pending import Reply
from tests.rpc.fakes import RecordingCall, RemoteDeliveryTestCase, remote_location, result

REPLY = Reply(b"1", None)


class SessionCallTests(RemoteDeliveryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.connect("x", 7)

    def test_ask(self) -> None:
        call = RecordingCall()
        self.assertTrue(self.dispatcher.call_session(call, "x", 7, "m", None, 5.0))
        (request,) = self.sent("x")
        self.receive("x", result(request["id"]), 7)
        self.assertEqual((call.results, self.call_counts()), ([REPLY], (1, 1, {})))

    def test_ask_another_connection(self) -> None:
        """Nothing is done, and never does it go on to another node."""
        self.remember(remote_location(client_id="y"))
        for client_id, generation in (("x", 6), ("x", 8), ("x", 0), ("y", 7), ("y", 0)):
            self.assertFalse(
                self.dispatcher.call_session(RecordingCall(), client_id, generation, "gateway.x", None, 5.0)
            )
            self.assertFalse(self.dispatcher.notify_session(client_id, generation, "gateway.x", None))
        self.assertEqual((self.call_counts(), self.registry.queries, self.remote_nodes.requests), ((0, 0, {}), [], []))
        self.assertEqual(self.sessions.sent, [])

    def test_a_connection_that_turns_out_to_be_dead(self) -> None:
        self.remember(remote_location())
        self.sessions.on_send = lambda client_id, payload: self.disconnect("x")
        self.assertFalse(self.dispatcher.call_session(RecordingCall(), "x", 7, "m", None, 5.0))
        self.assertEqual((self.call_counts(), self.remote_nodes.requests), ((0, 0, {}), []))
        self.assert_nothing_left()

    def test_refused(self) -> None:
        with self.assertRaises(RpcError) as caught:
            self.dispatcher.call_session(RecordingCall(), "x", 7, "gateway.x", None, 5.0)
        self.assertEqual(caught.exception.kind, ErrorKind.INVALID_REQUEST)
        with self.assertRaises(RpcError) as caught:
            self.dispatcher.notify_session("x", 7, "m" * 2000, None)
        self.assertEqual(caught.exception.kind, ErrorKind.TOO_LARGE)
        self.assertEqual(self.call_counts(), (1, 0, {"-32600": 1}))

    def test_notify(self) -> None:
        self.assertTrue(self.dispatcher.notify_session("x", 7, "m", b"[3]"))
        self.assertEqual(self.sessions.sent, [("x", 7, b'{"jsonrpc":"2.0","method":"m","params":[3]}')])

    def test_this_nodes_lease_is_lost(self) -> None:
        """Its own backends' calls go on."""
        self.lease_held = False
        call = RecordingCall()
        self.assertTrue(self.dispatcher.try_call(call, "x", "m", None))
        self.assertEqual(len(self.sent("x")), 1)
