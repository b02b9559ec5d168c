"""Tests of gateway.auth.backend_tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.backend_tokens import NO_GRANT, UNLIMITED, VERBS, ForbiddenError, Grant

ids = st.text("a/", max_size=4)


class GrantTest(SynchronousTestCase):
    def problem(self, grant: Grant, verb: str, client_id: str | None = None) -> str:
        return str(self.assertRaises(ForbiddenError, grant.check, verb, client_id))

    def test_unlimited(self) -> None:
        for verb in VERBS:
            for client_id in (None, "", "acme/robot"):
                UNLIMITED.check(verb, client_id)
        UNLIMITED.check_unlimited()
        self.assertFalse(UNLIMITED.is_limited)

    def test_nothing(self) -> None:
        for verb in VERBS:
            self.assertEqual(self.problem(NO_GRANT, verb), f"this token may not {verb}; it is for nothing")
        self.assertRaises(ForbiddenError, NO_GRANT.check_unlimited)

    def test_a_prefix(self) -> None:
        grant = Grant("acme/")
        for verb in VERBS:
            grant.check(verb)
            for client_id in ("acme/", "acme/robot", "acme/../beta/robot"):
                grant.check(verb, client_id)
            for client_id in ("", "acme", "Acme/robot", "beta/acme/", "/acme/", "acme2/"):
                self.assertEqual(
                    self.problem(grant, verb, client_id), "this token is for clients whose id begins with acme/ alone"
                )
        self.assertTrue(grant.is_limited)
        self.assertRaises(ForbiddenError, grant.check_unlimited)

    def test_verbs(self) -> None:
        grant = Grant(verbs=["read", "call"])
        grant.check("call", "anybody")
        grant.check("read", "")
        self.assertEqual(self.problem(grant, "serve"), "this token may not serve; it is for call, read")
        self.assertTrue(Grant(verbs=VERBS).is_limited)
        self.assertIn("alone", str(self.assertRaises(ForbiddenError, Grant(verbs=VERBS).check_unlimited)))

    def test_withdrawn_and_back(self) -> None:
        grant = Grant()
        grant.revoke()
        for verb in VERBS:
            self.assertFalse(grant.allows(verb, "x"))
            self.assertEqual(self.problem(grant, verb, "x"), "this token was withdrawn")
        self.assertEqual(str(self.assertRaises(ForbiddenError, grant.check_unlimited)), "this token was withdrawn")
        self.assertTrue(grant.is_limited)
        grant.set_limits("", None)
        grant.check_unlimited()
        self.assertFalse(grant.is_limited or grant.is_revoked)

    @settings(deadline=None, max_examples=200)
    @given(ids, st.none() | st.sets(st.sampled_from(VERBS)), st.sampled_from(VERBS), ids)
    def test_the_ways_to_ask_agree(self, prefix: str, verbs: set[str] | None, verb: str, client_id: str) -> None:
        grant = Grant(prefix, verbs)
        expected = client_id.startswith(prefix) and (verbs is None or verb in verbs)
        self.assertEqual(grant.allows(verb, client_id), expected)
        if expected:
            grant.check(verb, client_id)
        else:
            # Whoever asks `limited` alone finds out that there is more to ask.
            self.assertTrue(grant.is_limited)
            self.assertRaises(ForbiddenError, grant.check, verb, client_id)
