"""Tests of the fast path of peers' calls and notifications: its outcome equals that of the general path."""

from __future__ import annotations

import json
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.api import peer_server
from gateway.api.peer_server import decode_fast
from gateway.protocol.errors import ErrorKind
from gateway.protocol.jsonrpc import MAX_DEPTH
from gateway.rpc.pending import Reply
from tests.builders.api_case import nothing_forwarded
from tests.builders.endpoint import EndpointHarness, PeerWebSocket, rpc_error
from tests.fakes.api import authenticate_peer

CALL = (
    b'{"jsonrpc":"2.0","id":"u","method":"client.call","params":{"client":"x","generation":7,"method":"m",'
    b'"params":[ 1.0 ],"timeout":5}}'
)


class DecodeFastTests(SynchronousTestCase):
    def test_call(self):
        is_call, id, request, params = decode_fast(CALL)
        self.assertEqual((is_call, id, params), (True, b'"u"', b"[ 1.0 ]"))
        self.assertEqual(
            (request.client, request.generation, request.method, request.timeout, request.stale),
            ("x", 7, "m", 5, False),
        )

    def test_notification(self):
        payload = CALL.replace(b"call", b"notify").replace(b'"params":[ 1.0 ],"timeout":5', b'"stale":true')
        is_call, _, request, params = decode_fast(payload)
        self.assertEqual((is_call, params, request.timeout, request.stale), (False, None, None, True))

    def test_messages_left_to_the_general_path(self):
        for old, new in (
            (b'"2.0"', b'"1.0"'),
            (b'"id":"u",', b""),
            (b'"u"', b"true"),
            (b'"id":"u"', b'"id":"u","result":1'),
            (b"client.call", b"peer.has"),
            (b"[ 1.0 ]", b"null"),
            (b'"timeout":5', b'"timeout":0'),
            (b'"generation":7', b'"generation":0'),
            (b'"generation":7,', b""),
            (b'"m"', b'"\xff"'),
            (b'"m"', b'"\\ud800"'),
            (b"[ 1.0 ]", b"[" * MAX_DEPTH + b"]" * MAX_DEPTH),
            (b"}}", b"}"),
        ):
            self.assertIn(old, CALL)
            self.assertIsNone(decode_fast(CALL.replace(old, new)), new)
        self.assertIsNone(decode_fast(b"[%b]" % CALL))

    @given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
    def test_arbitrary_payload(self, payload):
        self.assertIsNone(decode_fast(payload))


class DispatchFastTests(SynchronousTestCase):
    """The fast path itself."""

    def test_call_and_notification(self):
        endpoint = EndpointHarness(authenticate_peer=authenticate_peer)
        endpoint.dispatcher.accepts_session_calls = True
        endpoint.sessions.add("x")
        peer = PeerWebSocket(endpoint)
        # The general path fails.
        self.patch(endpoint.factory.peer_factory.methods, "start", None)
        peer.send_message(CALL)
        peer.send_message(CALL.replace(b"call", b"notify"))
        self.assertEqual(
            (len(endpoint.dispatcher.session_calls), len(endpoint.dispatcher.session_notifications)), (1, 1)
        )
        endpoint.dispatcher.session_calls[0][0].complete(Reply(b"1", None))
        self.assertEqual([response["result"] for response in peer.messages()], [None, 1])
        protocol = peer.protocol._protocol
        self.assertEqual((protocol._in_progress, protocol._requests_by_id), ({}, {}))


