"""Tests of the fast path of backends' calls and notifications: its outcome equals that of the general path."""

from __future__ import annotations

import itertools
import json
from unittest import mock

import attrs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.api import backend
from gateway.api.directory import ClientDirectory
from gateway.api.methods import BackendMethods, decode_fast
from gateway.api.upstream import BackendDispatcher
from gateway.metrics import Metrics
from gateway.protocol.jsonrpc import MAX_DEPTH
from gateway.registry.interface import SessionKey
from gateway.rpc.dispatcher import Dispatcher
from gateway.settings import Settings
from tests.builders.api_case import FORGED_ERROR, FORGERIES
from tests.fakes.api import FakeNode
from tests.fakes.rpc import FakeClientSessions, FakeMembership, FakeRegistry, FakeUpstream

CALL = (
    b'{"jsonrpc":"2.0","id":1,"method":"client.call","params":{"client":"x","method":"m","params":[ 1.0 ],"timeout":5}}'
)
NOTIFICATION = b'{"jsonrpc":"2.0","method":"client.notify","params":{"client":"x","method":"m"}}'


class RecordingBackend(backend.BackendProtocol):
    """A backend whose sent messages are recorded in a list."""

    state = backend.BackendProtocol.STATE_OPEN

    def send_text(self, payload):
        self.sent.append(payload)
        return True

    def close_with(self, code, reason=""):
        self.sent.append(code)
        self._active = False


class BackendHarness:
    """A dispatcher and a backend. Without ``fast`` the fast path is disabled."""

    max_in_progress = 3
    full_detail = "too many"
    max_pushed_bytes = 65536

    def __init__(self, fast=True):
        self.fast = fast
        self.clock = Clock()
        self.metrics = Metrics()
        self.sessions = FakeClientSessions()
        registry = FakeRegistry()
        self.dispatcher = Dispatcher(
            sessions=self.sessions,
            upstream=FakeUpstream(),
            registry=registry,
            membership=FakeMembership(),
            clock=self.clock,
            metrics=self.metrics,
            call_timeout=30.0,
            max_call_timeout=300.0,
            max_message_size=4096,
            max_calls=4,
            max_calls_per_client=2,
            node_id="n",
        )
        # Predictable ids of calls, the same for two harnesses.
        self.dispatcher._pending._ids = (b'"5f0c1d2e-0000-4000-8000-%012d"' % n for n in itertools.count())
        self.upstream = BackendDispatcher(
            clock=self.clock, metrics=self.metrics, settings=Settings(capacity=9), node_id="n"
        )
        directory = ClientDirectory(
            self.sessions, registry, FakeNode(), FakeMembership(), self.dispatcher.orphaned_rows
        )
        self.methods = BackendMethods(dispatcher=self.dispatcher, directory=directory, upstream=self.upstream)
        for client_id in ("x", "y", "gone"):
            self.sessions.generations[client_id] = 7
            self.dispatcher.client_connected(SessionKey(client_id, 7))
        self.dispatcher.begin_goaway(SessionKey("gone", 7))
        self.backend = RecordingBackend()
        self.backend.factory = self
        self.backend.sent = []
        self.backend.opened()

    def add(self, backend):
        pass

    discard = add

    def send(self, payload):
        read = decode_fast if self.fast else lambda payload: None
        with mock.patch.object(backend, "decode_fast", read):
            self.backend.text_received(payload)

    def respond(self, payload=None):
        """Let the clients respond to their calls."""
        for client_id, generation, sent in self.sessions.sent:
            message = json.loads(sent)
            if "method" in message and "id" in message:
                response = payload or b'{"jsonrpc":"2.0","id":"%b","result":{ "a":1.0 }}'
                self.dispatcher.message_received(client_id, generation, response % message["id"].encode())
        self.sessions.sent.clear()

    def messages(self):
        messages = [json.loads(sent) if isinstance(sent, bytes) else sent for sent in self.backend.sent]
        self.backend.sent.clear()
        return messages

    def state(self):
        """Return everything in which two harnesses could differ."""
        metrics = attrs.asdict(self.metrics)
        del metrics["gauges"]
        return (
            self.backend.sent,
            self.sessions.sent,
            metrics,
            self.backend._consecutive_bad,
            len(self.backend._in_progress),
            self.dispatcher.calls_in_flight(),
            [call.getTime() for call in self.clock.getDelayedCalls()],
        )


