"""Clients and backends that do not read."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tests.hostile.attack import Seen, Size, Target, attack
from tests.hostile.attacks.frames import LIMIT
from tests.hostile.raw_connection import RawConnection, frame, name, request

#: bytes; a small receive buffer
NARROW = 4096
#: a client may have 5 MiB of unread data by default, including a burst
ENOUGH = 24


def _notify(client_id: str, size: int) -> bytes:
    params = {"client": client_id, "method": "m", "params": ["a" * size]}
    return frame(json.dumps({"jsonrpc": "2.0", "method": "client.notify", "params": params}))


def _call(client_id: str, id: int, size: int, timeout: float = 2.0) -> bytes:
    params = {"client": client_id, "method": "m", "params": ["a" * size], "timeout": timeout}
    return frame(json.dumps({"jsonrpc": "2.0", "id": id, "method": "client.call", "params": params}))


@attack(
    "clients that receive megabytes and do not read",
    "closes each with 1013 when its send buffer exceeds the limit",
    "closed 1013",
    tolerated=["dropped"],
    memory=192,
    patient=True,
)
def clients_that_do_not_read(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        names = [name() for _ in range(20 if size.large else 4)]
        with target.backend(patience=30) as backend:
            connections = [target.client(one, buffer=NARROW) for one in names]
            for one in names:
                for _ in range(ENOUGH):
                    backend.send(_notify(one, LIMIT // 2))
            list(backend.texts())
            for connection in connections:
                seen[connection.read_outcome()] += 1
                connection.drop()
    return seen


@attack(
    "a backend that requests megabytes and does not read the responses",
    "stops reading from it; its calls time out, and other backends are not affected",
    "paused",
    memory=192,
    patient=True,
)
def backend_that_does_not_read(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        client_id = name()
        answer = '"' + "a" * (LIMIT // 2) + '"'
        with (
            target.client(client_id) as client,
            target.backend(buffer=NARROW) as backend,
            ThreadPoolExecutor(1) as pool,
        ):
            answering = pool.submit(_answer, client, answer)
            taken = 0
            for number in range(2000):
                data = _call(client_id, number, 10_000)
                got = backend.send_until_blocked(data, 1.0)
                taken += got
                if got < len(data):
                    break
            seen["paused" if got < len(data) else f"{taken >> 20} MiB taken"] += 1
            backend.drop()
            client.socket.shutdown(2)
            answering.result()
    return seen


def _answer(client: RawConnection, result: str) -> None:
    try:
        while text := client.text():
            client.send(frame(f'{{"jsonrpc":"2.0","id":{json.dumps(json.loads(text)["id"])},"result":{result}}}'))
    except (TimeoutError, OSError):
        pass


@attack(
    "a backend that subscribes to all messages and does not read them",
    "closes it with 1013 above 65 MiB of unread data, and resets the connection if the close is not read",
    "closed",
    memory=128,
    patient=True,
)
def subscriber_that_does_not_read(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    note = frame(b'{"jsonrpc":"2.0","method":"m","params":["' + b"a" * 60_000 + b'"]}') * 20
    kinds = {"kinds": ["connected", "disconnected", "message"]}
    for _ in size.rounds():
        clients = [target.client(name()) for _ in range(12)]
        with target.backend(buffer=NARROW) as backend:
            backend.send(frame(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "events.subscribe", "params": kinds})))
            backend.text()
            ends = time.monotonic() + 15
            while not backend.is_reset() and time.monotonic() < ends:
                for client in clients:
                    client.send_repeatedly(note, 1 << 20, 0.02)
            seen["closed" if backend.is_reset() or backend.read_outcome() == "closed 1013" else "still open"] += 1
        for client in clients:
            client.drop()
    return seen


@attack(
    "hundreds of list pages requested on one connection and not read",
    "answers as many as its buffer holds, and ends the connection after a minute",
    "paused",
    memory=32,
)
def list_that_is_not_read(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    lines = [f"Authorization: Bearer {target.backend_token}"] if target.backend_token else []
    page = request("GET", "/v1/clients?limit=1000", *lines)
    for _ in size.rounds():
        with RawConnection(target.backends, buffer=NARROW) as connection:
            data = page * 200_000
            taken = connection.send_until_blocked(data, max(0.5, size.seconds / 3))
            seen["paused" if taken < len(data) else f"{taken >> 20} MiB taken"] += 1
    return seen
