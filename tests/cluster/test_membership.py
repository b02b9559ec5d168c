"""Tests of gateway.cluster.membership."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.membership import OUTAGE_HEARTBEATS, REAP_BATCH_SIZE, Membership, NodeDirectory
from gateway.metrics import Metrics
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import NodeInfo, NodeStatus
from gateway.registry.memory import MemoryRegistry
from tests.fakes.cluster import node_status
from tests.fakes.rpc import FakeMembership

LEASE, HEARTBEAT = 15.0, 5.0


class FakeRegistry:
    """Responds as the test says, and records the requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, ...]] = []
        self.heartbeats: list[Deferred[bool]] = []
        self.result: Any = True
        self.reap_results: list[int] = []
        self.leave_result: Any = None
        self.is_clock_steady = True

    def clock_is_steady(self) -> bool:
        return self.is_clock_steady

    def join(self, info: NodeInfo) -> Deferred[None]:
        self.requests.append(("join", info.name))
        return fail(self.result) if isinstance(self.result, Exception) else succeed(None)

    def heartbeat(self, state: str, clients: int) -> Deferred[bool]:
        self.requests.append(("heartbeat", state, clients))
        if self.result is None:
            self.heartbeats.append(Deferred())
            return self.heartbeats[-1]
        return fail(self.result) if isinstance(self.result, Exception) else succeed(self.result)

    def reap(self, limit: int) -> Deferred[int]:
        self.requests.append(("reap", limit))
        if isinstance(self.result, Exception):
            return fail(self.result)
        return succeed(self.reap_results.pop(0) if self.reap_results else 0)

    def leave(self) -> Deferred[None]:
        self.requests.append(("leave",))
        return fail(self.leave_result) if isinstance(self.leave_result, Exception) else succeed(None)

    def count(self, kind: str) -> int:
        return sum(each[0] == kind for each in self.requests)


INFO = NodeInfo("a" * 36, "a", "ws://a", "ws://a", 10)


class MembershipTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.registry = FakeRegistry()
        self.state: Any = ("up", 3)
        self.reclaims: list[Deferred[None]] = []
        self.membership = self.make(self.registry)

    def make(self, registry: Any) -> Membership:
        return Membership(
            registry,
            self.clock,
            lease=LEASE,
            heartbeat=HEARTBEAT,
            metrics=self.metrics,
            status=lambda: self.state,
            reclaim=self.reclaim,
            monotonic=self.clock.seconds,
        )

    def reclaim(self) -> Deferred[None]:
        self.reclaims.append(Deferred())
        return self.reclaims[-1]

    def start(self) -> None:
        self.successResultOf(self.membership.start(INFO))

    def advance(self, seconds: float) -> None:
        """Advance the clock in steps of one second."""
        self.clock.pump([1.0] * int(seconds))

    def test_all_is_false_before_the_start(self) -> None:
        membership = self.membership
        self.assertFalse(membership.has_lease() or membership.is_stable() or membership.ownership_uncertain())
        self.successResultOf(membership.stop())
        self.assertEqual(self.registry.requests, [])

    def test_joins_sends_heartbeats_and_leaves(self) -> None:
        self.assertFalse(self.membership.has_lease())
        self.start()
        self.assertTrue(self.membership.has_lease())
        self.clock.advance(HEARTBEAT - 0.1)
        self.assertEqual(self.registry.requests, [("join", "a")])
        self.state = ("draining", 2)
        self.clock.advance(0.1)
        self.clock.advance(HEARTBEAT)
        self.successResultOf(self.membership.stop())
        self.assertFalse(self.membership.has_lease())
        self.clock.advance(100)
        self.assertEqual(self.registry.requests[1:], [("heartbeat", "draining", 2)] * 2 + [("leave",)])

    def test_ownership_uncertain_until_reclaimed(self) -> None:
        self.start()
        self.assertFalse(self.membership.ownership_uncertain())
        self.registry.result = None
        # As if the process had been suspended: no heartbeat failed, and none was written.
        self.clock.advance(HEARTBEAT)
        self.clock.advance(LEASE - HEARTBEAT)
        self.assertTrue(self.membership.ownership_uncertain())
        self.registry.heartbeats[-1].callback(False)
        self.assertTrue(self.membership.has_lease())
        self.assertTrue(self.membership.ownership_uncertain())
        self.reclaims[-1].callback(None)
        self.assertFalse(self.membership.ownership_uncertain())

    def test_ownership_not_uncertain_while_the_registry_is_unavailable(self) -> None:
        self.start()
        self.registry.result = RegistryUnavailableError("away")
        self.advance(2 * LEASE)
        self.assertFalse(self.membership.has_lease())
        self.assertFalse(self.membership.ownership_uncertain())
        # Suspended since.
        self.registry.result = None
        self.clock.advance(OUTAGE_HEARTBEATS * HEARTBEAT + 1)
        self.assertTrue(self.membership.ownership_uncertain())

    def test_failed_start_starts_nothing(self) -> None:
        self.registry.result = RegistryUnavailableError("away")
        self.failureResultOf(self.membership.start(INFO), RegistryUnavailableError)
        self.assertFalse(self.membership.has_lease())
        self.successResultOf(self.membership.stop())
        self.clock.advance(100)
        self.assertEqual(self.registry.requests, [("join", "a")])

    def test_stop_while_joining_leaves_once_joined(self) -> None:
        joined: Deferred[None] = Deferred()
        self.patch(self.registry, "join", lambda info: joined)
        started = self.membership.start(INFO)
        self.successResultOf(self.membership.stop())
        joined.callback(None)
        self.successResultOf(started)
        self.assertEqual(self.registry.requests, [("leave",)])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_one_heartbeat_at_a_time(self) -> None:
        self.start()
        self.registry.result = None
        self.advance(3 * HEARTBEAT)
        self.assertEqual(self.registry.count("heartbeat"), 1)
        self.registry.heartbeats[0].callback(True)
        self.clock.advance(0)
        self.assertEqual(self.registry.count("heartbeat"), 2)  # late already

    def test_stop_waits_for_the_heartbeat_in_flight(self) -> None:
        self.start()
        self.registry.result = None
        self.clock.advance(HEARTBEAT)
        stopped = self.membership.stop()
        self.assertNoResult(stopped)
        self.assertEqual(self.registry.count("leave"), 0)
        self.registry.heartbeats[0].callback(False)
        self.successResultOf(stopped)
        self.assertEqual(self.registry.requests[-1], ("leave",))
        self.assertEqual((self.reclaims, self.clock.getDelayedCalls()), ([], []))

    def test_heartbeat_now_writes_the_current_state(self) -> None:
        self.start()
        self.state = ("draining", 2)
        self.successResultOf(self.membership.heartbeat())
        self.assertEqual(self.registry.requests[1:], [("heartbeat", "draining", 2)])
        self.clock.advance(HEARTBEAT)
        self.assertEqual(self.registry.count("heartbeat"), 2)

    def test_heartbeat_now_waits_for_the_one_in_flight(self) -> None:
        self.start()
        self.registry.result = None
        self.clock.advance(HEARTBEAT)
        self.state = ("draining", 2)
        heartbeat = self.membership.heartbeat()
        self.assertEqual(self.registry.requests[1:], [("heartbeat", "up", 3)])
        self.registry.heartbeats[0].callback(True)
        self.assertEqual(self.registry.requests[2:], [("heartbeat", "draining", 2)])
        self.assertNoResult(heartbeat)
        self.registry.heartbeats[1].callback(True)
        self.successResultOf(heartbeat)

    def test_heartbeat_now_after_stop(self) -> None:
        self.start()
        self.successResultOf(self.membership.stop())
        self.successResultOf(self.membership.heartbeat())
        self.assertEqual(self.registry.count("heartbeat"), 0)

    def test_stop_does_not_fail(self) -> None:
        self.start()
        self.registry.leave_result = RegistryUnavailableError("away")
        self.successResultOf(self.membership.stop())

    def test_lease_starts_before_the_heartbeat_was_sent(self) -> None:
        self.start()
        self.registry.result = None
        self.clock.advance(HEARTBEAT)
        self.clock.advance(9)
        self.assertTrue(self.membership.has_lease())
        self.registry.heartbeats[0].callback(True)  # sent 9 seconds ago
        self.clock.advance(LEASE - 9 - 0.1)
        self.assertTrue(self.membership.has_lease())
        self.clock.advance(0.1)
        self.assertFalse(self.membership.has_lease())

    def test_outage_is_logged_once_each_way(self) -> None:
        self.start()
        with capturedLogs() as events:
            self.registry.result = RegistryUnavailableError("disk is full")
            self.advance(6 * HEARTBEAT)
            self.assertFalse(self.membership.has_lease())
            self.registry.result = True
            self.advance(2 * HEARTBEAT)
        self.assertTrue(self.membership.has_lease())
        self.assertEqual(self.metrics.heartbeat_failures, 6)
        texts = [event["log_format"].format(**event) for event in events]
        self.assertEqual(
            texts,
            [
                "the registry does not answer: disk is full",
                "this node's lease ran out: it takes no clients until the registry answers",
                "the registry answers again, after 30.0 s",
            ],
        )

    def test_unexpected_error_does_not_end_the_heartbeats(self) -> None:
        self.start()
        self.patch(self, "state", None)
        self.advance(HEARTBEAT)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)
        self.state = ("up", 1)
        self.advance(HEARTBEAT)
        self.assertEqual(self.registry.requests[-1], ("heartbeat", "up", 1))

    def test_expired_lease_reclaims_every_session(self) -> None:
        self.start()
        self.registry.result = False
        self.advance(HEARTBEAT)
        self.assertEqual(len(self.reclaims), 1)
        self.registry.result = True
        self.advance(2 * HEARTBEAT)
        self.assertEqual((len(self.reclaims), self.registry.count("heartbeat")), (1, 3))
        self.reclaims[0].callback(None)
        self.advance(HEARTBEAT)
        self.assertEqual(len(self.reclaims), 1)

    def test_failed_reclaim_is_repeated(self) -> None:
        self.start()
        self.registry.result = False
        self.advance(HEARTBEAT)
        self.registry.result = True
        self.reclaims[0].errback(RegistryUnavailableError("away"))
        self.advance(HEARTBEAT)
        self.reclaims[1].errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.advance(HEARTBEAT)
        self.reclaims[2].callback(None)
        self.advance(HEARTBEAT)
        self.assertEqual(len(self.reclaims), 3)

    def test_lease_that_expires_during_a_reclaim_causes_another(self) -> None:
        self.start()
        self.registry.result = False
        self.advance(2 * HEARTBEAT)
        self.assertEqual(len(self.reclaims), 1)
        self.registry.result = True
        self.reclaims[0].callback(None)
        self.advance(HEARTBEAT)
        self.assertEqual(len(self.reclaims), 2)

    def test_reaps_after_one_full_lease(self) -> None:
        self.start()
        self.advance(LEASE - 1)
        self.assertFalse(self.membership.is_stable())
        self.assertEqual(self.registry.count("reap"), 0)
        self.registry.reap_results = [REAP_BATCH_SIZE, REAP_BATCH_SIZE, 7]
        self.advance(1)
        self.assertTrue(self.membership.is_stable())
        self.assertEqual(self.registry.requests[-3:], [("reap", REAP_BATCH_SIZE)] * 3)

    def test_gap_delays_reaping_by_a_full_lease(self) -> None:
        for gap in (RegistryUnavailableError("away"), False):
            membership, self.registry = self.membership, FakeRegistry()
            self.membership = self.make(self.registry)
            self.start()
            self.advance(LEASE)
            self.registry.result = gap
            self.advance(HEARTBEAT)
            self.assertFalse(self.membership.is_stable())
            self.registry.result = True
            before = self.registry.count("reap")
            self.advance(LEASE - 1 if gap is False else LEASE + HEARTBEAT - 1)
            self.assertEqual(self.registry.count("reap"), before)
            self.advance(1)
            self.assertEqual(self.registry.count("reap"), before + 1)
            self.successResultOf(self.membership.stop())
            self.membership = membership

    def test_caller_that_does_not_wait_any_longer(self) -> None:
        """It leaves the heartbeat in flight alone."""
        self.start()
        for wait in (self.membership.heartbeat, self.membership.heartbeat, self.membership.stop):
            self.registry.result = None
            self.advance(HEARTBEAT)
            waiting = wait()
            waiting.addErrback(lambda failure: failure.trap(CancelledError))
            waiting.cancel()
            self.registry.heartbeats.pop(0).callback(True)
            self.assertEqual(self.metrics.heartbeat_failures, 0)
            self.registry.result = True
            self.advance(0)

    def test_step_of_the_database_clock_delays_reaping_by_a_full_lease(self) -> None:
        self.start()
        self.advance(LEASE)
        self.assertTrue(self.membership.is_stable())
        before = self.registry.count("reap")
        self.registry.is_clock_steady = False
        self.advance(HEARTBEAT)
        self.assertFalse(self.membership.is_stable())
        self.registry.is_clock_steady = True
        self.advance(LEASE - 1)
        self.assertEqual(self.registry.count("reap"), before)
        self.advance(1)
        self.assertEqual((self.registry.count("reap"), self.reclaims), (before + 1, []))

    def test_heartbeat_longer_than_a_lease_is_a_gap(self) -> None:
        self.start()
        self.advance(LEASE)
        self.registry.result = None
        self.advance(HEARTBEAT + LEASE)
        self.registry.result = True
        self.registry.heartbeats[0].callback(True)
        self.clock.advance(0)
        self.assertTrue(self.membership.has_lease())
        self.assertFalse(self.membership.is_stable())

    def test_failed_reaping_is_repeated(self) -> None:
        self.start()
        self.advance(LEASE)
        self.patch(self.registry, "reap", lambda limit: fail(RegistryUnavailableError("away")))
        self.advance(HEARTBEAT)
        reaped: list[int] = []
        self.patch(self.registry, "reap", lambda limit: succeed(reaped.append(limit) or 0))
        self.advance(HEARTBEAT)
        self.assertEqual(reaped, [REAP_BATCH_SIZE])

    def test_log_levels(self) -> None:
        self.start()
        with capturedLogs() as events:
            self.registry.result = RegistryUnavailableError("away")
            self.advance(4 * HEARTBEAT)
        self.assertEqual([event["log_level"] for event in events], [LogLevel.warn, LogLevel.error])


