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

from gateway.net.transport import detach_idle, is_between_messages, plain_transport, socket_fd, unsent_bytes, write_now
from gateway.protocol.frames import MAX_PAYLOAD, PING, TEXT, CloseCode, decode, encode, is_partial
from gateway.util.timers import Timer
from gateway.websocket.autobahn import SlimServerProtocol
from gateway.websocket.limits import SlowConsumerDetector

#: so much may wait for the end of a turn, in bytes
MAX_CORKED_BYTES = 65536

_OPEN = SlimServerProtocol.STATE_OPEN


class FastPathConnection(SlimServerProtocol):
    """What :class:`~gateway.websocket.connection.GuardedConnection` is made on."""

    #: Whether the beginning of a frame is kept until the frame is whole. A stream of messages is read in pieces that
    #: end anywhere, and a beginning that Autobahn gets costs its way with all of the next piece. But it would find a
    #: fault in a beginning at once.
    buffers_partial_frames = False

    state: int
    data: bytes
    _reading_paused = False
    _is_consuming = False
    #: frames to be written at the end of the turn
    _corked_frames: list[bytes] | None = None
    _corked_size = 0

    def message_complete(self, payload: bytes) -> None:
        """A text message is whole, and valid UTF-8."""

    # Bytes in.

    def process_fast(self, data: bytes) -> bytes:
        """Handle the whole frames at the beginning of what was read between two messages; returns the rest."""
        at, end = 0, len(data)
        most = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        while at < end and self.state == _OPEN and not self._reading_paused:
            frame = decode(data, at, most)
            if frame is None:
                break
            opcode, payload, at = frame
            if opcode == TEXT:
                self.message_complete(payload)
            elif opcode == PING:
                self.onPing(payload)
            else:
                self.onPong(payload)
        return data[at:]

    def has_partial_frame(self) -> bool:
        """Whether the beginning of a frame is kept until it is whole, rather than given to Autobahn."""
        most = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        return self.buffers_partial_frames and self.state == _OPEN and is_partial(self.data, most)

    # Bytes out.

    def send_text(self, payload: bytes) -> bool:
        """Send one text message (UTF-8); ``False`` if the connection is not open."""
        if self.state != _OPEN:
            return False
        frame = encode(payload)
        cork = self.factory.cork
        if not cork.is_corked:
            self.sendData(frame)
        elif self._corked_frames is None:
            self._corked_frames = [frame]
            self._corked_size = len(frame)
            cork.on_flush(self.flush_corked)
        else:
            self._corked_frames.append(frame)
            self._corked_size += len(frame)
        if self._corked_size > MAX_CORKED_BYTES:
            self.flush_corked()
        return True

    def flush_corked(self) -> None:
        """Write what was to be written at the end of the turn."""
        if self._corked_frames is not None:
            self.sendData(b"", immediate=True)

    def sendData(
        self, data: bytes, sync: bool = False, chopsize: int | None = None, *, immediate: bool = False
    ) -> None:
        """Write bytes, behind those that were gathered. Everything that Autobahn sends goes this way."""
        gathered, self._corked_frames = self._corked_frames, None
        if gathered is not None:
            self._corked_size = 0
            data = b"".join((*gathered, data))
        if immediate:
            write_now(self.transport, data)
        else:
            self.transport.write(data)

    # Parking.

    @property
    def parkable(self) -> bool:
        """Whether it can ever be parked: not with TLS."""
        return plain_transport(self.transport) is not None

    def detach_idle(self) -> tuple[int, int] | None:
        """Give up the socket of a connection on which nothing is going on: its file descriptor, its address family.

        ``None`` while there is something going on; else this connection is of no more use.
        """
        if self.state != _OPEN or self._reading_paused or self._is_consuming or self._corked_frames is not None:
            return None
        return detach_idle(self)


