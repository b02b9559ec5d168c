"""Connection storms: silent, slow, reset, refused, and useless connections."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator

from tests.hostile.attack import Seen, Size, Target, attack
from tests.hostile.raw_connection import RawConnection, name, opening, source

#: the default number of handshakes of one address is not enough to keep others out
ONE = "127.0.0.3"
SLOW = opening("slow")
#: seconds between two bytes of a slow opening handshake
PACE = 1.0


def one_source() -> Iterator[str]:
    """Yield one address forever."""
    return itertools.repeat(ONE)


def many_sources() -> Iterator[str]:
    """Yield new addresses."""
    return (source() for _ in itertools.count())


def _connected(target: Target, here: str, port: int = 0) -> RawConnection | None:
    # The backlog of the listening socket may be full.
    try:
        return RawConnection(("127.0.0.1", port or target.client_port), source_address=here)
    except OSError:
        return None


def held(target: Target, size: Size, sources: Iterator[str], write: Callable[[int], bytes], port: int = 0) -> Seen:
    """Open many connections, write a little to each once a second, and count the outcomes."""
    seen: Seen = Counter()
    connections = [
        connection for here in itertools.islice(sources, size.many) if (connection := _connected(target, here, port))
    ]
    ends = time.monotonic() + max(size.seconds, 6.5)
    for number in itertools.count():
        if time.monotonic() > ends or (not connections and not size.large):
            break
        left = []
        for connection in connections:
            data = write(number)
            connection.socket.settimeout(0.001)
            alive = not data or connection.send(data)
            with contextlib.suppress(TimeoutError):
                alive = connection.read() and alive
            if alive and not connection.has_answer():
                left.append(connection)
            else:
                seen[connection.response()] += 1
                connection.drop()
        more = size.many - len(left) if size.large else 0
        connections = left + [
            connection for here in itertools.islice(sources, more) if (connection := _connected(target, here, port))
        ]
        time.sleep(PACE)
    for connection in connections:
        # The last connections were not waited for.
        if not size.large:
            seen["nothing"] += 1
        connection.drop()
    return seen


@attack(
    "opening handshakes at one byte a second, from one address",
    "drops each after 5 s; answers 429 above --openings-per-address",
    "dropped",
    tolerated=["503 rate"],
    memory=64,
    patient=True,
)
def slow_openings(target: Target, size: Size) -> Seen:
    return held(target, size, one_source(), lambda number: SLOW[number : number + 1])


@attack(
    "the same, each from a different address",
    "drops each after 5 s; answers 503 above --max-openings",
    "dropped",
    tolerated=["503 openings"],
    memory=64,
    patient=True,
)
def slow_openings_from_many(target: Target, size: Size) -> Seen:
    return held(target, size, many_sources(), lambda number: SLOW[number : number + 1])


@attack(
    "silent connections, from one address",
    "the same",
    "dropped",
    tolerated=["503 rate"],
    memory=64,
    patient=True,
)
def silence(target: Target, size: Size) -> Seen:
    return held(target, size, one_source(), lambda number: b"")


@attack(
    "silent connections, each from a different address",
    "the same",
    "dropped",
    tolerated=["503 openings"],
    memory=64,
    patient=True,
)
def silence_from_many(target: Target, size: Size) -> Seen:
    return held(target, size, many_sources(), lambda number: b"")


def _storm(sources: Callable[[], Iterator[str]], data: bytes | None, target: Target, size: Size) -> Seen:
    """Connect as fast as possible, 32 at a time; with ``data``, send it and read the response."""
    seen: Seen = Counter()
    hosts = sources()
    for _ in size.rounds():
        for _ in range(max(1, size.many // 32)):
            connections = [
                connection for here in itertools.islice(hosts, 32) if (connection := _connected(target, here))
            ]
            for connection in connections:
                if data is not None:
                    connection.send(data)
            for connection in connections:
                seen["reset" if data is None else connection.response()] += 1
                connection.drop()
    return seen


@attack("connections that are reset at once, from one address", "discards them", "reset")
def resets(target: Target, size: Size) -> Seen:
    return _storm(one_source, None, target, size)


@attack("connections that are reset at once, each from a different address", "discards them", "reset")
def resets_from_many(target: Target, size: Size) -> Seen:
    return _storm(many_sources, None, target, size)


def _at_once(connections: list[RawConnection]) -> int:
    for connection in connections:
        connection.drop()
    return len(connections)


@attack("a thousand silent connections that are reset together, repeatedly", "discards them", "reset", memory=32)
def resets_at_once(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        connections = [
            connection
            for here in itertools.islice(many_sources(), min(size.many, 1000))
            if (connection := _connected(target, here))
        ]
        time.sleep(0.1)
        seen["reset"] += _at_once(connections)
    return seen


@attack("a thousand clients that disconnect together, repeatedly", "discards them", "gone", memory=32)
def clients_gone_at_once(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        connections = [target.client(name()) for _ in range(min(size.many, 1000))]
        time.sleep(0.1)
        seen["gone"] += _at_once(connections)
    return seen


@attack(
    "invalid opening handshakes at full speed, from one address",
    "400; above --openings-per-address 429, or drops the connection",
    "400 client_id",
    tolerated=["503 rate", "dropped"],
)
def wrong_openings(target: Target, size: Size) -> Seen:
    return _storm(one_source, opening("a b".replace(" ", "%20")), target, size)


@attack("invalid opening handshakes at full speed, each from a different address", "400", "400 client_id")
def wrong_openings_from_many(target: Target, size: Size) -> Seen:
    return _storm(many_sources, opening("a%20b"), target, size)


@attack(
    "valid opening handshakes at full speed, each from a different address and client, that disconnect at once",
    "opens each",
    "101",
    memory=32,
)
def openings_from_many(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        for _ in range(max(1, size.many // 32)):
            connections = [
                connection for here in itertools.islice(many_sources(), 32) if (connection := _connected(target, here))
            ]
            for connection in connections:
                connection.send(opening(name()))
            for connection in connections:
                seen[connection.response()] += 1
                connection.drop()
    return seen


@attack(
    "one client_id claimed by one connection after the other",
    "allows five replacements in a minute; then 429, and the current connection stays",
    "101",
    "429 replaced",
    tolerated=["503 rate"],
)
def evictions(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        client_id = name()
        connections: list[RawConnection] = []
        for _ in range(1000 if size.large else 20):
            connection = target.connect()
            connection.send(opening(client_id))
            seen[answer := connection.response()] += 1
            if answer == "101":
                connections.append(connection)
            else:
                connection.drop()
        # The current connection stays open.
        for connection in connections[:-1]:
            if (end := connection.read_outcome()) != "closed 4001":
                seen[f"{end} instead of closed 4001"] += 1
            connection.drop()
        list(connections[-1].texts())
        connections[-1].drop()
        if len(connections) > 6:
            seen[f"{len(connections)} were accepted"] += 1
    return seen
