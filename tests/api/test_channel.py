"""HTTP itself: bounds, pipelining, bad bytes, and who does not read."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import TestCase

from gateway.api.answer import ENVELOPE
from gateway.api.channel import IDLE_TIMEOUT, LINGER
from gateway.rpc.interface import Reply
from tests.api.fakes import Endpoint, request

CALL = b'{"jsonrpc":"2.0","id":1,"method":"m"}'
NOTE = b'{"jsonrpc":"2.0","method":"m"}'
LIMIT = 1024 + ENVELOPE


def chunked(*chunks):
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


CHUNKED = (("Transfer-Encoding", "chunked"), ("Content-Type", "application/json"))


class ChannelTests(TestCase):
    def setUp(self):
        self.endpoint = Endpoint(max_message_size=1024)
        self.hub = self.endpoint.hub
        self.connection = self.endpoint.connect()

    def statuses(self):
        return [response.status for response in self.connection.responses()]

    # Pipelining.

    def test_keep_alive(self):
        for _ in range(3):
            self.connection.send(request("GET", "/healthz"))
            self.assertEqual(self.statuses(), [200])
        self.assertFalse(self.connection.transport.disconnecting)

    def test_pipelining_keeps_the_order(self):
        self.connection.send(
            request("POST", "/v1/clients/x/rpc", CALL) + request("GET", "/healthz") + request("GET", "/nothing")
        )
        self.assertEqual(self.statuses(), [])
        self.hub.waiting[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200, 200, 404])

    def test_many_pipelined_requests(self):
        self.connection.send(b"GET /healthz HTTP/1.1\r\n\r\n" * 3000)
        self.assertEqual(self.statuses(), [200] * 3000)

    def test_connection_close(self):
        self.connection.send(request("GET", "/healthz", headers=[("Connection", "close")]))
        (response,) = self.connection.responses()
        self.assertEqual(response.headers["connection"], "close")
        self.assertTrue(self.connection.transport.disconnecting)

    def test_more_than_may_wait_behind_a_call_is_not_read(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        self.connection.send(b"x" * 20000)
        self.assertEqual(self.connection.transport.producerState, "paused")

    @given(st.integers(1, 400), st.integers(1, 400))
    @settings(max_examples=150, deadline=None)
    def test_split_anywhere(self, first, second):
        endpoint = Endpoint()
        endpoint.hub.answers.append(Reply(b"1", None))
        connection = endpoint.connect()
        data = (
            request("POST", "/v1/clients/x/rpc", None, [*CHUNKED, ("X", "y" * 20)])
            + chunked(CALL[:10], CALL[10:])
            + request("GET", "/healthz")
        )
        cuts = sorted({0, min(first, len(data)), min(first + second, len(data)), len(data)})
        for start, end in pairwise(cuts):
            connection.send(data[start:end])
        self.assertEqual([response.status for response in connection.responses()], [200, 200])
        self.assertEqual(len(endpoint.hub.calls), 1)

    def test_byte_by_byte(self):
        self.hub.answers.append(Reply(b"1", None))
        for byte in request("POST", "/v1/clients/x/rpc", CALL) + request("GET", "/healthz"):
            self.connection.send(bytes([byte]))
        self.assertEqual(self.statuses(), [200, 200])

    # Bounds.

    def refused(self, status, word_or_code):
        (response,) = self.connection.responses()
        self.assertEqual(response.status, status)
        error = response.json["error"]
        self.assertEqual(error["code"] if isinstance(error, dict) else error, word_or_code)
        self.assertEqual(response.headers["connection"], "close")
        self.assertEqual(self.endpoint.metrics.api_requests[str(status)], 1)
        # What still comes is dropped, for a while, so that the answer arrives.
        transport = self.connection.transport
        self.assertFalse(transport.disconnecting)
        self.connection.send(b"x" * 100000 + request("GET", "/healthz"))
        self.assertEqual(self.connection.responses(), [])
        self.endpoint.clock.advance(LINGER)
        self.assertTrue(transport.disconnecting)
        self.assertFalse(transport.aborted)
        self.endpoint.clock.advance(LINGER)
        self.assertTrue(transport.aborted)
        self.connection.lose()
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])
        return response

    def test_the_largest_body(self):
        self.hub.answers.append(Reply(b"1", None))
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL.ljust(LIMIT)))
        self.assertEqual(self.statuses(), [200])

    def test_too_large_by_its_content_length(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, [("Content-Length", str(LIMIT + 1))]))
        response = self.refused(413, -32006)
        self.assertIsNone(response.json["id"])
        self.assertEqual(response.json["error"]["data"], {"client": None, "sent": False})
        self.assertIn(str(LIMIT), response.json["error"]["message"])

    def test_too_large_in_chunks(self):
        data = request("POST", "/v1/clients/x/rpc", None, CHUNKED) + chunked(b"x" * 1000, b"x" * LIMIT)
        self.connection.send(data)
        self.refused(413, -32006)

    def test_too_large_with_expect(self):
        headers = [("Content-Length", str(LIMIT + 1)), ("Expect", "100-continue")]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers))
        self.assertNotIn(b"100 Continue", self.connection.transport.value())
        self.refused(413, -32006)

    def test_too_large_to_begin_with(self):
        for digits in (19, 4000, 5000):
            endpoint = Endpoint()
            response = endpoint.ask("POST", "/v1/clients/x/rpc", None, [("Content-Length", "9" * digits)])
            self.assertIn(response.status, (400, 413))

    def test_expect(self):
        self.hub.answers.append(Reply(b"1", None))
        headers = [("Content-Length", str(len(CALL))), ("Expect", "100-continue")]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers))
        self.assertEqual(self.connection.transport.value(), b"HTTP/1.1 100 Continue\r\n\r\n")
        self.connection.send(CALL)
        self.assertEqual(self.statuses(), [200])

    def test_refused_with_expect(self):
        headers = [("Content-Length", "5"), ("Expect", "100-continue"), ("Content-Type", "text/plain")]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers))
        self.refused(415, "content_type")

    def test_a_refused_body_is_not_kept(self):
        self.connection.send(
            request("POST", "/v1/clients/x/rpc", None, [("Content-Length", "900"), ("Origin", "null")])
        )
        self.connection.send(b"x" * 899)
        self.assertEqual(self.connection.protocol._inner.requests[0].body(), b"")
        self.assertEqual(self.statuses(), [])
        self.connection.send(b"x")
        self.assertEqual(self.statuses(), [403])
        # It was small: the connection may stay.
        self.connection.send(request("GET", "/healthz"))
        self.assertEqual(self.statuses(), [200])

    def test_a_refused_body_that_is_large(self):
        headers = [("Origin", "null"), *CHUNKED]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers) + chunked(b"x" * (LIMIT + 1)))
        self.refused(403, "origin")

    def test_headers_too_large_in_the_first_request(self):
        self.connection.send(b"GET /healthz HTTP/1.1\r\nX: ")
        self.connection.send(b"y" * 17000)
        self.refused(431, "headers")

    def test_headers_too_large_in_one_piece(self):
        self.connection.send(request("GET", "/healthz", headers=[("X", "y" * 17000)]))
        self.refused(431, "headers")

    def test_too_many_headers(self):
        self.connection.send(request("GET", "/healthz", headers=[("X", "y")] * 101))
        self.refused(400, "http")

    def test_many_long_headers_in_a_later_request(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        self.connection.send(request("GET", "/healthz", headers=[("X", "y" * 400)] * 60))
        (response,) = self.connection.responses()
        self.assertEqual((response.status, response.json["error"]), (400, "http"))

    def test_a_line_without_an_end_in_a_later_request(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        self.connection.send(b"GET /" + b"x" * 20000)
        (response,) = self.connection.responses()
        self.assertEqual((response.status, response.json["error"]), (431, "headers"))

    # Bad bytes.

    def test_not_http(self):
        for data in (
            b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
            b"hello\r\n\r\n",
            b"\r\n\r\n\r\n\r\n",
            b"GET /healthz\r\n\r\n",
            b"GET /healthz HTTP/2.0\r\n\r\n",
            b"GET /v1/clients/\xe9 HTTP/1.1\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nBad Name: x\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nX: a\x00b\r\n\r\n",
            b"POST /x HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /x HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            b"POST /x HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST /x HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        ):
            endpoint = Endpoint()
            connection = endpoint.connect()
            connection.send(data)
            (response,) = connection.responses()
            self.assertEqual((response.status, response.json["error"]), (400, "http"), data)

    def test_a_bad_header_in_the_middle_is_the_end_of_it(self):
        for bad in (b"no colon", b"Content-Length: 5", b"Content-Length: " + b"9" * 4500, b"Bad Name: x"):
            endpoint = Endpoint()
            connection = endpoint.connect()
            head = request("POST", "/v1/clients/x/rpc", b"", [("X", "y"), ("Y", "z")])[:-4]
            connection.send(head + b"\r\n" + bad + b"\r\nX: y\r\n\r\n" + NOTE + request("GET", "/healthz"))
            self.assertEqual([response.status for response in connection.responses()], [400], bad)
            self.assertEqual(endpoint.hub.notifications, [])

    def test_bad_chunks(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, CHUNKED) + b"zz\r\n")
        self.refused(400, "http")

    @given(
        st.lists(
            st.binary(max_size=60) | st.sampled_from([b"\r\n", b"GET /healthz HTTP/1.1\r\n", b"\r\n\r\n"]), max_size=8
        )
    )
    @settings(max_examples=300, deadline=None)
    def test_any_bytes(self, pieces):
        endpoint = Endpoint()
        connection = endpoint.connect()
        for piece in pieces:
            connection.send(piece)
        for response in connection.responses():
            self.assertIn(response.status, (200, 400, 403, 404, 405))
        endpoint.clock.pump([1.0] * 80)
        connection.lose()
        self.assertEqual(endpoint.clock.getDelayedCalls(), [])

    # Those who are slow, or do not read.

    def test_idle(self):
        self.connection.send(request("GET", "/healthz"))
        self.endpoint.clock.advance(IDLE_TIMEOUT - 1)
        self.assertFalse(self.connection.transport.disconnecting)
        self.endpoint.clock.advance(1)
        self.assertTrue(self.connection.transport.disconnecting)
        self.endpoint.clock.advance(LINGER)
        self.assertTrue(self.connection.transport.aborted)

    def test_a_call_may_take_its_time(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        self.endpoint.clock.advance(IDLE_TIMEOUT * 3)
        self.hub.waiting[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200])

    def test_who_does_not_read_gets_no_further_answers(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        self.connection.transport.fill()
        self.assertEqual(self.connection.transport.producerState, "paused")
        self.connection.send(request("GET", "/healthz") * 2)
        self.assertEqual(self.statuses(), [])
        self.connection.transport.drain()
        self.assertEqual(self.connection.transport.producerState, "producing")
        self.assertEqual(self.statuses(), [200, 200])

    def test_full_while_answering(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL) + request("GET", "/healthz"))
        self.connection.transport.fill()
        self.hub.waiting[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200])
        self.connection.transport.drain()
        self.assertEqual(self.statuses(), [200])

    def test_who_never_reads_is_dropped(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.transport.fill()
        self.endpoint.clock.pump([IDLE_TIMEOUT, LINGER])
        self.assertTrue(self.connection.transport.aborted)

    def test_who_asked_for_the_end_and_never_reads_is_dropped(self):
        self.connection.send(request("GET", "/healthz", headers=[("Connection", "close")]))
        self.endpoint.clock.advance(IDLE_TIMEOUT)
        self.assertTrue(self.connection.transport.aborted)