#: how long a connection that is being closed may take, in seconds
CLOSE_TIMEOUT = 3.0
#: how long the answer to a refused client has to reach it while it still sends, in seconds
LINGER_TIMEOUT = 1.0
#: how much of what such a client sends is swallowed, in bytes
MAX_DISCARDED_BYTES = 1048576
#: How many frames that were under way when a close frame was sent are read in search of the answer to it, and how many
#: bytes: these are enough for the rest of a message that is far too large, whose sender is to see why.
MAX_CLOSING_FRAMES = 512
MAX_CLOSING_BYTES = 16777216

_CLOSED = SlimServerProtocol.STATE_CLOSED
_CONNECTING = SlimServerProtocol.STATE_CONNECTING
_MAX_CONTROL_PAYLOAD = 125
_MAX_REASON = 123
#: Autobahn reads a frame in two steps, its header and its payload.
_MAX_CLOSING_STEPS = 2 * MAX_CLOSING_FRAMES


@implementer(IPushProducer, IFileDescriptorReceiver)
class ServerConnection(FastPathConnection):
    """One connection, from its opening to its end. A subclass overrides the hooks."""

    closeHandshakeTimeout = CLOSE_TIMEOUT

    #: how many bytes may wait for a slow reader, and how many more for a moment; see :mod:`gateway.websocket.limits`
    send_buffer = 1048576
    burst = 0
    #: ``host:port`` of the other end, ``[host]:port`` for IPv6, ``unix`` for a UNIX socket
    address = ""
    #: when bytes last came, by the clock of the factory
    last_received_at = 0.0

    _is_open = False
    _discard_input = False
    _producer_registered = False
    _slow_consumer: SlowConsumerDetector | None = None
    _closing_steps = 0
    _discarded_bytes = 0
    _refused = False
    _linger_timer: Timer | None = None
    closeHandshakeTimeoutCall: Timer | None = None
    _message: bytes | bytearray | None = None
    _message_size = 0

    # Hooks.

    def opened(self) -> None:
        """The connection is open: the 101 is on its way, and messages can be sent."""

    def text_received(self, payload: bytes) -> None:
        """One whole text message, valid UTF-8. Never before :meth:`opened` nor after :meth:`ended`."""

    def closed(self, code: int) -> None:
        """Nothing can be sent or received any more: a close frame was sent or received, or the connection was lost.

        ``code`` is that of the side that closed first, 1005 where its frame had none, 1006 without a close frame.
        Said once, after :meth:`opened`; the socket may live on until the closing handshake is over.
        """

    def frame_received(self, message: bytes) -> None:
        """A frame was read. Called before its content is handed on.

        ``message`` is the message that is whole with it; empty for a piece of one before, a ping and a pong.
        """

    # What can be done to it.

    @property
    def unsent_bytes(self) -> float:
        """How many bytes its transport holds that the kernel has not taken; 0 where it does not tell."""
        waiting = unsent_bytes(self.transport)
        return waiting if waiting < math.inf else 0.0

    @property
    def fd(self) -> int:
        """The file descriptor of its socket, -1 where it has none."""
        return socket_fd(self.transport)

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
        if not self._reading_paused and self.state in (_OPEN, _CONNECTING):
            self._reading_paused = True
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        """Go on reading, beginning with what had been read already."""
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resumeProducing()
            self._consume()

    # Bytes in.

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """A file came over a UNIX socket. Twisted would write a line to the log for each."""
        os.close(descriptor)

    def receive_data(self, data: bytes) -> None:
        """Bytes came on a connection that is open, closing or closed."""
        if self.state != _OPEN:
            unread = self._discard_input or self.state == _CLOSED
            self._discarded_bytes += len(data)
            if self._discarded_bytes > (MAX_DISCARDED_BYTES if unread else MAX_CLOSING_BYTES):
                self.abort()
                return
            if unread:
                return
        self.data += data
        self._consume()

    def message_complete(self, payload: bytes) -> None:
        """A text message is whole, and valid UTF-8."""
        self.frame_received(payload)
        try:
            self.text_received(payload)
        except Exception:  # noqa: BLE001
            self.factory.error_log.failure("an error in handling a message")
            self.close_with(CloseCode.INTERNAL_ERROR, "internal error")

    def _consume(self) -> None:
        try:
            self.consumeData()
        except Exception:  # noqa: BLE001
            self._on_parser_error()

    def consumeData(self) -> None:
        """Handle what was read, unless that is being done already further up the stack, or reading is paused."""
        if self._is_consuming or self.state in (_CLOSED, _CONNECTING):
            return
        self._is_consuming = True
        begun = self.factory.cork.cork()
        try:
            while not self._reading_paused and self._process_next():
                pass
        finally:
            self._is_consuming = False
            if begun:
                self.factory.cork.uncork()

    def _process_next(self) -> bool:
        """Handle as many whole frames as come next, and one step of what is none; whether there may be more."""
        if self.data and self.state == _OPEN and is_between_messages(self):
            data, self.data = self.data, b""
            self.data = self.process_fast(data) + self.data
            if not self.data or self._reading_paused or self.has_partial_frame():
                return False
        return self.processData() and not (self.state != _OPEN and self._has_read_enough())

    def _has_read_enough(self) -> bool:
        self._closing_steps += 1
        if self._closing_steps > _MAX_CLOSING_STEPS:
            # Not aborted, so that the close frame arrives; that its answer was not found ends the connection in time.
            self._discard_input = True
            self.data = b""
        return self._discard_input or self.state == _CLOSED

    def _on_parser_error(self) -> None:
        self.factory.error_log.failure("an error in reading a WebSocket's frames")
        self.close_with(CloseCode.INTERNAL_ERROR, "internal error")
        # Where the next frame begins is unknown.
        self._discard_input = True
        self.data = b""

    # Messages; Autobahn calls these for each frame and each piece of it that was read.

    def onMessageBegin(self, isBinary: bool) -> None:
        """A message begins."""
        self._message = b""
        self._message_size = 0
        if isBinary:
            self._fail_connection(CloseCode.UNSUPPORTED_DATA, "messages are text here, not binary")

    def onMessageFrameBegin(self, length: int) -> None:
        """A frame of a message begins; ``length`` is what its header says."""
        self._message_size += length
        if self._message_size > self.maxMessagePayloadSize:
            self._fail_connection(CloseCode.MESSAGE_TOO_BIG, f"a message may have {self.maxMessagePayloadSize} bytes")

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
        self.factory.reassembly_budget.charge(self, len(payload))

    def onMessageFrameEnd(self) -> None:
        """A frame of a message is whole."""
        if not self.current_frame.fin and self.state == _OPEN:
            self.frame_received(b"")

    def onMessageEnd(self) -> None:
        """A message is whole."""
        message, self._message = self._message, None
        self.factory.reassembly_budget.release(self)
        if self.state != _OPEN or message is None:
            return
        self.message_complete(bytes(message))

    def onFrameData(self, payload: bytes) -> bool | None:
        """Autobahn keeps the payload of a control frame even when its length broke the protocol."""
        if self.current_frame.opcode > 7 and self.current_frame.length > _MAX_CONTROL_PAYLOAD:
            return None
        result: bool | None = super().onFrameData(payload)
        return result

    def onPing(self, payload: bytes) -> None:
        """A ping came: answer it."""
        if self.state == _OPEN:
            self.frame_received(b"")
            self.sendPong(payload)

    def onPong(self, payload: bytes) -> None:
        """A pong came."""
        if self.state == _OPEN:
            self.frame_received(b"")

    # Bytes out.

    def sendData(
        self, data: bytes, sync: bool = False, chopsize: int | None = None, *, immediate: bool = False
    ) -> None:
        """Write bytes, and count those that wait behind a full buffer."""
        backlog = self._slow_consumer
        size = len(data) + self._corked_size
        super().sendData(data, immediate=immediate)
        if backlog is not None:
            backlog.add_written(size)

    def pauseProducing(self) -> None:
        """The transport's buffer is full. Twisted says so again at each further write."""
        if self._slow_consumer is None and self.state == _OPEN:
            self._slow_consumer = SlowConsumerDetector(
                self.transport, self.factory._batched_timer, self.send_buffer, self.burst, self._on_slow_consumer
            )

    def resumeProducing(self) -> None:
        """The transport's buffer is empty again."""
        backlog, self._slow_consumer = self._slow_consumer, None
        if backlog is not None:
            backlog.stop()

    def _on_slow_consumer(self) -> None:
        if self.state == _OPEN:
            self.factory.metrics.slow_readers += 1
            self.close_with(CloseCode.TRY_AGAIN_LATER, "reads too slowly")

    def stopProducing(self) -> None:
        """The transport is gone."""
        self._producer_registered = False

    def unregisterProducer(self) -> None:
        """Let the transport end when it is told to: it waits for a producer."""
        if self._producer_registered:
            self._producer_registered = False
            self.transport.unregisterProducer()

    # Parking.

    def detach_idle(self) -> tuple[int, int] | None:
        """Give up the socket, if nothing is going on."""
        return None if self._slow_consumer is not None else super().detach_idle()

    def resume_open(self) -> None:
        """It is a connection that was open before it had this object."""
        self._connectionMade()
        self._is_open = self._producer_registered = True
        self.transport.registerProducer(self, True)

    # The end.

    def _notify_closed(self, code: int) -> None:
        self.factory.reassembly_budget.release(self)
        if self._is_open:
            self._is_open = False
            self._message = None
            try:
                self.closed(code)
            except Exception:  # noqa: BLE001
                self.factory.error_log.failure("an error in handling the end of a connection")

    def _fail_connection(self, code: int = CloseCode.ABNORMAL_CLOSURE, reason: str = "") -> None:
        """Close because of what the other side did, once (RFC 6455, section 7.1.7)."""
        self.close_with(code, reason)

    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        """Send a close frame; from here on nothing is handed on."""
        was_open = self.state == _OPEN
        super().sendCloseFrame(code=code, reasonUtf8=reasonUtf8, isReply=isReply)
        if was_open:
            first = self.remoteCloseCode if isReply else code
            self._notify_closed(CloseCode.NO_STATUS_RCVD if first is None else first)
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
            self._notify_closed(CloseCode.ABNORMAL_CLOSURE)

    def _closeConnection(self, abort: bool = False) -> None:
        # Autobahn aborts, by a TCP reset, even when both close frames were exchanged.
        if abort and not self.wasClean:
            self.transport.abortConnection()
            return
        if self._refused and not ISSLTransport.providedBy(self.transport):
            # With bytes unread in the kernel a close is a reset, which can destroy the answer on its way.
            half_close = getattr(self.transport, "loseWriteConnection", self.transport.loseConnection)
            half_close()
            patience = LINGER_TIMEOUT
        else:
            self.transport.loseConnection()
            patience = LINGER_TIMEOUT if self._refused else CLOSE_TIMEOUT
        self._linger_timer = self.factory._batched_timer.call_later(patience, self._on_linger_timeout)

    def _on_linger_timeout(self) -> None:
        self._linger_timer = None
        self.transport.abortConnection()

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        """Autobahn says so when the connection is lost; by then :meth:`ended` was or will be called."""

    def connectionLost(self, reason: Any) -> None:
        """The transport is gone."""
        self._producer_registered = False
        # Autobahn would fire that Deferred here.
        self.state = _CLOSED
        super().connectionLost(reason)
        for timer in (self.closeHandshakeTimeoutCall, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self.closeHandshakeTimeoutCall = self._linger_timer = None
        if self._slow_consumer is not None:
            self._slow_consumer.stop()
            self._slow_consumer = None
        self.data = b""
        self._message = None
        self._notify_closed(CloseCode.ABNORMAL_CLOSURE)
