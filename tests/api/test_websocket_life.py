"""How long the WebSocket of a backend lives: who is silent, and who does not read."""

from __future__ import annotations

import msgspec
from twisted.internet.defer import Deferred

from gateway.api.backend import BURST_FACTOR, SWEEP_INTERVAL
from gateway.protocol.errors import ErrorKind
from gateway.rpc.pending import Reply
from gateway.websocket.limits import SLOW_CONSUMER_TIMEOUT
from tests.api.case import BackendTestCase, call, notification
from tests.api.fakes import UPGRADE, frame, request


class KeepAliveTests(BackendTestCase):
    def test_a_silent_backend_is_pinged_then_dropped(self):
        self.endpoint.clock.pump([1] * 49)
        self.assertEqual(self.backend.frames(), [])
        self.endpoint.clock.pump([1] * 2)
        self.assertEqual(self.backend.frames(), [(9, b"")])
        self.endpoint.clock.pump([1] * 18)
        self.assertEqual(self.backend.frames(), [])
        self.assertFalse(self.backend.transport.aborted)
        self.endpoint.clock.pump([1] * 2)
        self.assertTrue(self.backend.transport.aborted)

    def test_a_sign_of_life(self):
        for _ in range(3):
            self.endpoint.clock.pump([1] * 51)
            self.assertEqual(self.backend.frames(), [(9, b"")])
            self.backend.send(frame(b"", opcode=10))
        self.assertFalse(self.backend.transport.aborted)

    def test_a_pause_of_this_process_is_nobodys_silence(self):
        """All of it passes at once: there was no ping that anybody could have answered."""
        self.endpoint.clock.advance(1000)
        self.assertFalse(self.backend.transport.aborted)
        self.assertEqual(self.backend.frames(), [(9, b"")])
        self.endpoint.clock.pump([1] * 19)
        self.assertFalse(self.backend.transport.aborted)
        self.endpoint.clock.advance(1)
        self.assertTrue(self.backend.transport.aborted)

    def test_a_pause_of_this_process_after_a_ping(self):
        """What came during the pause is read only after the timers have run."""
        self.endpoint.clock.pump([1] * 50)
        self.assertEqual(self.backend.frames(), [(9, b"")])
        self.endpoint.clock.advance(1000)
        self.assertFalse(self.backend.transport.aborted)
        self.backend.send(frame(b"", opcode=10))
        self.endpoint.clock.pump([1] * 40)
        self.assertEqual(self.backend.frames(), [])
        self.assertFalse(self.backend.transport.aborted)

    def test_nothing_ticks_without_backends(self):
        self.backend.disconnect()
        self.endpoint.clock.advance(10)
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])


