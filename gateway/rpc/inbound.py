"""Messages from clients: responses to calls, and their own calls and notifications for the upstream.

    client -> {"jsonrpc":"2.0","id":"<UUID4>","result":...}                  or "error": completes the call of that id
    client -> {"jsonrpc":"2.0","method":...,"params":...}                    passed to IUpstream.message
    client -> {"jsonrpc":"2.0","id":1,"method":...}                          passed to IUpstream.call
    client <- {"jsonrpc":"2.0","id":1,"result":...}                          its response, on the same connection and
    client <- {"jsonrpc":"2.0","id":1,"error":...}                           under the client's own id
    client <- {"jsonrpc":"2.0","id":1,"error":...,"gateway":true}            an error of the gateway, not the upstream
    client -> {"jsonrpc":"2.0","method":"gateway.token",...}                 a new token (token_renewal)
    client <- {"jsonrpc":"2.0","id":null,"error":{"code":-32700,...},...}    to invalid JSON, or not JSON-RPC (-32600)

A batch is answered by one array, once all its responses are there (JSON-RPC 2.0, section 6).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.clients.interface import IClientSessions
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import (
    BACKSLASH,
    Invalid,
    Message,
    Notification,
    Request,
    Response,
    decode,
    encode_batch,
    encode_error,
    encode_gateway_error,
    encode_result,
    unreadable_response_id,
)
from gateway.registry.interface import SessionKey
from gateway.rpc.interface import IUpstream
from gateway.rpc.pending import PendingCalls, Reply
from gateway.rpc.token_renewal import TOKEN_METHOD, TokenRenewal

#: messages of more bytes are charged by CPU time too: by size alone, a message made to be slow to parse would be cheap
MESSAGE_UNIT_SIZE = 2**14
#: CPU time that is charged as one message, in seconds
CPU_TIME_PER_MESSAGE = 0.0001

#: sends the response to a request: the request's raw id, and the result
Respond = Callable[[bytes, "Reply | RpcError"], None]


def encode_response(client_id: str, id: bytes, result: Reply | RpcError, max_size: int) -> bytes:
    """Encode the response to a client's request in at most ``max_size`` bytes.

    An ``RpcError`` is marked as the gateway's own; the error of a ``Reply`` is the upstream's, and is not.

    A longer response becomes the error ``TOO_LARGE``. An error is sent without its id if the id is too long.
    """
    if isinstance(result, RpcError):
        error = result.to_json()
        encoded = encode_gateway_error(id, error)
    else:
        if result.error is not None:
            encoded = encode_error(id, result.error)
        else:
            encoded = encode_result(id, result.result or b"null")
        if len(encoded) <= max_size:
            return encoded
        # sent=True: the backend has received the request.
        error = RpcError(ErrorKind.TOO_LARGE, client_id, sent=True, detail="response too large").to_json()
        encoded = encode_gateway_error(id, error)
    return encoded if len(encoded) <= max_size else encode_gateway_error(b"null", error)


class BoundedResponseBatch:
    """Collect the responses to one batch of a client.

    They are encoded as they arrive, and share ``max_size`` bytes, so that a batch never holds more than one message
    may.
    """

    def __init__(self, client_id: str, expected: int, max_size: int, send: Callable[[bytes], object]) -> None:
        self._client_id = client_id
        self._expected = expected
        self._max_size = max_size
        # Each response is followed by a comma or the closing bracket; this leaves the opening bracket.
        self._bytes_left = max_size - 1
        self._send = send
        self._responses: list[bytes] = []

    def add(self, id: bytes, result: Reply | RpcError) -> None:
        """Add one response. The last one sends them all."""
        response = encode_response(self._client_id, id, result, self._bytes_left - 1)
        self._bytes_left -= len(response) + 1
        self._responses.append(response)
        if len(self._responses) < self._expected:
            return
        batch = encode_batch(self._responses)
        if len(batch) > self._max_size:
            too_large = RpcError(ErrorKind.TOO_LARGE, self._client_id, sent=True, detail="responses too large")
            batch = encode_response(self._client_id, b"null", too_large, self._max_size)
        self._send(batch)


class Inbound:
    """Handle messages of clients.

    Calls of clients in flight are kept here; ``pending`` keeps the calls to clients, whose owners are sessions. With
    each message, a session is given as the plain tuple of the values of its ``SessionKey``, which is faster to make.
    ``max_message_size`` is in bytes. Calls on ``goaway_sessions`` are refused. ``cpu_clock`` returns the CPU time of
    this thread, in seconds.
    """

    _log = Logger()

    def __init__(
        self,
        sessions: IClientSessions,
        upstream: IUpstream,
        pending: PendingCalls,
        metrics: Metrics,
        *,
        goaway_sessions: Set[SessionKey],
        max_message_size: int,
        max_calls_per_client: int,
        token_renewal: TokenRenewal | None = None,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._goaway_sessions = goaway_sessions
        self._cpu_clock = cpu_clock
        self._sessions = sessions
        self._upstream = upstream
        self._pending = pending
        self._metrics = metrics
        self._max_message_size = max_message_size
        self._max_calls_per_client = max_calls_per_client
        self._calls: dict[tuple[str, int], set[Deferred[Reply]]] = {}
        #: handles new tokens; ``None``: not supported
        self.token_renewal = token_renewal

    def calls_in_flight(self) -> int:
        """Return the number of calls from clients that await a response of the upstream."""
        return sum(map(len, self._calls.values()))

    def calls_in_flight_from(self, key: SessionKey) -> int:
        """Return the number of such calls from one connection."""
        return len(self._calls.get(key, ()))

    def connected(self, key: SessionKey) -> None:
        """Notify the upstream of a new connection."""
        self._notify_upstream(self._upstream.connected, key)

    def disconnected(self, key: SessionKey) -> None:
        """Cancel all calls from a closed connection, and notify the upstream."""
        for call in self._calls.pop(key, ()):
            call.cancel()
        self._notify_upstream(self._upstream.disconnected, key)

    def message_received(self, session: tuple[str, int], payload: bytes) -> int | None:
        """Handle one message or batch.

        Returns the number of messages to charge, by their number and the CPU time taken to handle them; 0 or a negative
        number if it, or something in it, was not JSON-RPC 2.0. ``None``: charge nothing, since all of it was responses
        to calls in flight, which bound them.
        """
        if len(payload) <= MESSAGE_UNIT_SIZE:
            return self._handle_payload(session, payload)
        started_at = self._cpu_clock()
        handled = self._handle_payload(session, payload)
        if handled is None:
            return None
        # By its size, it is charged already.
        extra = int((self._cpu_clock() - started_at) / CPU_TIME_PER_MESSAGE) - len(payload) // MESSAGE_UNIT_SIZE
        if extra <= 0:
            return handled
        return handled + extra if handled > 0 else min(handled, -1) - extra

    def _handle_payload(self, session: tuple[str, int], payload: bytes) -> int | None:
        message = decode(payload)
        if isinstance(message, Response):
            return None if self._handle_response(session, message) else 1
        client_id, generation = session
        matched = 0
        if isinstance(message, list):
            valid, matched = self._handle_batch(session, message)
        else:
            if isinstance(message, Invalid):
                self._fail_unreadable(session, message, payload)

            def respond(id: bytes, result: Reply | RpcError) -> None:
                response = encode_response(client_id, id, result, self._max_message_size)
                self._sessions.send(client_id, response, generation)

            valid = self._handle_message(session, message, respond)
        count = len(message) if isinstance(message, list) else 1
        if valid:
            return count - matched or None
        self._metrics.bad_messages["client"] += 1
        return -count if count > 1 else 0

    def _handle_batch(self, session: tuple[str, int], messages: list[Message]) -> tuple[bool, int]:
        """Returns whether all of it was valid, and the number of responses to calls in flight."""
        client_id, generation = session
        expected = sum(isinstance(message, (Request, Invalid)) for message in messages)

        def send(responses: bytes) -> None:
            self._sessions.send(client_id, responses, generation)

        batch = BoundedResponseBatch(client_id, expected, self._max_message_size, send)
        valid, matched = True, 0
        for message in messages:
            if isinstance(message, Response):
                matched += self._handle_response(session, message)
                continue
            if isinstance(message, Invalid):
                self._fail_unreadable(session, message)
            valid &= self._handle_message(session, message, batch.add)
        return valid, matched

    def _handle_message(
        self, session: tuple[str, int], message: Request | Notification | Invalid, respond: Respond
    ) -> bool:
        if isinstance(message, Request):
            self._handle_request(session, message, respond)
        elif isinstance(message, Notification):
            self._handle_notification(session, message)
        else:
            respond(message.id, RpcError(message.kind, session[0], detail=message.detail))
            return False
        return True

    def _handle_response(self, session: tuple[str, int], response: Response) -> bool:
        """Complete a call. Returns ``False`` if the response is to none in flight on this connection."""
        id = response.id
        # Searching bytes for an integer takes a tenth of the time of searching for bytes.
        if BACKSLASH in id:
            id = _unescape_id(id)
        if self._pending.resolve(session, id, Reply(response.result, response.error)):
            self._metrics.calls_answered += 1
            return True
        self._metrics.late_responses += 1
        return False

    def _fail_unreadable(self, session: tuple[str, int], message: Invalid, payload: bytes = b"") -> None:
        """Fail a call at once whose response was received but cannot be parsed. ``payload`` is that of a message that
        may not even be JSON."""
        if message.kind is ErrorKind.INVALID_REQUEST:
            if message.id[:1] != b'"':
                # Not an id of any call: those are strings. A number may even be one that cannot be parsed.
                return
            id = _unescape_id(message.id)
        else:
            # This searches the whole payload: skip it if no call is in flight.
            uuid = unreadable_response_id(payload) if self._pending.in_flight(session) else None
            if uuid is None:
                return
            id = b'"%b"' % uuid.encode("ascii")
        detail = "the client's response could not be read"
        self._pending.fail(session, id, RpcError(ErrorKind.CONNECTION_LOST, session[0], detail=detail))

    def _handle_notification(self, session: tuple[str, int], message: Notification) -> None:
        if message.method == TOKEN_METHOD and self.token_renewal is not None:
            self.token_renewal.renew(SessionKey(*session), message.params).addErrback(self._renewal_failed)
            return
        if message.method.startswith("gateway."):
            self._metrics.notifications["ignored"] += 1
            return
        self._metrics.notifications["from_client"] += 1
        self._notify_upstream(self._upstream.message, session[0], message.method, message.params)

    def _notify_upstream(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(*args)
        except Exception:  # noqa: BLE001 - logged: not an error of the client
            self._log.failure("The upstream failed to handle a message")

    def _handle_request(self, session: tuple[str, int], request: Request, respond: Respond) -> None:
        """Pass a request to the upstream. ``respond`` is called with its result, unless the client disconnects
        first."""
        client_id = session[0]
        refusal = None
        is_renewal = request.method == TOKEN_METHOD and self.token_renewal is not None
        if request.method.startswith("gateway.") and not is_renewal:
            refusal = RpcError(ErrorKind.METHOD_NOT_FOUND, client_id)
        elif session in self._goaway_sessions:
            detail = "this node is going away: ask again where you connect next"
            refusal = RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=False, detail=detail)
        elif len(self._calls.get(session, ())) >= self._max_calls_per_client:
            detail = f"too many calls of this client in flight (--max-calls-per-client {self._max_calls_per_client})"
            refusal = RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail=detail)
        if refusal is not None:
            self._metrics.upstream_calls[str(refusal.code)] += 1
            respond(request.id, refusal)
            return
        if is_renewal:
            call = self._renew_token(session, request.params)
        else:
            call = maybeDeferred(self._upstream.call, client_id, request.method, request.params)
        self._calls.setdefault(session, set()).add(call)
        call.addBoth(self._call_finished, session, call, request.id, respond)

    def _renew_token(self, session: tuple[str, int], params: bytes | None) -> Deferred[Reply]:
        assert self.token_renewal is not None
        return self.token_renewal.renew(SessionKey(*session), params).addCallback(lambda _: Reply(b"null", None))

    def _renewal_failed(self, failure: Failure) -> None:
        if not failure.check(RpcError):
            self._log.failure("Could not verify a client's new token", failure)

    def _call_finished(
        self, result: Reply | Failure, session: tuple[str, int], call: Deferred[Reply], id: bytes, respond: Respond
    ) -> None:
        calls = self._calls.get(session)
        if calls is None or call not in calls:
            # The client has disconnected, and disconnected() has cancelled the call.
            self._metrics.upstream_calls["cancelled"] += 1
            if isinstance(result, Failure) and not isinstance(result.value, (CancelledError, RpcError)):
                self._log.failure("Could not cancel a call from a client", result)
            return
        calls.remove(call)
        if not calls:
            del self._calls[session]
        response: Reply | RpcError
        if not isinstance(result, Failure):
            response = result
            self._metrics.upstream_calls["answered"] += 1
        else:
            if isinstance(result.value, RpcError):
                response = result.value
            else:
                self._log.failure("The upstream failed to handle a call from a client", result)
                response = RpcError(ErrorKind.CONNECTION_LOST, session[0])
            self._metrics.upstream_calls[str(response.code)] += 1
        respond(id, response)


def _unescape_id(id: bytes) -> bytes:
    """Return a raw id without unnecessary escapes, which a client may write."""
    return msgspec.json.encode(msgspec.json.decode(id))
