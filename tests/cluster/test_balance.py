"""When clients are moved, and how many."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.cluster.interface import IBalance
from gateway.cluster.rebalance import RESTED, TIDY_EVERY
from tests.cluster.network import HEARTBEAT, Member, Network


class BalanceCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.network = Network()

    def fleet_of(self, *clients: int, spread: float = 1.3, **options: Any) -> list[Member]:
        """Nodes whose heartbeats are at different times."""
        members = []
        for number in range(len(clients)):
            members.append(self.network.join(f"n{number}", 0, **options))
            self.network.advance(spread)
        self.network.advance(30)
        for member, count in zip(members, clients, strict=True):
            member.edge.here = {f"{member.name}-{number}" for number in range(count)}
        self.network.advance(2 * HEARTBEAT)
        self.assertEqual(self.network.moves, {})
        return members

    def even(self, within: float = 1.1) -> None:
        counts = self.network.counts()
        self.assertLessEqual(max(counts.values()), within * min(counts.values()), counts)


class JoinTests(BalanceCase):
    """When a node joins."""

    def test_interface(self) -> None:
        verifyObject(IBalance, self.network.join("a", 0).balance)

    def test_a_fourth_joins_three(self) -> None:
        self.fleet_of(1000, 1000, 1000)
        self.network.join("new", 0)
        self.network.advance(2 * HEARTBEAT - 0.1)
        self.assertEqual(self.network.moves, {})
        # Two heartbeats until all see it, and as many until they have looked again; then five seconds at that rate.
        self.network.advance(2 * HEARTBEAT + 250 / 50 + 1)
        self.even()
        self.network.advance(300)
        self.even()
        self.assertEqual(set(self.network.moves.values()), {1})
        self.assertTrue(740 <= self.network.counts()["new"] <= 760, self.network.counts())

    def test_nobody_overshoots_whatever_the_times_of_the_heartbeats(self) -> None:
        for spread in (0.05, 0.4, 1.25, 1.65, 2.5):
            for clients in ((2000, 1000, 1000), (3000, 3000), (900, 1100, 1300, 500), (4000, 1, 1)):
                self.network = Network()
                self.fleet_of(*clients, spread=spread, rate=200.0)
                self.network.join("new", 0)
                mean = sum(clients) / (len(clients) + 1)
                for _ in range(600):
                    self.network.advance(0.2)
                    self.assertLess(self.network.counts()["new"], 1.05 * mean, (spread, clients))
                self.even()
                self.assertEqual(set(self.network.moves.values()), {1})

    def test_the_first_few_clients_stay_where_they_are(self) -> None:
        """Until there are more, or somebody says so."""
        few, *_ = self.fleet_of(9, 0)
        self.network.join("new", 0)
        self.network.advance(60)
        self.assertEqual(self.network.moves, {})
        few.balance.now()
        self.network.advance(60)
        self.assertEqual(sorted(self.network.counts().values()), [3, 3, 3])

    def test_several_joins_at_once_are_one(self) -> None:
        self.fleet_of(1000, 1000)
        for name in ("new", "newer"):
            self.network.join(name, 0)
            self.network.advance(1)
        self.network.advance(120)
        self.even()
        self.assertLess(sum(self.network.moves.values()), 1050)

    def test_a_join_while_clients_are_moved(self) -> None:
        self.fleet_of(4000, 4000)
        self.network.join("new", 0)
        self.network.advance(20)
        self.assertTrue(self.network.moves)
        self.network.join("newer", 0)
        self.network.advance(240)
        self.even()
        self.assertEqual(set(self.network.moves.values()), {1})

    def test_not_much_more_than_the_mean_is_left_alone(self) -> None:
        self.fleet_of(*[1000] * 6)
        self.network.join("new", 0)
        self.network.advance(60)
        self.assertEqual(self.network.moves, {})

    def test_a_node_that_comes_back_under_another_id(self) -> None:
        members = self.fleet_of(900, 900, 900)
        members[0].die()
        for number in range(900):
            members[1 + number % 2].edge.here.add(f"back-{number}")
        self.network.advance(3)
        self.network.join("again", 0)
        self.network.advance(60)
        self.even()

    def test_clients_that_come_in_the_meantime(self) -> None:
        """A plan made of what was before they came would be wrong."""
        members = self.fleet_of(10, 10)
        new = self.network.join("new", 0)
        for member, count in ((members[0], 1500), (members[1], 1500), (new, 1500)):
            self.network.advance(3)
            member.edge.here.update(f"{member.name}+{number}" for number in range(count))
        self.network.advance(100)
        self.assertLess(sum(self.network.moves.values()), 10)

    def test_a_plan_is_what_two_looks_have_in_common(self) -> None:
        """By the second, others have moved clients, which are not counted yet where they are."""
        member, other = self.fleet_of(3000, 3000)
        for each in (member, other, new := self.network.join("new", 0)):
            each.timer.cancel()
        self.successResultOf(member.fleet.look())
        self.network.advance(2 * HEARTBEAT)
        other.edge.here = set(sorted(other.edge.here)[500:])
        for each in (other, new, member):
            each.beat()
        assert member.balance._moving is not None
        self.assertEqual(member.balance._moving.left, 1000)

    def test_clients_that_leave_by_themselves(self) -> None:
        member, _ = self.fleet_of(4000, 1)
        self.network.join("new", 0)
        self.network.advance(25)
        self.assertTrue(self.network.moves)
        for client_id in sorted(member.edge.here)[:1500]:
            member.edge.here.discard(client_id)
        self.network.advance(120)
        # As exactly as it can be known while the counts of the others are some seconds old.
        self.assertGreater(member.edge.count(), 0.85 * 2500 / 3)

    def test_a_destination_that_is_filled_by_others(self) -> None:
        self.fleet_of(3000, 3000)
        full, empty = self.network.join("full", 0), self.network.join("empty", 0)
        self.network.advance(16)
        self.assertTrue(self.network.moves)
        full.edge.here.update(f"own-{number}" for number in range(3500))
        before = full.edge.count()
        self.network.advance(60)
        # Until its heartbeat was seen, and no longer.
        self.assertLess(full.edge.count() - before, 2 * 25 * 2 * HEARTBEAT)
        self.assertGreater(empty.edge.count(), 800)

    def test_those_with_calls_in_flight_count_as_gone_once_they_are_told(self) -> None:
        member, _ = self.fleet_of(1500, 500)
        member.calls.update(member.edge.here)
        self.assertEqual(self.successResultOf(member.balance.now()), 500)
        self.network.advance(90)
        self.assertEqual((len(member.farewells), sum(self.network.moves.values())), (500, 500))

    def test_off(self) -> None:
        member, *_ = self.fleet_of(1000, 0, rate=0.0)
        self.network.join("new", 0, rate=0.0)
        self.network.advance(60)
        self.assertEqual(self.successResultOf(member.balance.now()), 0)
        self.network.advance(60)
        self.assertEqual(self.network.moves, {})

    def test_not_before_this_node_is_steady_and_ready(self) -> None:
        (member,) = self.fleet_of(1000)
        member.node.is_steady = False
        self.network.join("new", 0)
        self.network.advance(30)
        member.node.is_steady, member.why = True, "registry"
        self.network.advance(30)
        self.assertEqual(self.network.moves, {})
        member.why = ""
        self.network.advance(40)
        self.even()

    def test_a_drain_ends_it(self) -> None:
        member, _ = self.fleet_of(2000, 1)
        self.network.join("new", 0)
        self.network.advance(20)
        member.why = "draining"
        told = len(self.network.moves)
        self.assertGreater(told, 0)
        self.network.advance(60)
        self.assertEqual(len(self.network.moves), told)

    def test_a_node_that_is_gone_in_the_middle(self) -> None:
        member, _ = self.fleet_of(3000, 3000)
        new, newer = self.network.join("new", 0), self.network.join("newer", 0)
        self.network.advance(25)
        new.die()
        lost = len(new.edge.here)
        self.network.advance(150)
        self.even()
        self.assertEqual(sum(self.network.counts().values()) + lost, 6000)
        self.assertGreater(newer.edge.count(), 1500)
        self.assertIsNone(member.balance._moving)

    def test_a_registry_that_is_away_for_a_while(self) -> None:
        member, _ = self.fleet_of(2000, 1)
        member.registry.away = True
        self.network.join("new", 0)
        self.network.advance(60)
        self.assertEqual(self.network.moves, {})
        member.registry.away = False
        self.network.advance(90)
        self.even()

    def test_it_comes_to_an_end(self) -> None:
        """Though clients go on arriving at one node alone."""
        member, other = self.fleet_of(300, 300)
        self.network.join("new", 0)
        arrived = 0
        for _ in range(120):
            member.edge.here.update(f"late-{arrived + number}" for number in range(20))
            arrived += 20
            self.network.advance(5)
        self.assertEqual((member.balance._due, member.balance._moving), (None, None))
        self.assertLess(member.metrics.rebalanced, 1500)
        self.assertGreater(member.edge.count(), 1.2 * other.edge.count())

    def test_stop(self) -> None:
        member, _ = self.fleet_of(2000, 1)
        self.network.join("new", 0)
        self.network.advance(20)
        told = len(self.network.moves)
        member.balance.stop()
        self.network.advance(60)
        self.assertEqual(len(self.network.moves), told)


class NowTests(BalanceCase):
    """When somebody says so."""

    def now(self) -> dict[str, int]:
        return {name: self.successResultOf(member.balance.now()) for name, member in self.network.members.items()}

    def test_whatever_is_above_the_mean_is_moved_at_once(self) -> None:
        self.fleet_of(1100, 1000, 900, 1000)
        self.assertEqual(self.now(), {"n0": 100, "n1": 0, "n2": 0, "n3": 0})
        self.network.advance(4)
        self.assertEqual(set(self.network.counts().values()), {1000})

    def test_it_need_not_be_steady(self) -> None:
        member, _ = self.fleet_of(1100, 900)
        member.node.is_steady = False
        self.assertEqual(self.now()["n0"], 100)

    def test_again_while_clients_are_moved(self) -> None:
        """It is told how many are to go yet."""
        self.fleet_of(1500, 500)
        self.assertEqual(self.now(), {"n0": 500, "n1": 0})
        self.network.advance(5)
        left = self.now()["n0"]
        self.assertTrue(240 < left < 260, left)
        self.network.advance(60)
        self.assertEqual(set(self.network.counts().values()), {1000})

    def test_again_before_the_counts_show_what_was_moved(self) -> None:
        """Nothing then, but it is looked at again."""
        member, _ = self.fleet_of(600, 400)
        self.assertEqual(self.now()["n0"], 100)
        self.network.advance(3)
        member.edge.here.update(f"late-{number}" for number in range(400))
        self.assertEqual(self.now()["n0"], 0)
        self.network.advance(60)
        self.even()

    def test_one_that_takes_no_clients_moves_none(self) -> None:
        for why in ("starting", "draining", "registry"):
            self.network = Network()
            member, _ = self.fleet_of(1500, 500)
            member.why = why
            self.assertEqual(self.now()["n0"], 0)
            self.network.advance(3)
            self.assertEqual(self.network.moves, {})

    def test_alone(self) -> None:
        self.fleet_of(1500)
        self.assertEqual(self.now(), {"n0": 0})

    def test_behind_one_load_balancer(self) -> None:
        """Which gives each new connection to the node that has the fewest."""
        self.fleet_of(1500, 500, url="ws://all")
        self.assertEqual(self.now(), {"n0": 500, "n1": 0})
        self.network.advance(60)
        self.even()

    def test_those_that_were_moved_a_short_time_ago(self) -> None:
        """Nothing is tried again before they have rested."""
        member, _ = self.fleet_of(1500, 500)
        self.network.moved.update(member.edge.here)
        self.assertEqual(self.now(), {"n0": 500, "n1": 0})
        self.network.advance(120)
        placed = len(member.registry.placed)
        self.assertEqual(self.network.moves, {})
        self.network.advance(RESTED - 130)
        self.assertEqual(len(member.registry.placed), placed)
        self.network.moved.clear()
        self.network.advance(60)
        self.even()

    def test_two_at_once(self) -> None:
        member, _ = self.fleet_of(1500, 500)
        looking: Deferred[Any] = Deferred()
        self.patch(member.fleet, "look", lambda: looking)
        asked = [member.balance.now() for _ in range(2)]
        looking.callback(None)
        self.assertEqual([self.successResultOf(each) for each in asked], [500, 500])
        self.network.advance(15)
        self.assertEqual(set(self.network.counts().values()), {1000})


class TidyTests(BalanceCase):
    """Placements that are over are removed, a piece after each heartbeat."""

    def tidied(self, member: Member, seconds: float) -> int:
        before = len(member.registry.tidied)
        self.network.advance(seconds)
        return before - len(member.registry.tidied)

    def test_piece_by_piece_and_then_not_for_a_while(self) -> None:
        member = self.network.join("a", 0)
        member.registry.tidied = [True] * 5 + [False] * 3
        self.assertEqual(self.tidied(member, TIDY_EVERY - 1), 0)
        self.assertEqual(self.tidied(member, 4 * HEARTBEAT), 4)
        self.assertEqual(self.tidied(member, TIDY_EVERY - 5 * HEARTBEAT), 0)
        self.assertEqual(self.tidied(member, 5 * HEARTBEAT), 1)

    def test_an_error_is_logged_and_it_is_tried_again(self) -> None:
        member = self.network.join("a", 0)
        member.registry.broken = True
        self.network.advance(TIDY_EVERY + HEARTBEAT)
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))
        member.registry.broken, member.registry.away = False, True
        self.network.advance(2 * HEARTBEAT)
        member.registry.away = False
        member.registry.tidied = [True]
        self.assertEqual(self.tidied(member, HEARTBEAT), 1)
