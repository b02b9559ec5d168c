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

from gateway import __version__
from gateway.cluster.drain import BackendDrain, SessionDrain
from gateway.cluster.interface import INode
from gateway.cluster.membership import Membership
from gateway.cluster.routing import connect_url
from gateway.components import Components
from gateway.net import endpoints
from gateway.net.accept import AcceptLimiter, HandshakePoller
from gateway.protocol.frames import CloseCode
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import NodeInfo
from gateway.settings import ConfigError, Settings, default_node_name, files_reserved_for_backends

#: those of which a second one ends the process
_TERMINATING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def install_signal_handlers(reactor: Any, handlers: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """Call a handler in the reactor's turn for each signal; to be called in its main thread, once it runs."""
    times = dict.fromkeys(handlers, 0)

    def handler(signum: int, frame: FrameType | None) -> None:
        received = signal.Signals(signum)
        times[received] += 1
        if received in _TERMINATING_SIGNALS and sum(times.get(each, 0) for each in _TERMINATING_SIGNALS) > 1:
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
        self._can_advertise_url = True
        self._state = "starting"
        self._binding: Deferred[None] | None = None
        self._drained: Deferred[None] | None = None
        self._stopped: Deferred[None] | None = None
        self._client_ports: list[IListeningPort] = []
        self._backend_ports: list[IListeningPort] = []
        self._membership: Membership | None = None
        self.components = Components(settings, self, reactor)
        self.metrics = self.components.metrics
        self._handshake_poller = HandshakePoller(reactor, lambda: self.metrics.calls)
        self.registry = self.components.registry
        self.sessions = self.components.sessions

    # What others ask of it.

    def unready_reason(self) -> str:
        """Why this node takes no clients, in one word, or an empty text when it does."""
        if self._state != "up":
            return "starting" if self._state == "starting" else "draining"
        return "" if self.has_lease() else "registry"

    def has_lease(self) -> bool:
        """Whether this node's own lease holds."""
        return self._membership is not None and self._membership.has_lease()

    def ownership_uncertain(self) -> bool:
        """Whether clients that are here may be elsewhere by now."""
        return self._membership is not None and self._membership.ownership_uncertain()

    def is_stable(self) -> bool:
        """Whether this node has been a member for long enough to judge others."""
        return self._membership is not None and self._membership.is_stable()

    def send_goaway(self, client_id: str, generation: int, reason: str) -> bool:
        """Tell a client that is here through another node to connect to this one itself."""
        if not generation or self.sessions.generation(client_id) != generation:
            return False
        farewells = self.components.graceful_disconnect
        url = connect_url(self.public_url, client_id) if self._can_advertise_url else None
        return farewells.goaway_sent(client_id) == generation or farewells.send_goaway(client_id, reason, url)

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
        parts = self.components
        parts.rebalancer.stop()
        await DeferredList(
            [Deferred.fromCoroutine(self._withdraw_dns()), Deferred.fromCoroutine(self._announce_drain())]
        )
        # Where others listen as well, who connects now is for them.
        shared = [
            port
            for port, name in zip(self._client_ports, self.settings.listen, strict=True)
            if endpoints.is_shared(name)
        ]
        self._client_ports = [port for port in self._client_ports if port not in shared]
        await endpoints.stop_listening(shared)
        await SessionDrain(
            self.sessions,
            self._reactor,
            self.settings.drain_seconds,
            graceful_disconnect=parts.graceful_disconnect,
            handoffs=parts.dispatcher.handoffs,
            is_single_node=lambda: not len(parts.node_directory),
            url_for=self._goaway_url,
            relayed_client_ids=parts.relays.client_ids,
            drain_relay=parts.relay_drain.drain,
        ).start()
        await BackendDrain(
            self._reactor,
            max_call_timeout=self.settings.max_call_timeout,
            refuse_new_calls=parts.dispatcher.refuse_new_calls,
            in_flight=parts.dispatcher.calls_in_flight,
            send_to_backends=parts.backend_endpoint.backend_factory.broadcast,
        ).run()
        if parts.autoscaling is not None:
            await parts.autoscaling.complete_drain()

    async def _announce_drain(self) -> None:
        """Have the other nodes, and the list of nodes, know before the first client is told; and see who is there, and
        with how much room."""
        assert self._membership is not None
        await self._run_with_timeout(
            "telling the registry",
            self._membership.heartbeat().addCallback(lambda _: self.components.node_directory.refresh()),
        )

    async def _withdraw_dns(self) -> None:
        """See to it that DNS does not lead here any more; what fails is tried again in the background."""
        if self.components.dns_registrar is not None:
            await self._run_with_timeout("withdrawing from DNS", self.components.dns_registrar.withdraw())

    def _reclaim_sessions(self) -> Deferred[None]:
        """This node's lease had run out: others may have its clients, and have withdrawn it from DNS."""
        if self.components.dns_registrar is not None:
            self.components.dns_registrar.reannounce()
        return self.sessions.reclaim_all()

    def _goaway_url(self, client_id: str) -> str | None:
        """Where a client that is told to go is to connect: complete, and marked as not to be sent on. The emptiest of
        the other nodes; for a node that is alone its own, or ``None`` where it can only guess that."""
        other = self.components.node_directory.least_loaded()
        if other is not None and other.public_url:
            # A url that this node has, too, leads anywhere.
            same = other.public_url == self.public_url
            return None if same else connect_url(other.public_url, client_id)
        if not self._can_advertise_url:
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
            self._fail_start(failure)

    def startService(self) -> None:
        """Look whether the registry can be used, now that twistd is who it will be, and start when the reactor runs."""
        super().startService()  # type: ignore[no-untyped-call]
        try:
            self.registry.check()
        except ConfigError:
            self._fail_start(Failure())
        self._reactor.callWhenRunning(self._start_when_running)

    def _start_when_running(self) -> None:
        # twistd has set its own until now.
        install_signal_handlers(
            self._reactor,
            {signal.SIGTERM: self._on_sigterm, signal.SIGINT: self._on_sigint, signal.SIGHUP: self._on_sighup},
        )
        Deferred.fromCoroutine(self._start()).addErrback(self._start_failed)

    async def _bind(self) -> None:
        settings, reactor = self.settings, self._reactor
        parts = self.components
        shared: Any = {
            "certificate_reloader": parts.certificate_reloader, "header_errors": parts.proxy_header_errors, "metrics": self.metrics
        }  # fmt: skip
        self._backend_ports = await endpoints.listen(
            "backend", settings.backend, parts.backend_endpoint, reactor, **shared
        )
        self._client_ports = await endpoints.listen(
            "listen", settings.listen, parts.client_factory, reactor, parts.proxied_client_factory, **shared
        )
        self._handshake_poller.start()
        accepting = AcceptLimiter(reactor, self.metrics, self._handshake_poller)
        accepting.throttle(self._backend_ports)
        accepting.throttle(self._client_ports, reserved_files=files_reserved_for_backends())
        endpoints.check_exposure(settings, self._backend_ports, self._client_ports)

    async def _start(self) -> None:
        settings = self.settings
        if self._binding is None:
            # Whoever runs it, such as twist, has no privileges to start with.
            self._binding = Deferred.fromCoroutine(self._bind())
        await self._binding
        self._fill_in_urls()
        # Nobody waits for keys of elsewhere: who has come by then is told to come back.
        self.components.authenticator.start()
        await self.registry.open()
        info = NodeInfo(self.node_id, self.name, self.public_url, self.peer_url, settings.capacity)
        self._membership = Membership(
            registry=self.registry,
            info=info,
            clock=self._reactor,
            lease=settings.lease,
            heartbeat=settings.heartbeat,
            metrics=self.metrics,
            status=lambda: ("up" if self._state == "up" else "draining", self.sessions.count()),
            reclaim=self._reclaim_sessions,
            on_heartbeat=self.components.node_directory.refresh,
        )
        await self._membership.start()
        await self.components.node_directory.refresh()
        self.sessions.start()
        self.components.relays.start()
        self.components.reconciler.start()
        # What is there now stays: a full collection, which stops everything, need not look at it.
        gc.collect()
        gc.freeze()
        self._state = "up"
        if self.components.dns_registrar is not None:
            self.components.dns_registrar.start()
        if self.components.autoscaling is not None:
            self.components.autoscaling.start()
        self.log.info(
            "{name} is ready: node {node_id}, version {version}, clients at {public_url}, backends at {peer_url}",
            name=self.name,
            node_id=self.node_id,
            version=__version__,
            public_url=self.public_url,
            peer_url=self.peer_url,
        )

    def _fill_in_urls(self) -> None:
        """Fill in the urls that were not given."""
        if not self.peer_url:
            self.peer_url, _ = endpoints.port_url(self.settings.backend[0], self._backend_ports[0])
        if self.public_url:
            return
        self.public_url, self._can_advertise_url = endpoints.port_url(self.settings.listen[0], self._client_ports[0])
        if not self._can_advertise_url:
            guess = f"{self.public_url} is a guess" if self.public_url else "--listen tells none"
            text = "--public-url is not given: {guess}, and clients that a drain sends away are told no url"
            self.log.warn(text, guess=guess)

    def _fail_start(self, failure: Failure) -> None:
        """Raise what a node does not start for. Whoever starts a daemon waits until here, and twistd tells him."""
        self._report_start_failure(failure)
        sys.excepthook = _excepthook_without_traceback
        failure.raiseException()

    def _start_failed(self, failure: Failure) -> None:
        self._report_start_failure(failure)
        # twistd ends with 0 when its reactor was stopped; this is the last thing that runs.
        atexit.register(os._exit, 1)
        self._stop_reactor()

    def _report_start_failure(self, failure: Failure) -> None:
        """Tell in one line why the node does not start, in the log and on stderr."""
        if failure.check(ConfigError):
            problem = failure.getErrorMessage()
        elif failure.check(RegistryUnavailableError):
            problem = f"--registry: {failure.getErrorMessage()}"
        else:
            problem = f"cannot start: {failure.getErrorMessage()}"
            self.log.failure("cannot start", failure=failure)
        self.log.critical("wsgateway: {problem}", problem=problem)
        if sys.__stderr__ is not None:
            # twistd has put its log in the place of sys.stderr.
            print(f"wsgateway: {problem}", file=sys.__stderr__, flush=True)

    # The end.

    def _on_sigterm(self) -> None:
        self.log.info("SIGTERM: draining, then ending; send it again to end at once")
        if self._drained is not None and self.components.autoscaling is not None:
            # It was AWS that wanted it to end; a node of this instance that does not is no longer waited for.
            self.components.autoscaling.skip_colocated_nodes()
        self.drain()

    def _on_sigint(self) -> None:
        self.log.info("SIGINT: ending")
        self._stop_reactor()

    def _on_sighup(self) -> None:
        parts, taken = self.components, []
        authenticators = parts.authenticator if self.settings.auth else None
        named = {
            "--auth": authenticators,
            "--backend-token-file": parts.backend_tokens,
            "cluster secret": parts.cluster_secret,
        }
        for name, secrets in named.items():
            try:
                if secrets is not None:
                    secrets.reload()
                    taken.append(name)
            except ConfigError as e:
                self.log.error("{problem}; the old ones stay", problem=str(e))
        if parts.certificate_reloader.reload():
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
            await self._withdraw_dns()
        await endpoints.stop_listening(self._client_ports)
        self.components.reconciler.stop()
        self.components.rebalancer.stop()
        self.components.graceful_disconnect.stop()
        await self._run_with_timeout("closing clients", self.sessions.close_all(CloseCode.GOING_AWAY, "going away"))
        self.sessions.stop()
        self.components.relays.stop()
        await endpoints.stop_listening(self._backend_ports)
        await self._run_with_timeout("closing links", self.components.peer_client.stop())
        await self._run_with_timeout(
            "closing backends", self.components.backend_endpoint.close_all(CloseCode.GOING_AWAY, "going away")
        )
        if self._membership is not None:
            await self._run_with_timeout("leaving the registry", self._membership.stop())
        await self._run_with_timeout("giving up the keys of tokens", self.components.authenticator.stop())
        for cloud in (self.components.dns_registrar, self.components.autoscaling):
            if cloud is not None:
                await self._run_with_timeout("leaving the cloud alone", cloud.stop())
        await self._run_with_timeout("closing the registry", self.registry.close())
        await self._run_with_timeout("saying good-bye", self._wait_for_client_sockets())
        self._handshake_poller.stop()

    async def _wait_for_client_sockets(self) -> None:
        """Wait for the clients' sockets: what was written last, the close frame above all, may still be on its way."""
        while self.components.open_client_sockets():
            await deferLater(self._reactor, 0.01)

    async def _run_with_timeout(
        self, description: str, step: Deferred[Any] | Coroutine[Deferred[Any], Any, Any]
    ) -> None:
        """Wait for one step of the stop, but not for ever, and go on if it fails."""
        waiting = step if isinstance(step, Deferred) else Deferred.fromCoroutine(step)
        try:
            await waiting.addTimeout(STOP_TIMEOUT, self._reactor)
        except TimeoutError:
            self.log.warn("{what}: not done in {seconds:g} s", what=description, seconds=STOP_TIMEOUT)
        except Exception as e:  # noqa: BLE001
            self.log.warn("{what}: {problem}", what=description, problem=str(e) or type(e).__name__)


def _excepthook_without_traceback(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """What sys.excepthook does when a node that said why it does not start ends twistd."""
    if not isinstance(error, ConfigError):
        sys.__excepthook__(kind, error, traceback)
