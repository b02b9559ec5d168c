"""Moving clients to other nodes: how evenly, whom, and when it ends."""

from __future__ import annotations

from collections import Counter

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.interface import PeerUnreachableError
from gateway.cluster.rebalance import (
    ASSIGN_RETRY_DELAY,
    MAX_ASSIGN_BATCH,
    MIGRATION_INTERVAL,
    MIGRATION_TIMEOUT,
    REGISTRY_STALL_TIMEOUT,
    Migration,
)
from gateway.cluster.routing import connect_url
from gateway.metrics import Metrics
from gateway.registry.interface import NodeStatus
from tests.cluster.fake_edge import FakeClientSessions
from tests.cluster.fakes import FakePeerClient, node_status
from tests.cluster.movers import FakeAssignmentRegistry, FakeGracefulDisconnect


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
        #: those that were told to go before
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
            in_flight=lambda client_id, generation: self.calls[client_id],
            public_url="ws://all",
            target_node=self.target_node,
            has_excess=lambda: self.has_excess,
            on_finished=self.finished.append,
        )
        self.migration.start()
        return self.migration

    def advance(self, seconds: float) -> None:
        self.clock.pump([MIGRATION_INTERVAL] * round(seconds / MIGRATION_INTERVAL))

    def assert_finished(self, complete: bool = True) -> None:
        self.assertEqual((self.finished, self.clock.getDelayedCalls()), ([complete], []))

    def test_a_node_with_the_same_url(self) -> None:
        """They are told none, and what is in front of the nodes decides; but it is written down that they were moved."""
        self.nodes["b"] = attrs.evolve(node_status("b"), public_url="ws://all")
        self.start_migration(100, b=10)
        self.advance(2)
        self.assertEqual({url for _, _, url in self.graceful_disconnect.goaways.values()}, {None})
        self.assertEqual(
            (len(self.graceful_disconnect.goaways), self.registry.unbound), (10, set(self.graceful_disconnect.goaways))
        )
        self.assert_finished()

    def test_nobody_is_told_while_the_registry_does_not_answer(self) -> None:
        self.registry.pending_responses = []
        self.start_migration(1000, b=500)
        self.registry.pending_responses[0].callback(None)
        while len(self.registry.pending_responses) < 2:
            self.advance(MIGRATION_INTERVAL)
        self.advance(REGISTRY_STALL_TIMEOUT + 2 * MIGRATION_INTERVAL)
        told = len(self.graceful_disconnect.goaways)
        self.assertTrue(0 < told < 45)
        self.advance(5)
        self.assertEqual(len(self.graceful_disconnect.goaways), told)
        self.registry.pending_responses[1].callback(None)
        self.advance(0.5)
        self.assertGreater(len(self.graceful_disconnect.goaways), told)

    def test_all_are_moved_where_they_should(self) -> None:
        moving = self.start_migration(1000, b=100, c=50)
        self.assertEqual(moving.remaining, 150)
        self.advance(3.5)
        self.assertEqual(self.graceful_disconnect.destinations(), {"ws://b": 100, "ws://c": 50})
        for client_id, (_, reason, url) in self.graceful_disconnect.goaways.items():
            self.assertEqual(reason, "rebalance")
            self.assertIn(url, (connect_url("ws://b", client_id), connect_url("ws://c", client_id)))
        self.assertEqual((moving.remaining, moving.migrated, self.metrics.rebalanced), (0, 150, 150))
        self.assert_finished()

    def test_evenly(self) -> None:
        """No more in any tenth of a second than its share, and the whole in the time that the rate gives."""
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

    def test_a_fraction_a_second(self) -> None:
        self.start_migration(5, 0.25, b=3)
        self.advance(13)
        times = [at - 1000 for at, _, _ in self.graceful_disconnect.goaways.values()]
        self.assertEqual([round(at) for at in times], [0, 4, 8])
        self.assert_finished()

    def test_thousands_a_second(self) -> None:
        self.start_migration(9000, 4000, b=8000)
        self.advance(2.5)
        self.assertEqual(self.graceful_disconnect.destinations(), {"ws://b": 8000})
        self.assertLessEqual(max(size for size, _ in self.registry.assign_requests), MAX_ASSIGN_BATCH)

    def test_those_with_calls_go_last(self) -> None:
        self.calls.update(f"c-{number}" for number in range(60))
        self.start_migration(100, b=50)
        self.advance(2)
        self.assertEqual(len(self.graceful_disconnect.goaways), 50)
        busy = [client_id for client_id in self.graceful_disconnect.goaways if self.calls[client_id]]
        self.assertEqual((len(busy), set(list(self.graceful_disconnect.goaways)[40:]) >= set(busy)), (10, True))

    def test_others_stand_in_for_those_that_were_moved_a_short_time_ago(self) -> None:
        self.registry.recently_assigned.update(f"c-{number}" for number in range(80))
        self.start_migration(100, b=15)
        # Whom it asks for is random; by now it has asked for all.
        self.advance(100 * ASSIGN_RETRY_DELAY + 1)
        self.assertEqual(set(self.graceful_disconnect.goaways) & {f"c-{number}" for number in range(80)}, set())
        self.assertEqual(len(self.graceful_disconnect.goaways), 15)
        self.assert_finished()

    def test_nobody_can_be_moved(self) -> None:
        """The registry is asked a few times a second, and each client once."""
        self.registry.recently_assigned.update(f"c-{number}" for number in range(300))
        self.start_migration(300, b=100)
        self.advance(1)
        self.assertTrue(2 <= len(self.registry.assign_requests) <= 5)
        self.advance(2)
        self.assertEqual(
            (self.graceful_disconnect.goaways, sum(size for size, _ in self.registry.assign_requests)), ({}, 300)
        )
        self.assert_finished()

    def test_one_that_leaves_before_it_is_told(self) -> None:
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

    def test_one_that_was_told_already(self) -> None:
        self.goaway_sent = {"c-0", "c-1"}
        self.calls["c-1"] = 1
        self.start_migration(3, b=3)
        self.advance(1)
        self.assertEqual((self.registry.assign_requests, set(self.graceful_disconnect.goaways)), ([(1, "b")], {"c-2"}))
        self.assert_finished()

    def test_nobody_is_here(self) -> None:
        self.start_migration(0, b=1)
        self.advance(1)
        self.assertEqual(self.registry.assign_requests, [])
        self.assert_finished()

    def test_a_registry_that_is_away(self) -> None:
        self.registry.unavailable = True
        self.start_migration(100, b=50)
        self.advance(1)
        self.assertEqual(self.graceful_disconnect.goaways, {})
        self.assert_finished(complete=False)

    def test_a_registry_that_goes_away(self) -> None:
        """Those that are placed still go."""
        self.start_migration(1000, b=500)
        self.advance(2)
        self.registry.unavailable = True
        self.advance(3)
        self.assertEqual(len(self.graceful_disconnect.goaways), sum(size for size, _ in self.registry.assign_requests))
        self.assert_finished(complete=False)

    def test_a_node_that_has_no_room_or_does_not_answer(self) -> None:
        for answer in (False, PeerUnreachableError("silent")):
            self.setUp()
            self.peer_client.has_room_results["b"] = answer
            self.start_migration(1000, b=100, c=50)
            self.advance(3)
            self.assertEqual(self.graceful_disconnect.destinations(), {"ws://c": 50})
            self.assert_finished(complete=False)

    def test_a_node_that_is_gone_in_the_middle(self) -> None:
        self.start_migration(1000, b=200, c=100)
        self.advance(2)
        before = self.graceful_disconnect.destinations()["ws://b"]
        del self.nodes["b"]
        self.advance(5)
        self.assertEqual(self.graceful_disconnect.destinations(), {"ws://b": before, "ws://c": 100})
        self.assert_finished(complete=False)

    def test_it_ends_when_it_should_not_go_on(self) -> None:
        self.start_migration(1000, b=200)
        self.advance(1)
        self.has_excess = False
        told = len(self.graceful_disconnect.goaways)
        self.advance(5)
        self.assertEqual(len(self.graceful_disconnect.goaways), told)
        self.assert_finished()

    def test_stop(self) -> None:
        self.registry.pending_responses = []
        moving = self.start_migration(1000, b=200)
        moving.stop()
        self.registry.pending_responses.pop().callback(None)
        self.advance(5)
        moving.stop()
        self.assertEqual((self.graceful_disconnect.goaways, self.finished, self.clock.getDelayedCalls()), ({}, [], []))

    def test_a_slow_registry_slows_it_down_and_nothing_is_made_up_for(self) -> None:
        self.registry.pending_responses = []
        self.start_migration(1000, b=200)
        self.advance(10)
        self.assertEqual((self.graceful_disconnect.goaways, len(self.registry.pending_responses)), ({}, 1))
        self.registry.pending_responses.pop().callback(None)
        self.advance(2 * MIGRATION_INTERVAL)
        self.assertLessEqual(len(self.graceful_disconnect.goaways), 4 * MIGRATION_INTERVAL * 50 + 1)

    def test_what_takes_too_long_is_given_up(self) -> None:
        self.start_migration(1000, 0.1, b=100)
        self.clock.pump([1.0] * round(MIGRATION_TIMEOUT + 1))
        self.assertTrue(50 < len(self.graceful_disconnect.goaways) < 62)
        self.assert_finished(complete=False)

    def test_an_error_ends_it(self) -> None:
        self.peer_client.has_room_results["b"] = Deferred()
        self.start_migration(10, b=5)
        self.peer_client.has_room_results["b"].errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_finished(complete=False)
