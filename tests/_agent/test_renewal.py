"""Tests of gateway.agent.token."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.errors import ConnectionLost, NotConnected
from gateway.agent.token import Renewal
from tests._agent.test_token import jwt

#: the wall clock is that much ahead of the other
EPOCH = 1_800_000_000.0
HOUR = 3600.0


class RenewalTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.asked = 0
        #: what the source gives, in turn; then tokens that end an hour after they were asked for
        self.given: list[Any] = []
        self.sent: list[str] = []
        self.renewal = self.make()

    def make(self, jitter: float = 0.5) -> Renewal:
        return Renewal(
            self.source,
            clock=self.clock,
            now=lambda: EPOCH + self.clock.seconds(),
            jitter=lambda: jitter,
            backoff=(8.0, 120.0),
            timeout=30.0,
            name="demo-1",
        )

    def source(self) -> Any:
        self.asked += 1
        given = self.given.pop(0) if self.given else self.token(HOUR)
        if isinstance(given, Exception):
            raise given
        return given

    def token(self, left: float) -> str:
        return jwt({"exp": EPOCH + self.clock.seconds() + left, "n": self.asked})

    def pass_exactly(self, seconds: float) -> None:
        """The source is asked after so long, and not before."""
        before = self.asked
        self.clock.advance(seconds - 0.01)
        self.assertEqual(self.asked, before, "too early")
        self.clock.advance(0.01)
        self.assertEqual(self.asked, before + 1, "too late")

    def test_at_four_fifths_of_its_life(self) -> None:
        self.renewal.begin(self.token(HOUR), self.sent.append)
        self.pass_exactly(0.8 * HOUR)
        self.assertEqual(self.sent, [jwt({"exp": EPOCH + 1.8 * HOUR, "n": 1})])
        self.pass_exactly(0.8 * HOUR)
        self.assertEqual(len(self.sent), 2)

    def test_not_all_agents_at_once(self) -> None:
        for jitter, share in ((0.0, 0.75), (1.0, 0.85)):
            renewal = self.make(jitter)
            renewal.begin(self.token(HOUR), self.sent.append)
            self.pass_exactly(share * HOUR)
            renewal.end()

    def test_a_life_of_years(self) -> None:
        self.renewal.begin(self.token(1000 * 24 * HOUR), self.sent.append)
        (timer,) = self.clock.getDelayedCalls()
        self.assertEqual(timer.getTime(), 24 * HOUR)
        for _ in range(799):
            self.clock.advance(24 * HOUR)
        self.assertEqual(self.asked, 0)
        self.clock.advance(24 * HOUR)
        self.assertEqual(self.asked, 1)

    def test_a_life_of_a_moment(self) -> None:
        self.given = [self.token(0.01)]
        self.renewal.begin(self.token(0.5), self.sent.append)
        self.pass_exactly(1.0)

    def test_tokens_that_do_not_say_when(self) -> None:
        for token in ("opaque", self.token(0), self.token(-HOUR)):
            self.renewal.begin(token, self.sent.append)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_source_that_fails(self) -> None:
        """Which is tried again, after pauses that grow."""
        self.given = [LookupError("the vault is shut"), fail(KeyError("k")), "a b", Deferred()]
        self.renewal.begin(self.token(HOUR), self.sent.append)
        with capturedLogs() as logs:
            self.pass_exactly(0.8 * HOUR)
            self.pass_exactly(4)
            self.pass_exactly(8)
            self.pass_exactly(16)
            # The last one never comes.
            self.clock.advance(30)
            self.pass_exactly(32)
        self.assertEqual(
            [event["why"].partition(":")[0] for event in logs],
            ["LookupError", "KeyError", "ValueError", "TimeoutError"],
        )
        self.assertNotIn("a b", repr(logs))
        self.assertEqual(len(self.sent), 1)
        # That is forgotten then.
        self.given = [LookupError("again")]
        self.pass_exactly(0.8 * HOUR)
        self.pass_exactly(4)

    def test_the_same_token_again(self) -> None:
        """A file that is not written anew yet: nothing is sent, nothing is said."""
        token = self.token(HOUR)
        self.given = [token, token, self.token(-1)]
        self.renewal.begin(token, self.sent.append)
        with capturedLogs() as logs:
            self.pass_exactly(0.8 * HOUR)
            self.pass_exactly(4)
            self.pass_exactly(8)
            self.assertEqual(self.sent, [])
            self.pass_exactly(16)
        self.assertEqual(len(self.sent), 1)
        self.assertEqual(logs, [])

    def test_a_token_that_does_not_end(self) -> None:
        self.given = ["opaque"]
        self.renewal.begin(self.token(HOUR), self.sent.append)
        self.clock.advance(0.8 * HOUR)
        self.assertEqual(self.sent, ["opaque"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_wanted(self) -> None:
        self.failureResultOf(self.renewal.renew(), NotConnected)
        self.renewal.begin(self.token(HOUR), self.sent.append)
        self.clock.advance(HOUR / 2)
        self.assertIsNone(self.successResultOf(self.renewal.renew()))
        self.assertEqual(len(self.sent), 1)
        self.pass_exactly(0.8 * HOUR)

    def test_wanted_and_the_same(self) -> None:
        """Who asks for it has reasons."""
        self.given = ["opaque"]
        self.renewal.begin("opaque", self.sent.append)
        self.successResultOf(self.renewal.renew())
        self.assertEqual(self.sent, ["opaque"])

    def test_wanted_while_it_is_asked(self) -> None:
        coming: Deferred[str] = Deferred()
        self.given = [coming]
        self.renewal.begin(self.token(HOUR), self.sent.append)
        waiting = [self.renewal.renew(), self.renewal.renew(), self.renewal.renew()]
        waiting[1].cancel()
        self.failureResultOf(waiting[1], CancelledError)
        coming.callback("new")
        self.successResultOf(waiting[0])
        self.successResultOf(waiting[2])
        self.assertEqual((self.asked, self.sent), (1, ["new"]))

    def test_wanted_and_not_to_be_had(self) -> None:
        self.given = [LookupError("shut"), LookupError("shut")]
        self.renewal.begin("opaque", self.sent.append)
        self.failureResultOf(self.renewal.renew(), LookupError)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.renewal.begin(self.token(HOUR), self.sent.append)
        self.failureResultOf(self.renewal.renew(), LookupError)
        self.pass_exactly(4)

    def test_the_end(self) -> None:
        self.renewal.begin(self.token(HOUR), self.sent.append)
        self.renewal.end()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.failureResultOf(self.renewal.renew(), NotConnected)

    def test_the_end_while_it_is_asked(self) -> None:
        coming: Deferred[str] = Deferred()
        self.given = [coming]
        self.renewal.begin(self.token(HOUR), self.sent.append)
        waiting = self.renewal.renew()
        with capturedLogs() as logs:
            self.renewal.end()
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

        self.given = [source()]
        self.renewal.begin(self.token(HOUR), self.sent.append)
        waiting = self.renewal.renew()
        self.renewal.end()
        self.failureResultOf(waiting, NotConnected)
        self.renewal.begin(self.token(HOUR), self.sent.append)
        late.callback(None)
        self.assertEqual(self.sent, [])
        self.pass_exactly(0.8 * HOUR)
        self.assertEqual(len(self.sent), 1)

    def test_a_source_that_asks(self) -> None:
        """It is not asked again for that."""

        def source() -> str:
            self.asked += 1
            waiting.append(self.renewal.renew())
            return "new"

        waiting: list[Deferred[None]] = []
        self.patch(self, "source", source)
        self.renewal = self.make()
        self.renewal.begin(self.token(HOUR), self.sent.append)
        self.successResultOf(self.renewal.renew())
        self.successResultOf(waiting[0])
        self.assertEqual((self.asked, self.sent), (1, ["new"]))

    def test_a_connection_that_takes_nothing(self) -> None:
        def lost(token: str) -> None:
            raise ConnectionLost("gone")

        self.renewal.begin(self.token(HOUR), lost)
        self.failureResultOf(self.renewal.renew(), ConnectionLost)
        self.renewal.end()
        self.assertEqual(self.clock.getDelayedCalls(), [])
