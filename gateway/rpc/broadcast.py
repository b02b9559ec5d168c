"""Broadcast one notification to many clients of this node, in slices paced so that calls keep their latency.

client <- {"jsonrpc":"2.0","method":...,"params":...}       to each client whose id begins with the prefix
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from gateway.protocol.jsonrpc import encode_notification
from gateway.rpc.local import CallFailures, LocalDelivery

#: work per slice, which is one reactor iteration, in seconds
MAX_SLICE_TIME = 0.0005
#: clients per slice
MAX_SLICE_CLIENTS = 256
#: bytes per slice
MAX_SLICE_BYTES = 2**20
#: After a slice, pause for this multiple of its time, and at least for as long as the reactor was late after the last
#: pause: a busy node sends more slowly.
PAUSE_FACTOR = 2
#: seconds
MAX_PAUSE = 0.05
#: how late an idle reactor calls a timer, in seconds: it wakes at whole milliseconds
TIMER_RESOLUTION = 0.001
#: half of what a core can send
MAX_BYTES_PER_SECOND = 100 * 2**20
#: ids compared with the prefix between two reads of the clock
IDS_PER_CLOCK_CHECK = 32
#: While more bytes than this wait for slow readers on this node, broadcasts pause.
MAX_UNSENT = 2**26
#: seconds
UNSENT_POLL_INTERVAL = 0.05
#: Longest such pause, in seconds. By then, readers that are too slow are closed. The others, perhaps with a message
#: each, must not stop the broadcast.
UNSENT_TIMEOUT = 3.0
#: bytes sent after such a pause before the unsent bytes are checked again
MIN_ROOM = 2**24


class Broadcaster:
    """Broadcast notifications to clients by id prefix. Concurrent broadcasts share the limit of unsent bytes."""

    def __init__(
        self, local: LocalDelivery, failures: CallFailures, clock: IReactorTime, is_superseded: Callable[[str], bool]
    ) -> None:
        """``is_superseded`` returns whether a client is connected to another node, and stays connected here only for
        the calls in flight."""
        self._is_superseded = is_superseded
        self._local = local
        self._failures = failures
        self._clock = clock
        #: bytes that all broadcasts may send before the unsent bytes are checked again
        self._room = 0

    async def broadcast(self, prefix: str, method: str, params: bytes | None) -> int:
        """Send a notification; returns the number of clients that it was written to. Raises ``RpcError``."""
        try:
            self._local.validate(None, method, params)
            return await self._broadcast(prefix, encode_notification(method, params))
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - it is logged unless it is an RpcError
            raise self._failures.to_rpc_error(e, None) from None

    async def _broadcast(self, prefix: str, payload: bytes) -> int:
        sessions, size = self._local.sessions, len(payload)
        sent_count = self._room = 0
        lateness = 0.0
        # The only step that is not sliced: 4 ms for 100,000 clients. Ids are popped one by one, since freeing the whole
        # list at the end would take half as long again.
        ids = sessions.client_ids()
        while True:
            started_at = self._clock.seconds()
            sent = self._send_slice(ids, prefix, payload, started_at)
            sent_count += sent
            if not ids:
                return sent_count
            ended_at = self._clock.seconds()
            pause = max(
                min(MAX_PAUSE, max(PAUSE_FACTOR * (ended_at - started_at), lateness)),
                sent * size / MAX_BYTES_PER_SECOND,
            )
            await deferLater(self._clock, pause)
            lateness = self._clock.seconds() - ended_at - pause - TIMER_RESOLUTION
            self._room -= sent * size
            if sent and self._room <= 0:
                await self._wait_for_room()

    def _send_slice(self, ids: list[str], prefix: str, payload: bytes, started_at: float) -> int:
        """Notify the last clients of ``ids``, and remove them from it, until the time or the bytes of a slice are used
        up.

        Returns the number of clients that were notified.
        """
        local, clock, is_superseded = self._local, self._clock.seconds, self._is_superseded
        max_clients = min(MAX_SLICE_CLIENTS, -(-MAX_SLICE_BYTES // len(payload)))
        sent = skipped = 0
        while ids and sent < max_clients:
            client_id = ids.pop()
            if not client_id.startswith(prefix):
                skipped += 1
                if skipped < IDS_PER_CLOCK_CHECK:
                    continue
            # notify() returns False for clients that have disconnected since the list was made.
            elif not is_superseded(client_id) and local.notify(client_id, payload):
                sent += 1
            skipped = 0
            if clock() - started_at >= MAX_SLICE_TIME:
                break
        return sent

    async def _wait_for_room(self) -> None:
        """Wait while too many bytes wait for slow readers."""
        sessions = self._local.sessions
        deadline = self._clock.seconds() + UNSENT_TIMEOUT
        while (room := MAX_UNSENT - sessions.unsent_bytes()) <= 0 and self._clock.seconds() < deadline:
            await deferLater(self._clock, UNSENT_POLL_INTERVAL)
        self._room = room if room > 0 else MIN_ROOM
