"""Sending clients away, one by one, without losing a call.

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain","url":"wss://…","after":0.3}}
-> {"jsonrpc":"2.0","id":"5f0c…","result":{"free":12}}     the responses to the calls that it had before
<- close 1012                                              when there are no more

From the goaway on the client is called no more by that connection. Its row stays for a moment longer than that: whoever
looks for the client asks here, and is answered when it is at the next node.

Ending relays: a client of another node whose bytes go through this one is sent away by the node that it is a client
of, which alone knows where a frame ends, and which calls are in flight; what is left of the relay when these must be
over is cut.

-> peer.close {"client","generation","code":1012,"reason"}     the node tells it gateway.goaway with a url of its own

The end of a drain for backends: no client is left here, but calls to clients of other nodes may go through this one.

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain"}}       to each backend's WebSocket
-> {"jsonrpc":"2.0","id":7,"method":"client.call","params":{…}}                  half a second later:
<- {"jsonrpc":"2.0","id":7,"error":{"code":-32004,…,"data":{…,"sent":false}}}    another node can be asked at once

Sending every client away, spread over a time, so that the node can end and nobody is met by a stampede.

Client i of n is told to go when i/n of the time is over, and is closed when its calls are (farewells.py).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec
from twisted.internet.defer import Deferred, DeferredList, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.clients.interface import IClientSessions
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import CallTracker, INodeService, IPeerClient, IRebalancer, NodeState
from gateway.cluster.membership import Membership, NodeDirectory
from gateway.cluster.relay import SocketRelays
from gateway.cluster.routing import connect_url
from gateway.protocol.frames import CloseCode
from gateway.protocol.jsonrpc import encode_notification
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry
from gateway.rpc.dispatcher import Dispatcher
from gateway.rpc.handoff import HANDOFF_TIMEOUT
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.cloud.autoscaling import Autoscaling
    from gateway.cloud.registrar import DnsRegistrar

#: seconds between two looks at calls in flight, and at what a drain has to do
POLL_INTERVAL = 0.05
#: the longest that a client is asked to wait before it connects again, in seconds: short where whoever sends clients
#: away spreads them already, and long where all go at once
MAX_RECONNECT_DELAY, MAX_RECONNECT_DELAY_UNPACED = 0.2, 1.5


class GracefulDisconnect:
    """The clients of one node that were told to go, and are not gone yet."""

    _log = Logger()

    def __init__(
        self,
        sessions: IClientSessions,
        clock: IReactorTime,
        *,
        calls: CallTracker,
        registry: IRegistry,
        node_directory: NodeDirectory,
        max_call_timeout: float,
    ) -> None:
        """``max_call_timeout`` is the longest that calls in flight on a connection may take, in seconds."""
        self._sessions = sessions
        self._clock = clock
        self._max_call_timeout = max_call_timeout
        self._begin_goaway = calls.begin_goaway
        self._in_flight = calls.calls_in_flight_on
        #: client_id -> the generation of its connection, when that is closed at the latest, and why
        self._disconnecting: dict[str, tuple[int, float, str]] = {}
        self._release = registry.release
        self._is_single_node = node_directory.is_single_node
        #: when the rows of those are removed that were closed, the first first
        self._rows_to_release: deque[tuple[float, str, int]] = deque()
        self._loop = LoopingCall(self._poll)
        self._loop.clock = clock

    def __len__(self) -> int:
        return len(self._disconnecting)

    def goaway_sent(self, client_id: str) -> int:
        """The generation of a client's connection that it was told to leave, and has not left; else 0."""
        return self._disconnecting[client_id][0] if client_id in self._disconnecting else 0

    def send_goaway(
        self,
        client_id: str,
        reason: str,
        url: str | None,
        *,
        min_delay: float = 0.0,
        max_delay: float = MAX_RECONNECT_DELAY,
    ) -> bool:
        """Tell a client to go, to that complete url if there is one, after ``least_wait`` and a random wait of at most
        ``longest_wait`` seconds; it is closed when its calls are over. ``False`` if it is not here, or was told
        already."""
        generation = self._sessions.generation(client_id)
        if not generation or self.goaway_sent(client_id) == generation:
            return False
        params: dict[str, object] = {"reason": reason}
        if url is not None:
            params["url"] = url
        params["after"] = round(min_delay + random.uniform(0, max_delay), 2)
        goaway = encode_notification("gateway.goaway", msgspec.json.encode(params))
        if not self._sessions.send(client_id, goaway, generation):
            return False
        self._begin_goaway(client_id, generation, not self._is_single_node())
        self._disconnecting[client_id] = generation, self._clock.seconds() + self._max_call_timeout, reason
        self._close_if_idle(client_id)
        if (self._disconnecting or self._rows_to_release) and not self._loop.running:
            self._loop.start(POLL_INTERVAL, now=False).addErrback(self._poll_failed)
        return True

    def stop(self) -> None:
        """Close nobody any more."""
        if self._loop.running:
            self._loop.stop()

    def _poll(self) -> None:
        for client_id in list(self._disconnecting):
            self._close_if_idle(client_id)
        self._release_rows(self._clock.seconds())
        if not self._disconnecting and not self._rows_to_release:
            self._loop.stop()

    def _close_if_idle(self, client_id: str) -> None:
        """Close a connection if it has no more calls, or has had the time for them."""
        generation, latest, reason = self._disconnecting[client_id]
        if self._in_flight(client_id, generation) and self._clock.seconds() < latest:
            return
        del self._disconnecting[client_id]
        if keeps := not self._is_single_node():
            self._rows_to_release.append((self._clock.seconds() + HANDOFF_TIMEOUT, client_id, generation))
        closing = self._sessions.close(client_id, CloseCode.SERVICE_RESTART, reason, generation, keep_row=keeps)
        closing.addErrback(self._close_failed)

    def _release_rows(self, now: float) -> None:
        while self._rows_to_release and self._rows_to_release[0][0] <= now:
            _, client_id, generation = self._rows_to_release.popleft()
            self._release(client_id, generation).addErrback(self._close_failed)

    def _close_failed(self, failure: Failure) -> None:
        # The connection is closed; the registry keeps what it could not write yet, and tells of its troubles itself.
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in releasing a client that was told to go", failure)

    def _poll_failed(self, failure: Failure) -> None:
        self._log.failure("error in sending clients away", failure)


