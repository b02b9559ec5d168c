"""Drain of a node: send every client away, spread over a time, without losing a call.

SessionDrain spreads the clients evenly: client i of n is sent a goaway after i/n of the time, so that they do not all
reconnect at once. GracefulDisconnect sends it, lets the calls in flight finish, and closes the connection:

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain","url":"wss://…","after":0.3}}
-> {"jsonrpc":"2.0","id":"5f0c…","result":{"free":12}}     the responses to the calls in flight
<- close 1012                                              when none is left

After the goaway no new call is sent over that connection. Its row stays for a moment after the close, so that other
nodes still ask this one for the client, and get an answer once it has connected to its next node.

RelayDrain: a client of another node that is relayed through this one is sent away by its own node, which alone knows
the frame boundaries and the calls in flight; what is left of the relay when these must have finished is closed.

-> peer.close {"client","generation","code":1012,"reason"}     the node sends gateway.goaway with a URL of its own

BackendDrain: when no client is left, calls to clients of other nodes may still go through this node.

<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain"}}       to each backend's WebSocket
-> {"jsonrpc":"2.0","id":7,"method":"client.call","params":{…}}     half a second later, may be repeated elsewhere:
<- {"jsonrpc":"2.0","id":7,"error":{"code":-32004,…,"data":{…,"sent":false}},"gateway":true}
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred, DeferredList, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.auth.tickets import Tickets
from gateway.clients.interface import IClientSessions
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import CallTracker, INodeService, IPeerClient, IRebalancer, NodeState
from gateway.cluster.membership import Membership, NodeDirectory
from gateway.cluster.relay import SocketRelays
from gateway.cluster.routing import Destination, destination_at
from gateway.protocol.frames import CloseCode
from gateway.protocol.jsonrpc import encode_notification
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, SessionKey
from gateway.rpc.dispatcher import Dispatcher
from gateway.rpc.handoff import HANDOFF_TIMEOUT
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.cloud.autoscaling import Autoscaling
    from gateway.cloud.registrar import DnsRegistrar

#: interval at which calls in flight and due clients are checked, in seconds
POLL_INTERVAL = 0.05
#: the longest random delay before a client reconnects if the caller paces the goaways, in seconds
MAX_RECONNECT_DELAY = 0.2
#: the longest random delay if every client is sent away at once, in seconds
MAX_RECONNECT_DELAY_UNPACED = 1.5


class GracefulDisconnect:
    """Disconnects single clients gracefully; its length is the number of clients that were sent a goaway and are still
    connected."""

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
        tickets: Tickets | None = None,
    ) -> None:
        """A session is closed when its calls in flight have ended, after ``max_call_timeout`` seconds at the latest.
        ``calls`` tracks them, and begins no new ones after a goaway. ``registry`` releases the row of a closed session:
        at once if this is a single node, else a moment later, so that calls wait for the client's next session. Without
        ``tickets`` no URL has one."""
        self._sessions = sessions
        self._clock = clock
        self._max_call_timeout = max_call_timeout
        self._begin_goaway = calls.begin_goaway
        self._in_flight = calls.calls_in_flight_on
        #: client_id -> its session, when that is closed at the latest, and the reason
        self._disconnecting: dict[str, tuple[SessionKey, float, str]] = {}
        self._release = registry.release
        self._tickets = tickets
        self._is_single_node = node_directory.is_single_node
        #: the rows of closed sessions, with the times when they are released, in order
        self._rows_to_release: deque[tuple[float, SessionKey]] = deque()
        self._loop = LoopingCall(self._poll)
        self._loop.clock = clock

    def __len__(self) -> int:
        return len(self._disconnecting)

    def goaway_sent(self, client_id: str) -> int:
        """Return the generation of a client's session that was sent a goaway and is still connected, or 0."""
        return self._disconnecting[client_id][0].generation if client_id in self._disconnecting else 0

    def send_goaway(
        self,
        client_id: str,
        reason: str,
        destination: Destination | None,
        *,
        min_delay: float = 0.0,
        max_delay: float = MAX_RECONNECT_DELAY,
    ) -> bool:
        """Send a client away: to a destination, if there is one, after ``min_delay`` and a random delay of at most
        ``max_delay`` seconds. Its connection closes when its calls have finished. Returns ``False`` if the client is
        not connected, or was sent a goaway before."""
        generation = self._sessions.generation(client_id)
        if not generation or self.goaway_sent(client_id) == generation:
            return False
        after = round(min_delay + random.uniform(0, max_delay), 2)
        params: dict[str, object] = {"reason": reason}
        if destination is not None:
            identity = self._sessions.ticket_identity(client_id, generation)
            params["url"] = destination.url_with_ticket(self._tickets, identity, after)
        params["after"] = after
        goaway = encode_notification("gateway.goaway", msgspec.json.encode(params))
        if not self._sessions.send(client_id, goaway, generation):
            return False
        key = SessionKey(client_id, generation)
        self._begin_goaway(key, not self._is_single_node())
        self._disconnecting[client_id] = key, self._clock.seconds() + self._max_call_timeout, reason
        self._close_if_idle(client_id)
        if (self._disconnecting or self._rows_to_release) and not self._loop.running:
            self._loop.start(POLL_INTERVAL, now=False).addErrback(self._poll_failed)
        return True

    def stop(self) -> None:
        """Close no more connections."""
        if self._loop.running:
            self._loop.stop()

    def _poll(self) -> None:
        for client_id in list(self._disconnecting):
            self._close_if_idle(client_id)
        self._release_rows(self._clock.seconds())
        if not self._disconnecting and not self._rows_to_release:
            self._loop.stop()

    def _close_if_idle(self, client_id: str) -> None:
        """Close a connection if its calls have finished, or their time is up."""
        key, deadline, reason = self._disconnecting[client_id]
        if self._in_flight(key) and self._clock.seconds() < deadline:
            return
        del self._disconnecting[client_id]
        if keep_row := not self._is_single_node():
            self._rows_to_release.append((self._clock.seconds() + HANDOFF_TIMEOUT, key))
        closing = self._sessions.close(client_id, CloseCode.SERVICE_RESTART, reason, key.generation, keep_row=keep_row)
        closing.addErrback(self._close_failed)

    def _release_rows(self, now: float) -> None:
        while self._rows_to_release and self._rows_to_release[0][0] <= now:
            _, key = self._rows_to_release.popleft()
            self._release(key).addErrback(self._close_failed)

    def _close_failed(self, failure: Failure) -> None:
        # The connection is closed; the registry logs that it is unavailable, and writes the release later.
        if not failure.check(RegistryUnavailableError):
            self._log.failure("error in releasing a client that was sent away", failure)

    def _poll_failed(self, failure: Failure) -> None:
        self._log.failure("error in sending clients away", failure)


