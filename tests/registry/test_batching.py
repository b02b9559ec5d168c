"""Tests of gateway.registry.batching."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.registry import batching
from gateway.registry.batching import MAX_BATCH_SIZE, MAX_LOOKUP_BATCH_SIZE, LookupBatcher, Request, WriteBatcher
from gateway.registry.claims import ClaimRequest, ReleaseRequest, Row, resolve
from gateway.registry.division import MAX_REFUSALS
from gateway.registry.errors import (
    ClaimSupersededError,
    LeaseLostError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from gateway.registry.interface import Claim, Location, SessionKey

NOW = 1_000_000_000


def claim(client_id: str = "x", address: str = "h:1") -> ClaimRequest:
    return ClaimRequest(client_id, address, None, Deferred())


def reclaim(generation: int, client_id: str = "x") -> ClaimRequest:
    return ClaimRequest(client_id, "h:1", generation, Deferred())


class ResolveTests(SynchronousTestCase):
    def test_a_claim_of_a_new_client_has_the_clock_as_its_generation(self) -> None:
        settled = resolve([claim()], {}, 1, NOW, True)
        self.assertEqual(settled.outcomes, [Claim(NOW, NOW / 1e6)])
        self.assertEqual((settled.written, settled.removed), ({"x": Row(1, NOW, NOW, "h:1")}, {}))

    def test_generations_grow_while_the_clock_is_behind(self) -> None:
        settled = resolve([claim()], {"x": Row(2, NOW + 5, NOW, "h:1")}, 1, NOW, True)
        self.assertEqual(settled.outcomes, [Claim(NOW + 6, NOW / 1e6)])

    def test_without_a_lease_only_releases_go(self) -> None:
        batch = [claim(), reclaim(5), ReleaseRequest(SessionKey("y", 3))]
        settled = resolve(batch, {"y": Row(1, 3, 3, "h")}, 1, NOW, False)
        self.assertIsInstance(settled.outcomes[0], LeaseLostError)
        self.assertIsInstance(settled.outcomes[1], LeaseLostError)
        self.assertEqual((settled.written, list(settled.removed)), ({}, ["y"]))

    def test_rows_come_sorted(self) -> None:
        settled = resolve([claim(name) for name in "cab"], {}, 1, NOW, True)
        self.assertEqual(list(settled.written), ["a", "b", "c"])

    def test_a_reclaim_after_the_release_of_what_replaced_it(self) -> None:
        rows = {"x": Row(1, 9, 9, "h:2")}
        settled = resolve([ReleaseRequest(SessionKey("x", 9)), reclaim(5)], rows, 1, NOW, True)
        self.assertEqual(settled.outcomes, [None, Claim(5, 5 / 1e6)])
        self.assertEqual(settled.written, {"x": Row(1, 5, 5, "h:1")})

    def test_a_reclaim_of_what_another_node_has_by_the_same_generation(self) -> None:
        self.assertEqual(resolve([reclaim(5)], {"x": Row(2, 5, 5, "h")}, 1, NOW, True).outcomes, [None])

    def test_a_reclaim_then_a_claim(self) -> None:
        first, second = resolve([reclaim(NOW + 9), claim()], {}, 1, NOW, True).outcomes
        self.assertEqual((first, second), (Claim(NOW + 9, NOW / 1e6), Claim(NOW + 10, NOW / 1e6)))

    def test_a_release_does_not_remove_the_row_of_another_node(self) -> None:
        settled = resolve([ReleaseRequest(SessionKey("x", 5))], {"x": Row(2, 5, 5, "h")}, 1, NOW, True)
        self.assertEqual((settled.written, settled.removed), ({}, {}))

    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.tuples(st.sampled_from(["claim", "reclaim", "release"]), st.sampled_from("xy"), st.integers(1, 6)),
            max_size=8,
        ),
        st.dictionaries(st.sampled_from("xy"), st.tuples(st.integers(1, 2), st.integers(1, 6))),
    )
    def test_a_batch_equals_its_requests_one_by_one(
        self, requests: list[tuple[str, str, int]], before: dict[str, tuple[int, int]]
    ) -> None:
        make = {
            "claim": lambda x, g: claim(x),
            "reclaim": lambda x, g: reclaim(g, x),
            "release": lambda x, g: ReleaseRequest(SessionKey(x, g)),
        }
        batch = [make[kind](client_id, generation) for kind, client_id, generation in requests]
        rows = {client_id: Row(node, generation, 1, "h") for client_id, (node, generation) in before.items()}
        together = resolve(batch, rows, 1, 3, True)
        for index, each in enumerate(batch):
            if isinstance(together.outcomes[index], ClaimSupersededError):
                if isinstance(each, ClaimRequest) and each.generation is not None:
                    row = rows[each.client_id]
                    self.assertTrue(row.node == 1 and row.generation > each.generation)
                    continue
                later = batch[index + 1 :]
                self.assertTrue(any(other.client_id == each.client_id for other in later))
                continue
            alone = resolve([each], rows, 1, 3, True)
            self.assertEqual(alone.outcomes, [together.outcomes[index]])
            rows = {**rows, **alone.written}
            for client_id in alone.removed:
                del rows[client_id]
        original = {client_id: Row(node, generation, 1, "h") for client_id, (node, generation) in before.items()}
        for client_id in together.removed:
            del original[client_id]
        self.assertEqual({**original, **together.written}, rows)


class WriteBatcherTests(SynchronousTestCase):
    """The queue, with a database whose jobs the test runs."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.reached_commit = True
        self.previous_owner: Location | None = None
        self.sent: list[tuple[Any, Deferred[Any]]] = []
        self.written: list[list[ClaimRequest | ReleaseRequest]] = []
        self.revoked: list[tuple[SessionKey, Location | None]] = []
        self.batcher = WriteBatcher(
            *(self.clock, self.submit, self.write, self.metrics, 0.003),
            on_claim_revoked=lambda *claim: self.revoked.append(claim),
        )

    def submit(self, make: Any) -> Deferred[Any]:
        deferred: Deferred[Any] = Deferred()
        self.sent.append((make, deferred))
        return deferred

    def write(self, connection: Any, batch: list[Any], tried: list[SessionKey]) -> list[Any]:
        """Write a batch: each claim gets its index as generation. ``connection`` may be an error to raise."""
        self.written.append(list(batch))
        for index, each in enumerate(batch, start=1):
            if isinstance(each, ClaimRequest) and self.reached_commit:
                tried.append(SessionKey(each.client_id, index))
        if isinstance(connection, Exception):
            raise connection
        return [
            Claim(i, 0.0, self.previous_owner) if isinstance(each, ClaimRequest) else None
            for i, each in enumerate(batch, 1)
        ]

    def run_sent(self, error: Exception | None = None, *, meanwhile: Any = lambda: None) -> None:
        """Run the batch that was submitted."""
        ((make, deferred),) = self.sent
        self.sent = []
        work = make()
        meanwhile()
        execute(lambda: work and work(error)).chainDeferred(deferred)

    def test_a_batch_is_sent_after_a_few_milliseconds(self) -> None:
        self.batcher.request("x", "h")
        self.clock.advance(0.002)
        self.assertEqual(self.sent, [])
        self.clock.advance(0.001)
        self.assertEqual(len(self.sent), 1)

    def test_a_full_batch_is_sent_at_once_and_holds_no_more(self) -> None:
        claims = [self.batcher.request(f"c{i}", "h") for i in range(MAX_BATCH_SIZE + 1)]
        self.clock.advance(0)
        self.run_sent()
        self.assertEqual(len(self.written[0]), MAX_BATCH_SIZE)
        self.successResultOf(claims[MAX_BATCH_SIZE - 1])
        self.assertNoResult(claims[MAX_BATCH_SIZE])
        self.run_sent()
        self.successResultOf(claims[MAX_BATCH_SIZE])
        self.assertEqual((self.metrics.claims, self.metrics.registry_batches), (MAX_BATCH_SIZE + 1, 2))

    def test_one_batch_is_in_flight_at_a_time(self) -> None:
        self.batcher.request("x", "h")
        self.clock.advance(0.003)
        for i in range(MAX_BATCH_SIZE):
            self.batcher.request(f"c{i}", "h")
        self.clock.advance(1)
        self.assertEqual(len(self.sent), 1)
        self.run_sent()  # takes all requests queued until now
        self.assertEqual(len(self.written[0]), MAX_BATCH_SIZE)

    def test_a_request_cancelled_in_the_queue_is_not_sent(self) -> None:
        claim = self.batcher.request("x", "h")
        self.clock.advance(0.003)
        claim.cancel()
        self.failureResultOf(claim, CancelledError)
        self.run_sent()
        self.assertEqual((self.written, self.sent, len(self.batcher)), ([], [], 0))

    def test_a_claim_cancelled_in_flight_is_released_if_it_succeeds(self) -> None:
        claim = self.batcher.request("x", "h")
        self.clock.advance(0.003)
        self.run_sent(meanwhile=claim.cancel)
        self.failureResultOf(claim, CancelledError)
        self.run_sent()
        (release,) = self.written[1]
        self.assertEqual(release.key, ("x", 1))
        self.assertEqual((self.metrics.claims, self.metrics.releases), (1, 1))

    def test_a_revoked_claim_is_reported_with_its_previous_owner_after_its_row_is_removed(self) -> None:
        before = Location("x", "n", "n", "ws://n", 7, 0.0, "h")
        claim = self.batcher.request("x", "h")
        self.clock.advance(0.003)
        self.previous_owner = before
        self.run_sent(meanwhile=claim.cancel)
        self.failureResultOf(claim, CancelledError)
        self.assertEqual(self.revoked, [])
        self.run_sent()
        self.assertEqual(self.revoked, [(("x", 1), before)])

    def test_a_claim_that_may_have_been_written_is_reported_as_revoked(self) -> None:
        claim = self.batcher.request("x", "h")
        self.clock.advance(0.003)
        self.run_sent(RegistryUnavailableError("lost at the commit"))
        self.failureResultOf(claim, RegistryUnavailableError)
        # Its release fails as well, and is retried.
        self.clock.advance(0.1)
        self.run_sent(RegistryUnavailableError("still away"))
        self.assertEqual(self.revoked, [])
        self.clock.advance(0.2)
        self.run_sent()
        self.assertEqual(self.revoked, [(("x", 1), None)])

    def test_a_reclaim_cancelled_in_flight_stays(self) -> None:
        reclaim = self.batcher.request("x", "h", 5)
        self.clock.advance(0.003)
        self.run_sent(meanwhile=reclaim.cancel)
        self.failureResultOf(reclaim, CancelledError)
        self.assertEqual((self.sent, len(self.batcher)), ([], 0))

    def test_a_failed_batch_fails_every_claim_and_releases_what_may_have_been_written(self) -> None:
        claim = self.batcher.request("x", "h")
        self.clock.advance(0.003)
        behind: list[Deferred[Any]] = []
        self.run_sent(
            RegistryUnavailableError("it is away"), meanwhile=lambda: behind.append(self.batcher.request("y", "h"))
        )
        for each in [claim, *behind]:
            self.assertIn("it is away", str(self.failureResultOf(each, RegistryUnavailableError).value))
        self.clock.advance(0.1)
        self.run_sent()
        self.assertEqual([(each.client_id, type(each)) for each in self.written[1]], [("x", ReleaseRequest)])

    def test_releases_are_retried_with_backoff_until_they_are_written(self) -> None:
        release = self.batcher.release(SessionKey("x", 5))
        self.clock.advance(0.003)
        self.run_sent(RegistryUnavailableError("away"))
        self.failureResultOf(release, RegistryUnavailableError)
        for pause in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0):
            self.clock.advance(pause - 0.001)
            self.assertEqual(self.sent, [])
            self.clock.advance(0.0011)
            self.run_sent(RegistryUnavailableError("away"))
        later = self.batcher.release(SessionKey("y", 6))
        self.failureResultOf(later, RegistryUnavailableError)  # at once
        again = self.batcher.release(SessionKey("x", 5))
        self.failureResultOf(again, RegistryUnavailableError)
        self.clock.advance(5)
        self.run_sent()
        self.assertEqual({each.key for each in self.written[-1]}, {("x", 5), ("y", 6)})
        self.assertEqual(len(self.batcher), 0)

    def test_a_claim_does_not_wait_for_the_backoff(self) -> None:
        self.failureResultOf_after(self.batcher.release(SessionKey("x", 5)))
        claim = self.batcher.request("y", "h")
        self.clock.advance(0.003)
        self.run_sent()
        self.successResultOf(claim)
        self.assertEqual(len(self.batcher), 0)

    def failureResultOf_after(self, deferred: Deferred[Any]) -> None:
        self.clock.advance(0.003)
        self.run_sent(RegistryUnavailableError("away"))
        self.failureResultOf(deferred, RegistryUnavailableError)

    def test_a_release_after_a_failure_of_only_claims_is_sent_at_once(self) -> None:
        self.reached_commit = False
        self.failureResultOf_after(self.batcher.request("x", "h"))
        self.assertEqual(len(self.batcher), 0)
        release = self.batcher.release(SessionKey("x", 5))
        self.clock.advance(0.003)
        self.run_sent()
        self.successResultOf(release)

    def test_retry_now_sends_at_once(self) -> None:
        self.failureResultOf_after(self.batcher.release(SessionKey("x", 5)))
        self.batcher.retry_now()
        self.clock.advance(0)
        self.run_sent()
        self.assertEqual(len(self.batcher), 0)
        self.batcher.retry_now()
        self.clock.advance(10)
        self.assertEqual(self.sent, [])

    def test_closing_without_the_database_gives_up_after_one_try(self) -> None:
        self.failureResultOf_after(self.batcher.release(SessionKey("x", 5)))
        closed = self.batcher.close()
        self.run_sent(RegistryUnavailableError("away"))
        self.successResultOf(closed)
        self.clock.advance(100)
        self.assertEqual(self.sent, [])

    def test_closing_in_an_errback(self) -> None:
        """What is still queued is tried once more, unless nothing is left."""
        for queued in (0, 1):
            self.setUp()
            self.reached_commit = False
            closed: list[Deferred[None]] = []
            claim = self.batcher.request("x", "h")
            if queued:
                self.batcher.release(SessionKey("y", 5)).addErrback(lambda _: None)
            claim.addErrback(lambda _: closed.append(self.batcher.close()))  # noqa: B023
            self.clock.advance(0.003)
            self.run_sent(RegistryUnavailableError("away"))
            if queued:
                self.assertNoResult(closed[0])
                self.run_sent(RegistryUnavailableError("away"))
            self.successResultOf(closed[0])
            self.assertEqual((self.sent, self.clock.getDelayedCalls()), ([], []))

    def test_closing_waits_for_the_batch_in_flight_and_the_queued_releases(self) -> None:
        claim = self.batcher.request("x", "h")
        self.clock.advance(0.003)
        closed = self.batcher.close()
        self.failureResultOf(claim, RegistryUnavailableError)
        self.run_sent()
        self.successResultOf(closed)

    def test_a_callback_may_cancel_other_requests(self) -> None:
        first, second = self.batcher.release(SessionKey("x", 5)), self.batcher.release(SessionKey("x", 5))
        third, fourth = self.batcher.request("y", "h"), self.batcher.request("z", "h")
        first.addCallback(lambda _: second.cancel())
        third.addCallback(lambda _: fourth.cancel())
        self.clock.advance(0.003)
        self.run_sent()
        self.failureResultOf(second, CancelledError)
        self.failureResultOf(fourth, CancelledError)
        self.run_sent()
        self.assertEqual([each.client_id for each in self.written[1]], ["z"])


