"""What became of each call: who was asked, what the backend was told, and which clients have received it.

A call has one of these outcomes:

    answered      a result came, and it says which client made it
    failed        an error came: its code, and whether the client may have got the call (``sent``)
    cut off       the backend's own connection to the node ended: nobody can tell
    lost          neither within the deadline and a margin

Wrong is what no fault excuses: a call that was received twice, or by another client than the one that was asked; an
answer of another client, a second answer, an answer to what nobody received; and a call that was received although its
error promised that it was not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Call:
    """One call. Times are in seconds of the caller's clock."""

    client: str
    #: the node that was asked
    via: str
    made_at: float
    #: ``answered``, ``failed``, ``cut off``, ``lost``, or nothing yet
    outcome: str = ""
    #: the client that the answer names
    by: str = ""
    code: int = 0
    sent: bool = True


@dataclass
class Totals:
    """What a ledger comes to."""

    made: int = 0
    answered: int = 0
    #: how many calls failed, by what they failed with
    failed: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    #: what is wrong, one text each
    wrong: list[str] = field(default_factory=list)
    #: the longest time that a client was unreachable, in seconds
    longest: float = 0.0


class CallLedger:
    """All calls of one run."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}
        self._open: dict[int, Call] = {}
        self._received: dict[int, list[str]] = defaultdict(list)
        self._twice: list[int] = []
        #: since when clients cannot be reached: when the first call was made that failed
        self._failing: dict[str, float] = {}
        #: when the latest call to a client was made that was answered
        self._reached: dict[str, float] = {}
        self._longest = 0.0

    def made(self, client: str, via: str, now: float) -> int:
        """A call is about to be made; its number."""
        number = len(self._calls) + 1
        self._calls[number] = self._open[number] = Call(client, via, now)
        return number

    def answered(self, number: int, by: str, now: float) -> None:
        """A result came, in which a client says who it is."""
        call = self._end(number, "answered")
        if call is None:
            return
        call.by = by
        self._reached[call.client] = max(call.made_at, self._reached.get(call.client, 0.0))
        self._longest = max(self._longest, now - self._failing.pop(call.client, now))

    def failed(self, number: int, code: int, sent: bool) -> None:
        """An error came."""
        call = self._end(number, "failed")
        if call is not None:
            call.code, call.sent = code, sent
            self._unreached(call)

    def cut_off(self, number: int) -> None:
        """The connection that the call was made by has ended."""
        self._end(number, "cut off")

    def expire(self, made_before: float) -> None:
        """Whatever was made before that, and had no outcome since, is lost."""
        for number, call in list(self._open.items()):
            if call.made_at >= made_before:
                break
            self._end(number, "lost")
            self._unreached(call)

    def received(self, number: int, by: str) -> None:
        """A client has received a call."""
        self._received[number].append(by)

    def _end(self, number: int, outcome: str) -> Call | None:
        call = self._open.pop(number, None)
        if call is None:
            # What comes after a call was given up changes nothing: it is lost all the same.
            if self._calls[number].outcome in ("answered", "failed"):
                self._twice.append(number)
            return None
        call.outcome = outcome
        return call

    def _unreached(self, call: Call) -> None:
        if call.made_at > self._reached.get(call.client, 0.0):
            self._failing.setdefault(call.client, call.made_at)

    @property
    def in_flight(self) -> int:
        """How many calls have no outcome yet."""
        return len(self._open)

    def unreachable(self) -> list[str]:
        """The clients that did not answer when they were last called, who has waited longest first."""
        return list(self._failing)

    def calls(self, which: Callable[[Call], bool]) -> list[Call]:
        """Some calls, in the order in which they were made."""
        return [call for call in self._calls.values() if which(call)]

    def totals(self, now: float) -> Totals:
        """Draw the line. A client that is still unreachable has been so until now."""
        outcomes = Counter(call.outcome for call in self._calls.values())
        codes = Counter(str(call.code) for call in self._calls.values() if call.outcome == "failed")
        if outcomes["cut off"]:
            codes["cut off"] = outcomes["cut off"]
        return Totals(
            made=len(self._calls),
            answered=outcomes["answered"],
            failed=codes,
            lost=outcomes["lost"] + outcomes[""],
            wrong=list(self._violations()),
            longest=max([self._longest, *(now - since for since in self._failing.values())]),
        )

    def _violations(self) -> Iterator[str]:
        for number in self._received.keys() - self._calls.keys():
            yield f"call {number} was received, but never made"
        for number in self._twice:
            yield f"call {number} had a second outcome"
        for number, call in self._calls.items():
            received = self._received.get(number, [])
            if len(received) > 1:
                yield f"call {number} to {call.client} was received {len(received)} times, by {', '.join(received)}"
            elif received and received[0] != call.client:
                yield f"call {number} to {call.client} was received by {received[0]}"
            if call.outcome == "answered" and call.by != call.client:
                yield f"call {number} to {call.client} was answered by {call.by}"
            if call.outcome == "answered" and not received:
                yield f"call {number} to {call.client} was answered, but no client has received it"
            if call.outcome == "failed" and not call.sent and received:
                yield f"call {number} to {call.client} failed with {call.code} and sent:false, but was received"
