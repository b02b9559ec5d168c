"""The answers to a batch."""

import json

from twisted.trial.unittest import SynchronousTestCase

from gateway.api.backend import ResponseBatch


class ResponseBatchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.sent: list[bytes] = []
        self.batch = ResponseBatch(self.sent.append)

    def test_in_the_order_of_the_questions_when_the_last_is_there(self) -> None:
        first, second = self.batch.add_slot(), self.batch.add_slot()
        second(b"2")
        self.batch.finish()
        self.assertEqual(self.sent, [])
        first(b"1")
        self.assertEqual([json.loads(message) for message in self.sent], [[1, 2]])

    def test_not_before_it_is_complete(self) -> None:
        self.batch.add_slot()(b"1")
        self.assertEqual(self.sent, [])
        self.batch.finish()
        self.assertEqual(len(self.sent), 1)

    def test_notifications_alone_are_not_answered(self) -> None:
        self.batch.finish()
        self.assertEqual(self.sent, [])
