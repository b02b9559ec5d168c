"""Whatever a client does, it cannot be observed whether its session was parked: see tests.fakes.differential.

What may differ, and why:
 * the number of TCP segments: not compared
 * what a client that has stopped reading finds in its kernel's buffer when the connection ends before it reads again: as
   much as the kernel accepted of the same bytes, which depends on the pieces in which they were written
 * whether a client that is still sending when the server closes finds the connection closed or reset: a socket closed
   with unread bytes is reset, and whether they were read depends on the iteration in which they arrived
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.builders.frames import build_frame, close_frame, text_frame
from tests.fakes.differential import ALL_MODES, AUTOBAHN, PARKED, ScriptedNode, Step, play_script

MAX_SIZE = 70_000

# What a client may send, each as the bytes of one or more frames.

_commands = st.sampled_from([b"!" + letter.encode() for letter in "eee2shhllcxgoO05-wW"])
_mild_commands = st.sampled_from([b"!" + letter.encode() for letter in "eee2shhgo05-wW"])
_texts = st.text(max_size=20).map(str.encode)
_sizes = st.sampled_from([0, 1, 125, 126, 127, 16_384, 16_385, 65_535, 65_536, MAX_SIZE]).map(b"x".__mul__)
_wide = st.just(b"\xc3\xbc" * 30_000)
_small = st.binary(max_size=125)
_controls = st.builds(build_frame, st.sampled_from([9, 9, 10]), _small)
_CLOSES = [
    close_frame(),
    build_frame(8, b"\x03"),
    close_frame(1000, b"\xff\xfe"),
    close_frame(1000, b"r" * 123),
    *(close_frame(code, b"why") for code in (1000, 1001, 1011, 3000, 4999)),
    *(close_frame(code, b"why") for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)),
]
#: protocol violations, and frames that are refused
_BROKEN = [
    *(build_frame(opcode, b"reserved") for opcode in (3, 7, 11, 15)),
    *(build_frame(opcode, b"reserved", rsv=bits) for opcode in (1, 8, 9, 10) for bits in (1, 2, 4, 7)),
    build_frame(1, b"r" * 200, rsv=4),
    *(build_frame(opcode, b"unmasked", masked=False) for opcode in (1, 8, 9, 10)),
    build_frame(1, b"u" * 200, masked=False),
    *(build_frame(opcode, b"", fin=False) for opcode in (8, 9, 10)),
    *(build_frame(opcode, b"x" * 126) for opcode in (8, 9, 10)),
    build_frame(2, b"binary"),
    build_frame(2, b"binary", fin=False),
    build_frame(0, b"nothing to continue"),
    build_frame(0, b"nothing to continue", fin=False),
    build_frame(1, b"begun", fin=False) + text_frame(b"within"),
    build_frame(1, b"gr\xc3", fin=False) + build_frame(0, b"x"),
    *map(text_frame, (b"\xff", b"gr\xc3", b"\xed\xa0\x80", b"\xf5", b"\xc0\x80", b"x" * 200 + b"\x80")),
    text_frame(b"x" * (MAX_SIZE + 1)),
    # lengths not in the shortest form, or invalid
    b"\x81\xfe\x00\x05aaaa!eeee",
    b"\x81\xff" + bytes(7) + b"\x05aaaa!eeee",
    b"\x81\xff" + bytes(6) + b"\x00\xc8aaaa" + b"x" * 200,
    b"\x81\xff\x80" + bytes(6) + b"\x05aaaa!eeee",
    b"\x89\xfe\x00\x05aaaa!eeee",
]
_closes = st.sampled_from(_CLOSES)
_broken = st.one_of(st.sampled_from(_BROKEN), st.binary(min_size=1, max_size=30))


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Payloads of text messages that violate nothing, though they may end the connection."""
    choice = draw(st.integers(0, 9))
    return draw((_wide, _sizes, _texts, _commands)[choice] if choice < 4 else _mild_commands)


