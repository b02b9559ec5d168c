"""The answers to a batch, which are one message (JSON-RPC 2.0, section 6).

The WebSocket of backends, at ``/v1/backend``: JSON-RPC 2.0 both ways, many calls in flight, answered as they come.

    -> {"jsonrpc":"2.0","id":7,"method":"client.call","params":{"client":"x","method":"disk.usage","timeout":5}}
    <- {"jsonrpc":"2.0","id":7,"result":{"free":12}}
    -> {"jsonrpc":"2.0","method":"client.notify","params":{"client":"x","method":"policy.changed","params":[3]}}
    -> {"jsonrpc":"2.0","id":8,"method":"client.get","params":{"client":"x"}}
    -> {"jsonrpc":"2.0","id":9,"method":"events.subscribe","params":{"kinds":["connected","disconnected","message"]}}
    -> {"jsonrpc":"2.0","id":10,"method":"upstream.serve"}

What the gateway sends of its own accord is in upstream.py, what the methods do in methods.py. A backend that does not
read its answers is not read from, so that no new calls come of it. It is closed with 1013 when more than
``--send-buffer`` bytes of events and upstream calls wait for it and it has not read everything for ``SLOW_AFTER``
seconds, or when 16 times as many wait at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.api.access import AccessPolicy
from gateway.api.methods import FastRequest, MethodTable, decode_fast
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
from gateway.websocket.limits import SLOW_CONSUMER_TIMEOUT
from gateway.websocket.server import HandshakeRequest, RequestRefusedError, ServerFactory, ServerProtocol


class ResponseBatch:
    """The answers to a batch, sent as one array, in the order of what they answer, when the last is there."""

    __slots__ = ("_finished", "_outstanding", "_responses", "_send")

    def __init__(self, send: Callable[[bytes], Any]) -> None:
        self._send = send
        self._responses: list[bytes] = []
        self._outstanding = 0
        self._finished = False

    def add_slot(self) -> Callable[[bytes], None]:
        """Where to put the next message's answer."""
        self._responses.append(b"")
        self._outstanding += 1
        return partial(self._fill, len(self._responses) - 1)

    def finish(self) -> None:
        """There are no more messages."""
        self._finished = True
        self._send_if_done()

    def _fill(self, index: int, response: bytes) -> None:
        self._responses[index] = response
        self._outstanding -= 1
        self._send_if_done()

    def _send_if_done(self) -> None:
        if self._finished and not self._outstanding and self._responses:
            self._send(jsonrpc.encode_batch(self._responses))


#: so many of the largest messages may wait as answers for a backend that does not read; it asked for each of them
MAX_UNREAD_RESPONSES = 64
#: so many times --send-buffer may wait for one that just has not had the time to read
BURST_FACTOR = 16
#: how often idle backends are looked for, in seconds
SWEEP_INTERVAL = 1.0


