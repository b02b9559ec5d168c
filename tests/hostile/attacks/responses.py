"""Unexpected responses, and responses to calls of other clients."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tests.hostile.attack import Seen, Size, Target, attack
from tests.hostile.attacks.frames import PAUSED
from tests.hostile.attacks.messages import pour
from tests.hostile.raw_connection import RawConnection, frame, name


def _call(backend: RawConnection, client_id: str, timeout: float = 5.0, id: int = 1) -> None:
    params = {"client": client_id, "method": "secret", "timeout": timeout}
    backend.send(frame(json.dumps({"jsonrpc": "2.0", "id": id, "method": "client.call", "params": params})))


def _response(id: object, **members: Any) -> bytes:
    return frame(json.dumps({"jsonrpc": "2.0", "id": id, **members}))


def _remaining_texts(connection: RawConnection) -> list[str]:
    """Return the received texts; all sent data has been handled by then."""
    return list(connection.texts())


@attack("endless responses to calls that do not exist", "drops and counts them, at the rate limit", PAUSED)
def strange_responses(target: Target, size: Size) -> Seen:
    message = b'{"jsonrpc":"2.0","id":"00000000-0000-4000-8000-000000000000","result":1}'
    return pour(target, size, message, 8 if size.large else 2)


@attack(
    "a response to a call with its valid UUID, from another client",
    "does not match it: only the response of the called client counts",
    "the right answer",
)
def stolen_uuids(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        victim, thief = name(), name()
        with target.client(victim) as client, target.client(thief) as other, target.backend() as backend:
            _call(backend, victim)
            uuid = json.loads(client.text())["id"]
            for forged in (_response(uuid, result="stolen"), _response(uuid, error={"code": 1, "message": "stolen"})):
                other.send(forged)
            other.send(frame(b"[" + json.dumps({"jsonrpc": "2.0", "id": uuid, "result": "stolen"}).encode() + b"]"))
            # Responses of which only the id can be parsed.
            other.send(frame(f'{{"jsonrpc":"2.0","id":"{uuid}","result":[}}'))
            _remaining_texts(other)
            # A response from another backend, or from one that was not called, does not count either.
            backend.send(_response(uuid, result="stolen"))
            _remaining_texts(backend)
            client.send(_response(uuid, result="mine"))
            answer = json.loads(backend.text())
            seen["the right answer" if answer.get("result") == "mine" else f"wrong: {answer}"] += 1
    return seen


@attack(
    "a response from a newer connection of the same client to a call on the older one",
    "fails the call when the older connection is replaced, and drops the response",
    "connection lost",
)
def answers_of_a_successor(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        victim = name()
        with target.client(victim) as client, target.backend() as backend:
            _call(backend, victim)
            uuid = json.loads(client.text())["id"]
            with target.client(victim) as newer:
                newer.send(_response(uuid, result="stolen"))
                code = json.loads(backend.text()).get("error", {}).get("code")
                seen["connection lost" if code == -32003 else f"answered {code}"] += 1
    return seen


@attack(
    "duplicate responses, with both result and error, in a batch, or after the timeout",
    "accepts the first valid one, and drops the rest",
    "first",
    "broken",
    "late",
)
def odd_responses(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        victim = name()
        with target.client(victim) as client, target.backend() as backend:
            _call(backend, victim)
            uuid = json.loads(client.text())["id"]
            client.send(_response(uuid, result="first") + _response(uuid, result="second"))
            seen[str(json.loads(backend.text()).get("result"))] += 1
            _call(backend, victim, id=2)
            uuid = json.loads(client.text())["id"]
            client.send(_response(uuid, result=1, error={"code": 1, "message": "both"}))
            answer = json.loads(backend.text())
            seen["broken" if answer.get("error", {}).get("code") == -32003 else f"wrong: {answer}"] += 1
            _call(backend, victim, timeout=0.05, id=3)
            uuid = next(text["id"] for text in map(json.loads, iter(client.text, "")) if "method" in text)
            answer = json.loads(backend.text())
            client.send(_response(uuid, result="too late"))
            _remaining_texts(client)
            late = _remaining_texts(backend)
            right = answer.get("error", {}).get("code") == -32002 and not late
            seen["late" if right else f"wrong: {answer} {late}"] += 1
    return seen


@attack(
    "more calls to a backend than it answers",
    "-32005 above --max-calls-per-client; -32003 to the rest when the backend disconnects",
    "error -32005",
    "error -32003",
)
def unanswered_calls(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        with target.client(name()) as client:
            with target.backend() as backend:
                backend.send(frame('{"jsonrpc":"2.0","id":1,"method":"upstream.serve"}'))
                backend.text()
                for number in range(180):
                    client.send(frame(json.dumps({"jsonrpc": "2.0", "id": number, "method": "m"})))
                seen.update(map(_code, client.texts()))
            seen.update(_code(client.text()) for _ in range(128))
    return seen


def _code(text: str) -> str:
    return f"error {json.loads(text)['error']['code']}"