@st.composite
def fragmented(draw: st.DrawFn) -> bytes:
    """A fragmented message, with control frames in between."""
    payload = draw(payloads())
    cuts = sorted(draw(st.lists(st.integers(0, min(len(payload), 40)), min_size=1, max_size=4)))
    data = b""
    for begin, end in zip([0, *cuts], [*cuts, None], strict=True):
        data += build_frame(0 if data else 1, payload[begin:end], fin=end is None)
        data += draw(st.one_of(st.just(b""), _controls))
    return data


@st.composite
def client_data(draw: st.DrawFn) -> bytes:
    """What a client may send: the bytes of one or more frames."""
    choice = draw(st.integers(0, 39))
    if choice == 0:
        return draw(_broken)
    if choice == 1:
        return draw(_closes)
    if choice < 8:
        return draw(fragmented())
    if choice < 12:
        return draw(_controls)
    if choice < 14:
        # masked with a key of zeros
        return (lambda data: b"\x81" + bytes((0x80 | len(data),)) + bytes(4) + data)(draw(_texts)[:125])
    return text_frame(draw(payloads()))


# Other steps.

_times = st.sampled_from([0.0, 0.01, 0.4, 0.6, 1.0, 3.5])
_sends = st.lists(st.sampled_from([0, 1, 100, 20_000, 70_000]), min_size=1, max_size=3)


@st.composite
def other_steps(draw: st.DrawFn) -> Step:
    """Steps other than sending."""
    choice = draw(st.integers(0, 19))
    if choice < 8:
        return ("send", draw(_sends), draw(st.booleans()))
    if choice < 12:
        return ("advance", draw(_times))
    if choice == 12:
        return ("close", draw(st.sampled_from([1001, 1012, 4003])), draw(st.sampled_from(["", "why", "\u00e4" * 100])))
    return (("half", "reset", "again", "choke", "choke", "unchoke", "unchoke")[choice - 13],)


@st.composite
def scripts(draw: st.DrawFn) -> list[Step]:
    """What a client sends, cut anywhere, and other steps in between."""
    data = b"".join(draw(client_data()) for _ in range(draw(st.integers(1, 8))))
    cuts = sorted({draw(st.integers(1, min(len(data), 400))) for _ in range(draw(st.integers(0, 8)))})
    segments = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, None], strict=True)]
    script: list[Step] = []
    while segments:
        script += [draw(other_steps()) for _ in range(draw(st.integers(0, 2)))]
        count = draw(st.integers(1, len(segments)))
        some, segments = segments[:count], segments[count:]
        script.append(("say", some, draw(st.sampled_from([None, 0, 1, 2]))))
    script += [draw(other_steps()) for _ in range(draw(st.integers(0, 2)))]
    if draw(st.booleans()):
        # the rest of a closing handshake
        script.append(("answer",))
    return script


class DifferentialTestCase(SynchronousTestCase):
    """Plays scripts in all modes."""

    def assert_alike(
        self, script: list[Step], kind: str = "unix", send_size: int = 0, **options: Any
    ) -> dict[str, ScriptedNode]:
        """Play a script in all modes, and compare the results."""
        options = {"messages_per_client": "0", "max_message_size": str(MAX_SIZE), **options}
        nodes = {}
        for mode in ALL_MODES:
            nodes[mode] = play_script(mode, script, kind, send_size, **options)
            self.assertEqual(
                [str(error.value) for error in self.flushLoggedErrors() if not error.check(ZeroDivisionError)], []
            )
        expected = nodes[AUTOBAHN].outcome()
        self.assertEqual(expected["left"], (0, 0, 0))
        self.assertNotIn("", expected["endings"])
        for mode, node in nodes.items():
            self._compare(mode, node, expected, nodes[AUTOBAHN])
        return nodes

    def _compare(self, mode: str, node: ScriptedNode, expected: dict[str, Any], stock: ScriptedNode) -> None:
        actual = node.outcome()
        received = zip(actual.pop("received"), expected["received"], stock.peers, strict=True)
        for item, other, peer in received:
            size = min(len(item), len(other)) if peer.received_is_uncertain else None
            self.assertEqual(item[:size], other[:size], f"{mode}: what a client received")
        for name, value in actual.items():
            self.assertEqual(value, expected[name], f"{mode}: {name}")


