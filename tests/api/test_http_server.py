"""Tests of gateway.api.http_server: limits, pipelining, invalid input, slow backends."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api.http_server import (
    KEEP_ALIVE_TIMEOUT,
    LINGER_TIMEOUT,
    MAX_SMALL_CHUNKS,
    MIN_CHUNK_SIZE,
    PARSE_SIZE,
    REQUEST_TIMEOUT,
)
from gateway.rpc.pending import Reply
from tests.builders.api_case import CALL, CHUNKED, MAX_BODY_SIZE, NOTIFICATION, HTTPConnectionTestCase, chunked
from tests.builders.endpoint import EndpointHarness
from tests.builders.http import request


class HTTPConnectionTests(HTTPConnectionTestCase):
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
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200, 200, 404])

    def test_many_pipelined_requests(self):
        self.connection.send(b"GET /healthz HTTP/1.1\r\n\r\n" * 3000)
        self.assertEqual(self.statuses(), [200] * 3000)

    def test_connection_close(self):
        self.connection.send(request("GET", "/healthz", headers=[("Connection", "close")]))
        (response,) = self.connection.responses()
        self.assertEqual(response.headers["connection"], "close")
        self.assertNotIn("keep-alive", response.headers)
        self.assertTrue(self.connection.transport.disconnecting)

    def test_reading_pauses_behind_a_call(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        self.connection.send(b"x" * 20000)
        self.assertEqual(self.connection.transport.producerState, "paused")

    @given(st.integers(1, 400), st.integers(1, 400))
    @settings(max_examples=150, deadline=None)
    def test_split_anywhere(self, first, second):
        endpoint = EndpointHarness()
        endpoint.dispatcher.results.append(Reply(b"1", None))
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
        self.assertEqual(len(endpoint.dispatcher.calls), 1)

    def test_byte_by_byte(self):
        self.dispatcher.results.append(Reply(b"1", None))
        for byte in request("POST", "/v1/clients/x/rpc", CALL) + request("GET", "/healthz"):
            self.connection.send(bytes([byte]))
        self.assertEqual(self.statuses(), [200, 200])

    # Limits.

    def test_largest_body(self):
        self.dispatcher.results.append(Reply(b"1", None))
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL.ljust(MAX_BODY_SIZE)))
        self.assertEqual(self.statuses(), [200])

    def test_too_large_by_its_content_length(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, [("Content-Length", str(MAX_BODY_SIZE + 1))]))
        response = self.assert_refused(413, -32006)
        self.assertIsNone(response.json["id"])
        data = response.json["error"]["data"]
        self.assertEqual((data["client"], data["sent"]), ("x", False))
        self.assertIn(str(MAX_BODY_SIZE), data["detail"])

    def test_too_large_names_the_client(self):
        for path, client in (
            ("/v1/clients/acme%2Fr/rpc", "acme/r"),
            ("/v1/clients/a/rpc?timeout=5", "a"),
            ("/v1/clients/%zz/rpc", None),
            ("/v1/clients//rpc", None),
            ("/v1/clients/rpc", None),
            ("/v1/clients?prefix=a", None),
        ):
            headers = [("Content-Length", "99999999"), ("Content-Type", "application/json")]
            response = EndpointHarness().request("POST", path, None, headers)
            self.assertEqual((response.status, response.json["error"]["data"]["client"]), (413, client), path)

    def test_too_large_in_chunks(self):
        data = request("POST", "/v1/clients/x/rpc", None, CHUNKED) + chunked(b"x" * 1000, b"x" * MAX_BODY_SIZE)
        self.connection.send(data)
        self.assert_refused(413, -32006)

    def test_too_large_with_expect(self):
        headers = [("Content-Length", str(MAX_BODY_SIZE + 1)), ("Expect", "100-continue")]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers))
        self.assertNotIn(b"100 Continue", self.connection.transport.value())
        self.assert_refused(413, -32006)

    def test_huge_content_length(self):
        for digits in (19, 4000, 5000):
            endpoint = EndpointHarness()
            response = endpoint.request("POST", "/v1/clients/x/rpc", None, [("Content-Length", "9" * digits)])
            self.assertIn(response.status, (400, 413))

    def test_expect(self):
        self.dispatcher.results.append(Reply(b"1", None))
        headers = [("Content-Length", str(len(CALL))), ("Expect", "100-continue")]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers))
        self.assertEqual(self.connection.transport.value(), b"HTTP/1.1 100 Continue\r\n\r\n")
        self.connection.send(CALL)
        self.assertEqual(self.statuses(), [200])

    def test_refused_with_expect(self):
        headers = [("Content-Length", "5"), ("Expect", "100-continue"), ("Content-Type", "text/plain")]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers))
        self.assert_refused(415, "content_type")

    def test_refused_body_is_not_awaited(self):
        self.connection.send(
            request("POST", "/v1/clients/x/rpc", None, [("Content-Length", "900"), ("Origin", "null")])
        )
        self.assert_refused(403, "origin")

    def test_large_refused_body(self):
        headers = [("Origin", "null"), *CHUNKED]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers) + chunked(b"x" * (MAX_BODY_SIZE + 1)))
        self.assert_refused(403, "origin")

    def test_headers_too_large_in_the_first_request(self):
        self.connection.send(b"GET /healthz HTTP/1.1\r\nX: ")
        self.connection.send(b"y" * 17000)
        self.assert_refused(431, "headers")

    def test_headers_too_large_in_one_segment(self):
        self.connection.send(request("GET", "/healthz", headers=[("X", "y" * 17000)]))
        self.assert_refused(431, "headers")

    def test_too_many_headers(self):
        self.connection.send(request("GET", "/healthz", headers=[("X", "y")] * 101))
        self.assert_refused(400, "http")

    def test_many_long_headers_in_a_later_request(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        self.connection.send(request("GET", "/healthz", headers=[("X", "y" * 400)] * 60))
        (response,) = self.connection.responses()
        self.assertEqual((response.status, response.json["error"]), (400, "http"))

    def test_endless_line_in_a_later_request(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        self.connection.send(b"GET /" + b"x" * 20000)
        (response,) = self.connection.responses()
        self.assertEqual((response.status, response.json["error"]), (431, "headers"))

    def test_refused_chunked_body_is_not_awaited(self):
        headers = [("Origin", "null"), *CHUNKED]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers) + b"1\r\nx\r\n" * 10)
        self.assert_refused(403, "origin")

    def test_refused_chunked_body_is_not_parsed(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, [("Origin", "null"), *CHUNKED]))
        self.connection.send(b"these are no chunks\r\n")
        self.assert_refused(403, "origin")

    def test_tiny_chunks(self):
        tiny = b"%x\r\n%b\r\n" % (MIN_CHUNK_SIZE - 1, b"x" * (MIN_CHUNK_SIZE - 1))
        endpoint = EndpointHarness()
        self.endpoint, self.connection = endpoint, endpoint.connect()
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, CHUNKED) + tiny * (MAX_SMALL_CHUNKS - 10))
        self.assertEqual(self.connection.responses(), [])
        self.connection.send(tiny * 20)
        self.assertIn("Content-Length", self.assert_refused(400, "chunks").json["message"])

    def test_two_chunked_requests_in_one_segment(self):
        body = chunked(CALL, *[b" " * 40] * 300)
        self.assertGreater(len(body), 2 * PARSE_SIZE)
        endpoint = EndpointHarness()
        endpoint.dispatcher.results += [Reply(b"1", None), Reply(b"2", None)]
        connection = endpoint.connect()
        connection.send((request("POST", "/v1/clients/x/rpc", None, CHUNKED) + body) * 2)
        self.assertEqual([response.json["result"] for response in connection.responses()], [1, 2])

    def test_many_chunks_that_are_not_tiny(self):
        endpoint = EndpointHarness()
        endpoint.dispatcher.results.append(Reply(b"1", None))
        connection = endpoint.connect()
        pieces = [b" " * (MIN_CHUNK_SIZE + 1)] * (MAX_SMALL_CHUNKS + 100)
        connection.send(request("POST", "/v1/clients/x/rpc", None, CHUNKED) + chunked(CALL, *pieces))
        self.assertEqual([response.status for response in connection.responses()], [200])

    def test_body_in_tiny_segments(self):
        endpoint = EndpointHarness()
        endpoint.dispatcher.results.append(Reply(b"1", None))
        connection = endpoint.connect()
        body = CALL.ljust(MAX_SMALL_CHUNKS + 100)
        connection.send(request("POST", "/v1/clients/x/rpc", None, [("Content-Length", str(len(body)))]))
        for byte in body:
            connection.send(bytes([byte]))
        self.assertEqual([response.status for response in connection.responses()], [200])

    def test_memory_of_a_body_in_tiny_segments(self):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(request("POST", "/v1/clients/x/rpc", None, [("Content-Length", "100001")]))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for _ in range(50000):
            connection.send(b"xy")
        allocated = tracemalloc.get_traced_memory()[0]
        self.assertLess(allocated, 200000)

    # Invalid input.

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
            b"POST /x HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n",
            b"POST /x HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            b"POST /x HTTP/1.1\r\nContent-Length:\r\n\r\n",
            b"POST /x HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"POST /x HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n",
        ):
            endpoint = EndpointHarness()
            connection = endpoint.connect()
            connection.send(data)
            (response,) = connection.responses()
            self.assertEqual((response.status, response.json["error"]), (400, "http"), data)

    def test_request_with_an_invalid_header_is_not_handled(self):
        for bad in (b"no colon", b"Content-Length: 5", b"Content-Length: " + b"9" * 4500, b"Bad Name: x"):
            endpoint = EndpointHarness()
            connection = endpoint.connect()
            head = request("POST", "/v1/clients/x/rpc", b"", [("X", "y"), ("Y", "z")])[:-4]
            connection.send(head + b"\r\n" + bad + b"\r\nX: y\r\n\r\n" + NOTIFICATION + request("GET", "/healthz"))
            self.assertEqual([response.status for response in connection.responses()], [400], bad)
            self.assertEqual(endpoint.dispatcher.notifications, [])

    def test_ambiguous_framing(self):
        """Framing that two programs may read differently closes the connection (RFC 9112, sections 5.2, 6.1, 6.3)."""
        chunks = chunked(NOTIFICATION)
        for version, lines, body in (
            ("1.1", ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], chunks),
            ("1.1", ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], chunks),
            ("1.1", ["Transfer-Encoding: identity", "Transfer-Encoding: chunked"], chunks),
            ("1.1", ["Transfer-Encoding: chunked, chunked"], chunks),
            ("1.1", ["Transfer-Encoding: identity"], b""),
            ("1.1", ["Transfer-Encoding: identity", f"Content-Length: {len(NOTIFICATION)}"], NOTIFICATION),
            ("1.1", [f"Content-Length: {len(NOTIFICATION)}", "Transfer-Encoding: identity"], NOTIFICATION),
            ("1.1", [f"Content-Length: {len(NOTIFICATION)}", "Transfer-Encoding: chunked"], chunks),
            ("1.0", ["Transfer-Encoding: chunked"], chunks),
            ("1.1", ["Transfer-Encoding:", " chunked"], chunks),
            ("1.1", ["Transfer-Encoding:", "\tchunked"], chunks),
            ("1.1", [f"Content-Length: {len(NOTIFICATION)}", "X: a", " Transfer-Encoding: chunked"], NOTIFICATION),
        ):
            endpoint = EndpointHarness()
            self.endpoint, self.connection = endpoint, endpoint.connect()
            first = f"POST /v1/clients/x/rpc HTTP/{version}"
            head = [first, "Host: localhost", "Content-Type: application/json", *lines, "", ""]
            self.connection.send("\r\n".join(head).encode() + body + request("GET", "/healthz"))
            self.assert_refused(400, "http")
            self.assertEqual(endpoint.dispatcher.notifications, [], lines)

    def test_transfer_encoding_in_any_case(self):
        headers = [("transfer-encoding", "ChunKed"), ("Content-Type", "application/json")]
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, headers) + chunked(NOTIFICATION))
        self.assertEqual(self.statuses(), [202])

    def test_bad_chunks(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, CHUNKED) + b"zz\r\n")
        self.assert_refused(400, "http")

    @given(
        st.lists(
            st.binary(max_size=60) | st.sampled_from([b"\r\n", b"GET /healthz HTTP/1.1\r\n", b"\r\n\r\n"]), max_size=8
        )
    )
    @settings(max_examples=300, deadline=None)
    def test_any_bytes(self, pieces):
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        for piece in pieces:
            connection.send(piece)
        for response in connection.responses():
            self.assertIn(response.status, (200, 400, 403, 404, 405))
        endpoint.clock.pump([1.0] * 80)
        connection.disconnect()
        self.assertEqual(endpoint.clock.getDelayedCalls(), [])


class EncodingTests(HTTPConnectionTestCase):
    """RFC 9110, section 8.4"""

    def test_encoded_body(self):
        for value in ("gzip", "br, identity", "identity, GZIP", "x"):
            self.setUp()
            self.connection.send(request("POST", "/v1/clients/x/rpc", CALL, [("Content-Encoding", value)]))
            (response,) = self.connection.responses()
            self.assertEqual((response.status, response.json["error"]), (415, "encoding"))
            self.assertEqual(response.headers["accept-encoding"], "identity")

    def test_plain_body(self):
        for value in ("identity", "", "IDENTITY , identity"):
            self.setUp()
            self.dispatcher.results.append(Reply(b"1", None))
            self.connection.send(request("POST", "/v1/clients/x/rpc", CALL, [("Content-Encoding", value)]))
            self.assertEqual(self.statuses(), [200])

    def test_no_body(self):
        self.connection.send(request("GET", "/healthz", headers=[("Content-Encoding", "gzip")]))
        self.assertEqual(self.statuses(), [200])

    def test_no_response_is_cached(self):
        for method, target in (("GET", "/readyz"), ("GET", "/nothing"), ("DELETE", "/healthz")):
            self.connection.send(request(method, target))
            self.assertEqual(self.connection.responses()[0].headers["cache-control"], "no-store")


class TimeoutTests(HTTPConnectionTestCase):
    def test_idle(self):
        self.connection.send(request("GET", "/healthz"))
        self.assertEqual(self.connection.responses()[0].headers["keep-alive"], "timeout=150")
        self.endpoint.clock.advance(KEEP_ALIVE_TIMEOUT - 1)
        self.assertFalse(self.connection.transport.disconnecting)
        # Longer than any common proxy keeps a connection to a server.
        self.assertGreater(KEEP_ALIVE_TIMEOUT, 120)
        self.endpoint.clock.advance(1)
        self.assertTrue(self.connection.transport.disconnecting)
        self.endpoint.clock.advance(LINGER_TIMEOUT)
        self.assertTrue(self.connection.transport.aborted)

    def trickle(self, data):
        """Send a byte every 10 seconds until the request times out."""
        for i in range(REQUEST_TIMEOUT // 10):
            self.assertEqual(self.connection.responses(), [])
            self.connection.send(data[i : i + 1])
            self.endpoint.clock.advance(10)

    def test_endless_body(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, [("Content-Length", "900")]))
        self.trickle(b" " * 900)
        self.assert_refused(408, "slow")

    def test_endless_chunked_body(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", None, CHUNKED))
        self.trickle(b"384\r\n" + b" " * 900)
        self.assert_refused(408, "slow")

    def test_endless_head(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        # The timeout starts with the first byte.
        self.endpoint.clock.advance(KEEP_ALIVE_TIMEOUT - 1)
        self.trickle(b"GET /healthz HTTP/1.1\r\n")
        self.assert_refused(408, "slow")

    def test_endless_pipelined_request(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL) + b"GET /healthz HTTP/1.1\r\n")
        self.endpoint.clock.advance(REQUEST_TIMEOUT * 3)
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200])
        self.trickle(b"X: " + b"y" * 900)
        self.assert_refused(408, "slow")

    def test_request_ends_just_in_time(self):
        self.dispatcher.results.append(Reply(b"1", None))
        data = request("POST", "/v1/clients/x/rpc", CALL)
        self.connection.send(data[:-1])
        self.endpoint.clock.advance(REQUEST_TIMEOUT - 1)
        self.connection.send(data[-1:])
        self.assertEqual(self.statuses(), [200])
        self.endpoint.clock.advance(KEEP_ALIVE_TIMEOUT - 1)
        self.assertFalse(self.connection.transport.disconnecting)

    def test_timeout_stops_while_reading_is_paused(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.connection.send(request("GET", "/healthz")[:-1])
        self.endpoint.clock.advance(REQUEST_TIMEOUT - 1)
        self.connection.transport.drain_buffer()
        self.endpoint.clock.advance(REQUEST_TIMEOUT - 1)
        self.connection.send(b"\n")
        self.assertEqual(self.statuses(), [200, 200])

    def test_no_timeout_during_a_call(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL))
        self.endpoint.clock.advance(REQUEST_TIMEOUT * 3)
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200])

    def test_idle_after_reading_late(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.endpoint.clock.advance(REQUEST_TIMEOUT - 1)
        self.connection.transport.drain_buffer()
        self.endpoint.clock.advance(KEEP_ALIVE_TIMEOUT - 1)
        self.assertFalse(self.connection.transport.disconnecting)

    def test_no_further_responses_while_the_backend_does_not_read(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.responses()
        self.connection.transport.fill_buffer()
        self.assertEqual(self.connection.transport.producerState, "paused")
        self.connection.send(request("GET", "/healthz") * 2)
        self.assertEqual(self.statuses(), [])
        self.connection.transport.drain_buffer()
        self.assertEqual(self.statuses(), [200, 200])
        self.assertEqual(self.connection.transport.producerState, "producing")

    def test_buffer_full_during_a_call(self):
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL) + request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.statuses(), [200])
        self.connection.transport.drain_buffer()
        self.assertEqual(self.statuses(), [200])

    def test_backend_that_never_reads_is_aborted(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.endpoint.clock.pump([REQUEST_TIMEOUT, LINGER_TIMEOUT])
        self.assertTrue(self.connection.transport.aborted)

    def test_backend_that_never_reads_gets_no_408(self):
        self.connection.send(request("GET", "/healthz"))
        self.connection.transport.fill_buffer()
        self.connection.responses()
        self.connection.send(request("GET", "/healthz"))
        self.endpoint.clock.pump([REQUEST_TIMEOUT, LINGER_TIMEOUT])
        self.assertTrue(self.connection.transport.aborted)
        self.assertEqual(self.connection.responses(), [])

    def test_connection_close_of_a_backend_that_never_reads(self):
        self.connection.send(request("GET", "/healthz", headers=[("Connection", "close")]))
        self.endpoint.clock.advance(REQUEST_TIMEOUT)
        self.assertTrue(self.connection.transport.aborted)


class PipeliningTests(HTTPConnectionTestCase):
    def count_responses(self) -> int:
        """Count the 200 responses, without running a reactor iteration."""
        return self.connection.transport.value().count(b"HTTP/1.1 200 ")

    def iterate(self) -> None:
        """Run one reactor iteration: the calls that are due, but not those that they schedule."""
        due = [
            call for call in self.endpoint.clock.getDelayedCalls() if call.getTime() <= self.endpoint.clock.seconds()
        ]
        for call in due:
            func, args = call.func, call.args
            call.cancel()
            func(*args)

    def test_one_request_per_reactor_iteration(self) -> None:
        """Reading is paused until all pipelined requests are answered."""
        self.connection.send(request("GET", "/healthz") * 5)
        for count in range(1, 5):
            self.assertEqual(self.count_responses(), count)
            self.assertEqual(self.connection.transport.producerState, "paused")
            self.iterate()
        self.assertEqual(self.count_responses(), 5)
        self.assertEqual(self.connection.transport.producerState, "producing")
        self.iterate()
        self.assertEqual(len(self.connection.responses()), 5)

    def test_single_requests_are_not_delayed(self) -> None:
        before = len(self.endpoint.clock.getDelayedCalls())
        for _ in range(3):
            self.connection.send(request("GET", "/healthz"))
            self.assertEqual(self.connection.transport.producerState, "producing")
        self.assertEqual(self.count_responses(), 3)
        self.assertEqual(len(self.endpoint.clock.getDelayedCalls()), before)

    def test_requests_wait_for_a_call(self) -> None:
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL) + request("GET", "/healthz") * 2)
        self.assertEqual(self.count_responses(), 0)
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.count_responses(), 1)
        self.assertEqual([b"result" in response.body for response in self.connection.responses()], [True, False, False])

    def test_connection_lost_between_pipelined_requests(self) -> None:
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(request("GET", "/healthz") * 3)
        connection.disconnect()
        self.assertEqual(endpoint.clock.getDelayedCalls(), [])

    def test_pipelined_requests_are_dropped_by_a_shutdown(self) -> None:
        """They were not handled, so the backend can send them to another node."""
        self.connection.send(request("GET", "/healthz") * 3)
        self.endpoint.factory.close_all(1001, "going away")
        self.assertTrue(self.connection.transport.disconnecting)
        self.endpoint.clock.advance(0)
        self.assertEqual(self.count_responses(), 1)

    def test_backend_does_not_read_between_pipelined_requests(self) -> None:
        self.connection.send(request("GET", "/healthz") * 3)
        self.connection.transport.fill_buffer()
        self.iterate()
        self.assertEqual(self.count_responses(), 1)
        self.connection.transport.drain_buffer()
        self.assertEqual(self.count_responses(), 2)
        self.assertEqual(len(self.connection.responses()), 3)
