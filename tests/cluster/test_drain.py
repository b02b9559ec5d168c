"""The drain: who is told what, and when.

Sending clients away: what they are told, and when they are closed.

Tests of gateway.cluster.drain.

The last calls of a node that ends.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.drain import (
    BACKEND_GRACE_PERIOD,
    MAX_RECONNECT_DELAY,
    MAX_RECONNECT_DELAY_UNPACED,
    POLL_INTERVAL,
    RELAY_CLOSE_TIMEOUT,
    BackendDrain,
    GracefulDisconnect,
    RelayDrain,
    SessionDrain,
)
from gateway.cluster.errors import PeerUnreachableError
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location
from gateway.rpc.handoff import HANDOFF_TIMEOUT
from tests.fakes.cluster import FakeCallTracker, FakeNodeDirectory, FakePeerClient, location
from tests.fakes.sessions import FakeClientSessions


def without_calls(sessions: FakeClientSessions, clock: Clock) -> GracefulDisconnect:
    """Nobody has a call."""
    return GracefulDisconnect(
        sessions,
        clock,
        calls=FakeCallTracker(),
        registry=sessions,
        node_directory=FakeNodeDirectory(),
        max_call_timeout=60,
    )


class SessionDrainTests(SynchronousTestCase):
    def start_drain(self, count: int, duration: float = 10, calls: tuple[str, ...] = ()) -> Deferred[None]:
        self.clock = Clock()
        self.sessions = FakeClientSessions(self.clock, count)
        self.calls = Counter(calls)
        self.tracker = FakeCallTracker(lambda client_id, generation: self.calls[client_id])
        self.graceful_disconnect = GracefulDisconnect(
            self.sessions,
            self.clock,
            calls=self.tracker,
            registry=self.sessions,
            node_directory=FakeNodeDirectory(),
            max_call_timeout=60,
        )
        return SessionDrain(
            self.sessions,
            self.clock,
            duration,
            graceful_disconnect=self.graceful_disconnect,
            url_for=lambda one: None if one == "c-1" else f"ws://x/{one}",
        ).start()

    def advance(self, seconds: float) -> None:
        self.clock.pump([POLL_INTERVAL] * round(seconds / POLL_INTERVAL))

    def test_nobody_here_ends_at_once(self) -> None:
        self.successResultOf(self.start_drain(0))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_one_client_goes_at_once(self) -> None:
        drained = self.start_drain(1)
        self.advance(2 * POLL_INTERVAL)
        self.successResultOf(drained)
        self.assertEqual(self.sessions.goaways["c-0"]["method"], "gateway.goaway")
        params = self.sessions.goaways["c-0"]["params"]
        self.assertEqual((params["reason"], params["url"]), ("drain", "ws://x/c-0"))
        self.assertTrue(0 <= params["after"] <= MAX_RECONNECT_DELAY)
        self.assertEqual(self.sessions.closed["c-0"][1], 1012)

    def test_a_node_that_does_not_know_its_url_names_none(self) -> None:
        self.start_drain(2, duration=0)
        self.assertEqual(set(self.sessions.goaways["c-1"]["params"]), {"reason", "after"})
        self.assertEqual(set(self.sessions.goaways["c-0"]["params"]), {"reason", "url", "after"})

    def test_closes_are_spread_evenly(self) -> None:
        drained = self.start_drain(1000)
        self.advance(11)
        self.successResultOf(drained)
        tenths = Counter(min(9, int(at)) for at, _ in self.sessions.closed.values())
        self.assertEqual(sum(tenths.values()), 1000)
        self.assertEqual(set(tenths), set(range(10)))
        self.assertLess(max(tenths.values()), 120)

    def test_calls_in_flight_end_first(self) -> None:
        drained = self.start_drain(2, calls=("c-0", "c-1"))
        self.advance(9)
        self.assertEqual(set(self.sessions.goaways), {"c-0", "c-1"})
        self.assertEqual({begun[0] for begun in self.tracker.goaways_begun}, {"c-0", "c-1"})
        self.assertEqual(self.sessions.closed, {})
        self.calls["c-1"] = 0
        self.advance(2 * POLL_INTERVAL)
        self.assertEqual(set(self.sessions.closed), {"c-1"})
        self.assertNoResult(drained)
        self.advance(50)
        self.assertNoResult(drained)
        self.calls["c-0"] = 0
        self.advance(2 * POLL_INTERVAL)
        self.assertEqual(set(self.sessions.closed), {"c-0", "c-1"})
        self.successResultOf(drained)

    def test_a_call_that_does_not_end_in_time(self) -> None:
        drained = self.start_drain(1, calls=("c-0",))
        self.advance(60 + 3 * POLL_INTERVAL)
        self.assertEqual(set(self.sessions.closed), {"c-0"})
        self.successResultOf(drained)

    def test_one_that_was_told_to_go_before(self) -> None:
        """It is waited for, but not told again."""
        drained = self.start_drain(0, calls=("c-0",))
        self.successResultOf(drained)
        self.sessions.connected.add("c-0")
        self.graceful_disconnect.send_goaway("c-0", "rebalance", None)
        drained = SessionDrain(
            self.sessions, self.clock, 0, graceful_disconnect=self.graceful_disconnect, url_for=lambda _: None
        ).start()
        self.advance(10)
        self.assertNoResult(drained)
        self.calls.clear()
        self.advance(1)
        self.successResultOf(drained)

    def test_it_waits_until_all_are_known_to_be_elsewhere(self) -> None:
        clock = Clock()
        edge, on_their_way = FakeClientSessions(clock, 2), [2]
        farewells = without_calls(edge, clock)
        drained = SessionDrain(
            edge, clock, 1, graceful_disconnect=farewells, handoffs=lambda: on_their_way[0], url_for=lambda _: None
        ).start()
        clock.pump([POLL_INTERVAL] * 40)
        self.assertEqual(len(edge.closed), 2)
        self.assertNoResult(drained)
        on_their_way[0] = 0
        clock.pump([POLL_INTERVAL] * 2)
        self.successResultOf(drained)

    def test_clients_of_a_lone_node_come_back_when_it_has_ended(self) -> None:
        clock = Clock()
        edge = FakeClientSessions(clock, 100)
        SessionDrain(
            edge,
            clock,
            10,
            graceful_disconnect=without_calls(edge, clock),
            is_single_node=lambda: True,
            url_for=lambda one: f"ws://x/{one}",
        ).start()
        clock.pump([POLL_INTERVAL] * round(11 / POLL_INTERVAL))
        for client_id, (at, _) in edge.closed.items():
            after = edge.goaways[client_id]["params"]["after"]
            self.assertTrue(9.99 <= at + after <= 10.01 + 2 * POLL_INTERVAL + MAX_RECONNECT_DELAY, (at, after))

    def test_no_time_at_all(self) -> None:
        drained = self.start_drain(100, duration=0)
        self.advance(2 * POLL_INTERVAL)
        self.assertEqual(len(self.sessions.closed), 100)
        self.successResultOf(drained)
        waits = [goaway["params"]["after"] for goaway in self.sessions.goaways.values()]
        self.assertTrue(MAX_RECONNECT_DELAY < max(waits) <= MAX_RECONNECT_DELAY_UNPACED)

    def test_relayed_clients_are_ended_among_the_others(self) -> None:
        clock, edge = Clock(), FakeClientSessions(Clock(), 50)
        relayed = {f"r-{i}": 0.0 for i in range(50)}
        there = set(relayed)

        def end(client_id: str) -> None:
            relayed[client_id] = clock.seconds()
            there.discard(client_id)

        drained = SessionDrain(
            edge,
            clock,
            10,
            graceful_disconnect=without_calls(edge, clock),
            url_for=lambda _: None,
            relayed_client_ids=lambda: list(there),
            drain_relay=end,
        ).start()
        clock.pump([POLL_INTERVAL] * round(5 / POLL_INTERVAL))
        self.assertTrue(10 < len(there) < 40 and 10 < edge.count() < 40)
        clock.pump([POLL_INTERVAL] * round(6 / POLL_INTERVAL))
        self.assertEqual((there, edge.count()), (set(), 0))
        self.successResultOf(drained)

    def test_a_relay_that_does_not_end_is_ended_again(self) -> None:
        clock, asked = Clock(), []
        edge = FakeClientSessions(clock, 0)
        drained = SessionDrain(
            edge,
            clock,
            1,
            graceful_disconnect=without_calls(edge, clock),
            url_for=lambda _: None,
            relayed_client_ids=lambda: ["r"] if len(asked) < 3 else [],
            drain_relay=asked.append,
        ).start()
        clock.pump([POLL_INTERVAL] * round(2 / POLL_INTERVAL))
        self.assertEqual(asked, ["r"] * 3)
        self.successResultOf(drained)

    def test_a_client_that_leaves_by_itself(self) -> None:
        drained = self.start_drain(2)
        self.sessions.connected.clear()
        self.advance(6)
        self.successResultOf(drained)

    def test_a_client_that_was_still_opening(self) -> None:
        drained = self.start_drain(2)
        self.sessions.connected.add("late")
        self.advance(5 + 3 * POLL_INTERVAL)
        self.assertIn("late", self.sessions.closed)
        self.successResultOf(drained)

    def test_a_registry_that_is_away_does_not_stop_it(self) -> None:
        drained = self.start_drain(3)
        self.sessions.registry_unavailable = True
        self.advance(11)
        self.successResultOf(drained)
        self.flushLoggedErrors()


class GracefulDisconnectTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.sessions = FakeClientSessions(self.clock, 3)
        self.calls: Counter[tuple[str, int]] = Counter()
        self.tracker = FakeCallTracker(lambda *session: self.calls[session])
        self.node_directory = FakeNodeDirectory()
        self.graceful_disconnect = GracefulDisconnect(
            self.sessions,
            self.clock,
            calls=self.tracker,
            registry=self.sessions,
            node_directory=self.node_directory,
            max_call_timeout=60,
        )

    def advance(self, seconds: float) -> None:
        self.clock.pump([POLL_INTERVAL] * round(seconds / POLL_INTERVAL))

    def test_one_without_calls(self) -> None:
        self.assertTrue(self.graceful_disconnect.send_goaway("c-0", "rebalance", "ws://x/c-0"))
        goaway = self.sessions.goaways["c-0"]
        self.assertEqual(goaway["method"], "gateway.goaway")
        self.assertTrue(0 <= goaway["params"].pop("after") <= MAX_RECONNECT_DELAY)
        self.assertEqual(goaway["params"], {"reason": "rebalance", "url": "ws://x/c-0"})
        self.assertEqual(self.tracker.goaways_begun, [("c-0", 1, False)])
        self.assertEqual(self.sessions.closed, {"c-0": (0.0, 1012)})
        self.assertEqual((len(self.graceful_disconnect), self.clock.getDelayedCalls()), (0, []))

    def test_no_url(self) -> None:
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertNotIn("url", self.sessions.goaways["c-0"]["params"])

    def test_one_that_is_not_here(self) -> None:
        self.assertFalse(self.graceful_disconnect.send_goaway("nobody", "drain", None))
        self.assertEqual((self.tracker.goaways_begun, self.sessions.goaways), ([], {}))

    def test_calls_are_waited_for(self) -> None:
        self.calls["c-0", 1] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertEqual(self.graceful_disconnect.goaway_sent("c-0"), 1)
        self.assertFalse(self.graceful_disconnect.send_goaway("c-0", "drain", None))
        self.advance(59)
        self.assertEqual(self.sessions.closed, {})
        self.calls.clear()
        self.advance(2 * POLL_INTERVAL)
        self.assertEqual(self.sessions.closed["c-0"][1], 1012)
        self.assertEqual((self.graceful_disconnect.goaway_sent("c-0"), self.clock.getDelayedCalls()), (0, []))

    def test_calls_are_not_waited_for_for_ever(self) -> None:
        self.calls["c-0", 1] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.advance(60 + POLL_INTERVAL)
        self.assertIn("c-0", self.sessions.closed)

    def test_a_newer_connection_is_spared(self) -> None:
        """It came back to this node meanwhile."""
        self.calls["c-0", 1] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.sessions.generations["c-0"] = 2
        self.calls.clear()
        self.advance(1)
        self.assertEqual((self.sessions.closed, len(self.graceful_disconnect)), ({}, 0))

    def test_a_newer_connection_is_told_on_its_own(self) -> None:
        self.calls["c-0", 1] = self.calls["c-0", 2] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.sessions.generations["c-0"] = 2
        self.assertTrue(self.graceful_disconnect.send_goaway("c-0", "drain", None))
        self.calls["c-0", 2] = 0
        self.advance(1)
        self.assertIn("c-0", self.sessions.closed)

    def test_a_registry_that_is_away(self) -> None:
        self.sessions.registry_unavailable = True
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertIn("c-0", self.sessions.closed)

    def test_its_row_stays_for_a_moment_where_there_is_another_node(self) -> None:
        self.node_directory.single = False
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertEqual(self.tracker.goaways_begun, [("c-0", 1, True)])
        self.assertEqual((self.sessions.closed["c-0"][1], self.sessions.kept_rows), (1012, {("c-0", 1)}))
        self.advance(HANDOFF_TIMEOUT / 2)
        self.graceful_disconnect.send_goaway("c-1", "drain", None)
        self.advance(HANDOFF_TIMEOUT / 2 + POLL_INTERVAL)
        self.assertEqual(self.sessions.kept_rows, {("c-1", 1)})
        self.advance(HANDOFF_TIMEOUT)
        self.assertEqual((self.sessions.kept_rows, self.clock.getDelayedCalls()), (set(), []))

    def test_a_row_that_cannot_be_removed(self) -> None:
        self.node_directory.single, self.sessions.registry_unavailable = False, True
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.advance(HANDOFF_TIMEOUT + POLL_INTERVAL)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop(self) -> None:
        self.graceful_disconnect.stop()
        self.calls["c-0", 1] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.graceful_disconnect.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class FakeRegistry:
    """Finds what the test says."""

    def __init__(self) -> None:
        self.result: Any = location()

    def find(self, client_id: str) -> Deferred[Location | None]:
        return fail(self.result) if isinstance(self.result, Exception) else succeed(self.result)


class RelayDrainTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.peer_client = FakePeerClient()
        self.registry = FakeRegistry()
        self.closed_relays: list[str] = []
        self.relay_drain = RelayDrain(
            registry=self.registry,  # type: ignore[arg-type]
            peer_client=self.peer_client,
            clock=self.clock,
            close_relay=self.closed_relays.append,
            max_call_timeout=10.0,
        )

    def test_closed_by_its_node_and_cut_if_that_takes_too_long(self) -> None:
        self.relay_drain.drain("a")
        self.relay_drain.drain("a")
        self.assertEqual((self.peer_client.closed, self.closed_relays), ([(location(), 1012, "drain")], []))
        self.clock.advance(10.0)
        self.assertEqual(self.closed_relays, [])
        self.clock.advance(RELAY_CLOSE_TIMEOUT)
        self.assertEqual(self.closed_relays, ["a"])
        self.relay_drain.drain("a")
        self.assertEqual(len(self.peer_client.closed), 2)

    def test_cut_at_once_if_nobody_can_close_it(self) -> None:
        for found, here in (
            (RegistryUnavailableError("away"), True),
            (None, True),
            (location(), False),
            (location(), PeerUnreachableError("silent")),
        ):
            self.registry.result, self.peer_client.result = found, here
            self.relay_drain.drain("a")
        self.assertEqual(self.closed_relays, ["a"] * 4)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_an_error_is_logged(self) -> None:
        self.peer_client.result = ZeroDivisionError()
        self.relay_drain.drain("a")
        self.assertEqual(self.closed_relays, ["a"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class BackendDrainTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.calls = 0
        self.backends = 0
        self.seen: list[object] = []

    def start_drain(self) -> Deferred[None]:
        last = BackendDrain(
            self.clock,
            max_call_timeout=10.0,
            refuse_new_calls=lambda: self.seen.append("refuse"),
            in_flight=lambda: self.calls,
            send_to_backends=self.send_to_backends,
        )
        return Deferred.fromCoroutine(last.run())

    def send_to_backends(self, message: bytes) -> int:
        self.seen.append(json.loads(message))
        return self.backends

    def test_none(self) -> None:
        self.successResultOf(self.start_drain())
        goaway = {"jsonrpc": "2.0", "method": "gateway.goaway", "params": {"reason": "drain"}}
        self.assertEqual(self.seen, [goaway, "refuse"])

    def test_those_in_flight_are_waited_for(self) -> None:
        self.calls = 2
        over = self.start_drain()
        self.clock.pump([POLL_INTERVAL] * 20)
        self.assertNoResult(over)
        self.calls = 0
        self.clock.advance(POLL_INTERVAL)
        self.successResultOf(over)

    def test_not_for_ever(self) -> None:
        self.calls = 1
        over = self.start_drain()
        self.clock.pump([POLL_INTERVAL] * 199)
        self.assertNoResult(over)
        self.clock.pump([POLL_INTERVAL] * 2)
        self.successResultOf(over)

    def test_backends_have_a_moment_for_going(self) -> None:
        """What they send until they have read it is answered; what they send then is refused for a while."""
        self.backends = 1
        over = self.start_drain()
        self.clock.advance(BACKEND_GRACE_PERIOD - 0.01)
        self.assertEqual(len(self.seen), 1)
        self.clock.advance(0.01)
        self.assertEqual(self.seen[1], "refuse")
        self.clock.advance(BACKEND_GRACE_PERIOD - 0.01)
        self.assertNoResult(over)
        self.clock.advance(0.01)
        self.successResultOf(over)
