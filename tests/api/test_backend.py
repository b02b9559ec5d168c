"""Tests of gateway.api.backend."""

from __future__ import annotations

import json

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from gateway.api.backend import BURST_FACTOR, SWEEP_INTERVAL, ResponseBatch
from gateway.api.responses import MAX_ENVELOPE_SIZE
from gateway.api.upstream import IBackendConnection
from gateway.protocol.errors import ErrorKind
from gateway.rpc.pending import Reply
from gateway.websocket.slow_consumer import SLOW_CONSUMER_TIMEOUT
from tests.builders.api_case import BackendTestCase, call, notification
from tests.builders.endpoint import BackendWebSocket, EndpointHarness, rpc_error
from tests.builders.http import UPGRADE, frame, request


class OpeningTests(TestCase):
    def test_open(self):
        endpoint = EndpointHarness()
        backend = BackendWebSocket(endpoint)
        self.assertNotIn(b"Sec-WebSocket-Protocol", backend.opening)
        self.assertTrue(verifyObject(IBackendConnection, backend.protocol._protocol))
        self.assertEqual(endpoint.metrics.api_requests, {"101": 1})

    def test_subprotocol(self):
        backend = BackendWebSocket(EndpointHarness(), [("Sec-WebSocket-Protocol", "chat, wsgateway.jsonrpc.v1")])
        self.assertIn(b"Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1\r\n", backend.opening)
        self.assertNotIn(
            b"Sec-WebSocket-Protocol", BackendWebSocket(EndpointHarness(), [("Sec-WebSocket-Protocol", "chat")]).opening
        )

    def test_invalid_handshake(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(request("GET", "/v1/backend", headers=UPGRADE[:1]))
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json["error"]), (400, "upgrade"))
        self.assertEqual(endpoint.metrics.api_requests, {"400": 1})


class CallTests(BackendTestCase):
    def test_responses_in_order_of_completion(self):
        for i in range(3):
            self.backend.send_message(call(i, "client.call", {"client": "x", "method": "m", "timeout": 5}))
        self.assertEqual(self.dispatcher.calls, [("x", "m", None, 5.0)] * 3)
        for i in (2, 0, 1):
            self.dispatcher.pending[i].callback(Reply(b"%d" % i, None))
        self.assertEqual([(each["id"], each["result"]) for each in self.backend.messages()], [(2, 2), (0, 0), (1, 1)])

    def test_unexpected_failure_is_an_internal_error(self):
        self.dispatcher.results.append(ZeroDivisionError("secret"))
        response = self.request("client.call", {"client": "x", "method": "m"})
        self.assert_error(response, -32603, None, True)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_call_without_an_id_gets_no_response(self):
        self.dispatcher.results.append(Reply(b"1", None))
        self.backend.send_message(notification("client.call", {"client": "x", "method": "m"}))
        self.backend.send_message(notification("client.call", {"client": "x", "method": "m"}))
        self.dispatcher.pending[0].errback(rpc_error(ErrorKind.TIMEOUT))
        self.assertEqual((self.backend.messages(), len(self.dispatcher.calls)), ([], 2))

    def test_too_many_requests_in_progress(self):
        endpoint = EndpointHarness(max_calls=2)
        backend = BackendWebSocket(endpoint)
        for i in range(3):
            backend.send_message(call(i, "client.call", {"client": "x", "method": "m"}))
        (response,) = backend.messages()
        self.assertEqual((response["id"], response["error"]["code"]), (2, -32005))
        endpoint.dispatcher.pending[0].callback(Reply(b"1", None))
        backend.send_message(call(3, "client.call", {"client": "x", "method": "m"}))
        self.assertEqual(len(endpoint.dispatcher.calls), 3)

    def test_gone(self):
        for i in range(2):
            self.backend.send_message(call(i, "client.call", {"client": "x", "method": "m"}))
        self.backend.disconnect()
        self.assertEqual(self.dispatcher.cancel_count, 2)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_close_cancels_calls(self):
        self.backend.send_message(call(1, "client.call", {"client": "x", "method": "m"}))
        self.backend.send(frame(b"\x03\xe8", opcode=8))
        self.assertEqual(self.dispatcher.cancel_count, 1)
        self.assertEqual(self.backend.close_code(), 1000)


