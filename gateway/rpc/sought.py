"""Messages to clients that are not here, while they are under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from gateway.registry.interface import Location
from gateway.rpc.errors import Kind, RpcError
from gateway.rpc.interface import Reply
from gateway.rpc.pending import Call
from gateway.rpc.routing import Reason

if TYPE_CHECKING:
    from gateway.rpc.seeking import Seeking


class Sought(Call):
    """A call to a client that is not here, and what is needed to ask for it again; ``asker`` is whose call it is."""

    __slots__ = ("asker", "deadline", "failed", "late", "location", "method", "params", "seeking", "waiting")

    is_call = True
    #: ``None`` once it is over
    asker: Call | None
    #: where it was asked last
    location: Location | None
    #: while it is sought: what it fails with at its deadline; ``None`` while a node has it
    late: Kind | None
    #: what it waits for meanwhile
    waiting: Deferred[Any] | None

    def __init__(
        self, seeking: Seeking, asker: Call, client_id: str, method: str, params: bytes | None, deadline: float
    ) -> None:
        self.seeking = seeking
        self.asker = asker
        self.client_id = client_id
        self.method = method
        self.params = params
        self.deadline = deadline
        self.location = self.late = self.waiting = None
        self.failed: tuple[Reason, ...] = ()
        asker.owner = self

    def settle(self, outcome: Reply | RpcError) -> None:
        """See :meth:`Call.settle`."""
        self.seeking.settled(self, outcome)


class SoughtNotification(Sought):
    """The same for a notification."""

    __slots__ = ()

    is_call = False


class DeferredNotification(Call, Deferred[None]):
    """A notification on its way, as a Deferred which fails with ``RpcError``."""

    def settle(self, outcome: Reply | RpcError) -> None:
        """Fire it."""
        if isinstance(outcome, RpcError):
            self.errback(outcome)
        else:
            self.callback(None)
