"""One run: a fleet with its clients and backends, the faults, and the checks."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import attrs
from twisted.logger import globalLogPublisher

from gateway.registry.interface import SessionKey
from tests.simulation.backend import Backend, HTTPBackend, Way, WebSocketBackend
from tests.simulation.client import IDLE_TIMEOUT, Client, ClientTraits
from tests.simulation.database import SimulatedDatabase
from tests.simulation.faults import Fault, Faults, make_plan
from tests.simulation.final_checks import FinalChecks, check_bounds
from tests.simulation.ledger import Ledger, Message, Violation, is_loss
from tests.simulation.network import Network
from tests.simulation.process import NodeProcess, Randomness
from tests.simulation.scheduler import Scheduler

LEASE, HEARTBEAT = 6.0, 2.0
#: interval and timeout of the nodes' pings to clients, in seconds
PING_INTERVAL, PING_TIMEOUT = 5.0, 3.0
#: time to start before traffic and faults begin, in seconds
WARM_UP = 8.0
#: time from the last fault to the final checks, in seconds: a lease and its reaping, the pings, and a round of the audit
SETTLING_TIME = 45.0
#: interval of the checks of bounds, in seconds
SWEEP_INTERVAL = 1.0
#: time after which no fault has an effect any more, in seconds: leases have expired, and clients have noticed
QUIET_TIME = LEASE + IDLE_TIMEOUT
#: time in which a process that was stopped and goes on handles what has happened meanwhile, in seconds
RESUME_TIME = 0.5
#: time within which a client that follows goaway is back, in seconds
HANDOFF_TIME = 2.0


@attrs.frozen
class Options:
    """What a run is like."""

    seed: int
    nodes: int = 3
    clients: int = 60
    #: simulated time of the run with faults, in minutes
    minutes: float = 2.0
    #: messages per second of all backends
    rate: float = 100.0
    #: ``None``: by the seed
    is_calm: bool | None = None
    #: only these kinds of faults; empty: by the seed
    kinds: tuple[str, ...] = ()
    #: mean time between two faults, in seconds; ``None``: by the seed
    fault_interval: float | None = None
    keep_trace: bool = False
    #: instead of that of the seed
    plan: tuple[Fault, ...] | None = None
    #: end at the first violation
    stop_at_violation: bool = True


@attrs.define
class Result:
    """What a run has come to."""

    options: Options
    trace_hash: str
    violations: list[Violation]
    plan: list[Fault]
    counts: Counter[str]
    lines: list[str] | None
    events: int
    simulated_seconds: float


class Fleet:
    """The fleet of one run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.scheduler = scheduler = Scheduler(options.seed, keep_trace=options.keep_trace)
        self.network = Network(scheduler)
        self.database = SimulatedDatabase(scheduler, self.network)
        self.ledger = Ledger(scheduler, self._disturbed_since)
        self.fault_counts: Counter[str] = Counter()
        self.random = scheduler.make_random("fleet")
        self.processes: list[NodeProcess] = []
        self.clients: list[Client] = []
        self.backends: list[Backend] = []
        self.twins: list[Client] = []
        #: host -> when a connection of it was last cut
        self._disturbed: dict[str, float] = {}
        #: client_id -> highest generation so far
        self._generations: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._folder = tempfile.mkdtemp(prefix="simulation-")
        self._end = WARM_UP + 60 * options.minutes
        self._is_checking = True
        plan_random = scheduler.make_random("plan")
        is_calm = plan_random.random() < 0.3 if options.is_calm is None else options.is_calm
        interval = options.fault_interval or plan_random.choice((1.0, 3.0, 8.0))
        drawn = make_plan(plan_random, WARM_UP, self._end, is_calm=is_calm, interval=interval, only=options.kinds)
        self.plan = list(options.plan) if options.plan is not None else drawn
        self.database.keeps_snapshots = any(fault.kind == "fail_over" for fault in self.plan)
        self._make_processes()
        self._make_clients(is_calm)
        self._make_backends()
        self.faults = Faults(self, self.plan)
        if options.stop_at_violation:
            self.ledger.on_violation = lambda violation: scheduler.stop()

    # Parts.

    def _make_processes(self) -> None:
        secret_file = os.path.join(self._folder, "secret")
        with open(secret_file, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write("s" * 64)
        settings: dict[str, Any] = {
            "lease": LEASE,
            "heartbeat": HEARTBEAT,
            "ping_interval": PING_INTERVAL,
            "ping_timeout": PING_TIMEOUT,
            "drain_delay": self.scheduler.make_random("drain delay").choice((0.0, 0.0, 2.0)),
            "drain_seconds": self.random.choice((1.0, 3.0, 8.0)),
            "on_elsewhere": self.random.choice(("route", "takeover")),
            "capacity": 1000,
            "openings_per_address": 0.0,
            "messages_per_client": 0.0,
            "rebalance_rate": self.random.choice((5.0, 50.0)),
            "max_calls": self.random.choice((100_000, 100_000, 100_000, 40)),
            "max_calls_per_client": self.random.choice((128, 128, 8)),
        }
        for number in range(1, self.options.nodes + 1):
            self.processes.append(
                NodeProcess(
                    number,
                    scheduler=self.scheduler,
                    network=self.network,
                    database=self.database,
                    secret_file=secret_file,
                    settings=settings,
                    on_session=self._session_opened,
                )
            )

    def _make_clients(self, is_calm: bool) -> None:
        for number in range(1, self.options.clients + 1):
            self.clients.append(self._make_client(f"client-{number}", f"client-{number}", self._draw_traits(is_calm)))

    def _make_client(self, client_id: str, program: str, traits: ClientTraits) -> Client:
        return Client(
            client_id,
            program,
            scheduler=self.scheduler,
            network=self.network,
            ledger=self.ledger,
            traits=traits,
            choose_node=self._choose_for_client,
            numbers=self._numbers,
        )

    def _draw_traits(self, is_calm: bool) -> ClientTraits:
        random = self.random
        return ClientTraits(
            follows_goaway=is_calm or random.random() < 0.8,
            follows_redirect=random.random() < 0.5,
            silent_share=random.choice((0.0, 0.0, 0.1)),
            max_delay=random.choice((0.0, 0.0, 0.05, 0.5)),
            error_share=random.choice((0.0, 0.1)),
            answers_elsewhere=random.random() < 0.2,
            flap_interval=0.0 if is_calm or random.random() < 0.8 else random.choice((2.0, 15.0)),
        )

    def _make_backends(self) -> None:
        kinds = [WebSocketBackend, WebSocketBackend, WebSocketBackend, HTTPBackend, HTTPBackend]
        client_ids = [client.client_id for client in self.clients]
        for number, kind in enumerate(kinds, 1):
            # Each has some clients of its own, so that its streams are dense, and all others now and then.
            own = self.random.sample(client_ids, max(1, min(len(client_ids), 12)))
            self.backends.append(
                kind(
                    f"backend-{number}",
                    scheduler=self.scheduler,
                    network=self.network,
                    ledger=self.ledger,
                    client_ids=own,
                    choose_node=self._choose_for_backend,
                    on_failure=self._call_failed,
                    rate=self.options.rate / len(kinds),
                )
            )

    def _choose_for_client(self, random: Random) -> str:
        ready = [process for process in self.processes if process.is_ready]
        return random.choice(ready if ready and random.random() < 0.95 else self.processes).host

    def _choose_for_backend(self, random: Random) -> str:
        ready = [process for process in self.processes if process.is_ready]
        return random.choice(ready or self.processes).host

    def start_twin(self, target: int) -> Callable[[], None]:
        """Start a second program with a client's id; returns what ends it."""
        original = self.clients[target % len(self.clients)]
        program = f"twin-{next(self._numbers)}-of-{original.client_id}"
        twin = self._make_client(original.client_id, program, ClientTraits(follows_redirect=bool(target % 2)))
        original.reachable_since = float("inf")
        self.twins.append(twin)
        twin.start()
        return twin.stop

    # What the checks need to know.

    def disturb(self, hosts: set[str]) -> None:
        """Take note that a connection between hosts was cut."""
        for host in hosts:
            if host.startswith("192.168."):
                self._disturbed[host] = self.scheduler.now

    def _disturbed_since(self, way: Way, time: float) -> float:
        """Return when the way of a backend to its node was last disturbed after a time, or 0."""
        if way.end is not None and way.end.is_vanished:
            return self.scheduler.now
        (process,) = (process for process in self.processes if process.host == way.node_host)
        disturbed = max(process.disturbed_at, self._disturbed.get(way.backend_host, 0.0))
        if process.is_running and process.reactor.is_paused:
            disturbed = self.scheduler.now
        return disturbed if disturbed > time else 0.0

    def _session_opened(self, process: NodeProcess, key: SessionKey) -> None:
        highest = self._generations.get(key.client_id, 0)
        self.scheduler.trace(f"{process.name} has {key.client_id} with generation {key.generation}")
        # A process that was stopped may hear only now of a claim that it has made before.
        was_stopped = self.scheduler.now - process.disturbed_at < RESUME_TIME
        if key.generation <= highest and not was_stopped:
            self.ledger.violated(
                "g", f"{process.name} has {key.client_id} with {key.generation}, after one had {highest}"
            )
        self._generations[key.client_id] = max(highest, key.generation)

    def failed_over(self) -> None:
        """Take note that the database has lost commits."""

    def _call_failed(self, message: Message, code: int) -> None:
        """Check whether a call may have failed (i)."""
        if not is_loss(code) or self.scheduler.now > self._end + SETTLING_TIME:
            return
        client = next(client for client in self.clients if client.client_id == message.client_id)
        quiet = max(self.faults.is_quiet_since(), WARM_UP) + QUIET_TIME
        deadline = message.sent_at + message.timeout
        is_good = client.traits.follows_goaway and not client.traits.flap_interval and not client.was_replaced
        if (
            is_good
            and message.sent_at > quiet
            and client.reachable_since + HANDOFF_TIME < message.sent_at
            and self.scheduler.now < deadline
            and message.number not in client.ignored
        ):
            self.ledger.violated("i", f"call {message.number} to {message.client_id} failed with {code}")

    # The run.

    def run(self) -> Result:
        """Run, and check."""
        observer = self._log_event
        globalLogPublisher.addObserver(observer)
        was_collecting = gc.isenabled()
        # When garbage is collected, and so what memory is free for the next object, depends on earlier runs: it would
        # decide what becomes of killed nodes, and the order of sets of objects.
        gc.collect()
        gc.disable()
        try:
            with Randomness(self.scheduler):
                self._run()
        finally:
            globalLogPublisher.removeObserver(observer)
            self._close()
            if was_collecting:
                gc.enable()
        return Result(
            self.options,
            self.scheduler.trace_hash(),
            self.ledger.violations,
            self.plan,
            self.ledger.counts,
            self.scheduler.lines,
            self.scheduler.handled,
            self.scheduler.now,
        )

    def _run(self) -> None:
        scheduler = self.scheduler
        for index, process in enumerate(self.processes):
            scheduler.at(0.2 * index, process.start)
        for index, client in enumerate(self.clients):
            scheduler.at(2.0 + 3.0 * index / len(self.clients), client.start)
        for backend in self.backends:
            scheduler.at(WARM_UP - 1.0, backend.start)
        scheduler.at(SWEEP_INTERVAL, self._sweep)
        self._run_until(self._end)
        # No more faults: what is broken by then must mend itself.
        self._end_faults()
        self._run_until(self._end + SETTLING_TIME)
        for backend in self.backends:
            backend.stop()
        self._run_until(self._end + SETTLING_TIME + 32.0)
        if not self._is_over():
            FinalChecks(self).run()

    def _run_until(self, time: float) -> None:
        if not self._is_over():
            self.scheduler.run(time)

    def _is_over(self) -> bool:
        return bool(self.ledger.violations) and self.options.stop_at_violation

    def _end_faults(self) -> None:
        self.scheduler.trace("the faults are over")
        for process in self.processes:
            if not process.is_running:
                process.start()
        for client in self.clients:
            client.stop_flapping()
        for twin in self.twins:
            twin.stop()

    def _sweep(self) -> None:
        self.ledger.sweep()
        for backend in self.backends:
            backend.check()
        check_bounds(self)
        if round(self.scheduler.now) % 30 == 0:
            self.network.forget_closed()
        self.scheduler.after(SWEEP_INTERVAL, self._sweep)

    def _log_event(self, event: Any) -> None:
        if "log_failure" in event:
            self.ledger.violated("x", f"an unexpected error was logged: {event['log_failure'].getTraceback()}")
        elif self.scheduler.lines is not None and event.get("log_format"):
            with contextlib.suppress(KeyError, IndexError, AttributeError):
                self.scheduler.lines.append(
                    f"{self.scheduler.now:11.6f}     log: " + str(event["log_format"]).format(**event)
                )

    def _close(self) -> None:
        for process in self.processes:
            process.kill()
        self.network.close()
        self.database.connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def run(options: Options) -> Result:
    """Run once."""
    return Fleet(options).run()
