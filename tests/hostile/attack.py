"""Definition and registry of the attacks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import attrs

from tests.hostile.raw_connection import TIMEOUT, RawConnection, opening, request, source

#: outcome -> how often it was seen
Seen = Counter[str]
#: MiB by which a node's memory may grow during an attack: any load leaves that much behind in the allocator
MAX_MEMORY_MIB = 16


@attrs.frozen
class Target:
    """A node as an attacker sees it."""

    client_port: int
    backend_port: int
    #: the client endpoint with TLS
    tls_port: int = 0
    #: the cluster secret, and the id of this node
    secret: bytes = b""
    node_id: str = ""
    #: tokens of a client and of a backend
    token: str = ""
    backend_token: str = ""
    #: the private key that signs clients' tokens (PEM)
    signing_key: str = ""

    @property
    def clients(self) -> tuple[str, int]:
        """The address of the client endpoint."""
        return "127.0.0.1", self.client_port

    @property
    def backends(self) -> tuple[str, int]:
        """The address of the backend endpoint."""
        return "127.0.0.1", self.backend_port

    def connect(self, buffer: int = 0) -> RawConnection:
        """Connect to the client endpoint, from a new source address."""
        return RawConnection(self.clients, source_address=source(), buffer=buffer)

    def client(self, client_id: str, *lines: str, buffer: int = 0) -> RawConnection:
        """Open a client connection."""
        connection = self.connect(buffer)
        connection.send(opening(client_id, *lines))
        seen = connection.response()
        assert seen == "101", f"the response to {client_id} is {seen}"
        return connection

    def backend(self, *, buffer: int = 0, patience: float = TIMEOUT) -> RawConnection:
        """Open a WebSocket connection of a backend."""
        connection = RawConnection(self.backends, buffer=buffer, timeout=patience)
        lines = [f"Authorization: Bearer {self.backend_token}"] if self.backend_token else []
        connection.send(opening("", *lines, target="/v1/backend"))
        seen = connection.response()
        assert seen == "101", f"the response to a backend is {seen}"
        return connection

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels."""
        lines = [f"Authorization: Bearer {self.backend_token}"] if self.backend_token else []
        with RawConnection(self.backends) as connection:
            connection.send(request("GET", "/metrics", *lines, "Connection: close"))
            text = connection.rest().decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def pauses(self) -> float:
        """Return how often the node has paused reading from a client."""
        return self.metric("wsgateway_paused_clients_total")


@attrs.frozen
class Size:
    """The size of an attack: ``many`` connections, if it uses many; ``seconds`` of duration, 0 for one round."""

    many: int = 40
    seconds: float = 0.0

    @property
    def large(self) -> bool:
        """Whether the attack has a duration."""
        return self.seconds > 0

    def rounds(self) -> Iterator[int]:
        """Yield the numbers of rounds until the time is over; at least one."""
        ends = time.monotonic() + self.seconds
        number = 0
        while number == 0 or time.monotonic() < ends:
            yield number
            number += 1


@attrs.frozen
class Attack:
    """One attack. ``what`` describes it, ``does`` the node's reaction; ``run`` executes it.

    ``expected`` are the allowed outcomes; a small attack must see each at least once. ``memory`` is the allowed growth
    in MiB; ``node`` is the kind of node.
    """

    name: str
    what: str
    does: str
    run: Callable[[Target, Size], Seen]
    expected: frozenset[str]
    memory: int = MAX_MEMORY_MIB
    node: str = "open"
    #: outcomes that are allowed but not required
    tolerated: frozenset[str] = frozenset()
    #: whether even a small attack takes seconds, since the node reacts only after a timeout
    is_slow: bool = False

    def unexpected(self, seen: Seen) -> list[str]:
        """Describe outcomes that are not allowed, and expected outcomes that are missing."""
        strange = [
            f"{what} ({count} times)" for what, count in seen.items() if what not in self.expected | self.tolerated
        ]
        return strange + [f"never {what}" for what in sorted(self.expected - set(seen))]


#: name -> attack
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
    """Register a function as an attack, under its name."""

    def put(run: Callable[[Target, Size], Seen]) -> Attack:
        name = run.__name__.replace("_", "-")
        made = Attack(name, what, does, run, frozenset(expected), memory, node, frozenset(tolerated), patient)
        assert name not in ATTACKS, name
        ATTACKS[name] = made
        return made

    return put


#: description of a case -> (data to send, expected outcome)
Cases = dict[str, tuple[bytes, str]]


def cases(
    name: str,
    what: str,
    does: str,
    all_of_them: Cases,
    one: Callable[[Target, bytes], str],
    memory: int = MAX_MEMORY_MIB,
) -> Attack:
    """Register a list of cases as an attack; ``one`` executes a case."""

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
    """Send bytes to the client endpoint; return the outcome."""
    with target.connect() as connection:
        connection.send(data)
        return connection.response()


def send_to_backend_port(target: Target, data: bytes) -> str:
    """Send bytes to the backend endpoint; return the outcome."""
    with RawConnection(target.backends, timeout=TIMEOUT) as connection:
        connection.send(data)
        return connection.response()
