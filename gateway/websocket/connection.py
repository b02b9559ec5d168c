"""The fast lane of an awake connection, past Autobahn: whole frames in, small messages out; and its way to be parked.

What takes it is nearly all of the traffic of a backend, and of a client that cannot be parked (TLS).

Autobahn's server protocol made safe for a connection that is open: what it holds, when it ends, how it is fed.

Every corner of RFC 6455 is Autobahn's. What is changed here:
 * its settings are on the class, and it logs nothing (autobahn.py)
 * a message in many small pieces costs no more memory than its bytes
 * once a close frame was sent, nothing that comes is handed on, kept, or answered a second time; and little is read
 * a reader that is too slow is closed with 1013, one that does not take part in closing is aborted
 * reading can be paused between any two messages, even those that came in one segment
"""

from __future__ import annotations

import math
import os
from typing import Any

from autobahn.util import encode_truncate
from twisted.internet.interfaces import IFileDescriptorReceiver, IPushProducer, ISSLTransport
from zope.interface import implementer

from gateway.net.transport import bare, between_messages, detach, file_number, unsent, write
from gateway.protocol.frames import (
    CLOSE_INTERNAL_ERROR,
    CLOSE_TRY_AGAIN_LATER,
    CLOSE_UNSUPPORTED_DATA,
    MAX_PAYLOAD,
    PING,
    TEXT,
    decode,
    encode,
    is_beginning,
)
from gateway.util.timers import Timer
from gateway.websocket.autobahn import QuietServerProtocol
from gateway.websocket.limits import Backlog

#: so much may wait for the end of a turn, in bytes
MAX_GATHERED = 65536

_OPEN = QuietServerProtocol.STATE_OPEN


class FastLane(QuietServerProtocol):
    """What :class:`~gateway.websocket.connection.GuardedConnection` is made on."""

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


#: how long a connection that is being closed may take, in seconds
CLOSE_TIMEOUT = 3.0
#: how long the answer to a refused client has to reach it while it still sends, in seconds
LINGER = 1.0
#: how much of what such a client sends is swallowed, in bytes
MAX_SWALLOWED = 1048576
#: How many frames that were under way when a close frame was sent are read in search of the answer to it, and how many
#: bytes: these are enough for the rest of a message that is far too large, whose sender is to see why.
MAX_CLOSING_FRAMES = 512
MAX_CLOSING_BYTES = 16777216

CLOSE_TOO_BIG = 1009
CLOSE_NO_STATUS = 1005
CLOSE_ABNORMAL = 1006

_CLOSED = QuietServerProtocol.STATE_CLOSED
_CONNECTING = QuietServerProtocol.STATE_CONNECTING
_MAX_CONTROL_PAYLOAD = 125
_MAX_REASON = 123
#: Autobahn reads a frame in two steps, its header and its payload.
_MAX_CLOSING_STEPS = 2 * MAX_CLOSING_FRAMES


