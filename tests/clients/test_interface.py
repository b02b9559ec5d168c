"""Tests of gateway.clients.interface: one connection, as the table sees it."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.clients.interface import IConnection, Session
from tests.fakes.clients import FakeNode


class SessionTest(SynchronousTestCase):
    def test_interface(self) -> None:
        verifyObject(IConnection, FakeNode().connect().protocol)

    def test_connections_of_one_client_are_told_apart(self) -> None:
        """Two of them may be alike in every field while the one takes over from the other."""
        one, other = Session("a", "192.0.2.1:4711"), Session("a", "192.0.2.1:4711")
        self.assertNotEqual(one, other)
        self.assertEqual(len({one, other}), 2)

    def test_before_its_claim(self) -> None:
        """There is nothing to release, to close or to wait for."""
        client = Session("a", "192.0.2.1:4711")
        self.assertFalse(client.claimed)
        self.assertIsNone(client.connection)
        self.assertIsNone(client.pending_claim)
        self.assertFalse(client.paused)

    def test_no_further_memory(self) -> None:
        """There is one for each client: it has no dictionary."""
        self.assertFalse(hasattr(Session("a", "192.0.2.1:4711"), "__dict__"))
