"""JSON-RPC 2.0 over one connection, both ways. No I/O.

<- {"jsonrpc":"2.0","id":"5f0c…","method":"disk.usage","params":{"path":"/"}}     a call: a handler is run
-> {"jsonrpc":"2.0","id":"5f0c…","result":{"free":12}}                            its result, or "error"
<- {"jsonrpc":"2.0","method":"policy.changed","params":[3]}                       a notification
-> {"jsonrpc":"2.0","id":1,"method":"policy.get"}                                 a call the other way
<- {"jsonrpc":"2.0","id":1,"result":true}                                         its result, or "error"
-> {"jsonrpc":"2.0","method":"job.done","params":{"job":9}}                       a notification
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import attrs
import msgspec
from twisted.internet.defer import Deferred, fail, gatherResults, maybeDeferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.agent.errors import AgentError, CallFailed, CallTimedOut, ConnectionLost, RpcFailed
from gateway.protocol import jsonrpc
from gateway.protocol.errors import ErrorKind
from gateway.protocol.jsonrpc import Invalid, Message, Notification, Request, Response

Handler = Callable[[Any], Any]

#: handlers that may run at a time; further calls are answered with -32005
MAX_RUNNING_HANDLERS = 1024

_INTERNAL_ERROR = -32603

_log = Logger()


def encode_params(params: object) -> bytes | None:
    """Make JSON of params: an array or an object (JSON-RPC 2.0, section 4.2), or ``None`` for none.

    Raises ``TypeError`` for anything else, and for what msgspec cannot encode.
    """
    if params is None:
        return None
    try:
        encoded = msgspec.json.encode(params)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as e:
        raise TypeError(f"params cannot be encoded as JSON: {e}") from None
    if encoded[:1] not in (b"[", b"{"):
        raise TypeError(f"params must be None or become a JSON array or object, not {type(params).__name__}")
    return encoded


def encode_error(code: int, message: str, data: object = None) -> bytes:
    """Make an error object (section 5.1)."""
    error: dict[str, object] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return msgspec.json.encode(error)


def _encode_kind(kind: ErrorKind, message: str = "") -> bytes:
    return encode_error(kind.value.code, message or kind.value.message)


@attrs.define
class _Call:
    result: Deferred[Any]
    deadline: IDelayedCall


class RPCSession:
    """What is said over one connection.

    ``send`` takes a message and returns whether the connection took it. ``handler_for`` gives the handler of a method,
    or ``None``; a handler takes the decoded params (``None``, a list or a dict) and returns a value, a Deferred or a
    coroutine, or raises :class:`AgentError`. ``notified`` gets each notification: its method and decoded params.
    """

    def __init__(
        self,
        clock: IReactorTime,
        send: Callable[[bytes], bool],
        *,
        handler_for: Callable[[str], Handler | None],
        on_notification: Callable[[str, Any], object],
        max_message_size: int,
    ) -> None:
        self._clock = clock
        self._send = send
        self._handler_for = handler_for
        self._on_notification = on_notification
        self._max_message_size = max_message_size
        self._is_open = True
        self._has_warned = False
        self._running_handlers = 0
        self._ids = itertools.count(1)
        self._calls: dict[bytes, _Call] = {}

    def call(self, method: str, params: object, timeout: float) -> Deferred[Any]:
        """Ask the other side; ``timeout`` is in seconds. Cancelling forgets the call.

        Fails with :class:`CallFailed`; with ``TypeError`` or ``ValueError`` for params that cannot be sent.
        """
        id = b"%d" % next(self._ids)
        try:
            if not timeout > 0:
                raise ValueError(f"timeout {timeout!r} is not a number of seconds above 0")
            payload = jsonrpc.encode_request(id, method, encode_params(params))
            self._check_size(payload)
        except (TypeError, ValueError):
            return fail(Failure())
        if not self._is_open or not self._send(payload):
            return fail(ConnectionLost("the connection to the gateway ended"))
        answer: Deferred[Any] = Deferred(lambda _: self._forget_call(id))
        self._calls[id] = _Call(answer, self._clock.callLater(timeout, self._call_timed_out, id, method, timeout))
        return answer

    def notify(self, method: str, params: object) -> None:
        """Tell the other side. Raises ``ConnectionLost``; ``TypeError`` or ``ValueError`` for params that cannot be
        sent."""
        payload = jsonrpc.encode_notification(method, encode_params(params))
        self._check_size(payload)
        if not self._is_open or not self._send(payload):
            raise ConnectionLost("the connection to the gateway ended")

    def message_received(self, payload: bytes) -> None:
        """Handle one text message; never raises."""
        message = jsonrpc.decode(payload)
        if isinstance(message, list):
            self._handle_batch(message)
            return
        answer = self._handle(message)
        if answer is not None:
            answer.addCallback(self._respond)

    def close(self, reason: str) -> None:
        """The connection is no more: calls in flight fail, and responses of handlers that still run are dropped."""
        self._is_open = False
        for id in list(self._calls):
            call = self._pop_call(id)
            if call is not None:
                call.result.errback(ConnectionLost(reason))

    def _check_size(self, payload: bytes) -> None:
        if len(payload) > self._max_message_size:
            raise ValueError(f"the message has {len(payload)} bytes; {self._max_message_size} are allowed")

    def _respond(self, payload: bytes) -> None:
        if self._is_open:
            self._send(payload)

    # Messages of the other side

    def _handle_batch(self, messages: list[Message]) -> None:
        answers = [answer for answer in map(self._handle, messages) if answer is not None]
        if answers:
            gatherResults(answers).addCallback(self._respond_to_batch)

    def _respond_to_batch(self, responses: list[bytes]) -> None:
        # An array that would be too large goes as single messages: whoever matches ids finds them.
        batch = jsonrpc.encode_batch(responses)
        for payload in [batch] if len(batch) <= self._max_message_size else responses:
            self._respond(payload)

    def _handle(self, message: Message) -> Deferred[bytes] | None:
        """Do what a message asks for; the Deferred fires with the response, and never fails."""
        if isinstance(message, Request):
            return self._handle_call(message)
        if isinstance(message, Invalid):
            return succeed(jsonrpc.encode_error(message.id, _encode_kind(message.kind)))
        if isinstance(message, Response):
            self._handle_response(message)
        else:
            self._handle_notification(message)
        return None

    def _handle_notification(self, message: Notification) -> None:
        try:
            params = _decode_params(message.params)
        except AgentError:
            # Nobody is to be told, and whoever sends one may send many.
            if not self._has_warned:
                self._has_warned = True
                _log.warn("notification {method!a}: its params could not be read", method=message.method[:200])
            return
        told = maybeDeferred(self._on_notification, message.method, params)
        told.addErrback(lambda failure: _log.failure("notification {method!a}", failure, method=message.method))

    def _handle_call(self, request: Request) -> Deferred[bytes]:
        handler = self._handler_for(request.method)
        if handler is None:
            return succeed(jsonrpc.encode_error(request.id, _encode_kind(ErrorKind.METHOD_NOT_FOUND)))
        if self._running_handlers >= MAX_RUNNING_HANDLERS:
            return succeed(jsonrpc.encode_error(request.id, _encode_kind(ErrorKind.TOO_MANY_CALLS)))
        self._running_handlers += 1
        answer = maybeDeferred(self._run_handler, handler, request)
        answer.addErrback(self._handler_failed, request)
        answer.addCallback(self._handler_finished, request)
        return answer

    async def _run_handler(self, handler: Handler, request: Request) -> bytes:
        result = await maybeDeferred(handler, _decode_params(request.params))
        return jsonrpc.encode_result(request.id, msgspec.json.encode(result))

    def _handler_failed(self, failure: Failure, request: Request) -> bytes:
        error = failure.value
        if isinstance(error, AgentError):
            try:
                return jsonrpc.encode_error(request.id, encode_error(error.code, error.message, error.data))
            except Exception:  # noqa: BLE001  whatever encoding raises for what a handler put there
                failure = Failure()
        _log.failure("method {method!a}", failure, method=request.method)
        return jsonrpc.encode_error(request.id, encode_error(_INTERNAL_ERROR, "internal error"))

    def _handler_finished(self, response: bytes, request: Request) -> bytes:
        self._running_handlers -= 1
        if len(response) <= self._max_message_size:
            return response
        _log.warn("method {method!a}: its response has {size} bytes", method=request.method, size=len(response))
        message = f"the response has {len(response)} bytes, more than the {self._max_message_size} allowed"
        return jsonrpc.encode_error(request.id, _encode_kind(ErrorKind.TOO_LARGE, message))

    # Calls of this side

    def _pop_call(self, id: bytes) -> _Call | None:
        call = self._calls.pop(id, None)
        if call is not None and call.deadline.active():
            call.deadline.cancel()
        return call

    def _forget_call(self, id: bytes) -> None:
        self._pop_call(id)

    def _handle_response(self, response: Response) -> None:
        call = self._pop_call(response.id)
        if call is None:
            return  # late, or never asked
        try:
            value = msgspec.json.decode(response.result or response.error or b"null")
        except (msgspec.DecodeError, RecursionError):
            call.result.errback(CallFailed("the response could not be read"))
            return
        if response.error is None:
            call.result.callback(value)
        else:
            call.result.errback(RpcFailed(value["code"], value["message"], value.get("data")))

    def _call_timed_out(self, id: bytes, method: str, timeout: float) -> None:
        call = self._pop_call(id)
        if call is not None:
            call.result.errback(CallTimedOut(f"no response to {method} within {timeout:g} s"))


def _decode_params(params: bytes | None) -> Any:
    try:
        return None if params is None else msgspec.json.decode(params)
    except (msgspec.DecodeError, RecursionError):
        raise AgentError(ErrorKind.INVALID_PARAMS.value.code, "the params could not be read") from None
