"""The record of all messages of a run, and the checks of single messages.

a   each call has exactly one outcome, at its deadline and a tick of the wheel at the latest
b   a result comes only from the connection that was asked
c   a message that failed with ``sent`` false was not delivered
d   nothing is delivered twice
e   what one backend connection sends to one client arrives in the order in which it was sent
i   no drain or move fails a call of a client that follows goaway and is back in time
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs

from tests.simulation.scheduler import Scheduler

#: how much later than its deadline an outcome may arrive: a tick of the wheel, the grace of a peer, and latency, in
#: seconds
DEADLINE_GRACE = 0.05 + 0.2 + 0.45
#: how long a message is remembered after its deadline, in seconds
MEMORY = 40.0
#: error codes of the gateway that a drain or move must not cause
_LOST = (-32001, -32003, -32004, -32007)


class Violation(Exception):
    """Something has happened that must never happen. ``letter`` names what."""

    def __init__(self, letter: str, text: str) -> None:
        super().__init__(f"{letter}: {text}")
        self.letter = letter


@attrs.define(eq=False)
class Message:
    """One call or notification."""

    number: int
    client_id: str
    #: the connection that it was sent on, and its place in the order there; ``None``: it has none
    stream: Stream | None
    place: int
    is_call: bool
    sent_at: float
    timeout: float
    #: the text of the outcome; ``None`` while there is none
    outcome: str | None = None
    #: ``sent`` of an error; ``None`` for a result
    sent: bool | None = None
    #: the connection at which it arrived
    delivered_on: int = 0
    #: whether it was cancelled, or its backend is gone
    abandoned: bool = False


@attrs.define(eq=False)
class Stream:
    """What one backend connection sends to one client."""

    name: str
    next_place: int = 1
    #: the highest place that has arrived, for each program that the client is
    arrived: dict[str, int] = attrs.field(factory=dict)


class Ledger:
    """All messages that are remembered, and what was violated."""

    def __init__(self, scheduler: Scheduler, disturbed_since: Callable[[Any, float], float]) -> None:
        """``disturbed_since`` is called with the backend's connection and a time: when the way to its node was last cut
        off after that, or 0."""
        self._scheduler = scheduler
        self._disturbed_since = disturbed_since
        self.violations: list[Violation] = []
        self.on_violation: Callable[[Violation], None] = lambda violation: None
        self.counts: Counter[str] = Counter()
        self._messages: dict[int, Message] = {}
        self._number = 0
        #: (deadline, number) of the messages without outcome
        self._deadlines: list[tuple[float, int, Any]] = []
        #: (time, number) to forget
        self._old: list[tuple[float, int]] = []

    def violated(self, letter: str, text: str) -> None:
        """Record a violation."""
        violation = Violation(letter, text)
        self._scheduler.trace(f"VIOLATION {violation}")
        self.violations.append(violation)
        self.on_violation(violation)

    # Messages.

    def start(
        self, client_id: str, stream: Stream | None, *, is_call: bool, timeout: float, way: Any, expects_outcome: bool
    ) -> Message:
        """Record a message that is sent. ``way`` names the backend's connection for ``disturbed_since``."""
        self._number += 1
        place = 0
        if stream is not None:
            place = stream.next_place
            stream.next_place += 1
        message = Message(self._number, client_id, stream, place, is_call, self._scheduler.now, timeout)
        self._messages[self._number] = message
        self.counts["calls" if is_call else "notifications"] += 1
        if expects_outcome:
            heapq.heappush(self._deadlines, (message.sent_at + timeout + DEADLINE_GRACE, message.number, way))
        else:
            message.outcome = "none expected"
        heapq.heappush(self._old, (message.sent_at + timeout + MEMORY, message.number))
        return message

    def delivered(self, number: int, client_id: str, program: str, connection: int) -> None:
        """Record that a message has arrived at a connection of a client's program."""
        message = self._messages.get(number)
        if message is None or message.client_id != client_id:
            self.violated("d", f"message {number} arrived at {client_id}, long after its deadline or in error")
            return
        if message.delivered_on:
            self.violated("d", f"message {number} arrived at {client_id} twice")
        message.delivered_on = connection
        if message.sent is False:
            self.violated("c", f"message {number} arrived at {client_id} after it failed with sent: false")
        stream = message.stream
        if stream is not None:
            last = stream.arrived.get(program, 0)
            if message.place < last:
                self.violated("e", f"{stream.name}: place {message.place} arrived at {program} after {last}")
            stream.arrived[program] = max(last, message.place)

    def result(self, number: int, answered_number: int, answered_on: int) -> None:
        """Record a client's answer to a call: the message and connection that it says it answers for."""
        message = self._finish(number, "result")
        if message is None:
            return
        if answered_number != number or message.delivered_on != answered_on:
            self.violated(
                "b",
                f"call {number} was delivered on connection {message.delivered_on} and answered on {answered_on}, "
                f"as message {answered_number}",
            )

    def accepted(self, number: int) -> None:
        """Record that a notification was handed over."""
        self._finish(number, "accepted")

    def failed(self, number: int, code: int, sent: bool | None) -> Message | None:
        """Record an error of the gateway."""
        message = self._finish(number, str(code))
        if message is None:
            return None
        message.sent = sent
        self.counts[f"failed {code}"] += 1
        if sent is False and message.delivered_on:
            self.violated("c", f"message {number} failed with {code}, sent: false, and had arrived")
        return message

    def _finish(self, number: int, outcome: str) -> Message | None:
        message = self._messages.get(number)
        if message is None or message.outcome is not None:
            had = "is unknown" if message is None else f"had {message.outcome}"
            self.violated("a", f"message {number} has the outcome {outcome} and {had}")
            return None
        message.outcome = outcome
        return message

    def abandon(self, number: int) -> None:
        """Expect no outcome: the backend is gone, or has cancelled."""
        message = self._messages.get(number)
        if message is not None and message.outcome is None:
            message.outcome = "abandoned"
            message.abandoned = True

    # Time.

    def sweep(self) -> None:
        """Check the deadlines, and forget old messages."""
        now = self._scheduler.now
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, number, way = heapq.heappop(self._deadlines)
            message = self._messages.get(number)
            if message is None or message.outcome is not None:
                continue
            disturbed = self._disturbed_since(way, message.sent_at)
            later = disturbed + message.timeout + DEADLINE_GRACE
            if disturbed and later > deadline + 0.001:
                heapq.heappush(self._deadlines, (later, number, way))
            else:
                self.violated("a", f"message {number} of {message.sent_at:.3f} to {message.client_id} has no outcome")
                message.outcome = "none"
        while self._old and self._old[0][0] <= now:
            _, number = heapq.heappop(self._old)
            message = self._messages.get(number)
            if message is not None and message.outcome is None:
                heapq.heappush(self._old, (now + MEMORY, number))
            else:
                self._messages.pop(number, None)

    def outstanding(self) -> int:
        """Return the number of messages without outcome."""
        return sum(message.outcome is None for message in self._messages.values())


def is_loss(code: int) -> bool:
    """Whether an error says that the client could not be reached."""
    return code in _LOST
