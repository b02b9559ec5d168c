"""Tests of gateway.auth.files."""

from __future__ import annotations

import hashlib
import os

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.files import numbered_lines, parse_sha256, read_bytes, warn_if_world_readable
from gateway.settings import ConfigError


class NumberedLinesTest(SynchronousTestCase):
    def lines(self, content: bytes) -> list[tuple[int, str]]:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return list(numbered_lines("auth", path, 100))

    def refused(self, path: str) -> str:
        error = self.assertRaises(ConfigError, list, numbered_lines("backend-tokens", path, 100))
        self.assertEqual(error.option, "backend-tokens")
        self.assertNotIn("\n", str(error))
        return str(error)

    def test_line_numbers_are_those_of_an_editor(self) -> None:
        """They begin with 1, and empty lines are counted."""
        self.assertEqual(self.lines(b"\na\n\n  \n# b\nc d\t\n"), [(2, "a"), (6, "c d")])

    def test_comments(self) -> None:
        self.assertEqual(self.lines(b"#a\n # b\nc # d # e\nf\t#g\nh#i # j\n##\n"), [(3, "c"), (4, "f"), (5, "h#i")])

    def test_windows(self) -> None:
        self.assertEqual(self.lines(b"\xef\xbb\xbfa\r\n\r\nb # c\r\n"), [(1, "a"), (3, "b")])
        self.assertEqual(self.lines(b"\xef\xbb\xbf# a\r\nb"), [(2, "b")])

    def test_only_a_line_feed_ends_a_line(self) -> None:
        """Other line boundaries of Python's splitlines() are not counted by editors."""
        self.assertEqual(self.lines("a\x0bb\x0cc\u2028d\x85e\nf".encode()), [(1, "a\x0bb\x0cc\u2028d\x85e"), (2, "f")])

    def test_nothing(self) -> None:
        self.assertEqual(self.lines(b""), [])
        self.assertEqual(self.lines(b"\xef\xbb\xbf"), [])

    def test_unreadable(self) -> None:
        missing = self.mktemp()
        self.assertIn(f"{missing} cannot be read: No such file", self.refused(missing))
        self.assertIn(f"{os.curdir} cannot be read: Is a directory", self.refused(os.curdir))

    def test_not_utf8(self) -> None:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write("é".encode("latin-1"))
        self.assertIn(f"{path} is not a text file in UTF-8", self.refused(path))

    def test_too_long(self) -> None:
        self.assertEqual(self.lines(b"#" * 99 + b"\n"), [])
        self.assertIn("/dev/zero has more than 100 bytes", self.refused("/dev/zero"))

    @settings(deadline=None, max_examples=50)
    @given(
        st.lists(st.sampled_from(["", " ", "a", "b c", "#", "d #", "e#f"]), max_size=6), st.sampled_from(["\n", "\r\n"])
    )
    def test_generated(self, lines: list[str], end: str) -> None:
        wanted = [(number, line.removesuffix(" #")) for number, line in enumerate(lines, 1) if line.strip(" #")]
        self.assertEqual(self.lines(end.join(lines).encode()), wanted)


class ContentsTest(SynchronousTestCase):
    def test_errors_name_the_option(self) -> None:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(b"\xff\r\n")
        self.assertEqual(read_bytes("auth", path, 3), b"\xff\r\n")
        error = self.assertRaises(ConfigError, read_bytes, "auth", path, 2)
        self.assertEqual(str(error), f"--auth: {path} has more than 2 bytes")


class ReadersTest(SynchronousTestCase):
    def log_lines(self, path: str) -> list[str]:
        with capturedLogs() as logs:
            warn_if_world_readable("auth", path)
        return [event["log_format"].format(**event) for event in logs]

    def test_modes(self) -> None:
        with open("secrets", "w"):
            pass
        for mode, warned in ((0o600, False), (0o640, False), (0o644, True), (0o604, True)):
            os.chmod("secrets", mode)
            expected = ["--auth: secrets can be read by all users of this machine; chmod o-r it"] if warned else []
            self.assertEqual(self.log_lines("secrets"), expected, oct(mode))

    def test_not_a_regular_file(self) -> None:
        self.assertEqual([*self.log_lines("/dev/zero"), *self.log_lines(self.mktemp())], [])


class ParseDigestTest(SynchronousTestCase):
    def test_either_case(self) -> None:
        digest = hashlib.sha256(b"x")
        self.assertEqual(parse_sha256(digest.hexdigest()), digest.digest())
        self.assertEqual(parse_sha256(digest.hexdigest().upper()), digest.digest())

    def test_none(self) -> None:
        # Python's bytes.fromhex() accepts the last two: other digits, and blanks between digits.
        for bad in ("", "0" * 63, "0" * 65, "g" * 64, " " + "0" * 63, "0" * 64 + "\n", "0_" * 32, "\u0663" * 64):
            self.assertIsNone(parse_sha256(bad), bad)
