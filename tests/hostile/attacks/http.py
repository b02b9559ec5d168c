"""HTTP at the backend endpoint: ambiguous requests, endless requests, requests of browsers."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

from tests.hostile.attack import Cases, Seen, Size, Target, attack, cases, send_to_backend_port
from tests.hostile.raw_connection import RawConnection, name, opening, request

CALL = "/v1/clients/well-behaved/rpc"
JSON = "Content-Type: application/json"
BODY = b'{"jsonrpc":"2.0","id":1,"method":"echo","params":[1]}'
HTTP = "400 http"


def _post(*lines: str, body: bytes = b"", rest: bytes = b"") -> bytes:
    return request("POST", CALL, JSON, *lines, body=body) + rest


_CHUNKED = "Transfer-Encoding: chunked"
_HIDDEN = b"0\r\n\r\nDELETE /v1/clients/well-behaved HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

SMUGGLED: Cases = {
    "a length and chunks": (_post("Content-Length: 4", _CHUNKED, rest=_HIDDEN), HTTP),
    "chunks and a length": (_post(_CHUNKED, "Content-Length: 4", rest=_HIDDEN), HTTP),
    "two lengths": (_post("Content-Length: 4", "Content-Length: 60", rest=_HIDDEN), HTTP),
    "two lengths in one": (_post("Content-Length: 4, 60", rest=_HIDDEN), HTTP),
    "two encodings": (_post(_CHUNKED, "Transfer-Encoding: identity", rest=_HIDDEN), HTTP),
    "two encodings in one": (_post("Transfer-Encoding: gzip, chunked", rest=_HIDDEN), HTTP),
    "an encoding with a tab": (_post("Transfer-Encoding:\x0bchunked", rest=_HIDDEN), HTTP),
    "an encoding that is none": (_post("Transfer-Encoding: xchunked", rest=_HIDDEN), HTTP),
    "a blank before the colon": (_post("Transfer-Encoding : chunked", rest=_HIDDEN), HTTP),
    "a folded encoding": (_post("Transfer-Encoding:", " chunked", rest=_HIDDEN), HTTP),
    "a negative length": (_post("Content-Length: -1"), HTTP),
    "a length with a plus": (_post("Content-Length: +4"), HTTP),
    "a length in hexadecimal": (_post("Content-Length: 0x4"), HTTP),
    "a length with an underscore": (_post("Content-Length: 1_0"), HTTP),
    "a length of a million digits": (_post("Content-Length: " + "9" * 15_000), HTTP),
    "a length of 2^64": (_post("Content-Length: 18446744073709551616"), "413 -32006"),
    "a length of a gigabyte": (_post("Content-Length: 1073741824"), "413 -32006"),
    "chunks with HTTP/1.0": (_post(_CHUNKED, rest=_HIDDEN).replace(b"HTTP/1.1", b"HTTP/1.0", 1), HTTP),
    "a chunk of a negative size": (_post(_CHUNKED, rest=b"-1\r\n"), HTTP),
    "a chunk without a size": (_post(_CHUNKED, rest=b"\r\n\r\n"), HTTP),
    "a chunk in hexadecimal with 0x": (_post(_CHUNKED, rest=b"0x4\r\nabcd\r\n0\r\n\r\n"), HTTP),
    "an extension of a chunk without end": (_post(_CHUNKED, rest=b"1;" + b"a" * 70_000), HTTP),
    "a header without a colon": (_post("Nonsense", body=BODY), HTTP),
    "17 KiB of headers": (_post("X-A: " + "a" * 17_000, body=BODY), "431 headers"),
    "200 headers": (_post(*["X-A: 1"] * 200, body=BODY), "400 http"),
    "17 KiB of a request line": (request("GET", "/" + "a" * 17_000), "431 headers"),
    "HTTP/0.9": (b"GET /v1/clients\r\n\r\n", HTTP),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HTTP),
    "a ClientHello": (bytes.fromhex("1603010200010001fc0303") + b"a" * 40 + b"\r\n\r\n", HTTP),
}
smuggled_requests = cases(
    "smuggled-requests",
    "contradictory, false or invalid lengths and chunks; oversized headers",
    "400, 413 or 431, and closes the connection: no following request is executed",
    SMUGGLED,
    send_to_backend_port,
)

_FORM = "Content-Type: application/x-www-form-urlencoded"
BROWSERS: Cases = {
    **{
        f"an Origin at {path}": (request("GET", path, "Origin: https://evil.example"), "403 origin")
        for path in ("/v1/clients", "/v1/nodes", "/metrics", "/healthz", "/readyz", "/", "/v1/backend")
    },
    "an Origin of this machine": (request("GET", "/v1/nodes", "Origin: http://127.0.0.1"), "403 origin"),
    "the Origin null": (_post("Origin: null", body=BODY), "403 origin"),
    "an Origin at the WebSocket": (opening("", "Origin: http://localhost", target="/v1/backend"), "403 origin"),
    "an Origin at the relay": (opening("", "Origin: http://localhost", target="/v1/relay?client_id=x"), "400 request"),
    "another Host": (request("GET", "/v1/nodes", host="evil.example"), "403 host"),
    "another Host at the WebSocket": (
        opening("", target="/v1/backend").replace(b"127.0.0.1", b"evil.example"),
        "403 host",
    ),
    "a Host that begins well": (request("GET", "/v1/nodes", host="127.0.0.1.evil.example"), "403 host"),
    "a Host with a user": (request("GET", "/v1/nodes", host="127.0.0.1@evil.example"), "403 host"),
    "two Hosts": (request("GET", "/v1/nodes", "Host: evil.example"), "403 host"),
    "an empty Host": (request("GET", "/v1/nodes", host=" "), "403 host"),
    "a Host in decimal": (request("GET", "/v1/nodes", host="2130706433"), "403 host"),
    "a form": (request("POST", CALL, _FORM, body=BODY), "415 content_type"),
    "plain text": (request("POST", CALL, "Content-Type: text/plain", body=BODY), "415 content_type"),
    "plain text and JSON": (request("POST", CALL, "Content-Type: text/plain", JSON, body=BODY), "415 content_type"),
    "two types in one": (
        request("POST", CALL, "Content-Type: text/plain, application/json", body=BODY),
        "415 content_type",
    ),
    "no type": (request("POST", CALL, body=BODY), "415 content_type"),
    "a multipart form": (
        request("POST", CALL, "Content-Type: multipart/form-data; boundary=a", body=BODY),
        "415 content_type",
    ),
    "a preflight": (request("OPTIONS", CALL, "Origin: https://evil.example"), "403 origin"),
}
browsers = cases(
    "browsers",
    "requests that a web page can make a browser send: an Origin, another Host (DNS rebinding), forms, text/plain",
    "403 or 415",
    BROWSERS,
    send_to_backend_port,
)

METHODS: Cases = {
    **{
        method: (request(method, CALL), "405 method")
        for method in ("OPTIONS", "PUT", "PATCH", "CONNECT", "TRACE", "PROPFIND")
    },
    "absolute form": (request("GET", "http://127.0.0.1/v1/nodes"), "404 path"),
    "absolute form, elsewhere": (request("GET", "http://evil.example/v1/nodes"), "404 path"),
    "authority form": (request("CONNECT", "evil.example:443"), "404 path"),
    "asterisk form": (request("OPTIONS", "*"), "404 path"),
    "dots": (request("GET", "/v1/clients/../nodes"), "400 client_id"),
    "an escape in the path": (request("GET", "/v1/%6eodes"), "404 path"),
    "a NUL in the path": (request("GET", "/v1/clients/%00"), "400 client_id"),
    "a line break in the path": (request("GET", "/v1/clients/%0d%0aa"), "400 client_id"),
    "SQL": (request("GET", "/v1/clients/'%20OR%201=1--"), "400 client_id"),
    "a wildcard as the prefix": (request("GET", "/v1/clients?prefix=%25"), "400 prefix"),
    "SQL as the prefix": (request("GET", "/v1/clients?prefix='%20OR%20'1'='1"), "400 prefix"),
    "a limit without end": (request("GET", "/v1/clients?limit=1000000000"), "400 limit"),
    "a negative limit": (request("GET", "/v1/clients?limit=-1"), "400 limit"),
    "a timeout of NaN": (request("POST", CALL + "?timeout=nan", JSON, body=BODY), "400 -32600"),
    "a timeout of 1e999": (request("POST", CALL + "?timeout=1e999", JSON, body=BODY), "400 -32600"),
    "a timeout that is negative": (request("POST", CALL + "?timeout=-1", JSON, body=BODY), "400 -32600"),
    "one of the gateway's own methods": (
        request("POST", CALL, JSON, body=b'{"jsonrpc":"2.0","id":1,"method":"gateway.goaway"}'),
        "400 -32600",
    ),
    "a body 100,000 deep": (request("POST", CALL, JSON, body=b"[" * 100_000), "400 -32700"),
    "a body that is no UTF-8": (request("POST", CALL, JSON, body=b"\xff"), "400 -32700"),
    "a body that is one byte too large": (request("POST", CALL, JSON, body=b" " * (1 << 21)), "413 -32006"),
    "a node that is none": (request("POST", "/v1/nodes/%27%20OR%201=1/drain", JSON), "404 node"),
    "a shutdown of everything": (request("DELETE", "/v1/clients"), "405 method"),
}
odd_requests = cases(
    "odd-requests",
    "invalid methods and targets, ids and queries that are SQL or paths, bodies that are not JSON-RPC",
    "400, 404, 405 or 413",
    METHODS,
    send_to_backend_port,
)


@attack(
    "hundreds of POST bodies at one byte a second",
    "keeps the connections reserved for backends; answers 408 after 60 s",
    "held or refused",
    memory=32,
)
def slow_bodies(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    connections: list[RawConnection] = []
    for _ in range(min(size.many, 500)):
        connections.append(RawConnection(target.backends))
        connections[-1].send(_post("Content-Length: 100000", rest=b"{"))
    ends = time.monotonic() + max(1.0, size.seconds)
    while time.monotonic() < ends:
        for connection in connections:
            connection.send(b" ")
        time.sleep(0.5)
    for connection in connections:
        seen["held or refused"] += 1
        connection.drop()
    return seen


@attack(
    "endless chunked POST bodies, with chunks of one byte and of many",
    "400 if the chunks are too small, 413 if there are too many",
    "400 chunks",
    "413 -32006",
)
def endless_chunks(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        for chunk in (b"1\r\na\r\n" * 5000, b"10000\r\n" + b"a" * 65536 + b"\r\n"):
            with RawConnection(target.backends) as connection:
                sent = connection.send(_post(_CHUNKED))
                for _ in range(60):
                    sent = sent and connection.send(chunk)
                seen[connection.response()] += 1
    return seen


@attack(
    "thousands of requests, pipelined on one connection",
    "answers one after the other",
    "404 not_connected",
)
def pipelined(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    one = request("GET", f"/v1/clients/{name()}")
    for _ in size.rounds():
        with RawConnection(target.backends) as connection:
            many = 2000 if size.large else 500
            connection.send(one * many)
            seen.update(connection.response() for _ in range(many))
    return seen


@attack(
    "thousands of health checks, pipelined on four connections",
    "answers one after the other",
    "200",
)
def pipelined_health(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    many = 1500
    for _ in size.rounds():
        connections = [RawConnection(target.backends) for _ in range(4 if size.large else 1)]
        for connection in connections:
            connection.send(request("GET", "/healthz") * many)
        for connection in connections:
            seen.update(connection.response() for _ in range(many))
            connection.drop()
    return seen


@attack("the largest page of the list of clients, in a loop", "answers each", "200", memory=32)
def lists(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    with contextlib.ExitStack() as stack:
        for _ in range(min(size.many, 1000)):
            stack.enter_context(target.client(name()))
        page = request("GET", "/v1/clients?limit=1000")
        with RawConnection(target.backends) as connection:
            for _ in size.rounds():
                connection.send(page)
                seen[connection.response()] += 1
    return seen


@attack(
    "notifications to all clients by their prefix, in a loop",
    "answers each after sending, at a limited rate",
    "202",
    memory=32,
)
def prefixes(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    note = b'{"jsonrpc":"2.0","method":"m","params":["' + b"a" * 1000 + b'"]}'
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(target.client(name())) for _ in range(min(size.many, 1000))]
        with RawConnection(target.backends, timeout=30) as connection:
            for _ in size.rounds():
                connection.send(request("POST", "/v1/clients?prefix=evil-", JSON, body=note))
                seen[connection.response()] += 1
                for each in connections:
                    each.read_all()
    return seen


@attack(
    "more silent connections to the backend endpoint than it accepts",
    "drops each after 5 s, or at once; answers health checks in the meantime",
    "dropped",
    "health: 200",
    patient=True,
)
def silent_backends(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    connections: list[RawConnection] = []
    ends = time.monotonic() + max(6.0, size.seconds)
    while time.monotonic() < ends:
        for _ in range((1500 if size.large else 800) - len(connections)):
            with contextlib.suppress(OSError):
                connections.append(RawConnection(target.backends))
        for _ in range(5):
            seen[f"health: {_health(target)}"] += 1
            time.sleep(0.1)
        for connection in connections:
            connection.read_all()
            if not connection.alive:
                seen["dropped"] += 1
                connection.drop()
        connections = [connection for connection in connections if connection.alive]
    for connection in connections:
        connection.drop()
    return seen


def _health(target: Target) -> str:
    try:
        with RawConnection(target.backends) as connection:
            connection.send(request("GET", "/healthz"))
            return connection.response()
    except OSError:
        return "reset"
