"""Tests of ``python -m gateway.agent``."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import trustme
from twisted.internet.task import Clock
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent import RpcFailed, __main__
from gateway.testing import MemoryGateway

ARGUMENTS = ["--url", "ws://gateway.test", "--client-id", "demo-1"]


def parse_options(*arguments: str) -> __main__.DemoOptions:
    options = __main__.DemoOptions()  # type: ignore[no-untyped-call]
    options.parseOptions([*ARGUMENTS, *arguments])  # type: ignore[no-untyped-call]
    return options


class OptionsTests(SynchronousTestCase):
    def token_file(self, text: bytes) -> str:
        path: str = self.mktemp()
        with open(path, "wb") as file:
            file.write(text)
        return path

    def test_defaults(self) -> None:
        options = parse_options()
        self.assertEqual((options["token"], options["echo-delay"]), (None, 0.0))

    def test_token(self) -> None:
        self.assertEqual(parse_options("--token-file", self.token_file(b"T\n"))["token"], "T")

    def test_certificate(self) -> None:
        """A client certificate makes --client-id optional."""
        path = self.token_file(trustme.CA().issue_cert("robot-7").private_key_and_cert_chain_pem.bytes())
        options = __main__.DemoOptions()  # type: ignore[no-untyped-call]
        options.parseOptions(["--url", "wss://gateway.test", "--certificate", path])  # type: ignore[no-untyped-call]
        self.assertIs(__main__.make_agent(options, Clock())._tls, options["tls"])

    def test_invalid_arguments(self) -> None:
        for arguments, message in [
            (["--url", ""], "--url is required"),
            (["--client-id", ""], "--client-id is required"),
            (["--url", "http://x"], "'http://x' is not a valid URL"),
            (["--client-id", "a b"], "client_id 'a b' is not"),
            (["--echo-delay", "x"], "--echo-delay is not a number of seconds"),
            (["--echo-delay", "nan"], "--echo-delay is not a number of seconds"),
            (["--echo-delay", "-1"], "--echo-delay is not a number of seconds"),
            (["--token-file", "/nonexistent"], "--token-file /nonexistent cannot be read"),
            (["--token-file", self.token_file(b" \n")], "is empty"),
            (["--token-file", self.token_file(b"\xff")], "cannot be read"),
            (["--token-file", self.token_file(b"a b")], "the token is not"),
            (
                ["--ca-file", "/nonexistent/ca"],
                "--ca-file, --certificate, --key: /nonexistent/ca cannot be read: No such",
            ),
            (["--certificate", self.token_file(b"x")], "--ca-file, --certificate, --key: .* has no PEM certificate"),
            (["--key", "/nonexistent"], "key is given without certificate"),
            (["--nothing"], "option --nothing not recognized"),
            (["argument"], "'argument' is not an option"),
        ]:
            with self.assertRaisesRegex(UsageError, message):
                __main__.make_agent(parse_options(*arguments), Clock())


class MainTests(SynchronousTestCase):
    """Invalid arguments print one line; the exit status is 2."""

    def test_invalid_arguments(self) -> None:
        stderr = io.StringIO()
        self.patch(sys, "stderr", stderr)
        self.patch(sys, "argv", ["gateway.agent", "--url", "http://x", "--client-id", "x"])
        stop = self.assertRaises(SystemExit, __main__.main)
        self.assertEqual(stop.code, 2)
        self.assertRegex(stderr.getvalue(), r"\Agateway\.agent: 'http://x' is not a valid URL: .*\n\Z")


class MethodsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.stdout = io.StringIO()
        self.patch(sys, "stdout", self.stdout)
        self.gateway = MemoryGateway()

    def start(self, *arguments: str) -> None:
        agent = __main__.make_agent(parse_options(*arguments), self.gateway.clock, connect=self.gateway.endpoint)
        agent.start()
        self.gateway.flush()

    def result(self, method: str, params: object = None) -> Any:
        return self.successResultOf(self.gateway.call("demo-1", method, params))

    def test_prints_connected(self) -> None:
        self.start()
        self.assertEqual(self.stdout.getvalue(), "connected demo-1 ws://gateway.test:80/v1/connect?client_id=demo-1\n")

    def test_echo(self) -> None:
        self.start()
        self.assertEqual(self.result("echo", {"a": 1}), {"a": 1})

    def test_echo_delay(self) -> None:
        self.start("--echo-delay", "2.5")
        answer = self.gateway.call("demo-1", "echo", [1])
        self.gateway.advance(2.4)
        self.assertNoResult(answer)
        self.gateway.advance(0.1)
        self.assertEqual(self.successResultOf(answer), [1])

    def test_time(self) -> None:
        self.start()
        self.assertGreater(self.result("time"), 1.7e9)

    def test_disk_usage(self) -> None:
        self.start()
        usage = self.result("disk.usage", {"path": os.sep})
        self.assertEqual(set(usage), {"free", "total"})
        self.assertGreaterEqual(usage["total"], usage["free"])

    def test_disk_usage_invalid_path(self) -> None:
        self.start()
        for params in [None, [], {}, {"path": 7}, {"path": self.mktemp()}, {"path": "a\0b"}]:
            error = self.failureResultOf(self.gateway.call("demo-1", "disk.usage", params), RpcFailed).value
            self.assertEqual(error.code, -32602)

    def test_notification(self) -> None:
        self.start()
        self.gateway.notify("demo-1", "policy.changed", [3])
        self.assertEqual(self.gateway.clients, ["demo-1"])
