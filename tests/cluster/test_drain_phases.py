"""Tests for the phases of :class:`gateway.cluster.drain.Drain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from gateway.cluster.drain import POLL_INTERVAL, STEP_TIMEOUT, Drain, GracefulDisconnect
from gateway.cluster.interface import INodeService, NodeState
from gateway.cluster.routing import Destination, connect_url
from gateway.registry.interface import NodeStatus
from gateway.settings import make_settings
from tests.fakes.cluster import FakeCallTracker, FakeNode, FakeNodeDirectory, node_status
from tests.fakes.sessions import FakeClientSessions


@implementer(INodeService)
class DrainedNode(FakeNode):
    """A node that is up, and records what is done to it."""

    def __init__(self, steps: list[str]) -> None:
        self.state = NodeState.UP
        self.own_url: str | None = "ws://a/own"
        self._steps = steps

    def connect_url(self, client_id: str) -> str | None:
        return self.own_url

    def refusal_reason(self) -> str:
        return ""

    def close_shared_ports(self) -> Deferred[None]:
        self._steps.append("ports")
        return succeed(None)


class DrainTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.steps: list[str] = []
        self.node = DrainedNode(self.steps)
        self.sessions = FakeClientSessions(self.clock, 1)
        self.withdrawn: Deferred[None] = succeed(None)
        self.updated: Deferred[None] = succeed(None)
        self.other: NodeStatus | None = None
        self.other_has_own_url = True
        #: calls in flight of each client
        self.calls = 0
        self.drain = Drain(
            node=self.node,
            clock=self.clock,
            settings=make_settings({"drain-seconds": "0"}),
            sessions=self.sessions,  # type: ignore[arg-type]
            dispatcher=mock.Mock(
                handoffs=lambda: 0,
                calls_in_flight=lambda: 0,
                refuse_new_calls=self.record("refuse new calls"),
            ),
            membership=mock.Mock(heartbeat=self.record("heartbeat", lambda: self.updated)),
            node_directory=mock.Mock(
                refresh=self.record("refresh", lambda: succeed(None)),
                is_single_node=lambda: self.other is None,
                least_loaded=lambda: self.other,
                has_own_url=lambda node_id, public_url: self.other_has_own_url,
            ),
            rebalancer=mock.Mock(stop=self.record("stop rebalancing")),
            graceful_disconnect=GracefulDisconnect(
                self.sessions,  # type: ignore[arg-type]
                self.clock,
                calls=FakeCallTracker(lambda *_: self.calls),
                registry=self.sessions,  # type: ignore[arg-type]
                node_directory=FakeNodeDirectory(),  # type: ignore[arg-type]
                max_call_timeout=60,
            ),
            relays=mock.Mock(client_ids=list),
            relay_drain=mock.Mock(),
            send_to_backends=lambda message: self.steps.append("backends") or 0,  # type: ignore[func-returns-value]
            dns_registrar=mock.Mock(withdraw=self.record("DNS", lambda: self.withdrawn)),
            autoscaling=mock.Mock(complete_drain=self.record("autoscaling", lambda: succeed(None))),
        )

    def record(self, step: str, result: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
        def call() -> Any:
            self.steps.append(step)
            return result()

        return call

    def run_drain(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self.drain.run())

    def test_interface(self) -> None:
        verifyObject(INodeService, self.node)

    def test_the_phases_in_order(self) -> None:
        self.calls = 1
        drained = self.run_drain()
        self.assertIs(self.node.state, NodeState.DRAINING)
        self.assertEqual(self.steps, ["stop rebalancing", "DNS", "heartbeat", "refresh", "ports"])
        self.calls = 0
        self.clock.pump([POLL_INTERVAL] * 2)
        self.assertEqual(set(self.sessions.closed), {"c-0"})
        self.assertEqual(self.steps[5:], ["backends", "refuse new calls", "autoscaling"])
        self.successResultOf(drained)

    def test_delay(self) -> None:
        """The node is announced as draining at once, and drains later."""
        self.drain._settings = make_settings({"drain-seconds": "0", "drain-delay": "8"})
        drained = self.run_drain()
        self.assertIs(self.node.state, NodeState.DRAIN_PENDING)
        self.assertEqual(self.steps, ["stop rebalancing", "DNS", "heartbeat", "refresh"])
        self.clock.advance(7.9)
        self.assertEqual((self.node.state, self.sessions.goaways), (NodeState.DRAIN_PENDING, {}))
        self.clock.advance(0.1)
        self.assertIs(self.node.state, NodeState.DRAINING)
        self.assertEqual((self.steps[4], set(self.sessions.goaways)), ("ports", {"c-0"}))
        self.clock.pump([POLL_INTERVAL] * 2)
        self.successResultOf(drained)

    def test_delay_is_skipped(self) -> None:
        for early in (True, False):
            self.setUp()
            self.drain._settings = make_settings({"drain-seconds": "0", "drain-delay": "8"})
            if early:
                self.updated = Deferred()
            self.run_drain()
            self.drain.skip_delay()
            if early:
                # The registry is updated first.
                self.assertIs(self.node.state, NodeState.DRAIN_PENDING)
                self.updated.callback(None)
            self.assertIs(self.node.state, NodeState.DRAINING)
            self.assertEqual(set(self.sessions.goaways), {"c-0"})

    def test_stop_in_the_delay(self) -> None:
        self.drain._settings = make_settings({"drain-seconds": "0", "drain-delay": "8"})
        drained = self.run_drain()
        self.node.state = NodeState.STOPPED
        self.drain.skip_delay()
        self.successResultOf(drained)
        self.assertEqual((self.node.state, self.sessions.goaways), (NodeState.STOPPED, {}))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_only_a_node_that_is_up_is_drained(self) -> None:
        for state in (NodeState.STARTING, NodeState.DRAIN_PENDING, NodeState.DRAINING, NodeState.STOPPED):
            self.node.state = state
            self.successResultOf(self.run_drain())
            self.assertEqual((self.node.state, self.steps), (state, []))

    def test_dns_and_the_registry_are_updated_at_once_and_before_any_client_is_sent_away(self) -> None:
        self.withdrawn, self.updated = Deferred(), Deferred()
        self.run_drain()
        self.assertEqual(self.steps, ["stop rebalancing", "DNS", "heartbeat"])
        self.withdrawn.callback(None)
        self.assertEqual(self.sessions.goaways, {})
        self.updated.callback(None)
        self.assertEqual(set(self.sessions.goaways), {"c-0"})

    def test_it_waits_for_them_for_a_limited_time(self) -> None:
        self.withdrawn, self.updated = Deferred(), Deferred()
        self.run_drain()
        self.clock.advance(STEP_TIMEOUT - 0.01)
        self.assertNotIn("ports", self.steps)
        self.clock.advance(0.01)
        self.assertIn("ports", self.steps)

    def test_it_goes_on_if_they_fail(self) -> None:
        self.withdrawn, self.updated = fail(ZeroDivisionError()), fail(ZeroDivisionError())
        self.run_drain()
        self.assertIn("ports", self.steps)

    def test_the_url_is_that_of_the_least_loaded_node(self) -> None:
        self.other = node_status("b")
        self.assertEqual(self.drain.destination_for("x"), Destination(connect_url("ws://b", "x"), "b"))

    def test_a_url_that_other_nodes_have_too_names_no_node(self) -> None:
        self.other, self.other_has_own_url = node_status("b"), False
        self.assertEqual(self.drain.destination_for("x"), Destination(connect_url("ws://b", "x")))

    def test_no_url_if_it_leads_to_any_node(self) -> None:
        self.other = attrs.evolve(node_status("b"), public_url=self.node.public_url)
        self.assertIsNone(self.drain.destination_for("x"))

    def test_the_url_is_its_own_if_there_is_no_other(self) -> None:
        for other in (None, attrs.evolve(node_status("b"), public_url="")):
            self.other = other
            for url in ("ws://a/own", None):
                self.node.own_url = url
                self.assertEqual(self.drain.destination_for("x"), url and Destination(url))