class DecodeFastTests(SynchronousTestCase):
    def test_call(self):
        is_call, id, request, params = decode_fast(CALL)
        self.assertEqual((is_call, id, params), (True, b"1", b"[ 1.0 ]"))
        self.assertEqual((request.client, request.method, request.timeout), ("x", "m", 5.0))

    def test_notification(self):
        is_call, id, request, params = decode_fast(NOTIFICATION)
        self.assertEqual((is_call, id, params), (False, None, None))
        self.assertEqual((request.client, request.method, request.timeout), ("x", "m", None))

    def test_unknown_members_are_ignored(self):
        self.assertIsNotNone(decode_fast(CALL.replace(b'"id":1', b'"id":1,"trace":{"a":[]}')))
        self.assertIsNotNone(decode_fast(CALL.replace(b'"timeout"', b'"trace":[],"timeout"')))

    def test_non_ascii_text(self):
        self.assertIsNotNone(decode_fast(CALL.replace(b'"m"', '"é"'.encode())))
        self.assertIsNotNone(decode_fast(CALL.replace(b'"m"', b'"\\u00e9\\n"')))

    def test_messages_left_to_the_general_path(self):
        for old, new in (
            (b'"2.0"', b'"1.0"'),
            (b'"id":1,', b""),
            (b'"id":1', b'"id":true'),
            (b'"id":1', b'"id":[1]'),
            (b'"id":1', b'"id":1,"result":1'),
            (b'"id":1', b'"id":1,"error":null'),
            (b"client.call", b"client.get"),
            (b"[ 1.0 ]", b"null"),
            (b'"timeout":5', b'"timeout":0'),
            (b'"timeout":5', b'"timeout":1e999'),
            (b'"timeout":5', b'"timeout":"5"'),
            (b'"m"', b'"\xff"'),
            (b'"m"', b'"\\ud800"'),
            (b"[ 1.0 ]", b"[" * MAX_DEPTH + b"]" * MAX_DEPTH),
            (b"}}", b"}"),
            (b'"client":"x",', b""),
        ):
            self.assertIn(old, CALL)
            self.assertIsNone(decode_fast(CALL.replace(old, new)), new)
        self.assertIsNone(decode_fast(b"[%b]" % CALL))


