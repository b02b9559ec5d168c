"""Tests of gateway.registry.division."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.division import MAX_REFUSALS, RETRY_LIMIT_AFTER, BatchLimit, Division, run_divided
from gateway.registry.errors import RegistryRefusedError, RegistryUnavailableError


class BatchLimitTests(SynchronousTestCase):
    def test_a_refused_size_is_halved_for_a_thousand_batches(self) -> None:
        limit = BatchLimit(500)
        for size, value in ((500, 250), (250, 125), (120, 60)):
            limit.refused(size)
            self.assertEqual(limit.value, value)
        for _ in range(RETRY_LIMIT_AFTER - 1):
            limit.accepted()
        self.assertEqual(limit.value, 60)
        limit.accepted()
        self.assertEqual(limit.value, 500)

    def test_a_single_request_that_is_refused_was_the_cause(self) -> None:
        limit = BatchLimit(500)
        limit.refused(3)
        self.assertEqual(limit.value, 1)
        limit.refused(1)
        self.assertEqual(limit.value, 500)


class DivisionTests(SynchronousTestCase):
    @given(st.integers(1, 500), st.data())
    def test_one_bad_item_is_found_in_a_logarithm_of_tries(self, size: int, data: st.DataObject) -> None:
        bad = data.draw(st.integers(0, size - 1))
        division: Division[int] = Division()
        part: list[int] | None = list(range(size))
        done: list[int] = []
        refused: list[int] = []
        tries = 0
        while part is not None:
            tries += 1
            if bad in part:
                self.assertTrue(division.refused(part))
                refused += part if len(part) == 1 else []
            else:
                division.accepted()
                done += part
            part = division.next_part()
        self.assertEqual((refused, done), ([bad], [item for item in range(size) if item != bad]))
        self.assertLessEqual(tries, 2 * math.ceil(math.log2(size)) + 1)

    def test_what_is_left_is_in_order(self) -> None:
        division: Division[int] = Division()
        division.refused([1, 2, 3, 4, 5])
        self.assertTrue(division)
        part = division.next_part()
        assert part is not None
        division.refused(part)
        self.assertEqual((list(division), division.take_all()), ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]))
        self.assertFalse(division)
        self.assertIsNone(division.next_part())

    def test_a_database_that_refuses_everything(self) -> None:
        division: Division[int] = Division()
        self.assertEqual([division.refused([1]) for _ in range(MAX_REFUSALS + 1)], [True] * MAX_REFUSALS + [False])


class RunDividedTests(SynchronousTestCase):
    def run_with(self, items: list[str], bad: str) -> Deferred[list[str]]:
        self.tried: list[str] = []

        async def run(part: list[str]) -> list[str]:
            self.tried.append("".join(part))
            if set(bad) & set(part):
                raise RegistryRefusedError("too large")
            return [item.upper() for item in part]

        return Deferred.fromCoroutine(run_divided(items, run))

    def test_items_that_are_refused_have_no_result(self) -> None:
        self.assertEqual(self.successResultOf(self.run_with(list("abcd"), "c")), ["A", "B", "D"])
        self.assertEqual(self.tried, ["abcd", "ab", "cd", "c", "d"])

    def test_nothing_is_divided_without_need(self) -> None:
        self.assertEqual(self.successResultOf(self.run_with(list("abcd"), "")), ["A", "B", "C", "D"])
        self.assertEqual(self.tried, ["abcd"])

    def test_it_fails_if_nothing_is_accepted(self) -> None:
        self.failureResultOf(self.run_with(list("ab"), "ab"), RegistryRefusedError)
        self.failureResultOf(
            self.run_with([str(number) for number in range(9)] * 20, "012345678"), RegistryRefusedError
        )
        self.assertEqual(len(self.tried), MAX_REFUSALS + 1)

    def test_another_error_ends_it(self) -> None:
        async def run(part: list[str]) -> list[str]:
            raise RegistryUnavailableError("away")

        error = self.failureResultOf(Deferred.fromCoroutine(run_divided(["a", "b"], run)), RegistryUnavailableError)
        self.assertNotIsInstance(error.value, RegistryRefusedError)
