"""Tests for :mod:`gateway.rpc.remote`: the order of the messages to one client."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import SessionKey
from gateway.rpc.errors import NotDelivered
from tests.builders.dispatcher import MAX_CALLS, RemoteDeliveryTestCase, remote_location
from tests.fakes.rpc import RecordingCall

MOVED = remote_location("third-node", generation=8)


class OrderTestCase(RemoteDeliveryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.remote_nodes.connected.add("third-node")
        self.remote_nodes.fences_pass = False

        #: number -> its outcome
        self.outcomes: dict[int, Any] = {}

    def call(self, number: int, timeout: float = 5.0) -> Deferred[Any]:
        called = self.dispatcher.call("x", "m", b"[%d]" % number, timeout)
        return called.addBoth(lambda outcome: self.outcomes.__setitem__(number, outcome))

    def notify(self, number: int) -> None:
        notified = self.dispatcher.notify("x", "m", b"[%d]" % number)
        notified.addBoth(lambda outcome: self.outcomes.__setitem__(number, outcome))

    def assert_failed(self, number: int, kind: ErrorKind, *, sent: bool = False) -> None:
        error = self.outcomes[number].value
        self.assertEqual((error.kind, error.sent), (kind, sent))

    def requests_to(self, node_id: str) -> list[int]:
        """Return the numbers of the messages sent to a node."""
        sent = self.remote_nodes.requests
        return [int((params or b"")[1:-1]) for location, _, params, *_ in sent if location.node_id == node_id]

    def miss(self, index: int = 0) -> None:
        """Let the node give back the oldest call that it has."""
        self.remote_nodes.not_deliver(NotDelivered.NOT_HERE, index)

    def pass_fence(self) -> None:
        self.remote_nodes.fences.pop(0)[1].callback(None)


class MissTests(OrderTestCase):
    """The client has moved; the node that it has left gives the messages back, one after the other."""

    def setUp(self) -> None:
        super().setUp()
        self.calls = [self.call(number) for number in (1, 2, 3)]
        self.registry.result = MOVED

    def test_nothing_goes_elsewhere_before_the_fence(self) -> None:
        self.miss()
        self.assertEqual([location for location, _ in self.remote_nodes.fences], [remote_location()])
        self.call(4)
        self.miss()
        self.assertEqual(self.requests_to("third-node"), [])
        self.miss()
        self.pass_fence()
        self.assertEqual(self.requests_to("third-node"), [1, 2, 3, 4])
        self.assertEqual(self.registry.queries, ["x", "x"])

    def test_message_that_was_taken(self) -> None:
        """It is a call that the client has and has not answered."""
        self.miss()
        self.call(4)
        self.pass_fence()
        self.assertEqual(self.requests_to("third-node"), [1, 4])

    def test_given_back_while_a_newer_message_waits_for_its_lookup(self) -> None:
        """It is handed on at once, and kept in one place only."""
        self.remote_nodes.fences_pass = True
        self.remote_nodes.on_call = lambda call: None
        self.dispatcher._locations.drop("x")
        lookup: Deferred[Any] = Deferred()
        self.registry.result = lookup
        self.call(4)
        self.remember(MOVED)
        self.miss()
        self.assertEqual(self.requests_to("third-node"), [1, 4])
        remote = self.dispatcher._remote
        self.assertEqual((len(remote._deadlines), len(self.remote_nodes.pending), len(remote)), (0, 4, 4))

    def test_newer_messages_do_not_wait_once_the_queue_is_empty(self) -> None:
        self.miss()
        self.pass_fence()
        call = RecordingCall()
        self.assertTrue(self.dispatcher.try_call(call, "x", "m", b"[5]", 5.0))
        self.assertEqual(self.requests_to("third-node"), [1, 5])

    def test_no_fence_if_nothing_else_is_at_the_node(self) -> None:
        for _ in self.calls[1:]:
            self.remote_nodes.fail(RpcError(ErrorKind.CONNECTION_LOST, "x"))
        self.miss()
        self.assertEqual((self.remote_nodes.fences, self.requests_to("third-node")), ([], [1]))

    def test_lost_connection_settles_the_fence(self) -> None:
        self.miss()
        self.call(4)
        for _ in self.calls[1:]:
            self.remote_nodes.fail(RpcError(ErrorKind.CONNECTION_LOST, "x"))
        self.pass_fence()
        self.assertEqual(self.requests_to("third-node"), [1, 4])

    def test_notifications_wait_as_calls_do(self) -> None:
        self.miss()
        self.notify(4)
        self.call(5)
        self.assertEqual(self.remote_nodes.notifications, [])
        self.pass_fence()
        self.assertEqual(self.remote_nodes.notifications[0][:3], (MOVED, "m", b"[4]"))
        self.assertNotIn(4, self.outcomes)
        self.assertEqual(self.requests_to("third-node"), [1, 5])

    def test_older_node_has_no_fence(self) -> None:
        self.remote_nodes.fences_pass = True
        self.miss()
        self.call(4)
        self.miss()
        self.miss()
        self.assertEqual(self.requests_to("third-node"), [1, 4, 2, 3])

    def test_client_connects_here(self) -> None:
        """What is sent to it at once must not overtake what the other node gives back."""
        self.connect("x", 9)
        self.call(4)
        self.assertEqual(self.sent("x"), [])
        self.miss()
        self.pass_fence()
        self.assertEqual([message["params"] for message in self.sent("x")], [[1], [4]])

    def test_location_changes_without_a_miss(self) -> None:
        self.dispatcher._locations.drop("x")
        self.call(4)
        self.assertEqual(self.requests_to("third-node"), [])
        self.pass_fence()
        self.assertEqual(self.requests_to("third-node"), [4])

    def test_deadline_during_the_fence(self) -> None:
        self.miss()
        self.call(4, timeout=1.0)
        self.call(5)
        self.clock.advance(1.1)
        self.assert_failed(4, ErrorKind.NODE_UNREACHABLE)
        self.pass_fence()
        self.assertEqual(self.requests_to("third-node"), [1, 5])


class LeaseLostTests(OrderTestCase):
    """The node has given a message back because its lease had expired, and does so with later ones until a fence."""

    def test_fence_even_if_nothing_else_is_known_to_be_there(self) -> None:
        """A call that has timed out here may still be on its way."""
        self.call(1)
        self.registry.result = remote_location(live=False)
        self.membership.stable = False
        self.remote_nodes.not_deliver(NotDelivered.LEASE_LOST)
        self.assertEqual((len(self.remote_nodes.fences), self.requests_to("other-node")), (1, [1]))
        self.pass_fence()
        self.assertEqual(self.requests_to("other-node"), [1, 1])


class QueueTests(OrderTestCase):
    """The client's location is being looked up."""

    def setUp(self) -> None:
        super().setUp()
        self.lookup: Deferred[Any] = Deferred()
        self.registry.result = self.lookup

    def test_in_order(self) -> None:
        self.call(1)
        self.call(2)
        self.notify(3)
        self.assertFalse(self.dispatcher.try_call(RecordingCall(), "x", "m", None, 5.0))
        self.lookup.callback(MOVED)
        self.assertEqual((self.requests_to("third-node"), len(self.remote_nodes.notifications)), ([1, 2], 1))
        self.assertEqual(self.registry.queries, ["x"])

    def test_deadline(self) -> None:
        self.call(1, timeout=1.0)
        self.call(2)
        self.registry.result = MOVED
        self.clock.advance(1.1)
        self.assert_failed(1, ErrorKind.REGISTRY_UNAVAILABLE)
        self.assertEqual(self.requests_to("third-node"), [2])

    def test_deadline_behind_the_first(self) -> None:
        self.call(1)
        self.call(2, timeout=1.0)
        self.clock.advance(1.1)
        self.assert_failed(2, ErrorKind.REGISTRY_UNAVAILABLE)
        self.lookup.callback(MOVED)
        self.assertEqual(self.requests_to("third-node"), [1])

    def test_cancel(self) -> None:
        calls = [self.call(number) for number in (1, 2, 3)]
        calls[1].cancel()
        self.outcomes[2].trap(CancelledError)
        self.registry.result = MOVED
        calls[0].cancel()
        self.assertEqual(self.requests_to("third-node"), [3])

    def test_full(self) -> None:
        for number in range(MAX_CALLS):
            self.call(number)
        self.call(9)
        self.notify(10)
        self.assert_failed(9, ErrorKind.TOO_MANY_CALLS)
        self.assert_failed(10, ErrorKind.TOO_MANY_CALLS)

    def test_client_that_is_not_connected(self) -> None:
        """One lookup is enough for all that waited when it began, another one for the others."""
        for number in (1, 2, 3):
            self.call(number)
        self.registry.result = None
        self.lookup.callback(None)
        for number in (1, 2, 3):
            self.assert_failed(number, ErrorKind.NOT_CONNECTED)
        self.assertEqual(self.registry.queries, ["x", "x"])
        self.assert_nothing_left()

    def test_other_clients_do_not_wait(self) -> None:
        self.call(1)
        self.registry.result = remote_location(client_id="y")
        self.dispatcher.call("y", "m", b"[2]").addErrback(lambda failure: None)
        self.assertEqual(self.requests_to("other-node"), [2])


