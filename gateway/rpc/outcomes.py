"""What calls come to: counted, and as the errors that callers are told."""

from __future__ import annotations

from twisted.logger import Logger

from gateway.rpc.errors import Kind, RpcError
from gateway.telemetry.metrics import Metrics


class Outcomes:
    """Of the calls and notifications of one node."""

    _log = Logger()

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def failed(self, error: RpcError) -> None:
        """Count a call that failed."""
        self._metrics.calls_failed[str(error.code)] += 1

    def call_failed(self, error: Exception, client_id: str) -> RpcError:
        """The error that a call fails with, which is counted; see :meth:`error_of`."""
        failed = self.error_of(error, client_id)
        self.failed(failed)
        return failed

    def error_of(self, error: Exception, client_id: str | None) -> RpcError:
        """The error that a message fails with because of one that is being handled: logged if it is a fault."""
        if isinstance(error, RpcError):
            return error
        self._log.failure("A message to a client failed in a way that it should not")
        # What went wrong is unknown, so that it may have been sent.
        return RpcError(Kind.NODE_UNREACHABLE, client_id, sent=True, detail="internal error of the node")
