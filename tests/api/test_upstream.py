"""Tests of gateway.api.upstream."""

from __future__ import annotations

import msgspec
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from gateway.api.upstream import BackendDispatcher, IBackendConnection
from gateway.auth.backend_tokens import Grant
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import Response
from gateway.registry.interface import SessionKey
from gateway.rpc.interface import IUpstream
from gateway.rpc.pending import Reply
from gateway.settings import Settings


@implementer(IBackendConnection)
class FakeBackend:
    def __init__(self) -> None:
        self.is_reading = True
        self.grant = Grant()
        self.sent: list[bytes] = []
        self.slow_drops = 0

    def push(self, payload):
        self.sent.append(payload)

    def drop_slow_consumer(self):
        self.slow_drops += 1

    def call(self):
        """Return the raw id of the last call pushed to it."""
        return msgspec.json.encode(msgspec.json.decode(self.sent[-1])["id"])


class BackendDispatcherTests(TestCase):
    def setUp(self):
        self.clock = Clock()
        self.metrics = Metrics()
        self.upstream = BackendDispatcher(
            clock=self.clock, metrics=self.metrics, settings=Settings(capacity=10, max_calls=5), node_id="n-1"
        )
        self.first, self.second = FakeBackend(), FakeBackend()

    def failure(self, call, kind, sent):
        error = self.failureResultOf(call, RpcError).value
        self.assertEqual((error.kind, error.client_id, error.sent), (kind, "x", sent))
        return error

    def test_interfaces(self):
        self.assertTrue(verifyObject(IUpstream, self.upstream))
        self.assertTrue(verifyObject(IBackendConnection, self.first))

    # Events.

    def test_events(self):
        self.upstream.subscribe(self.first, ["connected", "message"])
        self.upstream.subscribe(self.first, ["disconnected", "connected"])
        self.upstream.connected(SessionKey("x", 7))
        self.upstream.message("x", "job.done", b'{"job": 9.0}')
        self.upstream.message("x", 'é"', None)
        self.upstream.disconnected(SessionKey("x", 7))
        self.assertEqual(
            self.first.sent,
            [
                b'{"jsonrpc":"2.0","method":"events.connected","params":{"client":"x","node":"n-1","generation":7}}',
                b'{"jsonrpc":"2.0","method":"events.message","params":{"client":"x","method":"job.done","params":{"job": 9.0}}}',
                '{"jsonrpc":"2.0","method":"events.message","params":{"client":"x","method":"é\\""}}'.encode(),
                b'{"jsonrpc":"2.0","method":"events.disconnected","params":{"client":"x","node":"n-1","generation":7}}',
            ],
        )

    def test_events_go_to_subscribers_of_the_kind(self):
        self.upstream.subscribe(self.first, ["connected"])
        self.upstream.subscribe(self.second, ["message"])
        self.upstream.message("x", "m", None)
        self.assertEqual((len(self.first.sent), len(self.second.sent)), (0, 1))
        self.upstream.remove(self.second)
        self.upstream.message("x", "m", None)
        self.assertEqual(len(self.second.sent), 1)

    def test_slow_subscriber_is_closed(self):
        self.upstream.subscribe(self.first, ["message"])
        self.first.is_reading = False
        self.upstream.message("x", "m", None)
        self.assertEqual((self.first.sent, self.first.slow_drops), ([], 1))
        self.assertEqual(self.metrics.events_dropped, 1)

    def test_unknown_kind(self):
        self.assertRaises(KeyError, self.upstream.subscribe, self.first, ["gone"])

    # Calls.

    def test_no_serving_backend(self):
        self.failure(self.upstream.call("x", "m", None), ErrorKind.METHOD_NOT_FOUND, False)

    def test_call(self):
        self.upstream.serve(self.first)
        call = self.upstream.call("x", "policy.get", b"[1.0]")
        sent = msgspec.json.decode(self.first.sent[0])
        self.assertEqual(
            self.first.sent[0],
            b'{"jsonrpc":"2.0","id":"%b","method":"upstream.call",'
            b'"params":{"client":"x","method":"policy.get","params":[1.0]}}' % sent["id"].encode("ascii"),
        )
        self.upstream.response_received(self.first, Response(self.first.call(), b"1.50", None))
        self.assertEqual(self.successResultOf(call), Reply(b"1.50", None))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_error(self):
        self.upstream.serve(self.first)
        call = self.upstream.call("x", "m", None)
        self.assertNotIn(b'"params":{"client":"x","method":"m","params"', self.first.sent[0])
        self.upstream.response_received(self.first, Response(self.first.call(), None, b'{"code":1}'))
        self.assertEqual(self.successResultOf(call), Reply(None, b'{"code":1}'))

    def test_round_robin(self):
        self.upstream.serve(self.first)
        self.upstream.serve(self.second)
        self.upstream.serve(self.first)
        for _ in range(4):
            self.upstream.call("x", "m", None).addErrback(lambda failure: None)
        self.assertEqual((len(self.first.sent), len(self.second.sent)), (2, 2))
        self.upstream.remove(self.first)
        self.upstream.call("x", "m", None)
        self.assertEqual((len(self.first.sent), len(self.second.sent)), (2, 3))

    def test_slow_backend_gets_no_calls(self):
        self.upstream.serve(self.first)
        self.upstream.serve(self.second)
        self.first.is_reading = False
        self.upstream.call("x", "m", None)
        self.upstream.call("x", "m", None)
        self.assertEqual((len(self.first.sent), len(self.second.sent)), (0, 2))
        self.second.is_reading = False
        self.failure(self.upstream.call("x", "m", None), ErrorKind.TOO_MANY_CALLS, False)
        self.assertEqual((self.first.slow_drops, self.second.slow_drops), (0, 0))

    def test_serving_backend_disconnects(self):
        self.upstream.serve(self.first)
        calls = [self.upstream.call("x", "m", None) for _ in range(2)]
        self.upstream.remove(self.first)
        for call in calls:
            self.failure(call, ErrorKind.CONNECTION_LOST, True)
        self.failure(self.upstream.call("x", "m", None), ErrorKind.METHOD_NOT_FOUND, False)

    def test_deadline(self):
        self.upstream.serve(self.first)
        call = self.upstream.call("x", "m", None)
        self.clock.advance(29.9)
        self.assertNoResult(call)
        self.clock.advance(0.2)
        self.failure(call, ErrorKind.TIMEOUT, True)
        self.upstream.response_received(self.first, Response(self.first.call(), b"1", None))
        self.assertEqual(self.metrics.late_responses, 1)

    def test_too_many_calls(self):
        self.upstream.serve(self.first)
        for _ in range(5):
            self.upstream.call("x", "m", None)
        self.failure(self.upstream.call("x", "m", None), ErrorKind.TOO_MANY_CALLS, False)
        self.assertEqual(len(self.first.sent), 5)

    def test_client_disconnects(self):
        self.upstream.serve(self.first)
        call = self.upstream.call("x", "m", None)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.upstream.response_received(self.first, Response(self.first.call(), b"1", None))
        self.assertEqual(self.metrics.late_responses, 1)

    def test_response_of_another_backend_is_dropped(self):
        self.upstream.serve(self.first)
        call = self.upstream.call("x", "m", None)
        self.upstream.serve(self.second)
        self.upstream.response_received(self.second, Response(self.first.call(), b"1", None))
        self.assertNoResult(call)
        self.assertFalse(self.upstream.response_unreadable(self.second, self.first.call().decode()[1:-1]))
        self.assertNoResult(call)
        self.assertEqual(self.metrics.late_responses, 1)

    def test_unknown_responses(self):
        for id in (b"1", b"null", b'"x"', '"é"'.encode(), b'""', b"-1.5e3"):
            self.upstream.response_received(self.first, Response(id, b"1", None))
        self.assertEqual(self.metrics.late_responses, 6)

    def test_unreadable_response(self):
        self.upstream.serve(self.first)
        call = self.upstream.call("x", "m", None)
        self.assertTrue(self.upstream.response_unreadable(self.first, self.first.call().decode()[1:-1]))
        error = self.failure(call, ErrorKind.CONNECTION_LOST, True)
        self.assertIn("could not be read", error.detail or "")

    # Limited tokens.

    def limit(self):
        third = FakeBackend()
        self.first.grant, self.second.grant = Grant("acme/"), Grant("acme/", ["serve"])
        for backend in (self.first, self.second, third):
            self.upstream.serve(backend)
            self.upstream.subscribe(backend, ["message"])
        return third

    def test_round_robin_among_allowed_backends(self):
        third = self.limit()
        counts = []
        for client_id in ("acme/1", "beta/1", "acme/2", "beta/2", "acme/3"):
            self.upstream.call(client_id, "m", None)
            counts.append([len(each.sent) for each in (self.first, self.second, third)])
        self.assertEqual(counts, [[1, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 2], [2, 1, 2]])

    def test_too_many_calls_only_if_an_allowed_backend_is_slow(self):
        third = self.limit()
        third.is_reading = False
        failed = self.upstream.call("beta/r", "m", None)
        self.assertEqual(self.failureResultOf(failed).value.kind, ErrorKind.TOO_MANY_CALLS)
        self.upstream.remove(third)
        failed = self.upstream.call("beta/r", "m", None)
        self.assertEqual(self.failureResultOf(failed).value.kind, ErrorKind.METHOD_NOT_FOUND)

    def test_events_go_to_allowed_subscribers(self):
        third = self.limit()
        self.first.is_reading = False
        self.upstream.message("beta/r", "m", None)
        self.assertEqual([len(each.sent) for each in (self.first, self.second, third)], [0, 0, 1])
        self.assertEqual((self.first.slow_drops, self.metrics.events_dropped), (0, 0))

    def test_response_after_the_grant_was_limited(self):
        self.upstream.serve(self.first)
        for prefix, verbs, passes in (("x", ["serve"], True), ("y", None, False), ("", ["call", "read"], False)):
            call = self.upstream.call("x", "m", None)
            self.first.grant.set_limits(prefix, verbs)
            self.upstream.response_received(self.first, Response(self.first.call(), b"1", None))
            if passes:
                self.assertEqual(self.successResultOf(call), Reply(b"1", None))
            else:
                self.failure(call, ErrorKind.CONNECTION_LOST, True)
            self.first.grant.set_limits("", None)
