"""The answers to a batch."""

import json

from twisted.trial.unittest import SynchronousTestCase

from gateway.api.backend import Batch


class BatchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.sent: list[bytes] = []
        self.batch = Batch(self.sent.append)

    def test_in_the_order_of_the_questions_when_the_last_is_there(self) -> None:
        first, second = self.batch.slot(), self.batch.slot()
        second(b"2")
        self.batch.complete()
        self.assertEqual(self.sent, [])
        first(b"1")
        self.assertEqual([json.loads(message) for message in self.sent], [[1, 2]])

    def test_not_before_it_is_complete(self) -> None:
        self.batch.slot()(b"1")
        self.assertEqual(self.sent, [])
        self.batch.complete()
        self.assertEqual(len(self.sent), 1)

    def test_notifications_alone_are_not_answered(self) -> None:
        self.batch.complete()
        self.assertEqual(self.sent, [])
