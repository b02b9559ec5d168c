"""One notification for many clients of this node, in slices, at a pace that leaves calls their latency.

client <- {"jsonrpc":"2.0","method":...,"params":...}       each whose id begins with the prefix
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from gateway.rpc.jsonrpc import encode_notification
from gateway.rpc.local import Local
from gateway.rpc.outcomes import Outcomes

#: what is done in one turn of the reactor: the clients that are looked at, and the bytes that are sent
SLICE, SLICE_BYTES = 256, 1048576
#: and how many bytes a second: half of what a core can send, so that calls keep their latency
PACE = 104857600
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
        local = self._local
        reached = clients = size = self._room = 0
        for client_id in local.edge.client_ids():
            if clients == SLICE or size >= SLICE_BYTES:
                await deferLater(self._clock, size / PACE)
                self._room -= size
                if size and self._room <= 0:
                    await self._await_room()
                clients = size = 0
            clients += 1
            # Clients that have left since the list was made take nothing.
            if client_id.startswith(prefix) and not self._is_elsewhere(client_id) and local.notify(client_id, payload):
                reached += 1
                size += len(payload)
        return reached

    async def _await_room(self) -> None:
        """Wait while too much waits for slow readers."""
        edge = self._local.edge
        ends = self._clock.seconds() + LONGEST_WAIT
        while (room := MAX_UNSENT - edge.unsent()) <= 0 and self._clock.seconds() < ends:
            await deferLater(self._clock, LOOK_AGAIN)
        self._room = room if room > 0 else LEAST_ROOM