class DispatchFastTests(SynchronousTestCase):
    """The fast path itself."""

    def setUp(self):
        self.node = BackendHarness()
        # The general path fails.
        self.patch(self.node.methods, "start", None)

    def test_call(self):
        self.node.send(CALL)
        ((client_id, generation, payload),) = self.node.sessions.sent
        self.assertEqual((client_id, generation), ("x", 7))
        self.assertTrue(payload.endswith(b'"method":"m","params":[ 1.0 ]}'))
        self.node.respond()
        self.assertEqual(self.node.backend.sent, [b'{"jsonrpc":"2.0","id":1,"result":{ "a":1.0 }}'])
        self.assertEqual((self.node.metrics.calls, self.node.metrics.calls_answered), (1, 1))
        self.assertEqual((self.node.backend._in_progress, self.node.clock.getDelayedCalls()), ({}, []))

    def test_error_of_the_client(self):
        self.node.send(CALL)
        self.node.respond(b'{"jsonrpc":"2.0","id":"%b","error":{"code":5 ,"message":"no"}}')
        self.assertEqual(self.node.backend.sent, [b'{"jsonrpc":"2.0","id":1,"error":{"code":5 ,"message":"no"}}'])

    def test_forged_error_of_the_client(self):
        """No error of a client is marked as the gateway's, whatever its response has beside it."""
        expected = b'{"jsonrpc":"2.0","id":1,"error":%b}' % FORGED_ERROR
        for fast, forgery in itertools.product((True, False), FORGERIES):
            node = BackendHarness(fast)
            node.send(CALL)
            node.respond(forgery.replace(b"%b", b'"%b"'))
            node.send(b"[%b]" % CALL)
            node.respond(b"[%b]" % forgery.replace(b"%b", b'"%b"'))
            self.assertEqual(node.backend.sent, [expected, b"[%b]" % expected], forgery)

    def test_errors_of_the_gateway(self):
        for fast in (True, False):
            node = BackendHarness(fast)
            for payload in (CALL.replace(b'"x"', b'"nobody"'), CALL.replace(b'"m"', b'"gateway.x"'), b"7", b"{"):
                node.send(payload)
                node.send(b"[%b]" % payload)
            messages = node.messages()
            self.assertEqual(len(messages), 8)
            for message in messages:
                for response in message if isinstance(message, list) else [message]:
                    self.assertIn("error", response)
                    self.assertIs(response["gateway"], True)

    def test_deadline(self):
        self.node.send(CALL)
        self.node.clock.advance(4.99)
        self.assertEqual(self.node.messages(), [])
        self.node.clock.advance(0.06)
        (response,) = self.node.messages()
        self.assertEqual((response["id"], response["error"]["code"], response["gateway"]), (1, -32002, True))
        self.node.respond()
        self.assertEqual((self.node.messages(), self.node.metrics.late_responses), ([], 1))

    def test_client_disconnects(self):
        self.node.send(CALL)
        self.node.dispatcher.client_disconnected(SessionKey("x", self.node.sessions.generations.pop("x")))
        (response,) = self.node.messages()
        self.assertEqual((response["error"]["code"], response["error"]["data"]["sent"]), (-32003, True))

    def test_backend_disconnects(self):
        self.node.send(CALL)
        self.node.backend.closed(1001)
        self.assertEqual((self.node.dispatcher.calls_in_flight(), self.node.backend._in_progress), (0, {}))
        self.node.respond()
        self.assertEqual((self.node.messages(), self.node.metrics.late_responses), ([], 1))
        self.assertEqual(self.node.clock.getDelayedCalls(), [])

    def test_notification(self):
        self.node.send(NOTIFICATION)
        self.node.send(NOTIFICATION.replace(b'"method":"client', b'"id":5,"method":"client'))
        self.assertEqual(
            [payload for _, _, payload in self.node.sessions.sent], [b'{"jsonrpc":"2.0","method":"m"}'] * 2
        )
        self.assertEqual(self.node.messages(), [{"jsonrpc": "2.0", "id": 5, "result": None}])
        self.assertEqual(self.node.metrics.notifications, {"to_client": 2})

    def test_resets_the_count_of_bad_messages(self):
        for payload in (CALL, NOTIFICATION):
            self.node.send(b"{")
            self.node.send(payload)
            self.assertEqual(self.node.backend._consecutive_bad, 0)

    def test_client_disconnects_while_the_call_is_sent(self):
        """The general path sends the one response."""
        started = []
        self.node.methods.start = lambda *args: started.append(args) or backend.Reply(b"0", None)
        self.node.sessions.on_send = lambda client_id, payload: self.node.dispatcher.client_disconnected(
            SessionKey(client_id, self.node.sessions.generations.pop(client_id))
        )
        self.node.send(CALL)
        self.assertEqual(([response["result"] for response in self.node.messages()], len(started)), ([0], 1))
        self.assertEqual((self.node.backend._in_progress, self.node.metrics.calls), ({}, 0))


def encode_object(draw, members):
    """Draw a JSON text of an object, with any spacing and escaping, and with duplicate members."""
    ascii, comma, colon = draw(st.tuples(st.booleans(), st.sampled_from([",", " , "]), st.sampled_from([":", "\n: "])))
    parts = [json.dumps(name, ensure_ascii=ascii) + colon + text for name, text in members]
    return "{" + comma.join(parts) + "}"


ids = st.sampled_from(["1", '"a"', "null", "1.50", '"\\u00e9"', '"é"', "-0", '""'])
texts = ids | st.sampled_from(["true", "[1]", "{}", '"\\ud800"'])
clients = st.sampled_from(['"x"', '"y"', '"\\u0078"'])
invalid_clients = st.sampled_from(['"gone"', '"nobody"', '"a b"', '".."', '"é"', "5"])
methods = st.sampled_from(['"m"', '"é"', '"\\n"'])
invalid_methods = st.sampled_from(['"gateway.x"', "null", '"' + "x" * 4096 + '"'])
params = st.sampled_from(["[]", "{}", '{"a": [1.0]}', '["é"]', '["\\ud83d\\ude00"]', " [1] "])
invalid_params = st.sampled_from(["1", "null", '"[]"', "[" * 520 + "]" * 520])
timeouts = st.sampled_from(["5", "0.5", "1000", "null", "1e3"])
invalid_timeouts = st.sampled_from(["0", "-1", "1e999", '"5"', "9" * 30])


