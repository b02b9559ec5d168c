"""How long an agent stays with an open connection: until it ends, or until the time that a ``gateway.goaway`` named.

The gateway closes a connection that it told to go as soon as the calls on it are over. Where that takes longer than the
agent was asked to wait, it goes on before: the connection is left to the gateway, responses still pass over it, and new
calls reach the agent by the next one.
"""

from __future__ import annotations

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from gateway._agent.connection import Connection
from gateway._agent.itinerary import GoAway, Step
from gateway._agent.policy import Ended
from gateway._agent.session import Session


class Stay:
    """One connection, from its opening on."""

    #: what the last goaway asked for
    goaway: GoAway | None = None
    #: where it is time to go while the connection stays open
    onward: Step | None = None

    def __init__(self, connection: Connection, session: Session, clock: IReactorTime, token: str | None = None) -> None:
        self.connection = connection
        self.session = session
        #: by what it was opened
        self.token = token
        #: fires when the connection has ended, or when there is an :attr:`onward`
        self.over: Deferred[None] = Deferred()
        self._clock = clock
        #: when it was begun, by that clock
        self.since = clock.seconds()
        self._timer: IDelayedCall | None = None
        connection.closing.addCallback(self._closing)

    def asked_to_go(self, goaway: GoAway, onward: Step | None) -> None:
        """Go on by ``onward`` after its wait; without it, wait for the end."""
        self.goaway = goaway
        self._cancel()
        if onward is not None and not self.over.called:
            self._timer = self._clock.callLater(onward.delay, self._go, attrs.evolve(onward, delay=0.0))

    def _go(self, onward: Step) -> None:
        self._timer = None
        self.onward = onward
        self.over.callback(None)

    def _closing(self, ended: Ended) -> Ended:
        self._cancel()
        if not self.over.called:
            self.over.callback(None)
        return ended

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def end(self) -> Ended:
        """Wait for the end of the connection, and for that of its transport."""
        ended = await self.connection.closing
        self.session.close(f"the connection to the gateway ended ({ended.code})")
        await self.connection.gone
        return ended
