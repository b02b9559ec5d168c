"""HTTP with those who are slow, or do not read."""

from __future__ import annotations

from gateway.api.http_server import IDLE_TIMEOUT, LINGER_TIMEOUT
from gateway.rpc.pending import Reply
from tests.api.case import CALL, CHUNKED, HTTPConnectionTestCase
from tests.api.fakes import request


class TimeoutTests(HTTPConnectionTestCase):
    def test_idle(self):
        self.connection.send(request("GET", "/healthz"))
        self.endpoint.clock.advance(IDLE_TIMEOUT - 1)
        self.assertFalse(self.connection.transport.disconnecting)
        self.endpoint.clock.advance(1)
        self.assertTrue(self.connection.transport.disconnecting)
        self.endpoint.clock.advance(LINGER_TIMEOUT)
        self.assertTrue(self.connection.transport.aborted)

    def trickle(self, data):
        """Send a byte every 10 seconds until the time for a request is up."""
        for i in range(IDLE_TIMEOUT // 10):
            self.assertEqual(self.connection.responses(), [])
            self.connection.send(data[i : i + 1])
            self.endpoint.clock.advance(10)

    def test_a_body_that_does_not_end(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, [("Content-Length", "900")]))
        self.trickle(b" " * 900)
        self.assert_refused(408, "slow")

    def test_a_body_in_chunks_that_does_not_end(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, CHUNKED))
        self.trickle(b"384\r\n" + b" " * 900)
        self.assert_refused(408, "slow")

    def test_a_head_that_does_not_end(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        # The time begins with the first byte.
        self.endpoint.clock.advance(IDLE_TIMEOUT - 1)
        self.trickle(b"GET /healthz HTTP/1.1\r\n")
        self.assert_refused(408, "slow")

    def test_a_pipelined_request_that_does_not_end(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL) + b"GET /healthz HTTP/1.1\r\n")
        self.endpoint.clock.advance(IDLE_TIMEOUT * 3)
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200])
        self.trickle(b"X: " + b"y" * 900)
        self.assert_refused(408, "slow")

    def test_a_request_that_just_ends_in_time(self):
        self.dispatcher.results.append(Reply(b"1", None))
        data = request("POST", "/v1/clients/x/rpc", CALL)
        self.connection.send(data[:-1])
        self.endpoint.clock.advance(IDLE_TIMEOUT - 1)
        self.connection.send(data[-1:])
        self.assertEqual(self.statuses(), [200])
        self.endpoint.clock.advance(IDLE_TIMEOUT - 1)
        self.assertFalse(self.connection.transport.disconnecting)

    def test_the_time_does_not_count_while_its_request_is_not_read(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.connection.send(request("GET", "/healthz")[:-1])
        self.endpoint.clock.advance(IDLE_TIMEOUT - 1)
        self.connection.transport.drain_buffer()
        self.endpoint.clock.advance(IDLE_TIMEOUT - 1)
        self.connection.send(b"\n")
        self.assertEqual(self.statuses(), [200, 200])

    def test_a_call_may_take_its_time(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        self.endpoint.clock.advance(IDLE_TIMEOUT * 3)
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200])

    def test_who_does_not_read_gets_no_further_answers(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        self.connection.transport.fill_buffer()
        self.assertEqual(self.connection.transport.producerState, "paused")
        self.connection.send(request("GET", "/healthz") * 2)
        self.assertEqual(self.statuses(), [])
        self.connection.transport.drain_buffer()
        self.assertEqual(self.statuses(), [200, 200])
        self.assertEqual(self.connection.transport.producerState, "producing")

    def test_full_while_answering(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL) + request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200])
        self.connection.transport.drain_buffer()
        self.assertEqual(self.statuses(), [200])

    def test_who_never_reads_is_dropped(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.endpoint.clock.pump([IDLE_TIMEOUT, LINGER_TIMEOUT])
        self.assertTrue(self.connection.transport.aborted)

    def test_who_never_reads_is_not_told_that_it_is_slow(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.connection.responses()
        self.connection.send(request("GET", "/healthz"))
        self.endpoint.clock.pump([IDLE_TIMEOUT, LINGER_TIMEOUT])
        self.assertTrue(self.connection.transport.aborted)
        self.assertEqual(self.connection.responses(), [])

    def test_who_asked_for_the_end_and_never_reads_is_dropped(self):
        self.connection.send(request("GET", "/healthz", headers=[("Connection", "close")]))
        self.endpoint.clock.advance(IDLE_TIMEOUT)
        self.assertTrue(self.connection.transport.aborted)
