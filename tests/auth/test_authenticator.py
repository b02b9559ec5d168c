"""Tests of gateway.auth.authenticator."""

from __future__ import annotations

import builtins
import hashlib
import os
from typing import Any
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.auth.authenticator import AuthenticatorChain
from gateway.auth.errors import (
    ClientIdMissingError,
    IdentityMismatchError,
    KeysUnavailableError,
    TicketRefusedError,
    TokenRefusedError,
)
from gateway.auth.interface import AuthMethod, Credentials, IAuthenticator, Identity, ITokenVerifier
from gateway.auth.tickets import Tickets
from gateway.auth.token_file import TokenFile
from gateway.metrics import Metrics
from gateway.settings import ConfigError
from tests.builders.certificates import DNS, END, URI, certificate
from tests.builders.tokens import EC, NOW, OTHER_EC, pem, sign


def authenticate(auth: AuthenticatorChain, token: str | None, client_id: str | None) -> str:
    identity = auth.authenticate(Credentials(token, client_id))
    assert isinstance(identity, Identity)
    return identity.client_id


class AuthenticatorChainTest(SynchronousTestCase):
    def tokens(self, path: str | None = None, **clients: str) -> str:
        path = path or self.mktemp()
        with open(path, "w") as file:
            for name, token in clients.items():
                file.write(f"{name} {hashlib.sha256(token.encode()).hexdigest()}\n")
        return path

    def test_interfaces(self) -> None:
        verifyObject(IAuthenticator, AuthenticatorChain(()))
        verifyObject(ITokenVerifier, TokenFile(self.tokens(a="one")))

    def test_none(self) -> None:
        for specs in ((), ("none",)):
            auth = AuthenticatorChain(specs)
            self.assertEqual(authenticate(auth, None, "a"), "a")
            self.assertEqual(authenticate(auth, "whatever", "a"), "a")
            self.assertRaises(ClientIdMissingError, authenticate, auth, None, None)
            self.assertRaises(ClientIdMissingError, authenticate, auth, "whatever", None)

    def test_tokens(self) -> None:
        auth = AuthenticatorChain((f"tokens:{self.tokens(a='one')}", f"tokens:{self.tokens(b='two')}"))
        self.assertEqual(authenticate(auth, "one", None), "a")
        self.assertEqual(authenticate(auth, "two", "b"), "b")
        self.assertRaises(TokenRefusedError, authenticate, auth, None, "a")
        self.assertRaises(TokenRefusedError, authenticate, auth, "", "a")
        self.assertRaises(TokenRefusedError, authenticate, auth, "three", None)
        self.assertRaises(IdentityMismatchError, authenticate, auth, "one", "b")

    def test_tokens_and_none(self) -> None:
        auth = AuthenticatorChain((f"tokens:{self.tokens(a='one')}", "none"))
        self.assertEqual(authenticate(auth, None, "b"), "b")
        self.assertEqual(authenticate(auth, "one", None), "a")
        self.assertRaises(TokenRefusedError, authenticate, auth, "wrong", "b")
        self.assertRaises(ClientIdMissingError, authenticate, auth, None, None)

    def test_problems(self) -> None:
        for spec, problem in (
            ("", "'' is not known; write none, tokens:FILE, jwt:…, jwks:… or mtls"),
            ("mtls:", "'mtls:' is not known"),
            ("None", "'None' is not known"),
            ("none:", "'none:' is not known"),
            ("tokens", "'tokens' names no file; write tokens:FILE"),
            ("tokens:", "'tokens:' names no file"),
            ("tokens:/nowhere/tokens", "/nowhere/tokens cannot be read"),
        ):
            error = self.assertRaises(ConfigError, AuthenticatorChain, (spec,))
            self.assertEqual(str(error)[:7], "--auth:")
            self.assertIn(problem, str(error))

    def test_reload(self) -> None:
        """An invalid file is reported, and its old tokens stay; the other files are read."""
        first, second = self.tokens(a="one"), self.tokens(b="two")
        auth = AuthenticatorChain((f"tokens:{first}", f"tokens:{second}"))
        with open(first, "w") as file:
            file.write("broken")
        self.tokens(second, c="three")
        error = self.assertRaises(ConfigError, auth.reload)
        self.assertIn(first, str(error))
        self.assertEqual(authenticate(auth, "one", None), "a")
        self.assertEqual(authenticate(auth, "three", None), "c")
        self.assertRaises(TokenRefusedError, authenticate, auth, "two", None)
        self.tokens(first, d="four")
        auth.reload()
        self.assertEqual(authenticate(auth, "four", None), "d")
        for path in (first, second):
            os.remove(path)
        error = self.assertRaises(ConfigError, auth.reload)
        problem = "cannot be read: No such file or directory"
        self.assertEqual(str(error), f"--auth: {first} {problem}; {second} {problem}")


