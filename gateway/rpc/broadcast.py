"""One notification for many clients of this node, in slices, at a pace that leaves calls their latency.

client <- {"jsonrpc":"2.0","method":...,"params":...}       each whose id begins with the prefix
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from gateway.protocol.jsonrpc import encode_notification
from gateway.rpc.local import Local, Outcomes

#: what is done in one turn of the reactor: seconds of work, clients that are sent to, bytes that are sent
SLICE, SLICE_CLIENTS, SLICE_BYTES = 0.0005, 256, 1048576
#: Then it rests for so many times as long as that took, and at least for as long as the reactor was late in coming back
#: from the last rest: when the node has much to do, it sends more slowly. But not for longer than so many seconds.
REST, LONGEST_REST = 2, 0.05
#: how late the reactor is when it has nothing else to do, in seconds: it wakes at whole milliseconds
TIMER_STEP = 0.001
#: bytes a second: half of what a core can send
PACE = 104857600
#: so many ids are looked at between two looks at the clock
LOOKED_AT = 32
#: While more bytes than these wait for slow readers on this node, it sends nothing; how often it looks, in seconds, and
#: how long it waits at most before it sends so many more: by then readers that are too slow are closed, and those that
#: are left, with a message each perhaps, are not to stop it.
MAX_UNSENT, LOOK_AGAIN, LONGEST_WAIT, LEAST_ROOM = 67108864, 0.05, 3.0, 16777216


class Spreading:
    """Notifications for prefixes of ids; those that go at the same time share the room for what is unsent."""

    def __init__(
        self, local: Local, outcomes: Outcomes, clock: IReactorTime, is_elsewhere: Callable[[str], bool]
    ) -> None:
        """``is_elsewhere``: a client stays here for the calls that it has, and is at another node as well."""
        self._is_elsewhere = is_elsewhere
        self._local = local
        self._outcomes = outcomes
        self._clock = clock
        #: what may be sent, by all together, before it is looked at again what is unsent
        self._room = 0

    async def notify(self, prefix: str, method: str, params: bytes | None) -> int:
        """Returns how many clients it was handed to. Raises ``RpcError``."""
        try:
            self._local.check(None, method, params)
            return await self._notify(prefix, encode_notification(method, params))
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            raise self._outcomes.error_of(e, None) from None

    async def _notify(self, prefix: str, payload: bytes) -> int:
        edge, size = self._local.edge, len(payload)
        reached = self._room = 0
        late = 0.0
        # The one thing that is done in one go: 4 ms for 100,000 clients. They are taken off one by one, since to let go
        # of all of them at the end would take half as long again.
        ids = edge.client_ids()
        while True:
            began = self._clock.seconds()
            sent = self._slice(ids, prefix, payload, began)
            reached += sent
            if not ids:
                return reached
            ended = self._clock.seconds()
            rest = max(min(LONGEST_REST, max(REST * (ended - began), late)), sent * size / PACE)
            await deferLater(self._clock, rest)
            late = self._clock.seconds() - ended - rest - TIMER_STEP
            self._room -= sent * size
            if sent and self._room <= 0:
                await self._await_room()

    def _slice(self, ids: list[str], prefix: str, payload: bytes, began: float) -> int:
        """Notify the last of ``ids``, and take them off it, until the time or the bytes of a slice are used up.

        Returns how many were reached.
        """
        local, seconds, is_elsewhere = self._local, self._clock.seconds, self._is_elsewhere
        most = min(SLICE_CLIENTS, -(-SLICE_BYTES // len(payload)))
        sent = looked_at = 0
        while ids and sent < most:
            client_id = ids.pop()
            if not client_id.startswith(prefix):
                looked_at += 1
                if looked_at < LOOKED_AT:
                    continue
            # Clients that have left since the list was made take nothing.
            elif not is_elsewhere(client_id) and local.notify(client_id, payload):
                sent += 1
            looked_at = 0
            if seconds() - began >= SLICE:
                break
        return sent

    async def _await_room(self) -> None:
        """Wait while too much waits for slow readers."""
        edge = self._local.edge
        ends = self._clock.seconds() + LONGEST_WAIT
        while (room := MAX_UNSENT - edge.unsent()) <= 0 and self._clock.seconds() < ends:
            await deferLater(self._clock, LOOK_AGAIN)
        self._room = room if room > 0 else LEAST_ROOM