@implementer(IBackendConnection)
class BackendProtocol(ServerProtocol):
    """One backend's connection."""

    path = "/v1/backend"
    buffers_partial_frames = True
    pinged_at = 0.0
    #: for how many seconds its answer to that ping has been missing, counted in sweeps
    pong_overdue = 0.0

    #: what its token is for, at any time; a node's link, which comes in by another way, is not limited
    grant: Grant = UNLIMITED
    #: messages can be handled and answered
    _active = False
    #: the transport's buffer was full and has not been empty since
    _congested = False
    #: for how many seconds that has been so, counted in sweeps
    congested_for = 0.0
    _consecutive_bad = 0
    _pushed_bytes = 0

    #: writes the response to a call of that raw id
    encode_reply = staticmethod(encode_reply)

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        """Let a backend in, or raise the guard's ``Refusal``."""
        headers = request.headers
        self.grant = self.factory.access_policy.check(
            "GET", request.path, lambda name: [headers[name.lower()]] if name.lower() in headers else []
        )
        return succeed(SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None)

    def refuse(self, refusal: RequestRefusedError) -> None:
        """Answer the request with an error."""
        if self.state == self.STATE_CONNECTING:
            self.factory.metrics.api_requests[str(refusal.status)] += 1
        super().refuse(refusal)

    def opened(self) -> None:
        """The connection is open."""
        self.factory.metrics.api_requests["101"] += 1
        self._upstream: BackendDispatcher = self.factory.upstream
        self._methods: MethodTable[Any] = self.factory.methods
        self._dispatcher: IDispatcher = self._methods.dispatcher
        #: what it asked and was not answered yet
        self._in_progress: set[Deferred[Reply] | BackendCall] = set()
        self._active = True
        self.factory.add(self)

    def closed(self, code: int) -> None:
        """It is gone: so are its calls, its subscriptions and its serving."""
        self._active = False
        self.factory.discard(self)
        self._upstream.remove(self)
        for work in list(self._in_progress):
            work.cancel()
        self._in_progress.clear()

    # IBackend

    @property
    def is_reading(self) -> bool:
        """Whether it reads what it is sent, or has room for more, or may just not have had the time."""
        # One client's message may be a thousand events, and nothing is written before the reactor's turn is over.
        if not self._congested:
            return True
        most = self.factory.max_pushed_bytes * (1 if self.congested_for > SLOW_CONSUMER_TIMEOUT else BURST_FACTOR)
        return bool(min(self._pushed_bytes, unsent_bytes(self.transport)) < most)

    def push(self, payload: bytes) -> None:
        """Send one message that it did not ask for."""
        self.send_text(payload)
        if self._congested:
            self._pushed_bytes += len(payload)

    def drop_slow_consumer(self) -> None:
        """Close it, since it does not read."""
        self.factory.metrics.slow_readers += 1
        self.close_with(CloseCode.TRY_AGAIN_LATER, "reads its events too slowly")

    def pauseProducing(self) -> None:
        """It does not read: neither is it read from."""
        # A transport says so again at every write while its buffer is full.
        if not self._congested:
            self._congested = True
            self.congested_for = 0.0
            self._pushed_bytes = 0
            super().pauseProducing()
            if self._active:
                self.pause_reading()

    def resumeProducing(self) -> None:
        """It has read everything."""
        self._congested = False
        super().resumeProducing()
        self.resume_reading()

    def resume_reading(self) -> None:
        """Go on reading, but not while it does not read itself. A close frame of its is waited for all the same."""
        if not (self._congested and self._active):
            super().resume_reading()

    # Messages.

    def text_received(self, payload: bytes) -> None:
        """One message or batch."""
        plain = decode_fast(payload)
        if plain is None or not self._dispatch_fast(plain):
            self._dispatch_general(payload)

    #: Nothing is metered here, and whatever is raised ends a connection with 1011 anyway.
    message_complete = text_received

    def _dispatch_general(self, payload: bytes) -> None:
        """The same for a message of any kind."""
        message = jsonrpc.decode(payload)
        if isinstance(message, jsonrpc.Invalid):
            self._handle_invalid(message, jsonrpc.unreadable_response_id(payload), self.send_text)
        elif isinstance(message, list):
            self._handle_batch(message)
        else:
            self._handle_message(message, self.send_text)

    def _dispatch_fast(self, request: FastRequest) -> bool:
        """The same as :meth:`_carry_out`, for a client that can be asked at once. ``False`` if it is none, or the token
        is not for it: nothing was done."""
        is_call, id, client_id, method, params, timeout = request
        work = self._in_progress
        if len(work) >= self.factory.max_in_progress:
            return False
        if self.grant.is_limited and not self.grant.allows("call" if is_call else "notify", client_id):
            return False
        try:
            if is_call:
                assert id is not None
                # It may be over before ask() returns.
                call = BackendCall(self, id)
                work.add(call)
                if not self._dispatcher.try_call(call, client_id, method, params, timeout):
                    work.discard(call)
                    return False
            elif not self._dispatcher.try_notify(client_id, method, params):
                return False
            elif id is not None:
                self.send_text(jsonrpc.encode_result(id, b"null"))
        except RpcError as e:
            if is_call:
                work.discard(call)
            if id is not None:
                self.send_text(jsonrpc.encode_error(id, e.to_json()))
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
            # Only these are answered (JSON-RPC 2.0, section 6).
            answered = isinstance(message, (jsonrpc.Request, jsonrpc.Invalid))
            self._handle_message(message, batch.add_slot() if answered else _discard_response)
        batch.finish()

    def _handle_invalid(self, message: jsonrpc.Invalid, uuid: str | None, respond: Callable[[bytes], Any]) -> None:
        """No JSON-RPC. ``uuid`` is that of a call that it may be meant as the response to."""
        self.factory.metrics.bad_messages["backend"] += 1
        self._consecutive_bad += 1
        respond(jsonrpc.encode_error(message.id, invalid_message_error(message).to_json()))
        if uuid is not None:
            self._upstream.response_unreadable(self, uuid)
        if self._consecutive_bad >= MAX_BAD_MESSAGES:
            self.close_with(CloseCode.POLICY_VIOLATION, f"{MAX_BAD_MESSAGES} messages in a row were no JSON-RPC 2.0")

    def _dispatch(self, method: str, params: bytes | None, id: bytes, respond: Callable[[bytes], Any]) -> None:
        try:
            if len(self._in_progress) >= self.factory.max_in_progress:
                raise RpcError(ErrorKind.TOO_MANY_CALLS, detail="too many requests of this connection are unanswered")
            outcome = self._methods.start(self, method, params)
        except RpcError as e:
            respond(jsonrpc.encode_error(id, e.to_json()))
            return
        if isinstance(outcome, Reply):
            respond(self.encode_reply(outcome, id))
            return
        self._request_started(outcome, id)
        outcome.addBoth(self._send_result, outcome, id, respond)

    def _request_started(self, request: Deferred[Reply], id: bytes) -> None:
        self._in_progress.add(request)

    def _request_finished(self, request: Deferred[Reply], id: bytes) -> None:
        self._in_progress.discard(request)

    def _send_result(
        self, result: Reply | Failure, request: Deferred[Reply], id: bytes, respond: Callable[[bytes], Any]
    ) -> None:
        self._request_finished(request, id)
        if not self._active:
            return
        if isinstance(result, Reply):
            respond(self.encode_reply(result, id))
        else:
            respond(jsonrpc.encode_error(id, error_object(result, None)))


