"""An open WebSocket connection of the server: Autobahn's protocol made safe, with a fast path past it.

Every corner of RFC 6455 is Autobahn's. What this module changes:

* settings and initial attributes are on the class, and nothing is logged (slim_protocol.py)
* whole text, ping and pong frames are read without Autobahn, and text messages written without it: nearly all of the
  traffic of a backend, and of a client that cannot be parked (TLS)
* a message in many small fragments takes no more memory than its bytes
* once a close frame was sent, nothing received is delivered, kept, or answered a second time, and little is read
* a reader that is too slow is closed with 1013; a peer that does not answer a close frame is aborted
* reading can be paused between any two messages, even of one segment
* the socket of an idle connection can be detached, to park it
"""

from __future__ import annotations

import enum
import math
import os
from typing import Any

from autobahn.util import encode_truncate
from twisted.internet.interfaces import IFileDescriptorReceiver, IPushProducer, ISSLTransport
from zope.interface import implementer

from gateway.net.transport import detach_idle, is_between_messages, plain_transport, socket_fd, unsent_bytes, write_now
from gateway.protocol.frames import MAX_PAYLOAD, PING, TEXT, CloseCode, decode, encode, is_partial
from gateway.util.timers import Timer
from gateway.websocket.handshake_limiter import HANDSHAKE_TIMEOUT
from gateway.websocket.slim_protocol import SlimServerProtocol
from gateway.websocket.slow_consumer import SlowConsumerDetector

#: bytes of frames that may be held while the connection is corked
MAX_CORKED_BYTES = 2**16
#: seconds that closing a connection may take
CLOSE_TIMEOUT = 3.0
#: seconds for which a refused client is still read from, so that the response reaches it
LINGER_TIMEOUT = 1.0
#: bytes read and discarded, at most, from a connection that is refused, closed, or whose frames cannot be parsed
MAX_DISCARDED_BYTES = 2**20
#: At most this many frames are parsed after a close frame was sent, to find its answer.
MAX_CLOSING_FRAMES = 512
#: At most this many bytes are parsed after a close frame was sent, to find its answer. Enough for the rest of a message
#: that is far too large, so that its sender sees the close code.
MAX_CLOSING_BYTES = 2**24

_OPEN = SlimServerProtocol.STATE_OPEN
_CLOSED = SlimServerProtocol.STATE_CLOSED
_CONNECTING = SlimServerProtocol.STATE_CONNECTING
#: bytes of a fragment that costs nothing beside the message, which is charged by its size
MIN_FREE_FRAGMENT = 2**14
_MAX_CONTROL_PAYLOAD = 125
#: bytes of a close frame's reason: its payload less the code
_MAX_REASON = 123
#: Autobahn reads a frame in two steps, header and payload
_MAX_CLOSING_STEPS = 2 * MAX_CLOSING_FRAMES


class ConnectionPhase(enum.Enum):
    """The phase of a connection, in more detail than Autobahn's ``state``.

    HANDSHAKE -> OPEN            onOpen(), resume_open(); Autobahn's ``state`` is OPEN a little earlier
    HANDSHAKE -> REFUSED         refuse(): the response is written
    OPEN -> CLOSING              a close frame was sent, or the transport dropped or lost; ``closed()`` is called
    OPEN|CLOSING -> DISCARDING   frames cannot be parsed, or no close frame came in the next MAX_CLOSING_FRAMES

    ``state`` is CLOSED, in any phase but OPEN, once the transport is dropped or lost. Input is then discarded as well.
    """

    HANDSHAKE = enum.auto()
    REFUSED = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()
    DISCARDING = enum.auto()


