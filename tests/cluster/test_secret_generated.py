"""Tests of gateway.cluster.auth with generated input."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.cluster.auth import MAX_SECRET_SIZE, MIN_SECRET_SIZE, ClusterSecret
from gateway.settings import Settings
from tests.cluster.test_secret import ClusterSecretCase


class GeneratedInputTests(ClusterSecretCase):
    """Whatever is in the file, it is the secret, or the reason why it is none is told without it."""

    @settings(deadline=None, max_examples=60)
    @given(st.binary(max_size=40) | st.text(min_size=MIN_SECRET_SIZE, max_size=40).map(str.encode))
    @example(b" " * MAX_SECRET_SIZE)
    @example(b"x" * MAX_SECRET_SIZE + b"\n")
    def test_anything(self, content: bytes) -> None:
        self.write(content)
        stripped = content.strip()
        if len(stripped) >= MIN_SECRET_SIZE and len(content) <= MAX_SECRET_SIZE:
            self.assertEqual(self.load()(), stripped)
            return
        problem = self.problem(self.load)
        # A shorter one may be a word of the message.
        if len(stripped) > 8:
            self.assertNotIn(stripped.decode("latin-1"), problem)

    def load(self) -> ClusterSecret:
        return ClusterSecret.from_settings(Settings(capacity=9, cluster_secret_file=self.path))
