"""The end of a drain for backends: no client is left here, but calls to clients of other nodes may go through this one.

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain"}}       to each backend's WebSocket
-> {"jsonrpc":"2.0","id":7,"method":"client.call","params":{…}}                  half a second later:
<- {"jsonrpc":"2.0","id":7,"error":{"code":-32004,…,"data":{…,"sent":false}}}    another node can be asked at once
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from gateway.rpc.jsonrpc import encode_notification

#: how often it is looked whether calls are in flight, in seconds
TICK = 0.05
#: how long backends that were told to go have for going, in seconds; and how long those who did not are refused, before
#: their connections are closed, with which nobody can tell what became of what they send just then
GRACE = 0.5

GOAWAY = encode_notification("gateway.goaway", b'{"reason":"drain"}')


class LastCalls:
    """Lets the calls end that backends have in flight through this node, and begins none."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        *,
        longest_call: float,
        refuse: Callable[[], None],
        in_flight: Callable[[], int],
        tell_backends: Callable[[bytes], int],
    ) -> None:
        """``refuse`` has every new call refused, ``in_flight`` counts those that are not over, ``longest_call`` is the
        most that they may take, in seconds. ``tell_backends`` sends a message to the WebSockets of backends, and
        returns how many there are."""
        self._clock = clock
        self._longest_call = longest_call
        self._refuse = refuse
        self._in_flight = in_flight
        self._tell_backends = tell_backends

    async def over(self) -> None:
        """Have backends go, then refuse new calls, and wait until those in flight are over."""
        told = self._tell_backends(GOAWAY)
        if told:
            await deferLater(self._clock, GRACE)
        self._refuse()
        began = self._clock.seconds()
        while (calls := self._in_flight()) and self._clock.seconds() - began < self._longest_call:
            await deferLater(self._clock, TICK)
        if calls:
            self._log.warn("{n} calls are still in flight, and end with this node", n=calls)
        if told:
            await deferLater(self._clock, GRACE)