#: timeout of a closing handshake through a relay, in seconds
RELAY_CLOSE_TIMEOUT = 3.0


class RelayDrain:
    """Drains the relays of this node."""

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
        """``close_relay`` closes the relay of a client at once. ``max_call_timeout`` is in seconds."""
        self._registry = registry
        self._peer_client = peer_client
        self._clock = clock
        self._close_relay = close_relay
        self._timeout = max_call_timeout + RELAY_CLOSE_TIMEOUT
        self._draining: set[str] = set()

    def drain(self, client_id: str) -> None:
        """Send away a client that is relayed through this node, unless that is in progress."""
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
            pass  # the client gets no goaway, its connection just closes
        finally:
            self._draining.discard(client_id)
            self._close_relay(client_id)

    def _failed(self, failure: Failure) -> None:
        self._log.failure("error in draining a relay", failure)


#: how long backends have to leave after the goaway, and how long new calls of the others are then refused, in seconds:
#: when a connection just closes, a backend cannot know whether the calls that it sent last were delivered
BACKEND_GRACE_PERIOD = 0.5

BACKEND_GOAWAY = encode_notification("gateway.goaway", b'{"reason":"drain"}')


class BackendDrain:
    """Drains the calls that backends have in flight through this node."""

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
        """``refuse_new_calls`` has every new call refused, ``in_flight`` returns the number of those that have not
        finished, and ``max_call_timeout`` is the longest that they may take, in seconds. ``send_to_backends`` sends a
        message to the WebSockets of backends, and returns their number."""
        self._clock = clock
        self._max_call_timeout = max_call_timeout
        self._refuse_new_calls = refuse_new_calls
        self._in_flight = in_flight
        self._send_to_backends = send_to_backends

    async def run(self) -> None:
        """Send backends away, then refuse new calls, and wait until those in flight have finished."""
        backends = self._send_to_backends(BACKEND_GOAWAY)
        if backends:
            await deferLater(self._clock, BACKEND_GRACE_PERIOD)
        self._refuse_new_calls()
        started_at = self._clock.seconds()
        while (calls := self._in_flight()) and self._clock.seconds() - started_at < self._max_call_timeout:
            await deferLater(self._clock, POLL_INTERVAL)
        if calls:
            self._log.warn("{n} calls are still in flight, and end with this node", n=calls)
        if backends:
            await deferLater(self._clock, BACKEND_GRACE_PERIOD)


