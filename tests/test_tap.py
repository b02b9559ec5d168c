"""Tests of gateway.tap: command line, configuration file, service."""

import io
import platform
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import attrs
import autobahn
from hypothesis import given
from hypothesis import strategies as st
from twisted.application.service import IService
from twisted.copyright import version as twisted_version
from twisted.internet import reactor
from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase

from gateway import __version__
from gateway.node import Node
from gateway.settings import ConfigError, Settings, make_settings
from gateway.tap import FIELDS, Options, makeService, read_config

ROOT = Path(__file__).parents[1]


def parse(*arguments: str) -> Settings:
    options = Options()
    options.parseOptions(list(arguments))
    return options.settings()


class CommandLineTests(TestCase):
    def test_defaults(self) -> None:
        self.assertEqual(parse(), make_settings({}))

    def test_settings_and_options_correspond(self) -> None:
        with redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit):
            Options().parseOptions(["--help"])
        for name in FIELDS:
            self.assertIn(f"--{name}=", out.getvalue())
        self.assertEqual({field.name.replace("_", "-") for field in attrs.fields(Settings)}, set(FIELDS))

    def test_repeatable_options_replace_the_default(self) -> None:
        settings = parse("--listen", "tcp:1", "--listen", "tcp:2", "--auth", "none", "--origin", "https://a.example")
        self.assertEqual(settings.listen, ("tcp:1", "tcp:2"))
        self.assertEqual((settings.auth, settings.origin), (("none",), ("https://a.example",)))

    def test_invalid_arguments_exit_with_one_line(self) -> None:
        for arguments, name in [
            (["--lisen", "tcp:1"], "--lisen"),
            (["stray"], "stray"),
            (["--lease", "x"], "--lease"),
            (["--lease"], "--lease"),
            (["--config", "/no/such/file"], "--config"),
        ]:
            with self.assertRaises(SystemExit) as caught:
                parse(*arguments)
            self.assertTrue(str(caught.exception).startswith("wsgateway: "))
            self.assertIn(name, str(caught.exception))
            self.assertEqual(len(str(caught.exception).splitlines()), 1)

    def test_version(self) -> None:
        with redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit) as caught:
            Options().parseOptions(["--version"])
        self.assertEqual(caught.exception.code, 0)
        self.assertEqual(
            out.getvalue().splitlines(),
            [
                f"wsgateway {__version__}",
                f"Twisted {twisted_version}",
                f"Autobahn {autobahn.__version__}",
                f"Python {platform.python_version()}",
            ],
        )


class ConfigurationFileTests(TestCase):
    def config(self, text: str) -> str:
        path = self.mktemp()
        Path(path).write_text(text)
        return path

    def test_tap_cfg_has_every_option_at_its_default(self) -> None:
        path = str(ROOT / "tap.cfg")
        settings = read_config(path)
        self.assertEqual(parse("--config", path), make_settings({}))
        keys = {line.split("=")[0].strip() for line in (ROOT / "tap.cfg").read_text().splitlines() if " =" in line}
        self.assertEqual(keys, set(FIELDS))
        self.assertEqual(settings["listen"], ("tcp:8080:interface=127.0.0.1:backlog=4096",))

    def test_command_line_takes_precedence(self) -> None:
        path = self.config("[wsgateway]\nlease = 20\nlisten =\n  tcp:1\n  tcp:2\nnode-name = a = b\n")
        settings = parse("--config", path, "--lease", "25", "--listen", "tcp:3")
        self.assertEqual((settings.lease, settings.listen, settings.node_name), (25, ("tcp:3",), "a = b"))
        self.assertEqual(parse("--config", path).listen, ("tcp:1", "tcp:2"))

    def test_invalid_files(self) -> None:
        for text, problem in [
            ("[wsgateway]\nlisten-on = x\n", "unknown key 'listen-on'"),
            ("[wsgateway]\nleese = 1\n", "did you mean lease\\?"),
            ("[other]\nlease = 1\n", r"\[other\]"),
            ("[DEFAULT]\nlease = 1\n[wsgateway]\n", "lease"),
            ("lease = 1\n", "not a configuration file"),
            ("[wsgateway]\nlease = 1\nlease = 2\n", "not a configuration file"),
            ("", r"no \[wsgateway\]"),
        ]:
            with self.assertRaisesRegex(ConfigError, f"--config: .*{problem}"):
                read_config(self.config(text))
        with self.assertRaisesRegex(ConfigError, "--config: .*cannot be read"):
            read_config(self.mktemp())
        path = self.mktemp()
        Path(path).write_bytes(b"[wsgateway]\nnode-name = \xff\n")
        with self.assertRaisesRegex(ConfigError, "not a configuration file"):
            read_config(path)

    @given(st.text(max_size=60))
    def test_any_text_is_parsed_or_refused(self, text: str) -> None:
        with mock.patch("gateway.tap.open", mock.Mock(return_value=io.StringIO(text)), create=True):
            try:
                read_config("tap.cfg")
            except ConfigError as e:
                self.assertEqual(len(str(e).splitlines()), 1)


class MakeServiceTests(TestCase):
    def setUp(self) -> None:
        # makeService() replaces it; restore it for the running reactor.
        self.patch(reactor, "seconds", reactor.seconds)

    def test_reactor_uses_the_monotonic_clock(self) -> None:
        options = Options()
        options.parseOptions(["--registry", f"sqlite:{self.mktemp()}"])
        makeService(options)
        self.assertIs(reactor.seconds, time.monotonic)

    def test_makes_a_node(self) -> None:
        options = Options()
        options.parseOptions(["--auth", "none", "--registry", f"sqlite:{self.mktemp()}"])
        service = makeService(options)
        self.assertTrue(IService.providedBy(service))
        self.assertIsInstance(service, Node)

    def test_unreadable_file_exits_with_one_line(self) -> None:
        options = Options()
        options.parseOptions(["--backend-token-file", "/no/such/file"])
        with self.assertRaisesRegex(SystemExit, "wsgateway: --backend-token-file: "):
            makeService(options)

    def test_nothing_is_scheduled_before_the_service_starts(self) -> None:
        clock = Clock()
        Node(make_settings({"registry": f"sqlite:{self.mktemp()}"}), clock)
        self.assertEqual(clock.getDelayedCalls(), [])
