"""Tests of gateway.cluster.rebalance: when clients are moved, how many, and how evenly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import IRebalancer
from gateway.cluster.rebalance import (
    ASSIGN_RETRY_DELAY,
    CLIENT_COOLDOWN,
    MAX_ASSIGN_BATCH,
    MIGRATION_INTERVAL,
    MIGRATION_TIMEOUT,
    PURGE_INTERVAL,
    REGISTRY_STALL_TIMEOUT,
    Migration,
)
from gateway.cluster.routing import Destination, connect_url
from gateway.metrics import Metrics
from gateway.registry.interface import NodeStatus
from tests.fakes.cluster import FakePeerClient, node_status
from tests.fakes.rebalance import FakeAssignmentRegistry, FakeGracefulDisconnect
from tests.fakes.sessions import FakeClientSessions
from tests.fakes.simulated_cluster import HEARTBEAT, SimulatedCluster, SimulatedNode


class RebalanceCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.cluster = SimulatedCluster()

    def start_nodes(self, *clients: int, spread: float = 1.3, **options: Any) -> list[SimulatedNode]:
        """Start nodes whose heartbeats are ``spread`` seconds apart."""
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

    def test_fourth_node_joins_three(self) -> None:
        self.start_nodes(1000, 1000, 1000)
        self.cluster.join("new", 0)
        self.cluster.advance(2 * HEARTBEAT - 0.1)
        self.assertEqual(self.cluster.goaway_counts, {})
        # Two heartbeats until all nodes see it, and two until the second snapshot; then five seconds at that rate.
        self.cluster.advance(2 * HEARTBEAT + 250 / 50 + 1)
        self.assert_balanced()
        self.cluster.advance(300)
        self.assert_balanced()
        self.assertEqual(set(self.cluster.goaway_counts.values()), {1})
        self.assertTrue(740 <= self.cluster.counts()["new"] <= 760, self.cluster.counts())

    def test_no_overshoot_for_any_times_of_heartbeats(self) -> None:
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

    def test_reconnect_storm_moves_nobody(self) -> None:
        """All nodes start at once and clients arrive evenly, whenever the heartbeats are: the counts of the others are
        older than this node's own."""
        for spread in (0.05, 0.8, 1.65, 2.4):
            for delay in (2.0, 7.5, 11.0, 16.0):
                self.cluster = SimulatedCluster()
                members = []
                for number in range(3):
                    members.append(self.cluster.join(f"n{number}", 0))
                    self.cluster.advance(spread)
                self.cluster.advance(delay)
                for tick in range(240):
                    for member in members:
                        arrived = len(member.sessions.connected)
                        member.sessions.connected |= {f"{member.name}-{arrived + n}" for n in range(8 + tick % 2)}
                    self.cluster.advance(0.05)
                self.cluster.advance(60)
                self.assertEqual(self.cluster.goaway_counts, {}, (spread, delay))

    def test_few_clients_are_not_moved(self) -> None:
        """They are moved by an operator's request only."""
        few, *_ = self.start_nodes(9, 0)
        self.cluster.join("new", 0)
        self.cluster.advance(60)
        self.assertEqual(self.cluster.goaway_counts, {})
        few.rebalancer.rebalance_now()
        self.cluster.advance(60)
        self.assertEqual(sorted(self.cluster.counts().values()), [3, 3, 3])

    def test_several_joins_cause_one_migration(self) -> None:
        self.start_nodes(1000, 1000)
        for name in ("new", "newer"):
            self.cluster.join(name, 0)
            self.cluster.advance(1)
        self.cluster.advance(120)
        self.assert_balanced()
        self.assertLess(sum(self.cluster.goaway_counts.values()), 1050)

    def test_join_during_a_migration(self) -> None:
        self.start_nodes(4000, 4000)
        self.cluster.join("new", 0)
        self.cluster.advance(20)
        self.assertTrue(self.cluster.goaway_counts)
        self.cluster.join("newer", 0)
        self.cluster.advance(240)
        self.assert_balanced()
        self.assertEqual(set(self.cluster.goaway_counts.values()), {1})

    def test_below_the_threshold_nothing_is_moved(self) -> None:
        self.start_nodes(*[1000] * 6)
        self.cluster.join("new", 0)
        self.cluster.advance(60)
        self.assertEqual(self.cluster.goaway_counts, {})

    def test_restarted_node_with_another_id(self) -> None:
        members = self.start_nodes(900, 900, 900)
        members[0].die()
        for number in range(900):
            members[1 + number % 2].sessions.connected.add(f"back-{number}")
        self.cluster.advance(3)
        self.cluster.join("again", 0)
        self.cluster.advance(60)
        self.assert_balanced()

    def test_clients_that_arrive_between_the_snapshots(self) -> None:
        """A plan made of the first snapshot alone would be wrong."""
        members = self.start_nodes(10, 10)
        new = self.cluster.join("new", 0)
        for member, count in ((members[0], 1500), (members[1], 1500), (new, 1500)):
            self.cluster.advance(3)
            member.sessions.connected.update(f"{member.name}+{number}" for number in range(count))
        self.cluster.advance(100)
        self.assertLess(sum(self.cluster.goaway_counts.values()), 10)

    def test_plan_is_the_intersection_of_two_snapshots(self) -> None:
        """Other nodes move clients in between, which their new nodes do not count yet."""
        member, other = self.start_nodes(3000, 3000)
        for each in (member, other, new := self.cluster.join("new", 0)):
            each.timer.cancel()
        self.successResultOf(member.node_directory.refresh())
        self.cluster.advance(2 * HEARTBEAT)
        other.sessions.connected = set(sorted(other.sessions.connected)[500:])
        for each in (other, new, member):
            each.heartbeat()
        assert isinstance(member.rebalancer._state, Migration)
        self.assertEqual(member.rebalancer._state.remaining, 1000)

    def test_clients_that_disconnect_by_themselves(self) -> None:
        member, _ = self.start_nodes(4000, 1)
        self.cluster.join("new", 0)
        self.cluster.advance(25)
        self.assertTrue(self.cluster.goaway_counts)
        for client_id in sorted(member.sessions.connected)[:1500]:
            member.sessions.connected.discard(client_id)
        self.cluster.advance(120)
        # Approximately, since the counts of the others are some seconds old.
        self.assertGreater(member.sessions.count(), 0.85 * 2500 / 3)

    def test_target_that_is_filled_by_others(self) -> None:
        self.start_nodes(3000, 3000)
        full, empty = self.cluster.join("full", 0), self.cluster.join("empty", 0)
        self.cluster.advance(16)
        self.assertTrue(self.cluster.goaway_counts)
        full.sessions.connected.update(f"own-{number}" for number in range(3500))
        before = full.sessions.count()
        self.cluster.advance(60)
        # Clients arrive until its next heartbeat is seen.
        self.assertLess(full.sessions.count() - before, 2 * 25 * 2 * HEARTBEAT)
        self.assertGreater(empty.sessions.count(), 800)

    def test_client_with_calls_counts_as_gone_after_its_goaway(self) -> None:
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

    def test_waits_until_stable_and_ready(self) -> None:
        (member,) = self.start_nodes(1000)
        member.membership.stable = False
        self.cluster.join("new", 0)
        self.cluster.advance(30)
        member.membership.stable, member.reason = True, "registry"
        self.cluster.advance(30)
        self.assertEqual(self.cluster.goaway_counts, {})
        member.reason = ""
        self.cluster.advance(40)
        self.assert_balanced()

    def test_drain_ends_a_migration(self) -> None:
        member, _ = self.start_nodes(2000, 1)
        self.cluster.join("new", 0)
        self.cluster.advance(20)
        member.reason = "draining"
        sent = len(self.cluster.goaway_counts)
        self.assertGreater(sent, 0)
        self.cluster.advance(60)
        self.assertEqual(len(self.cluster.goaway_counts), sent)

    def test_node_gone_during_a_migration(self) -> None:
        member, _ = self.start_nodes(3000, 3000)
        new, newer = self.cluster.join("new", 0), self.cluster.join("newer", 0)
        self.cluster.advance(25)
        new.die()
        lost = len(new.sessions.connected)
        self.cluster.advance(150)
        self.assert_balanced()
        self.assertEqual(sum(self.cluster.counts().values()) + lost, 6000)
        self.assertGreater(newer.sessions.count(), 1500)
        self.assertNotIsInstance(member.rebalancer._state, Migration)

    def test_registry_unavailable_for_a_while(self) -> None:
        member, _ = self.start_nodes(2000, 1)
        member.registry.unavailable = True
        self.cluster.join("new", 0)
        self.cluster.advance(60)
        self.assertEqual(self.cluster.goaway_counts, {})
        member.registry.unavailable = False
        self.cluster.advance(90)
        self.assert_balanced()

    def test_follow_ups_are_bounded(self) -> None:
        """Even if clients keep arriving at one node only."""
        member, other = self.start_nodes(300, 300)
        self.cluster.join("new", 0)
        arrived = 0
        for _ in range(120):
            member.sessions.connected.update(f"late-{arrived + number}" for number in range(20))
            arrived += 20
            self.cluster.advance(5)
        self.assertIsNone(member.rebalancer._state)
        self.assertLess(member.metrics.rebalanced, 1500)
        self.assertGreater(member.sessions.count(), 1.2 * other.sessions.count())

    def test_stop(self) -> None:
        member, _ = self.start_nodes(2000, 1)
        self.cluster.join("new", 0)
        self.cluster.advance(20)
        sent = len(self.cluster.goaway_counts)
        member.rebalancer.stop()
        self.cluster.advance(60)
        self.assertEqual(len(self.cluster.goaway_counts), sent)


