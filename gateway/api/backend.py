"""Backend WebSocket at ``/v1/backend``: JSON-RPC 2.0 both ways, many calls in flight, responses in any order.

    -> {"jsonrpc":"2.0","id":7,"method":"client.call","params":{"client":"x","method":"disk.usage","timeout":5}}
    <- {"jsonrpc":"2.0","id":7,"result":{"free":12}}                       or "error": the client's, byte for byte
    <- {"jsonrpc":"2.0","id":7,"error":{"code":-32001,…},"gateway":true}     the gateway's own error
    -> {"jsonrpc":"2.0","method":"client.notify","params":{"client":"x","method":"policy.changed","params":[3]}}
    -> {"jsonrpc":"2.0","id":8,"method":"client.get","params":{"client":"x"}}
    -> {"jsonrpc":"2.0","id":9,"method":"events.subscribe","params":{"kinds":["connected","disconnected","message"]}}
    -> {"jsonrpc":"2.0","id":10,"method":"upstream.serve"}

The methods are in methods.py; events and upstream calls, which the gateway pushes, in upstream.py. The responses to a
batch are sent as one array (JSON-RPC 2.0, section 6).

A backend that does not read its responses is not read from, so it cannot send new calls. It is closed with 1013 when
more than ``--send-buffer`` bytes of events and upstream calls wait for it and it has not emptied its buffer for
``SLOW_CONSUMER_TIMEOUT`` seconds, or when ``BURST_FACTOR`` times as many wait at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.api.access import AccessPolicy
from gateway.api.methods import FastCallParams, FastRequest, MethodTable, decode_fast
from gateway.api.responses import MAX_ENVELOPE_SIZE, encode_reply, error_object, invalid_message_error
from gateway.api.upstream import BackendDispatcher, IBackendConnection
from gateway.auth.backend_tokens import UNLIMITED, Grant
from gateway.metrics import Metrics
from gateway.net.transport import unsent_bytes
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.frames import CloseCode
from gateway.protocol.jsonrpc import MAX_BAD_MESSAGES, SUBPROTOCOL
from gateway.rpc.interface import IDispatcher
from gateway.rpc.pending import Call, Reply
from gateway.settings import Settings
from gateway.util.cork import Cork
from gateway.websocket.server import HandshakeRequest, RequestRefusedError, ServerFactory, ServerProtocol
from gateway.websocket.slow_consumer import SLOW_CONSUMER_TIMEOUT

#: responses of the largest size that may wait for a backend that does not read
MAX_UNREAD_RESPONSES = 64
#: multiple of --send-buffer that may wait for a backend that is not yet known to be slow
BURST_FACTOR = 16
#: interval of the keep-alive sweep, in seconds
SWEEP_INTERVAL = 1.0


class ResponseBatch:
    """Collect the responses to a batch and send them as one array, in request order, once all are there."""

    __slots__ = ("_finished", "_outstanding", "_responses", "_send")

    def __init__(self, send: Callable[[bytes], Any]) -> None:
        self._send = send
        self._responses: list[bytes] = []
        self._outstanding = 0
        self._finished = False

    def add_slot(self) -> Callable[[bytes], None]:
        """Reserve the place of the next response; returns the callable that fills it."""
        self._responses.append(b"")
        self._outstanding += 1
        return partial(self._fill, len(self._responses) - 1)

    def finish(self) -> None:
        """Declare that all slots are reserved."""
        self._finished = True
        self._send_if_done()

    def _fill(self, index: int, response: bytes) -> None:
        self._responses[index] = response
        self._outstanding -= 1
        self._send_if_done()

    def _send_if_done(self) -> None:
        if self._finished and not self._outstanding and self._responses:
            self._send(jsonrpc.encode_batch(self._responses))


@implementer(IBackendConnection)
class BackendProtocol(ServerProtocol):
    """WebSocket connection of one backend."""

    path = "/v1/backend"
    buffers_partial_frames = True
    #: time of the last ping, by the reactor's clock
    pinged_at = 0.0
    #: seconds without a pong to that ping, counted in sweeps
    pong_overdue = 0.0

    #: what the token allows, always current; unlimited for peer connections
    grant: Grant = UNLIMITED
    #: whether the connection is open: messages can be handled and answered
    _active = False
    #: whether the transport's send buffer was full and has not been empty since
    _congested = False
    #: seconds since then, counted in sweeps
    congested_for = 0.0
    #: invalid messages in a row
    _consecutive_bad = 0
    #: bytes pushed since the send buffer was full
    _pushed_bytes = 0

    #: encodes a reply as the response to a raw id; overridden by ``PeerServerProtocol``
    encode_reply = staticmethod(encode_reply)

    def encode_gateway_error(self, id: bytes, error: bytes) -> bytes:
        """Encode an error of the gateway itself as the response to a raw id; overridden by ``PeerServerProtocol``."""
        return jsonrpc.encode_gateway_error(id, error)

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        """Apply the access policy. Raises ``RequestRefusedError``."""
        self.grant = self.factory.access_policy.check("GET", request.path, header_lookup(request))
        return succeed(select_subprotocol(request))

    def refuse(self, refusal: RequestRefusedError) -> None:
        """Refuse the opening handshake, and count its HTTP status."""
        if self.state == self.STATE_CONNECTING:
            self.factory.metrics.api_requests[str(refusal.status)] += 1
        super().refuse(refusal)

    def opened(self) -> None:
        """Start handling messages."""
        self.factory.metrics.api_requests["101"] += 1
        self._upstream: BackendDispatcher = self.factory.upstream
        self._methods: MethodTable[Any] = self.factory.methods
        self._dispatcher: IDispatcher = self._methods.dispatcher
        #: requests without a response yet, the oldest first
        self._in_progress: dict[Deferred[Reply] | BackendCall, None] = {}
        self._active = True
        self.factory.add(self)

    def closed(self, code: int) -> None:
        """Cancel the backend's calls, and end its subscriptions and serving."""
        self._active = False
        self.factory.discard(self)
        self._upstream.remove(self)
        for request in list(self._in_progress):
            request.cancel()
        self._in_progress.clear()

    # IBackendConnection

    @property
    def is_reading(self) -> bool:
        """Whether the backend reads, has room for more, or may not have had time to read yet."""
        # One message of a client may be a thousand events, and nothing is written before the reactor iteration ends.
        if not self._congested:
            return True
        limit = self.factory.max_pushed_bytes * (1 if self.congested_for > SLOW_CONSUMER_TIMEOUT else BURST_FACTOR)
        return bool(min(self._pushed_bytes, unsent_bytes(self.transport)) < limit)

    def push(self, payload: bytes) -> None:
        """Send an event or an upstream call."""
        self.send_text(payload)
        if self._congested:
            self._pushed_bytes += len(payload)

    def drop_slow_consumer(self) -> None:
        """Close the connection with 1013 because the backend does not read."""
        self.factory.metrics.slow_readers += 1
        self.close_with(CloseCode.TRY_AGAIN_LATER, "reads its events too slowly")

    def pauseProducing(self) -> None:
        """Stop reading from the backend while it does not read."""
        # A transport calls this again at every write while its buffer is full.
        if not self._congested:
            self._congested = True
            self.congested_for = 0.0
            self._pushed_bytes = 0
            super().pauseProducing()
            if self._active:
                self.pause_reading()

    def resumeProducing(self) -> None:
        """Read again: the send buffer is empty."""
        self._congested = False
        super().resumeProducing()
        self.resume_reading()

    def resume_reading(self) -> None:
        """Resume reading, unless the backend does not read. In the closing handshake, read in any case, to receive the
        close frame."""
        if not (self._congested and self._active):
            super().resume_reading()

    # Messages.

    def text_received(self, payload: bytes) -> None:
        """Handle one message or batch."""
        request = decode_fast(payload)
        if request is None or not self._dispatch_fast(request):
            self._dispatch_general(payload)

    #: Skips ``frame_received()`` and the exception handling of ``ServerConnection.message_complete()``: messages of
    #: backends are not rate-limited, and any exception closes the connection with 1011 anyway.
    message_complete = text_received

    def _dispatch_general(self, payload: bytes) -> None:
        """Handle a message or batch of any kind."""
        message = jsonrpc.decode(payload)
        if isinstance(message, jsonrpc.Invalid):
            self._handle_invalid(message, jsonrpc.unreadable_response_id(payload), self.send_text)
        elif isinstance(message, list):
            self._handle_batch(message)
        else:
            self._handle_message(message, self.send_text)

    def _dispatch_fast(self, request: FastRequest[FastCallParams]) -> bool:
        """Do what :meth:`_dispatch_general` does, for a call or notification that can be sent at once.

        Returns ``False``, having done nothing, if it cannot be, or if the token does not allow it.
        """
        is_call, id, message, params = request
        client_id = message.client
        in_progress = self._in_progress
        if len(in_progress) >= self.factory.max_in_progress:
            return False
        if self.grant.is_limited and not self.grant.allows("call" if is_call else "notify", client_id):
            return False
        try:
            if is_call:
                assert id is not None
                # try_call() may complete the call before it returns.
                call = BackendCall(self, id)
                in_progress[call] = None
                if not self._dispatcher.try_call(call, client_id, message.method, params, message.timeout):
                    in_progress.pop(call, None)
                    return False
            elif not self._dispatcher.try_notify(client_id, message.method, params):
                return False
            elif id is not None:
                self.send_text(jsonrpc.encode_result(id, b"null"))
        except RpcError as e:
            if is_call:
                in_progress.pop(call, None)
            if id is not None:
                self.send_text(self.encode_gateway_error(id, e.to_json()))
        self._consecutive_bad = 0
        return True

    def _handle_message(self, message: jsonrpc.Message, respond: Callable[[bytes], Any]) -> None:
        if isinstance(message, jsonrpc.Request):
            self._consecutive_bad = 0
            self._dispatch(message.method, message.params, message.id, respond)
        elif isinstance(message, jsonrpc.Notification):
            self._consecutive_bad = 0
            self._dispatch(message.method, message.params, b"null", _discard_response)
        elif isinstance(message, jsonrpc.Response):
            self._consecutive_bad = 0
            self._upstream.response_received(self, message)
        else:
            self._handle_invalid(message, message.id[1:-1].decode(), respond)

    def _handle_batch(self, messages: list[jsonrpc.Message]) -> None:
        batch = ResponseBatch(self.send_text)
        for message in messages:
            if not self._active:
                return
            # Notifications and responses get no response (JSON-RPC 2.0, section 6).
            needs_response = isinstance(message, (jsonrpc.Request, jsonrpc.Invalid))
            self._handle_message(message, batch.add_slot() if needs_response else _discard_response)
        batch.finish()

    def _handle_invalid(self, message: jsonrpc.Invalid, uuid: str | None, respond: Callable[[bytes], Any]) -> None:
        """Answer a message that is not JSON-RPC. ``uuid`` is the id of the upstream call that it may respond to."""
        self.factory.metrics.bad_messages["backend"] += 1
        self._consecutive_bad += 1
        respond(self.encode_gateway_error(message.id, invalid_message_error(message).to_json()))
        if uuid is not None:
            self._upstream.response_unreadable(self, uuid)
        if self._consecutive_bad >= MAX_BAD_MESSAGES:
            self.close_with(CloseCode.POLICY_VIOLATION, f"{MAX_BAD_MESSAGES} messages in a row were not JSON-RPC 2.0")

    def _dispatch(self, method: str, params: bytes | None, id: bytes, respond: Callable[[bytes], Any]) -> None:
        try:
            if len(self._in_progress) >= self.factory.max_in_progress:
                raise RpcError(ErrorKind.TOO_MANY_CALLS, detail=self.factory.full_detail)
            result = self._methods.start(self, method, params)
        except RpcError as e:
            respond(self.encode_gateway_error(id, e.to_json()))
            return
        if isinstance(result, Reply):
            respond(self.encode_reply(result, id))
            return
        self._request_started(result, id)
        result.addBoth(self._send_result, result, id, respond)

    def _request_started(self, request: Deferred[Reply], id: bytes) -> None:
        self._in_progress[request] = None

    def _request_finished(self, request: Deferred[Reply], id: bytes) -> None:
        self._in_progress.pop(request, None)

    def _send_result(
        self, result: Reply | Failure, request: Deferred[Reply], id: bytes, respond: Callable[[bytes], Any]
    ) -> None:
        self._request_finished(request, id)
        if not self._active:
            return
        if isinstance(result, Reply):
            respond(self.encode_reply(result, id))
        else:
            respond(self.encode_gateway_error(id, error_object(result, None)))