_send_sizes = st.sampled_from([0, 1])
_generated = settings(deadline=None, suppress_health_check=list(HealthCheck))


class GeneratedTest(DifferentialTestCase):
    """Generated scripts"""

    @settings(_generated, max_examples=150)
    @given(scripts(), _send_sizes)
    def test_unix(self, script: list[Step], send_size: int) -> None:
        self.assert_alike(script, send_size=send_size)

    @settings(_generated, max_examples=50)
    @given(scripts(), _send_sizes)
    def test_tcp(self, script: list[Step], send_size: int) -> None:
        self.assert_alike(script, kind="tcp", send_size=send_size)

    @settings(_generated, max_examples=100)
    @given(scripts(), _send_sizes, st.sampled_from(["1", "3", "20"]))
    def test_limited(self, script: list[Step], send_size: int, per_second: str) -> None:
        """With a message rate: the same messages are handled at the same times."""
        self.assert_alike(script, send_size=send_size, messages_per_client=per_second)

    @settings(_generated, max_examples=50)
    @given(scripts(), st.sampled_from(["0.5", "2"]), st.sampled_from(["0.5", "2"]))
    def test_kept_alive(self, script: list[Step], interval: str, timeout: str) -> None:
        """Pinged and aborted at the same times."""
        self.assert_alike(script, ping_interval=interval, ping_timeout=timeout)

    @settings(_generated, max_examples=50)
    @given(
        st.lists(st.one_of(_texts.map(text_frame), _controls, _broken, _closes), max_size=4),
        st.sampled_from(["half", "reset"]),
    )
    def test_last_words(self, data: list[bytes], how: str) -> None:
        """What came before the end of a connection is handled, even if both arrived at once."""
        self.assert_alike([("last_words", b"".join(data), how)])
        self.assert_alike([("last_words", b"".join(data), how)], kind="tcp")