class SessionDrain:
    """One drain of the sessions and relays of this node."""

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
        destination_for: Callable[[str], Destination | None],
        relayed_client_ids: Callable[[], list[str]] = list,
        drain_relay: Callable[[str], object] = lambda client_id: None,
    ) -> None:
        """``duration`` is in seconds. ``handoffs`` returns the number of clients on their way to other nodes: calls to
        them wait here until they have arrived. ``is_single_node`` tells whether there is no other node.
        ``destination_for`` returns where a client is to connect, or ``None``. ``relayed_client_ids`` lists the clients
        of other nodes that are relayed through this one, and ``drain_relay`` drains one such relay."""
        self._sessions = sessions
        self._clock = clock
        self._duration = duration
        self._graceful_disconnect = graceful_disconnect
        self._handoffs = handoffs
        self._is_single_node = is_single_node
        self._destination_for = destination_for
        self._relayed_client_ids = relayed_client_ids
        self._drain_relay = drain_relay
        #: the clients that are still to be sent away, each with the function that does so
        self._queue: list[tuple[Callable[[str], object], str]] = []
        self._started_at = 0.0
        self._total = 0
        self._loop = LoopingCall(self._tick)

    def start(self) -> Deferred[None]:
        """Start; the Deferred fires when no client is left."""
        self._fill_queue()
        random.shuffle(self._queue)
        self._started_at = self._clock.seconds()
        self._log.info("draining {n} clients over {seconds:g} s", n=self._total, seconds=self._duration)
        self._loop.clock = self._clock
        return self._loop.start(POLL_INTERVAL).addCallback(lambda _: None)

    def _fill_queue(self) -> None:
        goaway_sent = self._graceful_disconnect.goaway_sent
        self._queue = [
            (self._send_goaway, client_id) for client_id in self._sessions.client_ids() if not goaway_sent(client_id)
        ]
        self._queue += [(self._drain_relay, client_id) for client_id in self._relayed_client_ids()]
        self._total = len(self._queue)

    def _tick(self) -> None:
        elapsed = self._clock.seconds() - self._started_at
        # The first client goes at once, so that a node with few clients finishes early.
        share = elapsed / self._duration if self._duration else 1.0
        due = min(self._total, int(share * self._total) + 1)
        while self._queue and self._total - len(self._queue) < due:
            send_away, client_id = self._queue.pop()
            send_away(client_id)
        if not self._queue:
            # Clients that were still connecting when the drain started.
            self._fill_queue()
            if not self._queue and not self._graceful_disconnect and not self._handoffs():
                self._loop.stop()

    def _send_goaway(self, client_id: str) -> None:
        max_delay = MAX_RECONNECT_DELAY if self._duration else MAX_RECONNECT_DELAY_UNPACED
        min_delay = 0.0
        if self._is_single_node():
            # A client that reconnects to this node is refused until the drain has ended.
            min_delay = max(0.0, self._started_at + self._duration - self._clock.seconds())
        self._graceful_disconnect.send_goaway(
            client_id, "drain", self._destination_for(client_id), min_delay=min_delay, max_delay=max_delay
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
    name this node as one that accepts clients; ``--drain-delay``, in which proxies find out that it is not ready, and
    clients that they still send are accepted; the ports that other processes listen on, too, are closed; clients and
    relayed clients are disconnected, spread over ``--drain-seconds``; backends are disconnected once their calls are
    answered; AWS is notified that the instance can be terminated.
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
        self._delay: Deferred[None] | None = None
        self._skip_delay = False

    async def run(self) -> None:
        """Drain the node; return when no client is left. Does nothing if the node is not up."""
        if self._node.state is not NodeState.UP:
            return
        delay = self._settings.drain_delay
        self._node.state = NodeState.DRAIN_PENDING if delay else NodeState.DRAINING
        self._rebalancer.stop()
        # Both before the first client is sent away, so that none is sent to this node again.
        await DeferredList(
            [Deferred.fromCoroutine(self.withdraw_dns()), Deferred.fromCoroutine(self._update_registry())]
        )
        if delay:
            await self._wait(delay)
            if self._node.state is NodeState.STOPPED:
                return
            self._node.state = NodeState.DRAINING
        await self._node.close_shared_ports()
        await self._drain_sessions()
        await self._drain_backends()
        if self._autoscaling is not None:
            await self._autoscaling.complete_drain()

    async def _wait(self, delay: float) -> None:
        if not self._skip_delay:
            self._delay = deferLater(self._clock, delay)
            with contextlib.suppress(CancelledError):
                await self._delay
            self._delay = None

    def skip_delay(self) -> None:
        """Wait no longer for ``--drain-delay``."""
        self._skip_delay = True
        if self._delay is not None:
            self._delay.cancel()

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
            destination_for=self.destination_for,
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

    def destination_for(self, client_id: str) -> Destination | None:
        """Where a client is to connect instead: at the least loaded other node, or at this node if there is no other.
        ``None`` if its URL is not known, or would lead to any node."""
        other = self._node_directory.least_loaded()
        if other is None or not other.public_url:
            url = self._node.connect_url(client_id)
            # The program that runs there next has another node_id.
            return None if url is None else Destination(url)
        if other.public_url == self._node.public_url:
            return None  # a load balancer's
        return destination_at(self._node_directory, other, client_id)
