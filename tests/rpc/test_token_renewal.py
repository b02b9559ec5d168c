"""Tests for :mod:`gateway.rpc.token_renewal`, through the dispatcher."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from zope.interface import implementer
from zope.interface.verify import verifyObject

from gateway.auth.errors import TokenRefusedError
from gateway.auth.interface import Credentials, IAuthenticator, Identity
from gateway.registry.interface import SessionKey
from gateway.rpc.token_renewal import MAX_RENEWALS, RENEWAL_WINDOW, TokenRenewal
from tests.builders.dispatcher import DispatcherTestCase

UNTIL = 1_800_000_000.0


@implementer(IAuthenticator)
class FakeAuthenticator:
    """Accepts the token ``good``, and ``slow`` when the test decides so."""

    def __init__(self) -> None:
        self.pending: list[Deferred[Identity]] = []
        self.call_count = 0

    def authenticate(self, credentials: Credentials) -> Identity:
        raise AssertionError("no client connects")

    def renew(self, token: str, client_id: str) -> Identity | Deferred[Identity]:
        self.call_count += 1
        if token == "slow":
            self.pending.append(Deferred())
            return self.pending[-1]
        if token == "broken":
            raise ZeroDivisionError
        if token != "good":
            raise TokenRefusedError("this token is not known here")
        return Identity(client_id, UNTIL)

    def restore_ticket(self, ticket: str) -> None:
        raise AssertionError("no client connects")


class TokenRenewalTests(DispatcherTestCase):
    def make(self) -> None:
        super().make()
        self.connect("x")

    def make_token_renewal(self) -> TokenRenewal | None:
        self.authenticator = FakeAuthenticator()
        verifyObject(IAuthenticator, self.authenticator)
        return TokenRenewal(self.authenticator, self.sessions, self.metrics, self.clock.seconds)

    def send_token(self, params: Any, **members: Any) -> int:
        return self.receive("x", {"jsonrpc": "2.0", "method": "gateway.token", "params": params, **members})

    def test_notification(self) -> None:
        self.assertEqual(self.send_token({"token": "good"}), 1)
        self.assertEqual(self.sessions.renewed, [("x", 1, UNTIL)])
        self.assertEqual((self.metrics.renewed, self.metrics.renewals_refused), (1, 0))
        self.assertEqual(self.sent("x"), [])
        self.assertEqual(self.upstream.events, [("connected", "x", 1)])

    def test_request(self) -> None:
        self.send_token({"token": "good"}, id=5)
        self.assertEqual(self.sent("x"), [{"jsonrpc": "2.0", "id": 5, "result": None}])
        self.assertEqual(self.upstream.calls, [])
        self.assert_nothing_left()

    def test_refused(self) -> None:
        """It changes nothing, and a notification is not answered."""
        self.send_token({"token": "bad"})
        self.assertEqual(self.sent("x"), [])
        self.send_token({"token": "bad"}, id="a")
        (answer,) = self.sent("x")
        self.assertEqual((answer["id"], answer["error"]["code"]), ("a", -32602))
        self.assertEqual(answer["error"]["data"]["detail"], "this token is not known here")
        self.assertEqual((self.sessions.renewed, self.metrics.renewals_refused), ([], 2))

    def test_params(self) -> None:
        for params in (None, [], ["good"], {}, {"token": None}, {"token": ["good"]}):
            self.send_token(params, id=1)
            (answer,) = self.sent("x")
            self.assertEqual(answer["error"]["code"], -32600 if params is None else -32602, params)
        self.receive("x", {"jsonrpc": "2.0", "id": 2, "method": "gateway.token"})
        self.assertEqual(self.sent("x")[0]["error"]["code"], -32602)
        self.assertEqual(self.sessions.renewed, [])

    def test_one_at_a_time(self) -> None:
        """However many a client sends, one is verified."""
        for id in range(3):
            self.send_token({"token": "slow"}, id=id)
        self.assertEqual([answer["error"]["code"] for answer in self.sent("x")], [-32005, -32005])
        self.assertEqual(len(self.authenticator.pending), 1)
        self.authenticator.pending.pop().callback(Identity("x", UNTIL))
        self.assertEqual(self.sent("x"), [{"jsonrpc": "2.0", "id": 0, "result": None}])
        self.send_token({"token": "good"}, id=4)
        self.assertEqual(len(self.sessions.renewed), 2)

    def test_few_in_a_minute(self) -> None:
        """In batches, or after a reconnect; other clients are not affected."""
        tokens = [{"jsonrpc": "2.0", "method": "gateway.token", "params": {"token": "bad"}}] * 100
        self.receive("x", tokens)
        self.assertEqual(self.authenticator.call_count, MAX_RENEWALS)
        self.assertEqual(self.metrics.renewals_refused, 100)
        self.disconnect("x")
        self.connect("x", 2)
        self.connect("y")
        self.receive("x", {**tokens[0], "id": 1}, generation=2)
        self.assertEqual(self.sent("x")[0]["error"]["code"], -32005)
        self.receive("y", {**tokens[0], "params": {"token": "good"}})
        self.assertEqual(self.sessions.renewed, [("y", 1, UNTIL)])
        self.clock.advance(RENEWAL_WINDOW)
        self.receive("x", {**tokens[0], "params": {"token": "good"}}, generation=2)
        self.assertEqual(self.sessions.renewed[1:], [("x", 2, UNTIL)])

    def test_disconnected_meanwhile(self) -> None:
        """The next connection of the client is not extended."""
        self.send_token({"token": "slow"})
        self.disconnect("x")
        self.connect("x", 2)
        self.authenticator.pending.pop().callback(Identity("x", UNTIL))
        self.assertEqual((self.sessions.renewed, self.metrics.renewed), ([], 0))

    def test_refused_later(self) -> None:
        self.send_token({"token": "slow"})
        self.authenticator.pending.pop().errback(TokenRefusedError("no"))
        self.assertEqual(self.metrics.renewals_refused, 1)

    def test_unexpected_error(self) -> None:
        """It is logged, and the session continues."""
        self.send_token({"token": "broken"})
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.send_token({"token": "broken"}, id=1)
        self.assertEqual(self.sent("x")[0]["error"]["code"], -32003)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.send_token({"token": "good"}), 1)

    def test_without_token_renewal(self) -> None:
        """The message is ignored, like other messages of the gateway.* namespace."""
        self.patch(self, "make_token_renewal", lambda: None)
        super().make()
        self.connect("x")
        self.send_token({"token": "good"})
        self.send_token({"token": "good"}, id=1)
        self.assertEqual(self.sent("x")[0]["error"]["code"], -32601)
        self.assertEqual(self.metrics.notifications["ignored"], 1)

    @given(st.binary() | st.recursive(st.none() | st.text(), st.lists, max_leaves=3).map(lambda it: repr(it).encode()))
    def test_any_params(self, params: bytes) -> None:
        renewal = TokenRenewal(self.authenticator, self.sessions, self.metrics, self.clock.seconds)
        outcome = renewal.renew(SessionKey("x", 1), params)
        self.failureResultOf(outcome)
