"""When clients are moved, and how many."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.cluster.interface import IRebalancer
from gateway.cluster.rebalance import CLIENT_COOLDOWN, PURGE_INTERVAL
from tests.cluster.network import HEARTBEAT, SimulatedCluster, SimulatedNode


class RebalanceCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.cluster = SimulatedCluster()

    def start_nodes(self, *clients: int, spread: float = 1.3, **options: Any) -> list[SimulatedNode]:
        """Nodes whose heartbeats are at different times."""
        members = []
        for number in range(len(clients)):
            members.append(self.cluster.join(f"n{number}", 0, **options))
            self.cluster.advance(spread)
        self.cluster.advance(30)
        for member, count in zip(members, clients, strict=True):
            member.sessions.connected = {f"{member.name}-{number}" for number in range(count)}
        self.cluster.advance(2 * HEARTBEAT)
        self.assertEqual(self.cluster.goaway_counts, {})
        return members

    def assert_balanced(self, max_ratio: float = 1.1) -> None:
        counts = self.cluster.counts()
        self.assertLessEqual(max(counts.values()), max_ratio * min(counts.values()), counts)


class JoinTests(RebalanceCase):
    """When a node joins."""

    def test_interface(self) -> None:
        verifyObject(IRebalancer, self.cluster.join("a", 0).rebalancer)

    def test_a_fourth_joins_three(self) -> None:
        self.start_nodes(1000, 1000, 1000)
        self.cluster.join("new", 0)
        self.cluster.advance(2 * HEARTBEAT - 0.1)
        self.assertEqual(self.cluster.goaway_counts, {})
        # Two heartbeats until all see it, and as many until they have looked again; then five seconds at that rate.
        self.cluster.advance(2 * HEARTBEAT + 250 / 50 + 1)
        self.assert_balanced()
        self.cluster.advance(300)
        self.assert_balanced()
        self.assertEqual(set(self.cluster.goaway_counts.values()), {1})
        self.assertTrue(740 <= self.cluster.counts()["new"] <= 760, self.cluster.counts())

    def test_nobody_overshoots_whatever_the_times_of_the_heartbeats(self) -> None:
        for spread in (0.05, 0.4, 1.25, 1.65, 2.5):
            for clients in ((2000, 1000, 1000), (3000, 3000), (900, 1100, 1300, 500), (4000, 1, 1)):
                self.cluster = SimulatedCluster()
                self.start_nodes(*clients, spread=spread, rate=200.0)
                self.cluster.join("new", 0)
                mean = sum(clients) / (len(clients) + 1)
                for _ in range(600):
                    self.cluster.advance(0.2)
                    self.assertLess(self.cluster.counts()["new"], 1.05 * mean, (spread, clients))
                self.assert_balanced()
                self.assertEqual(set(self.cluster.goaway_counts.values()), {1})

    def test_the_first_few_clients_stay_where_they_are(self) -> None:
        """Until there are more, or somebody says so."""
        few, *_ = self.start_nodes(9, 0)
        self.cluster.join("new", 0)
        self.cluster.advance(60)
        self.assertEqual(self.cluster.goaway_counts, {})
        few.rebalancer.rebalance_now()
        self.cluster.advance(60)
        self.assertEqual(sorted(self.cluster.counts().values()), [3, 3, 3])

    def test_several_joins_at_once_are_one(self) -> None:
        self.start_nodes(1000, 1000)
        for name in ("new", "newer"):
            self.cluster.join(name, 0)
            self.cluster.advance(1)
        self.cluster.advance(120)
        self.assert_balanced()
        self.assertLess(sum(self.cluster.goaway_counts.values()), 1050)

    def test_a_join_while_clients_are_moved(self) -> None:
        self.start_nodes(4000, 4000)
        self.cluster.join("new", 0)
        self.cluster.advance(20)
        self.assertTrue(self.cluster.goaway_counts)
        self.cluster.join("newer", 0)
        self.cluster.advance(240)
        self.assert_balanced()
        self.assertEqual(set(self.cluster.goaway_counts.values()), {1})

    def test_not_much_more_than_the_mean_is_left_alone(self) -> None:
        self.start_nodes(*[1000] * 6)
        self.cluster.join("new", 0)
        self.cluster.advance(60)
        self.assertEqual(self.cluster.goaway_counts, {})

    def test_a_node_that_comes_back_under_another_id(self) -> None:
        members = self.start_nodes(900, 900, 900)
        members[0].die()
        for number in range(900):
            members[1 + number % 2].sessions.connected.add(f"back-{number}")
        self.cluster.advance(3)
        self.cluster.join("again", 0)
        self.cluster.advance(60)
        self.assert_balanced()

    def test_clients_that_come_in_the_meantime(self) -> None:
        """A plan made of what was before they came would be wrong."""
        members = self.start_nodes(10, 10)
        new = self.cluster.join("new", 0)
        for member, count in ((members[0], 1500), (members[1], 1500), (new, 1500)):
            self.cluster.advance(3)
            member.sessions.connected.update(f"{member.name}+{number}" for number in range(count))
        self.cluster.advance(100)
        self.assertLess(sum(self.cluster.goaway_counts.values()), 10)

    def test_a_plan_is_what_two_looks_have_in_common(self) -> None:
        """By the second, others have moved clients, which are not counted yet where they are."""
        member, other = self.start_nodes(3000, 3000)
        for each in (member, other, new := self.cluster.join("new", 0)):
            each.timer.cancel()
        self.successResultOf(member.node_directory.refresh())
        self.cluster.advance(2 * HEARTBEAT)
        other.sessions.connected = set(sorted(other.sessions.connected)[500:])
        for each in (other, new, member):
            each.heartbeat()
        assert member.rebalancer._migration is not None
        self.assertEqual(member.rebalancer._migration.remaining, 1000)

    def test_clients_that_leave_by_themselves(self) -> None:
        member, _ = self.start_nodes(4000, 1)
        self.cluster.join("new", 0)
        self.cluster.advance(25)
        self.assertTrue(self.cluster.goaway_counts)
        for client_id in sorted(member.sessions.connected)[:1500]:
            member.sessions.connected.discard(client_id)
        self.cluster.advance(120)
        # As exactly as it can be known while the counts of the others are some seconds old.
        self.assertGreater(member.sessions.count(), 0.85 * 2500 / 3)

    def test_a_destination_that_is_filled_by_others(self) -> None:
        self.start_nodes(3000, 3000)
        full, empty = self.cluster.join("full", 0), self.cluster.join("empty", 0)
        self.cluster.advance(16)
        self.assertTrue(self.cluster.goaway_counts)
        full.sessions.connected.update(f"own-{number}" for number in range(3500))
        before = full.sessions.count()
        self.cluster.advance(60)
        # Until its heartbeat was seen, and no longer.
        self.assertLess(full.sessions.count() - before, 2 * 25 * 2 * HEARTBEAT)
        self.assertGreater(empty.sessions.count(), 800)

    def test_those_with_calls_in_flight_count_as_gone_once_they_are_told(self) -> None:
        member, _ = self.start_nodes(1500, 500)
        member.calls.update(member.sessions.connected)
        self.assertEqual(self.successResultOf(member.rebalancer.rebalance_now()), 500)
        self.cluster.advance(90)
        self.assertEqual((len(member.graceful_disconnect), sum(self.cluster.goaway_counts.values())), (500, 500))

    def test_off(self) -> None:
        member, *_ = self.start_nodes(1000, 0, rate=0.0)
        self.cluster.join("new", 0, rate=0.0)
        self.cluster.advance(60)
        self.assertEqual(self.successResultOf(member.rebalancer.rebalance_now()), 0)
        self.cluster.advance(60)
        self.assertEqual(self.cluster.goaway_counts, {})

    def test_not_before_this_node_is_steady_and_ready(self) -> None:
        (member,) = self.start_nodes(1000)
        member.node.stable = False
        self.cluster.join("new", 0)
        self.cluster.advance(30)
        member.node.stable, member.reason = True, "registry"
        self.cluster.advance(30)
        self.assertEqual(self.cluster.goaway_counts, {})
        member.reason = ""
        self.cluster.advance(40)
        self.assert_balanced()

    def test_a_drain_ends_it(self) -> None:
        member, _ = self.start_nodes(2000, 1)
        self.cluster.join("new", 0)
        self.cluster.advance(20)
        member.reason = "draining"
        told = len(self.cluster.goaway_counts)
        self.assertGreater(told, 0)
        self.cluster.advance(60)
        self.assertEqual(len(self.cluster.goaway_counts), told)

    def test_a_node_that_is_gone_in_the_middle(self) -> None:
        member, _ = self.start_nodes(3000, 3000)
        new, newer = self.cluster.join("new", 0), self.cluster.join("newer", 0)
        self.cluster.advance(25)
        new.die()
        lost = len(new.sessions.connected)
        self.cluster.advance(150)
        self.assert_balanced()
        self.assertEqual(sum(self.cluster.counts().values()) + lost, 6000)
        self.assertGreater(newer.sessions.count(), 1500)
        self.assertIsNone(member.rebalancer._migration)

    def test_a_registry_that_is_away_for_a_while(self) -> None:
        member, _ = self.start_nodes(2000, 1)
        member.registry.unavailable = True
        self.cluster.join("new", 0)
        self.cluster.advance(60)
        self.assertEqual(self.cluster.goaway_counts, {})
        member.registry.unavailable = False
        self.cluster.advance(90)
        self.assert_balanced()

    def test_it_comes_to_an_end(self) -> None:
        """Though clients go on arriving at one node alone."""
        member, other = self.start_nodes(300, 300)
        self.cluster.join("new", 0)
        arrived = 0
        for _ in range(120):
            member.sessions.connected.update(f"late-{arrived + number}" for number in range(20))
            arrived += 20
            self.cluster.advance(5)
        self.assertEqual((member.rebalancer._thresholds, member.rebalancer._migration), (None, None))
        self.assertLess(member.metrics.rebalanced, 1500)
        self.assertGreater(member.sessions.count(), 1.2 * other.sessions.count())

    def test_stop(self) -> None:
        member, _ = self.start_nodes(2000, 1)
        self.cluster.join("new", 0)
        self.cluster.advance(20)
        told = len(self.cluster.goaway_counts)
        member.rebalancer.stop()
        self.cluster.advance(60)
        self.assertEqual(len(self.cluster.goaway_counts), told)


class RebalanceNowTests(RebalanceCase):
    """When somebody says so."""

    def rebalance_all(self) -> dict[str, int]:
        return {
            name: self.successResultOf(member.rebalancer.rebalance_now()) for name, member in self.cluster.nodes.items()
        }

    def test_whatever_is_above_the_mean_is_moved_at_once(self) -> None:
        self.start_nodes(1100, 1000, 900, 1000)
        self.assertEqual(self.rebalance_all(), {"n0": 100, "n1": 0, "n2": 0, "n3": 0})
        self.cluster.advance(4)
        self.assertEqual(set(self.cluster.counts().values()), {1000})

    def test_it_need_not_be_steady(self) -> None:
        member, _ = self.start_nodes(1100, 900)
        member.node.stable = False
        self.assertEqual(self.rebalance_all()["n0"], 100)

    def test_again_while_clients_are_moved(self) -> None:
        """It is told how many are to go yet."""
        self.start_nodes(1500, 500)
        self.assertEqual(self.rebalance_all(), {"n0": 500, "n1": 0})
        self.cluster.advance(5)
        left = self.rebalance_all()["n0"]
        self.assertTrue(240 < left < 260, left)
        self.cluster.advance(60)
        self.assertEqual(set(self.cluster.counts().values()), {1000})

    def test_again_before_the_counts_show_what_was_moved(self) -> None:
        """Nothing then, but it is looked at again."""
        member, _ = self.start_nodes(600, 400)
        self.assertEqual(self.rebalance_all()["n0"], 100)
        self.cluster.advance(3)
        member.sessions.connected.update(f"late-{number}" for number in range(400))
        self.assertEqual(self.rebalance_all()["n0"], 0)
        self.cluster.advance(60)
        self.assert_balanced()

    def test_one_that_takes_no_clients_moves_none(self) -> None:
        for why in ("starting", "draining", "registry"):
            self.cluster = SimulatedCluster()
            member, _ = self.start_nodes(1500, 500)
            member.reason = why
            self.assertEqual(self.rebalance_all()["n0"], 0)
            self.cluster.advance(3)
            self.assertEqual(self.cluster.goaway_counts, {})

    def test_alone(self) -> None:
        self.start_nodes(1500)
        self.assertEqual(self.rebalance_all(), {"n0": 0})

    def test_behind_one_load_balancer(self) -> None:
        """Which gives each new connection to the node that has the fewest."""
        self.start_nodes(1500, 500, url="ws://all")
        self.assertEqual(self.rebalance_all(), {"n0": 500, "n1": 0})
        self.cluster.advance(60)
        self.assert_balanced()

    def test_those_that_were_moved_a_short_time_ago(self) -> None:
        """Nothing is tried again before they have rested."""
        member, _ = self.start_nodes(1500, 500)
        self.cluster.recently_assigned.update(member.sessions.connected)
        self.assertEqual(self.rebalance_all(), {"n0": 500, "n1": 0})
        self.cluster.advance(120)
        placed = len(member.registry.assign_requests)
        self.assertEqual(self.cluster.goaway_counts, {})
        self.cluster.advance(CLIENT_COOLDOWN - 130)
        self.assertEqual(len(member.registry.assign_requests), placed)
        self.cluster.recently_assigned.clear()
        self.cluster.advance(60)
        self.assert_balanced()

    def test_two_at_once(self) -> None:
        member, _ = self.start_nodes(1500, 500)
        looking: Deferred[Any] = Deferred()
        self.patch(member.node_directory, "refresh", lambda: looking)
        asked = [member.rebalancer.rebalance_now() for _ in range(2)]
        looking.callback(None)
        self.assertEqual([self.successResultOf(each) for each in asked], [500, 500])
        self.cluster.advance(15)
        self.assertEqual(set(self.cluster.counts().values()), {1000})


class PurgeAssignmentsTests(RebalanceCase):
    """Placements that are over are removed, a piece after each heartbeat."""

    def purges_within(self, member: SimulatedNode, seconds: float) -> int:
        before = len(member.registry.purge_results)
        self.cluster.advance(seconds)
        return before - len(member.registry.purge_results)

    def test_piece_by_piece_and_then_not_for_a_while(self) -> None:
        member = self.cluster.join("a", 0)
        member.registry.purge_results = [True] * 5 + [False] * 3
        self.assertEqual(self.purges_within(member, PURGE_INTERVAL - 1), 0)
        self.assertEqual(self.purges_within(member, 4 * HEARTBEAT), 4)
        self.assertEqual(self.purges_within(member, PURGE_INTERVAL - 5 * HEARTBEAT), 0)
        self.assertEqual(self.purges_within(member, 5 * HEARTBEAT), 1)

    def test_an_error_is_logged_and_it_is_tried_again(self) -> None:
        member = self.cluster.join("a", 0)
        member.registry.broken = True
        self.cluster.advance(PURGE_INTERVAL + HEARTBEAT)
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))
        member.registry.broken, member.registry.unavailable = False, True
        self.cluster.advance(2 * HEARTBEAT)
        member.registry.unavailable = False
        member.registry.purge_results = [True]
        self.assertEqual(self.purges_within(member, HEARTBEAT), 1)
