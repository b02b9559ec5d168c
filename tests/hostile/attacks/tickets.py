"""Forged, altered, expired, replayed and misplaced tickets, and tickets for other clients and nodes."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable

from gateway.auth.interface import AuthMethod, Identity
from gateway.auth.tickets import Tickets
from tests.hostile.attack import Seen, Size, Target, attack
from tests.hostile.raw_connection import RawConnection, frame, name, opening

REFUSED = "401 ticket"


def _ticket(
    target: Target,
    client_id: str,
    *,
    secret: bytes = b"",
    node_id: str = "",
    method: AuthMethod = AuthMethod.TOKENS,
    expires_at: float = 0.0,
    now: Callable[[], float] = time.time,
) -> str:
    """Issue a ticket as another node would: valid by default."""
    issuer = Tickets(str(uuid.uuid4()), lambda: secret or target.secret, wall_clock=now)
    return issuer.issue(Identity(client_id, expires_at, method=method), node_id or target.node_id)


def _path(client_id: str, ticket: str) -> str:
    return f"/v1/connect?client_id={client_id}&wsgateway_hop=1&wsgateway_ticket={ticket}"


def _response(target: Target, path: str, *lines: str) -> str:
    with target.connect() as connection:
        connection.send(opening("", *lines, target=path))
        return connection.response()


def _altered(ticket: str) -> list[str]:
    """Return variants of a ticket, each with one part changed, and parts of it."""
    parts = ticket.split(".")
    other = [
        "v2",
        "jwt",
        str(int(parts[2]) + 3600),
        "9999999999",
        f"{int(parts[4], 16) ^ 1:032x}",
        f"{int(parts[5], 16) ^ 1:064x}",
    ]
    changed = [".".join([*parts[:n], other[n], *parts[n + 1 :]]) for n in range(6)]
    cut = [".".join(parts[:n]) for n in range(6)]
    odd = [f"{ticket}.", ticket.upper(), f"{ticket}%20", ticket[:-1], ticket.replace(".", "%2e"), "v1." + "a." * 4000]
    return [*changed, *cut, *odd]


@attack(
    "tickets that are forged, altered, expired, replayed, or for another client, node or --auth",
    "401; a valid ticket is accepted once, for its client",
    REFUSED,
    "101",
    node="tokens",
)
def forged_tickets(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        client_id = name()
        ticket = _ticket(target, client_id)
        tries = [
            *_altered(ticket),
            _ticket(target, client_id, secret=b"another secret than theirs"),
            _ticket(target, client_id, node_id=str(uuid.uuid4())),
            _ticket(target, "well-behaved"),
            _ticket(target, client_id, method=AuthMethod.JWT),
            _ticket(target, client_id, expires_at=time.time() - 1),
            _ticket(target, client_id, now=lambda: time.time() - 32),
            _ticket(target, client_id, now=lambda: time.time() + 3600),
        ]
        for one in tries:
            seen[_response(target, _path(client_id, one))] += 1
        valid = _path(client_id, ticket)
        for path in (
            _path("well-behaved", ticket),
            _path(f"{client_id}0", ticket),
            valid.replace("client_id=", "client="),
            valid.replace("wsgateway_hop=1", "wsgateway_hop=0"),
            f"{valid}&wsgateway_ticket={ticket}",
        ):
            seen[_response(target, path)] += 1
        seen[_response(target, valid)] += 1
        for _ in range(3):
            replayed = _response(target, valid)
            seen[replayed if replayed == REFUSED else f"a replay is answered {replayed}"] += 1
    return seen


@attack(
    "one ticket on sixteen connections at the same time",
    "accepts one of them; 401 to the others",
    REFUSED,
    "101",
    node="tokens",
)
def raced_tickets(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        client_id = name()
        path = _path(client_id, _ticket(target, client_id))
        connections = [target.connect() for _ in range(16)]
        for connection in connections:
            connection.send(opening("", target=path))
        responses = Counter(connection.response() for connection in connections)
        for connection in connections:
            connection.drop()
        if responses["101"] != 1:
            seen[f"{responses['101']} are accepted"] += 1
        seen.update(responses)
    return seen


@attack(
    "valid tickets as a token, in a header, in gateway.token, and at the backend endpoint",
    "401; ignored beside a valid token, which does not use them up",
    "401 token",
    "401 peer",
    "101",
    node="tokens",
    tolerated=["429 replaced"],
)
def misplaced_tickets(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    bearer = f"Authorization: Bearer {target.token}"
    for _ in size.rounds():
        ticket = _ticket(target, "evil-1")
        plain = "/v1/connect?client_id=evil-1&wsgateway_hop=1"
        for lines in (
            [f"Authorization: Bearer {ticket}"],
            [f"Sec-WebSocket-Protocol: wsgateway.bearer.{ticket}"],
            [f"Wsgateway-Ticket: {ticket}"],
            [f"Cookie: wsgateway_ticket={ticket}"],
        ):
            seen[_response(target, plain, *lines)] += 1
        # A token that is refused is not made up for by a ticket.
        seen[_response(target, _path("evil-1", ticket), "Authorization: Bearer wrong")] += 1
        for path in ("/v1/backend?", "/v1/relay?address=unix&until=0&"):
            with RawConnection(target.backends) as connection:
                query = _path("evil-1", ticket).partition("?")[2]
                connection.send(opening("", target=path + query))
                seen[connection.response()] += 1
        with target.connect() as connection:
            connection.send(opening("", bearer, target=_path("evil-1", ticket)))
            seen[connection.response()] += 1
            renewal = f'{{"jsonrpc":"2.0","id":1,"method":"gateway.token","params":{{"token":"{ticket}"}}}}'
            connection.send(frame(renewal))
            answer = connection.text()
            # Of many in a minute, only some are verified.
            if '"code":-32602' not in answer and '"code":-32005' not in answer:
                seen[f"as a new token it is answered {answer}"] += 1
        seen[_response(target, _path("evil-1", ticket))] += 1
    return seen
