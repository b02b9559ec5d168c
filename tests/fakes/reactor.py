"""Reactors that the test runs, and the client's end of a real socket, for tests of what depends on the kernel (short
writes, half-closed sockets, resets) without waiting."""

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
    """Twisted's epoll reactor, whose iterations the test runs."""

    def __init__(self) -> None:
        self.current_time = 1_000_000.0
        self.event_count = 0
        super().__init__()

    def installWaker(self) -> None:
        """Do nothing: no other thread wakes this reactor."""

    def seconds(self) -> float:
        return self.current_time

    def doIteration(self, timeout: float) -> None:
        if self._selectables:
            self.doPoll(timeout)

    def _doReadOrWrite(self, selectable: Any, fd: int, event: int) -> None:
        self.event_count += 1
        super()._doReadOrWrite(selectable, fd, event)

    def run_once(self) -> bool:
        """Run one iteration. Returns whether there were events, or a timer is due in the next one."""
        self.event_count = 0
        self.iterate(0)
        return self.event_count > 0 or self.next_call_at() <= self.current_time

    def next_call_at(self) -> float:
        """Return the time of the next timer."""
        return min((call.getTime() for call in self.getDelayedCalls()), default=float("inf"))

    def dispose(self) -> None:
        for call in self.getDelayedCalls():
            call.cancel()
        self.removeAll()
        self._poller.close()


class SocketClient:
    """The client's end of a connection."""

    def __init__(self, own: socket.socket) -> None:
        own.setblocking(False)
        self._socket = own
        self._unsent = bytearray()
        self.received = bytearray()
        #: how the connection ended: ``""`` (open), ``eof``, ``reset``, or ``gone`` if this side ended it
        self.how_closed = ""
        #: whether reading is stopped, and whether it was while the connection may have ended
        self.reading_stopped = False
        self.received_is_uncertain = False
        #: whether it was still sending when the connection ended
        self.close_is_uncertain = False
        self._close_answered = False
        self._write_closed = False
        #: the server's file descriptor, if delivery may take a moment (TCP)
        self._server_fd = 0
        self._address: Any = None
        #: as the server sees it
        self.address = "unix"

    @property
    def comparable_close(self) -> str:
        """``how_closed``, without what depends on when the server read its last bytes."""
        return "eof or reset" if self.close_is_uncertain and self.how_closed in ("eof", "reset") else self.how_closed

    def send(self, data: bytes) -> None:
        if not self.how_closed:
            self._unsent += data
            self.pump()

    def pump(self) -> bool:
        """Write and read as much as possible. Returns whether that was anything."""
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
            # The server's end is closed; reading tells how.
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
        """Answer the server's close frame, if it has arrived."""
        body = bytes(self.received).partition(b"\r\n\r\n")[2]
        if not self._close_answered and any(opcode == 8 for opcode, _ in complete_frames(body)):
            self._close_answered = True
            self.send(close_frame(1000))

    # TCP only: whether the kernel has delivered everything to the other end.

    def set_server_end(self, near: socket.socket) -> None:
        """Set the server's end of the connection, which is ``near``."""
        if near.family != socket.AF_UNIX:
            self._server_fd = near.fileno()
            self._address = self._socket.getsockname()
            self.address = "{}:{}".format(*self._address)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def has_bytes_in_flight(self) -> bool:
        """Return whether bytes were sent that have not arrived. Delivery is immediate in most cases, but not guaranteed
        to be."""
        if not self._server_fd or self.how_closed in ("eof", "reset"):
            return False
        near = self._server_end()
        if near is None:
            # Its FIN, or its reset, arrives after all bytes before it.
            return not self.how_closed and not self.reading_stopped
        with near:
            if self.how_closed:
                return True
            return _has_bytes_in_flight(self._socket, near, self._write_closed) or (
                not self.reading_stopped and _has_bytes_in_flight(near, self._socket, False)
            )

    def _server_end(self) -> socket.socket | None:
        """Return a duplicate of the server's socket; ``None`` if it is closed, or was reset."""
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
    """Return the server's complete frames at the beginning of ``data``."""
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
    """Return whether bytes or acknowledgements are, or could be, in flight, by ``struct tcp_info`` of linux/tcp.h."""
    # Send delayed acknowledgements now: a full buffer may wait for them.
    receiver.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    sent = sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    received = receiver.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (unacknowledged,) = struct.unpack_from("I", sent, 24)
    (not_sent,) = struct.unpack_from("I", sent, 144)
    bytes_sent, bytes_retransmitted = struct.unpack_from("QQ", sent, 200)
    (bytes_received,) = struct.unpack_from("Q", received, 128)
    if not_sent:
        # If the receiver has read everything, its window must be open again.
        (unread,) = struct.unpack("i", fcntl.ioctl(receiver, termios.FIONREAD, bytes(4)))
        if not unread:
            return True
    # A FIN counts as a byte that arrived.
    return unacknowledged > 0 or bytes_received < bytes_sent - bytes_retransmitted + (shut and not not_sent)


class FakeFDReactor(Clock):
    """Clock that also records readers and writers. They are called only by :meth:`step`."""

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
        """Run reactor iterations: timers that are due, then readers, then writers."""
        for _ in range(times):
            self.advance(0)
            for selectables, event, method in (
                (self.readers, select.POLLIN, "doRead"),
                (self.writers, select.POLLOUT, "doWrite"),
            ):
                for selectable in list(selectables):
                    if selectable in selectables and is_ready(selectable.fileno(), event):
                        self._disconnect(selectable, getattr(selectable, method)())

    def _disconnect(self, selectable: Any, reason: Any) -> None:
        if reason:
            self.removeReader(selectable)
            self.removeWriter(selectable)
            selectable.connectionLost(Failure(reason))
