"""Tests of gateway.net.endpoints with generated input: an endpoint string is bound, or what is wrong with it is said."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from gateway.net import endpoints
from gateway.settings import ConfigError

endpoint_parts = st.sampled_from(
    [*("tcp", "tcp6", "ssl", "haproxy", "fd", "systemd", "unix", "mtls", ":", ":", ":", "=", "\\", "\\:", "0", "8080")]
    + [*("99999", "-1", "port=1", "interface=127.0.0.1", "interface=\\:\\:1", "reuseport=yes", "reuseport=no")]
    + [*("reuseport=", "backlog=x", "backlog=1", "privateKey=/none", "certKey=", "domain=INET", "index=0", "\n", "é")]
)


class GeneratedDescriptionTests(SynchronousTestCase):
    def listen(self, description: str) -> None:
        bound = Deferred.fromCoroutine(
            endpoints.listen("backend", [description], Factory(), MemoryReactorClock())  # type: ignore[arg-type]
        )
        failures: list[BaseException] = []
        bound.addErrback(lambda failure: failures.append(failure.value))
        # Those that need a thread or a name are not bound in this reactor.
        for problem in failures:
            self.assertIsInstance(problem, ConfigError, f"{description!r}: {problem!r}")
            self.assertTrue(str(problem).startswith("--backend: "))
            self.assertEqual(len(str(problem).splitlines()), 1, problem)

    @settings(deadline=None, max_examples=200)
    @given(st.lists(endpoint_parts, max_size=9).map("".join) | st.text(max_size=12))
    @example("tcp:8080:reuseport=yes:reuseport=no")
    @example("haproxy:haproxy:tcp:0")
    @example("fd:0\x00")
    def test_anything(self, description: str) -> None:
        if description.startswith(("fd:", "haproxy:fd:", "unix:", "haproxy:unix:", "systemd:")):
            # These would take files of the tests' own.
            description = "x" + description
        self.listen(description)

    @settings(deadline=None, max_examples=60)
    @given(st.text(max_size=6) | st.integers().map(str), st.sampled_from(["fd:", "haproxy:fd:"]))
    def test_no_such_file(self, number: str, kind: str) -> None:
        if number.strip().isdecimal() and int(number) < 100_000:
            number = "1" + number.zfill(6)
        self.listen(kind + number)
