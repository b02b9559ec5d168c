from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.batching import MAX_LOOKUP_BATCH_SIZE, LookupBatcher
from gateway.registry.interface import RegistryUnavailableError


class LookupBatcherTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.sent: list[tuple[Any, Deferred[Any]]] = []
        self.asked: list[list[str]] = []
        self.lookups = LookupBatcher(self.submit, self.find)

    def submit(self, make: Any) -> Deferred[Any]:
        self.sent.append((make, Deferred()))
        return self.sent[-1][1]

    def find(self, connection: Any, client_ids: list[str]) -> dict[str, Any]:
        self.asked.append(client_ids)
        return {client_id: f"where {client_id} is" for client_id in client_ids if client_id != "nobody"}

    def run_sent(self) -> None:
        make, deferred = self.sent.pop()
        deferred.callback(make()(None))

    def test_those_that_wait_go_as_one(self) -> None:
        found = [self.lookups.find(client_id) for client_id in ("x", "y", "x", "nobody")]
        self.assertEqual(len(self.sent), 1)
        self.run_sent()
        self.assertEqual(self.asked, [["x", "y", "nobody"]])
        self.assertEqual(
            [self.successResultOf(each) for each in found], ["where x is", "where y is", "where x is", None]
        )
        self.assertEqual(self.sent, [])

    def test_one_statement_is_bounded(self) -> None:
        found = [self.lookups.find(f"c{i}") for i in range(MAX_LOOKUP_BATCH_SIZE + 1)]
        self.run_sent()
        self.assertNoResult(found[-1])
        self.run_sent()
        self.assertEqual([len(asked) for asked in self.asked], [MAX_LOOKUP_BATCH_SIZE, 1])
        self.successResultOf(found[-1])

    def test_cancelling_ends_one_wait_alone(self) -> None:
        first, second = self.lookups.find("x"), self.lookups.find("x")
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.run_sent()
        self.successResultOf(second)

    def test_a_failure_fails_all_that_wait(self) -> None:
        first = self.lookups.find("x")
        make, deferred = self.sent.pop()
        make()
        second = self.lookups.find("x")
        deferred.errback(RegistryUnavailableError("away"))
        self.failureResultOf(first, RegistryUnavailableError)
        self.failureResultOf(second, RegistryUnavailableError)
        third = self.lookups.find("x")
        self.run_sent()
        self.successResultOf(third)
