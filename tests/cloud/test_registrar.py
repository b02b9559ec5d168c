from __future__ import annotations

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud.errors import NameServiceError
from gateway.cloud.registrar import (
    CHECK_INTERVAL,
    CLEANER_STAGGER,
    CLEANUP_DELAY,
    MAX_DEAD_NODES,
    DnsRegistrar,
    RetryingTask,
)
from gateway.metrics import Metrics
from tests.fakes.name_service import FakeNameService

LEASE = 10.0


class DnsRegistrarTestCase(SynchronousTestCase):
    """The registrar of node ``b``, in a fleet with ``others``."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.name_service = FakeNameService()
        self.others: list[str] = []
        self.refreshes: list[Deferred[list[str] | None]] = []
        self.is_stable = True
        self.held_refresh: Deferred[list[str] | None] | None = None
        self.address: Deferred[str] = succeed("192.0.2.2")
        self.registrar = self.make("b")

    def make(self, node_id: str) -> DnsRegistrar:
        return DnsRegistrar(
            self.name_service,
            node_id,
            self.clock,
            name="gw.example.com",
            address=lambda: self.address,
            live_nodes=lambda: [node_id, *self.others],
            refresh_live_nodes=lambda: (
                self.held_refresh or succeed([node_id, *self.others] if self.is_stable else None)
            ),
            lease=LEASE,
            metrics=self.metrics,
            uniform=lambda low, high: high,
        )

    def pass_time(self, seconds: float) -> None:
        self.clock.pump([0.5] * int(2 * seconds))

    def requests(self, *kinds: str) -> list[tuple[str, ...]]:
        """Return the requests since the last call."""
        requests = [request for request in self.name_service.requests if not kinds or request[0] in kinds]
        self.name_service.requests.clear()
        return requests

    def start(self) -> None:
        self.registrar.start()
        self.pass_time(1)
        self.assertEqual(self.requests(), [("announce", "b", "192.0.2.2")])


class OwnRecordTests(DnsRegistrarTestCase):
    def test_announce_and_withdraw(self) -> None:
        self.assertFalse(self.registrar.announced())
        self.registrar.start()
        self.assertEqual(self.name_service.requests, [])
        self.clock.advance(0)
        self.assertTrue(self.registrar.announced())
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})
        withdrawn = self.registrar.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertFalse(self.registrar.announced())
        self.assertEqual(self.name_service.records, {})
        self.requests()
        self.successResultOf(self.registrar.withdraw())
        self.assertEqual(self.requests(), [])

    def test_withdraw_before_announce(self) -> None:
        self.successResultOf(self.registrar.withdraw())
        self.registrar.start()
        self.successResultOf(self.registrar.withdraw())
        self.pass_time(5)
        self.assertEqual(self.requests(), [])

    def test_withdraw_during_announce(self) -> None:
        self.name_service.holding = True
        self.registrar.start()
        self.clock.advance(0)
        withdrawn = self.registrar.withdraw()
        self.pass_time(5)
        self.assertEqual(self.requests(), [("announce", "b", "192.0.2.2")])
        self.name_service.answer()
        self.assertEqual(self.requests(), [("withdraw", "b")])
        self.assertNoResult(withdrawn)
        self.name_service.answer()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertEqual(self.name_service.records, {})

    def test_withdraw_after_failed_announce(self) -> None:
        self.name_service.holding = True
        self.registrar.start()
        self.clock.advance(0)
        self.name_service.error = NameServiceError("timed out")
        self.name_service.answer()
        self.name_service.holding, self.name_service.error = False, None
        # The announcement was executed although it failed.
        self.name_service.records["b"] = "192.0.2.2"
        withdrawn = self.registrar.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertEqual(self.name_service.records, {})

    def test_withdraw_during_address_lookup(self) -> None:
        self.address = looking = Deferred()
        self.registrar.start()
        self.clock.advance(0)
        self.successResultOf(self.registrar.withdraw())
        looking.callback("192.0.2.2")
        self.pass_time(5)
        self.assertEqual(self.requests("announce", "withdraw"), [])

    def test_failed_withdraw_fires_and_is_retried(self) -> None:
        self.start()
        self.name_service.error = NameServiceError("away")
        withdrawn = self.registrar.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertFalse(self.registrar.announced())
        self.pass_time(600)
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})
        self.name_service.error = None
        self.pass_time(61)
        self.assertEqual(self.name_service.records, {})

    def test_withdraw_ignores_backoff(self) -> None:
        self.name_service.error = NameServiceError("slowly", throttled=True)
        self.registrar.start()
        self.pass_time(60)
        self.requests()
        self.name_service.error = None
        withdrawn = self.registrar.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertEqual(self.requests(), [("withdraw", "b")])

    def test_outage_of_minutes_is_retried(self) -> None:
        self.name_service.error = NameServiceError("away")
        with capturedLogs() as logs:
            self.registrar.start()
            self.pass_time(600)
            self.assertFalse(self.registrar.announced())
            self.name_service.error = None
            self.pass_time(61)
        self.assertTrue(self.registrar.announced())
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})
        # Both tasks fail and recover: two lines each; and the node is announced.
        self.assertEqual(len(logs), 5)

    def test_address_lookup_is_retried(self) -> None:
        self.address = fail(NameServiceError("gw1.example.com has no address"))
        self.registrar.start()
        self.pass_time(1)
        self.assertEqual((self.metrics.dns_failures, self.requests()), (1, []))
        self.address = succeed("192.0.2.9")
        self.pass_time(61)
        self.assertEqual(self.requests("announce"), [("announce", "b", "192.0.2.9")])

    def test_reannounce(self) -> None:
        self.start()
        self.name_service.records.clear()
        self.registrar.reannounce()
        self.clock.advance(0)
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_reannounce_during_announce(self) -> None:
        self.name_service.holding = True
        self.registrar.start()
        self.clock.advance(0)
        self.registrar.reannounce()
        # Other nodes withdrew it after its execution, before the response.
        self.name_service.answer()
        self.name_service.records.clear()
        self.name_service.answer()
        self.assertTrue(self.registrar.announced())
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_reannounce_after_withdraw_does_nothing(self) -> None:
        self.start()
        self.registrar.withdraw()
        self.registrar.reannounce()
        self.pass_time(30)
        self.assertEqual(self.name_service.records, {})

    def test_stop(self) -> None:
        self.start()
        self.name_service.holding = True
        self.registrar.reannounce()
        self.registrar.node_down("a")
        self.clock.advance(0)
        stopped = self.registrar.stop()
        self.assertNoResult(stopped)
        self.assertFalse(self.name_service.closed)
        self.name_service.answer()
        self.successResultOf(stopped)
        self.assertTrue(self.name_service.closed)
        self.registrar.reannounce()
        self.registrar.node_down("c")
        self.pass_time(3 * CHECK_INTERVAL)
        self.assertEqual(self.requests("withdraw", "announced"), [])


class DeadNodesTests(DnsRegistrarTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.start()

    def test_deaths_within_cleanup_delay_are_one_request(self) -> None:
        gone = [f"c{number:02}" for number in range(50)]
        self.name_service.records.update(dict.fromkeys(gone, "192.0.2.3"))
        for node_id in gone[:25]:
            self.registrar.node_down(node_id)
        self.clock.advance(CLEANUP_DELAY / 2)
        for node_id in gone[25:]:
            self.registrar.node_down(node_id)
        self.clock.advance(CLEANUP_DELAY / 2)
        self.assertEqual(self.requests(), [("withdraw", *gone)])
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_second_cleaner_waits_longer(self) -> None:
        self.others = ["a", "c"]
        self.registrar.node_down("d")
        self.pass_time(CLEANER_STAGGER - 1)
        self.assertEqual(self.requests("withdraw"), [])
        self.pass_time(3)
        self.assertEqual(self.requests("withdraw"), [("withdraw", "d")])

    def test_other_nodes_remove_nothing(self) -> None:
        self.others = ["a", "aa"]
        self.registrar.node_down("d")
        self.pass_time(4 * CLEANER_STAGGER)
        self.assertEqual(self.requests("withdraw"), [])

    def test_cleaners_that_die_are_replaced(self) -> None:
        """Deaths at the same time are noticed one by one, as each lease expires."""
        self.others = ["0", "1", "c"]
        self.registrar.node_down("d")
        self.pass_time(2)
        self.assertEqual(self.requests("withdraw"), [])
        self.others = ["c"]
        self.registrar.node_down("0")
        self.registrar.node_down("1")
        self.pass_time(CLEANUP_DELAY)
        self.assertEqual(self.requests("withdraw"), [("withdraw", "0", "1", "d")])
        self.assertEqual(self.registrar._dead_since, {})

    def test_dead_nodes_are_forgotten_after_removal_by_others(self) -> None:
        self.others = ["0", "1"]
        self.registrar.node_down("d")
        self.pass_time(CHECK_INTERVAL + 1)
        self.assertEqual((self.requests("withdraw"), self.registrar._dead_since), ([], {}))

    def test_revived_node_keeps_its_record(self) -> None:
        self.name_service.error = NameServiceError("away")
        self.registrar.node_down("c")
        self.registrar.node_down("d")
        self.pass_time(100)
        self.others = ["c"]
        self.name_service.error = None
        self.requests()
        self.pass_time(61)
        self.assertEqual(self.requests("withdraw"), [("withdraw", "d")])

    def test_removal_is_retried_after_outage(self) -> None:
        self.name_service.records["c"] = "192.0.2.3"
        self.name_service.error = NameServiceError("away")
        self.registrar.node_down("c")
        self.pass_time(600)
        self.name_service.error = None
        self.pass_time(61)
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_dead_nodes_are_limited(self) -> None:
        for number in range(MAX_DEAD_NODES + 5):
            self.registrar.node_down(f"c{number}")
        self.pass_time(2)
        self.assertEqual(len(self.requests("withdraw")[0]) - 1, MAX_DEAD_NODES)

    def test_own_withdraw_does_not_wait_for_removal(self) -> None:
        self.name_service.holding = True
        self.registrar.node_down("c")
        self.pass_time(2)
        withdrawn = self.registrar.withdraw()
        self.clock.advance(0)
        self.assertEqual(self.requests(), [("withdraw", "c"), ("withdraw", "b")])
        self.name_service.held.pop(0)
        self.name_service.answer()
        self.clock.advance(0)
        self.successResultOf(withdrawn)


class CheckTests(DnsRegistrarTestCase):
    """The check of the records: within two leases of the start, then periodically."""

    def setUp(self) -> None:
        super().setUp()
        self.start()
        self.name_service.records["dead"] = "192.0.2.3"

    def test_unseen_death_is_found_by_check(self) -> None:
        self.others = ["c"]
        self.name_service.records["c"] = "192.0.2.4"
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests(), [("announced",), ("withdraw", "dead")])
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2", "c": "192.0.2.4"})
        self.name_service.records["dead"] = "192.0.2.3"
        self.pass_time(CHECK_INTERVAL * 1.25 + 1)
        self.assertEqual(self.requests(), [("announced",), ("withdraw", "dead")])
        self.pass_time(CHECK_INTERVAL * 1.25 + 1)
        self.assertEqual(self.requests(), [("announced",)])

    def test_node_that_joins_during_check_keeps_its_record(self) -> None:
        self.held_refresh = Deferred()
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests(), [("announced",)])
        # The announced nodes are known; a node joins before it announces itself, and the live nodes are read afterwards.
        self.name_service.records["new"] = "192.0.2.5"
        self.held_refresh.callback(["b"])
        self.assertEqual(self.requests(), [("withdraw", "dead")])
        self.assertIn("new", self.name_service.records)

    def test_unstable_node_removes_nothing(self) -> None:
        self.is_stable = False
        del self.name_service.records["b"]
        self.pass_time(CHECK_INTERVAL)
        self.assertEqual(set(self.requests()), {("announced",)})
        self.assertIn("dead", self.name_service.records)
        self.is_stable = True
        self.pass_time(2 * LEASE + 1)
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_node_that_is_not_live_leaves_its_own_record(self) -> None:
        self.held_refresh = succeed(["c"])
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests(), [("announced",), ("withdraw", "dead")])
        del self.name_service.records["b"]
        self.pass_time(CHECK_INTERVAL * 1.25 + 1)
        self.assertEqual(self.requests(), [("announced",)])

    def test_only_cleaners_withdraw_but_each_node_checks_its_own_record(self) -> None:
        self.others = ["a", "aa"]
        del self.name_service.records["b"]
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests(), [("announced",), ("announce", "b", "192.0.2.2")])
        self.assertIn("dead", self.name_service.records)

    def test_other_nodes_check_later(self) -> None:
        self.others = ["a", "aa"]
        self.registrar.reannounce()
        self.pass_time(2 * LEASE)
        self.requests()
        self.registrar.reannounce()
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests("announced"), [])
        self.pass_time(CHECK_INTERVAL / 2)
        self.assertEqual(self.requests("announced"), [("announced",)])

    def test_check_is_taken_over_from_dead_cleaners(self) -> None:
        """The new first node checks as soon as the dead cleaners would have."""
        self.others = ["0", "1"]
        self.registrar.reannounce()
        self.pass_time(2 * LEASE)
        self.registrar._next_check_at = self.clock.seconds() + CHECK_INTERVAL
        self.requests()
        self.others = []
        self.registrar.node_down("0")
        self.registrar.node_down("1")
        self.pass_time(2 * LEASE + 1)
        self.assertIn(("withdraw", "dead"), self.requests())

    def test_missing_or_wrong_record_is_announced_again(self) -> None:
        for records in ({}, {"b": ""}, {"b": "192.0.2.77"}):
            self.name_service.records = records
            self.pass_time(CHECK_INTERVAL * 1.25 + 1)
            self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_record_announced_during_check_is_not_missing(self) -> None:
        self.name_service.records = {}
        self.registrar.reannounce()
        self.name_service.holding = True
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests(), [("announce", "b", "192.0.2.2"), ("announced",)])
        self.name_service.answer()
        self.name_service.held = [(self.name_service.held[0][0], dict)]
        self.name_service.answer()
        self.pass_time(5)
        self.assertEqual(self.requests(), [])

    def test_withdrawn_node_is_not_announced_again(self) -> None:
        self.name_service.holding = True
        self.pass_time(2 * LEASE)
        withdrawn = self.registrar.withdraw()
        self.clock.advance(0)
        announced, withdraw = self.name_service.held
        self.name_service.held = [withdraw]
        self.name_service.answer()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.name_service.holding = False
        self.requests()
        self.name_service.held = [announced]
        self.name_service.answer()
        self.pass_time(5)
        self.assertEqual(self.requests("announce", "withdraw"), [("withdraw", "dead")])
        self.assertEqual(self.name_service.records, {})

    def test_check_soon_after_reannounce(self) -> None:
        self.pass_time(2 * LEASE)
        self.requests()
        self.registrar.reannounce()
        self.clock.advance(0)
        # A late withdrawal by another node.
        del self.name_service.records["b"]
        self.pass_time(2 * LEASE)
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})


class RetryingTaskTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.done: list[float] = []
        self.problem: Exception | None = None
        self.holding: Deferred[None] | None = None
        self.task = RetryingTask("the work", self.work, self.clock, self.metrics, lambda low, high: high)

    async def work(self) -> None:
        self.done.append(self.clock.seconds())
        if self.holding is not None:
            await self.holding
        if self.problem:
            raise self.problem

    def times(self, seconds: int) -> list[float]:
        """Advance the clock second by second; return the times of the runs, from now."""
        began, self.done[:] = self.clock.seconds(), []
        self.clock.pump([0.5] * (2 * seconds))
        return [at - began for at in self.done]

    def test_run_within(self) -> None:
        self.task.run_within(5)
        self.task.run_within(2)
        self.task.run_within(9)
        self.assertEqual(self.times(20), [2])

    def test_backoff_grows_to_a_minute_and_resets(self) -> None:
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(310)[:8], [0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 63.5, 123.5])
        self.problem = None
        self.assertEqual(len(self.times(60)), 1)
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(4), [0.5, 1.5, 3.5])

    def test_backoff_has_jitter(self) -> None:
        ranges: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            ranges.append((low, high))
            return low

        self.task = RetryingTask("the work", self.work, self.clock, self.metrics, uniform)
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(3), [0.5, 1.0, 2.0])
        self.assertEqual(set(ranges), {(0.5, 1.0)})

    def test_longer_backoff_when_throttled(self) -> None:
        self.problem = NameServiceError("slowly", throttled=True)
        self.task.run_within(0)
        self.assertEqual(self.times(700)[:8], [0.5, 4.5, 12.5, 28.5, 60.5, 124.5, 252.5, 508.5])

    def test_maximum_backoff_for_permanent_errors(self) -> None:
        self.problem = NameServiceError("no rights", permanent=True)
        self.task.run_within(0)
        self.assertEqual(self.times(130), [0.5, 60.5, 120.5])

    def test_run_within_waits_for_backoff(self) -> None:
        self.problem = NameServiceError("away", permanent=True)
        self.task.run_within(0)
        self.times(1)
        self.task.run_within(0)
        self.assertEqual(self.times(70), [59.5])

    def test_run_now_ignores_backoff(self) -> None:
        self.problem = NameServiceError("away", permanent=True)
        self.task.run_within(0)
        self.times(1)
        waiter = self.task.run_now()
        self.assertNoResult(waiter)
        self.assertEqual(self.times(1), [0.5])
        self.successResultOf(waiter)
        # Retries continue.
        self.assertEqual(self.times(60), [59.5])

    def test_run_now_during_a_run_waits_for_the_next_run(self) -> None:
        self.holding = first = Deferred()
        self.task.run_within(0)
        self.times(1)
        waiter = self.task.run_now()
        self.assertEqual(self.times(1), [])
        self.holding = second = Deferred()
        self.problem = NameServiceError("away")
        first.callback(None)
        self.assertEqual(self.times(1), [0.5])
        self.assertNoResult(waiter)
        self.problem = None
        second.callback(None)
        self.successResultOf(waiter)

    def test_run_now_can_be_cancelled(self) -> None:
        self.holding = Deferred()
        waiter = self.task.run_now().addTimeout(5, self.clock)
        self.times(6)
        self.failureResultOf(waiter)
        self.holding.callback(None)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_cancelled_run_now_is_served_at_once_all_the_same(self) -> None:
        self.holding = first = Deferred()
        self.task.run_within(0)
        self.times(1)
        waiter = self.task.run_now()
        waiter.cancel()
        self.failureResultOf(waiter)
        self.holding = None
        self.problem = NameServiceError("away", permanent=True)
        first.callback(None)
        self.assertEqual(self.times(1), [0.5])

    def test_stop_waits_for_current_run_and_starts_no_other(self) -> None:
        self.holding = Deferred()
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.times(1)
        waiter, stopped = self.task.run_now(), self.task.stop()
        self.assertNoResult(stopped)
        self.holding.callback(None)
        self.successResultOf(stopped)
        self.successResultOf(waiter)
        self.task.run_within(0)
        self.successResultOf(self.task.run_now())
        self.assertEqual(self.times(100), [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_during_backoff(self) -> None:
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.times(1)
        self.successResultOf(self.task.stop())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_failure_is_logged_when_the_problem_changes(self) -> None:
        with capturedLogs() as logs:
            self.problem = NameServiceError("away")
            self.task.run_within(0)
            self.times(100)
            self.problem = NameServiceError("no rights", permanent=True)
            self.times(200)
            self.problem = None
            self.times(100)
            self.task.run_within(0)
            self.times(1)
        lines = [(event["log_level"], event.get("problem", event["log_format"])) for event in logs]
        self.assertEqual(
            lines,
            [
                (LogLevel.warn, "away"),
                (LogLevel.error, "no rights"),
                (LogLevel.info, "{what} works again, after {outage:.0f} s"),
            ],
        )
        self.assertGreater(self.metrics.dns_failures, 8)
        self.assertIn(b"wsgateway_dns_failures_total", self.metrics.text())

    def test_unexpected_error_is_logged_once_and_retried(self) -> None:
        self.problem = ZeroDivisionError("oops")
        self.task.run_within(0)
        self.assertEqual(self.times(4), [0.5, 1.5, 3.5])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