class RebalanceNowTests(RebalanceCase):
    """When an operator requests it."""

    def rebalance_all(self) -> dict[str, int]:
        return {
            name: self.successResultOf(member.rebalancer.rebalance_now()) for name, member in self.cluster.nodes.items()
        }

    def test_any_excess_is_moved_at_once(self) -> None:
        self.start_nodes(1100, 1000, 900, 1000)
        self.assertEqual(self.rebalance_all(), {"n0": 100, "n1": 0, "n2": 0, "n3": 0})
        self.cluster.advance(4)
        self.assertEqual(set(self.cluster.counts().values()), {1000})

    def test_node_need_not_be_stable(self) -> None:
        member, _ = self.start_nodes(1100, 900)
        member.membership.stable = False
        self.assertEqual(self.rebalance_all()["n0"], 100)

    def test_repeated_during_a_migration(self) -> None:
        """It returns the number of clients that are left to move."""
        self.start_nodes(1500, 500)
        self.assertEqual(self.rebalance_all(), {"n0": 500, "n1": 0})
        self.cluster.advance(5)
        left = self.rebalance_all()["n0"]
        self.assertTrue(240 < left < 260, left)
        self.cluster.advance(60)
        self.assertEqual(set(self.cluster.counts().values()), {1000})

    def test_repeated_before_the_counts_are_stable(self) -> None:
        """Nothing is moved at once, but a plan is due."""
        member, _ = self.start_nodes(600, 400)
        self.assertEqual(self.rebalance_all()["n0"], 100)
        self.cluster.advance(3)
        member.sessions.connected.update(f"late-{number}" for number in range(400))
        self.assertEqual(self.rebalance_all()["n0"], 0)
        self.cluster.advance(60)
        self.assert_balanced()

    def test_unready_node_moves_none(self) -> None:
        for reason in ("starting", "draining", "registry"):
            self.cluster = SimulatedCluster()
            member, _ = self.start_nodes(1500, 500)
            member.reason = reason
            self.assertEqual(self.rebalance_all()["n0"], 0)
            self.cluster.advance(3)
            self.assertEqual(self.cluster.goaway_counts, {})

    def test_single_node(self) -> None:
        self.start_nodes(1500)
        self.assertEqual(self.rebalance_all(), {"n0": 0})

    def test_behind_one_load_balancer(self) -> None:
        """It routes each new connection to the node with the fewest clients."""
        self.start_nodes(1500, 500, url="ws://all")
        self.assertEqual(self.rebalance_all(), {"n0": 500, "n1": 0})
        self.cluster.advance(60)
        self.assert_balanced()

    def test_recently_moved_clients_stay(self) -> None:
        """No migration is started before their cooldown has ended."""
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

    def test_two_nodes_at_once(self) -> None:
        member, _ = self.start_nodes(1500, 500)
        looking: Deferred[Any] = Deferred()
        self.patch(member.node_directory, "refresh", lambda: looking)
        results = [member.rebalancer.rebalance_now() for _ in range(2)]
        looking.callback(None)
        self.assertEqual([self.successResultOf(each) for each in results], [500, 500])
        self.cluster.advance(15)
        self.assertEqual(set(self.cluster.counts().values()), {1000})