class SharedRegistryTests(SynchronousTestCase):
    """Two nodes with the same registry."""

    def test_killed_node_is_reaped_by_the_other(self) -> None:
        clock = Clock()
        first = MemoryRegistry(clock, LEASE)
        registries = [first, MemoryRegistry(clock, LEASE, shared_with=first)]
        members = []
        for name, registry in zip("ab", registries, strict=True):
            self.successResultOf(registry.open())
            membership = Membership(
                registry,
                clock,
                lease=LEASE,
                heartbeat=HEARTBEAT,
                metrics=Metrics(),
                status=lambda: ("up", 1),
                reclaim=lambda: succeed(None),
                monotonic=clock.seconds,
            )
            self.successResultOf(membership.start(NodeInfo(name * 36, name, f"ws://{name}", f"ws://{name}", 10)))
            registry.claim(f"client-of-{name}", "h:1")
            members.append(membership)
        clock.pump([1.0] * 20)
        killed = members[0]._timer
        assert killed is not None
        killed.cancel()
        clock.pump([1.0] * 30)
        found = self.successResultOf(registries[1].clients("", 10))
        self.assertEqual([each.client_id for each in found], ["client-of-b"])
        self.assertEqual([node.name for node in self.successResultOf(registries[1].nodes())], ["b"])
        self.successResultOf(members[1].stop())
        self.assertEqual(self.successResultOf(registries[0].nodes()), [])


