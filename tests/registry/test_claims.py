"""Tests of gateway.registry.claims: batches of claims with different policies."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.claims import ClaimRequest, Owner, ReleaseRequest, Row, resolve
from gateway.registry.errors import AssignedElsewhereError, ClaimSupersededError, OwnedElsewhereError
from gateway.registry.interface import Claim, ClaimPolicy, SessionKey

OWN_NODE, LIVE, DEAD, GONE, FULL = 1, 2, 3, 4, 5
SMALL_NOW = 10
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


def make_request(
    kind: str,
    client_id: str,
    number: int,
    conditional: bool,
    ignore_expired_owner: bool,
    honor_assignment: bool = False,
) -> Any:
    if kind == "release":
        return ReleaseRequest(SessionKey(client_id, number))
    if kind == "reclaim":
        return ClaimRequest(client_id, "h:1", number or 1, Deferred())
    policy = ClaimPolicy(number if conditional else None, ignore_expired_owner, honor_assignment)
    return ClaimRequest(client_id, "h:1", None, Deferred(), policy)


def plain(outcome: Any) -> Any:
    if isinstance(outcome, AssignedElsewhereError):
        return AssignedElsewhereError, outcome.assignment
    return (OwnedElsewhereError, outcome.location) if isinstance(outcome, OwnedElsewhereError) else outcome


class ClaimPolicyTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=500)
    @given(
        st.lists(REQUESTS, max_size=8),
        st.dictionaries(
            st.sampled_from("xy"), st.tuples(st.sampled_from([OWN_NODE, LIVE, DEAD, GONE]), st.integers(1, 12))
        ),
        st.dictionaries(st.sampled_from("xy"), st.sampled_from([OWN_NODE, LIVE, DEAD, GONE, FULL])),
    )
    def test_a_batch_equals_its_requests_one_by_one(
        self,
        requests: list[tuple[str, str, int, bool, bool, bool]],
        before: dict[str, tuple[int, int]],
        placements: dict[str, int],
    ) -> None:
        original = {client_id: Row(node, generation, 1, "h") for client_id, (node, generation) in before.items()}
        batch = [make_request(*each) for each in requests]
        together = resolve(batch, original, OWN_NODE, SMALL_NOW, True, OWNERS, placements)
        rows = dict(original)
        for each, again, outcome in zip(
            batch, [make_request(*each) for each in requests], together.outcomes, strict=True
        ):
            if isinstance(outcome, ClaimSupersededError):
                if isinstance(each, ClaimRequest) and each.generation is not None:
                    row = rows[each.client_id]
                    self.assertTrue(row.node == OWN_NODE and row.generation > each.generation)
                continue
            alone = resolve([again], rows, OWN_NODE, SMALL_NOW, True, OWNERS, placements)
            self.assertEqual([plain(outcome)], [plain(each) for each in alone.outcomes])
            if isinstance(each, ClaimRequest) and each.generation is None and isinstance(outcome, Claim):
                self.assertEqual(each.previous_owner, outcome.previous_owner)
            rows = {**rows, **alone.written}
            for client_id in alone.removed:
                del rows[client_id]
        after = {**original, **together.written}
        for client_id in together.removed:
            del after[client_id]
        self.assertEqual(after, rows)
        self.check_superseded(batch, together.outcomes)

    def check_superseded(self, batch: list[Any], outcomes: list[Any]) -> None:
        """Each superseded claim is followed by a successful claim of the same client."""
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, ClaimSupersededError) and batch[index].generation is None:
                later = zip(batch[index + 1 :], outcomes[index + 1 :], strict=True)
                self.assertTrue(
                    any(
                        each.client_id == batch[index].client_id
                        and isinstance(each, ClaimRequest)
                        and each.generation is None
                        and isinstance(result, Claim)
                        for each, result in later
                    )
                )

    def test_the_previous_owner_is_kept_when_the_batch_is_retried(self) -> None:
        request = make_request("claim", "x", 5, True, False)
        (claim,) = resolve([request], {"x": Row(LIVE, 5, 1, "h")}, OWN_NODE, SMALL_NOW, True, OWNERS).outcomes
        assert isinstance(claim, Claim)
        # The first try was committed.
        (again,) = resolve(
            [request], {"x": Row(OWN_NODE, SMALL_NOW, SMALL_NOW, "h")}, OWN_NODE, SMALL_NOW + 1, True, OWNERS
        ).outcomes
        assert isinstance(again, Claim)
        self.assertEqual((again.generation, again.previous_owner), (SMALL_NOW + 1, claim.previous_owner))
        self.assertEqual(claim.previous_owner and claim.previous_owner.node_name, "live")

    def test_an_assignment_decides(self) -> None:
        """If its node accepts clients. The assigned node takes the client over from any owner."""
        rows = {"x": Row(LIVE, 5, 1, "h")}
        for place, kind in ((LIVE, AssignedElsewhereError), (OWN_NODE, Claim)) + tuple(
            (n, OwnedElsewhereError) for n in (DEAD, GONE, FULL)
        ):
            request = make_request("claim", "x", 0, True, True, True)
            (outcome,) = resolve([request], rows, OWN_NODE, SMALL_NOW, True, OWNERS, {"x": place}).outcomes
            self.assertIsInstance(outcome, kind)
