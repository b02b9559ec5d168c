"""What clients say: responses to calls, and their own messages on the way to the upstream.

    client -> {"jsonrpc":"2.0","id":"<UUID4>","result":...}                  or "error": ends the call of that id
    client -> {"jsonrpc":"2.0","method":...,"params":...}                    goes to IUpstream.message
    client -> {"jsonrpc":"2.0","id":1,"method":...}                          goes to IUpstream.call
    client <- {"jsonrpc":"2.0","id":1,"result":...}                          what that came to, on that same connection,
    client <- {"jsonrpc":"2.0","id":1,"error":...}                           under the client's own id
    client -> {"jsonrpc":"2.0","method":"gateway.token",...}                 a new token (renewal.py)
    client <- {"jsonrpc":"2.0","id":null,"error":{"code":-32700,...}}        to what is no JSON, or no JSON-RPC (-32600)

A batch is answered by one array, once everything in it is (JSON-RPC 2.0, section 6).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.clients.interface import IEdge
from gateway.metrics import Metrics
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.jsonrpc import (
    BACKSLASH,
    Invalid,
    Message,
    Notification,
    Request,
    Response,
    broken_response_id,
    decode,
    encode_batch,
    encode_error,
    encode_result,
)
from gateway.rpc.interface import IUpstream
from gateway.rpc.pending import Pending, Reply
from gateway.rpc.token_renewal import METHOD as RENEWAL
from gateway.rpc.token_renewal import Renewal

#: a message of more bytes counts for one more for each so many seconds of CPU that it takes: by its size alone, what is
#: made to be hard to read would be cheap for its sender
UNIT, DEAR = 16384, 0.0001

#: one connection of a client: its id, and the generation of its claim
Connection = tuple[str, int]
#: takes what a request came to: the request's raw id, and the outcome
Answer = Callable[[bytes, "Reply | RpcError"], None]


def encode_response(client_id: str, id: bytes, outcome: Reply | RpcError, room: int) -> bytes:
    """Write the response to a client's request in ``room`` bytes.

    A response that is longer becomes the error ``TOO_LARGE``; an error loses its id where that is what is so long.
    """
    if isinstance(outcome, RpcError):
        error = outcome.to_json()
        encoded = encode_error(id, error)
    else:
        if outcome.error is not None:
            encoded = encode_error(id, outcome.error)
        else:
            encoded = encode_result(id, outcome.result or b"null")
        if len(encoded) <= room:
            return encoded
        # The backend has had the request.
        error = RpcError(Kind.TOO_LARGE, client_id, sent=True, detail="response too large").to_json()
        encoded = encode_error(id, error)
    return encoded if len(encoded) <= room else encode_error(b"null", error)


class BatchOfResponses:
    """The responses to one batch of a client, until all of them are there.

    They are encoded as they come and share ``room`` bytes, so that a batch never holds more than one message may.
    """

    def __init__(self, client_id: str, awaited: int, room: int, send: Callable[[bytes], object]) -> None:
        self._client_id = client_id
        self._awaited = awaited
        self._room = room
        # Every response has a comma or the last bracket behind it; the first bracket is left.
        self._left = room - 1
        self._send = send
        self._responses: list[bytes] = []

    def answer(self, id: bytes, outcome: Reply | RpcError) -> None:
        """Take one response; the last one sends them all."""
        response = encode_response(self._client_id, id, outcome, self._left - 1)
        self._left -= len(response) + 1
        self._responses.append(response)
        if len(self._responses) < self._awaited:
            return
        batch = encode_batch(self._responses)
        if len(batch) > self._room:
            too_large = RpcError(Kind.TOO_LARGE, self._client_id, sent=True, detail="responses too large")
            batch = encode_response(self._client_id, b"null", too_large, self._room)
        self._send(batch)


class Inbound:
    """Reads what clients send. Their calls in flight are kept here; those to clients are in ``pending``, whose owners
    are connections. ``max_message_size`` is in bytes; ``leaving`` are the connections whose calls are refused. ``cpu``
    tells the seconds of CPU that this thread has had."""

    _log = Logger()

    def __init__(
        self,
        edge: IEdge,
        upstream: IUpstream,
        pending: Pending,
        metrics: Metrics,
        *,
        leaving: Set[Connection],
        max_message_size: int,
        max_calls_per_client: int,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._leaving = leaving
        self._cpu = cpu
        self._edge = edge
        self._upstream = upstream
        self._pending = pending
        self._metrics = metrics
        self._max_message_size = max_message_size
        self._max_calls_per_client = max_calls_per_client
        self._calls: dict[Connection, set[Deferred[Reply]]] = {}
        #: takes clients' new tokens; without it there are none
        self.renewal: Renewal | None = None

    def calls_in_flight(self) -> int:
        """How many calls of clients the upstream has not answered yet."""
        return sum(map(len, self._calls.values()))

    def calls_in_flight_from(self, connection: Connection) -> int:
        """The same of one connection."""
        return len(self._calls.get(connection, ()))

    def connected(self, connection: Connection) -> None:
        """Tell the upstream of a new connection."""
        self._tell(self._upstream.connected, *connection)

    def disconnected(self, connection: Connection) -> None:
        """Cancel everything that a connection that is gone has asked, and tell the upstream."""
        for call in self._calls.pop(connection, ()):
            call.cancel()
        self._tell(self._upstream.disconnected, *connection)

    def received(self, connection: Connection, payload: bytes) -> int:
        """Handle one message or batch. Returns for how many messages it counts, by their number and by what it took to
        handle them; not more than 0 when it, or something in it, is no JSON-RPC 2.0."""
        if len(payload) <= UNIT:
            return self._received(connection, payload)
        began = self._cpu()
        handled = self._received(connection, payload)
        # For its size it counts already.
        dear = int((self._cpu() - began) / DEAR) - len(payload) // UNIT
        if dear <= 0:
            return handled
        return handled + dear if handled > 0 else min(handled, -1) - dear

    def _received(self, connection: Connection, payload: bytes) -> int:
        message = decode(payload)
        if isinstance(message, Response):
            self._response(connection, message)
            return 1
        client_id, generation = connection
        if isinstance(message, list):
            valid = self._batch(connection, message)
        else:
            if isinstance(message, Invalid):
                self._fail_broken(connection, message, payload)

            def answer(id: bytes, outcome: Reply | RpcError) -> None:
                response = encode_response(client_id, id, outcome, self._max_message_size)
                self._edge.send(client_id, response, generation)

            valid = self._handle(connection, message, answer)
        many = len(message) if isinstance(message, list) else 1
        if valid:
            return many
        self._metrics.bad_messages["client"] += 1
        return -many if many > 1 else 0

    def _batch(self, connection: Connection, messages: list[Message]) -> bool:
        client_id, generation = connection
        awaited = sum(isinstance(message, (Request, Invalid)) for message in messages)

        def send(responses: bytes) -> None:
            self._edge.send(client_id, responses, generation)

        batch = BatchOfResponses(client_id, awaited, self._max_message_size, send)
        valid = True
        for message in messages:
            if isinstance(message, Response):
                self._response(connection, message)
                continue
            if isinstance(message, Invalid):
                self._fail_broken(connection, message)
            valid &= self._handle(connection, message, batch.answer)
        return valid

    def _handle(self, connection: Connection, message: Request | Notification | Invalid, answer: Answer) -> bool:
        if isinstance(message, Request):
            self._request(connection, message, answer)
        elif isinstance(message, Notification):
            self._notification(connection, message)
        else:
            answer(message.id, RpcError(message.kind, connection[0], detail=message.detail))
            return False
        return True

    def _response(self, connection: Connection, response: Response) -> None:
        id = response.id
        # An integer is looked for in a tenth of the time that bytes are.
        if BACKSLASH in id:
            id = _unescaped(id)
        if self._pending.resolve(connection, id, Reply(response.result, response.error)):
            self._metrics.calls_answered += 1
        else:
            self._metrics.late_responses += 1

    def _fail_broken(self, connection: Connection, message: Invalid, payload: bytes = b"") -> None:
        """End a call at once whose response came but cannot be read. ``payload`` is that of a message that may not
        even be JSON."""
        if message.kind is Kind.INVALID_REQUEST:
            if message.id[:1] != b'"':
                # Of a type that no call has; a number may even be one that cannot be read.
                return
            id = _unescaped(message.id)
        else:
            # It is looked for in all of the payload: not for who is asked nothing.
            found = broken_response_id(payload) if self._pending.in_flight(connection) else None
            if found is None:
                return
            id = b'"%b"' % found.encode("ascii")
        detail = "the client's response could not be read"
        self._pending.fail(connection, id, RpcError(Kind.CONNECTION_LOST, connection[0], detail=detail))

    def _notification(self, connection: Connection, message: Notification) -> None:
        if message.method == RENEWAL and self.renewal is not None:
            self.renewal.renew(*connection, message.params).addErrback(self._not_renewed)
            return
        if message.method.startswith("gateway."):
            self._metrics.notifications["ignored"] += 1
            return
        self._metrics.notifications["from_client"] += 1
        self._tell(self._upstream.message, connection[0], message.method, message.params)

    def _tell(self, tell: Callable[..., None], *args: Any) -> None:
        try:
            tell(*args)
        except Exception:  # noqa: BLE001 - it is logged, and a client has no part in it
            self._log.failure("The upstream failed to take a message")

    def _request(self, connection: Connection, request: Request, answer: Answer) -> None:
        """Hand a request to the upstream; ``answer`` gets its outcome, unless the client goes first."""
        client_id = connection[0]
        refusal = None
        renews = request.method == RENEWAL and self.renewal is not None
        if request.method.startswith("gateway.") and not renews:
            refusal = RpcError(Kind.METHOD_NOT_FOUND, client_id)
        elif connection in self._leaving:
            detail = "this node is going away: ask again where you connect next"
            refusal = RpcError(Kind.NODE_UNREACHABLE, client_id, sent=False, detail=detail)
        elif len(self._calls.get(connection, ())) >= self._max_calls_per_client:
            refusal = RpcError(Kind.TOO_MANY_CALLS, client_id)
        if refusal is not None:
            self._metrics.upstream_calls[str(refusal.code)] += 1
            answer(request.id, refusal)
            return
        if renews:
            call = self._renewed(connection, request.params)
        else:
            call = maybeDeferred(self._upstream.call, client_id, request.method, request.params)
        self._calls.setdefault(connection, set()).add(call)
        call.addBoth(self._settle, connection, call, request.id, answer)

    def _renewed(self, connection: Connection, params: bytes | None) -> Deferred[Reply]:
        assert self.renewal is not None
        return self.renewal.renew(*connection, params).addCallback(lambda _: Reply(b"null", None))

    def _not_renewed(self, failure: Failure) -> None:
        if not failure.check(RpcError):
            self._log.failure("A client's new token could not be checked", failure)

    def _settle(
        self, result: Reply | Failure, connection: Connection, call: Deferred[Reply], id: bytes, answer: Answer
    ) -> None:
        calls = self._calls.get(connection)
        if calls is None or call not in calls:
            # The client has gone, and disconnected() cancelled this.
            self._metrics.upstream_calls["cancelled"] += 1
            if isinstance(result, Failure) and not isinstance(result.value, (CancelledError, RpcError)):
                self._log.failure("A call from a client could not be cancelled", result)
            return
        calls.remove(call)
        if not calls:
            del self._calls[connection]
        outcome: Reply | RpcError
        if not isinstance(result, Failure):
            outcome = result
            self._metrics.upstream_calls["answered"] += 1
        else:
            if isinstance(result.value, RpcError):
                outcome = result.value
            else:
                self._log.failure("The upstream failed to carry out a call from a client", result)
                outcome = RpcError(Kind.CONNECTION_LOST, connection[0])
            self._metrics.upstream_calls[str(outcome.code)] += 1
        answer(id, outcome)


def _unescaped(id: bytes) -> bytes:
    """A raw id without the escapes that a client may write where none is needed."""
    return msgspec.json.encode(msgspec.json.decode(id))
