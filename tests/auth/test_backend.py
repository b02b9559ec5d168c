"""Tests of gateway.auth.backend."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.backend import BackendTokens
from gateway.settings import ConfigError


class BackendTokensTest(SynchronousTestCase):
    def write(self, text: str | bytes, path: str | None = None) -> str:
        path = path or self.mktemp()
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return path

    def test_lines(self) -> None:
        hashed = hashlib.sha256(b"hashed").hexdigest()
        tokens = BackendTokens(self.write(f"# billing\nplain # its token\r\n\n  with#hash\nsha256:{hashed}\n"))
        for token in ("plain", "with#hash", "hashed"):
            self.assertTrue(tokens.accepts(token), token)
        for token in ("", "plain ", "Plain", "with", f"sha256:{hashed}", hashed, "# billing", "\xe9", "\ud800"):
            self.assertFalse(tokens.accepts(token), token)

    def test_problems(self) -> None:
        for text, problem in (
            ("", "has no token"),
            ("# nothing\n\n", "has no token"),
            ("ok\ntwo words\n", "line 2: a token is one word"),
            ("two\twords", "line 1: a token is one word"),
            ("\xe9", "line 1: a token is one word of ASCII"),
            ("\nsha256:abc", "line 2: after sha256: there are not 64 hexadecimal digits"),
            ("sha256:", "64 hexadecimal"),
            (b"\xff\xfe", "UTF-8"),
        ):
            path = self.write(text)
            error = self.assertRaises(ConfigError, BackendTokens, path)
            self.assertEqual(error.option, "backend-token-file")
            self.assertIn(path, str(error))
            self.assertIn(problem, str(error))

    def test_a_problem_shows_no_token(self) -> None:
        error = self.assertRaises(ConfigError, BackendTokens, self.write("s3cret token"))
        self.assertNotIn("s3cret", str(error))

    def test_unreadable(self) -> None:
        error = self.assertRaises(ConfigError, BackendTokens, self.mktemp())
        self.assertIn("cannot be read: No such file", str(error))

    def test_reload(self) -> None:
        path = self.write("one")
        tokens = BackendTokens(path)
        self.write("", path)
        self.assertRaises(ConfigError, tokens.reload)
        self.assertTrue(tokens.accepts("one"))
        self.write("two", path)
        tokens.reload()
        self.assertEqual((tokens.accepts("one"), tokens.accepts("two")), (False, True))

    @settings(deadline=None, max_examples=100)
    @given(st.binary(max_size=80), st.text(max_size=20))
    def test_generated(self, content: bytes, token: str) -> None:
        try:
            BackendTokens(self.write(content)).accepts(token)
        except ConfigError as e:
            self.assertEqual(len(str(e).splitlines()), 1)
