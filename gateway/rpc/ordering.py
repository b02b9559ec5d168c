"""Order of the messages to one client that pass through other nodes, or that cannot be sent at once.

A message that can be sent at once is, and leaves no trace here but a number. The others wait in the client's queue, and
so does every later message to that client: each is handed on, to a session of this node or to another node, before the
next one is looked at. None waits for a response.

    waiting      messages that are to be handed on, in the order in which they were sent to this node
    at a node    messages that another node has, and may still give back: "not here", "lease lost", connection lost

A message that is given back returns to its place among those that wait. The messages sent after it to that node may be
given back as well. So before a message goes anywhere else, the other node is asked to say when it has settled all that
it was sent for this client (``peer.fence``, api/peer_server.py): until then nothing is handed on. The loss of the
connection settles them, too.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Generic, Protocol, TypeVar

from twisted.internet.defer import Deferred

from gateway.registry.interface import Location


class QueuedMessage(Protocol):
    """A message as its queue sees it."""

    #: its place in the order of all messages
    number: int
    #: the epoch of the queue in which it was sent to a node
    epoch: int


_Message = TypeVar("_Message", bound=QueuedMessage)


def _number(message: QueuedMessage) -> int:
    return message.number


class ClientQueue(Generic[_Message]):
    """The messages to one client. It exists only while there are any."""

    __slots__ = (
        "client_id",
        "epoch",
        "fence",
        "is_running",
        "last_number",
        "location",
        "owner_checked_up_to",
        "unsettled",
        "waiting",
        "was_missed",
    )

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        #: the messages to be handed on, the oldest first
        self.waiting: deque[_Message] = deque()
        #: number of the newest message so far
        self.last_number = 0
        #: whether its messages are being handed on
        self.is_running = False
        #: where the messages at a node were sent
        self.location: Location | None = None
        #: how many of them have been neither settled nor completed
        self.unsettled = 0
        #: counts the fences: only messages of the current epoch are unsettled
        self.epoch = 0
        #: whether one of them was given back since the last fence
        self.was_missed = False
        #: the fence in progress
        self.fence: Deferred[None] | None = None
        #: number of the newest message for which a session of this node is known to own the client
        self.owner_checked_up_to = 0

    @property
    def is_idle(self) -> bool:
        """Whether it can be dropped."""
        return not self.waiting and not self.unsettled and not self.is_running

    def add(self, message: _Message) -> None:
        """Put a message in its place among those that wait."""
        waiting, number = self.waiting, message.number
        if number > self.last_number:
            self.last_number = number
        if not waiting or waiting[-1].number < number:
            waiting.append(message)
        elif number < waiting[0].number:
            waiting.appendleft(message)
        else:
            insort(waiting, message, key=_number)

    def remove(self, message: _Message) -> None:
        """Remove a message, if it waits."""
        waiting = self.waiting
        if waiting and waiting[0] is message:
            waiting.popleft()
            return
        index = bisect_left(waiting, message.number, key=_number)
        if index < len(waiting) and waiting[index] is message:
            del waiting[index]

    def remove_up_to(self, number: int) -> list[_Message]:
        """Remove the messages up to a number, and return them."""
        removed = []
        while self.waiting and self.waiting[0].number <= number:
            removed.append(self.waiting.popleft())
        return removed

    def may_follow(self, location: Location) -> bool:
        """Whether a message may be sent to a node without waiting for those that are at a node."""
        if not self.unsettled:
            return True
        current = self.location
        if current is location:
            return not self.was_missed
        return (
            current is not None
            and not self.was_missed
            and (current.node_id, current.generation) == (location.node_id, location.generation)
        )

    def sent(self, message: _Message, location: Location) -> None:
        """Record that a message is at a node."""
        if message.number > self.last_number:
            self.last_number = message.number
        self.location = location
        self.unsettled += 1
        message.epoch = self.epoch

    def returned(self, message: _Message, *, missed: bool, by_lease: bool = False) -> None:
        """Record that a message is not at a node any more. ``missed``: it was given back; ``by_lease``: because the
        node's lease had expired. Then that node gives all later ones back until it receives a fence."""
        if message.epoch == self.epoch:
            self.unsettled -= 1
            self.was_missed = by_lease or ((self.was_missed or missed) and bool(self.unsettled))

    def settled(self) -> None:
        """Record that no message at a node can be given back any more."""
        self.epoch += 1
        self.unsettled = 0
        self.was_missed = False
        self.fence = None
