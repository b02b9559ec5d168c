"""Tests of gateway.clients.interface: Session."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.clients.interface import IConnection, Session
from tests.fakes.clients import FakeNode


class SessionTest(SynchronousTestCase):
    def test_interface(self) -> None:
        verifyObject(IConnection, FakeNode().connect().protocol)

    def test_compared_by_identity(self) -> None:
        """Two sessions of one client may be equal in every attribute while one takes over from the other."""
        one, other = Session("a", "192.0.2.1:4711"), Session("a", "192.0.2.1:4711")
        self.assertNotEqual(one, other)
        self.assertEqual(len({one, other}), 2)

    def test_before_the_claim(self) -> None:
        """There is nothing to release, to close or to wait for."""
        client = Session("a", "192.0.2.1:4711")
        self.assertFalse(client.claimed)
        self.assertIsNone(client.connection)
        self.assertIsNone(client.pending_claim)
        self.assertFalse(client.paused)

    def test_slots(self) -> None:
        """There is one for each client: it has no dictionary."""
        self.assertFalse(hasattr(Session("a", "192.0.2.1:4711"), "__dict__"))
