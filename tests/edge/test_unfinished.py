"""Tests of gateway.websocket.limits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.websocket.limits import MAX_INCOMPLETE_MESSAGES, ReassemblyBudget
from tests.edge.fakes import FakeNode, build_frame, close_frame


class FakeConnection:
    def __init__(self) -> None:
        self.closed: list[int] = []

    def close_with(self, code: int, reason: str = "") -> None:
        self.closed.append(code)


class ReassemblyBudgetTest(SynchronousTestCase):
    def test_who_is_silent_for_longest_is_the_first_to_go(self) -> None:
        metrics = Metrics()
        unfinished = ReassemblyBudget(10, metrics)
        senders = [FakeConnection() for _ in range(MAX_INCOMPLETE_MESSAGES)]
        for sender in senders:
            unfinished.charge(sender, 9)
        for sender in reversed(senders):
            unfinished.charge(sender, 1)
        self.assertEqual([sender.closed for sender in senders], [[]] * MAX_INCOMPLETE_MESSAGES)
        unfinished.charge(FakeConnection(), 11)
        self.assertEqual([sender.closed for sender in senders[-3:]], [[], [1013], [1013]])
        self.assertEqual(metrics.slow_senders, 2)
        self.assertEqual(unfinished.total_bytes, 10 * (MAX_INCOMPLETE_MESSAGES - 2) + 11)

    def test_those_that_are_whole_or_gone_do_not_count(self) -> None:
        unfinished = ReassemblyBudget(1, Metrics())
        one = FakeConnection()
        for _ in range(3):
            unfinished.charge(one, MAX_INCOMPLETE_MESSAGES)
            unfinished.release(one)
            unfinished.release(one)
        self.assertEqual((one.closed, unfinished.total_bytes), ([], 0))

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), max_size=60))
    def test_never_more(self, said: list[tuple[int, int]]) -> None:
        unfinished = ReassemblyBudget(4, Metrics())
        senders = [FakeConnection() for _ in range(6)]
        for number, size in said:
            if size % 7:
                unfinished.charge(senders[number], size)
            else:
                unfinished.release(senders[number])
            self.assertLessEqual(unfinished.total_bytes, 4 * MAX_INCOMPLETE_MESSAGES)
            self.assertEqual(unfinished.total_bytes, sum(unfinished._held.values()))


class ReassemblyBudgetConnectionTest(SynchronousTestCase):
    """Real connections."""

    SIZE = 100

    def setUp(self) -> None:
        self.node = FakeNode(max_message_size=self.SIZE, capacity=1000, openings_per_address=0)
        self.unfinished = self.node.factory.reassembly_budget

    def test_every_end_of_a_message(self) -> None:
        """However a message ends, nothing is held of it."""
        half = build_frame(1, b"x" * 50, fin=False)
        for end in (
            build_frame(0, b""),
            close_frame(1000),
            build_frame(2, b""),
            build_frame(0, b"x" * 51),
            b"\xff" * 20,
            build_frame(0, b"\xff"),
        ):
            client = self.node.connect()
            client.send(half)
            self.assertEqual(self.unfinished.total_bytes, 50)
            client.send(end)
            self.assertEqual(self.unfinished.total_bytes, 0, end)
            client.lose()
        client = self.node.connect()
        client.send(half + build_frame(0, b"x" * 40)[:-1])
        self.assertEqual(self.unfinished.total_bytes, 89)
        client.lose()
        self.assertEqual((self.unfinished.total_bytes, self.unfinished._held), (0, {}))

    def test_too_many(self) -> None:
        """Those that began last can still end theirs."""
        clients = [self.node.connect(f"c{number}") for number in range(MAX_INCOMPLETE_MESSAGES + 2)]
        for client in clients:
            client.send(build_frame(1, b"x" * self.SIZE, fin=False))
        self.assertEqual([client.close_code() for client in clients[:2]], [1013, 1013])
        self.assertEqual(self.node.sessions.count(), MAX_INCOMPLETE_MESSAGES)
        clients[2].send(build_frame(0, b""))
        self.assertEqual(self.node.handler.messages, [b"x" * self.SIZE])
        self.assertEqual(self.node.metrics.closed, {"1013": 2})
