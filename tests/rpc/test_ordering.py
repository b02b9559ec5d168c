"""Tests for :mod:`gateway.rpc.ordering`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.rpc.ordering import ClientQueue
from tests.builders.dispatcher import remote_location


class Message:
    """A message with a number."""

    epoch = 0

    def __init__(self, number: int) -> None:
        self.number = number


B, B_AGAIN, C = remote_location("b"), remote_location("b"), remote_location("c")


class ClientQueueTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.queue: ClientQueue[Message] = ClientQueue("x")

    def numbers(self) -> list[int]:
        return [message.number for message in self.queue.waiting]

    @given(st.lists(st.integers(1, 1000), unique=True), st.data())
    def test_any_order(self, numbers: list[int], data: st.DataObject) -> None:
        self.setUp()
        messages = [Message(number) for number in numbers]
        for message in messages:
            self.queue.add(message)
        self.assertEqual(self.numbers(), sorted(numbers))
        self.assertEqual(self.queue.last_number, max(numbers, default=0))
        removed = data.draw(st.lists(st.sampled_from(messages), unique=True)) if messages else []
        for message in removed * 2:
            self.queue.remove(message)
        self.assertEqual(self.numbers(), sorted({*numbers} - {message.number for message in removed}))

    def test_remove_up_to(self) -> None:
        for number in (3, 1, 2, 4):
            self.queue.add(Message(number))
        self.assertEqual([message.number for message in self.queue.remove_up_to(2)], [1, 2])
        self.assertEqual(self.numbers(), [3, 4])

    def test_where_messages_may_go(self) -> None:
        first, second = Message(1), Message(2)
        self.assertTrue(self.queue.may_follow(B))
        self.queue.sent(first, B)
        self.queue.sent(second, B)
        self.assertEqual([self.queue.may_follow(location) for location in (B, B_AGAIN, C)], [True, True, False])
        self.queue.returned(first, missed=True)
        self.assertEqual([self.queue.may_follow(location) for location in (B, B_AGAIN, C)], [False] * 3)
        self.queue.settled()
        self.assertTrue(self.queue.may_follow(C))
        # It was taken: it does not count any more.
        self.queue.returned(second, missed=False)
        self.assertTrue(self.queue.is_idle)

    def test_the_last_one_is_given_back(self) -> None:
        message = Message(1)
        self.queue.sent(message, B)
        self.queue.returned(message, missed=True)
        self.assertFalse(self.queue.was_missed)
        self.queue.sent(message, B)
        self.queue.returned(message, missed=True, by_lease=True)
        self.assertTrue(self.queue.was_missed)