class ParkAndWakeTest(DifferentialTestCase):
    """Written scripts"""

    def messages(self, *steps: Step, **options: Any) -> list[bytes]:
        """Return the messages handled, the same in all modes."""
        nodes = self.assert_alike(list(steps), **options)
        return [seen[-1] for seen in nodes[PARKED].handler.events if seen[1] == "message"]

    def test_close_after_data(self) -> None:
        data = text_frame(b"!e") + text_frame(b"last") + close_frame(1000) + text_frame(b"too late")
        self.assertEqual(self.messages(("say", [data])), [b"!e", b"last"])

    def test_woken_and_closed_by_what_was_just_read(self) -> None:
        for last in (b"!l", b"!c", b"!x"):
            data = (
                text_frame(b"!e")
                + text_frame(last)
                + text_frame(b"too late")
                + build_frame(9, b"too late")
                + close_frame(1000)
            )
            self.assertEqual(self.messages(("say", [data]), ("answer",)), [b"!e", last])

    def test_bytes_after_a_short_write(self) -> None:
        data = text_frame(b"!h") + text_frame(b"next")
        self.assertEqual(self.messages(("say", [data[:-1], data[-1:]], 0), send_size=1), [b"!h", b"next"])

    def test_paused_by_a_message_that_wakes_it(self) -> None:
        """It is paused before the next message, parked or awake."""
        data = text_frame(b"1") + text_frame(b"!h") + text_frame(b"2") + text_frame(b"3")
        script: list[Step] = [("choke",), ("say", [data]), ("advance", 0.5), ("unchoke",), ("advance", 5)]
        self.assertEqual(self.messages(*script, send_size=1, messages_per_client="1"), [b"1", b"!h", b"2", b"3"])

    def test_paused_and_closed_by_one_message(self) -> None:
        data = text_frame(b"1") + text_frame(b"!c") + text_frame(b"2")
        self.assertEqual(self.messages(("say", [data]), messages_per_client="1"), [b"1", b"!c"])

    def test_message_before_a_reset(self) -> None:
        """A message that wakes the session is handled, even if the connection is lost by then."""
        data = build_frame(1, b"in ", fin=False) + build_frame(0, b"pieces")
        self.assertEqual(self.messages(("last_words", data, "reset"), kind="tcp"), [b"in pieces"])

    def test_message_before_a_half_close(self) -> None:
        data = text_frame(b"whole") + build_frame(1, b"in ", fin=False) + build_frame(0, b"pieces") + b"\x81"
        self.assertEqual(self.messages(("last_words", data, "half"), kind="tcp"), [b"whole", b"in pieces"])

    def test_one_frame(self) -> None:
        """Each frame that the fast path does not handle, before and after others, whole and in pieces."""
        for item in _BROKEN + _CLOSES:
            data = text_frame(b"!e") + item + text_frame(b"!e") + build_frame(9, b"p")
            for size in (len(data), 1, 7) if len(data) < 200 else (len(data), len(data) - 20):
                segments = [data[at : at + size] for at in range(0, len(data), size)]
                self.assertEqual(self.messages(("say", segments), ("answer",))[:1], [b"!e"])

    def test_too_large(self) -> None:
        for size in (100, 101, 126, 65_535):
            data = text_frame(b"x" * 100) + text_frame(b"x" * size) + text_frame(b"after")
            expected = [b"x" * 100] + ([b"x" * 100, b"after"] if size == 100 else [])
            self.assertEqual(self.messages(("say", [data]), ("answer",), max_message_size="100"), expected)

    def test_bad_messages(self) -> None:
        """They are counted across parking and waking."""
        bad = text_frame(b"!0")
        woken = build_frame(1, b"!", fin=False) + build_frame(0, b"0")
        script: list[Step] = [("say", [item]) for item in (bad + bad, woken, bad, woken + bad, bad, bad)]
        self.assertEqual(len(self.messages(*script)), 8)
        self.assertEqual(len(self.messages(*script[:3], ("say", [text_frame(b"!e")]), *script[3:])), 9)

    def test_bad_messages_that_wake_it(self) -> None:
        """A message counts even if it has woken its own session."""
        for letter in b"w", b"W":
            script: list[Step] = [("say", [text_frame(b"!" + letter)])] * 10
            self.assertEqual(len(self.messages(*script, send_size=1)), 8)
            self.messages(*script[:3], send_size=1, messages_per_client="2")

    def test_silent(self) -> None:
        """Pinged, and then reset, at the same times."""
        for data in (b"", text_frame(b"x"), build_frame(10, b""), b"\x81"):
            script: list[Step] = [("advance", 1.1), ("say", [data]), *[("advance", 0.5)] * 10]
            nodes = self.assert_alike(script, kind="tcp", ping_interval="2", ping_timeout="1")
            self.assertEqual([peer.how_closed for peer in nodes[PARKED].peers], ["reset", "reset"])
            self.assertEqual(nodes[PARKED].metrics.ping_timeouts, 2)

    def test_never_silent(self) -> None:
        for data in (text_frame(b"x"), build_frame(10, b""), build_frame(9, b"")):
            script: list[Step] = [("advance", 1.5), ("say", [data])] * 4 + [("advance", 1.5)]
            nodes = self.assert_alike(script, ping_interval="2", ping_timeout="1")
            self.assertNotIn((9, b""), nodes[PARKED].frames_of_a())


