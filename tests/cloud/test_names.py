from __future__ import annotations

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud.registrar import CHECK, INSURANCE, MOMENT, MOST_GONE, Names, NameServiceError
from gateway.metrics import Metrics
from tests.cloud.zone import Zone

LEASE = 10.0


class NamesCase(SynchronousTestCase):
    """Node ``b``; ``others`` live beside it."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.zone = Zone()
        self.others: list[str] = []
        self.looks: list[Deferred[list[str] | None]] = []
        self.steady = True
        self.held_look: Deferred[list[str] | None] | None = None
        self.address: Deferred[str] = succeed("192.0.2.2")
        self.names = self.make("b")

    def make(self, node_id: str) -> Names:
        return Names(
            self.zone,
            node_id,
            self.clock,
            name="gw.example.com",
            address=lambda: self.address,
            live=lambda: [node_id, *self.others],
            look=lambda: self.held_look or succeed([node_id, *self.others] if self.steady else None),
            lease=LEASE,
            metrics=self.metrics,
            uniform=lambda low, high: high,
        )

    def pass_time(self, seconds: float) -> None:
        self.clock.pump([0.5] * int(2 * seconds))

    def asked(self, *kinds: str) -> list[tuple[str, ...]]:
        """What was asked since the last time."""
        asked = [request for request in self.zone.asked if not kinds or request[0] in kinds]
        self.zone.asked.clear()
        return asked

    def start(self) -> None:
        self.names.start()
        self.pass_time(1)
        self.assertEqual(self.asked(), [("announce", "b", "192.0.2.2")])


class OwnTests(NamesCase):
    def test_announced_and_withdrawn(self) -> None:
        self.assertFalse(self.names.announced())
        self.names.start()
        self.assertEqual(self.zone.asked, [])
        self.clock.advance(0)
        self.assertTrue(self.names.announced())
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})
        withdrawn = self.names.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertFalse(self.names.announced())
        self.assertEqual(self.zone.records, {})
        self.asked()
        self.successResultOf(self.names.withdraw())
        self.assertEqual(self.asked(), [])

    def test_withdrawn_before_it_was_announced(self) -> None:
        self.successResultOf(self.names.withdraw())
        self.names.start()
        self.successResultOf(self.names.withdraw())
        self.pass_time(5)
        self.assertEqual(self.asked(), [])

    def test_withdrawn_while_it_is_being_announced(self) -> None:
        self.zone.holding = True
        self.names.start()
        self.clock.advance(0)
        withdrawn = self.names.withdraw()
        self.pass_time(5)
        self.assertEqual(self.asked(), [("announce", "b", "192.0.2.2")])
        self.zone.answer()
        self.assertEqual(self.asked(), [("withdraw", "b")])
        self.assertNoResult(withdrawn)
        self.zone.answer()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertEqual(self.zone.records, {})

    def test_withdrawn_after_an_announcement_of_which_nothing_is_known(self) -> None:
        self.zone.holding = True
        self.names.start()
        self.clock.advance(0)
        self.zone.problem = NameServiceError("timed out")
        self.zone.answer()
        self.zone.holding, self.zone.problem = False, None
        # It was carried out all the same.
        self.zone.records["b"] = "192.0.2.2"
        withdrawn = self.names.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertEqual(self.zone.records, {})

    def test_withdrawn_while_its_address_is_looked_up(self) -> None:
        self.address = looking = Deferred()
        self.names.start()
        self.clock.advance(0)
        self.successResultOf(self.names.withdraw())
        looking.callback("192.0.2.2")
        self.pass_time(5)
        self.assertEqual(self.asked("announce", "withdraw"), [])

    def test_the_wait_for_a_withdrawal_ends_when_it_fails_but_not_the_trying(self) -> None:
        self.start()
        self.zone.problem = NameServiceError("away")
        withdrawn = self.names.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertFalse(self.names.announced())
        self.pass_time(600)
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})
        self.zone.problem = None
        self.pass_time(61)
        self.assertEqual(self.zone.records, {})

    def test_a_withdrawal_does_not_wait_for_a_pause(self) -> None:
        self.zone.problem = NameServiceError("slowly", throttled=True)
        self.names.start()
        self.pass_time(60)
        self.asked()
        self.zone.problem = None
        withdrawn = self.names.withdraw()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.assertEqual(self.asked(), [("withdraw", "b")])

    def test_dns_is_away_for_minutes(self) -> None:
        self.zone.problem = NameServiceError("away")
        with capturedLogs() as logs:
            self.names.start()
            self.pass_time(600)
            self.assertFalse(self.names.announced())
            self.zone.problem = None
            self.pass_time(61)
        self.assertTrue(self.names.announced())
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})
        # Its own record, and those of others: each begins to fail, and works again; and it is announced.
        self.assertEqual(len(logs), 5)

    def test_an_address_that_is_not_known_at_first(self) -> None:
        self.address = fail(NameServiceError("gw1.example.com has no address"))
        self.names.start()
        self.pass_time(1)
        self.assertEqual((self.metrics.dns_failures, self.asked()), (1, []))
        self.address = succeed("192.0.2.9")
        self.pass_time(61)
        self.assertEqual(self.asked("announce"), [("announce", "b", "192.0.2.9")])

    def test_announced_again(self) -> None:
        self.start()
        self.zone.records.clear()
        self.names.again()
        self.clock.advance(0)
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})

    def test_announced_again_after_what_was_under_way(self) -> None:
        self.zone.holding = True
        self.names.start()
        self.clock.advance(0)
        self.names.again()
        # The others withdrew it after it was carried out, and before the answer came.
        self.zone.answer()
        self.zone.records.clear()
        self.zone.answer()
        self.assertTrue(self.names.announced())
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})

    def test_not_announced_again_when_it_was_withdrawn(self) -> None:
        self.start()
        self.names.withdraw()
        self.names.again()
        self.pass_time(30)
        self.assertEqual(self.zone.records, {})

    def test_stop(self) -> None:
        self.start()
        self.zone.holding = True
        self.names.again()
        self.names.node_gone("a")
        self.clock.advance(0)
        stopped = self.names.stop()
        self.assertNoResult(stopped)
        self.assertFalse(self.zone.closed)
        self.zone.answer()
        self.successResultOf(stopped)
        self.assertTrue(self.zone.closed)
        self.names.again()
        self.names.node_gone("c")
        self.pass_time(3 * CHECK)
        self.assertEqual(self.asked("withdraw", "announced"), [])


class GoneTests(NamesCase):
    def setUp(self) -> None:
        super().setUp()
        self.start()

    def test_many_that_go_within_a_moment_are_one_request(self) -> None:
        gone = [f"c{number:02}" for number in range(50)]
        self.zone.records.update(dict.fromkeys(gone, "192.0.2.3"))
        for node_id in gone[:25]:
            self.names.node_gone(node_id)
        self.clock.advance(MOMENT / 2)
        for node_id in gone[25:]:
            self.names.node_gone(node_id)
        self.clock.advance(MOMENT / 2)
        self.assertEqual(self.asked(), [("withdraw", *gone)])
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})

    def test_the_next_does_it_later(self) -> None:
        self.others = ["a", "c"]
        self.names.node_gone("d")
        self.pass_time(INSURANCE - 1)
        self.assertEqual(self.asked("withdraw"), [])
        self.pass_time(3)
        self.assertEqual(self.asked("withdraw"), [("withdraw", "d")])

    def test_whoever_comes_after_these_leaves_it_to_them(self) -> None:
        self.others = ["a", "aa"]
        self.names.node_gone("d")
        self.pass_time(4 * INSURANCE)
        self.assertEqual(self.asked("withdraw"), [])

    def test_those_who_would_do_it_go_next(self) -> None:
        """Of several that die together each is seen to be gone when its own lease is over."""
        self.others = ["0", "1", "c"]
        self.names.node_gone("d")
        self.pass_time(2)
        self.assertEqual(self.asked("withdraw"), [])
        self.others = ["c"]
        self.names.node_gone("0")
        self.names.node_gone("1")
        self.pass_time(MOMENT)
        self.assertEqual(self.asked("withdraw"), [("withdraw", "0", "1", "d")])
        self.assertEqual(self.names._gone, {})

    def test_what_others_have_done_is_forgotten(self) -> None:
        self.others = ["0", "1"]
        self.names.node_gone("d")
        self.pass_time(CHECK + 1)
        self.assertEqual((self.asked("withdraw"), self.names._gone), ([], {}))

    def test_who_is_back_meanwhile_stays(self) -> None:
        self.zone.problem = NameServiceError("away")
        self.names.node_gone("c")
        self.names.node_gone("d")
        self.pass_time(100)
        self.others = ["c"]
        self.zone.problem = None
        self.asked()
        self.pass_time(61)
        self.assertEqual(self.asked("withdraw"), [("withdraw", "d")])

    def test_away_for_minutes(self) -> None:
        self.zone.records["c"] = "192.0.2.3"
        self.zone.problem = NameServiceError("away")
        self.names.node_gone("c")
        self.pass_time(600)
        self.zone.problem = None
        self.pass_time(61)
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})

    def test_no_more_are_kept_than_can_be(self) -> None:
        for number in range(MOST_GONE + 5):
            self.names.node_gone(f"c{number}")
        self.pass_time(2)
        self.assertEqual(len(self.asked("withdraw")[0]) - 1, MOST_GONE)

    def test_its_own_withdrawal_does_not_wait_for_that(self) -> None:
        self.zone.holding = True
        self.names.node_gone("c")
        self.pass_time(2)
        withdrawn = self.names.withdraw()
        self.clock.advance(0)
        self.assertEqual(self.asked(), [("withdraw", "c"), ("withdraw", "b")])
        self.zone.held.pop(0)
        self.zone.answer()
        self.clock.advance(0)
        self.successResultOf(withdrawn)


class CheckTests(NamesCase):
    """A look at who is announced, two leases after the start, and then every now and then."""

    def setUp(self) -> None:
        super().setUp()
        self.start()
        self.zone.records["dead"] = "192.0.2.3"

    def test_whom_nobody_saw_die(self) -> None:
        self.others = ["c"]
        self.zone.records["c"] = "192.0.2.4"
        self.pass_time(2 * LEASE)
        self.assertEqual(self.asked(), [("announced",), ("withdraw", "dead")])
        self.assertEqual(self.zone.records, {"b": "192.0.2.2", "c": "192.0.2.4"})
        self.zone.records["dead"] = "192.0.2.3"
        self.pass_time(CHECK * 1.25 + 1)
        self.assertEqual(self.asked(), [("announced",), ("withdraw", "dead")])
        self.pass_time(CHECK * 1.25 + 1)
        self.assertEqual(self.asked(), [("announced",)])

    def test_one_that_joins_and_is_announced_at_that_moment(self) -> None:
        self.held_look = Deferred()
        self.pass_time(2 * LEASE)
        self.assertEqual(self.asked(), [("announced",)])
        # What was announced is known by now; who joined before is among the live nodes that are read after.
        self.zone.records["new"] = "192.0.2.5"
        self.held_look.callback(["b"])
        self.assertEqual(self.asked(), [("withdraw", "dead")])
        self.assertIn("new", self.zone.records)

    def test_a_node_that_is_not_steady_withdraws_nobody(self) -> None:
        self.steady = False
        del self.zone.records["b"]
        self.pass_time(CHECK)
        self.assertEqual(set(self.asked()), {("announced",)})
        self.assertIn("dead", self.zone.records)
        self.steady = True
        self.pass_time(2 * LEASE + 1)
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})

    def test_a_node_that_is_not_live_itself_is_neither_announced_nor_withdrawn_by_itself(self) -> None:
        self.held_look = succeed(["c"])
        self.pass_time(2 * LEASE)
        self.assertEqual(self.asked(), [("announced",), ("withdraw", "dead")])
        del self.zone.records["b"]
        self.pass_time(CHECK * 1.25 + 1)
        self.assertEqual(self.asked(), [("announced",)])

    def test_only_the_first_two_withdraw_but_each_sees_to_its_own(self) -> None:
        self.others = ["a", "aa"]
        del self.zone.records["b"]
        self.pass_time(2 * LEASE)
        self.assertEqual(self.asked(), [("announced",), ("announce", "b", "192.0.2.2")])
        self.assertIn("dead", self.zone.records)

    def test_those_that_withdraw_nobody_look_later(self) -> None:
        self.others = ["a", "aa"]
        self.names.again()
        self.pass_time(2 * LEASE)
        self.asked()
        self.names.again()
        self.pass_time(2 * LEASE)
        self.assertEqual(self.asked("announced"), [])
        self.pass_time(CHECK / 2)
        self.assertEqual(self.asked("announced"), [("announced",)])

    def test_those_that_would_have_looked_are_gone(self) -> None:
        """Whoever is the first now looks as soon as they would have."""
        self.others = ["0", "1"]
        self.names.again()
        self.pass_time(2 * LEASE)
        self.names._check_at = self.clock.seconds() + CHECK
        self.asked()
        self.others = []
        self.names.node_gone("0")
        self.names.node_gone("1")
        self.pass_time(2 * LEASE + 1)
        self.assertIn(("withdraw", "dead"), self.asked())

    def test_its_own_record_is_gone_or_another(self) -> None:
        for there in ({}, {"b": ""}, {"b": "192.0.2.77"}):
            self.zone.records = there
            self.pass_time(CHECK * 1.25 + 1)
            self.assertEqual(self.zone.records, {"b": "192.0.2.2"})

    def test_a_record_that_came_after_the_question_is_not_missed(self) -> None:
        self.zone.records = {}
        self.names.again()
        self.zone.holding = True
        self.pass_time(2 * LEASE)
        self.assertEqual(self.asked(), [("announce", "b", "192.0.2.2"), ("announced",)])
        self.zone.answer()
        self.zone.held = [(self.zone.held[0][0], dict)]
        self.zone.answer()
        self.pass_time(5)
        self.assertEqual(self.asked(), [])

    def test_a_node_that_is_withdrawn_is_not_missed(self) -> None:
        self.zone.holding = True
        self.pass_time(2 * LEASE)
        withdrawn = self.names.withdraw()
        self.clock.advance(0)
        announced, withdraw = self.zone.held
        self.zone.held = [withdraw]
        self.zone.answer()
        self.clock.advance(0)
        self.successResultOf(withdrawn)
        self.zone.holding = False
        self.asked()
        self.zone.held = [announced]
        self.zone.answer()
        self.pass_time(5)
        self.assertEqual(self.asked("announce", "withdraw"), [("withdraw", "dead")])
        self.assertEqual(self.zone.records, {})

    def test_after_a_lease_that_had_run_out_it_looks_soon(self) -> None:
        self.pass_time(2 * LEASE)
        self.asked()
        self.names.again()
        self.clock.advance(0)
        # A withdrawal of another node's, which was late.
        del self.zone.records["b"]
        self.pass_time(2 * LEASE)
        self.assertEqual(self.zone.records, {"b": "192.0.2.2"})
