"""Tests of gateway.api.http_server."""

from __future__ import annotations

from gateway.rpc.pending import Reply
from tests.api.case import CALL, HTTPConnectionTestCase
from tests.api.fakes import EndpointHarness, request


class PipeliningTests(HTTPConnectionTestCase):
    def answered(self) -> int:
        """How many answers are there, without a turn of the reactor."""
        return self.connection.transport.value().count(b"HTTP/1.1 200 ")

    def turn(self) -> None:
        """What is due now, but not what that sets off."""
        due = [
            call for call in self.endpoint.clock.getDelayedCalls() if call.getTime() <= self.endpoint.clock.seconds()
        ]
        for call in due:
            func, args = call.func, call.args
            call.cancel()
            func(*args)

    def test_one_in_a_turn(self) -> None:
        """Nothing more is read until all that were read are answered."""
        self.connection.send(request("GET", "/healthz") * 5)
        for answered in range(1, 5):
            self.assertEqual(self.answered(), answered)
            self.assertEqual(self.connection.transport.producerState, "paused")
            self.turn()
        self.assertEqual(self.answered(), 5)
        self.assertEqual(self.connection.transport.producerState, "producing")
        self.turn()
        self.assertEqual(len(self.connection.responses()), 5)

    def test_alone(self) -> None:
        """One that waits for its answer is not held up."""
        before = len(self.endpoint.clock.getDelayedCalls())
        for _ in range(3):
            self.connection.send(request("GET", "/healthz"))
            self.assertEqual(self.connection.transport.producerState, "producing")
        self.assertEqual(self.answered(), 3)
        self.assertEqual(len(self.endpoint.clock.getDelayedCalls()), before)

    def test_in_order(self) -> None:
        """Those behind one that takes its time wait for it."""
        self.connection.send(request("POST", "/v1/clients/x/rpc", CALL) + request("GET", "/healthz") * 2)
        self.assertEqual(self.answered(), 0)
        self.dispatcher.pending[0].callback(Reply(b"1", None))
        self.assertEqual(self.answered(), 1)
        self.assertEqual([b"result" in response.body for response in self.connection.responses()], [True, False, False])

    def test_lost_meanwhile(self) -> None:
        endpoint = EndpointHarness()
        connection = endpoint.connect()
        connection.send(request("GET", "/healthz") * 3)
        connection.disconnect()
        self.assertEqual(endpoint.clock.getDelayedCalls(), [])

    def test_not_read_meanwhile(self) -> None:
        """Who reads no answers gets no further one until it has."""
        self.connection.send(request("GET", "/healthz") * 3)
        self.connection.transport.fill_buffer()
        self.turn()
        self.assertEqual(self.answered(), 1)
        self.connection.transport.drain_buffer()
        self.assertEqual(self.answered(), 2)
        self.assertEqual(len(self.connection.responses()), 3)
