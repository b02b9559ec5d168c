"""What other nodes were asked and have not answered yet: calls of :mod:`gateway.rpc.pending`, with links as owners."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from gateway.rpc.errors import Kind, RpcError
from gateway.rpc.interface import Miss, Missed
from gateway.rpc.pending import Call, DeferredCall, Pending

SILENT = "the node was silent until the deadline"


class Question(DeferredCall):
    """What is asked as a Deferred, which fails with ``RpcError``, or with ``Missed``."""

    def miss(self, miss: Miss) -> None:
        """The node did not pass it on."""
        self.errback(Missed(miss))


class Asked(Pending):
    """The questions in flight. At its deadline one fails with ``NODE_UNREACHABLE``: the client did have a node, and it
    is that which was silent."""

    def fail(self, owner: Hashable, id: bytes, error: RpcError) -> bool:
        """Settle a question with an error of this node's; see :meth:`Pending.fail`."""
        if error.kind is Kind.TIMEOUT:
            error = RpcError(Kind.NODE_UNREACHABLE, error.client_id, sent=True, detail=SILENT)
        return super().fail(owner, id, error)

    def fail_unsent(self, owner: Hashable, ids: Iterable[bytes]) -> None:
        """Fail those that have certainly not left this node."""
        for id in ids:
            call = self._calls.get(id)
            if call is not None:
                detail = "the link to the node broke before anything was sent"
                super().fail(owner, id, RpcError(Kind.NODE_UNREACHABLE, call.client_id, sent=False, detail=detail))

    def take(self, owner: Hashable, id: bytes) -> Call | None:
        """Await a question no longer that was asked of ``owner``; ``None`` when it is unknown, or over."""
        call = self._calls.get(id)
        if call is None or call.owner != owner:
            return None
        self.forget(call)
        return call

    def settle(self, call: Call, error: RpcError) -> None:
        """Settle one that was taken."""
        self._settle_with_error(call, error)

    def owner_of(self, call: Any) -> Hashable:
        """Who was asked this, or ``None`` if it is not in flight here."""
        # One that was never begun has no id.
        known = self._calls.get(getattr(call, "id", b""))
        return None if known is None or known is not call else known.owner