class FakeNodeRegistry:
    """Lists the nodes that the test says."""

    def __init__(self) -> None:
        self.result: Any = []
        self.reads = 0

    def nodes(self) -> Deferred[list[NodeStatus]]:
        self.reads += 1
        if isinstance(self.result, Deferred):
            return self.result
        return fail(self.result) if isinstance(self.result, Exception) else succeed(self.result)


class NodeDirectoryTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.registry = FakeNodeRegistry()
        self.membership = FakeMembership()
        self.seen: list[list[str]] = []
        self.gone: list[str] = []
        self.peer_url = "ws://a:81"
        self.node_directory = NodeDirectory(
            self.registry,
            "a",
            self.membership,
            on_node_down=self.gone.append,
            on_nodes_changed=lambda nodes: self.seen.append(sorted(node.node_id for node in nodes)),
            peer_url=lambda: self.peer_url,
        )

    def refresh(self, *names: str) -> None:
        self.registry.result = [node_status(name) for name in names]
        self.successResultOf(self.node_directory.refresh())

    def test_other_nodes(self) -> None:
        self.refresh("a", "b", "c")
        self.assertEqual(self.seen, [["b", "c"]])
        self.assertEqual(
            (len(self.node_directory), self.node_directory.peer_nodes()), (2, [node_status("b"), node_status("c")])
        )
        self.assertEqual((self.node_directory.find("b"), self.node_directory.find("a")), (node_status("b"), None))

    def test_node_with_a_url_of_its_own(self) -> None:
        self.refresh("a", "b", "c")
        for node_id, public_url, own in (
            ("b", "ws://b", True),
            ("unknown", "ws://unknown", True),
            ("b", "ws://c", False),
            ("b", "", False),
        ):
            self.assertEqual(self.node_directory.has_own_url(node_id, public_url), own)

    def test_nodes_with_this_nodes_peer_url(self) -> None:
        """They are ignored, and reported once: joining has ended the lease of a node that was there before."""
        self.peer_url = node_status("b").peer_url
        with capturedLogs() as logs:
            self.refresh("a", "b", "c")
            self.refresh("a", "b", "c")
        self.assertEqual((self.seen, self.gone), ([["c"], ["c"]], []))
        self.assertEqual((len(self.node_directory), self.node_directory.find("b")), (1, None))
        texts = [log["log_format"].format(**log) for log in logs if log["log_level"] is LogLevel.error]
        self.assertEqual(len(texts), 1)
        self.assertIn("node b has the same --peer-url as this node", texts[0])
        self.refresh("a", "c")
        with capturedLogs() as logs:
            self.refresh("a", "b", "c")
        self.assertEqual(len(logs), 1)

    def test_unstable_node_and_a_node_that_was_restarted(self) -> None:
        """The new node has ended the lease of the old one, at the same address."""
        self.membership.stable = False
        self.refresh("b", "c")
        self.registry.result = [attrs.evolve(node_status("b"), node_id="b2")]
        self.successResultOf(self.node_directory.refresh())
        self.assertEqual((self.seen[-1], self.gone), (["b2", "c"], ["b"]))

    def test_nodes_that_are_gone(self) -> None:
        self.refresh("a", "b", "c")
        self.refresh("a", "c")
        self.refresh("a", "c")
        self.assertEqual((self.gone, self.seen), (["b"], [["b", "c"], ["c"], ["c"]]))

    def test_unstable_node_declares_no_node_dead(self) -> None:
        self.refresh("b")
        self.membership.stable = False
        self.refresh("c")
        self.assertEqual((self.gone, self.seen[-1]), ([], ["b", "c"]))
        self.membership.stable = True
        self.refresh("c")
        self.assertEqual((self.gone, self.seen[-1]), (["b"], ["c"]))

    def test_unavailable_registry_changes_nothing(self) -> None:
        self.refresh("b")
        self.registry.result = RegistryUnavailableError("away")
        self.successResultOf(self.node_directory.refresh())
        self.assertEqual((self.seen, len(self.node_directory)), ([["b"]], 1))

    def test_refreshes_again_after_an_unexpected_error(self) -> None:
        self.registry.result = ZeroDivisionError()
        self.successResultOf(self.node_directory.refresh())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.refresh("b")
        self.assertEqual(len(self.node_directory), 1)

    def test_one_refresh_at_a_time(self) -> None:
        self.registry.result = waiting = Deferred()
        refreshes = [self.node_directory.refresh(), self.node_directory.refresh()]
        self.assertEqual(self.registry.reads, 1)
        waiting.callback([node_status("b")])
        for refresh in refreshes:
            self.successResultOf(refresh)
        self.refresh("b")
        self.assertEqual(self.registry.reads, 2)

    def test_least_loaded_counts_its_results_until_refreshed(self) -> None:
        self.registry.result = [
            node_status("b", clients=98),
            node_status("c", clients=96),
            node_status("d", state="draining"),
            node_status("e", clients=100),
        ]
        self.successResultOf(self.node_directory.refresh())
        chosen = [node and node.node_id for node in (self.node_directory.least_loaded() for _ in range(7))]
        self.assertEqual((chosen[:2], sorted(chosen[2:6])), (["c", "c"], ["b", "b", "c", "c"]))
        self.assertIsNone(chosen[6])
        self.successResultOf(self.node_directory.refresh())
        self.assertIsNotNone(self.node_directory.least_loaded())
