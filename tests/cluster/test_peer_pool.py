"""Tests of gateway.cluster.peer_pool: connections, reconnects, keep-alive and pending requests."""

from __future__ import annotations

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.auth import WRONG_NODE
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.peer_pool import (
    INITIAL_BACKOFF,
    LOG_INTERVAL,
    MAX_BACKOFF,
    MIN_ABSENCES,
    MIN_UPTIME,
    NO_RESPONSE,
    PeerConnector,
    PeerRequest,
    PendingRequests,
    describe_failure,
)
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.frames import PING, PONG, encode
from gateway.rpc.errors import NotDelivered, NotDeliveredError
from gateway.rpc.pending import Call
from gateway.settings import ConfigError
from gateway.websocket.client import CloseEvent
from gateway.websocket.errors import HandshakeError, HandshakeRefusedError
from tests.builders.peer_client import PeerClientCase, RecordingCall
from tests.fakes.peer import B, C, RemotePeer, location, node_status


class KeepAliveTests(PeerClientCase):
    def pass_time(self, seconds: float) -> None:
        self.net.pump([1.0] * int(seconds))

    def test_idle_connection_is_pinged(self) -> None:
        peer = self.connected_peer()
        self.pass_time(9)
        self.assertEqual(peer.frames(), [])
        self.pass_time(1)
        self.assertEqual(peer.frames(), [(PING, b"")])
        for _ in range(20):
            peer.send(encode(b"", PONG))
            self.pass_time(5)
        self.assertEqual(self.peer_client.count(), 1)

    def test_no_ping_while_there_is_input(self) -> None:
        peer = self.connected_peer()
        for _ in range(10):
            call = self.start_call()
            peer.respond(peer.requests()[0])
            self.assertEqual(len(call.results), 1)
            self.pass_time(5)
        self.assertEqual(peer.frames(), [])

    def test_silent_connection_is_aborted(self) -> None:
        peer, call = self.start_connected_call()
        self.pass_time(19)
        self.assertEqual((self.peer_client.count(), call.results), (1, []))
        self.pass_time(1)
        self.assertEqual(self.peer_client.count(), 0)
        self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, None)
        self.assertTrue(peer.transport.is_aborted)
        self.assertEqual(self.metrics.link_failures, 1)
        peer.disconnect()
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_suspended_process_aborts_no_connection(self) -> None:
        """No connection is aborted for input that could not be read."""
        self.connected_peer()
        self.pass_time(14)
        for _ in range(3):
            self.net.advance(1000)
        self.assertEqual(self.peer_client.count(), 1)
        self.pass_time(20)
        self.assertEqual(self.peer_client.count(), 0)

    def test_connections_are_independent(self) -> None:
        self.connected_peer()
        self.pass_time(3)
        self.peer_client.connect(location(node_id=C))
        other = self.net.open()
        for _ in range(20):
            other.send(encode(b"", PONG))
            self.pass_time(1)
        self.assertEqual(list(self.peer_client._connections), [C])


class NodesChangedTests(PeerClientCase):
    def nodes_changed(self, *nodes: str) -> None:
        self.peer_client.nodes_changed([node_status(node_id) for node_id in nodes])

    def test_live(self) -> None:
        self.connected_peer()
        for _ in range(5):
            self.nodes_changed(C, B)
        self.assertEqual(self.peer_client.count(), 1)

    def test_gone(self) -> None:
        peer = self.connected_peer()
        for _ in range(MIN_ABSENCES):
            self.assertEqual(self.peer_client.count(), 1)
            self.nodes_changed(C)
        self.assertEqual(self.peer_client.count(), 0)
        self.assertEqual(peer.frames(), [(8, b"\x03\xe9going away")])
        self.assertEqual((self.peer_client._pool._connectors, self.metrics.link_failures), ({}, 0))

    def test_listed_again(self) -> None:
        self.connected_peer()
        for _ in range(3):
            self.nodes_changed(C)
            self.nodes_changed(B)
        self.assertEqual(self.peer_client.count(), 1)

    def test_closes_after_requests_in_flight(self) -> None:
        peer, call = self.start_connected_call()
        for _ in range(5):
            self.nodes_changed()
        self.assertEqual(self.peer_client.count(), 1)
        peer.respond(peer.last)
        self.assertEqual(len(call.results), 1)
        self.nodes_changed()
        self.assertEqual(self.peer_client.count(), 0)

    def test_attempt_is_cancelled(self) -> None:
        waiting = self.peer_client.connect(location())
        for _ in range(MIN_ABSENCES):
            self.nodes_changed()
        self.failureResultOf(waiting, RpcError)
        self.assertEqual(self.peer_client._pool._connectors, {})
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_failures_are_forgotten(self) -> None:
        self.peer_client.connect(location()).addErrback(lambda _: None)
        self.net.refuse()
        for _ in range(MIN_ABSENCES):
            self.nodes_changed()
        self.peer_client.connect(location())
        self.assertEqual(self.net.attempts(), 2)


