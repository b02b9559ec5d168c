"""A parked connection and one that never leaves Autobahn: the same bytes in, the same out, and the same told of it."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.edge.fakes import FakeNode, close, frame, parse_frames, text
from tests.edge.parked import ParkedNode, take

#: what is done instead of sending: time passes, somebody wakes it, somebody closes it, somebody sends to it
TIME, WAKE, END, SEND = range(4)

PIECES = [
    text(b"one"),
    text(b"x" * 200),
    text(b"echo"),
    text(b"bad"),
    text(b"boom"),
    text(b""),
    text(b"y" * 2001),
    text(b"\xe2\x82\xac"),
    text(b"\xff"),
    frame(9, b"p"),
    frame(9, b"p" * 126),
    frame(10, b"q"),
    frame(1, b"\xe2\x82", fin=False),
    frame(0, b"\xac", fin=False),
    frame(0, b""),
    frame(2, b"b"),
    frame(3, b""),
    frame(1, b"a", rsv=4),
    frame(1, b"a", masked=False),
    frame(1, b"close", fin=True),
    close(1000),
    close(),
    close(4999, b"bye"),
    close(1005),
]


class AlikeTest(SynchronousTestCase):
    def play(self, node: Any, steps: list[Any], there: Any = None) -> tuple[Any, ...]:
        """What comes of it: told to the handler, sent to the client, counted."""
        client = None if there is not None else node.connect("a")
        if client is not None:
            client.protocol.fast_lane = lambda data: data
        edge, handler = node.edge, node.handler
        sent = b""

        def handle(payload: bytes) -> None:
            if payload == b"echo":
                edge.send("a", b"echoed")
            elif payload == b"close":
                edge.send("a", b"last")
                edge.close("a", 4003, "go")

        handler.on_message = handle
        for step in steps:
            if step == TIME:
                node.advance(1.5, 0.5)
            elif step == WAKE:
                edge._table.get("a")
            elif step == END:
                edge.close("a", 4003, "go")
            elif step == SEND:
                edge.send("a", b"sent")
            elif client is not None:
                client.send(step)
            else:
                try:
                    there.send(step)
                except BrokenPipeError:
                    self.assertIsNone(edge.get("a"))
            if client is None:
                node.step()
                sent += take(there)
            else:
                sent += client.transport.take()
        self.flushLoggedErrors(ZeroDivisionError)
        return handler.seen, parse_frames(sent), node.metrics.closed, edge.count()

    def check(self, steps: list[Any]) -> None:
        options = {"max_message_size": 2000, "messages_per_client": 0}
        parked = ParkedNode(**options)
        try:
            there = parked.connect("a")
            self.assertEqual(parked.edge.parked(), 1)
            self.assertEqual(self.play(parked, steps, there), self.play(FakeNode(**options), steps))
        finally:
            parked.close()

    @staticmethod
    def cut(data: bytes, cuts: list[int]) -> list[bytes]:
        """In pieces, cut at these places."""
        places = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
        return [data[begin:end] for begin, end in itertools.pairwise(places)]

    @settings(deadline=None, max_examples=120)
    @given(
        st.lists(
            st.one_of(
                st.sampled_from([TIME, WAKE, SEND, END]),
                st.tuples(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.lists(st.integers(0, 999))),
            ),
            max_size=8,
        )
    )
    @example([([text(b"one"), frame(9, b"p"), close(1000)], [])])
    @example([([text(b"bad")] * 5, []), WAKE, ([text(b"bad")] * 3, [])])
    @example([([text(b"echo"), frame(1, b"close"), text(b"one"), close(4003)], [])])
    def test_frames(self, plan: list[Any]) -> None:
        steps: list[Any] = []
        for one in plan:
            if isinstance(one, int):
                steps.append(one)
            else:
                steps += self.cut(b"".join(one[0]), one[1])
        self.check(steps)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.one_of(st.binary(min_size=1, max_size=60), st.sampled_from([TIME, WAKE, SEND])), max_size=6))
    def test_bytes(self, steps: list[Any]) -> None:
        self.check(steps)

    def test_each_alone_and_at_every_cut(self) -> None:
        for piece in PIECES:
            if len(piece) < 300:
                for cut in range(len(piece)):
                    self.check([*self.cut(text(b"one") + piece + text(b"two"), [len(text(b"one")) + cut]), TIME])
