"""In-memory name service, which can hold its responses until the test releases them."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from gateway.cloud.registrar import INameService


@implementer(INameService)
class FakeNameService:
    """Records ``requests``. While ``holding``, a request is executed by :meth:`answer`; with ``error``, all fail."""

    def __init__(self) -> None:
        self.records: dict[str, str] = {}
        self.requests: list[tuple[Any, ...]] = []
        self.held: list[tuple[Deferred[Any], Any]] = []
        self.holding = False
        self.error: Exception | None = None
        self.closed = False

    def _request(self, request: tuple[Any, ...], work: Any) -> Deferred[Any]:
        assert not self.closed
        self.requests.append(request)
        if self.holding:
            self.held.append((Deferred(), work))
            return self.held[-1][0]
        return fail(self.error) if self.error else succeed(work())

    def answer(self) -> None:
        """Execute the oldest held request."""
        waiting, work = self.held.pop(0)
        if self.error:
            waiting.errback(self.error)
        else:
            waiting.callback(work())

    def announce(self, node_id: str, address: str) -> Deferred[None]:
        return self._request(("announce", node_id, address), lambda: self.records.update({node_id: address}))

    def withdraw(self, node_ids: frozenset[str]) -> Deferred[None]:
        def work() -> None:
            for node_id in node_ids:
                self.records.pop(node_id, None)

        return self._request(("withdraw", *sorted(node_ids)), work)

    def announced(self) -> Deferred[dict[str, str]]:
        return self._request(("announced",), lambda: dict(self.records))

    def close(self) -> Deferred[None]:
        self.closed = True
        return succeed(None)
