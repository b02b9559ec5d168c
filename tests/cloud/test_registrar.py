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
    """Node ``b``; ``others`` live beside it."""

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
        """What was asked since the last time."""
        asked = [request for request in self.name_service.requests if not kinds or request[0] in kinds]
        self.name_service.requests.clear()
        return asked

    def start(self) -> None:
        self.registrar.start()
        self.pass_time(1)
        self.assertEqual(self.requests(), [("announce", "b", "192.0.2.2")])


class OwnRecordTests(DnsRegistrarTestCase):
    def test_announced_and_withdrawn(self) -> None:
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

    def test_withdrawn_before_it_was_announced(self) -> None:
        self.successResultOf(self.registrar.withdraw())
        self.registrar.start()
        self.successResultOf(self.registrar.withdraw())
        self.pass_time(5)
        self.assertEqual(self.requests(), [])

    def test_withdrawn_while_it_is_being_announced(self) -> None:
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

    def test_withdrawn_after_an_announcement_of_which_nothing_is_known(self) -> None:
        self.name_service.holding = True
        self.registrar.start()
        self.clock.advance(0)
        self.name_service.error = NameServiceError("timed out")
        self.name_service.answer()
        self.name_service.holding, self.name_service.error = False, None
        # It was carried out all the same.
        self.name_service.records["b"] = "192.0.2.2"
        withdrawn = self.registrar.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertEqual(self.name_service.records, {})

    def test_withdrawn_while_its_address_is_looked_up(self) -> None:
        self.address = looking = Deferred()
        self.registrar.start()
        self.clock.advance(0)
        self.successResultOf(self.registrar.withdraw())
        looking.callback("192.0.2.2")
        self.pass_time(5)
        self.assertEqual(self.requests("announce", "withdraw"), [])

    def test_the_wait_for_a_withdrawal_ends_when_it_fails_but_not_the_trying(self) -> None:
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

    def test_a_withdrawal_does_not_wait_for_a_pause(self) -> None:
        self.name_service.error = NameServiceError("slowly", throttled=True)
        self.registrar.start()
        self.pass_time(60)
        self.requests()
        self.name_service.error = None
        withdrawn = self.registrar.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertEqual(self.requests(), [("withdraw", "b")])

    def test_dns_is_away_for_minutes(self) -> None:
        self.name_service.error = NameServiceError("away")
        with capturedLogs() as logs:
            self.registrar.start()
            self.pass_time(600)
            self.assertFalse(self.registrar.announced())
            self.name_service.error = None
            self.pass_time(61)
        self.assertTrue(self.registrar.announced())
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})
        # Its own record, and those of others: each begins to fail, and works again; and it is announced.
        self.assertEqual(len(logs), 5)

    def test_an_address_that_is_not_known_at_first(self) -> None:
        self.address = fail(NameServiceError("gw1.example.com has no address"))
        self.registrar.start()
        self.pass_time(1)
        self.assertEqual((self.metrics.dns_failures, self.requests()), (1, []))
        self.address = succeed("192.0.2.9")
        self.pass_time(61)
        self.assertEqual(self.requests("announce"), [("announce", "b", "192.0.2.9")])

    def test_announced_again(self) -> None:
        self.start()
        self.name_service.records.clear()
        self.registrar.reannounce()
        self.clock.advance(0)
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_announced_again_after_what_was_under_way(self) -> None:
        self.name_service.holding = True
        self.registrar.start()
        self.clock.advance(0)
        self.registrar.reannounce()
        # The others withdrew it after it was carried out, and before the answer came.
        self.name_service.answer()
        self.name_service.records.clear()
        self.name_service.answer()
        self.assertTrue(self.registrar.announced())
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_not_announced_again_when_it_was_withdrawn(self) -> None:
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

    def test_many_that_go_within_a_moment_are_one_request(self) -> None:
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

    def test_the_next_does_it_later(self) -> None:
        self.others = ["a", "c"]
        self.registrar.node_down("d")
        self.pass_time(CLEANER_STAGGER - 1)
        self.assertEqual(self.requests("withdraw"), [])
        self.pass_time(3)
        self.assertEqual(self.requests("withdraw"), [("withdraw", "d")])

    def test_whoever_comes_after_these_leaves_it_to_them(self) -> None:
        self.others = ["a", "aa"]
        self.registrar.node_down("d")
        self.pass_time(4 * CLEANER_STAGGER)
        self.assertEqual(self.requests("withdraw"), [])

    def test_those_who_would_do_it_go_next(self) -> None:
        """Of several that die together each is seen to be gone when its own lease is over."""
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

    def test_what_others_have_done_is_forgotten(self) -> None:
        self.others = ["0", "1"]
        self.registrar.node_down("d")
        self.pass_time(CHECK_INTERVAL + 1)
        self.assertEqual((self.requests("withdraw"), self.registrar._dead_since), ([], {}))

    def test_who_is_back_meanwhile_stays(self) -> None:
        self.name_service.error = NameServiceError("away")
        self.registrar.node_down("c")
        self.registrar.node_down("d")
        self.pass_time(100)
        self.others = ["c"]
        self.name_service.error = None
        self.requests()
        self.pass_time(61)
        self.assertEqual(self.requests("withdraw"), [("withdraw", "d")])

    def test_away_for_minutes(self) -> None:
        self.name_service.records["c"] = "192.0.2.3"
        self.name_service.error = NameServiceError("away")
        self.registrar.node_down("c")
        self.pass_time(600)
        self.name_service.error = None
        self.pass_time(61)
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_no_more_are_kept_than_can_be(self) -> None:
        for number in range(MAX_DEAD_NODES + 5):
            self.registrar.node_down(f"c{number}")
        self.pass_time(2)
        self.assertEqual(len(self.requests("withdraw")[0]) - 1, MAX_DEAD_NODES)

    def test_its_own_withdrawal_does_not_wait_for_that(self) -> None:
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
    """A look at who is announced, two leases after the start, and then every now and then."""

    def setUp(self) -> None:
        super().setUp()
        self.start()
        self.name_service.records["dead"] = "192.0.2.3"

    def test_whom_nobody_saw_die(self) -> None:
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

    def test_one_that_joins_and_is_announced_at_that_moment(self) -> None:
        self.held_refresh = Deferred()
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests(), [("announced",)])
        # What was announced is known by now; who joined before is among the live nodes that are read after.
        self.name_service.records["new"] = "192.0.2.5"
        self.held_refresh.callback(["b"])
        self.assertEqual(self.requests(), [("withdraw", "dead")])
        self.assertIn("new", self.name_service.records)

    def test_a_node_that_is_not_steady_withdraws_nobody(self) -> None:
        self.is_stable = False
        del self.name_service.records["b"]
        self.pass_time(CHECK_INTERVAL)
        self.assertEqual(set(self.requests()), {("announced",)})
        self.assertIn("dead", self.name_service.records)
        self.is_stable = True
        self.pass_time(2 * LEASE + 1)
        self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_a_node_that_is_not_live_itself_is_neither_announced_nor_withdrawn_by_itself(self) -> None:
        self.held_refresh = succeed(["c"])
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests(), [("announced",), ("withdraw", "dead")])
        del self.name_service.records["b"]
        self.pass_time(CHECK_INTERVAL * 1.25 + 1)
        self.assertEqual(self.requests(), [("announced",)])

    def test_only_the_first_two_withdraw_but_each_sees_to_its_own(self) -> None:
        self.others = ["a", "aa"]
        del self.name_service.records["b"]
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests(), [("announced",), ("announce", "b", "192.0.2.2")])
        self.assertIn("dead", self.name_service.records)

    def test_those_that_withdraw_nobody_look_later(self) -> None:
        self.others = ["a", "aa"]
        self.registrar.reannounce()
        self.pass_time(2 * LEASE)
        self.requests()
        self.registrar.reannounce()
        self.pass_time(2 * LEASE)
        self.assertEqual(self.requests("announced"), [])
        self.pass_time(CHECK_INTERVAL / 2)
        self.assertEqual(self.requests("announced"), [("announced",)])

    def test_those_that_would_have_looked_are_gone(self) -> None:
        """Whoever is the first now looks as soon as they would have."""
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

    def test_its_own_record_is_gone_or_another(self) -> None:
        for there in ({}, {"b": ""}, {"b": "192.0.2.77"}):
            self.name_service.records = there
            self.pass_time(CHECK_INTERVAL * 1.25 + 1)
            self.assertEqual(self.name_service.records, {"b": "192.0.2.2"})

    def test_a_record_that_came_after_the_question_is_not_missed(self) -> None:
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

    def test_a_node_that_is_withdrawn_is_not_missed(self) -> None:
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

    def test_after_a_lease_that_had_run_out_it_looks_soon(self) -> None:
        self.pass_time(2 * LEASE)
        self.requests()
        self.registrar.reannounce()
        self.clock.advance(0)
        # A withdrawal of another node's, which was late.
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
        """When it was done within so many seconds, from now."""
        began, self.done[:] = self.clock.seconds(), []
        self.clock.pump([0.5] * (2 * seconds))
        return [at - began for at in self.done]

    def test_when_it_is_due(self) -> None:
        self.task.run_within(5)
        self.task.run_within(2)
        self.task.run_within(9)
        self.assertEqual(self.times(20), [2])

    def test_the_pauses_grow_to_a_minute_and_begin_anew(self) -> None:
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(310)[:8], [0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 63.5, 123.5])
        self.problem = None
        self.assertEqual(len(self.times(60)), 1)
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(4), [0.5, 1.5, 3.5])

    def test_the_pauses_are_spread(self) -> None:
        asked: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            asked.append((low, high))
            return low

        self.task = RetryingTask("the work", self.work, self.clock, self.metrics, uniform)
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.assertEqual(self.times(3), [0.5, 1.0, 2.0])
        self.assertEqual(set(asked), {(0.5, 1.0)})

    def test_longer_pauses_where_it_is_throttled(self) -> None:
        self.problem = NameServiceError("slowly", throttled=True)
        self.task.run_within(0)
        self.assertEqual(self.times(700)[:8], [0.5, 4.5, 12.5, 28.5, 60.5, 124.5, 252.5, 508.5])

    def test_long_pauses_from_the_first_where_it_is_hopeless(self) -> None:
        self.problem = NameServiceError("no rights", permanent=True)
        self.task.run_within(0)
        self.assertEqual(self.times(130), [0.5, 60.5, 120.5])

    def test_a_pause_holds_what_is_due_meanwhile(self) -> None:
        self.problem = NameServiceError("away", permanent=True)
        self.task.run_within(0)
        self.times(1)
        self.task.run_within(0)
        self.assertEqual(self.times(70), [59.5])

    def test_now_is_in_spite_of_a_pause(self) -> None:
        self.problem = NameServiceError("away", permanent=True)
        self.task.run_within(0)
        self.times(1)
        waiter = self.task.run_now()
        self.assertNoResult(waiter)
        self.assertEqual(self.times(1), [0.5])
        self.successResultOf(waiter)
        # And it goes on being tried.
        self.assertEqual(self.times(60), [59.5])

    def test_now_waits_for_what_is_under_way_and_then_for_its_own(self) -> None:
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

    def test_who_waits_may_give_up(self) -> None:
        self.holding = Deferred()
        waiter = self.task.run_now().addTimeout(5, self.clock)
        self.times(6)
        self.failureResultOf(waiter)
        self.holding.callback(None)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_stop_waits_for_what_is_under_way_and_begins_nothing(self) -> None:
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

    def test_stop_in_a_pause(self) -> None:
        self.problem = NameServiceError("away")
        self.task.run_within(0)
        self.times(1)
        self.successResultOf(self.task.stop())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_failure_is_told_once_and_anew_when_it_is_another(self) -> None:
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
        told = [(event["log_level"], event.get("problem", event["log_format"])) for event in logs]
        self.assertEqual(
            told,
            [
                (LogLevel.warn, "away"),
                (LogLevel.error, "no rights"),
                (LogLevel.info, "{what} works again, after {outage:.0f} s"),
            ],
        )
        self.assertGreater(self.metrics.dns_failures, 8)
        self.assertIn(b"wsgateway_dns_failures_total", self.metrics.text())

    def test_an_error_in_the_work_is_logged_once_and_it_goes_on(self) -> None:
        self.problem = ZeroDivisionError("oops")
        self.task.run_within(0)
        self.assertEqual(self.times(4), [0.5, 1.5, 3.5])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
