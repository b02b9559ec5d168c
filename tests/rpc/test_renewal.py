"""Tests for :mod:`gateway.rpc.token_renewal`, through the hub."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from zope.interface import implementer
from zope.interface.verify import verifyObject

from gateway.auth.interface import IAuthenticator, Identity, Presented, TokenRefused
from gateway.rpc.token_renewal import MOST, WITHIN, Renewal
from tests.rpc.fakes import HubTestCase

UNTIL = 1_800_000_000.0


@implementer(IAuthenticator)
class FakeAuthenticator:
    """Accepts the token ``good``, and what waits for ``slow`` when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Deferred[Identity]] = []
        self.asked = 0

    def authenticate(self, presented: Presented) -> Identity:
        raise AssertionError("nobody arrives")

    def renew(self, token: str, client_id: str) -> Identity | Deferred[Identity]:
        self.asked += 1
        if token == "slow":
            self.waiting.append(Deferred())
            return self.waiting[-1]
        if token == "broken":
            raise ZeroDivisionError
        if token != "good":
            raise TokenRefused("this token is not known here")
        return Identity(client_id, UNTIL)


class RenewalTests(HubTestCase):
    def make(self) -> None:
        super().make()
        self.authenticator = FakeAuthenticator()
        verifyObject(IAuthenticator, self.authenticator)
        self.hub.renew_by(Renewal(self.authenticator, self.edge, self.metrics, self.clock.seconds))
        self.connect("x")

    def show(self, params: Any, **members: Any) -> int:
        return self.receive("x", {"jsonrpc": "2.0", "method": "gateway.token", "params": params, **members})

    def test_notification(self) -> None:
        self.assertEqual(self.show({"token": "good"}), 1)
        self.assertEqual(self.edge.renewed, [("x", 1, UNTIL)])
        self.assertEqual((self.metrics.renewed, self.metrics.renewals_refused), (1, 0))
        self.assertEqual(self.sent("x"), [])
        self.assertEqual(self.upstream.told, [("connected", "x", 1)])

    def test_request(self) -> None:
        self.show({"token": "good"}, id=5)
        self.assertEqual(self.sent("x"), [{"jsonrpc": "2.0", "id": 5, "result": None}])
        self.assertEqual(self.upstream.calls, [])
        self.assert_nothing_left()

    def test_refused(self) -> None:
        """It changes nothing, and a notification is not answered."""
        self.show({"token": "bad"})
        self.assertEqual(self.sent("x"), [])
        self.show({"token": "bad"}, id="a")
        (answer,) = self.sent("x")
        self.assertEqual((answer["id"], answer["error"]["code"]), ("a", -32602))
        self.assertEqual(answer["error"]["data"]["detail"], "this token is not known here")
        self.assertEqual((self.edge.renewed, self.metrics.renewals_refused), ([], 2))

    def test_params(self) -> None:
        for params in (None, [], ["good"], {}, {"token": None}, {"token": ["good"]}):
            self.show(params, id=1)
            (answer,) = self.sent("x")
            self.assertEqual(answer["error"]["code"], -32600 if params is None else -32602, params)
        self.receive("x", {"jsonrpc": "2.0", "id": 2, "method": "gateway.token"})
        self.assertEqual(self.sent("x")[0]["error"]["code"], -32602)
        self.assertEqual(self.edge.renewed, [])

    def test_one_at_a_time(self) -> None:
        """However many a client sends, one is looked at."""
        for id in range(3):
            self.show({"token": "slow"}, id=id)
        self.assertEqual([answer["error"]["code"] for answer in self.sent("x")], [-32005, -32005])
        self.assertEqual(len(self.authenticator.waiting), 1)
        self.authenticator.waiting.pop().callback(Identity("x", UNTIL))
        self.assertEqual(self.sent("x"), [{"jsonrpc": "2.0", "id": 0, "result": None}])
        self.show({"token": "good"}, id=4)
        self.assertEqual(len(self.edge.renewed), 2)

    def test_few_in_a_minute(self) -> None:
        """However they come, in batches or after a reconnect; those of others go on."""
        tokens = [{"jsonrpc": "2.0", "method": "gateway.token", "params": {"token": "bad"}}] * 100
        self.receive("x", tokens)
        self.assertEqual(self.authenticator.asked, MOST)
        self.assertEqual(self.metrics.renewals_refused, 100)
        self.disconnect("x")
        self.connect("x", 2)
        self.connect("y")
        self.receive("x", {**tokens[0], "id": 1}, generation=2)
        self.assertEqual(self.sent("x")[0]["error"]["code"], -32005)
        self.receive("y", {**tokens[0], "params": {"token": "good"}})
        self.assertEqual(self.edge.renewed, [("y", 1, UNTIL)])
        self.clock.advance(WITHIN)
        self.receive("x", {**tokens[0], "params": {"token": "good"}}, generation=2)
        self.assertEqual(self.edge.renewed[1:], [("x", 2, UNTIL)])

    def test_gone_meanwhile(self) -> None:
        """The next connection of the client is not renewed by it."""
        self.show({"token": "slow"})
        self.disconnect("x")
        self.connect("x", 2)
        self.authenticator.waiting.pop().callback(Identity("x", UNTIL))
        self.assertEqual((self.edge.renewed, self.metrics.renewed), ([], 0))

    def test_refused_later(self) -> None:
        self.show({"token": "slow"})
        self.authenticator.waiting.pop().errback(TokenRefused("no"))
        self.assertEqual(self.metrics.renewals_refused, 1)

    def test_what_nobody_foresaw(self) -> None:
        """It is logged, and the client and its connection live on."""
        self.show({"token": "broken"})
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.show({"token": "broken"}, id=1)
        self.assertEqual(self.sent("x")[0]["error"]["code"], -32003)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.show({"token": "good"}), 1)

    def test_without(self) -> None:
        """A hub that nobody gave an authenticator ignores it, like what else begins so."""
        super().make()
        self.connect("x")
        self.show({"token": "good"})
        self.show({"token": "good"}, id=1)
        self.assertEqual(self.sent("x")[0]["error"]["code"], -32601)
        self.assertEqual(self.metrics.notifications["ignored"], 1)

    @given(st.binary() | st.recursive(st.none() | st.text(), st.lists, max_leaves=3).map(lambda it: repr(it).encode()))
    def test_any_params(self, params: bytes) -> None:
        renewal = Renewal(self.authenticator, self.edge, self.metrics, self.clock.seconds)
        outcome = renewal.renew("x", 1, params)
        self.failureResultOf(outcome)