#: how long a closing handshake through a relay may take, in seconds
RELAY_CLOSE_TIMEOUT = 3.0


class RelayDrain:
    """Sends away the clients that are relayed through this node; ``cut`` ends the relay of one at once."""

    _log = Logger()

    def __init__(
        self,
        *,
        registry: IRegistry,
        peer_client: IPeerClient,
        clock: IReactorTime,
        close_relay: Callable[[str], object],
        max_call_timeout: float,
    ) -> None:
        """``longest_call`` is in seconds."""
        self._registry = registry
        self._peer_client = peer_client
        self._clock = clock
        self._close_relay = close_relay
        self._timeout = max_call_timeout + RELAY_CLOSE_TIMEOUT
        self._draining: set[str] = set()

    def drain(self, client_id: str) -> None:
        """Send one away, unless that is under way."""
        if client_id not in self._draining:
            self._draining.add(client_id)
            Deferred.fromCoroutine(self._drain(client_id)).addErrback(self._failed)

    async def _drain(self, client_id: str) -> None:
        try:
            location = await self._registry.find(client_id)
            if location is not None and await self._peer_client.close_session(
                location, CloseCode.SERVICE_RESTART, "drain"
            ):
                await deferLater(self._clock, self._timeout)
        except (RegistryUnavailableError, PeerUnreachableError):
            pass  # then it is told nothing but the end of its connection
        finally:
            self._draining.discard(client_id)
            self._close_relay(client_id)

    def _failed(self, failure: Failure) -> None:
        self._log.failure("error in ending a relay", failure)


#: how long backends that were told to go have for going, in seconds; and how long those who did not are refused, before
#: their connections are closed, with which nobody can tell what became of what they send just then
BACKEND_GRACE_PERIOD = 0.5

BACKEND_GOAWAY = encode_notification("gateway.goaway", b'{"reason":"drain"}')


