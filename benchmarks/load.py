"""Load generator: keep a number of messages in flight, with as little work as possible for each.

Messages are made in advance. Of a received message it checks the first bytes and takes the id from the position where
the first message had it. When a message has arrived the next one is sent, so that ``in_flight`` messages are always in
flight, at most one per client. It measures its own CPU, too: a load that is always busy measures itself.

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

#: read size of a client, in bytes: more than a message, and small enough for Python's own allocator
READ_SIZE = 448
ONE = (None,)


@dataclass(frozen=True)
class Measured:
    """Result of one load. ``seconds``, ``latencies`` and both CPU times are in seconds."""

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
        """CPU of the server per message, in microseconds."""
        return self.server_cpu / self.count * 1e6

    @property
    def load_each(self) -> float:
        """CPU of the load per message, in microseconds."""
        return self.load_cpu / self.count * 1e6

    @property
    def busy(self) -> float:
        """Share of time (0 to 1) in which the load worked."""
        return self.load_cpu / self.seconds

    @property
    def server_busy(self) -> float:
        """The same for the server; above 1 if it uses several cores."""
        return self.server_cpu / self.seconds

    @property
    def p50(self) -> float:
        return measure.percentile(self.latencies, 0.50)

    @property
    def p99(self) -> float:
        return measure.percentile(self.latencies, 0.99)


class Clock:
    """Mark begin and end of the measured part of a load, with the CPU that server and load used until then."""

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
        (started_at, first, server_before, load_before), (ended_at, last, server_after, load_after) = self._marks
        return Measured(
            last - first,
            ended_at - started_at,
            server_after - server_before,
            load_after - load_before,
            latencies[first:last],
        )


class Load(Connections):
    """Clients ``agent-00000`` and so on, and a backend, which send and respond as fast as the server allows."""

    def calls(self, in_flight: int, seconds: float, warm_up: float = 0.5) -> Measured:
        """Send calls: backend -> server -> client -> server -> backend. Latency is measured at the backend."""
        dialect, fds = self.dialect, self.fds
        requests = [dialect.call(number) for number in range(self.clients)]
        self.send_backend(requests[0])
        sample = self.sample(fds[0])
        call_shape = Shape.of(sample, dialect.at_client)
        call_id = sample[call_shape.id_from : call_shape.id_to]
        head, masks, tail = framed(dialect.answer(call_id), call_id)
        size, number_of = len(call_id), int.from_bytes
        os.write(fds[0], frame(dialect.answer(call_id)))
        response_shape = Shape.of(self.sample(self.backend), dialect.at_backend)
        index = {b"%d" % (FIRST_ID + number): number for number in range(self.clients)}

        first, following = self.order(in_flight)
        started, latencies = [time.perf_counter()] * self.clients, list[float]()
        read, write, clock, backend = os.read, os.write, time.perf_counter, self.backend
        length, id_from, id_to = call_shape.length, call_shape.id_from, call_shape.id_to

        def iterate(sending: bool) -> None:
            out = []
            for fd, _ in self.poll():
                if fd != backend:
                    data = read(fd, READ_SIZE)
                    for message in (data,) if len(data) == length else self.client_messages(fd, data, call_shape):
                        masked = number_of(message[id_from:id_to], "little") ^ masks
                        write(fd, head + masked.to_bytes(size, "little") + tail)
                else:
                    ids = self.backend_ids(response_shape)
                    now = clock()
                    for id_ in ids:
                        number = index[id_]
                        latencies.append(now - started[number])
                        number = following[number]
                        started[number] = now
                        out.append(requests[number])
            if sending and out:
                self.send_backend(b"".join(out))

        self.send_backend(b"".join([requests[number] for number in first]))
        return self._run(iterate, in_flight, latencies, Clock(self.server, seconds, warm_up))

    def notifications(self, in_flight: int, seconds: float, warm_up: float = 0.5) -> Measured:
        """Send notifications: backend -> server -> client. Latency is one way, since the load is at both ends."""
        messages = [self.dialect.notification(number) for number in range(self.clients)]
        self.send_backend(messages[0])
        shape = Shape.of(self.sample(self.fds[0]), None)

        first, following = self.order(in_flight)
        started, latencies = [time.perf_counter()] * self.clients, list[float]()
        read, clock, backend, numbers, length = os.read, time.perf_counter, self.backend, self.numbers, shape.length

        def iterate(sending: bool) -> None:
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
        return self._run(iterate, in_flight, latencies, Clock(self.server, seconds, warm_up))

    def events(self, in_flight: int, seconds: float, warm_up: float = 0.5) -> Measured:
        """Send notifications in the other direction: client -> server -> backend."""
        fds, messages = self.fds, [self.dialect.event(number) for number in range(self.clients)]
        os.write(fds[0], messages[0])
        shape = Shape.of(self.sample(self.backend), self.dialect.sender)
        index = {client_id(number).encode(): number for number in range(self.clients)}

        first, following = self.order(in_flight)
        started, latencies = [time.perf_counter()] * self.clients, list[float]()
        write, clock, backend = os.write, time.perf_counter, self.backend

        def iterate(sending: bool) -> None:
            for fd, _ in self.poll():
                if fd != backend:
                    self.client_messages(fd, os.read(fd, 4096), shape)
                    continue
                ids = self.backend_ids(shape)
                now = clock()
                for id_ in ids:
                    number = index[id_]
                    latencies.append(now - started[number])
                    if sending:
                        number = following[number]
                        started[number] = clock()
                        write(fds[number], messages[number])

        for number in first:
            write(fds[number], messages[number])
        return self._run(iterate, in_flight, latencies, Clock(self.server, seconds, warm_up))

    def _run(self, iterate: Callable[[bool], None], in_flight: int, latencies: list[float], clock: Clock) -> Measured:
        gc.collect()
        gc.disable()
        try:
            while not clock.is_over(len(latencies)):
                iterate(True)
            # Receive the messages in flight before the next load starts; a lost message fails here.
            sent = len(latencies) + in_flight
            while len(latencies) < sent:
                iterate(False)
        finally:
            gc.enable()
        return clock.measured(latencies)
