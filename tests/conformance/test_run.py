"""Tests of tests.conformance.run: reading and judging the suite's report."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.conformance.run import (
    NODE_SERVERS,
    RANKS,
    REFERENCE_SERVER,
    Difference,
    Outcomes,
    SuiteError,
    case_key,
    differences,
    failures,
    rank,
    read_index,
    table,
)

cases = st.lists(st.integers(1, 13), min_size=2, max_size=3).map(lambda parts: ".".join(map(str, parts)))
outcomes = st.sampled_from(sorted(RANKS))
results = st.dictionaries(cases, st.builds(lambda a, b: outcome(a, b), outcomes, outcomes), max_size=3)


def outcome(behavior: str = "OK", close: str = "OK") -> dict[str, str]:
    return {"behavior": behavior, "behaviorClose": close}


class RankTest(SynchronousTestCase):
    """rank()"""

    def test_order_of_outcomes(self) -> None:
        order = ["OK", "NON-STRICT", "UNCLEAN", "FAILED", "MISSING"]
        for better, worse in itertools.pairwise(order):
            self.assertLess(rank(better), rank(worse))

    def test_equal_ranks(self) -> None:
        self.assertEqual(rank("NON-STRICT"), rank("INFORMATIONAL"))
        self.assertEqual(rank("UNCLEAN"), rank("WRONG CODE"))

    def test_unknown_outcome_is_a_failure(self) -> None:
        """Unknown outcomes, and UNIMPLEMENTED, rank as failures."""
        self.assertEqual(rank("UNIMPLEMENTED"), rank("FAILED"))
        self.assertEqual(rank(""), rank("FAILED"))


class ReadIndexTest(SynchronousTestCase):
    """read_index()"""

    def test_valid_report(self) -> None:
        """Additional fields are ignored."""
        found = {**outcome("NON-STRICT", "UNCLEAN"), "duration": 3, "remoteCloseCode": None, "reportfile": "x.json"}
        self.assertEqual(
            read_index(json.dumps({"a": {"1.1.1": found}, "b": {}})),
            {"a": {"1.1.1": outcome("NON-STRICT", "UNCLEAN")}, "b": {}},
        )

    def test_invalid_report(self) -> None:
        for text in (
            "",
            "{",
            "[]",
            "3",
            '{"a": 3}',
            '{"a": {"1.1.1": 3}}',
            '{"a": {"1.1.1": {}}}',
            '{"a": {"1.1.1": {"behavior": "OK"}}}',
            '{"a": {"one": {"behavior": "OK", "behaviorClose": "OK"}}}',
        ):
            with self.assertRaises(SuiteError):
                read_index(text)

    @given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
    def test_any_json_is_read_or_raises_suite_error(self, value: Any) -> None:
        """No exception but ``SuiteError`` is raised."""
        with contextlib.suppress(SuiteError):
            self.assertIsInstance(read_index(json.dumps(value)), dict)

    @given(results, results)
    def test_round_trip(self, ours: Outcomes, theirs: Outcomes) -> None:
        self.assertEqual(read_index(json.dumps({"a": ours, "b": theirs})), {"a": ours, "b": theirs})


class DifferencesTest(SynchronousTestCase):
    """differences()"""

    def differences(self, ours: Outcomes, theirs: Outcomes) -> list[Difference]:
        return differences({"node": ours, REFERENCE_SERVER: theirs}, "node")

    def test_both_aspects_are_compared(self) -> None:
        self.assertEqual(
            self.differences({"1.1.1": outcome("OK", "UNCLEAN")}, {"1.1.1": outcome("NON-STRICT", "OK")}),
            [
                Difference("node", "1.1.1", "behavior", "OK", "NON-STRICT"),
                Difference("node", "1.1.1", "behaviorClose", "UNCLEAN", "OK"),
            ],
        )

    def test_sorted_by_case(self) -> None:
        ours = {case: outcome("FAILED") for case in ("10.1.1", "9.2.1", "9.10.1", "1.1.1")}
        theirs = dict.fromkeys(ours, outcome())
        self.assertEqual([one.case for one in self.differences(ours, theirs)], ["1.1.1", "9.2.1", "9.10.1", "10.1.1"])

    def test_missing_cases(self) -> None:
        self.assertEqual(
            self.differences({"1.1.1": outcome()}, {"1.1.2": outcome()}),
            [
                Difference("node", "1.1.1", "behavior", "OK", "MISSING"),
                Difference("node", "1.1.1", "behaviorClose", "OK", "MISSING"),
                Difference("node", "1.1.2", "behavior", "MISSING", "OK"),
                Difference("node", "1.1.2", "behaviorClose", "MISSING", "OK"),
            ],
        )
        self.assertEqual(differences({}, "node"), [])

    @given(results, results)
    def test_comparison_is_symmetric(self, ours: Outcomes, theirs: Outcomes) -> None:
        """What is worse in one direction is better in the other; equal results do not differ."""
        found, back = self.differences(ours, theirs), self.differences(theirs, ours)
        self.assertEqual(
            [(one.case, one.aspect, one.theirs, one.ours) for one in found],
            [(one.case, one.aspect, one.ours, one.theirs) for one in back],
        )
        self.assertFalse(any(one.worse and other.worse for one, other in zip(found, back, strict=True)))
        self.assertEqual(self.differences(ours, ours), [])


class FailuresTest(SynchronousTestCase):
    """failures()"""

    def failures(self, node: Outcomes, hasty: Outcomes, theirs: Outcomes) -> list[str]:
        counted = {kind: {"texts_while_parked": 1, "woken": 1} for kind in NODE_SERVERS}
        return failures({"node": node, "hasty": hasty, REFERENCE_SERVER: theirs}, counted)

    def test_equal_results_have_no_failures(self) -> None:
        all_of_them = {"1.1.1": outcome(), "7.1.6": outcome("INFORMATIONAL", "INFORMATIONAL")}
        self.assertEqual(self.failures(all_of_them, all_of_them, all_of_them), [])

    def test_same_rank_or_better_is_no_failure(self) -> None:
        """A better outcome and one of the same rank are accepted; a node may fail what Autobahn fails."""
        ours = {"1": outcome("OK"), "2": outcome("INFORMATIONAL", "FAILED"), "3": outcome("OK", "UNCLEAN")}
        theirs = {"1": outcome("FAILED"), "2": outcome("NON-STRICT", "FAILED"), "3": outcome("OK", "WRONG CODE")}
        self.assertEqual(self.failures(ours, ours, theirs), [])

    def test_worse_outcome_is_a_failure(self) -> None:
        """Each kind of node and each aspect is checked."""
        good = {"6.4.1": outcome()}
        for theirs, ours in (("OK", "NON-STRICT"), ("NON-STRICT", "UNCLEAN"), ("UNCLEAN", "FAILED"), ("OK", "FAILED")):
            self.assertEqual(
                self.failures({"6.4.1": outcome(ours)}, good, {"6.4.1": outcome(theirs)}),
                [f"node: case 6.4.1: behavior is {ours}, and {theirs} with autobahn"],
            )
            self.assertEqual(
                self.failures(good, {"6.4.1": outcome("OK", ours)}, {"6.4.1": outcome("OK", theirs)}),
                [f"hasty: case 6.4.1: behaviorClose is {ours}, and {theirs} with autobahn"],
            )

    def test_missing_case_is_a_failure(self) -> None:
        """A case that was not run is a failure, even if Autobahn fails it."""
        all_of_them = {"1.1": outcome(), "1.2": outcome("FAILED", "FAILED")}
        self.assertEqual(
            self.failures(all_of_them, {"1.1": outcome()}, all_of_them),
            [
                "hasty: case 1.2: behavior is MISSING, and FAILED with autobahn",
                "hasty: case 1.2: behaviorClose is MISSING, and FAILED with autobahn",
            ],
        )

    def test_missing_reference_is_a_failure(self) -> None:
        found = {"1.1": outcome(), "1.2": outcome()}
        self.assertEqual(
            self.failures(found, {"1.1": outcome()}, {"1.1": outcome()}),
            ["node: 1 cases were not run with autobahn: there is nothing to compare with"],
        )
        nothing = ["no case was run with autobahn: there is nothing to compare with"]
        self.assertEqual(self.failures(found, found, {}), nothing)
        self.assertEqual(failures({}, {}), nothing)

    def test_run_without_parking_is_a_failure(self) -> None:
        """A run in which no connection was parked does not test parking."""
        found = {"1.1": outcome()}
        index = {"node": found, "hasty": found, REFERENCE_SERVER: found}
        counted = {"node": {"texts_while_parked": 0, "woken": 1}, "hasty": {"texts_while_parked": 1}}
        self.assertEqual(
            failures(index, counted),
            [
                "node: texts_while_parked is 0: what is to be tested did not happen",
                "hasty: woken is 0: what is to be tested did not happen",
            ],
        )

    @given(results, results, results, cases)
    def test_new_failure_is_found(self, node: Outcomes, hasty: Outcomes, theirs: Outcomes, case: str) -> None:
        found = self.failures(
            {**node, case: outcome()}, {**hasty, case: outcome("FAILED")}, {**theirs, case: outcome()}
        )
        self.assertIn(f"hasty: case {case}: behavior is FAILED, and OK with autobahn", found)
        self.assertNotIn(f"node: case {case}:", "".join(found))


class TableTest(SynchronousTestCase):
    """table(), case_key()"""

    def test_counts_of_outcomes(self) -> None:
        ours = {"1.1": outcome(), "1.2": outcome("FAILED"), "1.3": outcome("FAILED", "UNCLEAN")}
        self.assertEqual(
            table({"node": ours, REFERENCE_SERVER: {}}),
            "              cases  messages; end\n"
            "node              3  1 OK, 2 FAILED; 2 OK, 1 UNCLEAN\n"
            "autobahn          0  ; ",
        )

    def test_cases_are_sorted_by_number(self) -> None:
        self.assertLess(case_key("9.2.1"), case_key("10.1.1"))
        self.assertLess(case_key("9.2"), case_key("9.2.1"))
