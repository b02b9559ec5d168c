"""Tests of gateway.cluster.drain."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.errors import VerificationError
from gateway.auth.interface import AuthMethod, Identity
from gateway.auth.tickets import Tickets
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
from gateway.cluster.routing import Destination
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location, SessionKey
from gateway.rpc.handoff import HANDOFF_TIMEOUT
from tests.fakes.cluster import FakeCallTracker, FakeNodeDirectory, FakePeerClient, location
from tests.fakes.sessions import FakeClientSessions


def without_calls(sessions: FakeClientSessions, clock: Clock) -> GracefulDisconnect:
    """A disconnect without calls in flight."""
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
        self.tracker = FakeCallTracker(lambda key: self.calls[key.client_id])
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
            destination_for=lambda client_id: None if client_id == "c-1" else Destination(f"ws://x/{client_id}"),
        ).start()

    def advance(self, seconds: float) -> None:
        self.clock.pump([POLL_INTERVAL] * round(seconds / POLL_INTERVAL))

    def test_no_client_finishes_at_once(self) -> None:
        self.successResultOf(self.start_drain(0))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_first_client_is_sent_away_at_once(self) -> None:
        drained = self.start_drain(1)
        self.advance(2 * POLL_INTERVAL)
        self.successResultOf(drained)
        self.assertEqual(self.sessions.goaways["c-0"]["method"], "gateway.goaway")
        params = self.sessions.goaways["c-0"]["params"]
        self.assertEqual((params["reason"], params["url"]), ("drain", "ws://x/c-0"))
        self.assertTrue(0 <= params["after"] <= MAX_RECONNECT_DELAY)
        self.assertEqual(self.sessions.closed["c-0"][1], 1012)

    def test_no_url_without_a_public_url(self) -> None:
        self.start_drain(2, duration=0)
        self.assertEqual(set(self.sessions.goaways["c-1"]["params"]), {"reason", "after"})
        self.assertEqual(set(self.sessions.goaways["c-0"]["params"]), {"reason", "url", "after"})

    def test_goaways_are_spread_evenly(self) -> None:
        drained = self.start_drain(1000)
        self.advance(11)
        self.successResultOf(drained)
        tenths = Counter(min(9, int(at)) for at, _ in self.sessions.closed.values())
        self.assertEqual(sum(tenths.values()), 1000)
        self.assertEqual(set(tenths), set(range(10)))
        self.assertLess(max(tenths.values()), 120)

    def test_closes_after_calls_in_flight(self) -> None:
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

    def test_call_that_exceeds_its_time(self) -> None:
        drained = self.start_drain(1, calls=("c-0",))
        self.advance(60 + 3 * POLL_INTERVAL)
        self.assertEqual(set(self.sessions.closed), {"c-0"})
        self.successResultOf(drained)

    def test_client_that_was_sent_a_goaway_before(self) -> None:
        """The drain waits for it, without another goaway."""
        drained = self.start_drain(0, calls=("c-0",))
        self.successResultOf(drained)
        self.sessions.connected.add("c-0")
        self.graceful_disconnect.send_goaway("c-0", "rebalance", None)
        drained = SessionDrain(
            self.sessions, self.clock, 0, graceful_disconnect=self.graceful_disconnect, destination_for=lambda _: None
        ).start()
        self.advance(10)
        self.assertNoResult(drained)
        self.calls.clear()
        self.advance(1)
        self.successResultOf(drained)

    def test_waits_for_handoffs(self) -> None:
        clock = Clock()
        sessions, handoffs = FakeClientSessions(clock, 2), [2]
        graceful_disconnect = without_calls(sessions, clock)
        drained = SessionDrain(
            sessions,
            clock,
            1,
            graceful_disconnect=graceful_disconnect,
            handoffs=lambda: handoffs[0],
            destination_for=lambda _: None,
        ).start()
        clock.pump([POLL_INTERVAL] * 40)
        self.assertEqual(len(sessions.closed), 2)
        self.assertNoResult(drained)
        handoffs[0] = 0
        clock.pump([POLL_INTERVAL] * 2)
        self.successResultOf(drained)

    def test_clients_of_a_single_node_reconnect_after_the_drain(self) -> None:
        clock = Clock()
        sessions = FakeClientSessions(clock, 100)
        SessionDrain(
            sessions,
            clock,
            10,
            graceful_disconnect=without_calls(sessions, clock),
            is_single_node=lambda: True,
            destination_for=lambda one: Destination(f"ws://x/{one}"),
        ).start()
        clock.pump([POLL_INTERVAL] * round(11 / POLL_INTERVAL))
        for client_id, (closed_at, _) in sessions.closed.items():
            after = sessions.goaways[client_id]["params"]["after"]
            self.assertTrue(
                9.99 <= closed_at + after <= 10.01 + 2 * POLL_INTERVAL + MAX_RECONNECT_DELAY, (closed_at, after)
            )

    def test_duration_of_zero(self) -> None:
        drained = self.start_drain(100, duration=0)
        self.advance(2 * POLL_INTERVAL)
        self.assertEqual(len(self.sessions.closed), 100)
        self.successResultOf(drained)
        waits = [goaway["params"]["after"] for goaway in self.sessions.goaways.values()]
        self.assertTrue(MAX_RECONNECT_DELAY < max(waits) <= MAX_RECONNECT_DELAY_UNPACED)

    def test_relays_are_drained_among_the_sessions(self) -> None:
        clock, sessions = Clock(), FakeClientSessions(Clock(), 50)
        relayed = {f"r-{i}": 0.0 for i in range(50)}
        remaining = set(relayed)

        def end(client_id: str) -> None:
            relayed[client_id] = clock.seconds()
            remaining.discard(client_id)

        drained = SessionDrain(
            sessions,
            clock,
            10,
            graceful_disconnect=without_calls(sessions, clock),
            destination_for=lambda _: None,
            relayed_client_ids=lambda: list(remaining),
            drain_relay=end,
        ).start()
        clock.pump([POLL_INTERVAL] * round(5 / POLL_INTERVAL))
        self.assertTrue(10 < len(remaining) < 40 and 10 < sessions.count() < 40)
        clock.pump([POLL_INTERVAL] * round(6 / POLL_INTERVAL))
        self.assertEqual((remaining, sessions.count()), (set(), 0))
        self.successResultOf(drained)

    def test_relay_that_stays_is_drained_again(self) -> None:
        clock, drained_relays = Clock(), []
        sessions = FakeClientSessions(clock, 0)
        drained = SessionDrain(
            sessions,
            clock,
            1,
            graceful_disconnect=without_calls(sessions, clock),
            destination_for=lambda _: None,
            relayed_client_ids=lambda: ["r"] if len(drained_relays) < 3 else [],
            drain_relay=drained_relays.append,
        ).start()
        clock.pump([POLL_INTERVAL] * round(2 / POLL_INTERVAL))
        self.assertEqual(drained_relays, ["r"] * 3)
        self.successResultOf(drained)

    def test_client_that_disconnects_by_itself(self) -> None:
        drained = self.start_drain(2)
        self.sessions.connected.clear()
        self.advance(6)
        self.successResultOf(drained)

    def test_client_that_was_still_connecting(self) -> None:
        drained = self.start_drain(2)
        self.sessions.connected.add("late")
        self.advance(5 + 3 * POLL_INTERVAL)
        self.assertIn("late", self.sessions.closed)
        self.successResultOf(drained)

    def test_continues_while_the_registry_is_unavailable(self) -> None:
        drained = self.start_drain(3)
        self.sessions.registry_unavailable = True
        self.advance(11)
        self.successResultOf(drained)
        self.flushLoggedErrors()


class GracefulDisconnectTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.sessions = FakeClientSessions(self.clock, 3)
        self.calls: Counter[SessionKey] = Counter()
        self.tracker = FakeCallTracker(lambda key: self.calls[key])
        self.node_directory = FakeNodeDirectory()
        self.graceful_disconnect = GracefulDisconnect(
            self.sessions,
            self.clock,
            calls=self.tracker,
            registry=self.sessions,
            node_directory=self.node_directory,
            max_call_timeout=60,
            tickets=Tickets("a", lambda: b"secret", wall_clock=lambda: 1000.0),
        )

    def advance(self, seconds: float) -> None:
        self.clock.pump([POLL_INTERVAL] * round(seconds / POLL_INTERVAL))

    def test_without_calls(self) -> None:
        self.assertTrue(self.graceful_disconnect.send_goaway("c-0", "rebalance", Destination("ws://x/c-0")))
        goaway = self.sessions.goaways["c-0"]
        self.assertEqual(goaway["method"], "gateway.goaway")
        self.assertTrue(0 <= goaway["params"].pop("after") <= MAX_RECONNECT_DELAY)
        self.assertEqual(goaway["params"], {"reason": "rebalance", "url": "ws://x/c-0"})
        self.assertEqual(self.tracker.goaways_begun, [("c-0", 1, False)])
        self.assertEqual(self.sessions.closed, {"c-0": (0.0, 1012)})
        self.assertEqual((len(self.graceful_disconnect), self.clock.getDelayedCalls()), (0, []))

    def test_ticket_in_the_url(self) -> None:
        """It is valid for 30 s after the delay of the goaway."""
        identity = Identity("c-0", 5000.0, method=AuthMethod.TOKENS)
        self.sessions.ticket_identities[SessionKey("c-0", 1)] = identity
        for client_id in ("c-0", "c-1"):
            self.graceful_disconnect.send_goaway(
                client_id, "drain", Destination(f"ws://x/?client_id={client_id}", "b"), min_delay=2.0, max_delay=0.0
            )
        url, _, ticket = str(self.sessions.goaways["c-0"]["params"]["url"]).partition("&wsgateway_ticket=")
        self.assertEqual((url, self.sessions.goaways["c-0"]["params"]["after"]), ("ws://x/?client_id=c-0", 2.0))
        self.assertEqual(self.sessions.goaways["c-1"]["params"]["url"], "ws://x/?client_id=c-1")
        for now, accepted in ((1031.9, True), (1032.0, False)):
            other = Tickets("b", lambda: b"secret", wall_clock=lambda now=now: now)
            if accepted:
                self.assertEqual(other.redeem(ticket, "c-0", {AuthMethod.TOKENS}), identity)
            else:
                self.assertRaises(VerificationError, other.redeem, ticket, "c-0", {AuthMethod.TOKENS})

    def test_no_ticket_for_a_url_that_may_lead_to_any_node(self) -> None:
        self.sessions.ticket_identities[SessionKey("c-0", 1)] = Identity("c-0", method=AuthMethod.JWT)
        self.graceful_disconnect.send_goaway("c-0", "drain", Destination("ws://x/c-0"))
        self.assertEqual(self.sessions.goaways["c-0"]["params"]["url"], "ws://x/c-0")

    def test_no_url(self) -> None:
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertNotIn("url", self.sessions.goaways["c-0"]["params"])

    def test_client_that_is_not_connected(self) -> None:
        self.assertFalse(self.graceful_disconnect.send_goaway("nobody", "drain", None))
        self.assertEqual((self.tracker.goaways_begun, self.sessions.goaways), ([], {}))

    def test_waits_for_calls(self) -> None:
        self.calls[SessionKey("c-0", 1)] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertEqual(self.graceful_disconnect.goaway_sent("c-0"), 1)
        self.assertFalse(self.graceful_disconnect.send_goaway("c-0", "drain", None))
        self.advance(59)
        self.assertEqual(self.sessions.closed, {})
        self.calls.clear()
        self.advance(2 * POLL_INTERVAL)
        self.assertEqual(self.sessions.closed["c-0"][1], 1012)
        self.assertEqual((self.graceful_disconnect.goaway_sent("c-0"), self.clock.getDelayedCalls()), (0, []))

    def test_waits_no_longer_than_max_call_timeout(self) -> None:
        self.calls[SessionKey("c-0", 1)] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.advance(60 + POLL_INTERVAL)
        self.assertIn("c-0", self.sessions.closed)

    def test_newer_connection_is_not_closed(self) -> None:
        """The client has reconnected to this node."""
        self.calls[SessionKey("c-0", 1)] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.sessions.generations["c-0"] = 2
        self.calls.clear()
        self.advance(1)
        self.assertEqual((self.sessions.closed, len(self.graceful_disconnect)), ({}, 0))

    def test_newer_connection_gets_its_own_goaway(self) -> None:
        self.calls[SessionKey("c-0", 1)] = self.calls[SessionKey("c-0", 2)] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.sessions.generations["c-0"] = 2
        self.assertTrue(self.graceful_disconnect.send_goaway("c-0", "drain", None))
        self.calls[SessionKey("c-0", 2)] = 0
        self.advance(1)
        self.assertIn("c-0", self.sessions.closed)

    def test_registry_unavailable(self) -> None:
        self.sessions.registry_unavailable = True
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.assertIn("c-0", self.sessions.closed)

    def test_row_is_released_later_if_there_are_other_nodes(self) -> None:
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

    def test_row_that_cannot_be_released(self) -> None:
        self.node_directory.single, self.sessions.registry_unavailable = False, True
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.advance(HANDOFF_TIMEOUT + POLL_INTERVAL)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop(self) -> None:
        self.graceful_disconnect.stop()
        self.calls[SessionKey("c-0", 1)] = 1
        self.graceful_disconnect.send_goaway("c-0", "drain", None)
        self.graceful_disconnect.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class FakeRegistry:
    """Finds the location that the test says."""

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

    def test_closed_by_its_node_and_by_this_one_after_the_timeout(self) -> None:
        self.relay_drain.drain("a")
        self.relay_drain.drain("a")
        self.assertEqual((self.peer_client.closed, self.closed_relays), ([(location(), 1012, "drain")], []))
        self.clock.advance(10.0)
        self.assertEqual(self.closed_relays, [])
        self.clock.advance(RELAY_CLOSE_TIMEOUT)
        self.assertEqual(self.closed_relays, ["a"])
        self.relay_drain.drain("a")
        self.assertEqual(len(self.peer_client.closed), 2)

    def test_closed_at_once_if_its_node_cannot_be_asked(self) -> None:
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

    def test_unexpected_error_is_logged(self) -> None:
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

    def test_no_calls(self) -> None:
        self.successResultOf(self.start_drain())
        goaway = {"jsonrpc": "2.0", "method": "gateway.goaway", "params": {"reason": "drain"}}
        self.assertEqual(self.seen, [goaway, "refuse"])

    def test_waits_for_calls_in_flight(self) -> None:
        self.calls = 2
        over = self.start_drain()
        self.clock.pump([POLL_INTERVAL] * 20)
        self.assertNoResult(over)
        self.calls = 0
        self.clock.advance(POLL_INTERVAL)
        self.successResultOf(over)

    def test_waits_no_longer_than_max_call_timeout(self) -> None:
        self.calls = 1
        over = self.start_drain()
        self.clock.pump([POLL_INTERVAL] * 199)
        self.assertNoResult(over)
        self.clock.pump([POLL_INTERVAL] * 2)
        self.successResultOf(over)

    def test_backends_have_a_grace_period(self) -> None:
        """Calls are accepted for half a second after the goaway, and refused for another."""
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