class BackendDrain:
    """Lets the calls end that backends have in flight through this node, and begins none."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        *,
        max_call_timeout: float,
        refuse_new_calls: Callable[[], None],
        in_flight: Callable[[], int],
        send_to_backends: Callable[[bytes], int],
    ) -> None:
        """``refuse`` has every new call refused, ``in_flight`` counts those that are not over, ``longest_call`` is the
        most that they may take, in seconds. ``tell_backends`` sends a message to the WebSockets of backends, and
        returns how many there are."""
        self._clock = clock
        self._max_call_timeout = max_call_timeout
        self._refuse_new_calls = refuse_new_calls
        self._in_flight = in_flight
        self._send_to_backends = send_to_backends

    async def run(self) -> None:
        """Have backends go, then refuse new calls, and wait until those in flight are over."""
        told = self._send_to_backends(BACKEND_GOAWAY)
        if told:
            await deferLater(self._clock, BACKEND_GRACE_PERIOD)
        self._refuse_new_calls()
        began = self._clock.seconds()
        while (calls := self._in_flight()) and self._clock.seconds() - began < self._max_call_timeout:
            await deferLater(self._clock, POLL_INTERVAL)
        if calls:
            self._log.warn("{n} calls are still in flight, and end with this node", n=calls)
        if told:
            await deferLater(self._clock, BACKEND_GRACE_PERIOD)


class SessionDrain:
    """One drain of one node."""

    _log = Logger()

    def __init__(
        self,
        sessions: IClientSessions,
        clock: IReactorTime,
        duration: float,
        *,
        graceful_disconnect: GracefulDisconnect,
        handoffs: Callable[[], int] = lambda: 0,
        is_single_node: Callable[[], bool] = lambda: False,
        url_for: Callable[[str], str | None],
        relayed_client_ids: Callable[[], list[str]] = list,
        drain_relay: Callable[[str], object] = lambda client_id: None,
    ) -> None:
        """``departing`` tells how many clients are on their way to other nodes: calls to them wait here, and must be
        told when they have arrived. ``alone`` tells whether there is no other node. ``url_for`` gives the complete url
        that a client is to connect to, or ``None``. ``relayed`` lists the clients of other nodes whose bytes go through
        this one, and ``end_relay`` has one closed."""
        self._sessions = sessions
        self._clock = clock
        self._duration = duration
        self._graceful_disconnect = graceful_disconnect
        self._handoffs = handoffs
        self._is_single_node = is_single_node
        self._url_for = url_for
        self._relayed_client_ids = relayed_client_ids
        self._drain_relay = drain_relay
        #: who is to be told yet, and how
        self._queue: list[tuple[Callable[[str], object], str]] = []
        self._started_at = 0.0
        self._total = 0
        self._loop = LoopingCall(self._tick)

    def start(self) -> Deferred[None]:
        """Begin; the Deferred fires when no client is left."""
        self._fill_queue()
        random.shuffle(self._queue)
        self._started_at = self._clock.seconds()
        self._log.info("draining {n} clients over {seconds:g} s", n=self._total, seconds=self._duration)
        self._loop.clock = self._clock
        return self._loop.start(POLL_INTERVAL).addCallback(lambda _: None)

    def _fill_queue(self) -> None:
        told = self._graceful_disconnect.goaway_sent
        self._queue = [
            (self._send_goaway, client_id) for client_id in self._sessions.client_ids() if not told(client_id)
        ]
        self._queue += [(self._drain_relay, client_id) for client_id in self._relayed_client_ids()]
        self._total = len(self._queue)

    def _tick(self) -> None:
        elapsed = self._clock.seconds() - self._started_at
        # The first at once, so that a node with few clients ends early.
        share = elapsed / self._duration if self._duration else 1.0
        due = min(self._total, int(share * self._total) + 1)
        while self._queue and self._total - len(self._queue) < due:
            tell, client_id = self._queue.pop()
            tell(client_id)
        if not self._queue:
            # Whoever was still opening its connection when the drain began.
            self._fill_queue()
            if not self._queue and not self._graceful_disconnect and not self._handoffs():
                self._loop.stop()

    def _send_goaway(self, client_id: str) -> None:
        longest = MAX_RECONNECT_DELAY if self._duration else MAX_RECONNECT_DELAY_UNPACED
        least = 0.0
        if self._is_single_node():
            # Whoever comes back to this very node does so in vain before it has ended.
            least = max(0.0, self._started_at + self._duration - self._clock.seconds())
        self._graceful_disconnect.send_goaway(
            client_id, "drain", self._url_for(client_id), min_delay=least, max_delay=longest
        )


#: how long one step of a drain or a stop may take, in seconds: of those that wait for the registry, for DNS, or for
#: connections to close
STEP_TIMEOUT = 5.0


async def run_step(
    description: str, step: Deferred[Any] | Coroutine[Deferred[Any], Any, Any], clock: IReactorTime, log: Logger
) -> None:
    """Wait for one step of a drain or a stop, for ``STEP_TIMEOUT`` at most. A failure is logged, and not raised."""
    waiting = step if isinstance(step, Deferred) else Deferred.fromCoroutine(step)
    try:
        await waiting.addTimeout(STEP_TIMEOUT, clock)
    except TimeoutError:
        log.warn("{step}: not done within {seconds:g} s", step=description, seconds=STEP_TIMEOUT)
    except Exception as e:  # noqa: BLE001 (the next steps are to follow, whatever this one did)
        log.warn("{step}: {problem}", step=description, problem=str(e) or type(e).__name__)


class Drain:
    """The drain of a node: move every client to other nodes, and let all calls finish, so that the process can end.

    Phases, in order: the node is not ready; no client is moved for balance any more; DNS and the registry no longer
    name this node as one that accepts clients; the ports that other processes listen on, too, are closed; clients and
    relayed clients are disconnected, spread over ``--drain-seconds``; backends are disconnected once their calls are
    answered; AWS is told that the instance can be terminated.
    """

    _log = Logger()

    def __init__(
        self,
        *,
        node: INodeService,
        clock: IReactorTime,
        settings: Settings,
        sessions: IClientSessions,
        dispatcher: Dispatcher,
        membership: Membership,
        node_directory: NodeDirectory,
        rebalancer: IRebalancer,
        graceful_disconnect: GracefulDisconnect,
        relays: SocketRelays,
        relay_drain: RelayDrain,
        send_to_backends: Callable[[bytes], int],
        dns_registrar: DnsRegistrar | None = None,
        autoscaling: Autoscaling | None = None,
    ) -> None:
        """``send_to_backends`` sends a message to the WebSockets of backends and returns their number."""
        self._node = node
        self._clock = clock
        self._settings = settings
        self._sessions = sessions
        self._dispatcher = dispatcher
        self._membership = membership
        self._node_directory = node_directory
        self._rebalancer = rebalancer
        self._graceful_disconnect = graceful_disconnect
        self._relays = relays
        self._relay_drain = relay_drain
        self._send_to_backends = send_to_backends
        self._dns_registrar = dns_registrar
        self._autoscaling = autoscaling

    async def run(self) -> None:
        """Drain the node; return when no client is left. Does nothing if the node is not up."""
        if self._node.state is not NodeState.UP:
            return
        self._node.state = NodeState.DRAINING
        self._rebalancer.stop()
        # Both before the first client is sent away, so that none is sent to this node again.
        await DeferredList(
            [Deferred.fromCoroutine(self.withdraw_dns()), Deferred.fromCoroutine(self._update_registry())]
        )
        await self._node.close_shared_ports()
        await self._drain_sessions()
        await self._drain_backends()
        if self._autoscaling is not None:
            await self._autoscaling.complete_drain()

    async def withdraw_dns(self) -> None:
        """Remove this node from DNS. After ``STEP_TIMEOUT`` it is retried in the background."""
        if self._dns_registrar is not None:
            await run_step("withdrawing from DNS", self._dns_registrar.withdraw(), self._clock, self._log)

    async def _update_registry(self) -> None:
        """Write the new state of this node to the registry, then read the state of the other nodes from it."""
        updated = self._membership.heartbeat().addCallback(lambda _: self._node_directory.refresh())
        await run_step("updating the registry", updated, self._clock, self._log)

    async def _drain_sessions(self) -> None:
        await SessionDrain(
            self._sessions,
            self._clock,
            self._settings.drain_seconds,
            graceful_disconnect=self._graceful_disconnect,
            handoffs=self._dispatcher.handoffs,
            is_single_node=self._node_directory.is_single_node,
            url_for=self.goaway_url,
            relayed_client_ids=self._relays.client_ids,
            drain_relay=self._relay_drain.drain,
        ).start()

    async def _drain_backends(self) -> None:
        await BackendDrain(
            self._clock,
            max_call_timeout=self._settings.max_call_timeout,
            refuse_new_calls=self._dispatcher.refuse_new_calls,
            in_flight=self._dispatcher.calls_in_flight,
            send_to_backends=self._send_to_backends,
        ).run()

    def goaway_url(self, client_id: str) -> str | None:
        """The complete URL that a client is to connect to instead: of the least loaded other node, or of this node if
        there is no other. ``None`` if that URL is not known, or would lead to any node."""
        other = self._node_directory.least_loaded()
        if other is None or not other.public_url:
            return self._node.connect_url(client_id)
        # A load balancer's, if both nodes have the same.
        return None if other.public_url == self._node.public_url else connect_url(other.public_url, client_id)
