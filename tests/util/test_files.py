"""Tests of gateway.util.files."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from gateway.util.files import FileError, FileTooLargeError, read_bounded


class ReadBoundedTests(SynchronousTestCase):
    def test_up_to_the_limit(self) -> None:
        path = self.mktemp()
        Path(path).write_bytes(b"\xff\r\n")
        self.assertEqual(read_bounded(path, 3), b"\xff\r\n")
        error = self.assertRaises(FileTooLargeError, read_bounded, path, 2)
        self.assertEqual(str(error), f"{path} has more than 2 bytes")

    def test_a_file_without_an_end(self) -> None:
        self.assertRaises(FileTooLargeError, read_bounded, "/dev/zero", 100)

    def test_unreadable(self) -> None:
        missing = self.mktemp()
        for path, text in (
            (missing, f"{missing} cannot be read: No such file or directory"),
            (os.curdir, ". cannot be read: Is a directory"),
            ("a\0\n", "'a\\x00\\n' cannot be read: embedded null byte"),
        ):
            self.assertEqual(str(self.assertRaises(FileError, read_bounded, path, 9)), text)
