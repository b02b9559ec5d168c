"""Tests of gateway.websocket.slim_protocol, against the Autobahn that is installed."""

from __future__ import annotations

import txaio.interfaces
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import alsoProvides

from gateway.websocket.connection import ServerConnection
from gateway.websocket.slim_protocol import (
    _HANDSHAKE_ATTRIBUTES,
    LazyAttribute,
    NullDeferred,
    NullLogger,
    SlimServerProtocol,
    initial_attributes,
)
from tests.builders.frames import build_frame, build_request, text_frame
from tests.fakes.clients import FakeNode

NAMES = frozenset(WebSocketServerProtocol.CONFIG_ATTRS)


class SettingsTest(SynchronousTestCase):
    def test_all_are_on_the_class(self) -> None:
        """Settings on Autobahn's own classes do not count: another version may not have them there."""
        ours = {
            name for each in ServerConnection.__mro__ if each.__module__.startswith("gateway.") for name in vars(each)
        }
        self.assertEqual(NAMES - ours, set())

    def test_all_are_known_to_autobahn(self) -> None:
        """A setting that Autobahn has renamed or dropped would have no effect."""
        public = {name for name in vars(SlimServerProtocol) if not name.startswith("_")}
        known = NAMES | initial_attributes().keys() | set(dir(WebSocketServerProtocol))
        # Not settings: Autobahn sets these in its constructor and during the opening handshake.
        known |= {"is_open", "is_closed", "inside_message", "current_frame", *_HANDSHAKE_ATTRIBUTES}
        self.assertEqual(public - known, {"drop_handshake_attributes"})

    def test_types_are_those_of_autobahn(self) -> None:
        factory = WebSocketServerFactory(reactor=Clock())
        for name in NAMES & vars(SlimServerProtocol).keys() - {"perMessageCompressionAccept"}:
            ours, theirs = getattr(SlimServerProtocol, name), getattr(factory, name)
            numbers = (bool, int, float)
            self.assertIsInstance(ours, numbers if isinstance(theirs, numbers) else type(theirs), name)

    def test_none_is_copied_to_a_connection(self) -> None:
        self.assertEqual(SlimServerProtocol.CONFIG_ATTRS, [])
        self.assertEqual(NAMES & vars(FakeNode().connect().protocol).keys(), set())

    def test_compression_is_never_accepted(self) -> None:
        self.assertIsNone(SlimServerProtocol().perMessageCompressionAccept([object()]))


class LogTest(SynchronousTestCase):
    def test_it_has_every_log_level(self) -> None:
        for level in {"failure", *txaio.interfaces.log_levels} - {"none"}:
            self.assertIsNone(getattr(NullLogger(), level)("{a} {b}", a=1, failure=None), level)

    def test_connections_use_it(self) -> None:
        self.assertIsInstance(FakeNode().connect().protocol.log, NullLogger)


class InitialAttributesTest(SynchronousTestCase):
    def test_all_are_on_the_class(self) -> None:
        state = initial_attributes()
        # A sample of what a connection of Autobahn's has from the start.
        self.assertLessEqual({"state", "data", "wasClean", "send_queue", "utf8validator", "closedByMe"}, state.keys())
        for name, value in state.items():
            on_class = vars(SlimServerProtocol)[name]
            if isinstance(on_class, LazyAttribute):
                self.assertIsInstance(getattr(SlimServerProtocol(), name), type(value), name)
            elif name != "trafficStats":
                self.assertEqual(on_class, value, name)

    def test_mutable_ones_are_created_on_access(self) -> None:
        """On the class, all connections would share them."""
        for name, value in initial_attributes().items():
            if name != "trafficStats" and not (value is None or isinstance(value, (int, str, bytes))):
                self.assertIsInstance(vars(SlimServerProtocol)[name], LazyAttribute, name)

    def test_a_new_connection_has_none(self) -> None:
        protocol = SlimServerProtocol()
        protocol.factory = FakeNode().factory
        protocol._connectionMade()
        self.assertEqual(vars(protocol).keys() & initial_attributes().keys(), {"openHandshakeTimeoutCall"})
        protocol.openHandshakeTimeoutCall.cancel()

    def test_connections_are_counted_and_timed(self) -> None:
        factory = FakeNode().factory
        for limit, timed in [(5, True), (0, False)]:
            protocol = SlimServerProtocol()
            protocol.factory = factory
            protocol.openHandshakeTimeout = limit
            before = factory.countConnections
            protocol._connectionMade()
            self.assertEqual(factory.countConnections, before + 1)
            self.assertEqual(protocol.openHandshakeTimeoutCall is not None, timed)
            if timed:
                protocol.openHandshakeTimeoutCall.cancel()

    def test_lazy_attributes_are_created_once_for_each_connection(self) -> None:
        first, second = SlimServerProtocol(), SlimServerProtocol()
        self.assertNotIn("utf8validator", vars(first))
        self.assertIs(first.utf8validator, first.utf8validator)
        self.assertIsNot(first.utf8validator, second.utf8validator)
        self.assertIsInstance(SlimServerProtocol.utf8validator, LazyAttribute)

    def test_deferreds_can_be_resolved(self) -> None:
        txaio.resolve(SlimServerProtocol().is_open, None)
        self.assertIsInstance(SlimServerProtocol().is_closed, NullDeferred)


class DropHandshakeAttributesTest(SynchronousTestCase):
    def protocol(self) -> SlimServerProtocol:
        protocol = SlimServerProtocol()
        protocol.__dict__.update(_wskey="key", websocket_extensions=[], wasClean=False, data=b"", state=3, address="a")
        return protocol

    def test_drops_handshake_attributes_and_defaults(self) -> None:
        protocol = self.protocol()
        protocol.drop_handshake_attributes()
        self.assertEqual(vars(protocol), {"state": 3, "address": "a"})
        self.assertEqual((protocol.data, protocol.wasClean, protocol.websocket_version), (b"", False, 13))

    def test_called_when_a_connection_with_tls_opens(self) -> None:
        for tls in (False, True):
            node = FakeNode()
            client = node.dial()
            if tls:
                alsoProvides(client.transport, ISSLTransport)
            client.send(build_request("/v1/connect?client_id=a") + text_frame(b'{"jsonrpc":"2.0","method":"early"}'))
            client.expect_open()
            self.assertEqual("_wskey" in vars(client.protocol), not tls)
            self.assertEqual(len(node.handler.messages), 1)
            client.send(text_frame(b'{"jsonrpc":"2.0","method":"late"}'))
            self.assertEqual(len(node.handler.messages), 2)
            client.send(build_frame(9, b"ping"))
            self.assertEqual(client.frames(), [(10, b"ping")])