class StopTests(PeerClientCase):
    def test_stop(self) -> None:
        peer, call = self.start_connected_call()
        self.peer_client.connect(location(node_id=C))
        other = self.net.open()
        stopping = self.peer_client.stop()
        self.assert_failed(call, ErrorKind.CONNECTION_LOST, True, None)
        for each in (peer, other):
            self.assertEqual(each.frames()[-1], (8, b"\x03\xe9going away"))
            self.assertNoResult(stopping)
            each.disconnect()
        self.successResultOf(stopping)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_no_connection_after_stop(self) -> None:
        self.connected_peer()
        self.peer_client.stop()
        self.assertFalse(self.start_call().started)
        self.failureResultOf(self.peer_client.connect(location()), RpcError)
        self.failureResultOf(self.peer_client.has_client(location(), 1.0), PeerUnreachableError)
        self.peer_client.notify_takeover(location(), 8)
        self.net.advance(2)
        self.assertEqual(self.net.attempts(), 1)

    def test_no_connection_by_a_callback_during_stop(self) -> None:
        peer, _ = self.start_connected_call()
        again = []
        self.patch(
            RecordingCall, "complete", lambda call, outcome: again.append(self.peer_client.connect(location(node_id=C)))
        )
        stopping = self.peer_client.stop()
        self.failureResultOf(again[0], RpcError)
        peer.disconnect()
        self.successResultOf(stopping)
        self.assertEqual((self.net.attempts(), self.metrics.link_failures), (1, 0))

    def test_stop_while_connecting(self) -> None:
        waiting = self.peer_client.connect(location())
        self.successResultOf(self.peer_client.stop())
        self.failureResultOf(waiting, RpcError)
        self.assertEqual(self.net.getDelayedCalls(), [])

    def test_stop_waits_for_lost_connections(self) -> None:
        """Its transport is still open."""
        peer = self.connected_peer()
        peer.send(b"\x88\x02\x03\xe9")
        stopping: Deferred[None] = self.peer_client.stop()
        self.assertNoResult(stopping)
        peer.disconnect()
        self.successResultOf(stopping)


class ReconnectTests(PeerClientCase):
    def test_connection_lost(self) -> None:
        first: RemotePeer = self.connected_peer()
        self.net.advance(3)
        first.disconnect()
        self.assertEqual(self.peer_client.count(), 0)
        self.peer_client.connect(location())
        self.net.advance(0.1)
        self.peer_client.connect(location())
        self.net.open()
        self.assertTrue(self.start_call().started)
        self.assertEqual((self.net.attempts(), self.peer_client.count()), (2, 1))

    def test_callback_of_a_lost_call_reconnects(self) -> None:
        """The callback of a failed call may connect again."""
        peer, _ = self.start_connected_call()
        again = []
        self.net.advance(3)
        self.patch(RecordingCall, "complete", lambda call, outcome: again.append(self.peer_client.connect(location())))
        peer.disconnect()
        self.net.open()
        self.successResultOf(again[0])


URL = "ws://b:8081"


class FakeConnection:
    def __init__(self) -> None:
        self.closed: Deferred[CloseEvent] = Deferred()
        self.close_codes: list[int] = []

    def close_with(self, code: int, reason: str) -> None:
        self.close_codes.append(code)
        self.closed.callback(CloseEvent(code, reason, initiated_locally=True))


class PeerConnectorTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.attempts: list[tuple[str, str, FakeConnection, Deferred[None]]] = []
        self.events: list[tuple[str, str, object]] = []
        self.error: Exception | None = None
        self.connector = PeerConnector(
            "b",
            clock=self.clock,
            metrics=self.metrics,
            open_connection=self.open_connection,
            on_open=lambda node_id, connection: self.events.append(("opened", node_id, connection)),
            on_close=lambda node_id, connection: self.events.append(("ended", node_id, connection)),
        )

    def open_connection(self, node_id: str, url: str) -> tuple[FakeConnection, Deferred[None]]:
        if self.error is not None:
            raise self.error
        self.attempts.append((node_id, url, FakeConnection(), Deferred()))
        return self.attempts[-1][2:]

    def connected(self) -> FakeConnection:
        self.connector.connect(URL)
        self.attempts[-1][3].callback(None)
        return self.attempts[-1][2]

    def fail(self, error: Exception | None = None) -> None:
        waiting = self.connector.connect(URL)
        self.attempts[-1][3].errback(error or ConnectionRefusedError())
        self.failureResultOf(waiting, PeerUnreachableError)

    def test_one_attempt_for_all_callers(self) -> None:
        waiting = [self.connector.connect(URL) for _ in range(3)]
        self.assertEqual([each[:2] for each in self.attempts], [("b", URL)])
        waiting[1].addErrback(lambda _: None).cancel()
        self.assertFalse(self.connector.is_idle)
        self.attempts[0][3].callback(None)
        self.successResultOf(waiting[0])
        self.successResultOf(waiting[2])
        connection = self.attempts[0][2]
        self.assertIs(self.connector.connection, connection)
        self.assertEqual(self.events, [("opened", "b", connection)])
        self.successResultOf(self.connector.connect(URL))
        self.assertEqual(len(self.attempts), 1)

    def test_failed(self) -> None:
        waiting = [self.connector.connect(URL) for _ in range(2)]
        self.attempts[0][3].errback(ConnectionRefusedError())
        for each in waiting:
            failed = self.failureResultOf(each, PeerUnreachableError).value
            self.assertEqual(str(failed), f"node b at {URL}: nothing listens there (connection refused)")
            self.assertEqual((failed.sent, failed.refused), (False, True))
        self.assertEqual(self.metrics.link_failures, 1)

    def test_fails_at_once_while_backing_off(self) -> None:
        wait = INITIAL_BACKOFF
        for n in range(1, 9):
            self.fail()
            self.assertEqual(len(self.attempts), n)
            self.clock.advance(wait - 0.01)
            self.failureResultOf(self.connector.connect(URL), PeerUnreachableError)
            self.assertEqual(len(self.attempts), n)
            self.clock.advance(0.02)
            wait = min(2 * wait, MAX_BACKOFF)
        self.connected()

    def test_many_failures(self) -> None:
        for _ in range(2000):
            self.fail()
            self.clock.advance(MAX_BACKOFF)
        self.connected()

    def test_invalid_url_or_secret(self) -> None:
        for error in (
            ValueError("no url"),
            ConfigError("cluster-secret-file", "bad"),
            PeerUnreachableError("stopping"),
        ):
            self.error = error
            failed = self.failureResultOf(self.connector.connect(URL), PeerUnreachableError).value
            self.assertIn(str(error), str(failed))
            self.assertFalse(failed.refused)
            self.clock.advance(MAX_BACKOFF)
        self.assertTrue(self.connector.is_idle)

    def test_connection_lost(self) -> None:
        connection = self.connected()
        self.clock.advance(MIN_UPTIME)
        connection.closed.callback(CloseEvent(1006, "lost"))
        self.assertEqual(self.events[-1], ("ended", "b", connection))
        self.assertEqual(self.metrics.link_failures, 1)
        self.assertIsNot(self.connected(), connection)

    def test_lost_at_once(self) -> None:
        """A connection that does not last counts as a failed attempt."""
        for n in range(3):
            self.connected().closed.callback(CloseEvent(1008, "go away"))
            failed = self.failureResultOf(self.connector.connect(URL), PeerUnreachableError).value
            self.assertIn("the connection was lost: 1008 go away", str(failed))
            self.assertEqual(len(self.attempts), n + 1)
            self.clock.advance(INITIAL_BACKOFF * 2**n)

    def test_closed_normally(self) -> None:
        connection = self.connected()
        connection.closed.callback(CloseEvent(1001, "going away"))
        self.assertEqual(self.metrics.link_failures, 0)
        self.assertEqual(self.events[-1], ("ended", "b", connection))
        self.connected()

    def test_log(self) -> None:
        with capturedLogs() as logs:
            for _ in range(20):
                self.fail(HandshakeRefusedError(401, {}, b'{"error":"peer","message":"the cluster secrets differ\\n"}'))
                self.clock.advance(MAX_BACKOFF)
            self.connected()
        texts = [(log["log_level"], log["log_format"].format(**log)) for log in logs]
        self.assertEqual([level for level, _ in texts], [LogLevel.warn] * 2 + [LogLevel.info])
        self.assertLess(19 * MAX_BACKOFF, 2 * LOG_INTERVAL)
        self.assertEqual(
            texts[0][1],
            f"node b at {URL} cannot be reached: the gateway answered 401 (peer: the cluster secrets differ\\n); have both "
            "nodes the same --cluster-secret-file, and clocks that agree?",
        )
        self.assertEqual(texts[-1][1], f"node b at {URL} is connected again")

    def test_log_of_another_node_at_that_url(self) -> None:
        """It is no failure: the address of a node that was killed has been given to another."""
        with capturedLogs() as logs:
            for error in ("peer", "wrong_node"):
                body = msgspec.json.encode({"error": error, "message": f"no: {WRONG_NODE}"})
                self.fail(HandshakeRefusedError(401, {}, body))
                self.failureResultOf(self.connector.connect(URL), PeerUnreachableError)
                self.clock.advance(MAX_BACKOFF)
        self.assertEqual(
            [(log["log_level"], log["log_format"].format(**log)) for log in logs],
            [(LogLevel.info, f"node b is gone: another node runs at {URL} now")],
        )
        self.assertEqual(self.metrics.link_failures, 0)

    def test_stop(self) -> None:
        connection = self.connected()
        self.connector.stop()
        self.assertEqual(connection.close_codes, [1001])
        self.assertTrue(self.connector.is_idle)

    def test_stop_cancels_an_attempt(self) -> None:
        waiting = self.connector.connect(URL)
        self.connector.stop()
        self.failureResultOf(waiting, PeerUnreachableError)
        self.assertEqual(self.metrics.link_failures, 0)
        self.assertTrue(self.connector.is_idle)
        self.connector.stop()

    def test_refused(self) -> None:
        """Set if it is certain that the node no longer listens at that address."""
        other = b'{"error":"peer","message":"this is no request of a node: %b"}' % WRONG_NODE.encode()
        for error, refused in (
            (ConnectionRefusedError(), True),
            (HandshakeRefusedError(401, {}, other), True),
            (HandshakeRefusedError(401, {}, b""), False),
            (HandshakeError("lost"), False),
        ):
            waiting = self.connector.connect(URL)
            self.attempts[-1][3].errback(error)
            self.assertEqual(self.failureResultOf(waiting, PeerUnreachableError).value.refused, refused, error)
            self.clock.advance(MAX_BACKOFF)

    def test_failure_descriptions(self) -> None:
        for error, text in (
            (HandshakeError("lost"), "lost"),
            (RuntimeError(""), "RuntimeError"),
            (RuntimeError("a\nb"), "a b"),
            (HandshakeRefusedError(503, {}, b""), "the response is 503, and not the gateway's"),
        ):
            self.assertEqual(describe_failure(Failure(error)), text)


class PendingRequestsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.pending = PendingRequests(self.clock, max_calls=9, max_per_owner=9)

    def start_request(self, owner: str = "connection", timeout: float = 5.0) -> PeerRequest:
        request = PeerRequest(self.pending.discard)
        self.pending.start(request, owner, "x", timeout)
        self.pending.mark_sent(request)
        return request

    def error_of(self, request: PeerRequest) -> tuple[ErrorKind, bool, str | None]:
        error = self.failureResultOf(request, RpcError).value
        self.assertEqual(error.client_id, "x")
        return error.kind, error.sent, error.detail

    def test_deadline(self) -> None:
        request = self.start_request()
        self.clock.advance(5.1)
        self.assertEqual(self.error_of(request), (ErrorKind.NODE_UNREACHABLE, True, NO_RESPONSE))

    def test_timeout_of_the_peer(self) -> None:
        """The client did not respond, not the node."""
        request = self.start_request()
        self.assertIs(self.pending.pop("connection", request.id), request)
        self.pending.complete_with_error(request, RpcError(ErrorKind.TIMEOUT, "x"))
        self.assertEqual(self.error_of(request), (ErrorKind.TIMEOUT, True, None))

    def test_pop(self) -> None:
        request = self.start_request()
        self.assertIsNone(self.pending.pop("another connection", request.id))
        self.assertIsNone(self.pending.pop("connection", b'"unknown"'))
        self.assertIs(self.pending.pop("connection", request.id), request)
        self.assertIsNone(self.pending.pop("connection", request.id))
        self.clock.advance(9)
        self.assertNoResult(request)
        request.not_delivered(NotDelivered.LEASE_LOST)
        self.assertIs(self.failureResultOf(request, NotDeliveredError).value.reason, NotDelivered.LEASE_LOST)

    def test_unsent(self) -> None:
        requests = [self.start_request() for _ in range(3)]
        self.pending.fail_unsent("connection", [requests[0].id, b'"unknown"'])
        self.pending.fail_owner("connection", lambda client_id: RpcError(ErrorKind.CONNECTION_LOST, client_id))
        kinds = [self.error_of(request)[:2] for request in requests]
        self.assertEqual(kinds, [(ErrorKind.NODE_UNREACHABLE, False)] + [(ErrorKind.CONNECTION_LOST, True)] * 2)

    def test_owner(self) -> None:
        request, never = self.start_request(), Call()
        self.assertEqual(self.pending.owner_of(request), "connection")
        self.assertIsNone(self.pending.owner_of(never))
        never.id = request.id
        self.assertIsNone(self.pending.owner_of(never))
        self.pending.discard(request)
        self.assertIsNone(self.pending.owner_of(request))
