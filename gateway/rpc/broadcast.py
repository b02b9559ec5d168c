"""One notification for many clients of this node, in slices, at a pace that leaves calls their latency.

client <- {"jsonrpc":"2.0","method":...,"params":...}       each whose id begins with the prefix
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from gateway.protocol.jsonrpc import encode_notification
from gateway.rpc.local import CallFailures, LocalDelivery

#: what is done in one turn of the reactor: seconds of work, clients that are sent to, bytes that are sent
MAX_SLICE_TIME, MAX_SLICE_CLIENTS, MAX_SLICE_BYTES = 0.0005, 256, 1048576
#: Then it rests for so many times as long as that took, and at least for as long as the reactor was late in coming back
#: from the last rest: when the node has much to do, it sends more slowly. But not for longer than so many seconds.
PAUSE_FACTOR, MAX_PAUSE = 2, 0.05
#: how late the reactor is when it has nothing else to do, in seconds: it wakes at whole milliseconds
TIMER_RESOLUTION = 0.001
#: bytes a second: half of what a core can send
MAX_BYTES_PER_SECOND = 104857600
#: so many ids are looked at between two looks at the clock
IDS_PER_CLOCK_CHECK = 32
#: While more bytes than these wait for slow readers on this node, it sends nothing; how often it looks, in seconds, and
#: how long it waits at most before it sends so many more: by then readers that are too slow are closed, and those that
#: are left, with a message each perhaps, are not to stop it.
MAX_UNSENT, UNSENT_POLL_INTERVAL, UNSENT_TIMEOUT, MIN_ROOM = 67108864, 0.05, 3.0, 16777216


class Broadcaster:
    """Notifications for prefixes of ids; those that go at the same time share the room for what is unsent."""

    def __init__(
        self, local: LocalDelivery, failures: CallFailures, clock: IReactorTime, is_superseded: Callable[[str], bool]
    ) -> None:
        """``is_elsewhere``: a client stays here for the calls that it has, and is at another node as well."""
        self._is_superseded = is_superseded
        self._local = local
        self._failures = failures
        self._clock = clock
        #: what may be sent, by all together, before it is looked at again what is unsent
        self._room = 0

    async def broadcast(self, prefix: str, method: str, params: bytes | None) -> int:
        """Returns how many clients it was handed to. Raises ``RpcError``."""
        try:
            self._local.validate(None, method, params)
            return await self._broadcast(prefix, encode_notification(method, params))
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            raise self._failures.to_rpc_error(e, None) from None

    async def _broadcast(self, prefix: str, payload: bytes) -> int:
        edge, size = self._local.sessions, len(payload)
        reached = self._room = 0
        late = 0.0
        # The one thing that is done in one go: 4 ms for 100,000 clients. They are taken off one by one, since to let go
        # of all of them at the end would take half as long again.
        ids = edge.client_ids()
        while True:
            began = self._clock.seconds()
            sent = self._send_slice(ids, prefix, payload, began)
            reached += sent
            if not ids:
                return reached
            ended = self._clock.seconds()
            rest = max(min(MAX_PAUSE, max(PAUSE_FACTOR * (ended - began), late)), sent * size / MAX_BYTES_PER_SECOND)
            await deferLater(self._clock, rest)
            late = self._clock.seconds() - ended - rest - TIMER_RESOLUTION
            self._room -= sent * size
            if sent and self._room <= 0:
                await self._wait_for_room()

    def _send_slice(self, ids: list[str], prefix: str, payload: bytes, started_at: float) -> int:
        """Notify the last of ``ids``, and take them off it, until the time or the bytes of a slice are used up.

        Returns how many were reached.
        """
        local, seconds, is_elsewhere = self._local, self._clock.seconds, self._is_superseded
        most = min(MAX_SLICE_CLIENTS, -(-MAX_SLICE_BYTES // len(payload)))
        sent = looked_at = 0
        while ids and sent < most:
            client_id = ids.pop()
            if not client_id.startswith(prefix):
                looked_at += 1
                if looked_at < IDS_PER_CLOCK_CHECK:
                    continue
            # Clients that have left since the list was made take nothing.
            elif not is_elsewhere(client_id) and local.notify(client_id, payload):
                sent += 1
            looked_at = 0
            if seconds() - started_at >= MAX_SLICE_TIME:
                break
        return sent

    async def _wait_for_room(self) -> None:
        """Wait while too much waits for slow readers."""
        edge = self._local.sessions
        ends = self._clock.seconds() + UNSENT_TIMEOUT
        while (room := MAX_UNSENT - edge.unsent_bytes()) <= 0 and self._clock.seconds() < ends:
            await deferLater(self._clock, UNSENT_POLL_INTERVAL)
        self._room = room if room > 0 else MIN_ROOM
