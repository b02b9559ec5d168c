"""Signals: taken over from twistd, which would end with the signal's status, and without a drain.

They are handled in the reactor; a second SIGTERM or SIGINT ends the process at once, whatever the reactor does.

The node as a Service: what it is made of, the order in which it starts, and the ways in which it ends.

Start: bind the endpoints (nothing is accepted yet), open the registry, join it, be ready.
SIGTERM: drain (readiness first, then the clients), then stop. SIGINT: stop. Either a second time: exit at once.
Stop: close what is left with 1001, leave the registry, disconnect from it.
SIGHUP: read the files of tokens, of keys and of TLS, and the cluster secret, again.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import uuid
from collections.abc import Callable, Coroutine, Mapping
from types import FrameType, TracebackType
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, TimeoutError
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.cluster.drain import Drain, LastCalls
from gateway.cluster.interface import INode
from gateway.cluster.membership import Membership
from gateway.cluster.routing import connect_url
from gateway.components import Parts
from gateway.net import endpoints
from gateway.net.accept import Accepting, Newcomers
from gateway.protocol.frames import CLOSE_GOING_AWAY
from gateway.registry.interface import NodeInfo, RegistryUnavailable
from gateway.settings import ConfigError, Settings, default_node_name, files_left_to_backends

#: those of which a second one ends the process
_LAST = (signal.SIGTERM, signal.SIGINT)


def handle(reactor: Any, handlers: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """Call a handler in the reactor's turn for each signal; to be called in its main thread, once it runs."""
    times = dict.fromkeys(handlers, 0)

    def handler(signum: int, frame: FrameType | None) -> None:
        received = signal.Signals(signum)
        times[received] += 1
        if received in _LAST and sum(times.get(each, 0) for each in _LAST) > 1:
            os._exit(1)
        reactor.callFromThread(handlers[received])

    for signum in handlers:
        signal.signal(signum, handler)


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
        self._reactor = reactor
        self._hand_out_url = True
        self._state = "starting"
        self._binding: Deferred[None] | None = None
        self._drained: Deferred[None] | None = None
        self._stopped: Deferred[None] | None = None
        self._client_ports: list[IListeningPort] = []
        self._backend_ports: list[IListeningPort] = []
        self._membership: Membership | None = None
        self.parts = Parts(settings, self, reactor)
        self.metrics = self.parts.metrics
        self._newcomers = Newcomers(reactor, lambda: self.metrics.calls)
        self.registry = self.parts.registry
        self.edge = self.parts.edge

    # What others ask of it.

    def unready(self) -> str:
        """Why this node takes no clients, in one word, or an empty text when it does."""
        if self._state != "up":
            return "starting" if self._state == "starting" else "draining"
        return "" if self.has_lease() else "registry"

    def has_lease(self) -> bool:
        """Whether this node's own lease holds."""
        return self._membership is not None and self._membership.has_lease()

    def doubtful(self) -> bool:
        """Whether clients that are here may be elsewhere by now."""
        return self._membership is not None and self._membership.doubtful()

    def steady(self) -> bool:
        """Whether this node has been a member for long enough to judge others."""
        return self._membership is not None and self._membership.steady()

    def send_away(self, client_id: str, generation: int, reason: str) -> bool:
        """Tell a client that is here through another node to connect to this one itself."""
        if not generation or self.edge.generation(client_id) != generation:
            return False
        farewells = self.parts.farewells
        url = connect_url(self.public_url, client_id) if self._hand_out_url else None
        return farewells.told(client_id) == generation or farewells.say(client_id, reason, url)

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
        parts = self.parts
        parts.balance.stop()
        await DeferredList([Deferred.fromCoroutine(self._withdraw()), Deferred.fromCoroutine(self._tell_nodes())])
        # Where others listen as well, who connects now is for them.
        shared = [
            port
            for port, name in zip(self._client_ports, self.settings.listen, strict=True)
            if endpoints.is_shared(name)
        ]
        self._client_ports = [port for port in self._client_ports if port not in shared]
        await endpoints.close(shared)
        await Drain(
            self.edge,
            self._reactor,
            self.settings.drain_seconds,
            farewells=parts.farewells,
            departing=parts.hub.departing,
            alone=lambda: not len(parts.fleet),
            url_for=self._connect_url,
            relayed=parts.relays.client_ids,
            end_relay=parts.departures.end,
        ).start()
        await LastCalls(
            self._reactor,
            longest_call=self.settings.max_call_timeout,
            refuse=parts.hub.end,
            in_flight=parts.hub.calls_in_flight,
            tell_backends=parts.backends.sockets.tell,
        ).over()
        if parts.autoscaling is not None:
            await parts.autoscaling.drained()

    async def _tell_nodes(self) -> None:
        """Have the other nodes, and the list of nodes, know before the first client is told; and see who is there, and
        with how much room."""
        assert self._membership is not None
        await self._bounded(
            "telling the registry", self._membership.beat().addCallback(lambda _: self.parts.fleet.look())
        )

    async def _withdraw(self) -> None:
        """See to it that DNS does not lead here any more; what fails is tried again in the background."""
        if self.parts.names is not None:
            await self._bounded("withdrawing from DNS", self.parts.names.withdraw())

    def _reclaim(self) -> Deferred[None]:
        """This node's lease had run out: others may have its clients, and have withdrawn it from DNS."""
        if self.parts.names is not None:
            self.parts.names.again()
        return self.edge.reclaim_all()

    def _connect_url(self, client_id: str) -> str | None:
        """Where a client that is told to go is to connect: complete, and marked as not to be sent on. The emptiest of
        the other nodes; for a node that is alone its own, or ``None`` where it can only guess that."""
        other = self.parts.fleet.emptiest()
        if other is not None and other.public_url:
            # A url that this node has, too, leads anywhere.
            same = other.public_url == self.public_url
            return None if same else connect_url(other.public_url, client_id)
        if not self._hand_out_url:
            return None
        return connect_url(self.public_url, client_id)

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
        # twistd has set its own until now.
        handle(
            self._reactor,
            {signal.SIGTERM: self._terminate, signal.SIGINT: self._interrupt, signal.SIGHUP: self._reload},
        )
        Deferred.fromCoroutine(self._start()).addErrback(self._start_failed)

    async def _bind(self) -> None:
        settings, reactor = self.settings, self._reactor
        parts = self.parts
        shared: Any = {
            "renewals": parts.certificates, "bad_headers": parts.bad_headers, "metrics": self.metrics
        }  # fmt: skip
        self._backend_ports = await endpoints.listen("backend", settings.backend, parts.backends, reactor, **shared)
        self._client_ports = await endpoints.listen(
            "listen", settings.listen, parts.clients, reactor, parts.proxied_clients, **shared
        )
        self._newcomers.start()
        accepting = Accepting(reactor, self.metrics, self._newcomers)
        accepting.guard(self._backend_ports)
        accepting.guard(self._client_ports, leave=files_left_to_backends())
        endpoints.check_exposure(settings, self._backend_ports, self._client_ports)

    async def _start(self) -> None:
        settings = self.settings
        if self._binding is None:
            # Whoever runs it, such as twist, has no privileges to start with.
            self._binding = Deferred.fromCoroutine(self._bind())
        await self._binding
        self._name_urls()
        # Nobody waits for keys of elsewhere: who has come by then is told to come back.
        self.parts.authenticators.start()
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
            reclaim=self._reclaim,
            beaten=self.parts.fleet.look,
        )
        await self._membership.start()
        await self.parts.fleet.look()
        self.edge.start()
        self.parts.relays.start()
        self.parts.audit.start()
        # What is there now stays: a full collection, which stops everything, need not look at it.
        gc.collect()
        gc.freeze()
        self._state = "up"
        if self.parts.names is not None:
            self.parts.names.start()
        if self.parts.autoscaling is not None:
            self.parts.autoscaling.start()
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
            self.peer_url, _ = endpoints.url_of(self.settings.backend[0], self._backend_ports[0])
        if self.public_url:
            return
        self.public_url, self._hand_out_url = endpoints.url_of(self.settings.listen[0], self._client_ports[0])
        if not self._hand_out_url:
            guess = f"{self.public_url} is a guess" if self.public_url else "--listen tells none"
            text = "--public-url is not given: {guess}, and clients that a drain sends away are told no url"
            self.log.warn(text, guess=guess)

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

    def _terminate(self) -> None:
        self.log.info("SIGTERM: draining, then ending; send it again to end at once")
        if self._drained is not None and self.parts.autoscaling is not None:
            # It was AWS that wanted it to end; a node of this instance that does not is no longer waited for.
            self.parts.autoscaling.hurry()
        self.drain()

    def _interrupt(self) -> None:
        self.log.info("SIGINT: ending")
        self._stop_reactor()

    def _reload(self) -> None:
        parts, taken = self.parts, []
        authenticators = parts.authenticators if self.settings.auth else None
        named = {"--auth": authenticators, "--backend-token-file": parts.backend_tokens, "cluster secret": parts.secret}
        for name, secrets in named.items():
            try:
                if secrets is not None:
                    secrets.reload()
                    taken.append(name)
            except ConfigError as e:
                self.log.error("{problem}; the old ones stay", problem=str(e))
        if parts.certificates.reload():
            taken.append("certificates")
        self.log.info("SIGHUP: taken: {taken}", taken=", ".join(taken) or "nothing")

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
        if self._drained is None:
            await self._withdraw()
        await endpoints.close(self._client_ports)
        self.parts.audit.stop()
        self.parts.balance.stop()
        self.parts.farewells.stop()
        await self._bounded("closing clients", self.edge.close_all(CLOSE_GOING_AWAY, "going away"))
        self.edge.stop()
        self.parts.relays.stop()
        await endpoints.close(self._backend_ports)
        await self._bounded("closing links", self.parts.peers.stop())
        await self._bounded("closing backends", self.parts.backends.close_all(CLOSE_GOING_AWAY, "going away"))
        if self._membership is not None:
            await self._bounded("leaving the registry", self._membership.stop())
        await self._bounded("giving up the keys of tokens", self.parts.authenticators.stop())
        for cloud in (self.parts.names, self.parts.autoscaling):
            if cloud is not None:
                await self._bounded("leaving the cloud alone", cloud.stop())
        await self._bounded("closing the registry", self.registry.close())
        await self._bounded("saying good-bye", self._all_gone())
        self._newcomers.stop()

    async def _all_gone(self) -> None:
        """Wait for the clients' sockets: what was written last, the close frame above all, may still be on its way."""
        while self.parts.open_clients():
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
