"""One way to another node for a client's bytes: from the request that opens it until the client's connection is there.

-> GET /v1/relay?… HTTP/1.1
<- HTTP/1.1 101 Switching Protocols          reading pauses; what came behind it is held for the client
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.cluster.answer import SAME_HERE, Answer, BadAnswer, check_upgrade, find_head, parse_head, refusal_of
from gateway.cluster.relay import Relays
from gateway.edge.head import Refusal
from gateway.edge.interface import IRelay
from gateway.edge.waking import hand_over, succeed

#: how many bytes may come for the client before its connection is there: one read of the socket, which then pauses
MAX_HELD = 131072


class Declined(Exception):
    """A node answered, but does not take the client."""


@implementer(IRelay)
class Way(Protocol):
    """The connection to the other node."""

    #: there is one from before :meth:`ask`
    transport: Any = None

    def __init__(self, relays: Relays, client_id: str, node_id: str, key: str, offered: tuple[str, ...]) -> None:
        self._relays = relays
        self._client_id = client_id
        self._node_id = node_id
        self._key = key
        self._offered = offered
        self._waiter: Deferred[None] | None = None
        self._answer: Answer | None = None
        self._open = False
        self._lost = False
        #: what came and was not handled
        self._data = b""

    def ask(self, request: bytes) -> Deferred[None]:
        """Send the request; fires when it is answered with a 101. Fails with :class:`~gateway.edge.head.Refusal`,
        :class:`Declined`, :class:`~gateway.cluster.answer.BadAnswer`, or why the connection was lost."""
        waiter: Deferred[None] = Deferred(self._cancelled)
        self._waiter = waiter
        self.transport.write(request)
        return waiter

    def _cancelled(self, waiter: Deferred[None]) -> None:
        self._waiter = None
        self.abandon()

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        self._data += data
        if self._open:
            if len(self._data) > MAX_HELD:
                self.abandon()
        elif self._waiter is not None:
            try:
                self._read_answer()
            except (BadAnswer, Declined, Refusal):
                self._fail(Failure())

    def _read_answer(self) -> None:
        if self._answer is None:
            end = find_head(self._data)
            if not end:
                return
            self._answer = parse_head(self._data[:end])
            self._data = self._data[end:]
        answer = self._answer
        if answer.status == 101:
            check_upgrade(answer, self._key, self._offered)
            self._open = True
            self.transport.pauseProducing()
            waiter, self._waiter = self._waiter, None
            assert waiter is not None
            waiter.callback(None)
        elif answer.status not in SAME_HERE:
            raise Declined(f"it answered {answer.status}")
        elif len(self._data) >= answer.body_size():
            self._refuse(answer)

    def _refuse(self, answer: Answer) -> None:
        refusal = refusal_of(answer, self._data[: answer.body_size()])
        assert refusal is not None
        raise refusal

    def _fail(self, failure: Failure) -> None:
        waiter, self._waiter = self._waiter, None
        self.abandon()
        if waiter is not None:
            waiter.errback(failure)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._lost = True
        if self._waiter is None:
            return
        if self._answer is not None:
            # All of the refusal that there will be.
            try:
                self._refuse(self._answer)
            except Refusal:
                reason = Failure()
        self._fail(reason)

    # IRelay.

    def attach(self, protocol: Any) -> None:
        """See :meth:`IRelay.attach`. Nothing escapes."""
        pipe = self._relays.begin(self._client_id, self._node_id)
        try:
            early = hand_over(protocol, pipe.client)
            held, self._data = self._data, b""
            if self._lost:
                pipe.node.lost = True
            else:
                succeed(self.transport, pipe.node)
            self.transport = None
            pipe.go(held, early)
        except Exception:  # noqa: BLE001
            self._relays.troubles.report("an error in beginning a relay")
            self.abandon()
            pipe.abort()

    def abandon(self) -> None:
        """See :meth:`IRelay.abandon`."""
        if self.transport is not None and not self._lost:
            self.transport.abortConnection()