class ResponseTests(BackendTestCase):
    def test_unreadable_responses(self):
        self.backend.send_message(notification("upstream.serve"))
        for broken in (b'{"jsonrpc":"2.0","id":"%b","result":', b'{"jsonrpc":"2.0","id":"%b","result":1,"error":2}'):
            result = self.endpoint.upstream.call("x", "m", None)
            (request_message,) = self.backend.messages()
            self.backend.send_message(broken % request_message["id"].encode())
            self.assertEqual(self.failureResultOf(result).value.kind, ErrorKind.CONNECTION_LOST)
            self.backend.messages()

    def test_unreadable_response_in_a_batch(self):
        self.backend.send_message(notification("upstream.serve"))
        result = self.endpoint.upstream.call("x", "m", None)
        (request_message,) = self.backend.messages()
        self.backend.send_message([{"jsonrpc": "2.0", "id": request_message["id"]}])
        self.assertEqual(self.failureResultOf(result).value.kind, ErrorKind.CONNECTION_LOST)

    def test_unexpected_responses(self):
        self.backend.send_message({"jsonrpc": "2.0", "id": 1, "result": 1})
        self.backend.send_message({"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": ""}})
        self.assertEqual((self.backend.messages(), self.metrics.late_responses), ([], 2))


class BatchTests(BackendTestCase):
    def test_one_array_once_all_are_done(self):
        params = {"client": "x", "method": "m"}
        self.backend.send_message(
            [
                call(1, "client.call", params),
                notification("client.notify", params),
                7,
                call(2, "client.call", params),
                call(3, "nothing"),
                {"jsonrpc": "2.0", "id": 4, "result": 1},
            ]
        )
        self.dispatcher.pending[1].callback(Reply(b"2", None))
        self.assertEqual(self.backend.messages(), [])
        self.dispatcher.pending[0].errback(rpc_error(ErrorKind.TIMEOUT))
        ((first, invalid, second, unknown),) = self.backend.messages()
        self.assertEqual((first["id"], first["error"]["code"]), (1, -32002))
        self.assertEqual((invalid["id"], invalid["error"]["code"]), (None, -32600))
        self.assertEqual((second["id"], second["result"]), (2, 2))
        self.assertEqual((unknown["id"], unknown["error"]["code"]), (3, -32601))
        self.assertEqual([each.get("gateway") for each in (first, invalid, second, unknown)], [True, True, None, True])

    def test_immediate_results(self):
        self.dispatcher.results.append(Reply(b"1", None))
        self.backend.send_message([call(1, "client.call", {"client": "x", "method": "m"}), call(2, "upstream.serve")])
        self.assertEqual([each["id"] for each in self.backend.messages()[0]], [1, 2])

    def test_notifications_alone(self):
        self.backend.send_message([notification("client.notify", {"client": "x", "method": "m"})] * 2)
        self.assertEqual((self.backend.messages(), len(self.dispatcher.notifications)), ([], 2))

    def test_gone(self):
        self.backend.send_message([call(i, "client.call", {"client": "x", "method": "m"}) for i in range(2)])
        self.backend.disconnect()
        self.assertEqual(self.dispatcher.cancel_count, 2)
        self.assertEqual(self.flushLoggedErrors(), [])


