"""Frames that violate RFC 6455, and floods of valid frames."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.hostile.attack import Cases, Seen, Size, Target, attack, cases
from tests.hostile.raw_connection import BINARY, CLOSE, CONTINUATION, PING, PONG, RawConnection, close, frame, name

#: bytes; the default of --max-message-size
LIMIT = 1048576
#: bytes that the kernel buffers between attacker and node hold at most, and a number above that
BUFFERS = 16 << 20
#: the outcome for a client that sends too much: the node stops reading from it
PAUSED = "paused at its socket"


def ended(target: Target, data: bytes) -> str:
    """Send bytes as a client; return how the connection ends."""
    with target.client(name()) as connection:
        connection.send(data)
        return connection.read_outcome()


LENGTHS: Cases = {
    "2^30": (frame(b"abc", length=1 << 30), "closed 1009"),
    "2^30 in a binary frame": (frame(b"abc", BINARY, length=1 << 30), "closed 1003"),
    "2^63 - 1": (frame(b"abc", length=(1 << 63) - 1), "closed 1009"),
    "2^63": (frame(b"abc", length=1 << 63), "closed 1002"),
    "2^64 - 1": (frame(b"abc", length=(1 << 64) - 1), "closed 1002"),
    "one more than may be": (frame(b"abc", length=LIMIT + 1), "closed 1009"),
    "one more than may be, all of it": (frame(b"a" * (LIMIT + 1)), "closed 1009"),
    "one more than may be, in two frames": (
        frame(b"a" * LIMIT, fin=False) + frame(b"a", CONTINUATION),
        "closed 1009",
    ),
    "2^30 in the second frame": (frame(b"a", fin=False) + frame(b"a", CONTINUATION, length=1 << 30), "closed 1009"),
    "5 in 16 bits": (frame(b"abcde", form=16), "closed 1002"),
    "5 in 64 bits": (frame(b"abcde", form=64), "closed 1002"),
    "125 in 16 bits": (frame(b"a" * 125, form=16), "closed 1002"),
    "65535 in 64 bits": (frame(b"a" * 65535, form=64), "closed 1002"),
}
lengths = cases(
    "lengths",
    "frame headers that announce a gigabyte or more, non-minimal lengths, messages one byte above the limit",
    "closes with 1009 or 1002 at the header",
    LENGTHS,
    ended,
)

BROKEN: Cases = {
    "compressed": (frame(b"\xaa\x56\x4a\x01\x00", rsv=4), "closed 1002"),
    "RSV2": (frame(b"a", rsv=2), "closed 1002"),
    "RSV3": (frame(b"a", rsv=1), "closed 1002"),
    "a compressed ping": (frame(b"a", PING, rsv=4), "closed 1002"),
    **{f"opcode {opcode}": (frame(b"a", opcode), "closed 1002") for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "no mask": (frame(b"{}", mask=False), "closed 1002"),
    "a ping without a mask": (frame(b"a", PING, mask=False), "closed 1002"),
    "a close without a mask": (frame(b"\x03\xe8", CLOSE, mask=False), "closed 1002"),
    "no mask on the second frame": (frame(b"a", fin=False) + frame(b"a", CONTINUATION, mask=False), "closed 1002"),
    "a continuation of nothing": (frame(b"a", CONTINUATION), "closed 1002"),
    "a text within a text": (frame(b"a", fin=False) + frame(b"b"), "closed 1002"),
    "a ping in two frames": (frame(b"a", PING, fin=False), "closed 1002"),
    "a close in two frames": (frame(b"\x03", CLOSE, fin=False), "closed 1002"),
    "a ping of 126 bytes": (frame(b"a" * 126, PING), "closed 1002"),
    "a ping of 2^30 bytes": (frame(b"a", PING, length=1 << 30), "closed 1002"),
    "a close of 126 bytes": (frame(b"\x03\xe8" + b"a" * 124, CLOSE), "closed 1002"),
    "binary": (frame(b"{}", BINARY), "closed 1003"),
    "empty binary": (frame(b"", BINARY), "closed 1003"),
    "binary in two frames": (frame(b"{", BINARY, fin=False) + frame(b"}", CONTINUATION), "closed 1003"),
}
broken_frames = cases(
    "broken-frames",
    "compressed and unmasked frames, reserved bits and opcodes, invalid fragmentation, binary messages",
    "closes with 1002, or 1003 for binary",
    BROKEN,
    ended,
)

CLOSES: Cases = {
    **{
        f"{code}": (close(code), "closed 1002") for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)
    },
    **{f"{code}": (close(code), "closed 1000") for code in (1000, 1001, 3000, 4999)},
    "no code": (frame(b"", CLOSE), "closed 1000"),
    "one byte": (frame(b"\x03", CLOSE), "closed 1002"),
    "a reason that is no UTF-8": (close(1000, b"\xff"), "closed 1007"),
    "a reason with a surrogate": (close(1000, b"\xed\xa0\x80"), "closed 1007"),
    "half a character as the reason": (close(1000, b"\xe2\x82"), "closed 1007"),
    "a reason with a log line": (close(1000, b"x\r\n2026-01-01 [-] all is well\x1b[2J"), "closed 1000"),
    "data behind it": (close(1000) + frame(b"\xff" * 70000) + frame(b"a", 3), "closed 1000"),
    "two of them": (close(1000) + close(4999), "closed 1000"),
}
closes = cases(
    "closes",
    "all kinds of close codes, reasons that are invalid UTF-8 or contain log lines, data after a close frame",
    "answers with 1000, 1002 or 1007, and ends the connection",
    CLOSES,
    ended,
)

_TEXT = '{"jsonrpc":"2.0","method":"m","params":["ä€😀"]}'.encode()
_BAD_BYTES = (
    b"\xff",
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xed\xa0\x80",
    b"\xed\xbf\xbf",
    b"\xf4\x90\x80\x80",
    b"\x80",
    b"\xf8",
)
_AT = sorted({0, 1, 20, 40, *range(len(_TEXT) - 14, len(_TEXT) + 1)})
UTF8: Cases = {
    **{
        f"{bad.hex()} at {at}": (frame(_TEXT[:at] + bad + _TEXT[at:]), "closed 1007")
        for bad in _BAD_BYTES
        for at in _AT
    },
    **{
        f"{bad.hex()} at {at} in two frames": (
            frame(_TEXT[:at] + bad[:1], fin=False) + frame(bad[1:] + _TEXT[at:], CONTINUATION),
            "closed 1007",
        )
        for bad in _BAD_BYTES
        for at in _AT[::4]
    },
    "half a character at the end": (frame(_TEXT + b"\xe2\x82"), "closed 1007"),
    "half a character at the end of the last frame": (
        frame(_TEXT, fin=False) + frame(b"\xf0\x9f\x98", CONTINUATION),
        "closed 1007",
    ),
}
invalid_utf8 = cases(
    "invalid-utf8",
    "invalid UTF-8 in text messages, at every position, in one frame and in two",
    "closes with 1007",
    UTF8,
    ended,
)


def flooded(target: Target, size: Size, data: bytes, *, first: bytes = b"", reads: bool = True) -> str:
    """Send ``data`` repeatedly, as fast as possible, as one client; return the outcome."""
    data *= 1 + (1 << 18) // len(data)
    before = target.pauses()
    with target.client(name()) as connection:
        connection.send(first)
        stuck = not connection.send_repeatedly(data, BUFFERS)
        for _ in size.rounds():
            if reads:
                connection.read_all()
            stuck |= connection.alive and not connection.send_repeatedly(data, BUFFERS, 0.02)
        # A busy node does not read either: check that it paused reading.
        if not reads or connection.alive:
            return PAUSED if stuck and target.pauses() > before else "never paused"
    return "closed"


def _by_some(target: Target, size: Size, data: bytes, **kwargs: Any) -> Seen:
    """Run eight clients at once; one if the attack is small."""
    if not size.large:
        return Counter([flooded(target, size, data, **kwargs)])
    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(lambda _: flooded(target, size, data, **kwargs), range(8)))


@attack("endless pings", "throttles reading to --messages-per-client", PAUSED)
def ping_flood(target: Target, size: Size) -> Seen:
    return _by_some(target, size, frame(b"", PING))


@attack("endless unsolicited pongs", "the same", PAUSED)
def pong_flood(target: Target, size: Size) -> Seen:
    return _by_some(target, size, frame(b"a" * 125, PONG))


@attack("pings of 125 bytes without reading the pongs", "the same", PAUSED)
def unread_pongs(target: Target, size: Size) -> Seen:
    return _by_some(target, size, frame(b"a" * 125, PING), reads=False)


@attack("an endless message in frames of one byte", "the same: each frame counts", PAUSED)
def tiny_fragments(target: Target, size: Size) -> Seen:
    return _by_some(target, size, frame(b"a", CONTINUATION, fin=False), first=frame(b"a", fin=False))


@attack("an endless message in empty frames", "the same", PAUSED)
def empty_fragments(target: Target, size: Size) -> Seen:
    return _by_some(target, size, frame(b"", CONTINUATION, fin=False), first=frame(b"a", fin=False))


@attack(
    "messages that stop one byte before the end, from the maximum number of clients",
    "limits the total of incomplete messages, then closes the connections that have been idle for longest",
    tolerated=["nothing", "closed 1013", "closed 1009", "closed 1008", "dropped"],
    memory=320,
    patient=True,
)
def unfinished_messages(target: Target, size: Size) -> Seen:
    return unfinished(target, min(size.many, 300), LIMIT)


def unfinished(target: Target, many: int, limit: int) -> Seen:
    """Let many clients send all but the last byte of a message of ``limit`` bytes; return how they end."""
    seen: Seen = Counter()
    connections: list[RawConnection] = []
    half = (limit - 2) // 2
    for number in range(many):
        connections.append(target.client(name()))
        if number % 2:
            connections[-1].send_repeatedly(frame(b"a" * (limit - 1), length=limit), limit - 1)
        else:
            connections[-1].send_repeatedly(
                frame(b"a" * half, fin=False) + frame(b"a" * half, CONTINUATION, fin=False), 2 * half
            )
    # Those to be closed are closed by now, or within the time of waiting for the first one.
    patience = 1.0
    for connection in connections:
        seen[connection.read_outcome(patience)] += 1
        patience = 0.01
    for connection in connections:
        connection.drop()
    return seen


@attack(
    "half-closed connections, and close frames that are never answered",
    "ends them; without an answer after 3 s",
    "dropped",
    patient=True,
)
def endings(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        connections = [target.client(name()) for _ in range(size.many // 8)]
        for connection in connections[::2]:
            connection.socket.shutdown(1)
        for connection in connections[1::2]:
            # The node closes for the first part, and does not respond to the second.
            connection.send(frame(b"a", 3))
        for number, connection in enumerate(connections):
            if number % 2:
                connection.read_outcome()
            seen["dropped" if connection.wait_closed(8) else "still there"] += 1
            connection.drop()
    return seen
