"""Tests of gateway.edge.autobahn, against the Autobahn that is installed."""

from __future__ import annotations

import txaio.interfaces
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.edge.autobahn import QuietServerProtocol, SilentLog
from gateway.edge.wire import GuardedConnection
from tests.edge.fakes import FakeNode

NAMES = frozenset(WebSocketServerProtocol.CONFIG_ATTRS)


class SettingsTest(SynchronousTestCase):
    def test_all_are_on_the_class(self) -> None:
        """Those that Autobahn has on its own classes count for nothing: it may cease to."""
        ours = {
            name for each in GuardedConnection.__mro__ if each.__module__.startswith("gateway.") for name in vars(each)
        }
        self.assertEqual(NAMES - ours, set())

    def test_none_is_unknown_to_autobahn(self) -> None:
        """A setting that Autobahn renamed or gave up would do nothing."""
        ours = {name for name in vars(QuietServerProtocol) if not name.startswith("_")}
        self.assertEqual(ours - NAMES, {"log", "CONFIG_ATTRS"})

    def test_they_are_of_the_kind_that_autobahn_has(self) -> None:
        factory = WebSocketServerFactory(reactor=Clock())
        for name in NAMES & vars(QuietServerProtocol).keys() - {"perMessageCompressionAccept"}:
            ours, theirs = getattr(QuietServerProtocol, name), getattr(factory, name)
            numbers = (bool, int, float)
            self.assertIsInstance(ours, numbers if isinstance(theirs, numbers) else type(theirs), name)

    def test_none_is_copied_to_a_connection(self) -> None:
        self.assertEqual(QuietServerProtocol.CONFIG_ATTRS, [])
        self.assertEqual(NAMES & vars(FakeNode().connect().protocol).keys(), set())

    def test_compression_is_never_accepted(self) -> None:
        self.assertIsNone(QuietServerProtocol().perMessageCompressionAccept([object()]))


class LogTest(SynchronousTestCase):
    def test_it_takes_all_that_autobahn_may_say(self) -> None:
        for level in {"failure", *txaio.interfaces.log_levels} - {"none"}:
            self.assertIsNone(getattr(SilentLog(), level)("{a} {b}", a=1, failure=None), level)

    def test_it_is_a_connections_log(self) -> None:
        self.assertIsInstance(FakeNode().connect().protocol.log, SilentLog)