class BadInputTests(BackendTestCase):
    def test_standard_errors(self):
        for payload, id, code in (
            (b"{", None, -32700),
            (b"", None, -32700),
            (b'"\\ud800"', None, -32700),
            (b"[" * 600 + b"]" * 600, None, -32700),
            (b"[]", None, -32600),
            (b"1", None, -32600),
            (b'{"jsonrpc":"2.0","id":4}', 4, -32600),
        ):
            self.backend.send_message(payload)
            (response,) = self.backend.messages()
            self.assertEqual(response["id"], id)
            self.assert_error(response, code)
        self.assertEqual(self.metrics.bad_messages["backend"], 7)

    def test_eight_bad_messages_in_a_row(self):
        for _ in range(7):
            self.backend.send_message(b"{")
        self.backend.send_message(notification("upstream.serve"))
        for _ in range(7):
            self.backend.send_message(b"{")
        self.backend.messages()
        self.backend.send_message(b"{")
        self.assertEqual(self.backend.close_code(), 1008)
        self.backend.send_message(call(1, "client.call", {"client": "x", "method": "m"}))
        self.assertEqual(self.dispatcher.calls, [])

    def test_eight_bad_messages_in_a_batch(self):
        self.backend.send_message([7] * 8 + [call(1, "client.call", {"client": "x", "method": "m"})])
        self.assertEqual(self.backend.close_code(), 1008)
        self.assertEqual(self.dispatcher.calls, [])

    def test_binary(self):
        self.backend.send(frame(b"x", opcode=2))
        self.assertEqual(self.backend.close_code(), 1003)

    def test_not_utf8(self):
        self.backend.send(frame(b'"\xff"'))
        self.assertEqual(self.backend.close_code(), 1007)

    def test_largest_message(self):
        self.backend.send_message(b'{"jsonrpc":"2.0","id":1,"method":"x"}'.ljust(65536 + MAX_ENVELOPE_SIZE))
        self.assertEqual(len(self.backend.messages()), 1)
        self.backend.send_message(b"x" * (65536 + MAX_ENVELOPE_SIZE + 1))
        self.assertEqual(self.backend.close_code(), 1009)

    def test_pings_are_answered(self):
        self.backend.send(frame(b"hi", opcode=9))
        self.assertEqual(self.backend.frames(), [(10, b"hi")])

    @given(st.binary(max_size=40) | st.recursive(st.none() | st.text(max_size=5), st.lists).map(msgspec.json.encode))
    @settings(max_examples=150, deadline=None)
    def test_any_text(self, payload):
        backend = BackendWebSocket(EndpointHarness())
        backend.send_message(payload)
        ((opcode, message),) = backend.frames()
        if opcode == 8:
            # Invalid UTF-8, or a batch of many bad messages.
            self.assertIn(int.from_bytes(message[:2], "big"), (1007, 1008))
        else:
            self.assertIn(b'"error"', message)


class KeepAliveTests(BackendTestCase):
    def test_silent_backend_is_pinged_then_dropped(self):
        self.endpoint.clock.pump([1] * 39)
        self.assertEqual(self.backend.frames(), [])
        self.endpoint.clock.pump([1] * 2)
        self.assertEqual(self.backend.frames(), [(9, b"")])
        self.endpoint.clock.pump([1] * 18)
        self.assertEqual(self.backend.frames(), [])
        self.assertFalse(self.backend.transport.aborted)
        self.endpoint.clock.pump([1] * 2)
        self.assertTrue(self.backend.transport.aborted)

    def test_any_frame_is_a_sign_of_life(self):
        for _ in range(3):
            self.endpoint.clock.pump([1] * 41)
            self.assertEqual(self.backend.frames(), [(9, b"")])
            self.backend.send(frame(b"", opcode=10))
        self.assertFalse(self.backend.transport.aborted)

    def test_pause_of_this_process_is_not_silence(self):
        """The time passes at once, without a ping that the backend could have answered."""
        self.endpoint.clock.advance(1000)
        self.assertFalse(self.backend.transport.aborted)
        self.assertEqual(self.backend.frames(), [(9, b"")])
        self.endpoint.clock.pump([1] * 19)
        self.assertFalse(self.backend.transport.aborted)
        self.endpoint.clock.advance(1)
        self.assertTrue(self.backend.transport.aborted)

    def test_pause_of_this_process_after_a_ping(self):
        """Input of the pause is read only after the timers have run."""
        self.endpoint.clock.pump([1] * 40)
        self.assertEqual(self.backend.frames(), [(9, b"")])
        self.endpoint.clock.advance(1000)
        self.assertFalse(self.backend.transport.aborted)
        self.backend.send(frame(b"", opcode=10))
        self.endpoint.clock.pump([1] * 35)
        self.assertEqual(self.backend.frames(), [])
        self.assertFalse(self.backend.transport.aborted)

    def test_no_timer_without_backends(self):
        self.backend.disconnect()
        self.endpoint.clock.advance(10)
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])


