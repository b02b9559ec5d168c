"""Tests of gateway.agent.token."""

from __future__ import annotations

import base64
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.errors import ConnectionLost, NotConnected
from gateway.agent.token import TokenRenewer, check_token, token_expiry

#: offset of the wall clock
EPOCH = 1_800_000_000.0
HOUR = 3600.0


class TokenRenewerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.requests = 0
        #: results of the source, in order; then tokens that are valid for an hour
        self.tokens: list[Any] = []
        self.sent: list[str] = []
        self.renewer = self.make()

    def make(self, jitter: float = 0.5) -> TokenRenewer:
        return TokenRenewer(
            self.source,
            clock=self.clock,
            wall_clock=lambda: EPOCH + self.clock.seconds(),
            jitter=lambda: jitter,
            backoff=(8.0, 120.0),
            timeout=30.0,
            name="demo-1",
        )

    def source(self) -> Any:
        self.requests += 1
        result = self.tokens.pop(0) if self.tokens else self.token(HOUR)
        if isinstance(result, Exception):
            raise result
        return result

    def token(self, lifetime: float) -> str:
        return jwt({"exp": EPOCH + self.clock.seconds() + lifetime, "n": self.requests})

    def assert_next_request_after(self, seconds: float) -> None:
        """Assert that the source is called after exactly that delay."""
        before = self.requests
        self.clock.advance(seconds - 0.01)
        self.assertEqual(self.requests, before, "too early")
        self.clock.advance(0.01)
        self.assertEqual(self.requests, before + 1, "too late")

    def test_renewed_at_four_fifths_of_lifetime(self) -> None:
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.assert_next_request_after(0.8 * HOUR)
        self.assertEqual(self.sent, [jwt({"exp": EPOCH + 1.8 * HOUR, "n": 1})])
        self.assert_next_request_after(0.8 * HOUR)
        self.assertEqual(len(self.sent), 2)

    def test_renewal_has_jitter(self) -> None:
        for jitter, share in ((0.0, 0.75), (1.0, 0.85)):
            renewal = self.make(jitter)
            renewal.start(self.token(HOUR), self.sent.append)
            self.assert_next_request_after(share * HOUR)
            renewal.stop()

    def test_lifetime_of_years(self) -> None:
        self.renewer.start(self.token(1000 * 24 * HOUR), self.sent.append)
        (timer,) = self.clock.getDelayedCalls()
        self.assertEqual(timer.getTime(), 24 * HOUR)
        for _ in range(799):
            self.clock.advance(24 * HOUR)
        self.assertEqual(self.requests, 0)
        self.clock.advance(24 * HOUR)
        self.assertEqual(self.requests, 1)

    def test_lifetime_of_a_moment(self) -> None:
        self.tokens = [self.token(0.01)]
        self.renewer.start(self.token(0.5), self.sent.append)
        self.assert_next_request_after(1.0)

    def test_tokens_without_expiry_are_not_renewed(self) -> None:
        for token in ("opaque", self.token(0), self.token(-HOUR)):
            self.renewer.start(token, self.sent.append)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_failed_renewal_is_retried(self) -> None:
        """A failed renewal is retried with growing delays."""
        self.tokens = [LookupError("the vault is shut"), fail(KeyError("k")), "a b", Deferred()]
        self.renewer.start(self.token(HOUR), self.sent.append)
        with capturedLogs() as logs:
            self.assert_next_request_after(0.8 * HOUR)
            self.assert_next_request_after(4)
            self.assert_next_request_after(8)
            self.assert_next_request_after(16)
            # The last one never arrives.
            self.clock.advance(30)
            self.assert_next_request_after(32)
        self.assertEqual(
            [event["problem"].partition(":")[0] for event in logs],
            ["LookupError", "KeyError", "ValueError", "TimeoutError"],
        )
        self.assertNotIn("a b", repr(logs))
        self.assertEqual(len(self.sent), 1)
        # A success resets the backoff.
        self.tokens = [LookupError("again")]
        self.assert_next_request_after(0.8 * HOUR)
        self.assert_next_request_after(4)

    def test_unchanged_token_is_retried(self) -> None:
        """As a file that is not rewritten yet: nothing is sent or logged."""
        token = self.token(HOUR)
        self.tokens = [token, token, self.token(-1)]
        self.renewer.start(token, self.sent.append)
        with capturedLogs() as logs:
            self.assert_next_request_after(0.8 * HOUR)
            self.assert_next_request_after(4)
            self.assert_next_request_after(8)
            self.assertEqual(self.sent, [])
            self.assert_next_request_after(16)
        self.assertEqual(len(self.sent), 1)
        self.assertEqual(logs, [])

    def test_new_token_without_expiry(self) -> None:
        self.tokens = ["opaque"]
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.clock.advance(0.8 * HOUR)
        self.assertEqual(self.sent, ["opaque"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_renew(self) -> None:
        self.failureResultOf(self.renewer.renew(), NotConnected)
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.clock.advance(HOUR / 2)
        self.assertIsNone(self.successResultOf(self.renewer.renew()))
        self.assertEqual(len(self.sent), 1)
        self.assert_next_request_after(0.8 * HOUR)

    def test_renew_sends_an_unchanged_token(self) -> None:
        """An explicit renew() sends even an unchanged token."""
        self.tokens = ["opaque"]
        self.renewer.start("opaque", self.sent.append)
        self.successResultOf(self.renewer.renew())
        self.assertEqual(self.sent, ["opaque"])

    def test_renew_during_renewal(self) -> None:
        coming: Deferred[str] = Deferred()
        self.tokens = [coming]
        self.renewer.start(self.token(HOUR), self.sent.append)
        waiting = [self.renewer.renew(), self.renewer.renew(), self.renewer.renew()]
        waiting[1].cancel()
        self.failureResultOf(waiting[1], CancelledError)
        coming.callback("new")
        self.successResultOf(waiting[0])
        self.successResultOf(waiting[2])
        self.assertEqual((self.requests, self.sent), (1, ["new"]))

    def test_renew_fails_with_the_source(self) -> None:
        self.tokens = [LookupError("shut"), LookupError("shut")]
        self.renewer.start("opaque", self.sent.append)
        self.failureResultOf(self.renewer.renew(), LookupError)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.failureResultOf(self.renewer.renew(), LookupError)
        self.assert_next_request_after(4)

    def test_stop(self) -> None:
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.renewer.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.failureResultOf(self.renewer.renew(), NotConnected)

    def test_stop_during_renewal(self) -> None:
        coming: Deferred[str] = Deferred()
        self.tokens = [coming]
        self.renewer.start(self.token(HOUR), self.sent.append)
        waiting = self.renewer.renew()
        with capturedLogs() as logs:
            self.renewer.stop()
        self.failureResultOf(waiting, NotConnected)
        self.assertTrue(coming.called)
        self.assertEqual((self.clock.getDelayedCalls(), logs), ([], []))

    def test_late_token_after_stop_is_ignored(self) -> None:
        """Its late result is ignored, and does not disturb the next connection."""
        late: Deferred[None] = Deferred()

        async def source() -> str:
            try:
                return await Deferred()
            except CancelledError:
                await late
            return "late"

        self.tokens = [source()]
        self.renewer.start(self.token(HOUR), self.sent.append)
        waiting = self.renewer.renew()
        self.renewer.stop()
        self.failureResultOf(waiting, NotConnected)
        self.renewer.start(self.token(HOUR), self.sent.append)
        late.callback(None)
        self.assertEqual(self.sent, [])
        self.assert_next_request_after(0.8 * HOUR)
        self.assertEqual(len(self.sent), 1)

    def test_source_that_calls_renew(self) -> None:
        """The source is not called again for that."""

        def source() -> str:
            self.requests += 1
            waiting.append(self.renewer.renew())
            return "new"

        waiting: list[Deferred[None]] = []
        self.patch(self, "source", source)
        self.renewer = self.make()
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.successResultOf(self.renewer.renew())
        self.successResultOf(waiting[0])
        self.assertEqual((self.requests, self.sent), (1, ["new"]))

    def test_send_fails(self) -> None:
        def lost(token: str) -> None:
            raise ConnectionLost("gone")

        self.renewer.start(self.token(HOUR), lost)
        self.failureResultOf(self.renewer.renew(), ConnectionLost)
        self.renewer.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])


def jwt(claims: Any) -> str:
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return f"e30.{base64.urlsafe_b64encode(payload).decode().rstrip('=')}.c2ln"


class CheckTokenTests(SynchronousTestCase):
    def test_invalid_tokens(self) -> None:
        self.assertEqual(check_token("a.b~!"), "a.b~!")
        for token in ("", "a b", "a\r\nb", "\xe9", None, 7, b"a"):
            with self.assertRaisesRegex(ValueError, "^the token is not a string of visible ASCII characters"):
                check_token(token)


class TokenExpiryTests(SynchronousTestCase):
    def test_expiry(self) -> None:
        self.assertEqual(token_expiry(jwt({"sub": "a", "exp": 1800000000})), 1800000000.0)
        self.assertEqual(token_expiry(jwt({"exp": 1.5})), 1.5)

    def test_no_expiry(self) -> None:
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
