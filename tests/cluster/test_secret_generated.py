"""Tests of gateway.cluster.auth with generated input."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.cluster.auth import MAX_BYTES, MIN_BYTES, Secret
from gateway.settings import Settings
from tests.cluster.test_secret import SecretCase


class AnythingTests(SecretCase):
    """Whatever is in the file, it is the secret, or the reason why it is none is told without it."""

    @settings(deadline=None, max_examples=60)
    @given(st.binary(max_size=40) | st.text(min_size=MIN_BYTES, max_size=40).map(str.encode))
    @example(b" " * MAX_BYTES)
    @example(b"x" * MAX_BYTES + b"\n")
    def test_anything(self, content: bytes) -> None:
        self.write(content)
        stripped = content.strip()
        if len(stripped) >= MIN_BYTES and len(content) <= MAX_BYTES:
            self.assertEqual(self.given()(), stripped)
            return
        problem = self.problem(self.given)
        # A shorter one may be a word of the message.
        if len(stripped) > 8:
            self.assertNotIn(stripped.decode("latin-1"), problem)

    def given(self) -> Secret:
        return Secret.of(Settings(capacity=9, cluster_secret_file=self.path))
