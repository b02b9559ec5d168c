"""One port, two protocols; and the end of all connections."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.interfaces import IProtocolFactory, IProtocolNegotiationFactory
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from gateway.api.endpoint import CLOSING_TIMEOUT, OPENING_TIMEOUT, is_upgrade
from gateway.rpc.interface import Reply
from tests.api.fakes import UPGRADE, Backend, Endpoint, frame, frames, request

CALL = b'{"jsonrpc":"2.0","id":1,"method":"m"}'
SERVE = b'{"jsonrpc":"2.0","id":1,"method":"upstream.serve"}'


class ChoiceTests(TestCase):
    def test_interface(self):
        factory = Endpoint().factory
        self.assertTrue(verifyObject(IProtocolFactory, factory))
        self.assertTrue(verifyObject(IProtocolNegotiationFactory, factory))
        self.assertEqual(factory.acceptableProtocols(), [b"http/1.1"])

    def test_is_upgrade(self):
        for head, expected in (
            (b"GET /v1/backend HTTP/1.1\r\nUpgrade: websocket", True),
            (b"GET /v1/backend?x=1 HTTP/1.1\r\nA: b\r\nuPGRADE:x", True),
            (b"POST /v1/backend HTTP/1.1\r\nUpgrade: websocket", True),
            (b"GET /v1/backend HTTP/1.1\r\nA: Upgrade", False),
            (b"GET /v1/backends HTTP/1.1\r\nUpgrade: websocket", False),
            (b"GET /healthz HTTP/1.1\r\nUpgrade: websocket", False),
            (b"", False),
            (b"GET", False),
        ):
            self.assertEqual(is_upgrade(head), expected, head)

    @given(st.integers(1, 220))
    @settings(max_examples=80, deadline=None)
    def test_split_anywhere(self, cut):
        endpoint = Endpoint()
        connection = endpoint.connect()
        data = request("GET", "/v1/backend", headers=UPGRADE) + frame(SERVE)
        connection.send(data[:cut])
        connection.send(data[cut:])
        head, _, rest = connection.transport.value().partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(b"HTTP/1.1 101 "))
        self.assertEqual(frames(rest), [(1, b'{"jsonrpc":"2.0","id":1,"result":null}')])

    def test_byte_by_byte(self):
        connection = Endpoint().connect()
        for byte in request("GET", "/v1/backend", headers=UPGRADE) + frame(SERVE):
            connection.send(bytes([byte]))
        self.assertIn(b"result", connection.transport.value())

    def test_an_upgrade_on_a_connection_that_speaks_http(self):
        connection = Endpoint().connect()
        connection.send(request("GET", "/healthz") + request("GET", "/v1/backend", headers=UPGRADE))
        self.assertEqual([response.status for response in connection.responses()], [200, 426])

    def test_silence(self):
        endpoint = Endpoint()
        connection = endpoint.connect()
        endpoint.clock.advance(OPENING_TIMEOUT)
        self.assertTrue(connection.transport.aborted)
        self.assertEqual(connection.transport.value(), b"")

    def test_a_slow_header(self):
        endpoint = Endpoint()
        connection = endpoint.connect()
        connection.send(b"GET /healthz HTTP/1.1\r\n")
        endpoint.clock.advance(OPENING_TIMEOUT)
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json["error"]), (408, "slow"))

    def test_the_time_is_for_the_header_alone(self):
        endpoint = Endpoint()
        connection = endpoint.connect()
        connection.send(request("POST", "/v1/clients/x/rpc", None, [("Content-Length", str(len(CALL)))]))
        endpoint.clock.advance(OPENING_TIMEOUT)
        endpoint.hub.answers.append(Reply(b"1", None))
        connection.send(CALL)
        self.assertEqual(connection.responses()[0].status, 200)

    def test_lost_before_the_choice(self):
        endpoint = Endpoint()
        connection = endpoint.connect()
        connection.send(b"GET")
        connection.lose()
        self.assertEqual(endpoint.clock.getDelayedCalls(), [])
        self.assertEqual(endpoint.factory.connections, {})


class ClosingTests(TestCase):
    def setUp(self):
        self.endpoint = Endpoint()
        self.factory = self.endpoint.factory

    def test_nobody_there(self):
        self.assertIsNone(self.successResultOf(self.factory.close_all(1001, "going away")))
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])

    def test_everybody(self):
        backend = Backend(self.endpoint)
        idle = self.endpoint.connect()
        idle.send(request("GET", "/healthz"))
        idle.responses()
        busy = self.endpoint.connect()
        busy.send(request("POST", "/v1/clients/x/rpc", CALL))
        fresh = self.endpoint.connect()
        closed = self.factory.close_all(1001, "going away")
        self.assertEqual(backend.frames(), [(8, struct.pack("!H", 1001) + b"going away")])
        self.assertTrue(idle.transport.disconnecting)
        self.assertTrue(fresh.transport.aborted)
        self.assertFalse(busy.transport.disconnecting)
        self.endpoint.hub.waiting[0].callback(Reply(b"1", None))
        self.assertEqual(busy.responses()[0].status, 200)
        self.assertTrue(busy.transport.disconnecting)
        for connection in (backend, idle, busy):
            self.assertNoResult(closed)
            connection.lose()
        fresh.lose()
        self.assertIsNone(self.successResultOf(closed))
        # The timers of opening and closing handshakes are batches that run out by themselves.
        self.endpoint.clock.advance(5.5)
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])

    def test_a_request_that_is_half_there(self):
        connection = self.endpoint.connect()
        data = request("POST", "/v1/clients/x/rpc", CALL)
        connection.send(data[:-5])
        self.factory.close_all(1001, "going away")
        self.endpoint.hub.answers.append(Reply(b"1", None))
        connection.send(data[-5:])
        (response,) = connection.responses()
        self.assertEqual(response.status, 200)
        self.assertTrue(connection.transport.disconnecting)

    def test_a_header_that_is_half_there(self):
        connection = self.endpoint.connect()
        connection.send(request("GET", "/healthz") + b"GET /healthz HTTP/1.1\r\n")
        self.factory.close_all(1001, "going away")
        connection.send(b"\r\n")
        self.assertEqual(connection.responses()[1].headers["connection"], "close")
        self.assertTrue(connection.transport.disconnecting)

    def test_who_does_not_go_is_dropped(self):
        busy = self.endpoint.connect()
        busy.send(request("POST", "/v1/clients/x/rpc", CALL))
        closed = self.factory.close_all(1001, "going away")
        self.endpoint.clock.advance(CLOSING_TIMEOUT)
        self.assertTrue(busy.transport.aborted)
        busy.lose()
        self.assertIsNone(self.successResultOf(closed))
        self.assertEqual(self.endpoint.hub.cancelled, 1)

    def test_who_waits_may_give_up(self):
        Backend(self.endpoint)
        closed = self.factory.close_all(1001, "going away")
        closed.addErrback(lambda failure: None)
        closed.cancel()
        self.successResultOf(closed)
