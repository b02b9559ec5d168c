"""The node as a Service: what it is made of, the order in which it starts, and the ways in which it ends.

Start: bind the endpoints (nothing is accepted yet), open the registry, join it, be ready.
SIGTERM: drain (readiness first, then the clients), then stop. SIGINT: stop. Either a second time: exit at once.
Stop: close what is left with 1001, leave the registry, disconnect from it.
SIGHUP: read the files of tokens again.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import uuid
from collections.abc import Coroutine
from types import FrameType, TracebackType
from typing import Any
from urllib.parse import quote

from twisted.application.service import Service
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway import listening
from gateway.accepting import Accepting
from gateway.api.endpoint import BackendFactory
from gateway.api.upstream import Upstream
from gateway.auth.backend import BackendTokens
from gateway.auth.specs import Authenticators
from gateway.cluster.drain import Drain
from gateway.cluster.interface import INode
from gateway.cluster.membership import Membership
from gateway.edge.connections import Edge
from gateway.edge.interface import CLOSE_GOING_AWAY
from gateway.edge.opening import ClientFactory
from gateway.edge.turn import Turn
from gateway.registry.interface import NodeInfo, RegistryUnavailable
from gateway.registry.sqlite import SQLiteRegistry
from gateway.rpc.hub import Hub
from gateway.settings import ConfigError, Settings, default_node_name, files_left_to_backends
from gateway.telemetry.metrics import Metrics

#: how long a stop waits for the registry and for connections to close, in seconds
STOP_TIMEOUT = 5.0


@implementer(INode)
class Node(Service):
    """One node. Its states are ``starting``, ``up``, ``draining`` and ``stopped``."""

    log = Logger()

    def __init__(self, settings: Settings, reactor: Any) -> None:
        """Make the parts and let them know each other; nothing is opened yet.

        Raises :class:`~gateway.settings.ConfigError` for a file that cannot be read.
        """
        self.settings = settings
        self.node_id = str(uuid.uuid4())
        self.name: str = settings.node_name or default_node_name()
        self.public_url: str = settings.public_url
        self.peer_url: str = settings.peer_url
        self.metrics = Metrics()
        self._reactor = reactor
        self._turn = Turn(reactor.seconds)
        self._hand_out_url = True
        self._state = "starting"
        self._binding: Deferred[None] | None = None
        self._drained: Deferred[None] | None = None
        self._stopped: Deferred[None] | None = None
        self._client_ports: list[IListeningPort] = []
        self._backend_ports: list[IListeningPort] = []
        self._membership: Membership | None = None
        self._make_parts()
        self._add_gauges()

    # What the node is made of.

    def _make_parts(self) -> None:
        settings, reactor, metrics = self.settings, self._reactor, self.metrics
        self._authenticators = Authenticators(settings.auth)
        self._backend_tokens = BackendTokens(settings.backend_token_file) if settings.backend_token_file else None
        self.registry = SQLiteRegistry(
            settings.registry.partition(":")[2], lease=settings.lease, reactor=reactor, metrics=metrics
        )
        self.hub = Hub(
            registry=self.registry,
            clock=reactor,
            metrics=metrics,
            node_id=self.node_id,
            steady=self.steady,
            call_timeout=settings.call_timeout,
            max_call_timeout=settings.max_call_timeout,
            max_message_size=settings.max_message_size,
            max_calls=settings.max_calls,
            max_calls_per_client=settings.max_calls_per_client,
        )
        self.edge = Edge(
            registry=self.registry,
            clock=reactor,
            settings=settings,
            metrics=metrics,
            handler=self.hub,
            available=self.unready,
        )
        self.upstream = Upstream(clock=reactor, metrics=metrics, settings=settings, node_id=self.node_id)
        self.hub.connect(self.edge, self.upstream)
        clients = ClientFactory(
            edge=self.edge,
            authenticators=self._authenticators,
            settings=settings,
            metrics=metrics,
            reactor=reactor,
            turn=self._turn,
        )
        self._client_factories = (clients, clients.through_proxy())
        self.edge.park_on(reactor, clients.wake, self._turn)
        self._backend_factory = BackendFactory(
            hub=self.hub,
            edge=self.edge,
            registry=self.registry,
            node=self,
            upstream=self.upstream,
            metrics=metrics,
            settings=settings,
            token_ok=self._backend_tokens.accepts if self._backend_tokens else None,
            reactor=reactor,
            turn=self._turn,
        )

    def _add_gauges(self) -> None:
        gauges = self.metrics.gauges
        gauges["clients"] = ("Clients connected here.", self.edge.count)
        gauges["parked"] = ("Of these, the parked ones.", self.edge.parked)
        gauges["capacity"] = ("The most clients here.", lambda: self.settings.capacity)
        gauges["calls_in_flight"] = ("Calls to clients, and from them, in flight.", self.hub.calls_in_flight)
        gauges["ready"] = ("1 while this node takes clients.", lambda: not self.unready())

    # What others ask of it.

    def unready(self) -> str:
        """Why this node takes no clients, in one word, or an empty text when it does."""
        if self._state != "up":
            return "starting" if self._state == "starting" else "draining"
        return "" if self._membership is not None and self._membership.has_lease() else "registry"

    def steady(self) -> bool:
        """Whether this node has been a member for long enough to judge others."""
        return self._membership is not None and self._membership.steady()

    def drain(self) -> Deferred[None]:
        """Send every client away, then end the process; the Deferred fires when no client is left."""
        if self._drained is None:
            self._drained = Deferred()
            running = Deferred.fromCoroutine(self._drain())
            running.addErrback(lambda failure: self.log.failure("the drain failed", failure=failure))
            running.chainDeferred(self._drained)
            self._drained.addCallback(lambda _: self._stop_reactor())
        waiter: Deferred[None] = Deferred()
        self._drained.addCallback(lambda _: waiter.callback(None))
        return waiter

    async def _drain(self) -> None:
        if self._state != "up":
            return
        self._state = "draining"
        # So that other nodes, and the list of nodes, know before the first client is told.
        assert self._membership is not None
        await self._bounded("telling the registry", self._membership.beat())
        await Drain(
            self.edge,
            self._reactor,
            self.settings.drain_seconds,
            longest_call=self.settings.max_call_timeout,
            let_go=self.hub.let_go,
            in_flight=self.hub.calls_in_flight_with,
            url_for=self._connect_url,
        ).start()

    def _connect_url(self, client_id: str) -> str | None:
        """Where a client that was told to go may come back: complete, and marked as not to be sent on. ``None`` where
        this node can only guess how clients reach it."""
        if not self._hand_out_url:
            return None
        return f"{self.public_url}/v1/connect?client_id={quote(client_id, safe='')}&wsgateway_hop=1"

    # Start.

    def privilegedStartService(self) -> None:
        """Bind the endpoints, while ports below 1024 may still be bound."""
        super().privilegedStartService()  # type: ignore[no-untyped-call]
        self._binding = Deferred.fromCoroutine(self._bind())
        # Most endpoints fail at once; what fails later is told by _start.
        failure = getattr(self._binding, "result", None)
        if isinstance(failure, Failure):
            self._binding.addErrback(lambda _: None)
            self._refuse(failure)

    def startService(self) -> None:
        """Look whether the registry can be used, now that twistd is who it will be, and start when the reactor runs."""
        super().startService()  # type: ignore[no-untyped-call]
        try:
            self.registry.check()
        except ConfigError:
            self._refuse(Failure())
        self._reactor.callWhenRunning(self._run)

    def _run(self) -> None:
        self._handle_signals()
        Deferred.fromCoroutine(self._start()).addErrback(self._start_failed)

    async def _bind(self) -> None:
        settings, reactor = self.settings, self._reactor
        self._backend_ports = await listening.listen("backend", settings.backend, self._backend_factory, reactor)
        clients, proxied = self._client_factories
        self._client_ports = await listening.listen("listen", settings.listen, clients, reactor, proxied)
        accepting = Accepting(reactor, self.metrics)
        accepting.guard(self._backend_ports)
        accepting.guard(self._client_ports, leave=files_left_to_backends())
        listening.check_exposure(settings, self._backend_ports, self._client_ports)

    async def _start(self) -> None:
        settings = self.settings
        if self._binding is None:
            # Whoever runs it, such as twist, has no privileges to start with.
            self._binding = Deferred.fromCoroutine(self._bind())
        await self._binding
        self._name_urls()
        await self.registry.open()
        info = NodeInfo(self.node_id, self.name, self.public_url, self.peer_url, settings.capacity)
        self._membership = Membership(
            registry=self.registry,
            info=info,
            clock=self._reactor,
            lease=settings.lease,
            heartbeat=settings.heartbeat,
            metrics=self.metrics,
            load=lambda: ("up" if self._state == "up" else "draining", self.edge.count()),
            reclaim=self.edge.reclaim_all,
        )
        await self._membership.start()
        await self._warn_of_others()
        self.edge.start()
        # What is there now stays: a full collection, which stops everything, need not look at it.
        gc.collect()
        gc.freeze()
        self._state = "up"
        self.log.info(
            "{name} is ready: node {node_id}, clients at {public_url}, backends at {peer_url}",
            name=self.name,
            node_id=self.node_id,
            public_url=self.public_url,
            peer_url=self.peer_url,
        )

    def _name_urls(self) -> None:
        """Fill in the urls that were not given."""
        if not self.peer_url:
            self.peer_url, _ = listening.url_of(self.settings.backend[0], self._backend_ports[0])
        if self.public_url:
            return
        self.public_url, self._hand_out_url = listening.url_of(self.settings.listen[0], self._client_ports[0])
        if not self._hand_out_url:
            self.log.warn(
                "--public-url is not given: {guess} is a guess, and clients that a drain sends away are told no url",
                guess=self.public_url or "none",
            )

    async def _warn_of_others(self) -> None:
        for other in await self.registry.nodes():
            if other.node_id != self.node_id:
                self.log.warn(
                    "the node {name} at {peer_url} has written to this registry {age:.0f} s ago: if it runs, know that "
                    "nodes of this version do not reach each other's clients",
                    name=other.name,
                    peer_url=other.peer_url,
                    age=other.heartbeat_age,
                )

    def _refuse(self, failure: Failure) -> None:
        """Raise what a node does not start for. Whoever starts a daemon waits until here, and twistd tells him."""
        self._say(failure)
        sys.excepthook = _without_traceback
        failure.raiseException()

    def _start_failed(self, failure: Failure) -> None:
        self._say(failure)
        # twistd ends with 0 when its reactor was stopped; this is the last thing that runs.
        atexit.register(os._exit, 1)
        self._stop_reactor()

    def _say(self, failure: Failure) -> None:
        """Tell in one line why the node does not start, in the log and on stderr."""
        if failure.check(ConfigError):
            problem = failure.getErrorMessage()
        elif failure.check(RegistryUnavailable):
            problem = f"--registry: {failure.getErrorMessage()}"
        else:
            problem = f"cannot start: {failure.getErrorMessage()}"
            self.log.failure("cannot start", failure=failure)
        self.log.critical("wsgateway: {problem}", problem=problem)
        if sys.__stderr__ is not None:
            # twistd has put its log in the place of sys.stderr.
            print(f"wsgateway: {problem}", file=sys.__stderr__, flush=True)

    # The end.

    def _handle_signals(self) -> None:
        """Take the signals over from twistd, which would end with the signal's status, and without a drain."""
        handlers = {
            signal.SIGTERM: self._terminate,
            signal.SIGINT: self._interrupt,
            signal.SIGHUP: self._reload,
        }
        times = dict.fromkeys(handlers, 0)

        def handle(signum: int, frame: FrameType | None) -> None:
            times[signal.Signals(signum)] += 1
            if signum != signal.SIGHUP and times[signal.SIGTERM] + times[signal.SIGINT] > 1:
                os._exit(1)
            self._reactor.callFromThread(handlers[signal.Signals(signum)])

        for signum in handlers:
            signal.signal(signum, handle)

    def _terminate(self) -> None:
        self.log.info("SIGTERM: draining, then ending; send it again to end at once")
        self.drain()

    def _interrupt(self) -> None:
        self.log.info("SIGINT: ending")
        self._stop_reactor()

    def _reload(self) -> None:
        self.log.info("SIGHUP: reading the files of tokens again")
        for tokens in (self._authenticators, self._backend_tokens):
            if tokens is None:
                continue
            try:
                tokens.reload()
            except ConfigError as e:
                self.log.error("{problem}; the old tokens stay", problem=str(e))

    def _stop_reactor(self) -> None:
        try:
            self._reactor.stop()
        except ReactorNotRunning:
            self.log.debug("the reactor was stopped already")

    def stopService(self) -> Deferred[None]:
        """Close everything; twistd waits for it. Bounded in time, whatever the registry does."""
        super().stopService()  # type: ignore[no-untyped-call]
        self._state = "stopped"
        if self._stopped is None:
            self._stopped = Deferred.fromCoroutine(self._stop())
            self._stopped.addErrback(lambda failure: self.log.failure("the stop failed", failure=failure))
        return self._stopped

    async def _stop(self) -> None:
        await listening.close(self._client_ports)
        await self._bounded("closing clients", self.edge.close_all(CLOSE_GOING_AWAY, "going away"))
        self.edge.stop()
        await listening.close(self._backend_ports)
        await self._bounded("closing backends", self._backend_factory.close_all(CLOSE_GOING_AWAY, "going away"))
        if self._membership is not None:
            await self._bounded("leaving the registry", self._membership.stop())
        await self._bounded("closing the registry", self.registry.close())
        await self._bounded("saying good-bye", self._all_gone())

    async def _all_gone(self) -> None:
        """Wait for the clients' sockets: what was written last, the close frame above all, may still be on its way."""
        while any(factory.countConnections for factory in self._client_factories):
            await deferLater(self._reactor, 0.01)

    async def _bounded(self, what: str, step: Deferred[Any] | Coroutine[Deferred[Any], Any, Any]) -> None:
        """Wait for one step of the stop, but not for ever, and go on if it fails."""
        waiting = step if isinstance(step, Deferred) else Deferred.fromCoroutine(step)
        try:
            await waiting.addTimeout(STOP_TIMEOUT, self._reactor)
        except TimeoutError:
            self.log.warn("{what}: not done in {seconds:g} s", what=what, seconds=STOP_TIMEOUT)
        except Exception as e:  # noqa: BLE001
            self.log.warn("{what}: {problem}", what=what, problem=str(e) or type(e).__name__)


def _without_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What sys.excepthook does when a node that said why it does not start ends twistd."""
    if not isinstance(error, ConfigError):
        sys.__excepthook__(kind, error, traceback)
