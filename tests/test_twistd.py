"""Tests of gateway.twistd."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

from twisted.scripts.twistd import ServerOptions
from twisted.trial.unittest import SynchronousTestCase

from gateway.settings import ConfigError
from gateway.twistd import Terminal, check_files, is_daemon, log_path


def parse(*arguments: str) -> ServerOptions:
    """Parse options of twistd, which stand before ``wsgateway``."""
    options = ServerOptions()
    options.parseOptions(list(arguments))
    return options


class OptionsTests(SynchronousTestCase):
    def test_daemon(self) -> None:
        self.assertTrue(is_daemon(parse()))
        self.assertTrue(is_daemon(parse("--logfile=x")))
        self.assertFalse(is_daemon(parse("--nodaemon")))
        # Other runners, such as twist, do not daemonize.
        self.assertFalse(is_daemon(None))
        self.assertFalse(is_daemon({}))

    def test_log_path(self) -> None:
        for arguments, path in (
            ((), os.path.abspath("twistd.log")),
            (("--nodaemon",), ""),
            (("--logfile=x.log",), os.path.abspath("x.log")),
            (("--nodaemon", "--logfile=/x.log"), "/x.log"),
            (("--nodaemon", "--logfile=-"), ""),
            (("--syslog",), ""),
            (("--logger=tests.test_twistd.parse",), ""),
        ):
            self.assertEqual(log_path(parse(*arguments)), path, arguments)
        self.assertEqual(log_path(None), "")
        self.assertEqual(log_path({}), "")


class CheckFilesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.mkdir(self.folder)
        #: what os.access() answers: the tests may run as root
        self.writable = True
        self.patch(os, "access", lambda path, mode, **_: self.writable or os.path.exists(f"{path}.writable"))

    def problem(self, *arguments: str) -> str:
        error = self.assertRaises(ConfigError, check_files, parse(*arguments))
        self.assertEqual(len(str(error).splitlines()), 1)
        return str(error)

    def test_writable(self) -> None:
        for arguments in ((), ("--nodaemon",), ("--pidfile=x", "--logfile=y")):
            check_files(parse(*arguments))

    def test_other_runners(self) -> None:
        self.writable = False
        check_files(None)
        check_files({})

    def test_no_files(self) -> None:
        self.writable = False
        for arguments in (
            ("--nodaemon", "--pidfile="),
            ("--nodaemon", "--pidfile=", "--logfile=-"),
            ("--pidfile=", "--syslog"),
            ("--chroot=/x",),
        ):
            check_files(parse(*arguments))

    def test_pid_file(self) -> None:
        self.writable = False
        path = os.path.abspath("twistd.pid")
        self.assertEqual(
            self.problem("--nodaemon"),
            f"--pidfile: twistd cannot write {path}: this user may not write there; start it in another folder, or write "
            "--pidfile=FILE or, for no such file, --pidfile= before wsgateway",
        )

    def test_log(self) -> None:
        self.writable = False
        path = os.path.abspath("twistd.log")
        self.assertIn(f"--logfile: twistd cannot write {path}: this user may not", self.problem("--pidfile="))
        problem = self.problem("--nodaemon", "--pidfile=", f"--logfile={self.folder}/no/x.log")
        self.assertIn(f"{self.folder}/no/x.log: there is no such folder; start it", problem)

    def test_a_file_that_exists(self) -> None:
        """It counts, not its folder."""
        self.writable = False
        for name in ("x.pid", "x.pid.writable"):
            with open(os.path.join(self.folder, name), "w"):
                pass
        check_files(parse("--nodaemon", f"--pidfile={self.folder}/x.pid"))


class TerminalTests(SynchronousTestCase):
    def terminal(self, log: str = "") -> tuple[Terminal, Any]:
        """Return a terminal, and the file that its lines are read from."""
        reading, writing = os.pipe()
        lines = os.fdopen(reading, "rb")
        self.addCleanup(lines.close)
        with mock.patch("os.dup", return_value=writing):
            return Terminal(log), lines

    def test_report(self) -> None:
        terminal, lines = self.terminal("/var/log/x.log")
        terminal.report("--listen: \u2026")
        self.assertEqual(lines.read().decode(), "wsgateway: --listen: \u2026; the log is /var/log/x.log\n")
        # Nothing after that: it is closed.
        terminal.report("again")
        terminal.close()

    def test_close(self) -> None:
        terminal, lines = self.terminal()
        terminal.close()
        self.assertEqual(lines.read(), b"")

    def test_a_terminal_that_is_gone(self) -> None:
        terminal, lines = self.terminal()
        lines.close()
        terminal.report("x")

    def test_no_stderr(self) -> None:
        with mock.patch("os.dup", side_effect=OSError):
            terminal = Terminal()
        terminal.report("x")
        terminal.close()
