"""JSON-RPC 2.0 over one connection, in both directions. No I/O.

<- {"jsonrpc":"2.0","id":"5f0c…","method":"disk.usage","params":{"path":"/"}}     a call of the peer
-> {"jsonrpc":"2.0","id":"5f0c…","result":{"free":12}}                            the handler's result, or "error"
<- {"jsonrpc":"2.0","method":"policy.changed","params":[3]}                       a notification of the peer
-> {"jsonrpc":"2.0","id":1,"method":"policy.get"}                                 a call of this side
<- {"jsonrpc":"2.0","id":1,"result":true}                                         its result, or "error"
<- {"jsonrpc":"2.0","id":1,"error":{"code":-32601,…},"gateway":true}              an error of the gateway itself
-> {"jsonrpc":"2.0","method":"job.done","params":{"job":9}}                       a notification of this side
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

#: handlers running at the same time; further calls are answered with -32005
MAX_RUNNING_HANDLERS = 1024

_INTERNAL_ERROR = -32603

_log = Logger()


def encode_params(params: object) -> bytes | None:
    """Encode params as a JSON array or object (JSON-RPC 2.0, section 4.2); return ``None`` for ``None``.

    Raises ``TypeError`` for any other value, and if msgspec cannot encode it.
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
    """Encode an error object (JSON-RPC 2.0, section 5.1)."""
    error: dict[str, object] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return msgspec.json.encode(error)


#: encodes the response to a call that a session does not handle: raw id, kind of error, detail
RefusalEncoder = Callable[[bytes, ErrorKind, str], bytes]


def encode_refusal(id: bytes, kind: ErrorKind, detail: str = "") -> bytes:
    """Encode the error response of a session itself to a raw id."""
    return jsonrpc.encode_error(id, encode_error(kind.value.code, detail or kind.value.message))


@attrs.define
class _Call:
    result: Deferred[Any]
    deadline: IDelayedCall


