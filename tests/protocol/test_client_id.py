"""Tests of gateway.protocol.client_id."""

from __future__ import annotations

from hypothesis import assume, example, given, settings
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.client_id import (
    CLIENT_ID_RULE,
    is_client_id,
    is_client_id_part,
    is_client_id_prefix,
    is_former_client_id,
)
from tests.builders.client_ids import client_id_parts, client_ids, normalized

VALID = (
    "a",
    "A-Z_0.9:@+=-",
    "x" * 128,
    "...",
    "acme/robot-7",
    "a/.../b",
    "a/.b/c./..d",
    "spiffe://acme/robot/7",
    "spiffe://acme",
    "a+b.c-1://x",
    "urn:uuid:1",
    "urn:a/b",
    "a:b:/c",
    "a:",
    # Not a scheme (RFC 3986, section 3.1).
    "1:/a",
    "a_b:/c",
)
#: valid before segments were checked
FORMER = (
    "/",
    "//",
    "/a",
    "a/",
    "a//b",
    "a/./b",
    "a/../b",
    "./a",
    "../a",
    "a/.",
    "a/..",
    "spiffe:/acme/robot/7",
    "spiffe:///acme",
    "spiffe://",
    "spiffe:/",
    "spiffe://acme//robot",
    "spiffe://acme/",
    "spiffe://./a",
    "spiffe://../a",
    "x/spiffe://acme",
    "a:b://c",
    "1://a",
    "://a",
    "a/b://c",
)
NEVER = (
    "",
    ".",
    "..",
    "x" * 129,
    "a/" * 64 + "b",
    "a b",
    "a\n",
    "\n",
    "\xe9",
    "a%",
    "a%2Fb",
    "a?",
    "a#",
    "\u0661",
    "a\\b",
)


class ClientIdTests(SynchronousTestCase):
    def test_valid(self) -> None:
        for text in VALID:
            self.assertTrue(is_client_id(text), text)
            self.assertFalse(is_former_client_id(text), text)
            self.assertTrue(is_client_id_prefix(text), text)

    def test_former(self) -> None:
        for text in FORMER:
            self.assertFalse(is_client_id(text), text)
            self.assertTrue(is_former_client_id(text), text)
            self.assertTrue(is_client_id_part(text), text)

    def test_never_valid(self) -> None:
        for text in NEVER:
            self.assertFalse(is_client_id(text), text)
            self.assertFalse(is_former_client_id(text), text)

    def test_prefix(self) -> None:
        for text in (
            "",
            "acme/",
            ".",
            "..",
            "a/.",
            "a/..",
            "spiffe:",
            "spiffe:/",
            "spiffe://",
            "spiffe://acme/",
            "x" * 128,
        ):
            self.assertTrue(is_client_id_prefix(text), text)
        for text in (
            "/",
            "/a",
            "a//",
            "a/./",
            "../",
            "spiffe:/a",
            "spiffe:///",
            "1://",
            "x" * 127 + "/",
            "x" * 129,
            "a%",
        ):
            self.assertFalse(is_client_id_prefix(text), text)

    def test_rule_for_messages(self) -> None:
        self.assertTrue(CLIENT_ID_RULE.isascii())

    @given(client_ids)
    @settings(deadline=None)
    def test_generated(self, text: str) -> None:
        self.assertTrue(is_client_id(text))
        for end in range(len(text)):
            self.assertTrue(is_client_id_prefix(text[:end]), text[:end])

    @given(client_id_parts)
    @settings(deadline=None, max_examples=500)
    @example("spiffe://a")
    @example("a/b/..")
    def test_no_proxy_makes_another_client_of_it(self, text: str) -> None:
        """Whatever is forwarded for the path of a client is that path, or no client's."""
        assume(is_client_id(text))
        for suffix in ("", "/rpc"):
            path = normalized(f"/v1/clients/{text}{suffix}")
            forwarded = path.removeprefix("/v1/clients/").removesuffix(suffix)
            self.assertTrue(forwarded == text or not is_client_id(forwarded), (text, path))

    @given(client_id_parts)
    @settings(deadline=None, max_examples=500)
    def test_every_text_is_one_kind(self, text: str) -> None:
        kinds = [is_client_id(text), is_former_client_id(text), text in ("", ".", "..") or len(text) > 128]
        self.assertEqual(kinds.count(True), 1, text)
        # Only a scheme may be followed by an empty segment.
        if is_client_id(text):
            segments = text.split("/")
            self.assertFalse({".", ".."} & set(segments))
            self.assertNotIn("", segments[:1] + segments[2:])
            self.assertEqual(segments[1:2] == [""], "://" in text)
