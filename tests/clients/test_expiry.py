"""Tests of gateway.clients.expiry."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.expiry import has_expired


class HasExpiredTests(SynchronousTestCase):
    def test_at_its_time_and_later(self) -> None:
        self.assertEqual([has_expired(100.0, now) for now in (99.9, 100.0, 200.0)], [False, True, True])

    def test_0_never_expires(self) -> None:
        self.assertFalse(has_expired(0, 1e12))
