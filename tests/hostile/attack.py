"""What an attack is, and the catalogue of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import attrs

from tests.hostile.raw_connection import TIMEOUT, RawConnection, opening, request, source

#: what was seen, and how often
Seen = Counter[str]
#: what a node may have more of in memory during an attack, in MiB: what any load leaves behind in the allocator
MAX_MEMORY_MIB = 16


@attrs.frozen
class Target:
    """A node as an attacker sees it."""

    client_port: int
    backend_port: int
    #: where clients connect by TLS
    tls_port: int = 0
    #: what only nodes of a fleet know, and the id of this one
    secret: bytes = b""
    node_id: str = ""
    #: the token of a client, and of a backend
    token: str = ""
    backend_token: str = ""
    #: the private key by which clients' tokens are signed (PEM)
    signing_key: str = ""

    @property
    def clients(self) -> tuple[str, int]:
        """Where clients connect."""
        return "127.0.0.1", self.client_port

    @property
    def backends(self) -> tuple[str, int]:
        """Where backends connect."""
        return "127.0.0.1", self.backend_port

    def connect(self, buffer: int = 0) -> RawConnection:
        """A connection to where clients connect, from an address that nobody was at."""
        return RawConnection(self.clients, source_address=source(), buffer=buffer)

    def client(self, client_id: str, *lines: str, buffer: int = 0) -> RawConnection:
        """A client, open."""
        wire = self.connect(buffer)
        wire.send(opening(client_id, *lines))
        seen = wire.response()
        assert seen == "101", f"{client_id} is answered {seen}"
        return wire

    def backend(self, *, buffer: int = 0, patience: float = TIMEOUT) -> RawConnection:
        """A backend's WebSocket, open."""
        wire = RawConnection(self.backends, buffer=buffer, timeout=patience)
        lines = [f"Authorization: Bearer {self.backend_token}"] if self.backend_token else []
        wire.send(opening("", *lines, target="/v1/backend"))
        seen = wire.response()
        assert seen == "101", f"a backend is answered {seen}"
        return wire

    def metric(self, name: str) -> float:
        """One of the node's counters, without labels."""
        lines = [f"Authorization: Bearer {self.backend_token}"] if self.backend_token else []
        with RawConnection(self.backends) as wire:
            wire.send(request("GET", "/metrics", *lines, "Connection: close"))
            text = wire.rest().decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def pauses(self) -> float:
        """How often it has stopped to read from a client that sent too much."""
        return self.metric("wsgateway_paused_clients_total")


@attrs.frozen
class Size:
    """How much of it: ``many`` connections where it is made of many, and for how long, in seconds; 0: once."""

    many: int = 40
    seconds: float = 0.0

    @property
    def large(self) -> bool:
        """Whether it is to last."""
        return self.seconds > 0

    def rounds(self) -> Iterator[int]:
        """One round after the other, until the time is over; one at least."""
        ends = time.monotonic() + self.seconds
        number = 0
        while number == 0 or time.monotonic() < ends:
            yield number
            number += 1


@attrs.frozen
class Attack:
    """One attack. ``what`` is done, and what the node ``does`` about it, for people; ``run`` does it.

    ``expected`` is what may be seen, all of it at least once when it is small; ``memory`` is what the node may have more
    of meanwhile, in MiB; ``node`` is the kind of node that it is for.
    """

    name: str
    what: str
    does: str
    run: Callable[[Target, Size], Seen]
    expected: frozenset[str]
    memory: int = MAX_MEMORY_MIB
    node: str = "open"
    #: what may be seen as well
    tolerated: frozenset[str] = frozenset()
    #: whether it takes seconds even when it is small, since the node waits before it does anything
    is_slow: bool = False

    def unexpected(self, seen: Seen) -> list[str]:
        """What was seen and may not be, and what was not seen."""
        strange = [
            f"{what} ({count} times)" for what, count in seen.items() if what not in self.expected | self.tolerated
        ]
        return strange + [f"never {what}" for what in sorted(self.expected - set(seen))]


#: all of them, by name
ATTACKS: dict[str, Attack] = {}


def attack(
    what: str,
    does: str,
    *expected: str,
    memory: int = MAX_MEMORY_MIB,
    node: str = "open",
    tolerated: Iterable[str] = (),
    patient: bool = False,
) -> Callable[[Callable[[Target, Size], Seen]], Attack]:
    """Put a function into the catalogue, under its name."""

    def put(run: Callable[[Target, Size], Seen]) -> Attack:
        name = run.__name__.replace("_", "-")
        made = Attack(name, what, does, run, frozenset(expected), memory, node, frozenset(tolerated), patient)
        assert name not in ATTACKS, name
        ATTACKS[name] = made
        return made

    return put


#: a case: what it is called -> what is sent, and what is expected
Cases = dict[str, tuple[bytes, str]]


def cases(
    name: str,
    what: str,
    does: str,
    all_of_them: Cases,
    one: Callable[[Target, bytes], str],
    memory: int = MAX_MEMORY_MIB,
) -> Attack:
    """Put a list of cases into the catalogue, each of which ``one`` tries."""

    def run(target: Target, size: Size) -> Seen:
        seen: Seen = Counter()
        for _ in size.rounds():
            for called, (data, expected) in all_of_them.items():
                result = one(target, data)
                seen[result if result == expected else f"{called}: {result} instead of {expected}"] += 1
        return seen

    made = Attack(name, what, does, run, frozenset(expected for _, expected in all_of_them.values()), memory)
    assert name not in ATTACKS, name
    ATTACKS[name] = made
    return made


def send_to_client_port(target: Target, data: bytes) -> str:
    """What comes of bytes that are sent where clients connect."""
    with target.connect() as wire:
        wire.send(data)
        return wire.response()


def send_to_backend_port(target: Target, data: bytes) -> str:
    """What comes of bytes that are sent where backends connect."""
    with RawConnection(target.backends, timeout=TIMEOUT) as wire:
        wire.send(data)
        return wire.response()