class PurgeAssignmentsTests(RebalanceCase):
    """Ended assignments are purged, a piece after each heartbeat."""

    def purges_within(self, member: SimulatedNode, seconds: float) -> int:
        before = len(member.registry.purge_results)
        self.cluster.advance(seconds)
        return before - len(member.registry.purge_results)

    def test_purged_in_pieces_and_then_after_the_interval(self) -> None:
        member = self.cluster.join("a", 0)
        member.registry.purge_results = [True] * 5 + [False] * 3
        self.assertEqual(self.purges_within(member, PURGE_INTERVAL - 1), 0)
        self.assertEqual(self.purges_within(member, 4 * HEARTBEAT), 4)
        self.assertEqual(self.purges_within(member, PURGE_INTERVAL - 5 * HEARTBEAT), 0)
        self.assertEqual(self.purges_within(member, 5 * HEARTBEAT), 1)

    def test_repeated_after_an_unexpected_error(self) -> None:
        member = self.cluster.join("a", 0)
        member.registry.broken = True
        self.cluster.advance(PURGE_INTERVAL + HEARTBEAT)
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))
        member.registry.broken, member.registry.unavailable = False, True
        self.cluster.advance(2 * HEARTBEAT)
        member.registry.unavailable = False
        member.registry.purge_results = [True]
        self.assertEqual(self.purges_within(member, HEARTBEAT), 1)


class MigrationTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.registry = FakeAssignmentRegistry()
        self.peer_client = FakePeerClient()
        self.metrics = Metrics()
        self.calls: Counter[str] = Counter()
        self.nodes = {name: node_status(name) for name in ("b", "c")}
        self.has_excess = True
        #: clients that were sent a goaway before
        self.goaway_sent: set[str] = set()
        self.finished: list[bool] = []

    def target_node(self, node_id: str) -> NodeStatus | None:
        return self.nodes.get(node_id)

    def start_migration(self, count: int, rate: float = 50.0, **plan: int) -> Migration:
        self.sessions = FakeClientSessions(self.clock, count)
        self.graceful_disconnect = FakeGracefulDisconnect(self.clock, self.sessions, self.calls)
        self.graceful_disconnect.disconnecting |= self.goaway_sent
        self.migration = Migration(
            plan,
            sessions=self.sessions,  # type: ignore[arg-type]
            registry=self.registry,  # type: ignore[arg-type]
            peer_client=self.peer_client,
            graceful_disconnect=self.graceful_disconnect,  # type: ignore[arg-type]
            clock=self.clock,
            metrics=self.metrics,
            rate=rate,
            in_flight=lambda key: self.calls[key.client_id],
            public_url="ws://all",
            target_node=self.target_node,
            destination_at=lambda node, client_id: Destination(connect_url(node.public_url, client_id), node.node_id),
            has_excess=lambda: self.has_excess,
            on_finished=self.finished.append,
        )
        self.migration.start()
        return self.migration

    def advance(self, seconds: float) -> None:
        self.clock.pump([MIGRATION_INTERVAL] * round(seconds / MIGRATION_INTERVAL))

    def assert_finished(self, complete: bool = True) -> None:
        self.assertEqual((self.finished, self.clock.getDelayedCalls()), ([complete], []))

    def test_target_with_the_same_url(self) -> None:
        """Clients get no URL, since the load balancer decides; the assignment is recorded, but not binding."""
        self.nodes["b"] = attrs.evolve(node_status("b"), public_url="ws://all")
        self.start_migration(100, b=10)
        self.advance(2)
        self.assertEqual({url for _, _, url in self.graceful_disconnect.goaways.values()}, {None})
        self.assertEqual(
            (len(self.graceful_disconnect.goaways), self.registry.unbound), (10, set(self.graceful_disconnect.goaways))
        )
        self.assert_finished()

    def test_no_goaway_while_the_registry_does_not_respond(self) -> None:
        self.registry.pending_responses = []
        self.start_migration(1000, b=500)
        self.registry.pending_responses[0].callback(None)
        while len(self.registry.pending_responses) < 2:
            self.advance(MIGRATION_INTERVAL)
        self.advance(REGISTRY_STALL_TIMEOUT + 2 * MIGRATION_INTERVAL)
        sent = len(self.graceful_disconnect.goaways)
        self.assertTrue(0 < sent < 45)
        self.advance(5)
        self.assertEqual(len(self.graceful_disconnect.goaways), sent)
        self.registry.pending_responses[1].callback(None)
        self.advance(0.5)
        self.assertGreater(len(self.graceful_disconnect.goaways), sent)

    def test_plan_is_carried_out(self) -> None:
        migration = self.start_migration(1000, b=100, c=50)
        self.assertEqual(migration.remaining, 150)
        self.advance(3.5)
        self.assertEqual(self.graceful_disconnect.destinations(), {"ws://b": 100, "ws://c": 50})
        for client_id, (_, reason, url) in self.graceful_disconnect.goaways.items():
            self.assertEqual(reason, "rebalance")
            self.assertIn(url, (connect_url("ws://b", client_id), connect_url("ws://c", client_id)))
        self.assertEqual((migration.remaining, migration.migrated, self.metrics.rebalanced), (0, 150, 150))
        self.assert_finished()

    def test_even_pace(self) -> None:
        """No tenth of a second exceeds its share, and the total time is that of the rate."""
        for rate in (7.0, 50.0, 333.0):
            self.setUp()
            self.start_migration(5000, rate, b=round(rate * 6))
            self.advance(7)
            times = sorted(at for at, _, _ in self.graceful_disconnect.goaways.values())
            self.assertEqual(len(times), round(rate * 6))
            self.assertTrue(5.8 < times[-1] - times[0] < 6.2)
            tenths = Counter(int((at - times[0]) * 10 + 1e-6) for at in times)
            self.assertLessEqual(max(tenths.values()), rate / 10 + 2 * rate * MIGRATION_INTERVAL + 1)
            self.assertLess(
                max(Counter(int(at - times[0] + 1e-6) for at in times).values()),
                rate + 2 * rate * MIGRATION_INTERVAL + 2,
            )

    def test_rate_below_one(self) -> None:
        self.start_migration(5, 0.25, b=3)
        self.advance(13)
        times = [at - 1000 for at, _, _ in self.graceful_disconnect.goaways.values()]
        self.assertEqual([round(at) for at in times], [0, 4, 8])
        self.assert_finished()

    def test_rate_of_thousands(self) -> None:
        self.start_migration(9000, 4000, b=8000)
        self.advance(2.5)
        self.assertEqual(self.graceful_disconnect.destinations(), {"ws://b": 8000})
        self.assertLessEqual(max(size for size, _ in self.registry.assign_requests), MAX_ASSIGN_BATCH)

    def test_clients_with_calls_go_last(self) -> None:
        self.calls.update(f"c-{number}" for number in range(60))
        self.start_migration(100, b=50)
        self.advance(2)
        self.assertEqual(len(self.graceful_disconnect.goaways), 50)
        busy = [client_id for client_id in self.graceful_disconnect.goaways if self.calls[client_id]]
        self.assertEqual((len(busy), set(list(self.graceful_disconnect.goaways)[40:]) >= set(busy)), (10, True))

    def test_recently_moved_clients_are_replaced(self) -> None:
        self.registry.recently_assigned.update(f"c-{number}" for number in range(80))
        self.start_migration(100, b=15)
        # The candidates are random; by now all have been tried.
        self.advance(100 * ASSIGN_RETRY_DELAY + 1)
        self.assertEqual(set(self.graceful_disconnect.goaways) & {f"c-{number}" for number in range(80)}, set())
        self.assertEqual(len(self.graceful_disconnect.goaways), 15)
        self.assert_finished()

    def test_no_client_can_be_moved(self) -> None:
        """A few statements per second are sent, and each client is tried once."""
        self.registry.recently_assigned.update(f"c-{number}" for number in range(300))
        self.start_migration(300, b=100)
        self.advance(1)
        self.assertTrue(2 <= len(self.registry.assign_requests) <= 5)
        self.advance(2)
        self.assertEqual(
            (self.graceful_disconnect.goaways, sum(size for size, _ in self.registry.assign_requests)), ({}, 300)
        )
        self.assert_finished()

    def test_client_that_disconnects_before_its_goaway(self) -> None:
        self.registry.pending_responses = []
        self.start_migration(3, b=2)
        self.sessions.connected -= {"c-0", "c-1"}
        self.registry.pending_responses.pop().callback(None)
        self.advance(1)
        while self.registry.pending_responses:
            self.registry.pending_responses.pop().callback(None)
            self.advance(1)
        self.assertEqual(set(self.graceful_disconnect.goaways), {"c-2"})
        self.assert_finished()

    def test_client_that_was_sent_a_goaway_before(self) -> None:
        self.goaway_sent = {"c-0", "c-1"}
        self.calls["c-1"] = 1
        self.start_migration(3, b=3)
        self.advance(1)
        self.assertEqual((self.registry.assign_requests, set(self.graceful_disconnect.goaways)), ([(1, "b")], {"c-2"}))
        self.assert_finished()

    def test_no_clients(self) -> None:
        self.start_migration(0, b=1)
        self.advance(1)
        self.assertEqual(self.registry.assign_requests, [])
        self.assert_finished()

    def test_registry_unavailable(self) -> None:
        self.registry.unavailable = True
        self.start_migration(100, b=50)
        self.advance(1)
        self.assertEqual(self.graceful_disconnect.goaways, {})
        self.assert_finished(complete=False)

    def test_registry_becomes_unavailable(self) -> None:
        """Clients that are assigned still go."""
        self.start_migration(1000, b=500)
        self.advance(2)
        self.registry.unavailable = True
        self.advance(3)
        self.assertEqual(len(self.graceful_disconnect.goaways), sum(size for size, _ in self.registry.assign_requests))
        self.assert_finished(complete=False)

    def test_target_without_room_or_response(self) -> None:
        for answer in (False, PeerUnreachableError("silent")):
            self.setUp()
            self.peer_client.has_room_results["b"] = answer
            self.start_migration(1000, b=100, c=50)
            self.advance(3)
            self.assertEqual(self.graceful_disconnect.destinations(), {"ws://c": 50})
            self.assert_finished(complete=False)

    def test_node_gone_during_a_migration(self) -> None:
        self.start_migration(1000, b=200, c=100)
        self.advance(2)
        before = self.graceful_disconnect.destinations()["ws://b"]
        del self.nodes["b"]
        self.advance(5)
        self.assertEqual(self.graceful_disconnect.destinations(), {"ws://b": before, "ws://c": 100})
        self.assert_finished(complete=False)

    def test_ends_without_excess(self) -> None:
        self.start_migration(1000, b=200)
        self.advance(1)
        self.has_excess = False
        sent = len(self.graceful_disconnect.goaways)
        self.advance(5)
        self.assertEqual(len(self.graceful_disconnect.goaways), sent)
        self.assert_finished()

    def test_stop(self) -> None:
        self.registry.pending_responses = []
        migration = self.start_migration(1000, b=200)
        migration.stop()
        self.registry.pending_responses.pop().callback(None)
        self.advance(5)
        migration.stop()
        self.assertEqual((self.graceful_disconnect.goaways, self.finished, self.clock.getDelayedCalls()), ({}, [], []))

    def test_slow_registry_causes_no_burst(self) -> None:
        self.registry.pending_responses = []
        self.start_migration(1000, b=200)
        self.advance(10)
        self.assertEqual((self.graceful_disconnect.goaways, len(self.registry.pending_responses)), ({}, 1))
        self.registry.pending_responses.pop().callback(None)
        self.advance(2 * MIGRATION_INTERVAL)
        self.assertLessEqual(len(self.graceful_disconnect.goaways), 4 * MIGRATION_INTERVAL * 50 + 1)

    def test_migration_timeout(self) -> None:
        self.start_migration(1000, 0.1, b=100)
        self.clock.pump([1.0] * round(MIGRATION_TIMEOUT + 1))
        self.assertTrue(50 < len(self.graceful_disconnect.goaways) < 62)
        self.assert_finished(complete=False)

    def test_unexpected_error_ends_it(self) -> None:
        self.peer_client.has_room_results["b"] = Deferred()
        self.start_migration(10, b=5)
        self.peer_client.has_room_results["b"].errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_finished(complete=False)