class FakeVerifier:
    """A verifier that returns, or raises, ``result``."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.tokens: list[str] = []

    def verify(self, token: str) -> Any:
        self.tokens.append(token)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class ChainOrderTests(SynchronousTestCase):
    """Combinations of verifiers, certificates and client_ids."""

    def make(self, *results: Any, mtls: bool = False, none: bool = False) -> AuthenticatorChain:
        self.verifiers = [FakeVerifier(result) for result in results]
        specs = [*(["mtls"] if mtls else []), *(["none"] if none else [])] or [f"tokens:{os.devnull}"]
        auth = AuthenticatorChain(specs, wall_clock=lambda: NOW)
        auth._verifiers[:] = self.verifiers
        return auth

    def refused(self, kind: type[Exception], auth: AuthenticatorChain, *args: Any, **kwargs: Any) -> str:
        return str(self.assertRaises(kind, auth.authenticate, Credentials(*args, **kwargs)))

    def test_in_order_and_synchronously(self) -> None:
        auth = self.make(None, Identity("a"), Identity("b"))
        self.assertEqual(auth.authenticate(Credentials("t")), Identity("a"))
        self.assertEqual([each.tokens for each in self.verifiers], [["t"], ["t"], []])
        self.assertEqual(auth.renew("t", "a"), Identity("a"))
        self.assertRaises(IdentityMismatchError, auth.renew, "t", "b")

    def test_an_asynchronous_verifier(self) -> None:
        first: Deferred[Any] = Deferred()
        second: Deferred[Any] = Deferred()
        auth = self.make(None, first, Identity("a", NOW), second, Identity("b", NOW + 1))
        waiting = auth.authenticate(Credentials("t", "b"))
        assert isinstance(waiting, Deferred)
        self.assertEqual(self.verifiers[2].tokens, [])
        first.callback(None)
        self.assertEqual(self.verifiers[2].tokens, ["t"])
        self.assertNoResult(waiting)
        second.errback(KeysUnavailableError("later"))
        self.assertEqual(self.successResultOf(waiting), Identity("b", NOW + 1))

    def test_the_first_verifier_that_accepts_ends_the_check(self) -> None:
        first: Deferred[Any] = Deferred()
        auth = self.make(first, Identity("b"))
        waiting = auth.authenticate(Credentials("t"))
        first.callback(Identity("a"))
        self.assertEqual(self.successResultOf(waiting), Identity("a"))
        self.assertEqual(self.verifiers[1].tokens, [])

    def test_later_refusals(self) -> None:
        for result, kind in (
            (None, TokenRefusedError),
            (Identity("b"), IdentityMismatchError),
            (KeysUnavailableError("x"), KeysUnavailableError),
        ):
            for ask in (lambda auth: auth.authenticate(Credentials("t", "a")), lambda auth: auth.renew("t", "a")):
                later: Deferred[Any] = Deferred()
                waiting = ask(self.make(later))
                later.errback(result) if isinstance(result, Exception) else later.callback(result)
                self.failureResultOf(waiting, kind)

    def test_cancelled(self) -> None:
        later: Deferred[Any] = Deferred()
        waiting = self.make(later, Identity("a")).authenticate(Credentials("t"))
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.assertEqual(self.verifiers[1].tokens, [])

    def test_the_most_specific_error_is_raised(self) -> None:
        """An expired token, then keys that are not available, then an unknown token."""
        unavailable, expired = KeysUnavailableError("unavailable"), Identity("a", NOW)
        self.assertEqual(self.refused(TokenRefusedError, self.make(None, None), "t"), "this token is not known here")
        self.assertEqual(
            self.refused(TokenRefusedError, self.make(unavailable, expired, None), "t"), "this token has expired"
        )
        self.assertEqual(self.refused(KeysUnavailableError, self.make(None, unavailable, None), "t"), "unavailable")
        self.assertEqual(self.make(expired, unavailable, Identity("b")).authenticate(Credentials("t")), Identity("b"))

    def test_expiry_is_strict(self) -> None:
        self.assertEqual(self.make(Identity("a", NOW + 0.1)).authenticate(Credentials("t")), Identity("a", NOW + 0.1))
        self.refused(TokenRefusedError, self.make(Identity("a", NOW)), "t")

    def test_a_token_that_is_too_long(self) -> None:
        auth = self.make(Identity("a"))
        self.assertEqual(auth.authenticate(Credentials("x" * 8192)), Identity("a"))
        self.assertEqual(self.refused(TokenRefusedError, auth, "x" * 8193), "this token is not known here")
        self.assertRaises(TokenRefusedError, auth.renew, "x" * 8193, "a")
        self.assertEqual(len(self.verifiers[0].tokens), 1)

    def test_a_certificate(self) -> None:
        auth = self.make(mtls=True)
        until = END.timestamp()
        shown = {"certificate": lambda: certificate(DNS)}
        expected = Identity("robot-7.example.com", until, max_expires_at=until)
        self.assertEqual(auth.authenticate(Credentials(**shown)), expected)
        self.assertEqual(auth.authenticate(Credentials("ignored", **shown)), expected)
        self.assertEqual(auth.authenticate(Credentials(None, "robot-7.example.com", **shown)), expected)
        text = self.refused(IdentityMismatchError, auth, None, "robot-8", **shown)
        self.assertEqual(text, "this client certificate is for another client_id than the query says")
        self.refused(TokenRefusedError, auth, certificate=lambda: b"nonsense")
        self.assertEqual(self.refused(TokenRefusedError, auth), "a client certificate is required")

    def test_a_certificate_that_has_expired(self) -> None:
        auth = self.make(mtls=True)
        auth._wall_clock = lambda: END.timestamp()
        text = self.refused(TokenRefusedError, auth, certificate=lambda: certificate(DNS))
        self.assertEqual(text, "this client certificate has expired")

    def test_a_certificate_without_mtls_is_ignored(self) -> None:
        """It is not used to identify the client."""
        auth = self.make(Identity("a"))
        self.assertEqual(auth.authenticate(Credentials("t", certificate=lambda: certificate(DNS))), Identity("a"))

    def test_a_token_and_a_certificate(self) -> None:
        shown = {"certificate": lambda: certificate(URI)}
        name, end = "spiffe://acme/robot/7", END.timestamp()
        for until, first in ((NOW + 1, NOW + 1), (end + 1, end), (0.0, end)):
            auth = self.make(Identity(name, until), mtls=True)
            self.assertEqual(
                auth.authenticate(Credentials("t", name, **shown)), Identity(name, first, max_expires_at=end)
            )
        text = self.refused(IdentityMismatchError, self.make(Identity("a"), mtls=True), "t", **shown)
        self.assertEqual(text, "this token is for another client than the client certificate")
        self.refused(TokenRefusedError, self.make(None, mtls=True), "t", **shown)
        self.refused(TokenRefusedError, self.make(Identity("a"), mtls=True), "t", certificate=lambda: b"nonsense")
        later: Deferred[Any] = Deferred()
        waiting = self.make(later, mtls=True).authenticate(Credentials("t", **shown))
        later.callback(Identity("a"))
        self.failureResultOf(waiting, IdentityMismatchError)

    def test_a_token_or_a_certificate_is_enough(self) -> None:
        name = "spiffe://acme/robot/7"
        auth = self.make(Identity("a"), mtls=True)
        self.assertEqual(auth.authenticate(Credentials("t")), Identity("a"))
        identity = auth.authenticate(Credentials(certificate=lambda: certificate(URI)))
        self.assertEqual(identity, Identity(name, END.timestamp(), END.timestamp()))

    def test_a_certificate_with_auth_none(self) -> None:
        """A client with a certificate cannot request another client_id."""
        auth = self.make(mtls=True, none=True)
        self.assertEqual(auth.authenticate(Credentials(None, "a")), Identity("a"))
        self.refused(IdentityMismatchError, auth, None, "a", certificate=lambda: certificate(URI))


class TicketTests(SynchronousTestCase):
    """Clients that another node has sent here."""

    def setUp(self) -> None:
        self.tickets = Tickets("b", lambda: b"secret", wall_clock=lambda: NOW)
        self.metrics = Metrics()
        path = self.mktemp()
        with open(path, "w") as file:
            file.write(f"a {hashlib.sha256(b'one').hexdigest()}")
        self.tokens = f"tokens:{path}"

    def make(self, *specs: str) -> AuthenticatorChain:
        return AuthenticatorChain(specs, metrics=self.metrics, wall_clock=lambda: NOW, tickets=self.tickets)

    def ticket(self, method: AuthMethod = AuthMethod.TOKENS) -> str:
        return self.tickets.issue(Identity("a", method=method), "b")

    def test_methods(self) -> None:
        for credentials, method in (
            (Credentials("one"), AuthMethod.TOKENS),
            (Credentials(certificate=lambda: certificate(DNS)), AuthMethod.MTLS),
            (Credentials(None, "x"), AuthMethod.NONE),
        ):
            self.assertEqual(self.make(self.tokens, "mtls", "none").authenticate(credentials).method, method)
        auth = self.make("mtls")
        auth._verifiers[:] = [FakeVerifier(Identity("robot-7.example.com", method=AuthMethod.JWT))]
        both = auth.authenticate(Credentials("t", certificate=lambda: certificate(DNS)))
        self.assertEqual(both.method, AuthMethod.MTLS)

    def test_ticket_instead_of_a_token(self) -> None:
        auth, ticket = self.make(self.tokens), self.ticket()
        identity = auth.authenticate(Credentials(None, "a", ticket=ticket))
        self.assertEqual((identity, identity.method), (Identity("a"), AuthMethod.TOKENS))
        error = self.assertRaises(TicketRefusedError, auth.authenticate, Credentials(None, "a", ticket=ticket))
        self.assertIn("connect to the first URL, with the token", str(error))
        self.assertEqual(self.metrics.token_refusals, {"ticket_spent": 1})
        auth.restore_ticket(identity.ticket)
        auth.authenticate(Credentials(None, "a", ticket=ticket))

    def test_method_must_be_accepted_here(self) -> None:
        for specs in ((self.tokens,), ("mtls",)):
            credentials = Credentials(None, "a", ticket=self.ticket(AuthMethod.JWT))
            self.assertRaises(TicketRefusedError, self.make(*specs).authenticate, credentials)
        self.assertEqual(self.metrics.token_refusals, {"ticket_method": 2})

    def test_valid_credentials_spend_no_ticket(self) -> None:
        ticket = self.ticket()
        self.make(self.tokens).authenticate(Credentials("one", "a", ticket=ticket))
        self.make("none").authenticate(Credentials(None, "a", ticket=ticket))
        shown = Credentials(None, "robot-7.example.com", lambda: certificate(DNS), ticket)
        self.assertEqual(self.make(self.tokens, "mtls").authenticate(shown).method, AuthMethod.MTLS)
        identity = self.make(self.tokens).authenticate(Credentials(None, "a", ticket=ticket))
        self.assertEqual(identity.ticket, ticket)

    def test_node_without_tickets(self) -> None:
        auth = AuthenticatorChain((self.tokens,), wall_clock=lambda: NOW)
        self.assertRaises(TicketRefusedError, auth.authenticate, Credentials(None, "a", ticket=self.ticket()))

    def test_not_in_reprs(self) -> None:
        self.assertNotIn("v1.", repr(Credentials("v1.token", "a", ticket=self.ticket())))


class SpecTests(SynchronousTestCase):
    def write(self, content: bytes) -> str:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def make(self, *specs: str) -> AuthenticatorChain:
        return AuthenticatorChain(specs, reactor=MemoryReactorClock(), wall_clock=lambda: NOW)

    def test_missing_credentials(self) -> None:
        jwt = f"jwt:key-file={self.write(pem(EC))}:algorithms=ES256"
        for specs, kind, wanted in (
            ((jwt,), TokenRefusedError, "a token is required: send the header Authorization: Bearer TOKEN"),
            (("mtls",), TokenRefusedError, "a client certificate is required"),
            (
                (jwt, "mtls"),
                TokenRefusedError,
                "a token or a client certificate is required: send the header Authorization: Bearer TOKEN",
            ),
            (("none",), ClientIdMissingError, "identify the client by the query parameter client_id"),
            (
                ("none", jwt, "mtls"),
                ClientIdMissingError,
                "identify the client by the query parameter client_id or a token or a client certificate",
            ),
        ):
            error = self.assertRaises(kind, self.make(*specs).authenticate, Credentials())
            self.assertEqual(str(error), wanted)

    def test_jwt(self) -> None:
        path = self.write(pem(EC))
        auth = self.make(
            f"jwt:key-file={path}:algorithms=ES256,RS256:issuer=https://idp.example.com/r?a=b:audience=c=d"
        )
        claims = {"iss": "https://idp.example.com/r?a=b", "aud": "c=d"}
        self.assertEqual(auth.authenticate(Credentials(sign(EC, "ES256", **claims))), Identity("robot-7"))
        error = self.assertRaises(TokenRefusedError, authenticate, auth, sign(EC, "ES256", **claims, exp=NOW), None)
        self.assertEqual(str(error), "this token has expired")
        for token in (sign(OTHER_EC, "ES256", **claims), sign(OTHER_EC, "ES256", **claims, exp=NOW), sign(EC, "ES256")):
            error = self.assertRaises(TokenRefusedError, authenticate, auth, token, None)
            self.assertEqual(str(error), "this token is not known here")
            self.assertEqual(auth.renew(sign(EC, "ES256", **claims), "robot-7"), Identity("robot-7"))

    def test_two_issuers(self) -> None:
        first, second = self.write(pem(EC)), self.write(pem(OTHER_EC))
        auth = self.make(
            f"jwt:key-file={first}:algorithms=ES256:issuer=one", f"jwt:key-file={second}:algorithms=ES256:issuer=two"
        )
        self.assertEqual(auth.authenticate(Credentials(sign(EC, "ES256", iss="one"))), Identity("robot-7"))
        self.assertEqual(auth.authenticate(Credentials(sign(OTHER_EC, "ES256", iss="two"))), Identity("robot-7"))
        self.assertRaises(TokenRefusedError, authenticate, auth, sign(EC, "ES256", iss="two"), None)

    def test_jwks_starts_and_stops_with_the_node(self) -> None:
        auth = self.make("jwks:url=http://localhost:8080/keys?a=b:audience=A", "tokens:" + self.write(b""))
        token = sign(EC, "ES256", aud="A")
        self.assertRaises(KeysUnavailableError, auth.authenticate, Credentials(token))
        auth.start()
        waiting = auth.authenticate(Credentials(token))
        self.assertNoResult(waiting)
        auth.reload()
        self.successResultOf(auth.stop())
        self.failureResultOf(waiting, KeysUnavailableError)
        self.assertRaises(TokenRefusedError, auth.authenticate, Credentials("opaque"))

    def test_problems(self) -> None:
        path, private = self.write(pem(EC)), "jwt:key-file=/nowhere:algorithms=ES256"
        for spec, problem in (
            ("jwt", "'key-file' is missing; write jwt:key-file=…:algorithms=…[:audience=…][:issuer=…]"),
            (f"jwt:key-file={path}", "'algorithms' is missing; write jwt:key-file=…:algorithms=…"),
            (f"jwt:key-file={path}:algorithms=ES256:leeway=9", "'leeway=9' has no place in it; write jwt:key-file=…"),
            (f"jwt:key-file={path}:algorithms=none", "leave none out"),
            (f"jwt:key-file={path}:algorithms=ES256,HS256", "give each its own --auth"),
            (f"jwt:key-file={path}:algorithms=RS256", "has no key for RS256"),
            (private, "/nowhere cannot be read: No such file"),
            ("jwks", "'url' is missing; write jwks:url=…[:audience=…][:issuer=…][:algorithms=…]"),
            ("jwks:url=http://idp.example.com/keys", "write https"),
            ("jwks:url=https://idp/keys:algorithms=HS256", "are not secret; leave the algorithms HS… out"),
            ("jwks:url=https://idp/keys:algorithms=None", "leave None out"),
        ):
            error = self.assertRaises(ConfigError, self.make, spec)
            self.assertEqual(error.option, "auth")
            self.assertIn(problem, str(error))

    def test_without_pyjwt(self) -> None:
        real = builtins.__import__

        def without(name: str, *args: Any, **kwargs: Any) -> Any:
            if name in ("gateway.auth.jwt", "gateway.auth.jwks"):
                raise ImportError("No module named 'jwt'")
            return real(name, *args, **kwargs)

        for spec in (f"jwt:key-file={self.write(pem(EC))}:algorithms=ES256", "jwks:url=https://idp/"):
            with mock.patch.object(builtins, "__import__", without):
                error = self.assertRaises(ConfigError, self.make, spec)
            self.assertIn("needs PyJWT: pip install 'wsgateway[jwt]'", str(error))

    @settings(deadline=None, max_examples=200)
    @given(
        st.text()
        | st.builds(
            lambda kind, pieces: ":".join([kind, *pieces]),
            st.sampled_from(["jwt", "jwks", "mtls", "none", "tokens"]),
            st.lists(
                st.sampled_from(
                    ["key-file=x", "algorithms=ES256", "url=https://idp/", "audience=a", "issuer=https://i"]
                )
                | st.text(st.characters(exclude_characters="/")),
                max_size=5,
            ),
        )
    )
    def test_any_spec(self, spec: str) -> None:
        try:
            self.make(spec)
        except ConfigError as e:
            self.assertEqual(e.option, "auth")
            self.assertEqual(len(str(e).split("\n")), 1)
