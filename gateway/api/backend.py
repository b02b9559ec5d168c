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

from gateway.api.access import Guard
from gateway.api.methods import MethodTable, Plain, read_plain
from gateway.api.responses import ENVELOPE, error_object, invalid, response
from gateway.api.upstream import IBackend, Upstream
from gateway.auth.backend_tokens import UNLIMITED, Grant
from gateway.metrics import Metrics
from gateway.net.transport import unsent
from gateway.protocol import jsonrpc
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.frames import CLOSE_POLICY, CLOSE_TRY_AGAIN_LATER
from gateway.rpc.interface import IHub
from gateway.rpc.pending import Call, Reply
from gateway.settings import Settings
from gateway.util.cork import Turn
from gateway.websocket.limits import SLOW_AFTER
from gateway.websocket.server import GuardedServerFactory, GuardedServerProtocol, Refusal, Request


class Batch:
    """The answers to a batch, sent as one array, in the order of what they answer, when the last is there."""

    __slots__ = ("_answers", "_complete", "_missing", "_send")

    def __init__(self, send: Callable[[bytes], Any]) -> None:
        self._send = send
        self._answers: list[bytes] = []
        self._missing = 0
        self._complete = False

    def slot(self) -> Callable[[bytes], None]:
        """Where to put the next message's answer."""
        self._answers.append(b"")
        self._missing += 1
        return partial(self._put, len(self._answers) - 1)

    def complete(self) -> None:
        """There are no more messages."""
        self._complete = True
        self._send_if_done()

    def _put(self, index: int, answer: bytes) -> None:
        self._answers[index] = answer
        self._missing -= 1
        self._send_if_done()

    def _send_if_done(self) -> None:
        if self._complete and not self._missing and self._answers:
            self._send(jsonrpc.encode_batch(self._answers))


SUBPROTOCOL = "wsgateway.jsonrpc.v1"
#: so many messages in a row that are no JSON-RPC end a connection
MAX_BAD_MESSAGES = 8
#: so many of the largest messages may wait as answers for a backend that does not read; it asked for each of them
MAX_ANSWERS_WAITING = 64
#: so many times --send-buffer may wait for one that just has not had the time to read
BURST_PUSHED = 16
#: how often idle backends are looked for, in seconds
SWEEP = 1.0


