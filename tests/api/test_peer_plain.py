"""Calls and notifications of other nodes, read and carried out in one go: with the same outcome as in the general way."""

from __future__ import annotations

import json
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.api import peer_server
from gateway.api.peer_server import read_plain
from gateway.protocol.errors import Kind
from gateway.protocol.jsonrpc import MAX_DEPTH
from gateway.rpc.pending import Reply
from tests.api.case import nothing_is_sent_on
from tests.api.fakes import Endpoint, Link, peer_ok, rpc_error

CALL = (
    b'{"jsonrpc":"2.0","id":"u","method":"client.call","params":{"client":"x","generation":7,"method":"m",'
    b'"params":[ 1.0 ],"timeout":5}}'
)


class ReadTests(SynchronousTestCase):
    def test_call(self):
        is_call, id, asked, params = read_plain(CALL)
        self.assertEqual((is_call, id, params), (True, b'"u"', b"[ 1.0 ]"))
        self.assertEqual(
            (asked.client, asked.generation, asked.method, asked.timeout, asked.stale), ("x", 7, "m", 5, False)
        )

    def test_notification(self):
        payload = CALL.replace(b"call", b"notify").replace(b'"params":[ 1.0 ],"timeout":5', b'"stale":true')
        is_call, _, asked, params = read_plain(payload)
        self.assertEqual((is_call, params, asked.timeout, asked.stale), (False, None, None, True))

    def test_what_is_left_to_the_general_way(self):
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
            self.assertIsNone(read_plain(CALL.replace(old, new)), new)
        self.assertIsNone(read_plain(b"[%b]" % CALL))

    @given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
    def test_anything(self, payload):
        self.assertIsNone(read_plain(payload))


class PlainTests(SynchronousTestCase):
    """The short way is taken."""

    def test_taken(self):
        endpoint = Endpoint(peer_ok=peer_ok)
        endpoint.hub.here = True
        endpoint.edge.add("x")
        link = Link(endpoint)
        # Whatever goes the general way fails.
        self.patch(endpoint.factory.links.methods, "start", None)
        link.tell(CALL)
        link.tell(CALL.replace(b"call", b"notify"))
        self.assertEqual((len(endpoint.hub.asked), len(endpoint.hub.told)), (1, 1))
        endpoint.hub.asked[0][0].settle(Reply(b"1", None))
        self.assertEqual([answer["result"] for answer in link.heard()], [None, 1])
        inner = link.protocol._inner
        self.assertEqual((inner._work, inner._asked), (set(), {}))


class Node:
    """A link of another node. ``plainly``: whether there is the short way for plain messages."""

    def __init__(self, plainly):
        self.plainly = plainly
        self.endpoint = Endpoint(peer_ok=peer_ok, max_calls=3)
        self.hub, self.edge, self.clock = self.endpoint.hub, self.endpoint.edge, self.endpoint.clock
        self.hub.here = True
        self.edge.add("x", 7)
        self.edge.openings["y"] = Deferred()
        self.link = Link(self.endpoint)
        self.inner = self.link.protocol._inner
        self.answers = []

    def do(self, step):
        if isinstance(step, bytes):
            read = read_plain if self.plainly else lambda payload: None
            with mock.patch.object(peer_server, "read_plain", read):
                self.link.tell(step)
        elif step == "answer":
            self.settle(Reply(b"1", None))
        elif step == "error":
            self.settle(Reply(None, b'{"code":5,"message":""}'))
        elif step == "fail":
            self.settle(rpc_error(Kind.TIMEOUT))
        elif step == "refuse":
            self.hub.problems.append(rpc_error(Kind.TOO_MANY_CALLS))
        elif step == "lease":
            self.endpoint.node.leased = not self.endpoint.node.leased
        elif step == "dead":
            self.hub.here = not self.hub.here
        elif step == "open" and "y" in self.edge.openings:
            self.edge.opened("y", 7)

    def settle(self, outcome):
        """The oldest call that is in flight is over."""
        while self.hub.asked:
            call, _ = self.hub.asked.pop(0)
            if call not in self.hub.forgotten:
                call.settle(outcome)
                break

    def state(self):
        self.answers += self.link.frames()
        return (
            self.answers,
            # Without a time-out it is the node's own, whoever says so.
            [(*what, timeout or 30.0) for _, (*what, timeout) in self.hub.asked],
            self.hub.told,
            len(self.hub.forgotten),
            len(self.inner._work),
            sorted(self.inner._asked),
            self.inner._bad,
        )


@st.composite
def messages(draw):
    """What another node may send, mostly right. Each is to have an id of its own in the place of ID."""
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
    def test_same(self, steps):
        nodes = [Node(plainly=True), Node(plainly=False)]
        for n, step in enumerate(steps):
            for node in nodes:
                node.do(step.replace(b"ID", b"%d" % n) if isinstance(step, bytes) else step)
            self.assertEqual(nodes[0].state(), nodes[1].state())
        for node in nodes:
            node.link.lose()
            self.assertEqual((node.inner._work, node.inner._asked), (set(), {}))
            self.assertTrue(nothing_is_sent_on(node.hub))
        self.assertEqual(len(nodes[0].hub.forgotten), len(nodes[1].hub.forgotten))
