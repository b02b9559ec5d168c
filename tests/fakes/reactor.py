"""A reactor that turns only when it is told to, and a client's end of a real socket: for tests of what depends on the
kernel (short writes, half-closed sockets, resets), without any waiting.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
from typing import Any

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tests.builders.frames import close_frame
from tests.builders.sockets import is_ready


class ManualReactor(EPollReactor):
    """Twisted's reactor; it turns when it is told to."""

    def __init__(self) -> None:
        self.current_time = 1_000_000.0
        self.event_count = 0
        super().__init__()

    def installWaker(self) -> None:
        """No other thread will wake it."""

    def seconds(self) -> float:
        return self.current_time

    def doIteration(self, timeout: float) -> None:
        if self._selectables:
            self.doPoll(timeout)

    def _doReadOrWrite(self, selectable: Any, fd: int, event: int) -> None:
        self.event_count += 1
        super()._doReadOrWrite(selectable, fd, event)

    def run_once(self) -> bool:
        """One turn; whether anything happened, or will in the next one."""
        self.event_count = 0
        self.iterate(0)
        return self.event_count > 0 or self.next_call_at() <= self.current_time

    def next_call_at(self) -> float:
        """When the next timer fires."""
        return min((call.getTime() for call in self.getDelayedCalls()), default=float("inf"))

    def dispose(self) -> None:
        for call in self.getDelayedCalls():
            call.cancel()
        self.removeAll()
        self._poller.close()


class SocketClient:
    """A client's end of a connection."""

    def __init__(self, own: socket.socket) -> None:
        own.setblocking(False)
        self._socket = own
        self._unsent = bytearray()
        self.received = bytearray()
        #: how the connection ended: ``""``, ``eof``, ``reset``, or ``gone`` if that was this side's doing
        self.how_closed = ""
        #: whether it reads nothing, and whether it did so while the connection may have ended
        self.reading_stopped = False
        self.received_is_uncertain = False
        #: whether it still spoke when the connection ended
        self.close_is_uncertain = False
        self._close_answered = False
        self._write_closed = False
        #: the server's file descriptor, where there is something to wait for
        self._server_fd = 0
        self._address: Any = None
        #: as the server names it
        self.address = "unix"

    @property
    def comparable_close(self) -> str:
        """``ending``, but what depends on when the server read its last bytes."""
        return "eof or reset" if self.close_is_uncertain and self.how_closed in ("eof", "reset") else self.how_closed

    def send(self, data: bytes) -> None:
        if not self.how_closed:
            self._unsent += data
            self.pump()

    def pump(self) -> bool:
        """Write and read as much as can be; whether that was anything."""
        if self.how_closed:
            return False
        wrote = self._write() if self._unsent else False
        return (not self.reading_stopped and self._read()) or wrote

    def _write(self) -> bool:
        try:
            written = self._socket.send(self._unsent)
        except BlockingIOError:
            return False
        except OSError:
            # The server's end is gone; how, is what reading will tell.
            self._unsent.clear()
            return True
        del self._unsent[:written]
        return True

    def _read(self) -> bool:
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            self._set_closed("reset")
            return True
        self.received += data
        if not data:
            self._set_closed("eof")
        return True

    def _set_closed(self, how: str) -> None:
        self.how_closed = how
        self._socket.close()

    def half_close(self) -> None:
        if not self.how_closed:
            self._unsent.clear()
            self._write_closed = True
            # It fails when the server has reset the connection.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        if not self.how_closed:
            if self._socket.family != socket.AF_UNIX:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._set_closed("gone")

    def answer_close(self) -> None:
        """Answer the server's close frame, if it has come."""
        body = bytes(self.received).partition(b"\r\n\r\n")[2]
        if not self._close_answered and any(opcode == 8 for opcode, _ in complete_frames(body)):
            self._close_answered = True
            self.send(close_frame(1000))

    # TCP alone: whether the kernel has brought everything to the other end.

    def set_server_end(self, near: socket.socket) -> None:
        """``near`` is the server's end."""
        if near.family != socket.AF_UNIX:
            self._server_fd = near.fileno()
            self._address = self._socket.getsockname()
            self.address = "{}:{}".format(*self._address)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def has_bytes_in_flight(self) -> bool:
        """Whether something that was sent has not arrived. That takes no time in most cases, but nobody promises it."""
        if not self._server_fd or self.how_closed in ("eof", "reset"):
            return False
        near = self._server_end()
        if near is None:
            # Its FIN, or its reset, is there when all before it is read.
            return not self.how_closed and not self.reading_stopped
        with near:
            if self.how_closed:
                return True
            return _has_bytes_in_flight(self._socket, near, self._write_closed) or (
                not self.reading_stopped and _has_bytes_in_flight(near, self._socket, False)
            )

    def _server_end(self) -> socket.socket | None:
        """The server's end, as another file; ``None`` if it is closed, or was reset."""
        try:
            near = socket.socket(fileno=os.dup(self._server_fd))
        except OSError:
            return None
        with contextlib.suppress(OSError):
            if near.getpeername() == self._address:
                return near
        near.close()
        return None


def complete_frames(data: bytes) -> list[tuple[int, bytes]]:
    """The server's frames at the beginning of ``data``, as far as they are whole."""
    frames = []
    at = 0
    while len(data) - at >= 2:
        size, start = data[at + 1], at + 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size, start = int.from_bytes(data[start : start + width], "big"), start + width
        if len(data) < start + size:
            break
        frames.append((data[at] & 15, data[start : start + size]))
        at = start + size
    return frames


def _has_bytes_in_flight(sender: socket.socket, receiver: socket.socket, shut: bool) -> bool:
    """Whether bytes or acknowledgements are on their way, or could be; by ``struct tcp_info`` of linux/tcp.h."""
    # An acknowledgement that is put off is sent now: a full buffer may wait for it.
    receiver.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    sent = sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    came = receiver.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (unacknowledged,) = struct.unpack_from("I", sent, 24)
    (not_sent,) = struct.unpack_from("I", sent, 144)
    left, left_again = struct.unpack_from("QQ", sent, 200)
    (arrived,) = struct.unpack_from("Q", came, 128)
    if not_sent:
        # Is there room? Who has read everything must have told so.
        (unread,) = struct.unpack("i", fcntl.ioctl(receiver, termios.FIONREAD, bytes(4)))
        if not unread:
            return True
    # A FIN counts as a byte that arrived.
    return unacknowledged > 0 or arrived < left - left_again + (shut and not not_sent)


class FakeFDReactor(Clock):
    """A clock that also knows which files are watched. Nothing happens but in :meth:`step`."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)

    def step(self, times: int = 1) -> None:
        """Take turns of the reactor: the calls that are due, then what can be read, then what can be written."""
        for _ in range(times):
            self.advance(0)
            for watched, event, method in (
                (self.readers, select.POLLIN, "doRead"),
                (self.writers, select.POLLOUT, "doWrite"),
            ):
                for one in list(watched):
                    if one in watched and is_ready(one.fileno(), event):
                        self._disconnect(one, getattr(one, method)())

    def _disconnect(self, one: Any, why: Any) -> None:
        if why:
            self.removeReader(one)
            self.removeWriter(one)
            one.connectionLost(Failure(why))
