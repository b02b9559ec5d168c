"""Tests for :mod:`gateway.registry.generations`."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.generations import TOLERANCE, GenerationFloor


class GenerationFloorTests(SynchronousTestCase):
    def test_it_only_grows(self) -> None:
        floor = GenerationFloor()
        self.assertEqual(floor.value, 0)
        floor.raise_to(7)
        floor.raise_to(5)
        self.assertEqual(floor.value, 7)

    def test_ahead_of_the_clock(self) -> None:
        floor = GenerationFloor()
        floor.raise_to(10 * TOLERANCE)
        self.assertFalse(floor.is_ahead_of(9 * TOLERANCE))
        self.assertTrue(floor.is_ahead_of(9 * TOLERANCE - 1))
        # Until the clock has caught up.
        self.assertTrue(floor.is_ahead_of(10 * TOLERANCE - 1))
        self.assertFalse(floor.is_ahead_of(10 * TOLERANCE))
        self.assertFalse(floor.is_ahead_of(10 * TOLERANCE - 1))
        self.assertTrue(floor.is_ahead_of(10 * TOLERANCE - 1, tolerance=0))