@implementer(IPushProducer, IFileDescriptorReceiver)
class GuardedConnection(FastLane):
    """One connection, from its opening to its end. A subclass overrides the hooks."""

    closeHandshakeTimeout = CLOSE_TIMEOUT

    #: how many bytes may wait for a slow reader, and how many more for a moment; see :mod:`gateway.websocket.limits`
    send_buffer = 1048576
    burst = 0
    #: ``host:port`` of the other end, ``[host]:port`` for IPv6, ``unix`` for a UNIX socket
    address = ""
    #: when bytes last came, by the clock of the factory
    heard_at = 0.0

    _live = False
    _deaf = False
    _producing = False
    _backlog: Backlog | None = None
    _closing_steps = 0
    _swallowed = 0
    _refused = False
    _linger: Timer | None = None
    closeHandshakeTimeoutCall: Timer | None = None
    _message: bytes | bytearray | None = None
    _message_size = 0

    # Hooks.

    def opened(self) -> None:
        """The connection is open: the 101 is on its way, and messages can be sent."""

    def text_received(self, payload: bytes) -> None:
        """One whole text message, valid UTF-8. Never before :meth:`opened` nor after :meth:`ended`."""

    def ended(self, code: int) -> None:
        """Nothing can be sent or received any more: a close frame was sent or received, or the connection was lost.

        ``code`` is that of the side that closed first, 1005 where its frame had none, 1006 without a close frame.
        Said once, after :meth:`opened`; the socket may live on until the closing handshake is over.
        """

    def metered(self, message: bytes) -> None:
        """A frame was read. Called before its content is handed on.

        ``message`` is the message that is whole with it; empty for a piece of one before, a ping and a pong.
        """

    # What can be done to it.

    @property
    def unsent(self) -> float:
        """How many bytes its transport holds that the kernel has not taken; 0 where it does not tell."""
        waiting = unsent(self.transport)
        return waiting if waiting < math.inf else 0.0

    @property
    def fd(self) -> int:
        """The file descriptor of its socket, -1 where it has none."""
        return file_number(self.transport)

    def close_with(self, code: int, reason: str = "") -> None:
        """Begin to close with that code, whatever it is; aborted when the other side does not answer in time.

        ``reason`` is cut to the 123 bytes that a close frame has room for.
        """
        if self.state == _OPEN:
            self.sendCloseFrame(code=code, reasonUtf8=encode_truncate(reason, _MAX_REASON))

    def abort(self) -> None:
        """Drop the connection at once."""
        if self.state == _CLOSED:
            self.transport.abortConnection()
        else:
            self.dropConnection(abort=True)

    def ping(self) -> None:
        """Ask for a sign of life (RFC 6455, section 5.5.2)."""
        self.sendPing()

    def pause_reading(self) -> None:
        """Hand on no further message, and stop reading, until :meth:`resume_reading`."""
        if not self._paused and self.state in (_OPEN, _CONNECTING):
            self._paused = True
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        """Go on reading, beginning with what had been read already."""
        if self._paused:
            self._paused = False
            self.transport.resumeProducing()
            self._consume()

    # Bytes in.

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """A file came over a UNIX socket. Twisted would write a line to the log for each."""
        os.close(descriptor)

    def frames_received(self, data: bytes) -> None:
        """Bytes came on a connection that is open, closing or closed."""
        if self.state != _OPEN:
            unread = self._deaf or self.state == _CLOSED
            self._swallowed += len(data)
            if self._swallowed > (MAX_SWALLOWED if unread else MAX_CLOSING_BYTES):
                self.abort()
                return
            if unread:
                return
        self.data += data
        self._consume()

    def message_whole(self, payload: bytes) -> None:
        """A text message is whole, and valid UTF-8."""
        self.metered(payload)
        try:
            self.text_received(payload)
        except Exception:  # noqa: BLE001
            self.factory.troubles.report("an error in handling a message")
            self.close_with(CLOSE_INTERNAL_ERROR, "internal error")

    def _consume(self) -> None:
        try:
            self.consumeData()
        except Exception:  # noqa: BLE001
            self._parser_failed()

    def consumeData(self) -> None:
        """Handle what was read, unless that is being done already further up the stack, or reading is paused."""
        if self._consuming or self.state in (_CLOSED, _CONNECTING):
            return
        self._consuming = True
        begun = self.factory.turn.begin()
        try:
            while not self._paused and self._read_on():
                pass
        finally:
            self._consuming = False
            if begun:
                self.factory.turn.end()

    def _read_on(self) -> bool:
        """Handle as many whole frames as come next, and one step of what is none; whether there may be more."""
        if self.data and self.state == _OPEN and between_messages(self):
            data, self.data = self.data, b""
            self.data = self.fast_lane(data) + self.data
            if not self.data or self._paused or self.awaits_rest():
                return False
        return self.processData() and not (self.state != _OPEN and self._has_read_enough())

    def _has_read_enough(self) -> bool:
        self._closing_steps += 1
        if self._closing_steps > _MAX_CLOSING_STEPS:
            # Not aborted, so that the close frame arrives; that its answer was not found ends the connection in time.
            self._deaf = True
            self.data = b""
        return self._deaf or self.state == _CLOSED

    def _parser_failed(self) -> None:
        self.factory.troubles.report("an error in reading a WebSocket's frames")
        self.close_with(CLOSE_INTERNAL_ERROR, "internal error")
        # Where the next frame begins is unknown.
        self._deaf = True
        self.data = b""

    # Messages; Autobahn calls these for each frame and each piece of it that was read.

    def onMessageBegin(self, isBinary: bool) -> None:
        """A message begins."""
        self._message = b""
        self._message_size = 0
        if isBinary:
            self._fail_connection(CLOSE_UNSUPPORTED_DATA, "messages are text here, not binary")

    def onMessageFrameBegin(self, length: int) -> None:
        """A frame of a message begins; ``length`` is what its header says."""
        self._message_size += length
        if self._message_size > self.maxMessagePayloadSize:
            self._fail_connection(CLOSE_TOO_BIG, f"a message may have {self.maxMessagePayloadSize} bytes")

    def onMessageFrameData(self, payload: bytes) -> None:
        """A piece of a frame's payload."""
        if self.state != _OPEN:
            self._message = None
            return
        if not self._message:
            self._message = payload
        else:
            if isinstance(self._message, bytes):
                self._message = bytearray(self._message)
            self._message += payload
        self.factory.unfinished.add(self, len(payload))

    def onMessageFrameEnd(self) -> None:
        """A frame of a message is whole."""
        if not self.current_frame.fin and self.state == _OPEN:
            self.metered(b"")

    def onMessageEnd(self) -> None:
        """A message is whole."""
        message, self._message = self._message, None
        self.factory.unfinished.discard(self)
        if self.state != _OPEN or message is None:
            return
        self.message_whole(bytes(message))

    def onFrameData(self, payload: bytes) -> bool | None:
        """Autobahn keeps the payload of a control frame even when its length broke the protocol."""
        if self.current_frame.opcode > 7 and self.current_frame.length > _MAX_CONTROL_PAYLOAD:
            return None
        result: bool | None = super().onFrameData(payload)
        return result

    def onPing(self, payload: bytes) -> None:
        """A ping came: answer it."""
        if self.state == _OPEN:
            self.metered(b"")
            self.sendPong(payload)

    def onPong(self, payload: bytes) -> None:
        """A pong came."""
        if self.state == _OPEN:
            self.metered(b"")

    # Bytes out.

    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None, *, at_once: bool = False) -> None:
        """Write bytes, and count those that wait behind a full buffer."""
        backlog = self._backlog
        size = len(data) + self._gathered_size
        super().sendData(data, at_once=at_once)
        if backlog is not None:
            backlog.add(size)

    def pauseProducing(self) -> None:
        """The transport's buffer is full. Twisted says so again at each further write."""
        if self._backlog is None and self.state == _OPEN:
            self._backlog = Backlog(
                self.transport, self.factory._batched_timer, self.send_buffer, self.burst, self._reads_too_slowly
            )

    def resumeProducing(self) -> None:
        """The transport's buffer is empty again."""
        backlog, self._backlog = self._backlog, None
        if backlog is not None:
            backlog.end()

    def _reads_too_slowly(self) -> None:
        if self.state == _OPEN:
            self.factory.metrics.slow_readers += 1
            self.close_with(CLOSE_TRY_AGAIN_LATER, "reads too slowly")

    def stopProducing(self) -> None:
        """The transport is gone."""
        self._producing = False

    def unregisterProducer(self) -> None:
        """Let the transport end when it is told to: it waits for a producer."""
        if self._producing:
            self._producing = False
            self.transport.unregisterProducer()

    # Parking.

    def detach(self) -> tuple[int, int] | None:
        """Give up the socket, if nothing is going on."""
        return None if self._backlog is not None else super().detach()

    def adopted(self) -> None:
        """It is a connection that was open before it had this object."""
        self._connectionMade()
        self._live = self._producing = True
        self.transport.registerProducer(self, True)

    # The end.

    def _end(self, code: int) -> None:
        self.factory.unfinished.discard(self)
        if self._live:
            self._live = False
            self._message = None
            try:
                self.ended(code)
            except Exception:  # noqa: BLE001
                self.factory.troubles.report("an error in handling the end of a connection")

    def _fail_connection(self, code: int = CLOSE_ABNORMAL, reason: str = "") -> None:
        """Close because of what the other side did, once (RFC 6455, section 7.1.7)."""
        self.close_with(code, reason)

    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        """Send a close frame; from here on nothing is handed on."""
        was_open = self.state == _OPEN
        super().sendCloseFrame(code=code, reasonUtf8=reasonUtf8, isReply=isReply)
        if was_open:
            first = self.remoteCloseCode if isReply else code
            self._end(CLOSE_NO_STATUS if first is None else first)
            # The other side's close frame is to be seen.
            self.resume_reading()

    def dropConnection(self, abort: bool = False) -> None:
        """Let go of the transport, if that was not done yet."""
        # Not Autobahn's: that fires a Deferred with the protocol, which is a reference cycle.
        self.unregisterProducer()
        if self.state != _CLOSED:
            self.droppedByMe = True
            self.state = _CLOSED
            self.data = b""
            self._closeConnection(abort)
            self._end(CLOSE_ABNORMAL)

    def _closeConnection(self, abort: bool = False) -> None:
        # Autobahn aborts, by a TCP reset, even when both close frames were exchanged.
        if abort and not self.wasClean:
            self.transport.abortConnection()
            return
        if self._refused and not ISSLTransport.providedBy(self.transport):
            # With bytes unread in the kernel a close is a reset, which can destroy the answer on its way.
            half_close = getattr(self.transport, "loseWriteConnection", self.transport.loseConnection)
            half_close()
            patience = LINGER
        else:
            self.transport.loseConnection()
            patience = LINGER if self._refused else CLOSE_TIMEOUT
        self._linger = self.factory._batched_timer.call_later(patience, self._linger_over)

    def _linger_over(self) -> None:
        self._linger = None
        self.transport.abortConnection()

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        """Autobahn says so when the connection is lost; by then :meth:`ended` was or will be called."""

    def connectionLost(self, reason: Any) -> None:
        """The transport is gone."""
        self._producing = False
        # Autobahn would fire that Deferred here.
        self.state = _CLOSED
        super().connectionLost(reason)
        for timer in (self.closeHandshakeTimeoutCall, self._linger):
            if timer is not None:
                timer.cancel()
        self.closeHandshakeTimeoutCall = self._linger = None
        if self._backlog is not None:
            self._backlog.end()
            self._backlog = None
        self.data = b""
        self._message = None
        self._end(CLOSE_ABNORMAL)
