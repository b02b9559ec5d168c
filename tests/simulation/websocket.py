"""The client side of a WebSocket, small and without I/O, for the simulated clients and backends."""

from __future__ import annotations

import struct
from collections.abc import Callable

from gateway.protocol.frames import CLOSE, PING, PONG, TEXT, encode_masked
from tests.simulation.network import ActorEnd

#: a masking key; the network is not hostile
_KEY = 0x5A5A5A5A
_CLOSE_FRAME = b"\x88\x82\x00\x00\x00\x00\x03\xe8"


def upgrade_request(target: str, host: str, *headers: str) -> bytes:
    """Encode the request of an opening handshake."""
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==",
        *headers,
    ]
    return "\r\n".join((*lines, "", "")).encode()


class WebSocket:
    """An open or opening WebSocket on one connection."""

    def __init__(
        self,
        end: ActorEnd,
        *,
        on_response: Callable[[int, dict[str, str]], None],
        on_text: Callable[[bytes], None],
        on_lost: Callable[[int], None],
    ) -> None:
        """``on_response`` is called with the status and headers of the response; the WebSocket is open if the status is
        101. ``on_lost`` is called once, with the close code."""
        self.end = end
        self.is_open = False
        #: whether pings are answered
        self.sends_pongs = True
        #: close code received
        self.close_code = 1006
        #: when bytes were last received
        self.last_heard = end.now()
        self._on_response = on_response
        self._on_text = on_text
        self._on_lost = on_lost
        self._data = b""
        self._is_over = False
        end.actor = self

    def send(self, payload: bytes) -> None:
        self.end.send(encode_masked(payload, _KEY))

    def send_all(self, payloads: list[bytes]) -> None:
        """Send messages that arrive together."""
        self.end.send(b"".join([encode_masked(payload, _KEY) for payload in payloads]))

    def ping(self) -> None:
        self.end.send(b"\x89\x80\x00\x00\x00\x00")

    def close(self) -> None:
        """Close the connection at once, with a close frame."""
        if self.is_open:
            self.end.send(_CLOSE_FRAME)
        self.abort()

    def abort(self) -> None:
        """Close the connection."""
        self.is_open = False
        self._is_over = True
        self.end.close()

    # Actor.

    def connection_lost(self) -> None:
        self.is_open = False
        if not self._is_over:
            self._is_over = True
            self._on_lost(self.close_code)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        self.last_heard = self.end.now()
        self._data = self._data + data if self._data else data
        if not self.is_open and not self._read_response():
            return
        self._read_frames()

    def _read_response(self) -> bool:
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if not end:
            return False
        line, *fields = head.decode("latin-1").split("\r\n")
        status = int(line.split()[1])
        self._data = rest
        self.is_open = status == 101
        headers = {}
        for field in fields:
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        self._on_response(status, headers)
        return self.is_open

    def _read_frames(self) -> None:
        data, at = self._data, 0
        while self.is_open and len(data) - at >= 2:
            opcode, size, start = data[at] & 15, data[at + 1] & 127, at + 2
            if size == 126:
                if len(data) < start + 2:
                    break
                (size,) = struct.unpack_from("!H", data, start)
                start += 2
            elif size == 127:
                if len(data) < start + 8:
                    break
                (size,) = struct.unpack_from("!Q", data, start)
                start += 8
            if len(data) < start + size:
                break
            at = start + size
            self._frame_received(opcode, data[start:at])
        self._data = data[at:]

    def _frame_received(self, opcode: int, payload: bytes) -> None:
        if opcode == TEXT:
            self._on_text(payload)
        elif opcode == PING and self.sends_pongs:
            self.end.send(bytes((0x80 | PONG, 0x80 | len(payload))) + b"\0\0\0\0" + payload)
        elif opcode == CLOSE:
            self.close_code = int.from_bytes(payload[:2], "big") if payload else 1005
            self.end.send(_CLOSE_FRAME)
            self.is_open = False
            self._is_over = True
            self.end.close()
            self._on_lost(self.close_code)
