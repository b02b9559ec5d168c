"""Tests of gateway.agent.token."""

from __future__ import annotations

import base64
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.token import check_token, token_expiry


def jwt(claims: Any) -> str:
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return f"e30.{base64.urlsafe_b64encode(payload).decode().rstrip('=')}.c2ln"


class CheckTokenTests(SynchronousTestCase):
    def test_what_is_none(self) -> None:
        self.assertEqual(check_token("a.b~!"), "a.b~!")
        for token in ("", "a b", "a\r\nb", "\xe9", None, 7, b"a"):
            with self.assertRaisesRegex(ValueError, "^the token is not a text of visible ASCII characters"):
                check_token(token)


class TokenExpiryTests(SynchronousTestCase):
    def test_expiry(self) -> None:
        self.assertEqual(token_expiry(jwt({"sub": "a", "exp": 1800000000})), 1800000000.0)
        self.assertEqual(token_expiry(jwt({"exp": 1.5})), 1.5)

    def test_none(self) -> None:
        for claims in (
            *({}, [], "exp", None, b"", b"{", b"\xff", b"[" * 5000),
            *({"exp": value} for value in (None, True, "1800000000", 0, -1, 253402300800, 10**400)),
            *(b'{"exp":1e400}', b'{"exp":NaN}', b'{"exp":Infinity}'),
        ):
            self.assertIsNone(token_expiry(jwt(claims)), claims)
        for token in ("opaque", "a.b", "a.b.c", "a.b.c.d", "..", "e30.!!!!.x", "e30.e30=.x", "\xe9.\xe9.\xe9"):
            self.assertIsNone(token_expiry(token), token)

    @given(st.text() | st.binary().map(jwt) | st.lists(st.text("eE30yJ-_=."), max_size=4).map(".".join))
    def test_any_text(self, token: str) -> None:
        expires = token_expiry(token)
        self.assertTrue(expires is None or expires > 0)