class ClaimTests(OrderTestCase):
    def test_claim_in_progress_here(self) -> None:
        self.sessions.claiming["x"] = []
        self.call(1)
        self.connect("x", 9)
        self.call(2)
        self.sessions.finish_claim("x")
        self.call(3)
        self.assertEqual([message["params"] for message in self.sent("x")], [[1], [2], [3]])


class GoawayTests(OrderTestCase):
    """A client that was told to connect to another node."""

    def setUp(self) -> None:
        super().setUp()
        self.connect("x", 7)
        self.dispatcher.begin_goaway(SessionKey("x", 7), handoff=True)

    def test_calls_and_notifications_wait_alike(self) -> None:
        self.notify(1)
        self.call(2)
        self.assertEqual(self.sent("x"), [])
        self.registry.result = MOVED
        self.dispatcher.client_superseded(SessionKey("x", 8))
        self.assertEqual(self.remote_nodes.notifications[0][:3], (MOVED, "m", b"[1]"))
        self.assertEqual(self.requests_to("third-node"), [2])

    def test_client_that_goes_nowhere(self) -> None:
        """Each message waits for two seconds, whatever waits before it."""
        self.registry.result = remote_location("this-node")
        self.notify(1)
        self.clock.advance(0.5)
        self.call(2)
        self.clock.pump([0.5] * 3)
        self.assertEqual(list(self.outcomes), [1])
        self.clock.advance(0.5)
        for number in (1, 2):
            self.assert_failed(number, ErrorKind.NOT_CONNECTED)

    def test_session_notification_of_a_peer(self) -> None:
        self.assertFalse(self.dispatcher.notify_session(("x", 7), "m", None))