class SplitTest(DifferentialTestCase):
    """A dialogue, cut at every byte"""

    data = (
        text_frame(b"!e") + text_frame("h\u00e4 \U0001f600".encode()) + build_frame(9, b"ping")
        + build_frame(1, b"gr\xc3", fin=False) + build_frame(10, b"pong") + build_frame(0, b"\xbc\xc3", fin=False) + build_frame(0, b"\x9f")
        + text_frame(b"!2" + b"x" * 130) + build_frame(9, b"") + text_frame(b"") + close_frame(3000, b"bye") + text_frame(b"!e")
    )  # fmt: skip

    def setUp(self) -> None:
        self.whole = play_script(AUTOBAHN, [("say", [self.data])], messages_per_client="0").outcome()

    def assert_cut(self, segments: list[bytes], turns: int | None) -> None:
        node = play_script(PARKED, [("say", segments, turns)], messages_per_client="0")
        result = node.outcome()
        for what in ("received", "handler", "metrics", "released", "left"):
            self.assertEqual(result[what], self.whole[what], what)
        self.assertGreater(node.parked_at_rest, 2)
        self.assertEqual(node.metrics.closed["3000"] + node.metrics.closed["other"], 1)

    def test_in_two(self) -> None:
        for at in range(1, len(self.data)):
            for turns in (None, 1):
                self.assert_cut([self.data[:at], self.data[at:]], turns)

    def test_in_bytes(self) -> None:
        for turns in (None, 0, 1, 2):
            self.assert_cut([bytes((byte,)) for byte in self.data], turns)


class SlowReaderTest(DifferentialTestCase):
    """A client that stops reading"""

    options = {"send_buffer": "100000", "max_message_size": "50000", "messages_per_client": "0"}

    @settings(_generated, max_examples=25)
    @given(st.lists(st.integers(0, 50_000), min_size=1, max_size=4), st.booleans())
    def test_resumed_in_time(self, sizes: list[int], in_turn: bool) -> None:
        """It gets everything once it reads again."""
        sizes = sizes[:1] if sum(sizes) > 90_000 else sizes
        script: list[Step] = [("choke",), ("send", sizes, in_turn), ("advance", 10), ("send", [1], False), ("unchoke",)]
        nodes = self.assert_alike(script, send_size=1, **self.options)
        for node in nodes.values():
            self.assertEqual(node.metrics.slow_readers, 0)
            self.assertTrue(node.peers[1].received.endswith(b":x"))

    @settings(_generated, max_examples=25)
    @given(st.lists(st.integers(12_000, 50_000), min_size=40, max_size=60), st.booleans())
    def test_1013(self, sizes: list[int], in_turn: bool) -> None:
        """It gets the first messages, and is closed. How many depends on the kernel, but all modes keep the limit and
        the order."""
        script: list[Step] = [("choke",), ("send", sizes, in_turn), ("unchoke",), ("answer",)]
        for mode in ALL_MODES:
            node = play_script(mode, script, send_size=1, **self.options)
            *messages, last = [frame for frame in node.frames_of_a() if frame[0] != 9]
            self.assertEqual(last, (8, b"\x03\xf5reads too slowly"))
            self.assertEqual(
                [payload for _, payload in messages],
                [b"%d:" % (at + 1) + b"x" * size for at, size in enumerate(sizes[: len(messages)])],
            )
            # --send-buffer, and four of the largest messages. Not counted are the bytes that first fill the
            # transport's buffer, and those that the kernel accepts.
            buffered = sum(len(payload) for _, payload in messages)
            self.assertGreater(buffered, 300_000, mode)
            self.assertLess(buffered, 300_000 + 65_536 + 4 * 50_000, mode)
            self.assertEqual(node.metrics.slow_readers, 1)
            self.assertEqual(node.metrics.closed["1013"], 1)
            self.assertEqual(node.outcome()["left"], (0, 0, 0))