class BackendCall(Call):
    """Call of a backend on the fast path, without a Deferred."""

    __slots__ = ("_backend", "_raw_id")

    def __init__(self, backend: BackendProtocol, id: bytes) -> None:
        self._backend = backend
        #: the id that the backend gave the call
        self._raw_id = id

    def complete(self, result: Reply | RpcError) -> None:
        """Send the response."""
        backend = self._backend
        backend._in_progress.pop(self, None)
        if not backend._active:
            return
        if isinstance(result, RpcError):
            backend.send_text(backend.encode_gateway_error(self._raw_id, result.to_json()))
        elif result.result is not None:
            backend.send_text(jsonrpc.encode_result(self._raw_id, result.result))
        else:
            backend.send_text(backend.encode_reply(result, self._raw_id))

    def cancel(self) -> None:
        """Forget the call: its backend is gone."""
        self._backend._dispatcher.cancel(self)


def _discard_response(response: bytes) -> None:
    """Drop the response to a notification."""


def header_lookup(request: HandshakeRequest) -> Callable[[str], Sequence[str]]:
    """Return a function from a header's name to its values, as the access policy takes it."""
    headers = request.headers
    return lambda name: [headers[name.lower()]] if name.lower() in headers else []


def select_subprotocol(request: HandshakeRequest) -> str | None:
    """Return the subprotocol if the client offers it, else ``None``."""
    return SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None


