"""Tests of gateway.websocket.reassembly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.websocket.reassembly import MAX_INCOMPLETE_MESSAGES, ReassemblyBudget
from tests.builders.frames import build_frame, close_frame
from tests.fakes.clients import FakeNode


class FakeConnection:
    def __init__(self) -> None:
        self.closed: list[int] = []

    def limit_exceeded(self, option: str) -> None:
        assert "--max-message-size" in option

    def close_with(self, code: int, reason: str = "") -> None:
        self.closed.append(code)


class ReassemblyBudgetTest(SynchronousTestCase):
    def test_closes_those_that_were_charged_least_recently(self) -> None:
        metrics = Metrics()
        budget = ReassemblyBudget(10, metrics)
        senders = [FakeConnection() for _ in range(MAX_INCOMPLETE_MESSAGES)]
        for sender in senders:
            budget.charge(sender, 9)
        for sender in reversed(senders):
            budget.charge(sender, 1)
        self.assertEqual([sender.closed for sender in senders], [[]] * MAX_INCOMPLETE_MESSAGES)
        budget.charge(FakeConnection(), 11)
        self.assertEqual([sender.closed for sender in senders[-3:]], [[], [1013], [1013]])
        self.assertEqual(metrics.slow_senders, 2)
        self.assertEqual(budget.total_bytes, 10 * (MAX_INCOMPLETE_MESSAGES - 2) + 11)

    def test_released_messages_do_not_count(self) -> None:
        budget = ReassemblyBudget(1, Metrics())
        sender = FakeConnection()
        for _ in range(3):
            budget.charge(sender, MAX_INCOMPLETE_MESSAGES)
            budget.release(sender)
            budget.release(sender)
        self.assertEqual((sender.closed, budget.total_bytes), ([], 0))

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), max_size=60))
    def test_limit_is_never_exceeded(self, charges: list[tuple[int, int]]) -> None:
        budget = ReassemblyBudget(4, Metrics())
        senders = [FakeConnection() for _ in range(6)]
        for number, size in charges:
            if size % 7:
                budget.charge(senders[number], size)
            else:
                budget.release(senders[number])
            self.assertLessEqual(budget.total_bytes, 4 * MAX_INCOMPLETE_MESSAGES)
            self.assertEqual(budget.total_bytes, sum(budget._held.values()))


class ReassemblyBudgetConnectionTest(SynchronousTestCase):
    """The budget as charged by real connections."""

    SIZE = 100

    def setUp(self) -> None:
        self.node = FakeNode(max_message_size=self.SIZE, capacity=1000, openings_per_address=0)
        self.budget = self.node.factory.reassembly_budget

    def test_every_end_of_a_message(self) -> None:
        """The bytes of a message are released however it ends."""
        fragment = build_frame(1, b"x" * 50, fin=False)
        for end in (
            build_frame(0, b""),
            close_frame(1000),
            build_frame(2, b""),
            build_frame(0, b"x" * 51),
            b"\xff" * 20,
            build_frame(0, b"\xff"),
        ):
            client = self.node.connect()
            client.send(fragment)
            self.assertEqual(self.budget.total_bytes, 50)
            client.send(end)
            self.assertEqual(self.budget.total_bytes, 0, end)
            client.lose()
        client = self.node.connect()
        client.send(fragment + build_frame(0, b"x" * 40)[:-1])
        self.assertEqual(self.budget.total_bytes, 89)
        client.lose()
        self.assertEqual((self.budget.total_bytes, self.budget._held), (0, {}))

    def test_too_many_incomplete_messages(self) -> None:
        """The connections charged most recently can still complete theirs."""
        clients = [self.node.connect(f"c{number}") for number in range(MAX_INCOMPLETE_MESSAGES + 2)]
        for client in clients:
            client.send(build_frame(1, b"x" * self.SIZE, fin=False))
        self.assertEqual([client.close_code() for client in clients[:2]], [1013, 1013])
        self.assertEqual(self.node.sessions.count(), MAX_INCOMPLETE_MESSAGES)
        clients[2].send(build_frame(0, b""))
        self.assertEqual(self.node.handler.messages, [b"x" * self.SIZE])
        self.assertEqual(self.node.metrics.closed, {"1013": 2})
