"""Tests of gateway.cluster.features."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.features import ALL_FEATURES, MAX_HEADER_LENGTH, Feature, decode_features, encode_features


class FeaturesTests(SynchronousTestCase):
    def test_no_header_means_no_features(self) -> None:
        self.assertEqual(decode_features(""), frozenset())

    def test_unknown_names_are_ignored(self) -> None:
        self.assertEqual(decode_features("later, fence ,FLOOR,,"), {Feature.FENCE})

    def test_too_long_header_counts_as_empty(self) -> None:
        value = encode_features()
        padded = value + " " * (MAX_HEADER_LENGTH - len(value))
        self.assertEqual(decode_features(padded), ALL_FEATURES)
        self.assertEqual(decode_features(padded + " "), frozenset())

    @given(st.frozensets(st.sampled_from(Feature)))
    def test_round_trip(self, features: frozenset[Feature]) -> None:
        self.assertEqual(decode_features(encode_features(features)), features)

    @given(st.text())
    def test_any_header(self, value: str) -> None:
        self.assertLessEqual(decode_features(value), ALL_FEATURES)
