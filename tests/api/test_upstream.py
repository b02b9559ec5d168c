"""Clients' messages on their way to backends."""

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
        """The raw id of the last call it was sent."""
        return msgspec.json.encode(msgspec.json.decode(self.sent[-1])["id"])


class BackendDispatcherTests(TestCase):
    def setUp(self):
        self.clock = Clock()
        self.metrics = Metrics()
        self.upstream = BackendDispatcher(
            clock=self.clock, metrics=self.metrics, settings=Settings(capacity=10, max_calls=5), node_id="n-1"
        )
        self.one, self.two = FakeBackend(), FakeBackend()

    def failure(self, call, kind, sent):
        error = self.failureResultOf(call, RpcError).value
        self.assertEqual((error.kind, error.client_id, error.sent), (kind, "x", sent))
        return error

    def test_interfaces(self):
        self.assertTrue(verifyObject(IUpstream, self.upstream))
        self.assertTrue(verifyObject(IBackendConnection, self.one))

    # Events.

    def test_events(self):
        self.upstream.subscribe(self.one, ["connected", "message"])
        self.upstream.subscribe(self.one, ["disconnected", "connected"])
        self.upstream.connected("x", 7)
        self.upstream.message("x", "job.done", b'{"job": 9.0}')
        self.upstream.message("x", 'é"', None)
        self.upstream.disconnected("x", 7)
        self.assertEqual(
            self.one.sent,
            [
                b'{"jsonrpc":"2.0","method":"events.connected","params":{"client":"x","node":"n-1","generation":7}}',
                b'{"jsonrpc":"2.0","method":"events.message","params":{"client":"x","method":"job.done","params":{"job": 9.0}}}',
                '{"jsonrpc":"2.0","method":"events.message","params":{"client":"x","method":"é\\""}}'.encode(),
                b'{"jsonrpc":"2.0","method":"events.disconnected","params":{"client":"x","node":"n-1","generation":7}}',
            ],
        )

    def test_events_go_to_those_who_subscribed_to_the_kind(self):
        self.upstream.subscribe(self.one, ["connected"])
        self.upstream.subscribe(self.two, ["message"])
        self.upstream.message("x", "m", None)
        self.assertEqual((len(self.one.sent), len(self.two.sent)), (0, 1))
        self.upstream.remove(self.two)
        self.upstream.message("x", "m", None)
        self.assertEqual(len(self.two.sent), 1)

    def test_who_does_not_read_is_closed_rather_than_left_with_a_gap(self):
        self.upstream.subscribe(self.one, ["message"])
        self.one.is_reading = False
        self.upstream.message("x", "m", None)
        self.assertEqual((self.one.sent, self.one.slow_drops), ([], 1))
        self.assertEqual(self.metrics.events_dropped, 1)

    def test_unknown_kind(self):
        self.assertRaises(KeyError, self.upstream.subscribe, self.one, ["gone"])

    # Calls.

    def test_nobody_serves(self):
        self.failure(self.upstream.call("x", "m", None), ErrorKind.METHOD_NOT_FOUND, False)

    def test_call(self):
        self.upstream.serve(self.one)
        call = self.upstream.call("x", "policy.get", b"[1.0]")
        sent = msgspec.json.decode(self.one.sent[0])
        self.assertEqual(
            self.one.sent[0],
            b'{"jsonrpc":"2.0","id":"%b","method":"upstream.call",'
            b'"params":{"client":"x","method":"policy.get","params":[1.0]}}' % sent["id"].encode("ascii"),
        )
        self.upstream.response_received(self.one, Response(self.one.call(), b"1.50", None))
        self.assertEqual(self.successResultOf(call), Reply(b"1.50", None))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_error(self):
        self.upstream.serve(self.one)
        call = self.upstream.call("x", "m", None)
        self.assertNotIn(b'"params":{"client":"x","method":"m","params"', self.one.sent[0])
        self.upstream.response_received(self.one, Response(self.one.call(), None, b'{"code":1}'))
        self.assertEqual(self.successResultOf(call), Reply(None, b'{"code":1}'))

    def test_in_turn(self):
        self.upstream.serve(self.one)
        self.upstream.serve(self.two)
        self.upstream.serve(self.one)
        for _ in range(4):
            self.upstream.call("x", "m", None).addErrback(lambda failure: None)
        self.assertEqual((len(self.one.sent), len(self.two.sent)), (2, 2))
        self.upstream.remove(self.one)
        self.upstream.call("x", "m", None)
        self.assertEqual((len(self.one.sent), len(self.two.sent)), (2, 3))

    def test_who_does_not_read_is_left_out(self):
        self.upstream.serve(self.one)
        self.upstream.serve(self.two)
        self.one.is_reading = False
        self.upstream.call("x", "m", None)
        self.upstream.call("x", "m", None)
        self.assertEqual((len(self.one.sent), len(self.two.sent)), (0, 2))
        self.two.is_reading = False
        self.failure(self.upstream.call("x", "m", None), ErrorKind.TOO_MANY_CALLS, False)
        self.assertEqual((self.one.slow_drops, self.two.slow_drops), (0, 0))

    def test_a_server_that_goes_away(self):
        self.upstream.serve(self.one)
        calls = [self.upstream.call("x", "m", None) for _ in range(2)]
        self.upstream.remove(self.one)
        for call in calls:
            self.failure(call, ErrorKind.CONNECTION_LOST, True)
        self.failure(self.upstream.call("x", "m", None), ErrorKind.METHOD_NOT_FOUND, False)

    def test_deadline(self):
        self.upstream.serve(self.one)
        call = self.upstream.call("x", "m", None)
        self.clock.advance(29.9)
        self.assertNoResult(call)
        self.clock.advance(0.2)
        self.failure(call, ErrorKind.TIMEOUT, True)
        self.upstream.response_received(self.one, Response(self.one.call(), b"1", None))
        self.assertEqual(self.metrics.late_responses, 1)

    def test_too_many(self):
        self.upstream.serve(self.one)
        for _ in range(5):
            self.upstream.call("x", "m", None)
        self.failure(self.upstream.call("x", "m", None), ErrorKind.TOO_MANY_CALLS, False)
        self.assertEqual(len(self.one.sent), 5)

    def test_a_client_that_goes_away(self):
        self.upstream.serve(self.one)
        call = self.upstream.call("x", "m", None)
        call.cancel()
        self.failureResultOf(call, CancelledError)
        self.upstream.response_received(self.one, Response(self.one.call(), b"1", None))
        self.assertEqual(self.metrics.late_responses, 1)

    def test_a_response_counts_only_from_whom_was_asked(self):
        self.upstream.serve(self.one)
        call = self.upstream.call("x", "m", None)
        self.upstream.serve(self.two)
        self.upstream.response_received(self.two, Response(self.one.call(), b"1", None))
        self.assertNoResult(call)
        self.assertFalse(self.upstream.response_unreadable(self.two, self.one.call().decode()[1:-1]))
        self.assertNoResult(call)
        self.assertEqual(self.metrics.late_responses, 1)

    def test_unknown_responses(self):
        for id in (b"1", b"null", b'"x"', '"é"'.encode(), b'""', b"-1.5e3"):
            self.upstream.response_received(self.one, Response(id, b"1", None))
        self.assertEqual(self.metrics.late_responses, 6)

    def test_a_broken_response(self):
        self.upstream.serve(self.one)
        call = self.upstream.call("x", "m", None)
        self.assertTrue(self.upstream.response_unreadable(self.one, self.one.call().decode()[1:-1]))
        error = self.failure(call, ErrorKind.CONNECTION_LOST, True)
        self.assertIn("could not be read", error.detail or "")

    # Tokens that are for some clients alone.

    def limit(self):
        three = FakeBackend()
        self.one.grant, self.two.grant = Grant("acme/"), Grant("acme/", ["serve"])
        for backend in (self.one, self.two, three):
            self.upstream.serve(backend)
            self.upstream.subscribe(backend, ["message"])
        return three

    def test_in_turn_among_those_that_may(self):
        three = self.limit()
        asked = []
        for client_id in ("acme/1", "beta/1", "acme/2", "beta/2", "acme/3"):
            self.upstream.call(client_id, "m", None)
            asked.append([len(each.sent) for each in (self.one, self.two, three)])
        self.assertEqual(asked, [[1, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 2], [2, 1, 2]])

    def test_only_those_that_may_can_be_too_slow(self):
        three = self.limit()
        three.is_reading = False
        failed = self.upstream.call("beta/r", "m", None)
        self.assertEqual(self.failureResultOf(failed).value.kind, ErrorKind.TOO_MANY_CALLS)
        self.upstream.remove(three)
        failed = self.upstream.call("beta/r", "m", None)
        self.assertEqual(self.failureResultOf(failed).value.kind, ErrorKind.METHOD_NOT_FOUND)

    def test_events_of_those_that_may(self):
        three = self.limit()
        self.one.is_reading = False
        self.upstream.message("beta/r", "m", None)
        self.assertEqual([len(each.sent) for each in (self.one, self.two, three)], [0, 0, 1])
        self.assertEqual((self.one.slow_drops, self.metrics.events_dropped), (0, 0))

    def test_an_answer_of_one_that_may_no_more(self):
        self.upstream.serve(self.one)
        for prefix, verbs, passes in (("x", ["serve"], True), ("y", None, False), ("", ["call", "read"], False)):
            call = self.upstream.call("x", "m", None)
            self.one.grant.set_limits(prefix, verbs)
            self.upstream.response_received(self.one, Response(self.one.call(), b"1", None))
            if passes:
                self.assertEqual(self.successResultOf(call), Reply(b"1", None))
            else:
                self.failure(call, ErrorKind.CONNECTION_LOST, True)
            self.one.grant.set_limits("", None)
