"""Tests of gateway.util.epoll."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.util.epoll import NestedEpoll


class RecordingEpoll(NestedEpoll):
    """Records the ready file descriptors; raises for those in ``bad``."""

    def __init__(self, clock: Callable[[], float], max_events: int = 10) -> None:
        super().__init__("recording", clock, max_events=max_events, max_duration=1.0)
        self.ready: list[int] = []
        self.failures: list[tuple[int, type[BaseException] | None]] = []
        self.bad: set[int] = set()

    def add(self, fd: int) -> None:
        self._epoll.register(fd, select.EPOLLIN)

    def _ready(self, fd: int, event: int) -> None:
        self.ready.append(fd)
        if fd in self.bad:
            raise ZeroDivisionError

    def _failed(self, fd: int) -> None:
        self.failures.append((fd, Failure().type))


class NestedEpollTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.times = iter([0.0] * 1000)
        self.nested = RecordingEpoll(lambda: next(self.times))
        self.addCleanup(self.nested._epoll.close)

    def add_readable(self) -> int:
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        theirs.send(b"x")
        self.nested.add(ours.fileno())
        return ours.fileno()

    def test_readable_in_another_epoll(self) -> None:
        outer = select.epoll()
        self.addCleanup(outer.close)
        outer.register(self.nested.fileno(), select.EPOLLIN)
        self.assertEqual(outer.poll(0), [])
        self.add_readable()
        self.assertEqual(outer.poll(0), [(self.nested.fileno(), select.EPOLLIN)])

    def test_dispatches_each_once(self) -> None:
        fds = {self.add_readable() for _ in range(3)}
        self.nested.doRead()
        self.assertEqual((len(self.nested.ready), set(self.nested.ready)), (3, fds))

    def test_an_error_concerns_one_socket(self) -> None:
        first, second = self.add_readable(), self.add_readable()
        self.nested.bad.add(first)
        self.nested.doRead()
        self.assertEqual(set(self.nested.ready), {first, second})
        self.assertEqual(self.nested.failures, [(first, ZeroDivisionError)])

    def test_events_beyond_the_time_limit_are_kept(self) -> None:
        for _ in range(3):
            self.add_readable()
        self.times = iter([0.0, 0.0, 2.0, 5.0, 5.0, 5.0, 5.0])
        self.nested.doRead()
        self.assertEqual(len(self.nested.ready), 1)
        self.nested.doRead()
        self.assertEqual(len(set(self.nested.ready)), 3)

    def test_events_of_one_poll_are_bounded(self) -> None:
        nested = RecordingEpoll(lambda: 0.0, max_events=2)
        self.addCleanup(nested._epoll.close)
        self.nested = nested
        for _ in range(3):
            self.add_readable()
        nested.doRead()
        self.assertEqual(len(nested.ready), 2)

    def test_what_twisted_asks_of_a_reader(self) -> None:
        self.assertEqual(self.nested.logPrefix(), "recording")
        self.nested.connectionLost(Failure(ZeroDivisionError()))
