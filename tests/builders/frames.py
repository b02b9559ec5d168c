"""Build opening handshakes and frames of a client, and parse a server's frames."""

from __future__ import annotations

import struct

WEBSOCKET_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
#: the accept header for that key (RFC 6455, section 1.3)
WEBSOCKET_ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def build_request(
    target: str = "/v1/connect?client_id=a",
    *,
    method: str = "GET",
    version: str = "HTTP/1.1",
    without: tuple[str, ...] = (),
    extra: tuple[tuple[str, str], ...] = (),
    **changed: str,
) -> bytes:
    """Build an opening handshake (RFC 6455, section 1.3); ``sec_websocket_key="x"`` changes a header."""
    headers = {
        "Host": "gw.example.com",
        "Upgrade": "websocket",
        "Connection": "keep-alive, Upgrade",
        "Sec-WebSocket-Key": WEBSOCKET_KEY,
        "Sec-WebSocket-Version": "13",
    }
    lowered = {name.lower().replace("-", "_"): name for name in headers}
    for name, value in changed.items():
        headers[lowered[name]] = value
    lines = [f"{method} {target} {version}"]
    lines += [f"{name}: {value}" for name, value in headers.items() if name not in without]
    lines += [f"{name}: {value}" for name, value in extra]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def build_frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, rsv: int = 0) -> bytes:
    """Build a client's frame (RFC 6455, section 5.2)."""
    first_byte = (0x80 if fin else 0) | rsv << 4 | opcode
    mask_bit = 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", first_byte, mask_bit | size)
    elif size < 65536:
        head = struct.pack("!BBH", first_byte, mask_bit | 126, size)
    else:
        head = struct.pack("!BBQ", first_byte, mask_bit | 127, size)
    if not masked:
        return head + payload
    mask = b"\x37\xfa\x21\x3d"
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def text_frame(payload: bytes) -> bytes:
    """Build a client's text message in one frame."""
    return build_frame(1, payload)


def close_frame(code: int | None = None, reason: bytes = b"") -> bytes:
    """Build a client's close frame."""
    return build_frame(8, b"" if code is None else struct.pack("!H", code) + reason)


def parse_frames(data: bytes) -> list[tuple[int, bytes]]:
    """Parse a server's frames: final, unmasked and complete."""
    frames = []
    while data:
        assert data[0] & 0xF0 == 0x80, data[:20]
        size, at = data[1], 2
        assert size < 128
        if size == 126:
            size, at = struct.unpack("!H", data[2:4])[0], 4
        elif size == 127:
            size, at = struct.unpack("!Q", data[2:10])[0], 10
        assert len(data) >= at + size
        frames.append((data[0] & 15, data[at : at + size]))
        data = data[at + size :]
    return frames
