"""What calls come to: counted, and as the errors that callers are told.

Clients whose connection is here: what may be sent to them, and sending it.

client <- {"jsonrpc":"2.0","id":"<UUID4>","method":...,"params":...}     ask(): asked under an id of the node's own
client <- {"jsonrpc":"2.0","method":...,"params":...}                    notify()
"""

from __future__ import annotations

from twisted.logger import Logger

from gateway.clients.interface import IClientSessions
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import encode_notification, encode_request
from gateway.rpc.inbound import SessionKey
from gateway.rpc.pending import NOT_SENT, Call, PendingCalls


class CallFailures:
    """Of the calls and notifications of one node."""

    _log = Logger()

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def record(self, error: RpcError) -> None:
        """Count a call that failed."""
        self._metrics.calls_failed[str(error.code)] += 1

    def record_exception(self, error: Exception, client_id: str) -> RpcError:
        """The error that a call fails with, which is counted; see :meth:`error_of`."""
        failed = self.to_rpc_error(error, client_id)
        self.record(failed)
        return failed

    def to_rpc_error(self, error: Exception, client_id: str | None) -> RpcError:
        """The error that a message fails with because of one that is being handled: logged if it is a fault."""
        if isinstance(error, RpcError):
            return error
        self._log.failure("A message to a client failed in a way that it should not")
        # What went wrong is unknown, so that it may have been sent.
        return RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=True, detail="internal error of the node")


#: an id as long as any that a call is given
SAMPLE_ID = b'"00000000-0000-4000-8000-000000000000"'
#: what a request is longer than its method and params, more than enough
_MAX_ENVELOPE_SIZE = 128


class LocalDelivery:
    """The clients of this node. ``max_message_size`` is in bytes; the owners of ``pending`` are connections."""

    def __init__(
        self, sessions: IClientSessions, pending: PendingCalls, metrics: Metrics, *, max_message_size: int
    ) -> None:
        self.sessions = sessions
        self._pending = pending
        self._metrics = metrics
        self._max_message_size = max_message_size
        #: a method, at its longest, and params that have not more bytes together make no message that is too large
        self.safe_size = max_message_size - _MAX_ENVELOPE_SIZE
        #: the connections of clients that were told to go
        self.goaway_sessions: set[SessionKey] = set()

    def validate(self, client_id: str | None, method: str, params: bytes | None, id: bytes | None = None) -> None:
        """Refuse what may be sent to no client, by ``RpcError``; ``id`` is any that is as long as that of a request."""
        if method.startswith("gateway."):
            detail = "methods that begin with gateway. are the gateway's own"
            raise RpcError(ErrorKind.INVALID_REQUEST, client_id, detail=detail)
        # No character of a method takes more than 6 bytes; only what may be too large is encoded to see.
        if 6 * len(method) + (len(params) if params else 0) <= self.safe_size:
            return
        message = encode_notification(method, params) if id is None else encode_request(id, method, params)
        if len(message) > self._max_message_size:
            raise RpcError(ErrorKind.TOO_LARGE, client_id)

    def call(self, call: Call, session: SessionKey, method: str, params: bytes | None, timeout: float) -> bool:
        """Call a client on a connection that is open here; or leave nothing behind, if it turns out that it is not, or
        that the client was told to go.

        ``timeout`` is in seconds. Raises ``RpcError``.
        """
        client_id, generation = session
        if session in self.goaway_sessions:
            # It may have come to another node by now.
            return False
        pending = self._pending
        id = pending.start(call, session, client_id, timeout)
        sent = 0
        try:
            sent = self.sessions.send(client_id, encode_request(id, method, params), generation)
        finally:
            if not sent:
                # It may have failed already, if this is when the connection turned out to be dead.
                pending.discard(call)
        if not sent:
            return False
        if call.early_result is NOT_SENT:
            call.early_result = None
        else:
            pending.mark_sent(call)
        return True

    def notify(self, client_id: str, payload: bytes, generation: int = 0) -> bool:
        """Hand an encoded notification to a client's transport; ``False`` if it is not here (by that generation)."""
        if not self.sessions.send(client_id, payload, generation):
            return False
        self._metrics.notifications["to_client"] += 1
        return True
