"""Tests of gateway.auth.refusals, and of the counters that it keeps."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.authenticator import AuthenticatorChain
from gateway.auth.errors import REASONS, AuthenticationError, KeysUnavailableError, TokenRefusedError, VerificationError
from gateway.auth.interface import Credentials, Identity
from gateway.auth.refusals import LOG_INTERVAL, RefusalLog
from gateway.metrics import Metrics
from tests.builders.certificates import DNS, END, certificate
from tests.builders.tokens import EC, NOW, OTHER_EC, OTHER_RSA, jwk, jwks, pem, sign


class RefusalLogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = NOW
        self.metrics = Metrics()
        self.refusals = RefusalLog(self.metrics, lambda: self.now)

    def log_lines(self, *reasons: str) -> list[str]:
        with capturedLogs() as logs:
            for reason in reasons:
                self.refusals.record(VerificationError(reason, "--auth jwt:key-file=F"))
        return [event["log_format"].format(**event) for event in logs]

    def test_one_log_line_a_minute(self) -> None:
        self.assertEqual(
            self.log_lines("audience", "expired"),
            ["a token or certificate was refused: its audience (aud) is wrong or missing (--auth jwt:key-file=F)"],
        )
        self.now += LOG_INTERVAL - 0.1
        self.assertEqual(self.log_lines("audience"), [])
        self.now += 0.1
        self.assertEqual(
            self.log_lines("issuer", "issuer"),
            [
                "3 tokens or certificates were refused within 60 s; the last one: its issuer (iss) is wrong or missing "
                "(--auth jwt:key-file=F)"
            ],
        )
        self.assertEqual(self.metrics.token_refusals, {"audience": 2, "expired": 1, "issuer": 2})

    def test_a_clock_that_is_set_back(self) -> None:
        self.log_lines("audience")
        self.now -= 86400
        self.assertEqual(len(self.log_lines("audience")), 1)

    def test_each_reason_has_a_description(self) -> None:
        for reason, description in REASONS.items():
            self.now += LOG_INTERVAL
            (line,) = self.log_lines(reason)
            self.assertIn(description, line)


class RefusalMetricsTests(SynchronousTestCase):
    """The errors of clients, and the counters of their reasons."""

    def setUp(self) -> None:
        self.clock = MemoryReactorClock()
        self.metrics = Metrics()

    def write(self, content: bytes) -> str:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def make(self, *specs: str, now: float = NOW) -> AuthenticatorChain:
        return AuthenticatorChain(specs, reactor=self.clock, metrics=self.metrics, wall_clock=lambda: now)

    def file(self, key: Any, more: str = "") -> str:
        return f"jwt:key-file={self.write(pem(key))}:algorithms=ES256{more}"

    def refused(self, auth: AuthenticatorChain, *args: Any, **kwargs: Any) -> str:
        """Return the error text for a client that is refused."""
        try:
            result = auth.authenticate(Credentials(*args, **kwargs))
        except AuthenticationError as e:
            return str(e)
        assert isinstance(result, Deferred)
        return str(self.failureResultOf(result, AuthenticationError).value)

    def test_the_reason_is_not_told_to_the_client(self) -> None:
        auth = self.make(self.file(EC, ":audience=A"))
        token = sign(EC, "ES256", aud="B")
        with capturedLogs() as logs:
            self.assertEqual(self.refused(auth, token), "this token is not known here")
            self.assertRaises(TokenRefusedError, auth.renew, token, "robot-7")
        self.assertEqual(self.metrics.token_refusals, {"audience": 2})
        (line,) = [event["log_format"].format(**event) for event in logs]
        self.assertIn("its audience (aud) is wrong or missing", line)
        for part in token.split("."):
            self.assertNotIn(part, line)

    def test_expired(self) -> None:
        auth = self.make(self.file(EC), self.file(OTHER_EC))
        self.assertEqual(self.refused(auth, sign(EC, "ES256", exp=NOW)), "this token has expired")
        self.assertEqual(self.metrics.token_refusals, {"expired": 1})

    def test_a_token_accepted_by_another_verifier_is_not_refused(self) -> None:
        auth = self.make(self.file(EC), self.file(OTHER_EC))
        self.assertEqual(auth.authenticate(Credentials(sign(OTHER_EC, "ES256"))), Identity("robot-7"))
        self.assertEqual(self.metrics.token_refusals, {})

    def test_the_most_specific_reason_is_counted(self) -> None:
        """Of several verifiers, the one counts in which the token passed the most checks."""
        auth = self.make(self.file(EC, ":issuer=I:audience=A"), self.file(OTHER_EC, ":issuer=J"))
        self.refused(auth, sign(EC, "ES256", iss="I", aud="B"))
        self.assertEqual(self.metrics.token_refusals, {"audience": 1})

    def test_tokens_of_a_file(self) -> None:
        auth = self.make("tokens:/dev/null")
        with capturedLogs() as logs:
            self.assertEqual(self.refused(auth, "opaque-secret"), "this token is not known here")
            self.assertRaises(TokenRefusedError, auth.renew, "opaque-secret", "robot-7")
        self.assertEqual(self.metrics.token_refusals, {"unknown_token": 2})
        (line,) = [event["log_format"].format(**event) for event in logs if "refused" in event["log_format"]]
        self.assertEqual(
            line, "a token or certificate was refused: no line of the file has this token (--auth tokens:/dev/null)"
        )

    def test_a_token_of_neither_kind(self) -> None:
        """It is no JSON Web Token, so the file is where it should be."""
        for specs in (("tokens:/dev/null", self.file(EC)), (self.file(EC), "tokens:/dev/null")):
            self.metrics.token_refusals.clear()
            auth = self.make(*specs)
            self.refused(auth, "opaque")
            self.assertEqual(self.metrics.token_refusals, {"unknown_token": 1})
            self.refused(auth, sign(OTHER_EC, "ES256"))
            self.assertEqual(self.metrics.token_refusals, {"unknown_token": 1, "signature": 1})

    def test_a_token_that_is_too_long(self) -> None:
        for spec in ("tokens:/dev/null", self.file(EC)):
            self.metrics.token_refusals.clear()
            self.assertEqual(self.refused(self.make(spec), "x" * 8193), "this token is not known here")
            self.assertEqual(self.metrics.token_refusals, {"too_long": 1})

    def test_no_token(self) -> None:
        for spec in ("tokens:/dev/null", self.file(EC)):
            self.metrics.token_refusals.clear()
            self.refused(self.make(spec), None, "robot-7")
            self.assertEqual(self.metrics.token_refusals, {"no_token": 1})

    def test_certificates(self) -> None:
        auth = self.make("mtls")
        self.refused(auth)
        self.refused(auth, certificate=lambda: b"nonsense")
        self.assertEqual(self.metrics.token_refusals, {"no_certificate": 1, "certificate_name": 1})
        self.refused(self.make("mtls", now=END.timestamp()), certificate=lambda: certificate(DNS))
        self.assertEqual(self.metrics.token_refusals["expired"], 1)

    def test_unknown_key_of_a_key_set(self) -> None:
        auth = self.make("jwks:url=https://idp.example.com/keys")
        (verifier,) = auth._verifiers
        token = sign(EC, "ES256", {"kid": "b"})
        self.assertRaises(KeysUnavailableError, auth.authenticate, Credentials(token))
        self.assertEqual(self.metrics.token_refusals, {})
        self.patch(verifier._cache, "_fetch", lambda: succeed(jwks(jwk(OTHER_RSA, "a"))))
        auth.start()
        self.assertEqual(self.refused(auth, token), "this token is not known here")
        self.assertEqual(self.refused(auth, token), "this token's key is not known here yet; try again in a minute")
        self.assertEqual(self.metrics.token_refusals, {"unknown_key": 2})
