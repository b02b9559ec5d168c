"""Tests for :mod:`gateway.util.bounded`."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from gateway.util.bounded import BoundedSet


class BoundedSetTests(SynchronousTestCase):
    def test_members(self) -> None:
        members = BoundedSet(2)
        members.add("x")
        members.add("x")
        self.assertIn("x", members)
        members.discard("x")
        members.discard("x")
        self.assertFalse(members)

    def test_the_oldest_is_forgotten(self) -> None:
        members = BoundedSet(2)
        for member in "xyz":
            members.add(member)
        self.assertEqual(list(members), ["y", "z"])

    def test_no_room(self) -> None:
        members = BoundedSet(0)
        members.add("x")
        self.assertFalse(members)