class RefusalTests(SynchronousTestCase):
    """Batches that the database refuses: too many requests, or one that it never accepts."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        #: names of clients whose requests are refused
        self.bad: set[str] = set()
        #: requests that are accepted at once
        self.max_size = 1000
        #: whether a refusal comes at the commit, so that claims may have been written
        self.at_commit = False
        self.sent: list[tuple[Any, Deferred[Any]]] = []
        self.tried: list[list[str]] = []
        self.written: list[Request] = []
        self.revoked: list[SessionKey] = []
        self.generation = 0
        self.batcher = self.make_batcher()

    def make_batcher(self, **options: Any) -> WriteBatcher:
        return WriteBatcher(
            *(self.clock, self.submit, self.write, self.metrics, 0.003),
            on_claim_revoked=lambda key, previous_owner: self.revoked.append(key),
            **options,
        )

    def submit(self, make_work: Any) -> Deferred[Any]:
        deferred: Deferred[Any] = Deferred()
        self.sent.append((make_work, deferred))
        return deferred

    def write(self, connection: Any, batch: list[Request], maybe_written: list[SessionKey]) -> list[Any]:
        self.tried.append([request.client_id for request in batch])
        refused = len(batch) > self.max_size or any(request.client_id in self.bad for request in batch)
        outcomes: list[Any] = []
        for request in batch:
            self.generation += 1
            outcomes.append(Claim(self.generation, 0.0) if isinstance(request, ClaimRequest) else None)
            if isinstance(request, ClaimRequest) and (self.at_commit or not refused):
                maybe_written.append(SessionKey(request.client_id, self.generation))
        if refused:
            raise RegistryRefusedError("too large")
        self.written += batch
        return outcomes

    def run_next(self) -> None:
        make_work, deferred = self.sent.pop(0)
        work = make_work()
        execute(lambda: work and work(None)).chainDeferred(deferred)

    def run_all(self, seconds: float = 0.003) -> None:
        """Run the batches that are sent now, or after some time."""
        self.clock.advance(seconds)
        while self.sent:
            self.run_next()

    def claim_all(self, count: int) -> list[Deferred[Any]]:
        return [self.batcher.request(f"c{number}", "h") for number in range(count)]

    def ids_written(self) -> list[str]:
        return [request.client_id for request in self.written]

    def test_one_claim_that_is_refused_fails_alone(self) -> None:
        self.bad = {"c137"}
        claims = self.claim_all(200)
        behind = self.batcher.request("behind", "h")
        self.run_all()
        error = self.failureResultOf(claims.pop(137), RegistryRefusedError).value
        self.assertEqual(str(error), "too large")
        for claim in [*claims, behind]:
            self.successResultOf(claim)
        self.assertLessEqual(len(self.tried), 2 * 8 + 1 + 1)
        self.assertEqual(len(self.batcher), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_limit_of_the_database_is_kept(self) -> None:
        self.max_size = 60
        claims = self.claim_all(400)
        self.run_all()
        for claim in claims:
            self.successResultOf(claim)
        self.assertEqual([len(ids) for ids in self.tried], [200, 100, 50, 50, 100, 50, 50, 50, 50, 50, 50])

    def test_a_release_that_is_refused_is_retried_apart_from_the_others(self) -> None:
        self.bad = {"x"}
        refused = self.batcher.release(SessionKey("x", 5))
        release, claim = self.batcher.release(SessionKey("y", 5)), self.batcher.request("z", "h")
        self.run_all()
        self.assertIn("queued", str(self.failureResultOf(refused, RegistryRefusedError).value))
        self.successResultOf(release)
        self.successResultOf(claim)
        self.assertEqual(len(self.batcher), 1)
        self.tried = []
        # Others are not held up by it: neither divided nor delayed.
        for delay in (1, 2, 4):
            self.run_all(delay - 0.01)
            self.assertEqual(self.tried, [])
            self.run_all(0.01)
            self.assertEqual(self.tried, [["x"]])
            self.successResultOf(self.claim_after())
            self.assertEqual(self.tried, [["x"], ["w"]])
            self.tried = []
        self.bad = set()
        self.run_all(8)
        self.assertEqual((self.tried, len(self.batcher)), ([["x"]], 0))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def claim_after(self) -> Deferred[Any]:
        claim = self.batcher.request("w", "h")
        self.run_all()
        return claim

    def test_a_release_that_is_requested_again_is_tried_at_once(self) -> None:
        self.bad = {"x"}
        self.failureResultOf(self.release("x"), RegistryRefusedError)
        self.failureResultOf(self.release("x"), RegistryRefusedError)
        self.bad = set()
        self.successResultOf(self.release("x"))
        self.assertEqual(len(self.batcher), 0)
        self.tried = []
        self.run_all(100)
        self.assertEqual(self.tried, [])

    def release(self, client_id: str) -> Deferred[None]:
        release = self.batcher.release(SessionKey(client_id, 5))
        self.run_all()
        return release

    def test_refused_releases_are_bounded(self) -> None:
        self.patch(batching, "MAX_REFUSED_RELEASES", 3)
        self.bad = {f"c{number}" for number in range(5)}
        with capturedLogs() as events:
            for client_id in sorted(self.bad):
                self.failureResultOf(self.release(client_id), RegistryRefusedError)
        self.assertEqual(len(self.batcher), 3)
        texts = [event["log_format"].format(**event) for event in events]
        self.assertIn("registry: the release of client 'c0' was refused: too large", texts)
        self.assertIn("registry: more than 3 releases are refused: the row of 'c0' stays", texts)
        self.bad = set()
        self.run_all(2)
        self.assertEqual(self.ids_written(), ["c2", "c3", "c4"])

    def test_a_claim_that_may_have_been_written_before_the_refusal_is_released(self) -> None:
        self.bad, self.at_commit = {"x"}, True
        claims = [self.batcher.request(client_id, "h") for client_id in "wxy"]
        self.run_next_after()
        self.bad = set()  # the release of x is accepted
        self.run_next()
        self.bad = {"x"}
        self.run_next()
        self.run_next()
        self.assertEqual(self.tried, [["w", "x", "y"], ["w"], ["x", "y"], ["x"]])
        self.bad = set()
        self.run_all()
        self.failureResultOf(claims[1], RegistryRefusedError)
        self.successResultOf(claims[0])
        self.successResultOf(claims[2])
        # One for each of its tries; none for the claims that succeeded.
        self.assertEqual([key.client_id for key in self.revoked], ["x", "x", "x"])

    def run_next_after(self) -> None:
        self.clock.advance(0.003)
        self.run_next()

    def test_the_clients_of_a_divided_batch_stay_in_flight(self) -> None:
        self.batcher = self.make_batcher(other_submits=[self.submit])
        self.bad = {"x"}
        first = [self.batcher.request(client_id, "h") for client_id in "xyz"]
        self.clock.advance(0.003)
        self.run_next()
        # The other connection was given a job as well, which takes what it may write when it is started.
        second = [self.batcher.request(client_id, "h") for client_id in "zy"] + [self.batcher.request("free", "h")]
        self.run_next()
        self.assertEqual(self.ids_written(), ["free"])
        self.run_all()
        self.failureResultOf(first[0], RegistryRefusedError)
        self.assertEqual(self.ids_written(), ["free", "y", "z", "z", "y"])
        for claim in [*first[1:], *second]:
            self.successResultOf(claim)

    def test_a_database_that_refuses_everything_counts_as_unavailable(self) -> None:
        self.max_size = 0
        claims, release = self.claim_all(200), self.batcher.release(SessionKey("x", 5))
        release.addErrback(lambda _: None)
        self.run_all()
        self.assertLessEqual(len(self.tried), MAX_REFUSALS + 2)
        for claim in claims:
            self.failureResultOf(claim, RegistryUnavailableError)
        self.max_size = 1000
        self.run_all(0.1)
        self.assertEqual(self.ids_written(), ["x"])

    def test_a_failure_between_the_parts_fails_what_is_left(self) -> None:
        self.max_size = 1
        claims = [self.batcher.request(client_id, "h") for client_id in "xyz"]
        release = self.batcher.release(SessionKey("r", 5))
        self.run_next_after()
        self.run_next()
        self.run_next()
        self.sent.pop()[1].errback(RegistryUnavailableError("away"))
        self.successResultOf(claims[0])
        for claim in claims[1:]:
            self.failureResultOf(claim, RegistryUnavailableError)
        self.failureResultOf(release, RegistryUnavailableError)
        self.run_all(0.1)
        self.assertEqual(self.ids_written(), ["x", "r"])
        self.assertEqual(self.revoked, [])

    def test_closing_tries_refused_releases_once_more(self) -> None:
        for self.bad in ({"x"}, set()):
            self.batcher = self.make_batcher()
            bad, self.bad = self.bad, {"x"}
            self.failureResultOf(self.release("x"), RegistryRefusedError)
            self.bad, self.written = bad, []
            closed = self.batcher.close()
            self.run_all(0)
            self.successResultOf(closed)
            self.assertEqual(self.ids_written(), [] if bad else ["x"])
            self.assertEqual((len(self.batcher), self.clock.getDelayedCalls()), (0, []))

    def test_retries_of_refused_releases_wait_for_a_database_that_is_away(self) -> None:
        self.bad = {"x"}
        self.failureResultOf(self.release("x"), RegistryRefusedError)
        self.clock.advance(1)
        make_work, deferred = self.sent.pop()
        make_work()
        deferred.errback(RegistryUnavailableError("away"))
        self.assertEqual(len(self.batcher), 1)
        self.bad = set()
        self.run_all(2)
        self.assertEqual((self.ids_written(), len(self.batcher)), (["x"], 0))

    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(st.tuples(st.booleans(), st.integers(0, 30)), min_size=1, max_size=60),
        st.sets(st.integers(0, 30), max_size=4),
        st.integers(1, 60),
    )
    def test_what_can_be_written_is_written_once_in_order(
        self, requests: list[tuple[bool, int]], bad: set[int], max_size: int
    ) -> None:
        self.setUp()
        self.bad, self.max_size = {f"c{number}" for number in bad}, max_size
        made: list[tuple[str, Deferred[Any]]] = []
        for index, (is_claim, number) in enumerate(requests):
            client_id = f"c{number}"
            made.append(
                (
                    client_id,
                    self.batcher.request(client_id, "h")
                    if is_claim
                    else self.batcher.release(SessionKey(client_id, index)),
                )
            )
        self.run_all()
        for client_id, deferred in made:
            if client_id in self.bad:
                self.failureResultOf(deferred, RegistryRefusedError)
            else:
                self.successResultOf(deferred)
        self.assertEqual(self.ids_written(), [client_id for client_id, _ in made if client_id not in self.bad])


class LookupBatcherTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.sent: list[tuple[Any, Deferred[Any]]] = []
        self.queries: list[list[str]] = []
        self.lookups = LookupBatcher(self.submit, self.find)

    def submit(self, make: Any) -> Deferred[Any]:
        self.sent.append((make, Deferred()))
        return self.sent[-1][1]

    def find(self, connection: Any, client_ids: list[str]) -> dict[str, Any]:
        self.queries.append(client_ids)
        return {client_id: f"where {client_id} is" for client_id in client_ids if client_id != "nobody"}

    def run_sent(self) -> None:
        make, deferred = self.sent.pop()
        deferred.callback(make()(None))

    def test_queued_lookups_are_sent_as_one_statement(self) -> None:
        found = [self.lookups.find(client_id) for client_id in ("x", "y", "x", "nobody")]
        self.assertEqual(len(self.sent), 1)
        self.run_sent()
        self.assertEqual(self.queries, [["x", "y", "nobody"]])
        self.assertEqual(
            [self.successResultOf(each) for each in found], ["where x is", "where y is", "where x is", None]
        )
        self.assertEqual(self.sent, [])

    def test_one_statement_is_bounded(self) -> None:
        found = [self.lookups.find(f"c{i}") for i in range(MAX_LOOKUP_BATCH_SIZE + 1)]
        self.run_sent()
        self.assertNoResult(found[-1])
        self.run_sent()
        self.assertEqual([len(client_ids) for client_ids in self.queries], [MAX_LOOKUP_BATCH_SIZE, 1])
        self.successResultOf(found[-1])

    def test_cancelling_affects_one_lookup_only(self) -> None:
        first, second = self.lookups.find("x"), self.lookups.find("x")
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.run_sent()
        self.successResultOf(second)

    def test_a_failure_fails_all_queued_lookups(self) -> None:
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

    def run_all(self, bad: set[str], max_size: int = 1000) -> None:
        while self.sent:
            make, deferred = self.sent.pop()
            work = make()
            found = work(None)
            if len(self.queries[-1]) > max_size or bad & set(self.queries[-1]):
                deferred.errback(RegistryRefusedError("too large"))
            else:
                deferred.callback(found)

    def test_one_lookup_that_is_refused_fails_alone(self) -> None:
        found = [self.lookups.find(f"c{number}") for number in range(MAX_LOOKUP_BATCH_SIZE + 5)]
        again = self.lookups.find("c77")
        self.run_all({"c77"})
        for lookup in (found.pop(77), again):
            self.failureResultOf(lookup, RegistryRefusedError)
        self.assertLessEqual(len(self.queries), 2 * 8 + 1 + 1)
        for lookup in found:
            self.successResultOf(lookup)
        later = self.lookups.find("c77")
        self.run_all(set())
        self.successResultOf(later)

    def test_a_limit_of_the_database_is_kept(self) -> None:
        found = [self.lookups.find(f"c{number}") for number in range(MAX_LOOKUP_BATCH_SIZE)]
        self.run_all(set(), 60)
        found += [self.lookups.find(f"c{number}") for number in range(100)]
        self.run_all(set(), 60)
        for lookup in found:
            self.successResultOf(lookup)
        self.assertEqual([len(ids) for ids in self.queries], [200, 100, 50, 50, 100, 50, 50, 50, 50])

    def test_a_database_that_refuses_every_lookup(self) -> None:
        found = [self.lookups.find(f"c{number}") for number in range(MAX_LOOKUP_BATCH_SIZE + 1)]
        self.run_all(set(), 0)
        for lookup in found:
            self.failureResultOf(lookup, RegistryUnavailableError)
        later = self.lookups.find("x")
        self.run_all(set())
        self.successResultOf(later)

    def test_a_failure_between_the_parts(self) -> None:
        found = [self.lookups.find(client_id) for client_id in "wxyz"]
        make, deferred = self.sent.pop()
        make()
        deferred.errback(RegistryRefusedError("too large"))
        self.run_sent()
        self.sent.pop()[1].errback(RegistryUnavailableError("away"))
        for lookup in found[:2]:
            self.successResultOf(lookup)
        for lookup in found[2:]:
            self.failureResultOf(lookup, RegistryUnavailableError)
