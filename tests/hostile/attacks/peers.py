"""Forged, altered, expired and replayed node credentials, at both endpoints."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable

from gateway.cluster.auth import PeerAuth
from tests.hostile.attack import Seen, Size, Target, attack
from tests.hostile.raw_connection import RawConnection, frame, name, opening

LINK, RELAY = "/v1/backend", "/v1/relay"
REFUSED = "401 peer"


def credentials(target: Target, secret: bytes = b"", now: Callable[[], float] = time.time, me: str = "") -> PeerAuth:
    """Make credentials of a node: valid by default, or with another secret or time."""
    return PeerAuth(me or str(uuid.uuid4()), lambda: secret or target.secret, now)


def _connect_response(target: Target, path: str, signed: str, *lines: str) -> str:
    with RawConnection(target.backends) as connection:
        connection.send(opening("", f"Authorization: {signed}", *lines, target=path))
        return connection.response()


def _relay_of(client_id: str, address: str = "192.0.2.7:4711", until: int = 0) -> str:
    return f"{RELAY}?client_id={client_id}&address={address.replace(':', '%3A')}&until={until}"


def _relay(target: Target, client_id: str) -> tuple[str, str]:
    """Return the path of a relay, and valid credentials for it."""
    path = _relay_of(client_id)
    return path, credentials(target).sign(target.node_id, "GET", path, client_id, "192.0.2.7:4711")


def _altered(signed: str) -> list[str]:
    """Return variants of valid credentials, each with one part changed."""
    scheme, _, rest = signed.partition(" ")
    parts = rest.split(".")
    other = [
        "v2",
        str(uuid.uuid4()),
        str(uuid.uuid4()),
        str(int(parts[3]) + 1),
        f"{int(parts[4], 16) ^ 1:032x}",
        f"{int(parts[5], 16) ^ 1:064x}",
    ]
    changed = [".".join([*parts[:n], other[n], *parts[n + 1 :]]) for n in range(6)]
    cut = [".".join(parts[:n]) for n in range(6)]
    odd = [rest + ".", rest.upper(), rest + " ", rest[:-1], parts[5], "", "v1." + "a." * 5000]
    return [f"{scheme} {one}" for one in (*changed, *cut, *odd)]


@attack(
    "peer connections with forged, altered, expired, future or replayed credentials, or credentials for another node",
    "401; valid credentials are accepted once",
    REFUSED,
    # A valid signature, for another node.
    "401 wrong_node",
    "101",
    tolerated=["400 header"],
)
def forged_links(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        signed = credentials(target).sign(target.node_id, "GET", LINK)
        tries = [
            *_altered(signed),
            credentials(target, secret=b"another secret than theirs").sign(target.node_id, "GET", LINK),
            credentials(target, now=lambda: time.time() - 61).sign(target.node_id, "GET", LINK),
            credentials(target, now=lambda: time.time() + 3600).sign(target.node_id, "GET", LINK),
            credentials(target, me=target.node_id).sign(target.node_id, "GET", LINK),
            credentials(target).sign(str(uuid.uuid4()), "GET", LINK),
            credentials(target).sign(target.node_id, "POST", LINK),
            credentials(target).sign(target.node_id, "GET", "/v1/relay"),
            credentials(target).sign(target.node_id, "GET", LINK, "well-behaved", "192.0.2.7:1"),
            "Bearer " + signed.partition(" ")[2],
        ]
        for one in tries[:-1]:
            if one.strip() != signed:
                seen[_connect_response(target, LINK, one)] += 1
        # A request with an Origin is treated as a browser's.
        browser = credentials(target).sign(target.node_id, "GET", LINK)
        seen[_connect_response(target, LINK, browser, "Origin: https://a.example").replace("403 origin", REFUSED)] += 1
        seen[_connect_response(target, LINK, signed)] += 1
        replayed = _connect_response(target, LINK, signed)
        seen[replayed if replayed == REFUSED else f"a replay is answered {replayed}"] += 1
    return seen


@attack(
    "relays without credentials, or with those of another client, address, path, node or time",
    "401; valid credentials are accepted once, for the signed client",
    REFUSED,
    "101",
    tolerated=["400 header"],
)
def forged_relays(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        client_id = name()
        path, signed = _relay(target, client_id)
        others = (
            _relay_of("well-behaved"),
            _relay_of(client_id, address="10.0.0.1:1"),
            _relay_of(client_id, until=9999999999),
            path + "&wsgateway_hop=1",
            path + "&client_id2=well-behaved",
        )
        for one in (*_altered(signed), "Bearer x", "Basic eDp4"):
            if one.strip() != signed:
                seen[_connect_response(target, path, one)] += 1
        for other in others:
            seen[_connect_response(target, other, signed)] += 1
        for secret, now, to in (
            (b"another secret than theirs", time.time, target.node_id),
            (b"", lambda: time.time() - 61, target.node_id),
            (b"", time.time, str(uuid.uuid4())),
        ):
            one = credentials(target, secret, now).sign(to, "GET", path, client_id, "192.0.2.7:4711")
            seen[_connect_response(target, path, one)] += 1
        with RawConnection(target.backends) as connection:
            strange = ("Wsgateway-Client-Id: well-behaved", "X-Forwarded-For: 10.0.0.1")
            connection.send(opening("", f"Authorization: {signed}", *strange, target=path))
            seen[connection.response()] += 1
            seen.update(_who(target, client_id))
            replayed = _connect_response(target, path, signed)
            seen[replayed if replayed == REFUSED else f"a replay is answered {replayed}"] += 1
    return seen


def _who(target: Target, client_id: str) -> list[str]:
    with target.backend() as backend:
        backend.send(frame(f'{{"jsonrpc":"2.0","id":1,"method":"client.get","params":{{"client":"{client_id}"}}}}'))
        event = backend.text()
    return [] if '"192.0.2.7:4711"' in event else [f"taken for another: {event}"]


@attack(
    "node credentials at the backend and client endpoints",
    "401 over HTTP; ignored at the client endpoint",
    "401 peer",
    "404 path",
)
def misplaced_credentials(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        for path in ("/v1/clients", "/v1/nodes", "/metrics", "/v1/clients/well-behaved"):
            signed = credentials(target).sign(target.node_id, "GET", path)
            with RawConnection(target.backends) as connection:
                connection.send(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {signed}\r\n\r\n".encode())
                seen[connection.response()] += 1
        path, signed = _relay(target, "well-behaved")
        with target.connect() as connection:
            connection.send(opening("", f"Authorization: {signed}", target=path))
            seen[connection.response()] += 1
    return seen
