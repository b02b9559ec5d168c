"""A node as a Twisted service: the order in which it starts and stops, and its signals.

Start: bind the endpoints (nothing is accepted yet), open the registry, join it, be ready.
SIGTERM: drain (cluster/drain.py), then stop. SIGINT: stop. A second SIGTERM or SIGINT: exit at once.
Stop: close what is left with 1001, leave the registry, disconnect from it.
SIGHUP: reload token files, keys, TLS certificates and the cluster secret.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from types import FrameType, TracebackType
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway import __version__
from gateway.cluster.drain import run_step
from gateway.cluster.interface import INodeService, NodeState
from gateway.cluster.routing import Destination, connect_url
from gateway.components import Components
from gateway.net import endpoints
from gateway.net.accept import AcceptLimiter, HandshakePoller
from gateway.protocol.frames import CloseCode
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.factory import make_registry
from gateway.registry.interface import NodeInfo, SessionKey
from gateway.registry.sql import SQLRegistry
from gateway.settings import ConfigError, Settings, default_node_name, files_reserved_for_backends
from gateway.twistd import Terminal
from gateway.util.deferred import detached

#: how often a stop checks whether the sockets of clients are closed, in seconds
SOCKET_POLL_INTERVAL = 0.01

#: the second of these ends the process
_TERMINATING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@implementer(INodeService)
class Node(Service):
    """One node."""

    log = Logger()

    def __init__(
        self,
        settings: Settings,
        reactor: Any,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        registry_factory: Callable[..., SQLRegistry] = make_registry,
        terminal: Terminal | None = None,
    ) -> None:
        """Construct the components; nothing is opened yet. ``terminal`` is that of a daemon, for errors of the start;
        ``monotonic`` and ``registry_factory`` are those of :class:`~gateway.components.Components`.

        Raises :class:`~gateway.settings.ConfigError` if a file cannot be read.
        """
        self.settings = settings
        self.state = NodeState.STARTING
        self.node_id = str(uuid.uuid4())
        self.name: str = settings.node_name or default_node_name()
        self.public_url: str = settings.public_url
        self.peer_url: str = settings.peer_url
        self._reactor = reactor
        self._terminal = terminal
        #: whether clients can connect to ``public_url``, which may be a guess
        self._can_advertise_url = True
        self._binding: Deferred[None] | None = None
        self._drained: Deferred[None] | None = None
        self._stopped: Deferred[None] | None = None
        self._had_sigterm = False
        self._client_ports: list[IListeningPort] = []
        self._backend_ports: list[IListeningPort] = []
        self.components = Components(settings, self, reactor, monotonic=monotonic, registry_factory=registry_factory)
        self.metrics = self.components.metrics
        self.registry = self.components.registry
        self.sessions = self.components.sessions
        self._handshake_poller = HandshakePoller(reactor, lambda: self.metrics.calls)

    # INodeService.

    def unready_reason(self) -> str:
        """Why no clients are to be sent to this node, as an error word; empty if they may be."""
        return "draining" if self.state is NodeState.DRAIN_PENDING else self.refusal_reason()

    def refusal_reason(self) -> str:
        """Why this node refuses clients that connect to it, as an error word; empty if it does not."""
        if self.state in (NodeState.UP, NodeState.DRAIN_PENDING):
            return "" if self.components.membership.has_lease() else "registry"
        return "starting" if self.state is NodeState.STARTING else "draining"

    def connect_url(self, client_id: str) -> str | None:
        """The complete URL at which a client reaches this node; ``None`` if this node can only guess it."""
        return connect_url(self.public_url, client_id) if self._can_advertise_url else None

    def send_goaway(self, key: SessionKey, reason: str) -> bool:
        """Have a client whose connection is relayed by another node connect to this node directly."""
        client_id, generation = key
        if not generation or self.sessions.generation(client_id) != generation:
            return False
        disconnect = self.components.graceful_disconnect
        url = self.connect_url(client_id)
        # Without a ticket: a client that follows redirects is relayed only if both nodes have the same URL.
        destination = None if url is None else Destination(url)
        return disconnect.goaway_sent(client_id) == generation or disconnect.send_goaway(client_id, reason, destination)

    async def _close_shared_ports(self) -> None:
        shared = [
            port
            for port, name in zip(self._client_ports, self.settings.listen, strict=True)
            if endpoints.is_shared(name)
        ]
        self._client_ports = [port for port in self._client_ports if port not in shared]
        await endpoints.stop_listening(shared)

    def close_shared_ports(self) -> Deferred[None]:
        """Stop listening on the client ports that other processes listen on, too: they take new clients from now on."""
        return Deferred.fromCoroutine(self._close_shared_ports())

    def drain(self) -> Deferred[None]:
        """Move every client to other nodes, then end the process; fires when no client is left. The drain is started
        once; each call returns a new Deferred for it."""
        if self._drained is None:
            self._drained = Deferred()
            running = Deferred.fromCoroutine(self.components.drain.run())
            running.addErrback(lambda failure: self.log.failure("the drain failed", failure=failure))
            running.chainDeferred(self._drained)
            self._drained.addCallback(lambda _: self._stop_reactor())
        return detached(self._drained)

    # Start.

    def privilegedStartService(self) -> None:
        """Bind the endpoints, while the process may still bind ports below 1024."""
        super().privilegedStartService()  # type: ignore[no-untyped-call]
        self._binding = Deferred.fromCoroutine(self._bind())
        # Most kinds of endpoint fail immediately. A later failure is raised in _start().
        failure = getattr(self._binding, "result", None)
        if isinstance(failure, Failure):
            self._binding.addErrback(lambda _: None)
            self._fail_start(failure)

    def startService(self) -> None:
        """Check that the registry can be used, with the privileges that twistd keeps, and start once the reactor
        runs."""
        super().startService()  # type: ignore[no-untyped-call]
        try:
            self.registry.check()
        except ConfigError:
            self._fail_start(Failure())
        self._reactor.callWhenRunning(self._start_when_running)

    def _start_when_running(self) -> None:
        # Not before: twistd installs its own handlers when the reactor starts.
        install_signal_handlers(
            self._reactor,
            {signal.SIGTERM: self._on_sigterm, signal.SIGINT: self._on_sigint, signal.SIGHUP: self._on_sighup},
            # The second SIGTERM skips the delay.
            max_signals=2 if self.settings.drain_delay else 1,
        )
        Deferred.fromCoroutine(self._start()).addErrback(self._start_failed)

    async def _bind(self) -> None:
        settings, reactor, components = self.settings, self._reactor, self.components
        listen = partial(
            endpoints.listen,
            certificate_reloader=components.certificate_reloader,
            header_errors=components.proxy_header_errors,
            metrics=self.metrics,
        )
        self._backend_ports = await listen("backend", settings.backend, components.backend_endpoint, reactor)
        self._client_ports = await listen(
            "listen", settings.listen, components.client_factory, reactor, components.proxied_client_factory
        )
        for name, port in zip(settings.listen, self._client_ports, strict=True):
            if url := endpoints.loopback_url(name, port):
                components.client_factory.own_origins.add_loopback_url(url)
        self._handshake_poller.start()
        limiter = AcceptLimiter(reactor, self.metrics, self._handshake_poller)
        limiter.throttle(self._backend_ports)
        limiter.throttle(self._client_ports, reserved_files=files_reserved_for_backends())
        endpoints.check_exposure(settings, self._backend_ports, self._client_ports)

    async def _start(self) -> None:
        components = self.components
        if self._binding is None:
            # A runner such as twist never calls privilegedStartService().
            self._binding = Deferred.fromCoroutine(self._bind())
        await self._binding
        self._complete_urls()
        # Keys are fetched in the background; until they are there, clients that need them are refused with a 503.
        components.authenticator.start()
        await self.registry.open()
        await components.membership.start(
            NodeInfo(self.node_id, self.name, self.public_url, self.peer_url, self.settings.capacity, __version__)
        )
        await components.node_directory.refresh()
        await components.learn_generations()
        self.sessions.start()
        components.relays.start()
        components.reconciler.start()
        # What exists now is never freed: full collections, which stop everything else, can skip it.
        gc.collect()
        gc.freeze()
        self.state = NodeState.UP
        if components.dns_registrar is not None:
            components.dns_registrar.start()
        if components.autoscaling is not None:
            components.autoscaling.start()
        if self._terminal is not None:
            self._terminal.close()
        self.log.info(
            "{name} is ready: node {node_id}, version {version}, clients at {public_url}, backends at {backend_url}",
            name=self.name,
            node_id=self.node_id,
            version=__version__,
            public_url=self.public_url,
            backend_url=self.peer_url.replace("ws", "http", 1),
        )

    def _complete_urls(self) -> None:
        """Derive the URLs that are not set from the ports."""
        if not self.peer_url:
            self.peer_url, _ = endpoints.port_url(self.settings.backend[0], self._backend_ports[0])
        if self.public_url:
            return
        self.public_url, self._can_advertise_url = endpoints.port_url(self.settings.listen[0], self._client_ports[0])
        if not self._can_advertise_url:
            problem = f"{self.public_url} is a guess" if self.public_url else "it cannot be derived from --listen"
            text = "--public-url is not set and {problem}: a drain sends clients away without a URL"
            self.log.warn(text, problem=problem)

    def _fail_start(self, failure: Failure) -> None:
        """Raise the error that prevents the start. Before the reactor runs: the process that starts a daemon waits
        until then, so twistd can report it there."""
        self._report_start_failure(failure)
        sys.excepthook = _excepthook_without_traceback
        failure.raiseException()

    def _start_failed(self, failure: Failure) -> None:
        self._report_start_failure(failure)
        # twistd exits with 0 when its reactor was stopped. This handler runs last.
        atexit.register(os._exit, 1)
        self._stop_reactor()

    def _report_start_failure(self, failure: Failure) -> None:
        """Write one line to the log and to stderr that says why the node does not start."""
        if failure.check(ConfigError):
            problem = failure.getErrorMessage()
        elif failure.check(RegistryUnavailableError):
            problem = f"--registry: {failure.getErrorMessage()}"
        else:
            problem = f"cannot start: {failure.getErrorMessage()}"
            self.log.failure("cannot start", failure=failure)
        self.log.critical("wsgateway: {problem}", problem=problem)
        if self._terminal is not None:
            self._terminal.report(problem)
        elif sys.__stderr__ is not None:
            # Not sys.stderr, which twistd has replaced with its log.
            print(f"wsgateway: {problem}", file=sys.__stderr__, flush=True)

    # Signals.

    def _on_sigterm(self) -> None:
        delay = self.settings.drain_delay
        if self._had_sigterm:
            self.log.info("second SIGTERM: draining now; send it again to end at once")
            self.components.drain.skip_delay()
            return
        self._had_sigterm = True
        if delay and self.state is NodeState.UP:
            self.log.info("SIGTERM: draining in {delay:g} s, then ending; send it again to drain now", delay=delay)
        else:
            self.log.info("SIGTERM: draining, then ending; send it again to end at once")
        if self._drained is not None and self.components.autoscaling is not None:
            # AWS started this drain and waits for all nodes of the instance. After SIGTERM, do not wait for those that
            # are not draining.
            self.components.autoscaling.skip_colocated_nodes()
        self.drain()

    def _on_sigint(self) -> None:
        self.log.info("SIGINT: ending")
        self._stop_reactor()

    def _on_sighup(self) -> None:
        components = self.components
        reloaded = []
        for name, credentials in (
            ("--auth", components.authenticator if self.settings.auth else None),
            ("--backend-token-file", components.backend_tokens),
            ("--cluster-secret-file", components.cluster_secret if components.cluster_secret.is_loaded else None),
        ):
            try:
                if credentials is not None:
                    credentials.reload()
                    reloaded.append(name)
            except ConfigError as e:
                self.log.error("{problem}; the previous content stays in effect", problem=str(e))
        if components.certificate_reloader.reload():
            reloaded.append("certificates")
        self.log.info("SIGHUP: reloaded: {reloaded}", reloaded=", ".join(reloaded) or "nothing")

    # Stop.

    def _stop_reactor(self) -> None:
        try:
            self._reactor.stop()
        except ReactorNotRunning:
            self.log.debug("the reactor was stopped already")

    def stopService(self) -> Deferred[None]:
        """Close everything; fires when that is done, which takes a bounded time even if the registry is unavailable."""
        super().stopService()  # type: ignore[no-untyped-call]
        self.state = NodeState.STOPPED
        self.components.drain.skip_delay()
        if self._stopped is None:
            self._stopped = Deferred.fromCoroutine(self._stop())
            self._stopped.addErrback(lambda failure: self.log.failure("the stop failed", failure=failure))
        return self._stopped

    async def _stop(self) -> None:
        components = self.components
        if self._drained is None:
            await components.drain.withdraw_dns()
        await endpoints.stop_listening(self._client_ports)
        components.reconciler.stop()
        components.rebalancer.stop()
        components.graceful_disconnect.stop()
        await self._run_step("closing clients", self.sessions.close_all(CloseCode.GOING_AWAY, "going away"))
        self.sessions.stop()
        components.relays.stop()
        await endpoints.stop_listening(self._backend_ports)
        await self._run_step("closing connections to other nodes", components.peer_client.stop())
        await self._run_step(
            "closing backends", components.backend_endpoint.close_all(CloseCode.GOING_AWAY, "going away")
        )
        await self._run_step("leaving the registry", components.membership.stop())
        await self._run_step("stopping the authenticators", components.authenticator.stop())
        for service in (components.dns_registrar, components.autoscaling):
            if service is not None:
                await self._run_step("stopping the requests to cloud services", service.stop())
        await self._run_step("closing the registry", self.registry.close())
        await self._run_step("closing the sockets of clients", self._wait_for_client_sockets())
        self._handshake_poller.stop()

    async def _wait_for_client_sockets(self) -> None:
        """Wait until the sockets of clients are closed: their close frames may not have been sent yet."""
        while self.components.open_client_sockets():
            await deferLater(self._reactor, SOCKET_POLL_INTERVAL)

    async def _run_step(self, description: str, step: Deferred[Any] | Coroutine[Deferred[Any], Any, Any]) -> None:
        await run_step(description, step, self._reactor, self.log)


def install_signal_handlers(
    reactor: Any, handlers: Mapping[signal.Signals, Callable[[], None]], *, max_signals: int = 1
) -> None:
    """Call the handler of a signal in the reactor; after ``max_signals``, a SIGTERM or SIGINT ends the process at once,
    even if the reactor is stuck. To be called in the main thread, once the reactor runs.

    These replace twistd's handlers, which stop without a drain, and end with the signal's exit status.
    """
    counts = dict.fromkeys(handlers, 0)

    def handler(signum: int, frame: FrameType | None) -> None:
        received = signal.Signals(signum)
        counts[received] += 1
        if received in _TERMINATING_SIGNALS and sum(counts.get(each, 0) for each in _TERMINATING_SIGNALS) > max_signals:
            os._exit(1)
        reactor.callFromThread(handlers[received])

    for signum in handlers:
        signal.signal(signum, handler)


def _excepthook_without_traceback(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print no traceback for a ``ConfigError``, which ``_report_start_failure`` has reported in one line."""
    if not isinstance(error, ConfigError):
        sys.__excepthook__(kind, error, traceback)
