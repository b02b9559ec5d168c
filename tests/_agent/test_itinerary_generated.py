"""Tests of gateway.agent.reconnect with generated input: whatever a gateway says, an agent can go on from there."""

from __future__ import annotations

import json
import math

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.reconnect import MAX_REDIRECTS, Attempt, GoAway
from gateway.websocket.client import MAX_DELAY, CloseEvent, HandshakeRefusedError
from tests._agent.test_itinerary import CONFIGURED, HANDED_OUT, reconnect_policy

generated = settings(deadline=None, max_examples=150)
#: texts that are urls, that nearly are, and others
urls = st.sampled_from(["ws://c:1/x?y=z", "wss://c", "https://c/", "/relative", "//c", "ws://[::1", "ws://c:x", ""])
urls = urls | urls.map(lambda url: url + "\r\nX: y") | st.text(max_size=20)
json_values = st.none() | st.booleans() | st.integers() | st.floats() | urls | st.lists(st.integers(), max_size=2)
goaways = st.dictionaries(st.sampled_from(["url", "after", "reason"]), json_values) | json_values


def is_valid(attempt: Attempt) -> bool:
    """Whether a step can be taken."""
    return attempt.stop is not None or (0 <= attempt.delay < math.inf and bool(attempt.target.host))


class GeneratedGoAwayTests(SynchronousTestCase):
    @generated
    @given(goaways)
    @example({"url": "ws://c", "after": 10**400})
    @example({"after": math.nan})
    @example({"after": True})
    def test_anything(self, params: object) -> None:
        goaway = GoAway.from_params(params)
        self.assertTrue(goaway.url is None or isinstance(goaway.url, str))
        if goaway.after is not None:
            self.assertTrue(0 <= goaway.after <= MAX_DELAY, goaway)

    @generated
    @given(goaways, st.floats(0, 1e6), st.integers(1000, 4999))
    def test_where_to(self, params: object, stayed: float, code: int) -> None:
        goaway = GoAway.from_params(params)
        step = reconnect_policy().after_goaway(HANDED_OUT, goaway, connected_for=stayed)
        self.assertTrue(step is None or is_valid(step))
        step = reconnect_policy().after_close(
            HANDED_OUT, CloseEvent(code, "why\r\n"), connected_for=stayed, goaway=goaway
        )
        self.assertTrue(is_valid(step))
        self.assertTrue(step.reason.isprintable())


class GeneratedRefusalTests(SynchronousTestCase):
    @generated
    @given(st.integers(100, 599), urls, st.text(max_size=9), st.binary(max_size=60))
    @example(503, "", "9" * 400, b"")
    @example(307, "ws://c:99999/", "1", json.dumps({"error": 1}).encode())
    def test_anything(self, status: int, location: str, retry_after: str, body: bytes) -> None:
        """Where it goes is a place, and it does not go in circles."""
        way = reconnect_policy()
        refused = HandshakeRefusedError(status, {"location": location, "retry-after": retry_after}, body)
        steps = [way.after_failure(HANDED_OUT, refused) for _ in range(MAX_REDIRECTS + 1)]
        self.assertTrue(all(map(is_valid, steps)))
        self.assertTrue(steps[-1].target == CONFIGURED or steps[-1].stop is not None)