class SlowReaderTests(BackendTestCase):
    def setUp(self):
        super().setUp()
        self.transport = self.backend.transport
        self.upstream = self.endpoint.upstream

    def wait(self):
        """Let so much time pass that whoever has not read by now does not read."""
        self.endpoint.clock.pump([SWEEP_INTERVAL] * (int(SLOW_CONSUMER_TIMEOUT / SWEEP_INTERVAL) + 1))

    def test_it_is_not_read_from(self):
        request = frame(msgspec.json.encode(call(1, "client.call", {"client": "x", "method": "m"})))
        self.backend.send(request)
        self.transport.fill_buffer()
        self.assertEqual(self.transport.producerState, "paused")
        self.backend.send(request)
        self.assertEqual(len(self.dispatcher.calls), 1)
        self.transport.drain_buffer()
        self.assertEqual(self.transport.producerState, "producing")
        self.assertEqual(len(self.dispatcher.calls), 2)

    def test_full_between_two_messages_of_one_segment(self):
        self.dispatcher.call = lambda *args: self.transport.fill_buffer() or Deferred()
        one = frame(msgspec.json.encode(call(1, "client.call", {"client": "x", "method": "m"})))
        self.backend.send(one + frame(msgspec.json.encode(notification("upstream.serve"))))
        self.assertEqual(
            self.failureResultOf(self.upstream.call("x", "m", None)).value.kind, ErrorKind.METHOD_NOT_FOUND
        )
        self.transport.drain_buffer()
        self.assertNoResult(self.upstream.call("x", "m", None))

    def test_full_by_what_came_with_the_opening_handshake(self):
        connection = self.endpoint.connect()
        self.dispatcher.call = lambda *args: connection.transport.fill_buffer() or Deferred()
        one = frame(msgspec.json.encode(call(1, "client.call", {"client": "x", "method": "m"})))
        connection.send(request("GET", "/v1/backend", headers=UPGRADE) + one)
        self.assertEqual(connection.transport.producerState, "paused")
        connection.send(frame(msgspec.json.encode(notification("upstream.serve"))))
        self.assertEqual(
            self.failureResultOf(self.upstream.call("x", "m", None)).value.kind, ErrorKind.METHOD_NOT_FOUND
        )

    def test_its_close_is_seen_while_it_is_closed_for_not_reading(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        self.transport.fill_buffer()
        self.upstream.message("x", "m", b'["%b"]' % (b"x" * 66000))
        self.wait()
        self.upstream.message("x", "m", None)
        self.assertEqual(self.backend.close_code(), 1013)
        self.assertEqual(self.transport.producerState, "producing")
        self.backend.send(frame(b"\x03\xf5", opcode=8))
        self.assertTrue(self.transport.disconnecting)

    def test_its_answers_may_wait(self):
        for i in range(10):
            self.backend.send_message(call(i, "client.call", {"client": "x", "method": "m"}))
        self.transport.fill_buffer()
        for waiting in self.dispatcher.pending:
            # Transports say it again at each write.
            self.transport.fill_buffer()
            waiting.callback(Reply(b'"%b"' % (b"x" * 65000), None))
        self.assertEqual(len(self.backend.messages()), 10)

    def test_but_not_without_end(self):
        for i in range(70):
            self.backend.send_message(call(i, "client.call", {"client": "x", "method": "m"}))
        self.transport.fill_buffer()
        for waiting in self.dispatcher.pending:
            self.transport.fill_buffer()
            if not waiting.called:
                waiting.callback(Reply(b'"%b"' % (b"x" * 70000), None))
        self.assertEqual(self.backend.close_code(), 1013)
        self.assertEqual(self.metrics.slow_readers, 1)

    def test_its_events_may_wait_a_little(self):
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

    def test_a_burst_of_events_within_one_turn_of_the_reactor(self):
        """Nothing can be written meanwhile, however well it reads."""
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

    def test_a_burst_has_an_end(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        big = b'["%b"]' % (b"x" * 65000)
        self.transport.fill_buffer()
        for _ in range(BURST_FACTOR * 65536 // 65000 + 2):
            self.assertEqual(self.metrics.slow_readers, 0)
            self.transport.fill_buffer()
            self.upstream.message("x", "m", big)
        self.assertEqual(self.backend.close_code(), 1013)
        self.assertEqual(self.metrics.slow_readers, 1)

    def test_a_full_buffer_is_no_overrun_while_few_events_wait(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        self.transport.fill_buffer()
        self.wait()
        self.upstream.message("x", "m", None)
        self.assertEqual(len(self.backend.messages()), 1)

    def test_what_was_read_meanwhile_does_not_count(self):
        """A buffer that is never quite empty is no sign that nobody reads, while little waits in it."""
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

    def test_a_pause_of_this_process_is_nobodys_slowness(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        self.transport.fill_buffer()
        self.upstream.message("x", "m", b'["%b"]' % (b"x" * 66000))
        self.endpoint.clock.advance(1000)
        self.backend.frames()
        self.upstream.message("x", "m", None)
        self.assertEqual(len(self.backend.messages()), 1)

    def test_the_count_begins_anew_when_it_has_read(self):
        self.backend.send_message(notification("events.subscribe", {"kinds": ["message"]}))
        big = b'["%b"]' % (b"x" * 60000)
        for _ in range(5):
            self.transport.fill_buffer()
            self.upstream.message("x", "m", big)
            self.transport.drain_buffer()
        self.assertEqual(len(self.backend.messages()), 5)

    def test_it_gets_no_calls(self):
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

    def test_one_that_does_not_read_at_all_is_dropped_in_time(self):
        self.transport.fill_buffer()
        self.endpoint.clock.pump([1] * 71)
        self.assertTrue(self.transport.aborted)
