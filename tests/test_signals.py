"""Signals reach the reactor, and the second that ends a process ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from gateway import node

HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class DeferringReactor:
    """Calls nothing before it is told to."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def callFromThread(self, call: Callable[[], None]) -> None:
        self.calls.append(call)


class SignalHandlerTests(SynchronousTestCase):
    def setUp(self) -> None:
        for signum in HANDLED_SIGNALS:
            self.addCleanup(signal.signal, signum, signal.getsignal(signum))
        self.exits: list[int] = []
        self.patch(os, "_exit", self.exits.append)
        self.reactor = DeferringReactor()
        self.handled: list[str] = []
        node.install_signal_handlers(
            self.reactor,
            {
                signal.SIGTERM: lambda: self.handled.append("term"),
                signal.SIGINT: lambda: self.handled.append("int"),
                signal.SIGHUP: lambda: self.handled.append("hup"),
            },
        )

    def run_pending(self) -> list[str]:
        while self.reactor.calls:
            self.reactor.calls.pop(0)()
        return self.handled

    def test_they_are_handled_in_the_reactor(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual(self.handled, [])
        self.assertEqual((self.run_pending(), self.exits), (["term"], []))

    def test_a_second_one_ends_the_process_whatever_the_reactor_does(self) -> None:
        for first, second in ((signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT)):
            self.setUp()
            signal.raise_signal(first)
            signal.raise_signal(second)
            self.assertEqual(self.exits, [1])

    def test_sighup_ends_nothing(self) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        self.assertEqual((self.run_pending(), self.exits), (["hup"] * 3 + ["term"], []))
