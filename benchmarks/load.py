"""The load: it keeps some messages on their way, and does next to nothing for each.

What it sends is made beforehand; of what it receives it looks at the beginning, and cuts the id out where the first
message had it. When one message has arrived the next is sent, so that ``in_flight`` of them are always on their way; a
client has one at most. It counts its own CPU too: a load that is busy all the time measures itself.

    with measure.start(name) as server, Load(server, 1000) as load:
        print(load.calls(in_flight=64, seconds=3).per_second)
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import measure
from benchmarks.connections import Connections, Shape
from benchmarks.dialects import FIRST_ID, client_id, frame, framed

#: bytes that a client reads at a time: more than a message, and little enough for Python's own allocator
READ_SIZE = 448
ONE = (None,)


@dataclass(frozen=True)
class Measured:
    """What some seconds of load came to. ``latencies`` in seconds, ``server_cpu`` and ``load_cpu`` too."""

    count: int
    seconds: float
    server_cpu: float
    load_cpu: float
    latencies: list[float]

    @property
    def per_second(self) -> float:
        return self.count / self.seconds

    @property
    def cpu_each(self) -> float:
        """Microseconds of the server's CPU for one."""
        return self.server_cpu / self.count * 1e6

    @property
    def load_each(self) -> float:
        """Microseconds of the load's own CPU for one."""
        return self.load_cpu / self.count * 1e6

    @property
    def busy(self) -> float:
        """The share of the time (0 to 1) in which the load was working."""
        return self.load_cpu / self.seconds

    @property
    def server_busy(self) -> float:
        """The same of the server; above 1 if it works on several cores."""
        return self.server_cpu / self.seconds

    @property
    def p50(self) -> float:
        return measure.percentile(self.latencies, 0.50)

    @property
    def p99(self) -> float:
        return measure.percentile(self.latencies, 0.99)


class Clock:
    """When the counted part of a load begins and ends, and what server and load had used by then."""

    def __init__(self, server: measure.Server, seconds: float, warm_up: float) -> None:
        self._server = server
        self._seconds = seconds
        self._due = time.perf_counter() + warm_up
        self._marks: list[tuple[float, int, float, float]] = []

    def is_over(self, count: int) -> bool:
        now = time.perf_counter()
        if now < self._due:
            return False
        self._marks.append((now, count, self._server.cpu(), time.process_time()))
        self._due = now + self._seconds
        return len(self._marks) == 2

    def measured(self, latencies: list[float]) -> Measured:
        (began, first, server_before, load_before), (ended, last, server_after, load_after) = self._marks
        return Measured(
            last - first,
            ended - began,
            server_after - server_before,
            load_after - load_before,
            latencies[first:last],
        )


class Load(Connections):
    """Clients ``agent-00000`` and so on, and a backend, that send and answer as fast as the server lets them."""

    def calls(self, in_flight: int, seconds: float, warm_up: float = 0.5) -> Measured:
        """Calls: backend -> server -> client -> server -> backend. The latency is what the backend sees."""
        dialect, fds = self.dialect, self.fds
        requests = [dialect.call(number) for number in range(self.clients)]
        self.send_backend(requests[0])
        sample = self.sample(fds[0])
        asked = Shape.of(sample, dialect.at_client)
        call_id = sample[asked.id_from : asked.id_to]
        head, masks, tail = framed(dialect.answer(call_id), call_id)
        size, number_of = len(call_id), int.from_bytes
        os.write(fds[0], frame(dialect.answer(call_id)))
        answered = Shape.of(self.sample(self.backend), dialect.at_backend)
        index = {b"%d" % (FIRST_ID + number): number for number in range(self.clients)}

        first, following = self.order(in_flight)
        started, latencies = [time.perf_counter()] * self.clients, list[float]()
        read, write, clock, backend = os.read, os.write, time.perf_counter, self.backend
        length, id_from, id_to = asked.length, asked.id_from, asked.id_to

        def turn(sending: bool) -> None:
            out = []
            for fd, _ in self.poll():
                if fd != backend:
                    data = read(fd, READ_SIZE)
                    for message in (data,) if len(data) == length else self.client_messages(fd, data, asked):
                        masked = number_of(message[id_from:id_to], "little") ^ masks
                        write(fd, head + masked.to_bytes(size, "little") + tail)
                else:
                    found = self.backend_ids(answered)
                    now = clock()
                    for id_ in found:
                        number = index[id_]
                        latencies.append(now - started[number])
                        number = following[number]
                        started[number] = now
                        out.append(requests[number])
            if sending and out:
                self.send_backend(b"".join(out))

        self.send_backend(b"".join([requests[number] for number in first]))
        return self._run(turn, in_flight, latencies, Clock(self.server, seconds, warm_up))

    def notifications(self, in_flight: int, seconds: float, warm_up: float = 0.5) -> Measured:
        """Notifications: backend -> server -> client. The latency is one way, the load being at both ends."""
        messages = [self.dialect.notification(number) for number in range(self.clients)]
        self.send_backend(messages[0])
        shape = Shape.of(self.sample(self.fds[0]), None)

        first, following = self.order(in_flight)
        started, latencies = [time.perf_counter()] * self.clients, list[float]()
        read, clock, backend, numbers, length = os.read, time.perf_counter, self.backend, self.numbers, shape.length

        def turn(sending: bool) -> None:
            out = []
            events = self.poll()
            now = clock()
            for fd, _ in events:
                if fd == backend:
                    self.backend_ids(shape)
                    continue
                data = read(fd, READ_SIZE)
                for _ in ONE if len(data) == length else self.client_messages(fd, data, shape):
                    number = numbers[fd]
                    latencies.append(now - started[number])
                    number = following[number]
                    started[number] = now
                    out.append(messages[number])
            if sending and out:
                self.send_backend(b"".join(out))

        self.send_backend(b"".join([messages[number] for number in first]))
        return self._run(turn, in_flight, latencies, Clock(self.server, seconds, warm_up))

    def events(self, in_flight: int, seconds: float, warm_up: float = 0.5) -> Measured:
        """Notifications the other way: client -> server -> backend."""
        fds, messages = self.fds, [self.dialect.event(number) for number in range(self.clients)]
        os.write(fds[0], messages[0])
        shape = Shape.of(self.sample(self.backend), self.dialect.sender)
        index = {client_id(number).encode(): number for number in range(self.clients)}

        first, following = self.order(in_flight)
        started, latencies = [time.perf_counter()] * self.clients, list[float]()
        write, clock, backend = os.write, time.perf_counter, self.backend

        def turn(sending: bool) -> None:
            for fd, _ in self.poll():
                if fd != backend:
                    self.client_messages(fd, os.read(fd, 4096), shape)
                    continue
                found = self.backend_ids(shape)
                now = clock()
                for id_ in found:
                    number = index[id_]
                    latencies.append(now - started[number])
                    if sending:
                        number = following[number]
                        started[number] = clock()
                        write(fds[number], messages[number])

        for number in first:
            write(fds[number], messages[number])
        return self._run(turn, in_flight, latencies, Clock(self.server, seconds, warm_up))

    def _run(self, turn: Callable[[bool], None], in_flight: int, latencies: list[float], clock: Clock) -> Measured:
        gc.collect()
        gc.disable()
        try:
            while not clock.is_over(len(latencies)):
                turn(True)
            # What is still on its way comes in before the next load, or shows here that it is lost.
            sent = len(latencies) + in_flight
            while len(latencies) < sent:
                turn(False)
        finally:
            gc.enable()
        return clock.measured(latencies)
