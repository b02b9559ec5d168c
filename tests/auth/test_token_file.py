"""Tests of gateway.auth.token_file."""

from __future__ import annotations

import hashlib
import os

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth import token_file as tokens_module
from gateway.auth.errors import VerificationError
from gateway.auth.token_file import TokenFile
from gateway.settings import ConfigError


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def subject(tokens: TokenFile, token: str) -> str | None:
    """Return the client_id of a token, or ``None`` if it is not known."""
    try:
        return tokens.verify(token).client_id
    except VerificationError:
        return None


class TokenFileTest(SynchronousTestCase):
    def write(self, text: str | bytes, path: str | None = None) -> str:
        path = path or self.mktemp()
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return path

    def test_lines(self) -> None:
        tokens = TokenFile(
            self.write(
                "\ufeff# clients\r\n"
                f"a {digest('one')}\n"
                f"  b/2,{digest('two')}  # with a comma\r\n"
                f"c\t,  {digest('three').upper()}\n"
                "\n   \n"
                f"a {digest('four')}"
            )
        )
        found = {token: subject(tokens, token) for token in ("one", "two", "three", "four", "five", "", "\xe9")}
        self.assertEqual(
            found, {"one": "a", "two": "b/2", "three": "c", "four": "a", "five": None, "": None, "\xe9": None}
        )
        self.assertEqual(len(tokens), 4)

    def test_an_unknown_token(self) -> None:
        path = self.write(f"a {digest('one')}")
        error = self.assertRaises(VerificationError, TokenFile(path).verify, "two")
        self.assertEqual((error.reason, error.source), ("unknown_token", f"--auth tokens:{path}"))
        self.assertNotIn("two", str(error))

    def test_a_digest_is_not_accepted_as_a_token(self) -> None:
        self.assertIsNone(subject(TokenFile(self.write(f"a {digest('one')}")), digest("one")))

    def test_empty_file(self) -> None:
        """Allowed at start, with a warning."""
        with capturedLogs() as logs:
            tokens = TokenFile(self.write("# nobody yet\n", "tokens"))
            tokens.reload()
        self.assertIsNone(subject(tokens, "x"))
        lines = [event["log_format"].format(**event) for event in logs]
        self.assertEqual(lines, ["--auth: tokens:tokens has no token: it accepts no client before a SIGHUP"])

    def test_same_line_twice(self) -> None:
        self.assertEqual(subject(TokenFile(self.write(f"a {digest('one')}\na {digest('one')}\n")), "one"), "a")

    def assert_problem(self, text: str | bytes, problem: str) -> None:
        path = self.write(text)
        error = self.assertRaises(ConfigError, TokenFile, path)
        self.assertEqual(error.option, "auth")
        self.assertIn(path, str(error))
        self.assertIn(problem, str(error))
        self.assertNotIn("\n", str(error))

    def test_problems(self) -> None:
        good = f"a {digest('one')}\n"
        self.assert_problem(good + "b\n", "line 2: write a client_id and the SHA-256")
        self.assert_problem(good + f"b {digest('x')} c\n", "line 2: write a client_id")
        self.assert_problem("\n\n.. " + digest("x"), "line 3: '..' is no client_id")
        self.assert_problem("b\xe9 " + digest("x"), "line 1: 'b\\xe9' is no client_id")
        self.assert_problem(f"b {digest('x')[1:]}", "line 1: the SHA-256 of the token is not 64 hexadecimal digits")
        self.assert_problem("b plaintext", "64 hexadecimal digits")
        self.assert_problem(good + f"b {digest('one')}", "line 2: b has the same token as a")
        self.assert_problem(b"a \xff", "UTF-8")

    def test_former_client_ids(self) -> None:
        """The lines are named, and the others work."""
        path = self.write(f"a//b {digest('one')}\na/b {digest('two')}\n\n/x {digest('three')}\n")
        with capturedLogs() as logs:
            tokens = TokenFile(path)
        self.assertEqual([subject(tokens, token) for token in ("one", "two", "three")], [None, "a/b", None])
        (line,) = [event["log_format"].format(**event) for event in logs]
        self.assertTrue(line.startswith(f"--auth: tokens:{path}: 2 lines are without effect: line 1 (a//b), 4 (/x): "))
        with capturedLogs() as logs:
            tokens.reload()
        self.assertEqual(len(logs), 1)
        self.assert_problem("a//b nothex", "line 1: the SHA-256 of the token is not 64 hexadecimal digits")

    def test_many_former_client_ids(self) -> None:
        with capturedLogs() as logs:
            TokenFile(self.write(f"a {digest('one')}\n" + "".join(f"a// {digest(str(i))}\n" for i in range(12))))
        (line,) = [event["log_format"].format(**event) for event in logs]
        self.assertIn("12 lines are without effect: line 2 (a//), ", line)
        self.assertIn(", 11 (a//) and 2 more: ", line)

    def test_unreadable(self) -> None:
        for path in (self.mktemp(), os.curdir):
            error = self.assertRaises(ConfigError, TokenFile, path)
            self.assertIn(f"{path} cannot be read: ", str(error))

    def test_reload(self) -> None:
        path = self.write(f"a {digest('one')}")
        tokens = TokenFile(path)
        self.write(f"b {digest('two')}", path)
        tokens.reload()
        self.assertEqual((subject(tokens, "one"), subject(tokens, "two")), (None, "b"))

    def test_reload_of_a_bad_file(self) -> None:
        path = self.write(f"a {digest('one')}")
        tokens = TokenFile(path)
        self.write(f"b {digest('two')}\nbroken", path)
        self.assertRaises(ConfigError, tokens.reload)
        self.assertEqual((subject(tokens, "one"), subject(tokens, "two")), ("a", None))

    def test_reload_of_an_empty_file(self) -> None:
        """The file may be in the middle of being rewritten."""
        path = self.write(f"a {digest('one')}")
        tokens = TokenFile(path)
        for nothing in ("", "# a comment\n"):
            self.write(nothing, path)
            error = self.assertRaises(ConfigError, tokens.reload)
            self.assertIn(f"tokens:{path} has no token; to revoke all, leave a line", str(error))
            self.assertEqual(subject(tokens, "one"), "a")

    def test_a_file_without_an_end(self) -> None:
        self.patch(tokens_module, "MAX_FILE_SIZE", 1000)
        error = self.assertRaises(ConfigError, TokenFile, "/dev/zero")
        self.assertIn("/dev/zero has more than 1000 bytes", str(error))

    @settings(deadline=None, max_examples=100)
    @given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
    def test_generated(self, content: bytes) -> None:
        """Any file is read, or is an error of one line."""
        try:
            TokenFile(self.write(content))
        except ConfigError as e:
            self.assertEqual(len(str(e).splitlines()), 1)