class RPCSession:
    """Match calls with responses, and run handlers, over one connection.

    ``send(message)`` returns whether the connection accepted the message. ``handler_for(method)`` returns a handler or
    ``None``; a handler takes the decoded params (``None``, a list or a dict) and returns a value, a Deferred or a
    coroutine, or raises :class:`AgentError`. ``on_notification(method, params)`` is called for each notification.
    ``encode_refusal(id, kind, detail)`` encodes the errors of the session itself.
    """

    def __init__(
        self,
        clock: IReactorTime,
        send: Callable[[bytes], bool],
        *,
        handler_for: Callable[[str], Handler | None],
        on_notification: Callable[[str, Any], object],
        max_message_size: int,
        encode_refusal: RefusalEncoder = encode_refusal,
    ) -> None:
        self._clock = clock
        self._send = send
        self._handler_for = handler_for
        self._on_notification = on_notification
        self._max_message_size = max_message_size
        self._encode_refusal = encode_refusal
        self._is_open = True
        self._has_warned = False
        self._running_handlers = 0
        self._ids = itertools.count(1)
        self._calls: dict[bytes, _Call] = {}

    def call(self, method: str, params: object, timeout: float) -> Deferred[Any]:
        """Send a call. Fires with the decoded result. Cancelling discards the response.

        ``timeout`` is in seconds. Fails with :class:`CallFailed`; with ``TypeError`` if the params cannot be encoded,
        and with ``ValueError`` if the message is too large or the timeout is not positive.
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
        result: Deferred[Any] = Deferred(lambda _: self._forget_call(id))
        self._calls[id] = _Call(result, self._clock.callLater(timeout, self._call_timed_out, id, method, timeout))
        return result

    def notify(self, method: str, params: object) -> None:
        """Send a notification.

        Raises ``ConnectionLost``; ``TypeError`` if the params cannot be encoded; ``ValueError`` if it is too large.
        """
        payload = jsonrpc.encode_notification(method, encode_params(params))
        self._check_size(payload)
        if not self._is_open or not self._send(payload):
            raise ConnectionLost("the connection to the gateway ended")

    def message_received(self, payload: bytes) -> None:
        """Handle one text message. Never raises."""
        message = jsonrpc.decode(payload)
        if isinstance(message, list):
            self._handle_batch(message, payload)
            return
        if isinstance(message, Response):
            self._handle_response(message, message.error is not None and jsonrpc.decode_gateway_marks(payload)[0])
            return
        response = self._handle_message(message)
        if response is not None:
            response.addCallback(self._respond)

    def close(self, reason: str) -> None:
        """Fail calls in flight with ``ConnectionLost``; drop responses of handlers that are still running."""
        self._is_open = False
        for id in list(self._calls):
            call = self._pop_call(id)
            if call is not None:
                call.result.errback(ConnectionLost(reason))

    def _check_size(self, payload: bytes) -> None:
        if len(payload) > self._max_message_size:
            raise ValueError(f"the message has {len(payload)} bytes, more than the {self._max_message_size} allowed")

    def _respond(self, payload: bytes) -> None:
        if self._is_open:
            self._send(payload)

    # Messages of the peer

    def _handle_batch(self, messages: list[Message], payload: bytes) -> None:
        responses: list[Deferred[bytes]] = []
        for message, is_marked in zip(messages, jsonrpc.decode_gateway_marks(payload), strict=True):
            if isinstance(message, Response):
                self._handle_response(message, is_marked)
                continue
            response = self._handle_message(message)
            if response is not None:
                responses.append(response)
        if responses:
            gatherResults(responses).addCallback(self._respond_to_batch)

    def _respond_to_batch(self, responses: list[bytes]) -> None:
        # Instead of an array that would be too large, send single messages: the peer matches them by id.
        batch = jsonrpc.encode_batch(responses)
        for payload in [batch] if len(batch) <= self._max_message_size else responses:
            self._respond(payload)

    def _handle_message(self, message: Request | Notification | Invalid) -> Deferred[bytes] | None:
        """Handle a message other than a response. Returns a Deferred of the response, which never fails, or ``None`` if
        there is none."""
        if isinstance(message, Request):
            return self._handle_call(message)
        if isinstance(message, Invalid):
            return succeed(self._encode_refusal(message.id, message.kind, ""))
        self._handle_notification(message)
        return None

    def _handle_notification(self, message: Notification) -> None:
        try:
            params = _decode_params(message.params)
        except AgentError:
            # Logged once: a notification has no response, and there may be many of them.
            if not self._has_warned:
                self._has_warned = True
                _log.warn("notification {method!a}: its params could not be read", method=message.method[:200])
            return
        handled = maybeDeferred(self._on_notification, message.method, params)
        handled.addErrback(
            lambda failure: _log.failure("notification {method!a} failed", failure, method=message.method)
        )

    def _handle_call(self, request: Request) -> Deferred[bytes]:
        handler = self._handler_for(request.method)
        if handler is None:
            return succeed(self._encode_refusal(request.id, ErrorKind.METHOD_NOT_FOUND, ""))
        if self._running_handlers >= MAX_RUNNING_HANDLERS:
            return succeed(self._encode_refusal(request.id, ErrorKind.TOO_MANY_CALLS, ""))
        self._running_handlers += 1
        response = maybeDeferred(self._run_handler, handler, request)
        response.addErrback(self._handler_failed, request)
        response.addCallback(self._handler_finished, request)
        return response

    async def _run_handler(self, handler: Handler, request: Request) -> bytes:
        result = await maybeDeferred(handler, _decode_params(request.params))
        return jsonrpc.encode_result(request.id, msgspec.json.encode(result))

    def _handler_failed(self, failure: Failure, request: Request) -> bytes:
        error = failure.value
        if isinstance(error, AgentError):
            try:
                return jsonrpc.encode_error(request.id, encode_error(error.code, error.message, error.data))
            except Exception:  # noqa: BLE001  the members of the error come from the handler
                failure = Failure()
        _log.failure("method {method!a} failed", failure, method=request.method)
        return jsonrpc.encode_error(request.id, encode_error(_INTERNAL_ERROR, "internal error"))

    def _handler_finished(self, response: bytes, request: Request) -> bytes:
        self._running_handlers -= 1
        if len(response) <= self._max_message_size:
            return response
        _log.warn("method {method!a}: its response has {size} bytes", method=request.method, size=len(response))
        message = f"the response has {len(response)} bytes, more than the {self._max_message_size} allowed"
        return self._encode_refusal(request.id, ErrorKind.TOO_LARGE, message)

    # Responses to calls of this side

    def _pop_call(self, id: bytes) -> _Call | None:
        call = self._calls.pop(id, None)
        if call is not None and call.deadline.active():
            call.deadline.cancel()
        return call

    def _forget_call(self, id: bytes) -> None:
        self._pop_call(id)

    def _handle_response(self, response: Response, is_marked: bool) -> None:
        """Complete the call that a response is for. ``is_marked`` is whether it is an error of the gateway itself."""
        call = self._pop_call(response.id)
        if call is None:
            return  # after the timeout, or without a call
        try:
            value = msgspec.json.decode(response.result or response.error or b"null")
        except (msgspec.DecodeError, RecursionError):
            call.result.errback(CallFailed("the response could not be read"))
            return
        if response.error is None:
            call.result.callback(value)
        else:
            call.result.errback(RpcFailed(value["code"], value["message"], value.get("data"), gateway=is_marked))

    def _call_timed_out(self, id: bytes, method: str, timeout: float) -> None:
        call = self._pop_call(id)
        if call is not None:
            call.result.errback(CallTimedOut(f"no response to {method} within {timeout:g} s"))


def _decode_params(params: bytes | None) -> Any:
    try:
        return None if params is None else msgspec.json.decode(params)
    except (msgspec.DecodeError, RecursionError):
        raise AgentError(ErrorKind.INVALID_PARAMS.value.code, "the params could not be read") from None