@implementer(IPushProducer, IFileDescriptorReceiver)
class ServerConnection(SlimServerProtocol):
    """One connection, from open to closed. Subclasses override the hooks."""

    openHandshakeTimeout = HANDSHAKE_TIMEOUT
    closeHandshakeTimeout = CLOSE_TIMEOUT

    #: Whether to keep a partial frame until the rest arrives, instead of passing it to Autobahn. A stream of messages
    #: is read in segments that end anywhere, and a partial frame in Autobahn takes the whole next segment off the fast
    #: path; but Autobahn would detect a protocol error in a partial frame at once.
    buffers_partial_frames = False
    #: bytes that may be queued for a slow reader; see :mod:`gateway.websocket.slow_consumer`
    send_buffer = 2**20
    #: further bytes that may be queued for a moment
    burst = 0
    #: ``host:port`` of the peer, ``[host]:port`` for IPv6, ``unix`` for a UNIX socket
    address = ""
    #: when bytes were last received, by the factory's clock
    last_received_at = 0.0

    state: int
    data: bytes
    _phase = ConnectionPhase.HANDSHAKE
    _reading_paused = False
    _is_consuming = False
    #: frames held until the node is uncorked
    _corked_frames: list[bytes] | None = None
    _corked_size = 0
    _producer_registered = False
    _slow_consumer: SlowConsumerDetector | None = None
    _closing_steps = 0
    _discarded_bytes = 0
    _linger_timer: Timer | None = None
    closeHandshakeTimeoutCall: Timer | None = None
    _message: bytes | bytearray | None = None
    _message_size = 0

    # Hooks.

    def opened(self) -> None:
        """Handle the open connection: the 101 response is written, and messages can be sent."""

    def text_received(self, payload: bytes) -> None:
        """Handle one whole text message, valid UTF-8. Never called before :meth:`opened` nor after :meth:`closed`."""

    def closed(self, code: int) -> None:
        """Handle the end of messages: a close frame was sent or received, or the connection was lost.

        ``code`` is that of the side that closed first, 1005 if its frame had none, 1006 without a close frame. Called
        once, after :meth:`opened`; the socket may outlive it until the closing handshake is complete.
        """

    def frame_received(self) -> None:
        """Count a frame that completes no message: a ping, a pong, and a fragment of less than ``MIN_FREE_FRAGMENT``
        bytes. The size of a message counts in itself."""

    def limit_exceeded(self, option: str) -> None:
        """Take note that the connection is closed because of a limit, that of this option."""

    # Operations.

    @property
    def unsent_bytes(self) -> float:
        """Bytes that its transport holds and the kernel has not taken; 0 if the transport does not tell."""
        queued = unsent_bytes(self.transport)
        return queued if queued < math.inf else 0.0

    @property
    def fd(self) -> int:
        """The file descriptor of its socket, -1 if it has none."""
        return socket_fd(self.transport)

    def send_text(self, payload: bytes) -> bool:
        """Send one text message (UTF-8). Returns ``False`` if the connection is not open."""
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

    def close_with(self, code: int, reason: str = "") -> None:
        """Start the closing handshake with any code; abort if the peer does not answer within ``CLOSE_TIMEOUT``.

        ``reason`` is cut to the 123 bytes that a close frame has room for.
        """
        if self.state == _OPEN:
            self.sendCloseFrame(code=code, reasonUtf8=encode_truncate(reason, _MAX_REASON))

    def abort(self) -> None:
        """Drop the connection at once, without a close frame."""
        if self.state == _CLOSED:
            self.transport.abortConnection()
        else:
            self.dropConnection(abort=True)

    def ping(self) -> None:
        """Send a ping frame without payload (RFC 6455, section 5.5.2)."""
        self.sendPing()

    def pause_reading(self) -> None:
        """Deliver no further message, and stop reading, until :meth:`resume_reading`."""
        if not self._reading_paused and self.state in (_OPEN, _CONNECTING):
            self._reading_paused = True
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        """Continue reading, beginning with the bytes that were already read."""
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resumeProducing()
            self._consume()

    # Bytes in.

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Close a file descriptor passed over a UNIX socket. Twisted would log a line for each."""
        os.close(descriptor)

    def receive_data(self, data: bytes) -> None:
        """Handle bytes received on a connection that is open, closing or closed."""
        if self.state != _OPEN:
            discard = self._phase is ConnectionPhase.DISCARDING or self.state == _CLOSED
            self._discarded_bytes += len(data)
            if self._discarded_bytes > (MAX_DISCARDED_BYTES if discard else MAX_CLOSING_BYTES):
                self.abort()
                return
            if discard:
                return
        self.data += data
        self._consume()

    def message_complete(self, payload: bytes) -> None:
        """Deliver a whole text message, valid UTF-8."""
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
        """Handle the bytes read so far, unless a caller further up the stack does it, or reading is paused."""
        if self._is_consuming or self.state in (_CLOSED, _CONNECTING):
            return
        self._is_consuming = True
        corked = self.factory.cork.cork()
        try:
            while not self._reading_paused and self._process_next():
                pass
        finally:
            self._is_consuming = False
            if corked:
                self.factory.cork.uncork()

    def _process_next(self) -> bool:
        """Handle the whole frames that come next, then one step of Autobahn's; return whether there may be more."""
        if self.data and self.state == _OPEN and is_between_messages(self):
            data, self.data = self.data, b""
            self.data = self.process_fast(data) + self.data
            if not self.data or self._reading_paused or self.has_partial_frame():
                return False
        return self.processData() and not (self.state != _OPEN and self._has_read_enough())

    def process_fast(self, data: bytes) -> bytes:
        """Handle the whole frames at the start of ``data``, read between two messages; return the rest."""
        offset = 0
        end = len(data)
        max_size = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        while offset < end and self.state == _OPEN and not self._reading_paused:
            frame = decode(data, offset, max_size)
            if frame is None:
                break
            opcode, payload, offset = frame
            if opcode == TEXT:
                self.message_complete(payload)
            elif opcode == PING:
                self.onPing(payload)
            else:
                self.onPong(payload)
        return data[offset:]

    def has_partial_frame(self) -> bool:
        """Return whether to keep ``data``, a partial frame, until the rest arrives."""
        max_size = min(self.maxMessagePayloadSize, MAX_PAYLOAD)
        return self.buffers_partial_frames and self.state == _OPEN and is_partial(self.data, max_size)

    def _has_read_enough(self) -> bool:
        self._closing_steps += 1
        if self._closing_steps > _MAX_CLOSING_STEPS:
            # Not aborted, so that the close frame arrives; the close timeout ends the connection.
            self._discard_input()
        return self._phase is ConnectionPhase.DISCARDING or self.state == _CLOSED

    def _on_parser_error(self) -> None:
        self.factory.error_log.failure("an error in reading a WebSocket's frames")
        self.close_with(CloseCode.INTERNAL_ERROR, "internal error")
        # Where the next frame starts is unknown.
        self._discard_input()

    def _discard_input(self) -> None:
        # Leaves OPEN if sending the close frame failed; otherwise the connection has left it.
        self._notify_closed(CloseCode.ABNORMAL_CLOSURE)
        self._phase = ConnectionPhase.DISCARDING
        self.data = b""

    # Messages. Autobahn calls these for each frame, and each fragment of it, that it reads.

    def onMessageBegin(self, isBinary: bool) -> None:
        self._message = b""
        self._message_size = 0
        if isBinary:
            self._fail_connection(CloseCode.UNSUPPORTED_DATA, "messages are text here, not binary")

    def onMessageFrameBegin(self, length: int) -> None:
        """Check the size of a message; ``length`` is that of its next frame, from the header."""
        self._message_size += length
        if self._message_size > self.maxMessagePayloadSize:
            self.limit_exceeded(f"--max-message-size {self.maxMessagePayloadSize}")
            self._fail_connection(CloseCode.MESSAGE_TOO_BIG, f"a message may have {self.maxMessagePayloadSize} bytes")

    def onMessageFrameData(self, payload: bytes) -> None:
        """Append a piece of a frame's payload to the message."""
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
        frame = self.current_frame
        if not frame.fin and frame.length < MIN_FREE_FRAGMENT and self.state == _OPEN:
            self.frame_received()

    def onMessageEnd(self) -> None:
        message, self._message = self._message, None
        self.factory.reassembly_budget.release(self)
        if self.state != _OPEN or message is None:
            return
        self.message_complete(bytes(message))

    def onFrameData(self, payload: bytes) -> bool | None:
        """Drop the payload of a control frame that is too long; Autobahn would keep it."""
        if self.current_frame.opcode > 7 and self.current_frame.length > _MAX_CONTROL_PAYLOAD:
            return None
        result: bool | None = super().onFrameData(payload)
        return result

    def onPing(self, payload: bytes) -> None:
        """Answer a ping."""
        if self.state == _OPEN:
            self.frame_received()
            self.sendPong(payload)

    def onPong(self, payload: bytes) -> None:
        if self.state == _OPEN:
            self.frame_received()

    # Bytes out.

    def flush_corked(self) -> None:
        """Write the frames held while corked."""
        if self._corked_frames is not None:
            self.sendData(b"", immediate=True)

    def sendData(
        self, data: bytes, sync: bool = False, chopsize: int | None = None, *, immediate: bool = False
    ) -> None:
        """Write bytes, after the corked frames, and count those written to a full buffer.

        Everything that Autobahn sends passes here.
        """
        # Taken first: what fills the buffer is not counted.
        slow_consumer = self._slow_consumer
        frames = self._corked_frames
        if frames is not None:
            self._corked_frames = None
            self._corked_size = 0
            frames.append(data)
            data = b"".join(frames)
        if immediate:
            write_now(self.transport, data)
        else:
            self.transport.write(data)
        if slow_consumer is not None:
            slow_consumer.add_written(len(data))

    def pauseProducing(self) -> None:
        """Handle a full transport buffer. Twisted calls this again at each further write."""
        if self._slow_consumer is None and self.state == _OPEN:
            self._slow_consumer = SlowConsumerDetector(
                self.transport, self.factory._batched_timer, self.send_buffer, self.burst, self._on_slow_consumer
            )

    def resumeProducing(self) -> None:
        """Handle a transport buffer that is empty again."""
        slow_consumer, self._slow_consumer = self._slow_consumer, None
        if slow_consumer is not None:
            slow_consumer.stop()

    def _on_slow_consumer(self) -> None:
        if self.state == _OPEN:
            self.factory.metrics.slow_readers += 1
            self.limit_exceeded(f"--send-buffer {self.send_buffer}: it reads too slowly")
            self.close_with(CloseCode.TRY_AGAIN_LATER, "reads too slowly")

    def stopProducing(self) -> None:
        """Handle the loss of the transport; connectionLost follows."""
        self._producer_registered = False

    def unregisterProducer(self) -> None:
        """Unregister from the transport, which does not close while it has a producer."""
        if self._producer_registered:
            self._producer_registered = False
            self.transport.unregisterProducer()

    # Parking.

    @property
    def parkable(self) -> bool:
        """Whether it can ever be parked: not with TLS."""
        return plain_transport(self.transport) is not None

    def detach_idle(self) -> tuple[int, int] | None:
        """Detach the socket of an idle connection: its file descriptor and address family.

        Returns ``None``, and changes nothing, if the connection is not idle. After success this object must not be
        used any more.
        """
        if (
            self.state != _OPEN
            or self._slow_consumer is not None
            or self._reading_paused
            or self._is_consuming
            or self._corked_frames is not None
        ):
            return None
        return detach_idle(self)

    def resume_open(self) -> None:
        """Start with a transport whose connection is already open."""
        self._connectionMade()
        self._phase = ConnectionPhase.OPEN
        self._producer_registered = True
        self.transport.registerProducer(self, True)

    # Closing.

    def _notify_closed(self, code: int) -> None:
        self.factory.reassembly_budget.release(self)
        if self._phase is ConnectionPhase.OPEN:
            self._phase = ConnectionPhase.CLOSING
            self._message = None
            try:
                self.closed(code)
            except Exception:  # noqa: BLE001
                self.factory.error_log.failure("an error in handling the end of a connection")

    def _fail_connection(self, code: int = CloseCode.ABNORMAL_CLOSURE, reason: str = "") -> None:
        """Close, once, because of an error of the peer (RFC 6455, section 7.1.7). Overrides Autobahn's."""
        self.close_with(code, reason)

    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        """Send a close frame; from here on nothing is delivered."""
        was_open = self.state == _OPEN
        super().sendCloseFrame(code=code, reasonUtf8=reasonUtf8, isReply=isReply)
        if was_open:
            first_code = self.remoteCloseCode if isReply else code
            self._notify_closed(CloseCode.NO_STATUS_RCVD if first_code is None else first_code)
            # The peer's close frame must be read.
            self.resume_reading()

    def dropConnection(self, abort: bool = False) -> None:
        """Close or abort the transport, unless that was done."""
        # Not Autobahn's: it fires a Deferred with the protocol, which is a reference cycle.
        self.unregisterProducer()
        if self.state != _CLOSED:
            self.droppedByMe = True
            self.state = _CLOSED
            self.data = b""
            self._closeConnection(abort)
            self._notify_closed(CloseCode.ABNORMAL_CLOSURE)

    def _closeConnection(self, abort: bool = False) -> None:
        # Autobahn aborts, by a TCP reset, even after both close frames were exchanged.
        if abort and not self.wasClean:
            self.transport.abortConnection()
            return
        timeout = CLOSE_TIMEOUT
        close = self.transport.loseConnection
        if self._phase is ConnectionPhase.REFUSED:
            timeout = LINGER_TIMEOUT
            if not ISSLTransport.providedBy(self.transport):
                # With unread bytes in the kernel a close is a reset, which can destroy the response in transit.
                close = getattr(self.transport, "loseWriteConnection", close)
        close()
        self._linger_timer = self.factory._batched_timer.call_later(timeout, self._on_linger_timeout)

    def _on_linger_timeout(self) -> None:
        self._linger_timer = None
        self.transport.abortConnection()

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        """Ignore Autobahn's notice of the lost connection: :meth:`closed` was called, or will be."""

    def connectionLost(self, reason: Any) -> None:
        self._producer_registered = False
        # Else Autobahn would fire its Deferred here, as in dropConnection().
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
