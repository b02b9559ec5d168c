"""The faults of a run: a plan that depends on the seed alone, and how each is carried out.

A fault is an entry of the plan, so that a plan can be made smaller until only what a failure needs is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import attrs

from tests.simulation.database import DATABASE_HOST

if TYPE_CHECKING:
    from tests.simulation.fleet import Fleet


@attrs.frozen
class Fault:
    """One fault: its kind, when it begins, in seconds, what it is about (a number that is taken modulo), how long it
    lasts, in seconds, and how strong it is, from 0 to 1."""

    time: float
    kind: str
    target: int
    duration: float
    strength: float

    def __str__(self) -> str:
        return f"{self.time:.2f} s: {self.kind}({self.target}) for {self.duration:.2f} s, strength {self.strength:.2f}"


#: kinds that a call to a client that follows goaway must survive
BENIGN = ("drain", "join", "rebalance", "backend_reconnects", "client_reconnects")
#: kind -> how likely it is, beside the others
KINDS = {
    "drain": 6,
    "rebalance": 3,
    "backend_reconnects": 3,
    "client_reconnects": 6,
    "kill": 4,
    "power_off": 2,
    "pause": 4,
    "hiccup": 4,
    "cut_connection": 6,
    "lose_connection": 6,
    "cut_peers": 3,
    "partition": 4,
    "one_way_partition": 3,
    "cut_off_database": 3,
    "database_away": 3,
    "database_hangs": 2,
    "database_slow": 2,
    "lost_results": 3,
    "dead_locks": 3,
    "fail_over": 2,
    "clock_step": 2,
    "size_limit": 1,
    "slow_reader": 2,
    "client_leaves": 2,
    "twin": 2,
    "storm": 2,
}


def make_plan(
    random: Random, start: float, end: float, *, is_calm: bool, interval: float, only: Sequence[str] = ()
) -> list[Fault]:
    """Draw the faults of a run, one in ``interval`` seconds on average; of some kinds ``only``, if any are given."""
    kinds = [kind for kind in KINDS if not is_calm or kind in BENIGN]
    # A run has some kinds only, so that these meet each other.
    kinds = list(only) or random.sample(kinds, random.randint(min(3, len(kinds)), len(kinds)))
    weights = [KINDS[kind] for kind in kinds]
    plan = []
    time = start
    while True:
        time += random.expovariate(1 / interval)
        if time >= end:
            return plan
        kind = random.choices(kinds, weights)[0]
        duration = random.choice((random.uniform(0.05, 1.0), random.uniform(0.5, 5.0), random.uniform(2.0, 15.0)))
        plan.append(
            Fault(round(time, 3), kind, random.randrange(1000), round(min(duration, end - time), 3), random.random())
        )


class Faults:
    """Carries out a plan in a fleet."""

    def __init__(self, fleet: Fleet, plan: list[Fault]) -> None:
        self._fleet = fleet
        #: the number of faults that go on, and when the last one that is not benign was over
        self.active = 0
        self.last_end = 0.0
        for fault in plan:
            fleet.scheduler.at(fault.time, self._begin, fault)

    def is_quiet_since(self) -> float:
        """Return since when nothing but what is benign has happened."""
        return float("inf") if self.active else self.last_end

    def _begin(self, fault: Fault) -> None:
        self._fleet.scheduler.trace(f"FAULT {fault}")
        self._fleet.fault_counts[fault.kind] += 1
        if fault.kind in BENIGN:
            getattr(self, f"_{fault.kind}")(fault)
            return
        undo: Callable[[], None] | None = getattr(self, f"_{fault.kind}")(fault)
        self.active += 1

        def finish() -> None:
            self.active -= 1
            self.last_end = self._fleet.scheduler.now
            if undo is not None:
                undo()

        self._fleet.scheduler.after(fault.duration, finish)

    # Benign.

    def _drain(self, fault: Fault) -> None:
        fleet = self._fleet
        candidates = [process for process in fleet.processes if process.is_up and not process.is_leaving]
        candidates = [process for process in candidates if not process.reactor.is_paused]
        if len(candidates) < 2:
            return
        process = candidates[fault.target % len(candidates)]
        process.drain()

        def start_again() -> None:
            if process.is_running:
                fleet.scheduler.after(1.0, start_again)
            else:
                process.start()

        fleet.scheduler.after(fault.duration + 0.5, start_again)

    def _rebalance(self, fault: Fault) -> None:
        process = self._process(fault)
        if process.is_up:
            process.reactor.run(lambda: process.node.components.rebalancer.rebalance_now() and None)

    def _backend_reconnects(self, fault: Fault) -> None:
        backends = self._fleet.backends
        backends[fault.target % len(backends)].close()

    def _client_reconnects(self, fault: Fault) -> None:
        """A client that connects elsewhere at once."""
        clients = self._fleet.clients
        client = clients[fault.target % len(clients)]
        if client.is_running and client.is_connected:
            client.reachable_since = float("inf")
            client.stop()
            client.start()

    # Nodes.

    def _process(self, fault: Fault) -> Any:
        return self._fleet.processes[fault.target % len(self._fleet.processes)]

    def _kill(self, fault: Fault, *, notice: bool = True) -> Callable[[], None]:
        process = self._process(fault)
        if process.is_running:
            self._fleet.scheduler.trace(f"{process.name} is killed")
            process.kill(notice=notice)

        def start() -> None:
            if not process.is_running:
                process.start()

        return start

    def _power_off(self, fault: Fault) -> Callable[[], None]:
        return self._kill(fault, notice=False)

    def _pause(self, fault: Fault) -> Callable[[], None]:
        process = self._process(fault)
        if not process.is_running or process.reactor.is_paused:
            return lambda: None
        process.pause()
        reactor = process.reactor

        def resume() -> None:
            if process.reactor is reactor:
                process.resume()

        return resume

    def _hiccup(self, fault: Fault) -> Callable[[], None]:
        """A short stop, as of a machine that is busy."""
        resume = self._pause(fault)
        self._fleet.scheduler.after(min(fault.duration, 0.01 + 0.2 * fault.strength), resume)
        return lambda: None

    # Network.

    def _cut_connection(self, fault: Fault, *, notice: bool = True, count: int = 1) -> None:
        network = self._fleet.network
        network.forget_closed()
        connections = list(network.connections)
        for index in range(count + int(fault.strength * 5)):
            if connections:
                connection = connections.pop((fault.target * (index + 1)) % len(connections))
                self._fleet.disturb(connection.hosts())
                if notice:
                    connection.cut()
                else:
                    connection.vanish()

    def _lose_connection(self, fault: Fault) -> None:
        """Lose connections without notice: they become half-open."""
        self._cut_connection(fault, notice=False)

    def _cut_peers(self, fault: Fault) -> None:
        """Lose all connections between two nodes."""
        hosts = {process.host for process in self._pair(fault)}
        for connection in list(self._fleet.network.connections):
            if connection.hosts() == hosts:
                connection.cut()

    def _pair(self, fault: Fault) -> Any:
        processes = self._fleet.processes
        first = fault.target % len(processes)
        second = (first + 1 + fault.target // len(processes) % (len(processes) - 1)) % len(processes)
        return processes[first], processes[second]

    def _partition(self, fault: Fault, *, both: bool = True) -> Callable[[], None]:
        first, second = (process.host for process in self._pair(fault))
        return self._block(first, second, both=both)

    def _one_way_partition(self, fault: Fault) -> Callable[[], None]:
        return self._partition(fault, both=False)

    def _block(self, first: str, second: str, *, both: bool) -> Callable[[], None]:
        network = self._fleet.network
        network.block(first, second)
        if both:
            network.block(second, first)

        def heal() -> None:
            network.unblock(first, second)
            network.unblock(second, first)

        return heal

    def _cut_off_database(self, fault: Fault) -> Callable[[], None]:
        return self._block(self._process(fault).host, DATABASE_HOST, both=fault.strength < 0.7)

    # Database.

    def _database_away(self, fault: Fault) -> Callable[[], None]:
        database = self._fleet.database
        database.set_away(True)
        return lambda: database.set_away(False)

    def _database_hangs(self, fault: Fault) -> Callable[[], None]:
        database = self._fleet.database
        database.set_hanging(True)
        return lambda: database.set_hanging(False)

    def _set(self, name: str, value: float) -> Callable[[], None]:
        database = self._fleet.database
        setattr(database, name, value)
        return lambda: setattr(database, name, 0)

    def _database_slow(self, fault: Fault) -> Callable[[], None]:
        return self._set("slowness", 0.02 + fault.strength)

    def _lost_results(self, fault: Fault) -> Callable[[], None]:
        return self._set("lost_result_share", 0.05 + fault.strength / 2)

    def _dead_locks(self, fault: Fault) -> Callable[[], None]:
        return self._set("deadlock_share", 0.1 + fault.strength / 2)

    def _fail_over(self, fault: Fault) -> None:
        self._fleet.database.fail_over(int(fault.strength * 12))
        self._fleet.failed_over()

    def _clock_step(self, fault: Fault) -> None:
        """Set the database's clock, ahead or back."""
        step = (-3600.0, -30.0, -3.0, 3.0, 30.0, 3600.0)[fault.target % 6]
        self._fleet.database.clock_offset += step

    def _size_limit(self, fault: Fault) -> Callable[[], None]:
        return self._set("max_changes", 1 + int(fault.strength * 8))

    # Clients.

    def _slow_reader(self, fault: Fault) -> Callable[[], None]:
        client = self._fleet.clients[fault.target % len(self._fleet.clients)]
        return client.stop_reading()

    def _client_leaves(self, fault: Fault) -> Callable[[], None]:
        """A client that goes away, for a while or for good."""
        client = self._fleet.clients[fault.target % len(self._fleet.clients)]
        client.reachable_since = float("inf")
        client.stop()
        return lambda: client.start() if fault.strength < 0.5 and not client.is_running else None

    def _twin(self, fault: Fault) -> Callable[[], None]:
        """A second program with the id of a client."""
        return self._fleet.start_twin(fault.target)

    def _storm(self, fault: Fault) -> None:
        """All clients of a node lose their connections at once."""
        host = self._process(fault).host
        for connection in self._fleet.network.connections_of(host):
            if any(other.startswith("192.168.") for other in connection.hosts()):
                self._fleet.disturb(connection.hosts())
                connection.cut()