@implementer(IBackend)
class BackendProtocol(GuardedServerProtocol):
    """One backend's connection."""

    path = "/v1/backend"
    keeps_beginnings = True
    pinged_at = 0.0
    #: for how many seconds its answer to that ping has been missing, counted in sweeps
    waited = 0.0

    #: what its token is for, at any time; a node's link, which comes in by another way, is not limited
    grant: Grant = UNLIMITED
    #: messages can be handled and answered
    _alive = False
    #: the transport's buffer was full and has not been empty since
    _full = False
    #: for how many seconds that has been so, counted in sweeps
    full_for = 0.0
    _bad = 0
    _pushed = 0

    #: writes the response to a call of that raw id
    response = staticmethod(response)

    def admit(self, request: Request) -> Deferred[str | None]:
        """Let a backend in, or raise the guard's ``Refusal``."""
        headers = request.headers
        self.grant = self.factory.guard.check(
            "GET", request.path, lambda name: [headers[name.lower()]] if name.lower() in headers else []
        )
        return succeed(SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None)

    def refuse(self, refusal: Refusal) -> None:
        """Answer the request with an error."""
        if self.state == self.STATE_CONNECTING:
            self.factory.metrics.api_requests[str(refusal.status)] += 1
        super().refuse(refusal)

    def opened(self) -> None:
        """The connection is open."""
        self.factory.metrics.api_requests["101"] += 1
        self._upstream: Upstream = self.factory.upstream
        self._methods: MethodTable[Any] = self.factory.methods
        self._hub: IHub = self._methods.hub
        #: what it asked and was not answered yet
        self._work: set[Deferred[Reply] | PlainCall] = set()
        self._alive = True
        self.factory.add(self)

    def ended(self, code: int) -> None:
        """It is gone: so are its calls, its subscriptions and its serving."""
        self._alive = False
        self.factory.discard(self)
        self._upstream.remove(self)
        for work in list(self._work):
            work.cancel()
        self._work.clear()

    # IBackend

    @property
    def reads(self) -> bool:
        """Whether it reads what it is sent, or has room for more, or may just not have had the time."""
        # One client's message may be a thousand events, and nothing is written before the reactor's turn is over.
        if not self._full:
            return True
        most = self.factory.push_limit * (1 if self.full_for > SLOW_AFTER else BURST_PUSHED)
        return bool(min(self._pushed, unsent(self.transport)) < most)

    def push(self, payload: bytes) -> None:
        """Send one message that it did not ask for."""
        self.send_text(payload)
        if self._full:
            self._pushed += len(payload)

    def overrun(self) -> None:
        """Close it, since it does not read."""
        self.factory.metrics.slow_readers += 1
        self.close_with(CLOSE_TRY_AGAIN_LATER, "reads its events too slowly")

    def pauseProducing(self) -> None:
        """It does not read: neither is it read from."""
        # A transport says so again at every write while its buffer is full.
        if not self._full:
            self._full = True
            self.full_for = 0.0
            self._pushed = 0
            super().pauseProducing()
            if self._alive:
                self.pause_reading()

    def resumeProducing(self) -> None:
        """It has read everything."""
        self._full = False
        super().resumeProducing()
        self.resume_reading()

    def resume_reading(self) -> None:
        """Go on reading, but not while it does not read itself. A close frame of its is waited for all the same."""
        if not (self._full and self._alive):
            super().resume_reading()

    # Messages.

    def text_received(self, payload: bytes) -> None:
        """One message or batch."""
        plain = read_plain(payload)
        if plain is None or not self._carry_out_here(plain):
            self._in_general(payload)

    #: Nothing is metered here, and whatever is raised ends a connection with 1011 anyway.
    message_whole = text_received

    def _in_general(self, payload: bytes) -> None:
        """The same for a message of any kind."""
        message = jsonrpc.decode(payload)
        if isinstance(message, jsonrpc.Invalid):
            self._invalid(message, jsonrpc.broken_response_id(payload), self.send_text)
        elif isinstance(message, list):
            self._batch(message)
        else:
            self._handle(message, self.send_text)

    def _carry_out_here(self, plain: Plain) -> bool:
        """The same as :meth:`_carry_out`, for a client that can be asked at once. ``False`` if it is none, or the token
        is not for it: nothing was done."""
        is_call, id, client_id, method, params, timeout = plain
        work = self._work
        if len(work) >= self.factory.max_work:
            return False
        if self.grant.limited and not self.grant.allows("call" if is_call else "notify", client_id):
            return False
        try:
            if is_call:
                assert id is not None
                # It may be over before ask() returns.
                call = PlainCall(self, id)
                work.add(call)
                if not self._hub.ask(call, client_id, method, params, timeout):
                    work.discard(call)
                    return False
            elif not self._hub.notify_here(client_id, method, params):
                return False
            elif id is not None:
                self.send_text(jsonrpc.encode_result(id, b"null"))
        except RpcError as e:
            if is_call:
                work.discard(call)
            if id is not None:
                self.send_text(jsonrpc.encode_error(id, e.to_json()))
        self._bad = 0
        return True

    def _handle(self, message: jsonrpc.Message, answer: Callable[[bytes], Any]) -> None:
        if isinstance(message, jsonrpc.Request):
            self._bad = 0
            self._carry_out(message.method, message.params, message.id, answer)
        elif isinstance(message, jsonrpc.Notification):
            self._bad = 0
            self._carry_out(message.method, message.params, b"null", _nobody)
        elif isinstance(message, jsonrpc.Response):
            self._bad = 0
            self._upstream.answered(self, message)
        else:
            self._invalid(message, message.id[1:-1].decode(), answer)

    def _batch(self, messages: list[jsonrpc.Message]) -> None:
        batch = Batch(self.send_text)
        for message in messages:
            if not self._alive:
                return
            # Only these are answered (JSON-RPC 2.0, section 6).
            answered = isinstance(message, (jsonrpc.Request, jsonrpc.Invalid))
            self._handle(message, batch.slot() if answered else _nobody)
        batch.complete()

    def _invalid(self, message: jsonrpc.Invalid, uuid: str | None, answer: Callable[[bytes], Any]) -> None:
        """No JSON-RPC. ``uuid`` is that of a call that it may be meant as the response to."""
        self.factory.metrics.bad_messages["backend"] += 1
        self._bad += 1
        answer(jsonrpc.encode_error(message.id, invalid(message).to_json()))
        if uuid is not None:
            self._upstream.broken(self, uuid)
        if self._bad >= MAX_BAD_MESSAGES:
            self.close_with(CLOSE_POLICY, f"{MAX_BAD_MESSAGES} messages in a row were no JSON-RPC 2.0")

    def _carry_out(self, method: str, params: bytes | None, id: bytes, answer: Callable[[bytes], Any]) -> None:
        try:
            if len(self._work) >= self.factory.max_work:
                raise RpcError(Kind.TOO_MANY_CALLS, detail="too many requests of this connection are unanswered")
            outcome = self._methods.start(self, method, params)
        except RpcError as e:
            answer(jsonrpc.encode_error(id, e.to_json()))
            return
        if isinstance(outcome, Reply):
            answer(self.response(outcome, id))
            return
        self._begun(outcome, id)
        outcome.addBoth(self._done, outcome, id, answer)

    def _begun(self, work: Deferred[Reply], id: bytes) -> None:
        self._work.add(work)

    def _over(self, work: Deferred[Reply], id: bytes) -> None:
        self._work.discard(work)

    def _done(self, result: Reply | Failure, work: Deferred[Reply], id: bytes, answer: Callable[[bytes], Any]) -> None:
        self._over(work, id)
        if not self._alive:
            return
        if isinstance(result, Reply):
            answer(self.response(result, id))
        else:
            answer(jsonrpc.encode_error(id, error_object(result, None)))


