"""Ledger of all calls: the called client, the outcome for the backend, and the clients that received the call.

A call has one of these outcomes:

    answered      a result, with the id of the client that sent it
    failed        an error, with its code, and whether the client may have received the call (``sent``)
    cut off       the backend's connection to the node was lost: the result is unknown
    lost          none of these within the timeout and a margin

Violations that no fault excuses: a call that was received twice or by another client; a result from another client, a
second outcome, a result of a call that was not received; and a call that was received although its error has
``sent: false``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Call:
    """One call. Times are in seconds of the monotonic clock."""

    client: str
    #: the node that the call was sent to
    via: str
    made_at: float
    #: ``answered``, ``failed``, ``cut off``, ``lost``, or empty
    outcome: str = ""
    #: the client that sent the result
    by: str = ""
    code: int = 0
    sent: bool = True


@dataclass
class Totals:
    """The totals of a ledger."""

    made: int = 0
    answered: int = 0
    #: code -> number of failed calls
    failed: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    #: descriptions of violations
    wrong: list[str] = field(default_factory=list)
    #: seconds; the longest time that a client was unreachable
    longest: float = 0.0


class CallLedger:
    """All calls of one run."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}
        self._open: dict[int, Call] = {}
        self._received: dict[int, list[str]] = defaultdict(list)
        self._twice: list[int] = []
        #: unreachable client -> time of the first failed call
        self._failing: dict[str, float] = {}
        #: client -> time of its latest answered call
        self._reached: dict[str, float] = {}
        self._longest = 0.0

    def made(self, client: str, via: str, now: float) -> int:
        """Record a new call; return its number."""
        number = len(self._calls) + 1
        self._calls[number] = self._open[number] = Call(client, via, now)
        return number

    def answered(self, number: int, by: str, now: float) -> None:
        """Record a result from client ``by``."""
        call = self._end(number, "answered")
        if call is None:
            return
        call.by = by
        self._reached[call.client] = max(call.made_at, self._reached.get(call.client, 0.0))
        self._longest = max(self._longest, now - self._failing.pop(call.client, now))

    def failed(self, number: int, code: int, sent: bool) -> None:
        """Record an error."""
        call = self._end(number, "failed")
        if call is not None:
            call.code, call.sent = code, sent
            self._unreached(call)

    def cut_off(self, number: int) -> None:
        """Record the loss of the backend's connection."""
        self._end(number, "cut off")

    def expire(self, made_before: float) -> None:
        """Record calls without outcome that were made before ``made_before`` as lost."""
        for number, call in list(self._open.items()):
            if call.made_at >= made_before:
                break
            self._end(number, "lost")
            self._unreached(call)

    def received(self, number: int, by: str) -> None:
        """Record that client ``by`` received a call."""
        self._received[number].append(by)

    def _end(self, number: int, outcome: str) -> Call | None:
        call = self._open.pop(number, None)
        if call is None:
            # A lost call stays lost, whatever arrives later.
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
        """The number of calls without outcome."""
        return len(self._open)

    def unreachable(self) -> list[str]:
        """Return the clients that did not answer their latest call, those unreachable for longest first."""
        return list(self._failing)

    def calls(self, which: Callable[[Call], bool]) -> list[Call]:
        """Return the calls that match, in order."""
        return [call for call in self._calls.values() if which(call)]

    def totals(self, now: float) -> Totals:
        """Compute the totals. Clients that are still unreachable count until ``now``."""
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
                yield f"call {number} to {call.client} was answered, but no client received it"
            if call.outcome == "failed" and not call.sent and received:
                yield f"call {number} to {call.client} failed with {call.code} and sent:false, but was received"