class BackendCall(Call):
    """A backend's call to a client that can be asked at once."""

    __slots__ = ("_backend", "_raw_id")

    def __init__(self, backend: BackendProtocol, id: bytes) -> None:
        self._backend = backend
        #: the backend's own
        self._raw_id = id

    def complete(self, result: Reply | RpcError) -> None:
        """Answer it."""
        backend = self._backend
        backend._in_progress.discard(self)
        if not backend._active:
            return
        if isinstance(result, RpcError):
            backend.send_text(jsonrpc.encode_error(self._raw_id, result.to_json()))
        elif result.result is not None:
            backend.send_text(jsonrpc.encode_result(self._raw_id, result.result))
        else:
            backend.send_text(backend.encode_reply(result, self._raw_id))

    def cancel(self) -> None:
        """Nobody is there to be answered."""
        self._backend._dispatcher.cancel(self)


def _discard_response(response: bytes) -> None:
    """Takes the answers to notifications."""


class BackendFactory(ServerFactory):
    """What the WebSockets of backends share, and the sweep that keeps them alive."""

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
        self._ping_interval = settings.ping_interval
        self._ping_timeout = settings.ping_timeout
        self._clock = reactor
        self._connections: dict[BackendProtocol, None] = {}
        self._sweep_timer: IDelayedCall | None = None

    def add(self, backend: BackendProtocol) -> None:
        """A connection is open."""
        self._connections[backend] = None
        if self._sweep_timer is None:
            self._sweep_timer = self._clock.callLater(SWEEP_INTERVAL, self._sweep)

    def discard(self, backend: BackendProtocol) -> None:
        """A connection is gone."""
        self._connections.pop(backend, None)
        if not self._connections and self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None

    def broadcast(self, payload: bytes) -> int:
        """Send a message over each of them; returns how many there are."""
        for backend in list(self._connections):
            backend.push(payload)
        return len(self._connections)

    def _sweep(self) -> None:
        """Ping who was silent, drop who stayed silent.

        Time is counted in sweeps, not by the clock: while this process was stopped, nobody could be heard or read.
        """
        self._sweep_timer = self._clock.callLater(SWEEP_INTERVAL, self._sweep)
        now = self._clock.seconds()
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