def rarely(draw):
    """Draw ``True`` one time in twelve."""
    return draw(st.integers(0, 11)) == 11


@st.composite
def call_params(draw):
    """Draw the params of a client.call."""
    members = [
        ("client", draw(invalid_clients if rarely(draw) else clients)),
        ("method", draw(invalid_methods if rarely(draw) else methods)),
    ]
    if draw(st.booleans()):
        members.append(("params", draw(invalid_params if rarely(draw) else params)))
    if draw(st.booleans()):
        members.append(("timeout", draw(invalid_timeouts if rarely(draw) else timeouts)))
    if rarely(draw):
        members.append((draw(st.sampled_from(["client", "timeout", "more"])), draw(texts)))
    return encode_object(draw, draw(st.permutations(members)))


@st.composite
def requests(draw):
    """Draw a mostly valid request; some have missing, duplicate or invalid members."""
    kinds = st.sampled_from(['"client.call"', '"client.call"', '"client.notify"'])
    invalid_kinds = st.sampled_from(['"client.nothing"', '"client\\u002ecall"', "1"])
    members = [
        ("jsonrpc", draw(st.sampled_from(['"1.0"', "2"])) if rarely(draw) else '"2.0"'),
        ("method", draw(invalid_kinds if rarely(draw) else kinds)),
        ("params", draw(texts if rarely(draw) else call_params())),
    ]
    if draw(st.integers(0, 3)):
        members.append(("id", draw(texts if rarely(draw) else ids)))
    if rarely(draw):
        several = st.sampled_from(["result", "error", "more", "method", "jsonrpc", "id"])
        members.append((draw(several), draw(texts | call_params())))
    if rarely(draw):
        members.pop(draw(st.integers(0, len(members) - 1)))
    return encode_object(draw, draw(st.permutations(members))).encode()


@st.composite
def mutated(draw):
    """Draw a request with a few bytes replaced."""
    payload = draw(requests())
    at = draw(st.integers(0, len(payload)))
    return payload[:at] + draw(st.binary(max_size=2)) + payload[at + draw(st.integers(0, 3)) :]


steps = st.one_of(
    requests(),
    requests(),
    mutated(),
    requests().map(lambda payload: b"[%b]" % payload),
    st.sampled_from(["respond", "wait", "lose x", "fail"]),
)


class EquivalenceTests(SynchronousTestCase):
    """The backend and the clients receive the same with and without the fast path."""

    @settings(deadline=None, max_examples=150)
    @given(st.lists(steps, min_size=1, max_size=6))
    @example([CALL, CALL, CALL, CALL, "respond"])
    @example([CALL, CALL, CALL.replace(b'"x"', b'"y"'), CALL, "lose x", "wait"])
    @example([CALL.replace(b"[ 1.0 ]", b'["%b"]' % (b"x" * 4050)), "respond"])
    @example([CALL.replace(b'"m"', b'"gateway.goaway"'), NOTIFICATION.replace(b'"m"', b'"gateway.goaway"')])
    def test_same_outcome(self, steps):
        nodes = [BackendHarness(fast=True), BackendHarness(fast=False)]
        for step in steps:
            for node in nodes:
                if step == "respond":
                    node.respond()
                elif step == "wait":
                    node.clock.pump([2.0] * 3)
                elif step == "lose x":
                    generation = node.sessions.generations.pop("x", 0)
                    if generation:
                        node.dispatcher.client_disconnected(SessionKey("x", generation))
                elif step == "fail":
                    node.respond(b'{"jsonrpc":"2.0","id":"%b","result":nope}')
                elif node.backend._active:
                    node.send(step)
            self.assertEqual(nodes[0].state(), nodes[1].state())
        for node in nodes:
            node.backend.closed(1001)
            self.assertEqual((node.dispatcher.calls_in_flight(), node.backend._in_progress), (0, {}))
        self.assertEqual(nodes[0].state(), nodes[1].state())

    def test_generated_requests_mostly_take_the_fast_path(self):
        """Otherwise the test above would prove little."""
        fast = []

        @settings(deadline=None, max_examples=100, database=None, derandomize=True)
        @given(requests())
        def collect(payload):
            fast.append(decode_fast(payload) is not None)

        collect()
        self.assertGreater(sum(fast), len(fast) / 3)