class PlainCall(Call):
    """A backend's call to a client that can be asked at once."""

    __slots__ = ("_backend", "_raw_id")

    def __init__(self, backend: BackendProtocol, id: bytes) -> None:
        self._backend = backend
        #: the backend's own
        self._raw_id = id

    def settle(self, outcome: Reply | RpcError) -> None:
        """Answer it."""
        backend = self._backend
        backend._work.discard(self)
        if not backend._alive:
            return
        if isinstance(outcome, RpcError):
            backend.send_text(jsonrpc.encode_error(self._raw_id, outcome.to_json()))
        elif outcome.result is not None:
            backend.send_text(jsonrpc.encode_result(self._raw_id, outcome.result))
        else:
            backend.send_text(backend.response(outcome, self._raw_id))

    def cancel(self) -> None:
        """Nobody is there to be answered."""
        self._backend._hub.forget(self)


def _nobody(answer: bytes) -> None:
    """Takes the answers to notifications."""


class BackendSockets(GuardedServerFactory):
    """What the WebSockets of backends share, and the sweep that keeps them alive."""

    def __init__(
        self,
        *,
        guard: Guard,
        methods: MethodTable[Any],
        upstream: Upstream,
        metrics: Metrics,
        settings: Settings,
        reactor: Any,
        turn: Turn | None = None,
        protocol: type[BackendProtocol] = BackendProtocol,
    ) -> None:
        size = settings.max_message_size + ENVELOPE
        super().__init__(
            protocol,
            metrics=metrics,
            reactor=reactor,
            max_message_size=size,
            send_buffer=settings.send_buffer + MAX_ANSWERS_WAITING * size,
            max_openings=settings.max_openings,
            turn=turn,
        )
        self.guard = guard
        self.methods = methods
        self.upstream = upstream
        self.push_limit = settings.send_buffer
        self.max_work = settings.max_calls
        self._ping_after = settings.ping_interval
        self._ping_timeout = settings.ping_timeout
        self._clock = reactor
        self._open: dict[BackendProtocol, None] = {}
        self._sweeping: IDelayedCall | None = None

    def add(self, backend: BackendProtocol) -> None:
        """A connection is open."""
        self._open[backend] = None
        if self._sweeping is None:
            self._sweeping = self._clock.callLater(SWEEP, self._sweep)

    def discard(self, backend: BackendProtocol) -> None:
        """A connection is gone."""
        self._open.pop(backend, None)
        if not self._open and self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    def tell(self, payload: bytes) -> int:
        """Send a message over each of them; returns how many there are."""
        for backend in list(self._open):
            backend.push(payload)
        return len(self._open)

    def _sweep(self) -> None:
        """Ping who was silent, drop who stayed silent.

        Time is counted in sweeps, not by the clock: while this process was stopped, nobody could be heard or read.
        """
        self._sweeping = self._clock.callLater(SWEEP, self._sweep)
        now = self._clock.seconds()
        for backend in list(self._open):
            backend.full_for += SWEEP
            if now - backend.heard_at < self._ping_after:
                continue
            if backend.pinged_at <= backend.heard_at:
                backend.pinged_at = now
                backend.waited = 0.0
                backend.ping()
                continue
            backend.waited += SWEEP
            if backend.waited >= self._ping_timeout:
                backend.abort()
