"""What every registry promises of claims over another node's: tests to be mixed in beside those of ``contract``."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from gateway.registry.interface import (
    Claim,
    ClaimSupersededError,
    LeaseLostError,
    Location,
    NodeInfo,
    OwnedElsewhereError,
)
from tests.registry.contract import LEASE, RegistryMixin


class ClaimPolicyContractMixin(RegistryMixin):
    """Node ``a`` has client ``x``, whose claim is ``self.had``; node ``b`` claims it."""

    def setUp(self) -> None:
        super().setUp()
        self.b = self.start_node("b")
        self.claim_of_a: Claim = self.result_of(self.a.claim("x", "h:1"))

    def expire_lease_of_a(self) -> None:
        """The lease of ``a`` runs out, that of ``b`` does not."""
        self.clock.advance(LEASE - 1)
        self.result_of(self.b.heartbeat("up", 0))
        self.clock.advance(2)

    def owner_location(self, deferred: Deferred[Any]) -> Location:
        location: Location = self.error_of(deferred, OwnedElsewhereError).location
        return location

    def test_a_client_that_nobody_has_is_taken_without_more(self) -> None:
        for over, judge in ((None, False), (0, False), (5, True)):
            claim = self.result_of(self.b.claim(f"y{over}", "h:2", takeover_up_to=over, ignore_expired_owner=judge))
            self.assertIsNone(claim.previous_owner)

    def test_over_none_finds_out_who_has_it(self) -> None:
        location = self.owner_location(self.b.claim("x", "h:2", takeover_up_to=0))
        self.assertEqual(location, self.result_of(self.b.find("x")))
        self.assertEqual(
            (location.node_name, location.generation, location.live), ("a", self.claim_of_a.generation, True)
        )
        self.assertEqual((location.public_url, location.peer_url, location.state), ("ws://a/", "ws://a:81/", "up"))
        self.assertEqual(self.node_name_of("x"), "a")

    def test_who_is_draining_is_said(self) -> None:
        self.result_of(self.a.heartbeat("draining", 1))
        self.assertEqual(self.owner_location(self.b.claim("x", "h:2", takeover_up_to=0)).state, "draining")
        self.assertEqual(self.result_of(self.b.find("x")).state, "draining")

    def test_over_that_claim_or_a_newer_one(self) -> None:
        self.owner_location(self.b.claim("x", "h:2", takeover_up_to=self.claim_of_a.generation - 1))
        before = self.result_of(self.b.find("x"))
        claim = self.result_of(self.b.claim("x", "h:2", takeover_up_to=self.claim_of_a.generation))
        self.assertEqual(claim.previous_owner, before)
        self.assertGreater(claim.generation, self.claim_of_a.generation)
        self.assertEqual(self.node_name_of("x"), "b")
        back = self.result_of(self.a.claim("x", "h:1", takeover_up_to=claim.generation + 1))
        self.assertEqual(back.previous_owner.node_name, "b")

    def test_over_whoever_has_it(self) -> None:
        claim = self.result_of(self.b.claim("x", "h:2"))
        self.assertEqual(
            (claim.previous_owner.node_name, claim.previous_owner.generation), ("a", self.claim_of_a.generation)
        )

    def test_a_client_of_this_node_is_taken_without_more(self) -> None:
        for over in (None, 0, 5):
            claim = self.result_of(self.a.claim("x", "h:2", takeover_up_to=over))
            self.assertIsNone(claim.previous_owner)

    def test_leases_count_only_for_who_judges(self) -> None:
        self.expire_lease_of_a()
        self.assertFalse(self.owner_location(self.b.claim("x", "h:2", takeover_up_to=0)).live)
        claim = self.result_of(self.b.claim("x", "h:2", takeover_up_to=0, ignore_expired_owner=True))
        self.assertEqual((claim.previous_owner.node_name, claim.previous_owner.live), ("a", False))

    def test_who_judges_spares_the_living(self) -> None:
        self.owner_location(self.b.claim("x", "h:2", takeover_up_to=0, ignore_expired_owner=True))

    def test_a_node_that_is_leaving_has_nothing(self) -> None:
        self.patch(self.a, "_run_job", lambda turn, operation, work: self.expire_lease_only(turn, operation, work))
        self.jobs_of_leave = 0
        self.result_of(self.a.leave())
        self.assertIsNone(self.result_of(self.b.claim("x", "h:2", takeover_up_to=0)).previous_owner)

    def expire_lease_only(self, priority: Any, operation: str, work: Any) -> Deferred[Any]:
        """Let it end its lease, and not remove its rows."""
        self.jobs_of_leave += 1
        result: Deferred[Any] = Deferred()
        if self.jobs_of_leave > 1:
            result.callback(None)
            return result
        return type(self.a)._run_job(self.a, priority, operation, work)

    def test_a_node_that_is_gone_is_told_nothing(self) -> None:
        self.expire_lease_of_a()
        self.result_of(self.b.reap(10))
        self.assertIsNone(self.result_of(self.b.claim("x", "h:2", takeover_up_to=0)).previous_owner)

    def test_what_is_held_elsewhere_is_so_for_that_claim_alone(self) -> None:
        asked = [
            self.b.claim("x", "h:2", takeover_up_to=0),
            self.b.claim("y", "h:2", takeover_up_to=0),
            self.b.claim("z", "h:2"),
        ]
        self.owner_location(asked[0])
        for each in asked[1:]:
            self.assertIsInstance(self.result_of(each), Claim)
        self.assertEqual(self.node_name_of("x"), "a")

    def test_an_older_claim_wins_when_the_newer_may_not(self) -> None:
        older, newer = self.b.claim("x", "h:2"), self.b.claim("x", "h:3", takeover_up_to=0)
        first, second = self.result_of(older), self.result_of(newer)
        # The newer one finds the client with its own node.
        self.assertEqual((first.previous_owner.node_name, second.previous_owner), ("a", None))
        self.assertGreater(second.generation, first.generation)
        self.assertEqual(self.result_of(self.b.find("x")).address, "h:3")

    def test_a_newer_claim_supersedes_one_that_is_held_off(self) -> None:
        older, newer = self.b.claim("x", "h:2", takeover_up_to=0), self.b.claim("x", "h:3")
        claim = self.result_of(newer)
        self.failureResultOf(older, ClaimSupersededError)
        self.assertEqual(claim.previous_owner.node_name, "a")

    def test_both_may_be_held_off(self) -> None:
        asked = [self.b.claim("x", address, takeover_up_to=0) for address in ("h:2", "h:3")]
        for each in asked:
            self.assertEqual(self.owner_location(each).node_name, "a")

    def test_without_a_lease_it_does_not_matter_who_has_it(self) -> None:
        self.clock.advance(LEASE + 1)
        self.error_of(self.b.claim("x", "h:2", takeover_up_to=0), LeaseLostError)

    def test_a_reclaim_says_nothing_of_before(self) -> None:
        self.assertIsNone(self.result_of(self.b.reclaim("x", self.claim_of_a.generation + 1, "h:2")).previous_owner)
        self.assertEqual(self.node_name_of("x"), "b")

    def test_an_id_that_is_too_long(self) -> None:
        self.assertIsInstance(self.result_of(self.a.claim("l" * 128, "h:1")), Claim)
        self.error_of(self.a.claim("l" * 129, "h:1"), ValueError)
        self.assertIsNone(self.result_of(self.a.find("l" * 129)))

    def test_text_that_has_a_meaning_in_sql(self) -> None:
        strange = "'\"\\%_?%s{}`;--\0\n\r\t\x1a\u00e9\U0001f600"
        self.result_of(self.a.join(NodeInfo("a".ljust(36, "-"), strange, "ws://'", "ws://\\", 1)))
        name = "".join(chr(code) for code in range(128))
        claim = self.result_of(self.a.claim(name, strange))
        location = self.result_of(self.b.find(name))
        self.assertEqual((location.client_id, location.address, location.node_name), (name, strange, strange))
        self.assertEqual((location.public_url, location.peer_url), ("ws://'", "ws://\\"))
        self.assertIn(name, [found.client_id for found in self.result_of(self.b.clients("", 10))])
        self.result_of(self.a.release(name, claim.generation))
        self.assertIsNone(self.result_of(self.b.find(name)))
        self.assertEqual(self.node_name_of("x"), None)  # it joined anew
        for wrong in ("' OR '1'='1", "x' -- ", "\\"):
            self.assertIsNone(self.result_of(self.b.find(wrong)))

    def test_an_address_of_any_length_is_cut(self) -> None:
        self.result_of(self.a.claim("y", "\u00e9" * 1000))
        self.assertEqual(self.result_of(self.b.find("y")).address, "\u00e9" * 255)

    def test_ids_differ_by_case_and_by_every_byte(self) -> None:
        names = ["k", "K", "k ", "k\0", "k.", "k:", "kk"]
        for name in names:
            self.result_of(self.a.claim(name, repr(name)))
        for name in names:
            self.assertEqual(self.result_of(self.b.find(name)).address, repr(name))
        listed = [found.client_id for found in self.result_of(self.b.clients("", 100, prefix="k"))]
        self.assertEqual(listed, sorted(name for name in names if name.startswith("k")))
        for index, name in enumerate(listed):
            after = [found.client_id for found in self.result_of(self.b.clients(name, 100, prefix="k"))]
            self.assertEqual(after, listed[index + 1 :])
