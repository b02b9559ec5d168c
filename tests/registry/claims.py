"""What every registry promises of claims over another node's: tests to be mixed in beside those of ``contract``."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from gateway.registry.interface import Claim, HeldElsewhere, LeaseLost, Location, NodeInfo, Superseded
from tests.registry.contract import LEASE, RegistryMixin


class ClaimsMixin(RegistryMixin):
    """Node ``a`` has client ``x``, whose claim is ``self.had``; node ``b`` claims it."""

    def setUp(self) -> None:
        super().setUp()
        self.b = self.start("b")
        self.had: Claim = self.get(self.a.claim("x", "h:1"))

    def outlive_a(self) -> None:
        """The lease of ``a`` runs out, that of ``b`` does not."""
        self.clock.advance(LEASE - 1)
        self.get(self.b.heartbeat("up", 0))
        self.clock.advance(2)

    def held(self, deferred: Deferred[Any]) -> Location:
        location: Location = self.fails(deferred, HeldElsewhere).location
        return location

    def test_a_client_that_nobody_has_is_taken_without_more(self) -> None:
        for over, judge in ((None, False), (0, False), (5, True)):
            claim = self.get(self.b.claim(f"y{over}", "h:2", over=over, judge=judge))
            self.assertIsNone(claim.before)

    def test_over_none_finds_out_who_has_it(self) -> None:
        location = self.held(self.b.claim("x", "h:2", over=0))
        self.assertEqual(location, self.get(self.b.find("x")))
        self.assertEqual((location.node_name, location.generation, location.live), ("a", self.had.generation, True))
        self.assertEqual((location.public_url, location.peer_url, location.state), ("ws://a/", "ws://a:81/", "up"))
        self.assertEqual(self.where("x"), "a")

    def test_who_is_draining_is_said(self) -> None:
        self.get(self.a.heartbeat("draining", 1))
        self.assertEqual(self.held(self.b.claim("x", "h:2", over=0)).state, "draining")
        self.assertEqual(self.get(self.b.find("x")).state, "draining")

    def test_over_that_claim_or_a_newer_one(self) -> None:
        self.held(self.b.claim("x", "h:2", over=self.had.generation - 1))
        before = self.get(self.b.find("x"))
        claim = self.get(self.b.claim("x", "h:2", over=self.had.generation))
        self.assertEqual(claim.before, before)
        self.assertGreater(claim.generation, self.had.generation)
        self.assertEqual(self.where("x"), "b")
        back = self.get(self.a.claim("x", "h:1", over=claim.generation + 1))
        self.assertEqual(back.before.node_name, "b")

    def test_over_whoever_has_it(self) -> None:
        claim = self.get(self.b.claim("x", "h:2"))
        self.assertEqual((claim.before.node_name, claim.before.generation), ("a", self.had.generation))

    def test_a_client_of_this_node_is_taken_without_more(self) -> None:
        for over in (None, 0, 5):
            claim = self.get(self.a.claim("x", "h:2", over=over))
            self.assertIsNone(claim.before)

    def test_leases_count_only_for_who_judges(self) -> None:
        self.outlive_a()
        self.assertFalse(self.held(self.b.claim("x", "h:2", over=0)).live)
        claim = self.get(self.b.claim("x", "h:2", over=0, judge=True))
        self.assertEqual((claim.before.node_name, claim.before.live), ("a", False))

    def test_who_judges_spares_the_living(self) -> None:
        self.held(self.b.claim("x", "h:2", over=0, judge=True))

    def test_a_node_that_is_leaving_has_nothing(self) -> None:
        self.patch(self.a, "_do", lambda turn, operation, work: self.half_way(turn, operation, work))
        self.left = 0
        self.get(self.a.leave())
        self.assertIsNone(self.get(self.b.claim("x", "h:2", over=0)).before)

    def half_way(self, turn: Any, operation: str, work: Any) -> Deferred[Any]:
        """Let it end its lease, and not remove its rows."""
        self.left += 1
        result: Deferred[Any] = Deferred()
        if self.left > 1:
            result.callback(None)
            return result
        return type(self.a)._do(self.a, turn, operation, work)

    def test_a_node_that_is_gone_is_told_nothing(self) -> None:
        self.outlive_a()
        self.get(self.b.reap(10))
        self.assertIsNone(self.get(self.b.claim("x", "h:2", over=0)).before)

    def test_what_is_held_elsewhere_is_so_for_that_claim_alone(self) -> None:
        asked = [self.b.claim("x", "h:2", over=0), self.b.claim("y", "h:2", over=0), self.b.claim("z", "h:2")]
        self.held(asked[0])
        for each in asked[1:]:
            self.assertIsInstance(self.get(each), Claim)
        self.assertEqual(self.where("x"), "a")

    def test_an_older_claim_wins_when_the_newer_may_not(self) -> None:
        older, newer = self.b.claim("x", "h:2"), self.b.claim("x", "h:3", over=0)
        first, second = self.get(older), self.get(newer)
        # The newer one finds the client with its own node.
        self.assertEqual((first.before.node_name, second.before), ("a", None))
        self.assertGreater(second.generation, first.generation)
        self.assertEqual(self.get(self.b.find("x")).address, "h:3")

    def test_a_newer_claim_supersedes_one_that_is_held_off(self) -> None:
        older, newer = self.b.claim("x", "h:2", over=0), self.b.claim("x", "h:3")
        claim = self.get(newer)
        self.failureResultOf(older, Superseded)
        self.assertEqual(claim.before.node_name, "a")

    def test_both_may_be_held_off(self) -> None:
        asked = [self.b.claim("x", address, over=0) for address in ("h:2", "h:3")]
        for each in asked:
            self.assertEqual(self.held(each).node_name, "a")

    def test_without_a_lease_it_does_not_matter_who_has_it(self) -> None:
        self.clock.advance(LEASE + 1)
        self.fails(self.b.claim("x", "h:2", over=0), LeaseLost)

    def test_a_reclaim_says_nothing_of_before(self) -> None:
        self.assertIsNone(self.get(self.b.reclaim("x", self.had.generation + 1, "h:2")).before)
        self.assertEqual(self.where("x"), "b")

    def test_an_id_that_is_too_long(self) -> None:
        self.assertIsInstance(self.get(self.a.claim("l" * 128, "h:1")), Claim)
        self.fails(self.a.claim("l" * 129, "h:1"), ValueError)
        self.assertIsNone(self.get(self.a.find("l" * 129)))

    def test_text_that_has_a_meaning_in_sql(self) -> None:
        strange = "'\"\\%_?%s{}`;--\0\n\r\t\x1a\u00e9\U0001f600"
        self.get(self.a.join(NodeInfo("a".ljust(36, "-"), strange, "ws://'", "ws://\\", 1)))
        name = "".join(chr(code) for code in range(128))
        claim = self.get(self.a.claim(name, strange))
        location = self.get(self.b.find(name))
        self.assertEqual((location.client_id, location.address, location.node_name), (name, strange, strange))
        self.assertEqual((location.public_url, location.peer_url), ("ws://'", "ws://\\"))
        self.assertIn(name, [found.client_id for found in self.get(self.b.clients("", 10))])
        self.get(self.a.release(name, claim.generation))
        self.assertIsNone(self.get(self.b.find(name)))
        self.assertEqual(self.where("x"), None)  # it joined anew
        for wrong in ("' OR '1'='1", "x' -- ", "\\"):
            self.assertIsNone(self.get(self.b.find(wrong)))

    def test_an_address_of_any_length_is_cut(self) -> None:
        self.get(self.a.claim("y", "\u00e9" * 1000))
        self.assertEqual(self.get(self.b.find("y")).address, "\u00e9" * 255)

    def test_ids_differ_by_case_and_by_every_byte(self) -> None:
        names = ["k", "K", "k ", "k\0", "k.", "k:", "kk"]
        for name in names:
            self.get(self.a.claim(name, repr(name)))
        for name in names:
            self.assertEqual(self.get(self.b.find(name)).address, repr(name))
        listed = [found.client_id for found in self.get(self.b.clients("", 100, prefix="k"))]
        self.assertEqual(listed, sorted(name for name in names if name.startswith("k")))
        for index, name in enumerate(listed):
            after = [found.client_id for found in self.get(self.b.clients(name, 100, prefix="k"))]
            self.assertEqual(after, listed[index + 1 :])
