"""Tests of gateway.agent.reconnect with generated input: whatever a gateway says, an agent can go on from there."""

from __future__ import annotations

import json
import math

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.agent.reconnect import MAX_HOPS, GoAway, Step
from gateway.websocket.client import LONGEST_WAIT, Ended, Refused
from tests._agent.test_itinerary import AWAY, HOME, itinerary

checked = settings(deadline=None, max_examples=150)
#: texts that are urls, that nearly are, and others
urls = st.sampled_from(["ws://c:1/x?y=z", "wss://c", "https://c/", "/relative", "//c", "ws://[::1", "ws://c:x", ""])
urls = urls | urls.map(lambda url: url + "\r\nX: y") | st.text(max_size=20)
values = st.none() | st.booleans() | st.integers() | st.floats() | urls | st.lists(st.integers(), max_size=2)
goaways = st.dictionaries(st.sampled_from(["url", "after", "reason"]), values) | values


def is_possible(step: Step) -> bool:
    """Whether a step can be taken."""
    return step.stop is not None or (0 <= step.delay < math.inf and bool(step.target.host))


class GoAwayTests(SynchronousTestCase):
    @checked
    @given(goaways)
    @example({"url": "ws://c", "after": 10**400})
    @example({"after": math.nan})
    @example({"after": True})
    def test_anything(self, params: object) -> None:
        goaway = GoAway.read(params)
        self.assertTrue(goaway.url is None or isinstance(goaway.url, str))
        if goaway.after is not None:
            self.assertTrue(0 <= goaway.after <= LONGEST_WAIT, goaway)

    @checked
    @given(goaways, st.floats(0, 1e6), st.integers(1000, 4999))
    def test_where_to(self, params: object, stayed: float, code: int) -> None:
        goaway = GoAway.read(params)
        step = itinerary().after_goaway(AWAY, goaway, stayed=stayed)
        self.assertTrue(step is None or is_possible(step))
        step = itinerary().after_end(AWAY, Ended(code, "why\r\n"), stayed=stayed, goaway=goaway)
        self.assertTrue(is_possible(step))
        self.assertTrue(step.why.isprintable())


class RefusalTests(SynchronousTestCase):
    @checked
    @given(st.integers(100, 599), urls, st.text(max_size=9), st.binary(max_size=60))
    @example(503, "", "9" * 400, b"")
    @example(307, "ws://c:99999/", "1", json.dumps({"error": 1}).encode())
    def test_anything(self, status: int, location: str, retry_after: str, body: bytes) -> None:
        """Where it goes is a place, and it does not go in circles."""
        way = itinerary()
        refused = Refused(status, {"location": location, "retry-after": retry_after}, body)
        steps = [way.after_failure(AWAY, refused) for _ in range(MAX_HOPS + 1)]
        self.assertTrue(all(map(is_possible, steps)))
        self.assertTrue(steps[-1].target == HOME or steps[-1].stop is not None)
