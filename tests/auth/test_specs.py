"""Tests of gateway.auth.specs."""

from __future__ import annotations

import hashlib

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.auth.interface import (
    ClientIdMissing,
    IAuthenticator,
    Identity,
    IdentityRefused,
    ITokenVerifier,
    Presented,
    TokenRefused,
    is_client_id,
)
from gateway.auth.specs import Authenticators
from gateway.auth.tokens import TokenFile
from gateway.settings import ConfigError


def asks(auth: Authenticators, token: str | None, client_id: str | None) -> str:
    identity = auth.authenticate(Presented(token, client_id))
    assert isinstance(identity, Identity)
    return identity.client_id


class AuthenticatorsTest(SynchronousTestCase):
    def tokens(self, path: str | None = None, **clients: str) -> str:
        path = path or self.mktemp()
        with open(path, "w") as file:
            for name, token in clients.items():
                file.write(f"{name} {hashlib.sha256(token.encode()).hexdigest()}\n")
        return path

    def test_interfaces(self) -> None:
        verifyObject(IAuthenticator, Authenticators(()))
        verifyObject(ITokenVerifier, TokenFile(self.tokens(a="one")))

    def test_none(self) -> None:
        for specs in ((), ("none",)):
            auth = Authenticators(specs)
            self.assertEqual(asks(auth, None, "a"), "a")
            self.assertEqual(asks(auth, "whatever", "a"), "a")
            self.assertRaises(ClientIdMissing, asks, auth, None, None)
            self.assertRaises(ClientIdMissing, asks, auth, "whatever", None)

    def test_tokens(self) -> None:
        auth = Authenticators((f"tokens:{self.tokens(a='one')}", f"tokens:{self.tokens(b='two')}"))
        self.assertEqual(asks(auth, "one", None), "a")
        self.assertEqual(asks(auth, "two", "b"), "b")
        self.assertRaises(TokenRefused, asks, auth, None, "a")
        self.assertRaises(TokenRefused, asks, auth, "", "a")
        self.assertRaises(TokenRefused, asks, auth, "three", None)
        self.assertRaises(IdentityRefused, asks, auth, "one", "b")

    def test_tokens_and_none(self) -> None:
        auth = Authenticators((f"tokens:{self.tokens(a='one')}", "none"))
        self.assertEqual(asks(auth, None, "b"), "b")
        self.assertEqual(asks(auth, "one", None), "a")
        self.assertRaises(TokenRefused, asks, auth, "wrong", "b")
        self.assertRaises(ClientIdMissing, asks, auth, None, None)

    def test_problems(self) -> None:
        for spec, problem in (
            ("jwt:key-file=k", "'jwt:key-file=k' is not known; this version knows none and tokens:FILE"),
            ("", "'' is not known"),
            ("None", "'None' is not known"),
            ("none:", "'none:' is not known"),
            ("tokens", "'tokens' names no file; write tokens:FILE"),
            ("tokens:", "'tokens:' names no file"),
            ("tokens:/nowhere/tokens", "/nowhere/tokens cannot be read"),
        ):
            error = self.assertRaises(ConfigError, Authenticators, (spec,))
            self.assertEqual(str(error)[:7], "--auth:")
            self.assertIn(problem, str(error))

    def test_reload(self) -> None:
        """A file that will not do keeps its old tokens, and says so; the others are read all the same."""
        first, second = self.tokens(a="one"), self.tokens(b="two")
        auth = Authenticators((f"tokens:{first}", f"tokens:{second}"))
        with open(first, "w") as file:
            file.write("broken")
        self.tokens(second, c="three")
        error = self.assertRaises(ConfigError, auth.reload)
        self.assertIn(first, str(error))
        self.assertEqual(asks(auth, "one", None), "a")
        self.assertEqual(asks(auth, "three", None), "c")
        self.assertRaises(TokenRefused, asks, auth, "two", None)
        self.tokens(first, d="four")
        auth.reload()
        self.assertEqual(asks(auth, "four", None), "d")


class ClientIdTest(SynchronousTestCase):
    """is_client_id()"""

    def test_valid(self) -> None:
        for text in ("a", "A-Z_0.9:@/+=-", "x" * 128, "...", "a/../b"):
            self.assertTrue(is_client_id(text), text)

    def test_invalid(self) -> None:
        for text in ("", ".", "..", "x" * 129, "a b", "a\n", "\xe9", "a%", "a?", "a#", "\u0661"):
            self.assertFalse(is_client_id(text), text)
