"""Test cases and messages for the tests of the backend endpoint."""

from __future__ import annotations

from hypothesis import strategies as st
from twisted.trial.unittest import TestCase

from gateway.api.http_server import LINGER_TIMEOUT
from gateway.api.responses import MAX_ENVELOPE_SIZE
from gateway.protocol.errors import ErrorKind
from tests.builders.endpoint import BackendWebSocket, EndpointHarness, PeerWebSocket, rpc_error
from tests.builders.http import request
from tests.fakes.api import authenticate_peer

CALL = b'{"jsonrpc":"2.0","id":1,"method":"m"}'
NOTIFICATION = b'{"jsonrpc":"2.0","method":"m"}'
MAX_BODY_SIZE = 1024 + MAX_ENVELOPE_SIZE

segment = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
any_message = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.sampled_from(["2.0", "1.0", 2]),
        "id": any_json,
        "method": st.sampled_from(["m", "gateway.x", 1]) | st.text(max_size=5),
        "params": any_json,
        "result": any_json,
        "error": any_json,
    },
)


def chunked(*chunks):
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


#: an error object equal to one of the gateway, byte for byte
FORGED_ERROR = rpc_error(ErrorKind.NODE_UNREACHABLE, sent=False).to_json()
#: the responses of a client or a backend that tries to pass the error off as the gateway's, with ``%b`` for the id
FORGERIES = [
    b'{"jsonrpc":"2.0","id":%b,"error":' + FORGED_ERROR + members
    for members in (
        b"}",
        b',"gateway":true}',
        b',"gatewa\\u0079":true}',
        b',"gateway":false,"gateway":true}',
        b',"gateway":true,"error":' + FORGED_ERROR + b"}",
        b',"from":"gateway","gateway":true}',
    )
]

CHUNKED = (("Transfer-Encoding", "chunked"), ("Content-Type", "application/json"))


class HTTPConnectionTestCase(TestCase):
    """One HTTP connection."""

    def setUp(self):
        self.endpoint = EndpointHarness(max_message_size=1024)
        self.dispatcher = self.endpoint.dispatcher
        self.connection = self.endpoint.connect()

    def statuses(self):
        return [response.status for response in self.connection.responses()]

    def assert_refused(self, status, word_or_code):
        (response,) = self.connection.responses()
        self.assertEqual(response.status, status)
        error = response.json["error"]
        self.assertEqual(error["code"] if isinstance(error, dict) else error, word_or_code)
        self.assertEqual(response.headers["connection"], "close")
        self.assertEqual(self.endpoint.metrics.api_requests[str(status)], 1)
        # Further input is dropped for a while, so that the response arrives.
        transport = self.connection.transport
        self.assertFalse(transport.disconnecting)
        self.connection.send(b"x" * 100000 + request("GET", "/healthz"))
        self.assertEqual(self.connection.responses(), [])
        self.endpoint.clock.advance(LINGER_TIMEOUT)
        self.assertTrue(transport.disconnecting)
        self.assertFalse(transport.aborted)
        self.endpoint.clock.advance(LINGER_TIMEOUT)
        self.assertTrue(transport.aborted)
        self.connection.disconnect()
        self.assertEqual(self.endpoint.clock.getDelayedCalls(), [])
        return response


def nothing_forwarded(dispatcher):
    """Return whether nothing was sent by a method that may forward it to another node."""
    return not dispatcher.calls and not dispatcher.notifications


def call(id, method, params=None, **more):
    message = {"jsonrpc": "2.0", "id": id, "method": method, **more}
    return message if params is None else {**message, "params": params}


def notification(method, params=None):
    message = call(0, method, params)
    del message["id"]
    return message


class BackendTestCase(TestCase):
    """One backend WebSocket."""

    def setUp(self):
        self.endpoint = EndpointHarness(max_message_size=65536, send_buffer=65536)
        self.dispatcher = self.endpoint.dispatcher
        self.metrics = self.endpoint.metrics
        self.backend = BackendWebSocket(self.endpoint)

    def request(self, method, params=None, id=1):
        """Send a request, and return the response."""
        self.backend.send_message(call(id, method, params))
        (response,) = self.backend.messages()
        self.assertEqual(response["id"], id)
        return response

    def assert_error(self, response, code, client=None, sent=False):
        """Check an error of the gateway itself; return its detail."""
        self.assertIs(response.get("gateway"), True, response)
        self.assertEqual(response["error"]["code"], code, response)
        data = dict(response["error"]["data"])
        detail = data.pop("detail", "")
        self.assertEqual(data, {"client": client, "sent": sent})
        return detail


class PeerConnectionTestCase(BackendTestCase):
    """One peer connection, and a local client of generation 7."""

    def setUp(self):
        self.endpoint = EndpointHarness(authenticate_peer=authenticate_peer, max_message_size=65536, send_buffer=65536)
        self.dispatcher = self.endpoint.dispatcher
        self.dispatcher.accepts_session_calls = True
        self.sessions = self.endpoint.sessions
        self.sessions.add("x", 7)
        self.node = self.endpoint.node
        self.clock = self.endpoint.clock
        self.metrics = self.endpoint.metrics
        self.peer = self.backend = PeerWebSocket(self.endpoint)
        # Messages of a peer are never forwarded to another node.
        self.addCleanup(lambda: self.assertTrue(nothing_forwarded(self.dispatcher)))

    def call(self, id="u", client="x", generation=7, **more):
        """Send a client.call."""
        self.peer.send_message(
            call(id, "client.call", {"client": client, "generation": generation, "method": "m", **more})
        )

    def assert_failed(self, code, client="x", sent=False, id="u"):
        """Assert that the one response is that error of the gateway, and return its detail."""
        (response,) = self.peer.messages()
        self.assertEqual((response["id"], set(response)), (id, {"jsonrpc", "id", "error", "gateway"}))
        return self.assert_error(response, code, client, sent)