class BackendFactory(ServerFactory):
    """Make the WebSocket connections of backends, and keep them alive."""

    def __init__(
        self,
        *,
        access_policy: AccessPolicy,
        methods: MethodTable[Any],
        upstream: BackendDispatcher,
        metrics: Metrics,
        settings: Settings,
        reactor: Any,
        cork: Cork | None = None,
        protocol: type[BackendProtocol] = BackendProtocol,
    ) -> None:
        size = settings.max_message_size + MAX_ENVELOPE_SIZE
        super().__init__(
            protocol,
            metrics=metrics,
            reactor=reactor,
            max_message_size=size,
            send_buffer=settings.send_buffer + MAX_UNREAD_RESPONSES * size,
            max_openings=settings.max_openings,
            cork=cork,
        )
        self.access_policy = access_policy
        self.methods = methods
        self.upstream = upstream
        self.max_pushed_bytes = settings.send_buffer
        self.max_in_progress = settings.max_calls
        self.full_detail = f"too many requests of this connection are in progress (--max-calls {settings.max_calls})"
        self._ping_interval = settings.ping_interval
        self._ping_timeout = settings.ping_timeout
        self.timers = reactor
        self._connections: dict[BackendProtocol, None] = {}
        self._sweep_timer: IDelayedCall | None = None

    def add(self, backend: BackendProtocol) -> None:
        """Register an open connection."""
        self._connections[backend] = None
        if self._sweep_timer is None:
            self._sweep_timer = self.timers.callLater(SWEEP_INTERVAL, self._sweep)

    def discard(self, backend: BackendProtocol) -> None:
        """Remove a closed connection."""
        self._connections.pop(backend, None)
        if not self._connections and self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None

    def broadcast(self, payload: bytes) -> int:
        """Push a message to every open connection; returns their number."""
        for backend in list(self._connections):
            backend.push(payload)
        return len(self._connections)

    def _sweep(self) -> None:
        """Ping silent connections, and drop those that stay silent.

        Overdue time is counted in sweeps, not by the clock: a process that was stopped could not receive a pong.
        """
        self._sweep_timer = self.timers.callLater(SWEEP_INTERVAL, self._sweep)
        now = self.timers.seconds()
        for backend in list(self._connections):
            backend.congested_for += SWEEP_INTERVAL
            if now - backend.last_received_at < self._ping_interval:
                continue
            if backend.pinged_at <= backend.last_received_at:
                backend.pinged_at = now
                backend.pong_overdue = 0.0
                backend.ping()
                continue
            backend.pong_overdue += SWEEP_INTERVAL
            if backend.pong_overdue >= self._ping_timeout:
                backend.abort()
