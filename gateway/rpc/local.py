"""Delivery of calls and notifications to clients of this node, and accounting of failed calls.

client <- {"jsonrpc":"2.0","id":"<UUID4>","method":...,"params":...}     call(), under an id of the node's own
client <- {"jsonrpc":"2.0","method":...,"params":...}                    notify()
"""

from __future__ import annotations

from twisted.logger import Logger

from gateway.clients.interface import IClientSessions
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import encode_notification, encode_request
from gateway.registry.interface import SessionKey
from gateway.rpc.pending import NOT_SENT, Call, PendingCalls


class CallFailures:
    """Count failed calls of one node, and convert exceptions to ``RpcError``."""

    _log = Logger()

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def record(self, error: RpcError) -> None:
        """Count a failed call."""
        self._metrics.calls_failed[str(error.code)] += 1

    def record_exception(self, error: Exception, client_id: str) -> RpcError:
        """Return the error that a call fails with because of this exception, and count it."""
        rpc_error = self.to_rpc_error(error, client_id)
        self.record(rpc_error)
        return rpc_error

    def to_rpc_error(self, error: Exception, client_id: str | None) -> RpcError:
        """Return the error that a call or notification fails with because of the exception being handled. Logs it
        unless it is an ``RpcError``."""
        if isinstance(error, RpcError):
            return error
        self._log.failure("Unexpected error in sending a message to a client")
        # The message may have been sent.
        return RpcError(ErrorKind.NODE_UNREACHABLE, client_id, sent=True, detail="internal error of the node")


#: an id of the length that all calls have
SAMPLE_ID = b'"00000000-0000-4000-8000-000000000000"'
#: more bytes than a request has besides its method and params
_MAX_ENVELOPE_SIZE = 128


class LocalDelivery:
    """Delivery to clients of this node. ``max_message_size`` is in bytes; the owners of ``pending`` are sessions."""

    def __init__(
        self, sessions: IClientSessions, pending: PendingCalls, metrics: Metrics, *, max_message_size: int
    ) -> None:
        self.sessions = sessions
        self._pending = pending
        self._metrics = metrics
        self._max_message_size = max_message_size
        #: a message is not too large if its method, at its longest, and its params have no more bytes than this
        self.safe_size = max_message_size - _MAX_ENVELOPE_SIZE
        #: sessions that were sent gateway.goaway
        self.goaway_sessions: set[SessionKey] = set()

    def validate(self, client_id: str | None, method: str, params: bytes | None, id: bytes | None = None) -> None:
        """Raise ``RpcError`` for a message that may not be sent to any client. ``id`` is any id of the length of a
        request's; ``None`` for a notification."""
        if method.startswith("gateway."):
            detail = "methods that begin with gateway. are the gateway's own"
            raise RpcError(ErrorKind.INVALID_REQUEST, client_id, detail=detail)
        # No character of a method takes more than 6 bytes. Only what may be too large is encoded to measure it.
        if 6 * len(method) + (len(params) if params else 0) <= self.safe_size:
            return
        message = encode_notification(method, params) if id is None else encode_request(id, method, params)
        if len(message) > self._max_message_size:
            raise RpcError(ErrorKind.TOO_LARGE, client_id)

    def call(self, call: Call, session: tuple[str, int], method: str, params: bytes | None, timeout: float) -> bool:
        """Call a client on a connection that is open here.

        Returns ``False``, and leaves nothing behind, if it turns out to be closed, or was sent goaway. ``timeout`` is
        in seconds. Raises ``RpcError``.
        """
        client_id, generation = session
        if session in self.goaway_sessions:
            # The client may be connected to another node by now.
            return False
        pending = self._pending
        id = pending.start(call, session, client_id, timeout)
        sent = 0
        try:
            sent = self.sessions.send(client_id, encode_request(id, method, params), generation)
        finally:
            if not sent:
                # It may have failed already, if sending has found the connection lost.
                pending.discard(call)
        if not sent:
            return False
        if call.early_result is NOT_SENT:
            call.early_result = None
        else:
            pending.mark_sent(call)
        return True

    def notify(self, client_id: str, payload: bytes, generation: int = 0) -> bool:
        """Write an encoded notification to a client's transport. Returns ``False`` if it is not connected here (with
        that generation)."""
        if not self.sessions.send(client_id, payload, generation):
            return False
        self._metrics.notifications["to_client"] += 1
        return True
