"""Tests of gateway.agent.token.

Tests of gateway.agent.token.
"""

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

#: the wall clock is that much ahead of the other
EPOCH = 1_800_000_000.0
HOUR = 3600.0


class TokenRenewerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.requests = 0
        #: what the source gives, in turn; then tokens that end an hour after they were asked for
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
        given = self.tokens.pop(0) if self.tokens else self.token(HOUR)
        if isinstance(given, Exception):
            raise given
        return given

    def token(self, left: float) -> str:
        return jwt({"exp": EPOCH + self.clock.seconds() + left, "n": self.requests})

    def assert_next_request_after(self, seconds: float) -> None:
        """The source is asked after so long, and not before."""
        before = self.requests
        self.clock.advance(seconds - 0.01)
        self.assertEqual(self.requests, before, "too early")
        self.clock.advance(0.01)
        self.assertEqual(self.requests, before + 1, "too late")

    def test_at_four_fifths_of_its_life(self) -> None:
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.assert_next_request_after(0.8 * HOUR)
        self.assertEqual(self.sent, [jwt({"exp": EPOCH + 1.8 * HOUR, "n": 1})])
        self.assert_next_request_after(0.8 * HOUR)
        self.assertEqual(len(self.sent), 2)

    def test_not_all_agents_at_once(self) -> None:
        for jitter, share in ((0.0, 0.75), (1.0, 0.85)):
            renewal = self.make(jitter)
            renewal.start(self.token(HOUR), self.sent.append)
            self.assert_next_request_after(share * HOUR)
            renewal.stop()

    def test_a_life_of_years(self) -> None:
        self.renewer.start(self.token(1000 * 24 * HOUR), self.sent.append)
        (timer,) = self.clock.getDelayedCalls()
        self.assertEqual(timer.getTime(), 24 * HOUR)
        for _ in range(799):
            self.clock.advance(24 * HOUR)
        self.assertEqual(self.requests, 0)
        self.clock.advance(24 * HOUR)
        self.assertEqual(self.requests, 1)

    def test_a_life_of_a_moment(self) -> None:
        self.tokens = [self.token(0.01)]
        self.renewer.start(self.token(0.5), self.sent.append)
        self.assert_next_request_after(1.0)

    def test_tokens_that_do_not_say_when(self) -> None:
        for token in ("opaque", self.token(0), self.token(-HOUR)):
            self.renewer.start(token, self.sent.append)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_source_that_fails(self) -> None:
        """Which is tried again, after pauses that grow."""
        self.tokens = [LookupError("the vault is shut"), fail(KeyError("k")), "a b", Deferred()]
        self.renewer.start(self.token(HOUR), self.sent.append)
        with capturedLogs() as logs:
            self.assert_next_request_after(0.8 * HOUR)
            self.assert_next_request_after(4)
            self.assert_next_request_after(8)
            self.assert_next_request_after(16)
            # The last one never comes.
            self.clock.advance(30)
            self.assert_next_request_after(32)
        self.assertEqual(
            [event["problem"].partition(":")[0] for event in logs],
            ["LookupError", "KeyError", "ValueError", "TimeoutError"],
        )
        self.assertNotIn("a b", repr(logs))
        self.assertEqual(len(self.sent), 1)
        # That is forgotten then.
        self.tokens = [LookupError("again")]
        self.assert_next_request_after(0.8 * HOUR)
        self.assert_next_request_after(4)

    def test_the_same_token_again(self) -> None:
        """A file that is not written anew yet: nothing is sent, nothing is said."""
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

    def test_a_token_that_does_not_end(self) -> None:
        self.tokens = ["opaque"]
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.clock.advance(0.8 * HOUR)
        self.assertEqual(self.sent, ["opaque"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_wanted(self) -> None:
        self.failureResultOf(self.renewer.renew(), NotConnected)
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.clock.advance(HOUR / 2)
        self.assertIsNone(self.successResultOf(self.renewer.renew()))
        self.assertEqual(len(self.sent), 1)
        self.assert_next_request_after(0.8 * HOUR)

    def test_wanted_and_the_same(self) -> None:
        """Who asks for it has reasons."""
        self.tokens = ["opaque"]
        self.renewer.start("opaque", self.sent.append)
        self.successResultOf(self.renewer.renew())
        self.assertEqual(self.sent, ["opaque"])

    def test_wanted_while_it_is_asked(self) -> None:
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

    def test_wanted_and_not_to_be_had(self) -> None:
        self.tokens = [LookupError("shut"), LookupError("shut")]
        self.renewer.start("opaque", self.sent.append)
        self.failureResultOf(self.renewer.renew(), LookupError)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.failureResultOf(self.renewer.renew(), LookupError)
        self.assert_next_request_after(4)

    def test_the_end(self) -> None:
        self.renewer.start(self.token(HOUR), self.sent.append)
        self.renewer.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.failureResultOf(self.renewer.renew(), NotConnected)

    def test_the_end_while_it_is_asked(self) -> None:
        coming: Deferred[str] = Deferred()
        self.tokens = [coming]
        self.renewer.start(self.token(HOUR), self.sent.append)
        waiting = self.renewer.renew()
        with capturedLogs() as logs:
            self.renewer.stop()
        self.failureResultOf(waiting, NotConnected)
        self.assertTrue(coming.called)
        self.assertEqual((self.clock.getDelayedCalls(), logs), ([], []))

    def test_a_source_that_cannot_be_cancelled(self) -> None:
        """What it gives too late is for nobody, and in nobody's way."""
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

    def test_a_source_that_asks(self) -> None:
        """It is not asked again for that."""

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

    def test_a_connection_that_takes_nothing(self) -> None:
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
    def test_what_is_none(self) -> None:
        self.assertEqual(check_token("a.b~!"), "a.b~!")
        for token in ("", "a b", "a\r\nb", "\xe9", None, 7, b"a"):
            with self.assertRaisesRegex(ValueError, "^the token is not a string of visible ASCII characters"):
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
