"""The fast lane of an awake connection, past Autobahn: whole frames in, small messages out; and its way to be parked.

What takes it is nearly all of the traffic of a backend, and of a client that cannot be parked (TLS).
"""

from __future__ import annotations

from gateway.edge.autobahn import QuietServerProtocol
from gateway.edge.frames import MAX_PAYLOAD, PING, TEXT, decode, encode, is_beginning
from gateway.edge.waking import bare, detach, write

#: so much may wait for the end of a turn, in bytes
MAX_GATHERED = 65536

_OPEN = QuietServerProtocol.STATE_OPEN


class FastLane(QuietServerProtocol):
    """What :class:`~gateway.edge.wire.GuardedConnection` is made on."""

    #: Whether the beginning of a frame is kept until the frame is whole. A stream of messages is read in pieces that
    #: end anywhere, and a beginning that Autobahn gets costs its way with all of the next piece. But it would find a
    #: fault in a beginning at once.
    keeps_beginnings = False

    state: int
    data: bytes
    _paused = False
    _consuming = False
    #: frames to be written at the end of the turn
    _gathered: list[bytes] | None = None
    _gathered_size = 0

    def message_whole(self, payload: bytes) -> None:
        """A text message is whole, and valid UTF-8."""

    # Bytes in.

    def fast_lane(self, data: bytes) -> bytes:
        """Handle the whole frames at the beginning of what was read between two messages; returns the rest."""
        at, end = 0, len(data)
        most = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        while at < end and self.state == _OPEN and not self._paused:
            frame = decode(data, at, most)
            if frame is None:
                break
            opcode, payload, at = frame
            if opcode == TEXT:
                self.message_whole(payload)
            elif opcode == PING:
                self.onPing(payload)
            else:
                self.onPong(payload)
        return data[at:]

    def awaits_rest(self) -> bool:
        """Whether the beginning of a frame is kept until it is whole, rather than given to Autobahn."""
        most = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        return self.keeps_beginnings and self.state == _OPEN and is_beginning(self.data, most)

    # Bytes out.

    def send_text(self, payload: bytes) -> bool:
        """Send one text message (UTF-8); ``False`` if the connection is not open."""
        if self.state != _OPEN:
            return False
        frame = encode(payload)
        turn = self.factory.turn
        if not turn.on:
            self.sendData(frame)
        elif self._gathered is None:
            self._gathered = [frame]
            self._gathered_size = len(frame)
            turn.at_end(self.write_gathered)
        else:
            self._gathered.append(frame)
            self._gathered_size += len(frame)
        if self._gathered_size > MAX_GATHERED:
            self.write_gathered()
        return True

    def write_gathered(self) -> None:
        """Write what was to be written at the end of the turn."""
        if self._gathered is not None:
            self.sendData(b"", at_once=True)

    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None, *, at_once: bool = False) -> None:
        """Write bytes, behind those that were gathered. Everything that Autobahn sends goes this way."""
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            self._gathered_size = 0
            data = b"".join((*gathered, data))
        if at_once:
            write(self.transport, data)
        else:
            self.transport.write(data)

    # Parking.

    @property
    def parkable(self) -> bool:
        """Whether it can ever be parked: not with TLS."""
        return bare(self.transport) is not None

    def detach(self) -> tuple[int, int] | None:
        """Give up the socket of a connection on which nothing is going on: its file descriptor, its address family.

        ``None`` while there is something going on; else this connection is of no more use.
        """
        if self.state != _OPEN or self._paused or self._consuming or self._gathered is not None:
            return None
        return detach(self)