class PeerHarness:
    """A peer connection. Without ``fast`` the fast path is disabled."""

    def __init__(self, fast):
        self.fast = fast
        self.endpoint = EndpointHarness(authenticate_peer=authenticate_peer, max_calls=3)
        self.dispatcher, self.sessions, self.clock = (
            self.endpoint.dispatcher,
            self.endpoint.sessions,
            self.endpoint.clock,
        )
        self.dispatcher.accepts_session_calls = True
        self.sessions.add("x", 7)
        self.sessions.claims["y"] = Deferred()
        self.link = PeerWebSocket(self.endpoint)
        self.protocol = self.link.protocol._protocol
        self.responses = []

    def step(self, step):
        if isinstance(step, bytes):
            read = decode_fast if self.fast else lambda payload: None
            with mock.patch.object(peer_server, "decode_fast", read):
                self.link.send_message(step)
        elif step == "answer":
            self.complete_oldest(Reply(b"1", None))
        elif step == "error":
            self.complete_oldest(Reply(None, b'{"code":5,"message":""}'))
        elif step == "fail":
            self.complete_oldest(rpc_error(ErrorKind.TIMEOUT))
        elif step == "refuse":
            self.dispatcher.errors.append(rpc_error(ErrorKind.TOO_MANY_CALLS))
        elif step == "lease":
            self.endpoint.membership.lease_held = not self.endpoint.membership.lease_held
        elif step == "dead":
            self.dispatcher.accepts_session_calls = not self.dispatcher.accepts_session_calls
        elif step == "open" and "y" in self.sessions.claims:
            self.sessions.finish_claim("y", 7)

    def complete_oldest(self, result):
        """Complete the oldest call in flight."""
        while self.dispatcher.session_calls:
            call, _ = self.dispatcher.session_calls.pop(0)
            if call not in self.dispatcher.cancelled_calls:
                call.complete(result)
                break

    def state(self):
        self.responses += self.link.frames()
        return (
            self.responses,
            # A call without a timeout has the default one: the fast path leaves that to the dispatcher.
            [(*request, timeout or 30.0) for _, (*request, timeout) in self.dispatcher.session_calls],
            self.dispatcher.session_notifications,
            len(self.dispatcher.cancelled_calls),
            len(self.protocol._in_progress),
            sorted(self.protocol._requests_by_id),
            self.protocol._consecutive_bad,
        )


@st.composite
def messages(draw):
    """Draw a message of a peer, mostly valid. ID stands for a unique id."""
    params = {
        "client": draw(st.sampled_from(["x", "x", "x", "y", "z", "a b"])),
        "generation": draw(st.sampled_from([7, 7, 7, 6, 0])),
        "method": draw(st.sampled_from(["m", "\xe9"])),
        "timeout": draw(st.sampled_from([5, 0.5, None, 0])),
        "stale": draw(st.booleans()),
    }
    if draw(st.booleans()):
        params["params"] = draw(st.sampled_from([[], {"a": [1.0]}, 1]))
    message = {
        "jsonrpc": "2.0",
        "id": draw(st.sampled_from(["ID"] * 9 + [True])),
        "method": draw(st.sampled_from(["client.call", "client.call", "client.notify", "peer.cancel"])),
        "params": params,
    }
    if message["method"] == "peer.cancel":
        message["params"] = {"id": draw(st.sampled_from("0123456"))}
    return json.dumps(message, ensure_ascii=draw(st.booleans())).encode()


STEPS = ["answer", "error", "fail", "refuse", "lease", "dead", "open", b"{", b'{"jsonrpc":"2.0","id":"u","result":1}']


class EquivalenceTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=200)
    @given(st.lists(messages() | messages() | messages() | st.sampled_from(STEPS), min_size=1, max_size=7))
    def test_same_outcome(self, steps):
        nodes = [PeerHarness(fast=True), PeerHarness(fast=False)]
        for n, step in enumerate(steps):
            for node in nodes:
                node.step(step.replace(b"ID", b"%d" % n) if isinstance(step, bytes) else step)
            self.assertEqual(nodes[0].state(), nodes[1].state())
        for node in nodes:
            node.link.disconnect()
            self.assertEqual((node.protocol._in_progress, node.protocol._requests_by_id), ({}, {}))
            self.assertTrue(nothing_forwarded(node.dispatcher))
        self.assertEqual(len(nodes[0].dispatcher.cancelled_calls), len(nodes[1].dispatcher.cancelled_calls))
