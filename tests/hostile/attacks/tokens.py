"""Guessed tokens, tokens of other clients, duplicate or misplaced tokens; and evictions."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from typing import Any

from tests.hostile.attack import Seen, Size, Target, attack
from tests.hostile.raw_connection import RawConnection, opening, request, source

EVIL = "evil-1"


def connect_response(target: Target, client_id: str, *lines: str, path: str = "") -> str:
    """Open a connection with header lines; return the response."""
    with target.connect() as connection:
        connection.send(opening(client_id, *lines, target=path))
        return connection.response()


@attack(
    "guessed tokens at full speed, from one address",
    "401; above --openings-per-address 429, or drops the connection",
    "401 token",
    tolerated=["503 rate", "dropped"],
    node="tokens",
)
def guessed_tokens(target: Target, size: Size) -> Seen:
    return _guess(target, size, itertools.repeat("127.0.0.4"))


@attack("guessed tokens, each from a different address", "401", "401 token", node="tokens")
def guessed_tokens_from_many(target: Target, size: Size) -> Seen:
    return _guess(target, size, (source() for _ in itertools.count()))


def _guess(target: Target, size: Size, sources: Any) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        connections = [RawConnection(target.clients, source_address=next(sources)) for _ in range(16)]
        for connection in connections:
            connection.send(opening(EVIL, f"Authorization: Bearer {os.urandom(16).hex()}"))
        for connection in connections:
            seen[connection.response()] += 1
            connection.drop()
    return seen


@attack(
    "guessed backend tokens at full speed",
    "401 to each",
    "401 token",
    node="tokens",
)
def guessed_backend_tokens(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        with RawConnection(target.backends) as connection:
            one = request("GET", "/v1/clients", f"Authorization: Bearer {os.urandom(16).hex()}")
            connection.send(one * 50)
            seen.update(connection.response() for _ in range(50))
    return seen


@attack(
    "no token, two different ones, one in the query, as Basic, of 15 KiB, of a backend, of another client",
    "401; 403 for the token of another client; accepts the valid token",
    "401 token",
    "403 identity",
    "101",
    node="tokens",
)
def wrong_tokens(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    mine, backend = target.token, target.backend_token
    bearer = f"Authorization: Bearer {mine}"
    for _ in size.rounds():
        for lines in (
            [],
            ["Authorization: Bearer"],
            ["Authorization: Bearer "],
            [f"Authorization: Basic {mine}"],
            [f"Authorization: {mine}"],
            [f"Authorization: Bearer {mine}x"],
            [f"Authorization: Bearer {mine[:-1]}"],
            [f"Authorization: Bearer {mine} {mine}"],
            [f"Authorization: Bearer {mine}, Bearer {mine}"],
            [f"Authorization: Bearer {backend}"],
            [f"Authorization: Bearer {'a' * 15_000}"],
            [bearer, "Sec-WebSocket-Protocol: wsgateway.bearer.other"],
            ["Sec-WebSocket-Protocol: wsgateway.bearer.a, wsgateway.bearer.b"],
            [f"Cookie: token={mine}"],
            [f"Proxy-Authorization: Bearer {mine}"],
        ):
            seen[connect_response(target, EVIL, *lines)] += 1
        for query in ("token", "access_token", "bearer", "authorization"):
            seen[connect_response(target, EVIL, path=f"/v1/connect?client_id={EVIL}&{query}={mine}")] += 1
        seen[connect_response(target, "well-behaved", bearer)] += 1
        seen[connect_response(target, "well-behaved%00", bearer).replace("400 client_id", "403 identity")] += 1
    seen[connect_response(target, EVIL, bearer)] += 1
    return seen


@attack(
    "a client token, and no token, at every path of the backend endpoint",
    "401, except for /healthz and /readyz",
    "401 token",
    "200",
    node="tokens",
)
def client_as_backend(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    paths = (
        "/v1/clients",
        "/v1/clients/well-behaved",
        "/v1/nodes",
        "/metrics",
        "/v1/backend",
        "/x",
        "/healthz/",
        "//healthz",
    )
    for _ in size.rounds():
        for lines in (
            [f"Authorization: Bearer {target.token}"],
            [],
            [f"Authorization: bearer {target.backend_token}x"],
        ):
            for path in (*paths, "/healthz", "/readyz", "/healthz?x=/v1/clients"):
                with RawConnection(target.backends) as connection:
                    connection.send(request("GET", path, *lines))
                    seen[connection.response()] += 1
            with RawConnection(target.backends) as connection:
                connection.send(opening("", *lines, target="/v1/backend"))
                seen[connection.response()] += 1
            with RawConnection(target.backends) as connection:
                connection.send(request("DELETE", "/v1/clients/well-behaved", *lines))
                seen[connection.response()] += 1
    return seen


@attack(
    "POSTs without a token, whose bodies never arrive",
    "401 before the body",
    "401 token",
    node="tokens",
)
def bodies_without_tokens(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        for length in ("Content-Length: 100000", "Transfer-Encoding: chunked"):
            connections = [RawConnection(target.backends, timeout=4) for _ in range(size.many // 8)]
            for connection in connections:
                connection.send(request("POST", "/v1/clients/x/rpc", "Content-Type: application/json", length) + b"1")
            for connection in connections:
                seen[connection.response()] += 1
                connection.drop()
    return seen