class SlowReaderTests(BackendTestCase):
    def setUp(self):
        super().setUp()
        self.transport = self.backend.transport
        self.upstream = self.endpoint.upstream

    def wait(self):
        """Let the slow consumer timeout pass."""
        self.endpoint.clock.pump([SWEEP_INTERVAL] * (int(SLOW_CONSUMER_TIMEOUT / SWEEP_INTERVAL) + 1))

    def test_reading_pauses(self):
        request = frame(msgspec.json.encode(call(1, "client.call", {"client": "x", "method": "m"})))
        self.backend.send(request)
        self.transport.fill_buffer()
        self.assertEqual(self.transport.producerState, "paused")
        self.backend.send(request)
        self.assertEqual(len(self.dispatcher.calls), 1)
        self.transport.drain_buffer()
        self.assertEqual(self.transport.producerState, "producing")
        self.assertEqual(len(self.dispatcher.calls), 2)

    def test_buffer_full_between_two_messages_of_one_segment(self):
        self.dispatcher.call = lambda *args: self.transport.fill_buffer() or Deferred()
        first = frame(msgspec.json.encode(call(1, "client.call", {"client": "x", "method": "m"})))
        self.backend.send(first + frame(msgspec.json.encode(notification("upstream.serve"))))
        self.assertEqual(
            self.failureResultOf(self.upstream.call("x", "m", None)).value.kind, ErrorKind.METHOD_NOT_FOUND
        )
        self.transport.drain_buffer()
        self.assertNoResult(self.upstream.call("x", "m", None))

    def test_buffer_full_after_early_data(self):
        connection = self.endpoint.connect()
        self.dispatcher.call = lambda *args: connection.transport.fill_buffer() or Deferred()
        first = frame(msgspec.json.encode(call(1, "client.call", {"client": "x", "method": "m"})))
        connection.send(request("GET", "/v1/backend", headers=UPGRADE) + first)
        self.assertEqual(connection.transport.producerState, "paused")
        connection.send(frame(msgspec.json.encode(notification("upstream.serve"))))
        self.assertEqual(
            self.failureResultOf(self.upstream.call("x", "m", None)).value.kind, ErrorKind.METHOD_NOT_FOUND
        )

    def test_close_frame_is_read_while_closing(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        self.transport.fill_buffer()
        self.upstream.message("x", "m", b'["%b"]' % (b"x" * 66000))
        self.wait()
        self.upstream.message("x", "m", None)
        self.assertEqual(self.backend.close_code(), 1013)
        self.assertEqual(self.transport.producerState, "producing")
        self.backend.send(frame(b"\x03\xf5", opcode=8))
        self.assertTrue(self.transport.disconnecting)

    def test_responses_may_wait(self):
        for i in range(10):
            self.backend.send_message(call(i, "client.call", {"client": "x", "method": "m"}))
        self.transport.fill_buffer()
        for pending in self.dispatcher.pending:
            # Transports call pauseProducing again at each write.
            self.transport.fill_buffer()
            pending.callback(Reply(b'"%b"' % (b"x" * 65000), None))
        self.assertEqual(len(self.backend.messages()), 10)

    def test_too_many_waiting_responses(self):
        for i in range(70):
            self.backend.send_message(call(i, "client.call", {"client": "x", "method": "m"}))
        self.transport.fill_buffer()
        for pending in self.dispatcher.pending:
            self.transport.fill_buffer()
            if not pending.called:
                pending.callback(Reply(b'"%b"' % (b"x" * 70000), None))
        self.assertEqual(self.backend.close_code(), 1013)
        self.assertEqual(self.metrics.slow_readers, 1)

    def test_events_may_wait_for_the_timeout(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        big = b'["%b"]' % (b"x" * 30000)
        self.transport.fill_buffer()
        for _ in range(3):
            self.transport.fill_buffer()
            self.upstream.message("x", "m", big)
        self.endpoint.clock.pump([SWEEP_INTERVAL] * int(SLOW_CONSUMER_TIMEOUT / SWEEP_INTERVAL))
        self.upstream.message("x", "m", None)
        self.assertEqual(len(self.backend.messages()), 4)
        self.endpoint.clock.advance(SWEEP_INTERVAL)
        self.upstream.message("x", "m", None)
        self.assertEqual(self.backend.close_code(), 1013)
        self.assertEqual((self.metrics.slow_readers, self.metrics.events_dropped), (1, 1))

    def test_burst_of_events_in_one_reactor_iteration(self):
        """Nothing can be written meanwhile, even if the backend reads."""
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        for _ in range(900):
            self.transport.fill_buffer()
            self.upstream.message("x", "m", b'["%b"]' % (b"x" * 990))
        self.assertEqual(len(self.backend.messages()), 900)
        self.transport.drain_buffer()
        self.wait()
        self.upstream.message("x", "m", None)
        self.assertEqual(len(self.backend.messages()), 1)
        self.assertEqual((self.metrics.slow_readers, self.metrics.events_dropped), (0, 0))

    def test_too_large_burst(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        big = b'["%b"]' % (b"x" * 65000)
        self.transport.fill_buffer()
        for _ in range(BURST_FACTOR * 65536 // 65000 + 2):
            self.assertEqual(self.metrics.slow_readers, 0)
            self.transport.fill_buffer()
            self.upstream.message("x", "m", big)
        self.assertEqual(self.backend.close_code(), 1013)
        self.assertEqual(self.metrics.slow_readers, 1)

    def test_full_buffer_with_few_events(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        self.transport.fill_buffer()
        self.wait()
        self.upstream.message("x", "m", None)
        self.assertEqual(len(self.backend.messages()), 1)

    def test_bytes_read_meanwhile_do_not_count(self):
        """A buffer that never empties is not slow while little waits in it."""
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        self.transport.dataBuffer, self.transport.offset, self.transport._tempDataLen = b"", 0, 100
        self.transport.fill_buffer()
        for _ in range(3):
            self.upstream.message("x", "m", b'["%b"]' % (b"x" * 60000))
            self.wait()
        self.assertEqual(len(self.backend.messages()), 3)
        self.transport._tempDataLen = 65536
        self.upstream.message("x", "m", None)
        self.assertEqual(self.backend.close_code(), 1013)

    def test_pause_of_this_process_is_not_slowness(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        self.transport.fill_buffer()
        self.upstream.message("x", "m", b'["%b"]' % (b"x" * 66000))
        self.endpoint.clock.advance(1000)
        self.backend.frames()
        self.upstream.message("x", "m", None)
        self.assertEqual(len(self.backend.messages()), 1)

    def test_reading_resets_the_count(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        big = b'["%b"]' % (b"x" * 60000)
        for _ in range(5):
            self.transport.fill_buffer()
            self.upstream.message("x", "m", big)
            self.transport.drain_buffer()
        self.assertEqual(len(self.backend.messages()), 5)

    def test_slow_backend_gets_no_calls(self):
        self.backend.send_message(notification("upstream.serve"))
        self.transport.fill_buffer()
        big = b'["%b"]' % (b"x" * 65000)
        for _ in range(3):
            self.assertNoResult(self.upstream.call("x", "m", big))
        self.assertEqual(len(self.backend.messages()), 3)
        self.wait()
        late = self.upstream.call("x", "m", big)
        self.assertEqual(self.failureResultOf(late).value.kind, ErrorKind.TOO_MANY_CALLS)
        self.assertEqual(self.backend.messages(), [])

    def test_backend_that_never_reads_is_dropped(self):
        self.transport.fill_buffer()
        self.endpoint.clock.pump([1] * 71)
        self.assertTrue(self.transport.aborted)


class ResponseBatchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.sent: list[bytes] = []
        self.batch = ResponseBatch(self.sent.append)

    def test_request_order_once_all_are_there(self) -> None:
        first, second = self.batch.add_slot(), self.batch.add_slot()
        second(b"2")
        self.batch.finish()
        self.assertEqual(self.sent, [])
        first(b"1")
        self.assertEqual([json.loads(message) for message in self.sent], [[1, 2]])

    def test_not_sent_before_it_is_finished(self) -> None:
        self.batch.add_slot()(b"1")
        self.assertEqual(self.sent, [])
        self.batch.finish()
        self.assertEqual(len(self.sent), 1)

    def test_batch_of_notifications_has_no_response(self) -> None:
        self.batch.finish()
        self.assertEqual(self.sent, [])
