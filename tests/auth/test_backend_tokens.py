"""Tests of gateway.auth.backend_tokens."""

from __future__ import annotations

import gc
import hashlib
import hmac
import os
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.backend_tokens import NO_GRANT, UNLIMITED, VERBS, BackendTokens, Grant
from gateway.auth.errors import ForbiddenError
from gateway.settings import ConfigError

#: lines that are nearly valid
words = st.lists(
    st.sampled_from(["a", "b", " ", "\n", "\t", "prefix=", "verbs=", "call", ",", "read", "sha256:", "#", "/", "\x1c"])
).map(lambda pieces: "".join(pieces).encode())


class BackendTokensTest(SynchronousTestCase):
    def write(self, text: str | bytes, path: str | None = None) -> str:
        path = path or self.mktemp()
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return path

    def test_lines(self) -> None:
        hashed = hashlib.sha256(b"hashed").hexdigest()
        tokens = BackendTokens(self.write(f"# billing\nplain # its token\r\n\n  with#hash\nsha256:{hashed}\n"))
        for token in ("plain", "with#hash", "hashed"):
            self.assertIsNotNone(tokens.grant(token), token)
        for token in ("", "plain ", "Plain", "with", f"sha256:{hashed}", hashed, "# billing", "\xe9", "\ud800"):
            self.assertIsNone(tokens.grant(token), token)

    def test_problems(self) -> None:
        for text, problem in (
            ("", "has no token"),
            ("# nothing\n\n", "has no token"),
            ("ok\ntwo words\n", "line 2: write TOKEN [prefix=P] [verbs=V"),
            ("two\twords", "line 1: write TOKEN [prefix=P] [verbs=V"),
            ("\xe9", "line 1: a token is one word of ASCII"),
            ("\nsha256:abc", "line 2: after sha256: there are not 64 hexadecimal digits"),
            ("sha256:", "64 hexadecimal"),
            (b"\xff\xfe", "UTF-8"),
            ("x" * 8193, "line 1: the token has more than 8192 characters"),
            ("#" * 1048577, "has more than 1048576 bytes"),
        ):
            path = self.write(text)
            error = self.assertRaises(ConfigError, BackendTokens, path)
            self.assertEqual(error.option, "backend-token-file")
            self.assertIn(path, str(error))
            self.assertIn(problem, str(error))

    def test_a_problem_shows_no_token(self) -> None:
        error = self.assertRaises(ConfigError, BackendTokens, self.write("s3cret token"))
        self.assertNotIn("s3cret", str(error))

    def test_the_longest_token(self) -> None:
        self.assertIsNotNone(BackendTokens(self.write("x" * 8192)).grant("x" * 8192))

    def test_world_readable_plain_tokens_are_warned_of(self) -> None:
        """At each reading; not for tokens that are only there as a SHA-256."""
        hashed = "sha256:" + hashlib.sha256(b"x").hexdigest()
        for text, mode, warned in (
            ("one", 0o644, True),
            (f"{hashed}\none", 0o644, True),
            ("one", 0o640, False),
            (hashed, 0o644, False),
        ):
            path = self.write(text)
            os.chmod(path, mode)
            with capturedLogs() as logs:
                BackendTokens(path).reload()
            expected = f"--backend-token-file: {path} can be read by all users of this machine; chmod o-r it"
            lines = [event["log_format"].format(**event) for event in logs]
            self.assertEqual(lines, [expected] * 2 if warned else [], (text, mode))

    def test_unreadable(self) -> None:
        error = self.assertRaises(ConfigError, BackendTokens, self.mktemp())
        self.assertIn("cannot be read: No such file", str(error))

    def test_reload(self) -> None:
        path = self.write("one")
        tokens = BackendTokens(path)
        self.write("", path)
        self.assertRaises(ConfigError, tokens.reload)
        self.assertIsNotNone(tokens.grant("one"))
        self.write("two", path)
        tokens.reload()
        self.assertIsNone(tokens.grant("one"))
        self.assertIsNotNone(tokens.grant("two"))

    def test_limits(self) -> None:
        hashed = hashlib.sha256(b"hashed").hexdigest()
        lines = f"""
            all
            acme \t prefix=acme/
            two verbs=call,notify prefix=b
            sha256:{hashed} prefix=. verbs=serve # its token
            # so were tokens before there were limits
            every verbs=disconnect,serve,read,notify,call
            with=prefix=a
        """
        tokens = BackendTokens(self.write(lines))
        for token, prefix, verbs, limited in (
            ("all", "", VERBS, False),
            ("acme", "acme/", VERBS, True),
            ("two", "b", ("call", "notify"), True),
            ("hashed", ".", ("serve",), True),
            ("every", "", VERBS, True),
            ("with=prefix=a", "", VERBS, False),
        ):
            grant = tokens.grant(token)
            assert grant is not None, token
            self.assertEqual((grant.prefix, grant.verbs, grant.is_limited), (prefix, frozenset(verbs), limited), token)

    def test_prefix_of_no_client_id(self) -> None:
        """It is named, and the other tokens work."""
        path = self.write("one prefix=/acme/\ntwo prefix=acme/\nthree prefix=spiffe://acme/\n")
        os.chmod(path, 0o600)
        with capturedLogs() as logs:
            tokens = BackendTokens(path)
        self.assertTrue(all(tokens.grant(token) for token in ("one", "two", "three")))
        lines = [event["log_format"].format(**event) for event in logs]
        named = (
            f"--backend-token-file: {path}: 1 line is without effect: line 1 (prefix=/acme/): no client_id begins so"
        )
        self.assertEqual(lines, [named])

    def test_bad_limits(self) -> None:
        for words, problem in (
            ("prefix=", "prefix= is how client ids begin: 1 to 128"),
            ("prefix=" + "a" * 129, "1 to 128"),
            ("prefix=a%2F", "1 to 128"),
            ("prefix=a prefix=a", "prefix= is given twice"),
            ("verbs=call prefix=a verbs=call", "verbs= is given twice"),
            ("verbs=", "verbs= is some of call,notify,read,disconnect,serve"),
            ("verbs=call,", "verbs= is some of"),
            ("verbs=call, notify", "without blanks inside a field"),
            ("verbs=Call", "verbs= is some of"),
            ("verbs=drain", "verbs= is some of"),
            ("prefixes=a", "write TOKEN [prefix=P] [verbs=V"),
            ("PREFIX=a", "write TOKEN [prefix=P] [verbs=V"),
            ("s3cret2", "write TOKEN [prefix=P] [verbs=V"),
            ("prefix = a", "write TOKEN [prefix=P] [verbs=V"),
        ):
            path = self.write(f"# it\ns3cret {words}\n")
            error = self.assertRaises(ConfigError, BackendTokens, path)
            self.assertIn(f"{path} line 2: ", str(error))
            self.assertIn(problem, str(error))
            self.assertNotIn("s3cret", str(error))

    def test_limits_without_a_token(self) -> None:
        for line in ("prefix=acme/", "verbs=call", "prefix=acme/ verbs=call"):
            error = self.assertRaises(ConfigError, BackendTokens, self.write(line))
            self.assertIn("line 1: the line does not begin with a token", str(error))

    def test_the_same_token_twice(self) -> None:
        digest = hashlib.sha256(b"s3cret").hexdigest()
        same = f"s3cret verbs=call,read prefix=a\nsha256:{digest} prefix=a verbs=read,call\nother\nother\n"
        BackendTokens(self.write(same))
        for other in ("s3cret", f"sha256:{digest.upper()} prefix=a", "s3cret prefix=b verbs=call,read"):
            error = self.assertRaises(ConfigError, BackendTokens, self.write(f"{same}{other}"))
            self.assertIn("line 5: the token of line 1 has other limits here", str(error))
            self.assertNotIn("s3cret", str(error))
            self.assertNotIn(digest, str(error))

    def test_grants_in_use_change_with_the_file(self) -> None:
        path = self.write("one\ntwo prefix=b/\nthree")
        tokens = BackendTokens(path)
        one, two, three = (tokens.grant(token) for token in ("one", "two", "three"))
        assert one is not None
        assert two is not None
        assert three is not None
        self.write("two verbs=read\nthree", path)
        tokens.reload()
        self.assertTrue(one.is_revoked)
        self.assertEqual((two.prefix, two.verbs, two.is_revoked), ("", {"read"}, False))
        self.assertFalse(three.is_limited)
        self.assertIs(tokens.grant("two"), two)

        # A bad file changes nothing, not even for its good lines.
        self.write("one\ntwo\nthree verbs=fly", path)
        self.assertRaises(ConfigError, tokens.reload)
        self.assertEqual((one.is_revoked, two.verbs, three.is_limited), (True, {"read"}, False))

        # Connections that still use the grant have it back.
        self.write("one prefix=a/", path)
        tokens.reload()
        self.assertIs(tokens.grant("one"), one)
        self.assertEqual((one.prefix, one.is_revoked, two.is_revoked, three.is_revoked), ("a/", False, True, True))

    def test_removed_tokens_are_forgotten_unless_in_use(self) -> None:
        path = self.write("".join(f"token-{i}\n" for i in range(100)))
        tokens = BackendTokens(path)
        kept = tokens.grant("token-7")
        self.write("other", path)
        tokens.reload()
        gc.collect()
        self.assertEqual(list(tokens._revoked.values()), [kept])

    def test_a_check_compares_once(self) -> None:
        """Regardless of the number of tokens; and in constant time, not by ``==``."""
        tokens = BackendTokens(self.write("".join(f"token-{i}\n" for i in range(1000))))
        with mock.patch("gateway.auth.backend_tokens.hmac.compare_digest", wraps=hmac.compare_digest) as compare:
            for token in ("token-0", "token-999", "nobody's"):
                tokens.grant(token)
        self.assertEqual(compare.call_count, 3)

    @settings(deadline=None, max_examples=200)
    @given(st.binary(max_size=80) | words, st.text(max_size=20))
    def test_generated(self, content: bytes, token: str) -> None:
        try:
            BackendTokens(self.write(content)).grant(token)
        except ConfigError as e:
            self.assertEqual(len(str(e).splitlines()), 1)


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
                    self.problem(grant, verb, client_id), "this token is limited to client ids that begin with acme/"
                )
        self.assertTrue(grant.is_limited)
        self.assertRaises(ForbiddenError, grant.check_unlimited)

    def test_verbs(self) -> None:
        grant = Grant(verbs=["read", "call"])
        grant.check("call", "anybody")
        grant.check("read", "")
        self.assertEqual(self.problem(grant, "serve"), "this token may not serve; it is for call, read")
        self.assertTrue(Grant(verbs=VERBS).is_limited)
        self.assertIn(
            "without prefix= and verbs=", str(self.assertRaises(ForbiddenError, Grant(verbs=VERBS).check_unlimited))
        )

    def test_revoked_and_restored(self) -> None:
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
    def test_the_checks_agree(self, prefix: str, verbs: set[str] | None, verb: str, client_id: str) -> None:
        grant = Grant(prefix, verbs)
        expected = client_id.startswith(prefix) and (verbs is None or verb in verbs)
        self.assertEqual(grant.allows(verb, client_id), expected)
        if expected:
            grant.check(verb, client_id)
        else:
            # A check of is_limited alone shows that the others are needed.
            self.assertTrue(grant.is_limited)
            self.assertRaises(ForbiddenError, grant.check, verb, client_id)
