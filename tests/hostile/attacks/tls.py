"""TLS: floods of handshakes, incomplete handshakes, and data that is not TLS."""

from __future__ import annotations

import contextlib
import itertools
import ssl
import time
import warnings
from collections import Counter
from collections.abc import Iterator

from tests.hostile.attack import Seen, Size, Target, attack
from tests.hostile.attacks.storms import held, many_sources, one_source
from tests.hostile.raw_connection import RawConnection, opening, request

#: the first bytes of a ClientHello that announces 500 more
_HALF = bytes.fromhex("16030101f4010001f00303")


def _context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if version is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            # Deprecated versions are the purpose.
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
    return context


def _handshake(target: Target, here: str, context: ssl.SSLContext) -> str:
    with RawConnection(("127.0.0.1", target.tls_port), source_address=here) as connection:
        try:
            # Not wrap_socket(), which takes over the socket.
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(incoming, outgoing)
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                    connection.send(outgoing.read())
                    return tls.version() or "none"
                connection.send(outgoing.read())
                data = connection.socket.recv(16384)
                if not data:
                    return "refused"
                incoming.write(data)
        except TimeoutError:
            return "nothing"
        except (ssl.SSLError, OSError):
            return "refused"


def _storm(target: Target, size: Size, sources: Iterator[str]) -> Seen:
    seen: Seen = Counter()
    context = _context()
    for _ in size.rounds():
        for _ in range(16):
            seen[_handshake(target, next(sources), context)] += 1
    return seen


@attack(
    "TLS handshakes at full speed, from one address, followed by silence",
    "completes each, up to --openings-per-address",
    "TLSv1.3",
    tolerated=["refused"],
    memory=32,
)
def tls_handshakes(target: Target, size: Size) -> Seen:
    return _storm(target, size, one_source())


@attack(
    "TLS handshakes at full speed, each from a different address, followed by silence",
    "completes each",
    "TLSv1.3",
    memory=32,
)
def tls_handshakes_from_many(target: Target, size: Size) -> Seen:
    return _storm(target, size, many_sources())


@attack(
    "half a ClientHello, from many addresses, followed by silence",
    "drops each after 5 s",
    "dropped",
    tolerated=["503 openings"],
    memory=192,
    patient=True,
)
def half_hellos(target: Target, size: Size) -> Seen:
    return held(target, size, many_sources(), lambda number: b"" if number else _HALF, port=target.tls_port)


@attack(
    "TLS 1.0 and 1.1, HTTP without TLS, and random bytes, at a TLS endpoint",
    "refuses the handshake",
    "refused",
    patient=True,
)
def no_tls(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            seen[_handshake(target, next(many_sources()), _context(version))] += 1
        for data in (
            opening("x"),
            request("GET", "/"),
            b"\x16\x03\x01\x00\x05hello",
            b"\x80\x2e\x01\x00\x02",
            b"\x00" * 100,
        ):
            with RawConnection(("127.0.0.1", target.tls_port), source_address=next(many_sources())) as connection:
                connection.send(data)
                seen["refused" if connection.wait_closed(7) else "still there"] += 1
    return seen


@attack("TLS records of one byte, in the slowest possible handshake", "drops it after 5 s", "dropped", patient=True)
def slow_hello(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        with RawConnection(("127.0.0.1", target.tls_port), source_address=next(many_sources())) as connection:
            began = time.monotonic()
            for byte in itertools.chain(_HALF, itertools.repeat(0)):
                if time.monotonic() - began > 9 or not connection.send(bytes([byte])):
                    break
                time.sleep(0.25)
            seen["dropped" if time.monotonic() - began < 9 and connection.wait_closed(1) else "still there"] += 1
    return seen
