"""What a batch comes to when some claims are over another node's, and others are not."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.claims import Owner, Release, Request, Row, settle
from gateway.registry.interface import Claim, HeldElsewhere, PlacedElsewhere, Superseded

ME, LIVE, DEAD, GONE, FULL = 1, 2, 3, 4, 5
NOW = 10
OWNERS = {
    LIVE: Owner("live", "live", "ws://live:81", "ws://live", "up", True),
    DEAD: Owner("dead", "dead", "ws://dead:81", "ws://dead", "up", False),
    FULL: Owner("full", "full", "ws://full:81", "ws://full", "up", True, False),
}

REQUESTS = st.tuples(
    st.sampled_from(["claim", "reclaim", "release"]),
    st.sampled_from("xy"),
    st.integers(0, 12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


def make(kind: str, client_id: str, number: int, conditional: bool, judge: bool, placed: bool = False) -> Any:
    if kind == "release":
        return Release(client_id, number)
    if kind == "reclaim":
        return Request(client_id, "h:1", number or 1, Deferred())
    return Request(client_id, "h:1", None, Deferred(), False, number if conditional else None, judge, placed)


def plain(outcome: Any) -> Any:
    if isinstance(outcome, PlacedElsewhere):
        return PlacedElsewhere, outcome.place
    return (HeldElsewhere, outcome.location) if isinstance(outcome, HeldElsewhere) else outcome


class OverTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=500)
    @given(
        st.lists(REQUESTS, max_size=8),
        st.dictionaries(st.sampled_from("xy"), st.tuples(st.sampled_from([ME, LIVE, DEAD, GONE]), st.integers(1, 12))),
        st.dictionaries(st.sampled_from("xy"), st.sampled_from([ME, LIVE, DEAD, GONE, FULL])),
    )
    def test_a_batch_is_its_requests_one_by_one(
        self,
        asked: list[tuple[str, str, int, bool, bool, bool]],
        before: dict[str, tuple[int, int]],
        placements: dict[str, int],
    ) -> None:
        original = {client_id: Row(node, generation, 1, "h") for client_id, (node, generation) in before.items()}
        batch = [make(*each) for each in asked]
        together = settle(batch, original, ME, NOW, True, OWNERS, placements)
        rows = dict(original)
        for each, again, outcome in zip(batch, [make(*each) for each in asked], together.outcomes, strict=True):
            if isinstance(outcome, Superseded):
                if isinstance(each, Request) and each.generation is not None:
                    row = rows[each.client_id]
                    self.assertTrue(row.node == ME and row.generation > each.generation)
                continue
            alone = settle([again], rows, ME, NOW, True, OWNERS, placements)
            self.assertEqual([plain(outcome)], [plain(one) for one in alone.outcomes])
            if isinstance(each, Request) and each.generation is None and isinstance(outcome, Claim):
                self.assertEqual(each.before, outcome.before)
            rows = {**rows, **alone.written}
            for client_id in alone.removed:
                del rows[client_id]
        after = {**original, **together.written}
        for client_id in together.removed:
            del after[client_id]
        self.assertEqual(after, rows)
        self.check_superseded(batch, together.outcomes)

    def check_superseded(self, batch: list[Any], outcomes: list[Any]) -> None:
        """Whoever is superseded is so by a later claim of the same client, which has it."""
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Superseded) and batch[index].generation is None:
                later = zip(batch[index + 1 :], outcomes[index + 1 :], strict=True)
                self.assertTrue(
                    any(
                        each.client_id == batch[index].client_id
                        and isinstance(each, Request)
                        and each.generation is None
                        and isinstance(result, Claim)
                        for each, result in later
                    )
                )

    def test_whom_it_took_over_from_stays_when_it_is_tried_again(self) -> None:
        request = make("claim", "x", 5, True, False)
        (claim,) = settle([request], {"x": Row(LIVE, 5, 1, "h")}, ME, NOW, True, OWNERS).outcomes
        assert isinstance(claim, Claim)
        # The first try is in.
        (again,) = settle([request], {"x": Row(ME, NOW, NOW, "h")}, ME, NOW + 1, True, OWNERS).outcomes
        assert isinstance(again, Claim)
        self.assertEqual((again.generation, again.before), (NOW + 1, claim.before))
        self.assertEqual(claim.before and claim.before.node_name, "live")

    def test_where_it_is_placed(self) -> None:
        """A node that takes clients; this one takes it from whoever has it."""
        held = {"x": Row(LIVE, 5, 1, "h")}
        for place, kind in ((LIVE, PlacedElsewhere), (ME, Claim)) + tuple(
            (n, HeldElsewhere) for n in (DEAD, GONE, FULL)
        ):
            request = make("claim", "x", 0, True, True, True)
            (outcome,) = settle([request], held, ME, NOW, True, OWNERS, {"x": place}).outcomes
            self.assertIsInstance(outcome, kind)
