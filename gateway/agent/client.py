"""The agent: connect to the gateway, reconnect, renew the token, and follow ``gateway.goaway``.

-> GET /v1/connect?client_id=demo-1                              opening handshake; the token in Authorization
<- {"jsonrpc":"2.0","id":"5f0c…","method":"echo","params":[1]}   a call from a backend
-> {"jsonrpc":"2.0","id":"5f0c…","result":[1]}                   its response
<- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain","url":"wss://…","after":1.5}}
-> {"jsonrpc":"2.0","method":"gateway.token","params":{"token":"…"}}
"""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from twisted.application.service import Service
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.ssl import optionsForClientTLS
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python import runtime
from twisted.python.failure import Failure

from gateway.agent.errors import ConnectionLost, NotConnected, Stopped
from gateway.agent.reconnect import ActiveConnection, Attempt, GoAway, ReconnectPolicy, make_backoff
from gateway.agent.session import Handler, RPCSession
from gateway.agent.token import Token, check_token, make_token_renewer
from gateway.protocol import uri as urls
from gateway.protocol.uri import WebSocketURI
from gateway.util.deferred import Observers
from gateway.websocket.client import ClientConnection, ClientConnectionFactory, ConnectionOptions
from gateway.websocket.errors import ConnectionClosedError, HandshakeError

#: replaced connections that stay open for their calls in flight
MAX_HANDED_OFF = 4


class AgentState(enum.Enum):
    """IDLE -start()-> RUNNING -stop()-> STOPPING -> STOPPED -start()-> RUNNING; RUNNING -gives up-> STOPPED."""

    IDLE = enum.auto()
    RUNNING = enum.auto()
    STOPPING = enum.auto()
    STOPPED = enum.auto()


class Agent(Service):
    """A client that stays connected to the gateway, serves calls of backends, and sends calls and notifications.

    After a lost connection or a failed attempt it reconnects with exponential backoff and full jitter. It follows
    redirects and ``gateway.goaway``, renews its token before it expires, and stops when the gateway refuses it for
    good. It is a Twisted service; without a service parent, use :meth:`start` and :meth:`stop`.

    Identity:

    - ``url``: ``ws://host[:port][/prefix]`` of a node or of the fleet, ``wss://`` for TLS; ``/v1/connect`` is appended
      if it is missing.
    - ``client_id``: may be omitted if the token or the client certificate contains it.
    - ``token``: sent as ``Authorization: Bearer``. A text, or a callable that returns a text, a Deferred or a
      coroutine; it is called for each attempt and for each renewal.

    Handlers:

    - ``methods``, ``notifications``: name -> handler of the calls and notifications of backends. A handler takes the
      decoded params (``None``, a list or a dict) and returns a value, a Deferred or a coroutine. It raises
      :class:`AgentError` to answer with an error; any other exception becomes -32603. Names must not begin with
      ``gateway.``.
    - ``on_notification(method, params)``: called for notifications without a handler.
    - ``on_connected(agent)``: called for each new connection.

    Limits:

    - ``max_message_size``: bytes, in both directions.
    - ``call_timeout``: seconds; the default of :meth:`call`.
    - ``backoff``: (initial, maximum) delay between attempts, in seconds.
    - ``idle_timeout``: seconds without data after which the connection is given up; the gateway pings every 40 s.
    - ``open_timeout``: seconds for one attempt, including the call of ``token``.

    TLS, and hooks for tests:

    - ``tls(host)``: returns the TLS options of a connection, such as those of :func:`tls_of_files`; called for each
      attempt. The default verifies the gateway by the platform's CAs.
    - ``connect(url)``: returns a stream client endpoint; the default uses DNS and TCP.
    - ``jitter()``: returns a random number from 0 to 1.
    - ``now()``: returns the wall clock, in seconds since 1970.

    Raises ``ValueError`` if a parameter is invalid.
    """

    _log = Logger()

    _state = AgentState.IDLE
    #: why the agent is STOPPED
    _stopped: Stopped | None = None
    #: the attempt or delay that stop() cancels
    _pending: Deferred[Any] | None = None
    #: the connection of the latest attempt
    _attempted_connection: ClientConnection | None = None
    #: the open connection, until its transport is closed
    _connection: ClientConnection | None = None
    #: the session of the open connection, while it accepts calls
    _session: RPCSession | None = None
    _active: ActiveConnection | None = None
    _connected_url: str | None = None

    def __init__(
        self,
        url: str,
        *,
        reactor: Any,
        client_id: str | None = None,
        token: Token = None,
        methods: Mapping[str, Handler] | None = None,
        notifications: Mapping[str, Handler] | None = None,
        on_notification: Callable[[str, Any], object] | None = None,
        on_connected: Callable[[Agent], object] | None = None,
        max_message_size: int = 2**20,
        call_timeout: float = 30.0,
        backoff: tuple[float, float] = (1.0, 60.0),
        idle_timeout: float = 120.0,
        open_timeout: float = 30.0,
        tls: Callable[[str], Any] = optionsForClientTLS,
        connect: Callable[[str], IStreamClientEndpoint] | None = None,
        jitter: Callable[[], float] = random.random,
        now: Callable[[], float] = time.time,
    ) -> None:
        for name in [*(methods or ()), *(notifications or ())]:
            if name.startswith("gateway."):
                raise ValueError(f"{name!r} cannot have a handler: gateway.* is reserved for the gateway")
        self.client_id = client_id
        self._clock = reactor
        self._token = token
        self._methods = dict(methods or {})
        self._notifications = dict(notifications or {})
        self._on_notification = on_notification
        self._on_connected = on_connected
        self._max_message_size = max_message_size
        self._call_timeout = call_timeout
        target = urls.make_connect_uri(url, client_id)
        # A tls function other than the default may present a client certificate, and a renewed one at each attempt.
        certified = target.secure and tls is not optionsForClientTLS
        self._reconnect_policy = ReconnectPolicy(
            target,
            make_backoff(*backoff, jitter),
            token_may_change=callable(token) or (certified and token is None),
            certificate_may_change=certified,
        )
        #: in log lines
        self._log_name = "(by its certificate or token)" if client_id is None else ascii(client_id)
        self._token_renewer = make_token_renewer(
            token,
            clock=reactor,
            wall_clock=now,
            jitter=jitter,
            backoff=backoff,
            timeout=open_timeout,
            name=self._log_name,
        )
        self._idle_timeout = idle_timeout
        self._open_timeout = open_timeout
        self._tls = tls
        self._connect = connect or self._endpoint
        self._connected_observers: Observers[Agent] = Observers()
        self._stopped_observers: Observers[Stopped] = Observers()
        #: replaced connections on which the gateway still awaits responses
        self._handed_off: set[ActiveConnection] = set()

    # Start and stop

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self.start()

    def stopService(self) -> Deferred[None]:
        super().stopService()  # type: ignore[no-untyped-call]
        return self.stop()

    def start(self) -> None:
        """Connect, and stay connected until :meth:`stop` or until the gateway refuses this client for good.

        Does nothing if the agent is running. A stopped agent can be started again. Warns if the reactor's timers follow
        the wall clock: they stand still for as long as it is set back.
        """
        if self._state in (AgentState.RUNNING, AgentState.STOPPING):
            return
        if getattr(self._clock, "seconds", None) is runtime.seconds:
            text = "the timers of this reactor follow the wall clock, and stand still while it is set back: set "
            self._log.warn(text + "reactor.seconds = time.monotonic before the reactor runs")
        self._state, self._stopped = AgentState.RUNNING, None
        Deferred.fromCoroutine(self._run()).addErrback(self._on_crash).addCallback(self._on_stopped)

    def stop(self) -> Deferred[None]:
        """Close all connections with 1000. Fires when they are closed.

        Responses of handlers that are still running are dropped.
        """
        if self._state not in (AgentState.RUNNING, AgentState.STOPPING):
            return succeed(None)
        self._state = AgentState.STOPPING
        stopped = self._stopped_observers.observe().addCallback(lambda _: None)
        for active in list(self._handed_off):
            active.connection.close()
        if self._connection is not None:
            self._connection.close()
        elif self._pending is not None:
            self._pending.cancel()
        return stopped

    @property
    def connected(self) -> bool:
        """Whether calls and notifications can be sent now."""
        return self._session is not None

    @property
    def connected_url(self) -> str | None:
        """The url of the current connection, which may be that of a redirect, without the ticket; ``None`` without a
        connection."""
        return self._connected_url

    def whenConnected(self) -> Deferred[Agent]:
        """Fire with the agent when it is connected, at once if it is now. Fails with ``NotConnected`` if it stops."""
        if self._session is not None:
            return succeed(self)
        if self._stopped is not None:
            return fail(NotConnected(self._stopped.reason))
        return self._connected_observers.observe()

    def whenStopped(self) -> Deferred[Stopped]:
        """Fire with the reason when the agent has stopped, by :meth:`stop` or because it gave up."""
        if self._stopped is not None:
            return succeed(self._stopped)
        return self._stopped_observers.observe()

    # Calls

    def call(self, method: str, params: object = None, timeout: float | None = None) -> Deferred[Any]:
        """Call a backend. Fires with the decoded result.

        ``params`` is ``None`` or a value that encodes as a JSON array or object. ``timeout`` is in seconds; ``None``
        means ``call_timeout``. Cancelling the Deferred discards the response.

        Fails with ``NotConnected`` (at once), ``RpcFailed``, ``ConnectionLost`` or ``CallTimedOut``; with ``TypeError``
        if the params cannot be encoded, and with ``ValueError`` if the message is too large or the timeout is not
        positive.
        """
        if self._session is None:
            return fail(NotConnected("not connected to the gateway"))
        return self._session.call(method, params, self._call_timeout if timeout is None else timeout)

    def notify(self, method: str, params: object = None) -> Deferred[None]:
        """Notify the subscribed backends. Fires when the transport has room for more data.

        Delivery is not acknowledged. Fails with ``NotConnected`` (at once) or ``ConnectionLost``; with ``TypeError`` if
        the params cannot be encoded, and with ``ValueError`` if the message is too large.
        """
        if self._session is None or self._connection is None:
            return fail(NotConnected("not connected to the gateway"))
        try:
            self._session.notify(method, params)
        except (TypeError, ValueError, ConnectionLost):
            return fail(Failure())
        return self._connection.wait_writable().addErrback(_as_connection_lost)

    def renew(self) -> Deferred[None]:
        """Send a new token over the current connection, before the old one expires. Fires when it is sent.

        A token with an expiry time, such as a JWT, is renewed automatically. Fails with ``NotConnected``, with the
        error of ``token``, or with ``ValueError`` if ``token`` is not a callable. Cancelling only stops the wait.
        """
        if self._token_renewer is None:
            return fail(ValueError("the token cannot be renewed: it is not a callable"))
        return self._token_renewer.renew()

    # Connections

    @property
    def _is_stopping(self) -> bool:
        return self._state is AgentState.STOPPING

    async def _run(self) -> Stopped:
        stopped = await self._connect_loop()
        for active in list(self._handed_off):
            await active.connection.disconnected
        return stopped

    async def _connect_loop(self) -> Stopped:
        attempt = self._reconnect_policy.first_attempt()
        while not self._is_stopping:
            self._pending = maybeDeferred(self._open, attempt.target)
            self._pending.addTimeout(self._open_timeout, self._clock, self._open_timed_out)
            try:
                connection = await self._pending
            except Exception as e:  # noqa: BLE001  any error of the token, DNS, TCP, TLS or the gateway
                attempt = self._reconnect_policy.after_failure(attempt.target, e)
                if self._attempted_connection is not None and self._attempted_connection.connected:
                    self._attempted_connection.abort("given up")
                    await self._attempted_connection.disconnected
            else:
                attempt = await self._stay_connected(connection, attempt.target)
            if self._is_stopping:
                break
            if attempt.stop is not None:
                self._log.error("agent {id} stops: {reason}", id=self._log_name, reason=attempt.stop.reason)
                return attempt.stop
            self._log.warn(
                "agent {id}: {reason}; connecting to {attempt}",
                id=self._log_name,
                reason=attempt.reason,
                attempt=_describe(attempt),
            )
            await self._sleep(attempt.delay)
        return Stopped(None, "stop() was called")

    async def _sleep(self, delay: float) -> None:
        # Also for a delay of 0, so that attempts that fail at once do not block the reactor.
        self._pending = deferLater(self._clock, delay)
        # Only stop() cancels it, and the loop checks for that.
        await self._pending.addErrback(lambda failure: None)

    def _open_timed_out(self, result: object, timeout: float) -> Failure:
        return Failure(HandshakeError(f"not open within {timeout:g} s"))

    async def _open(self, target: WebSocketURI) -> ClientConnection:
        """Open a connection.

        Raises ``HandshakeRefusedError``, ``HandshakeError``, or the error of the token or the endpoint.
        """
        headers = {"Wsgateway-Redirect": "1"}
        supplied = await maybeDeferred(self._token) if callable(self._token) else self._token
        token = None if supplied is None else check_token(supplied)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        options = ConnectionOptions(
            target=target,
            headers=headers,
            clock=self._clock,
            max_message_size=self._max_message_size,
            idle_timeout=self._idle_timeout,
        )
        connection = ClientConnection(options)
        session = RPCSession(
            self._clock,
            connection.send,
            handler_for=self._methods.get,
            on_notification=partial(self._notification_received, connection),
            max_message_size=self._max_message_size,
        )
        connection.on_message = session.message_received
        self._attempted_connection = connection
        # Before any message: a goaway may arrive together with the response to the opening handshake.
        self._active = ActiveConnection(connection, session, self._clock, token)
        await self._connect(target.url).connect(ClientConnectionFactory(connection, self._clock))
        await connection.opened
        self._connection, self._session = connection, session
        return connection

    def _endpoint(self, url: str) -> IStreamClientEndpoint:
        target = urls.parse_uri(url)
        endpoint: IStreamClientEndpoint = HostnameEndpoint(self._clock, target.host, target.port)
        return wrapClientTLS(self._tls(target.host), endpoint) if target.secure else endpoint

    async def _stay_connected(self, connection: ClientConnection, target: WebSocketURI) -> Attempt:
        """Use a connection until it is closed or handed off. Returns the next attempt."""
        active = self._active
        assert active is not None
        self._connected_url = target.loggable_url
        self._log.info("agent {id} is connected to {url}", id=self._log_name, url=target.loggable_url)
        if self._token_renewer is not None:
            self._token_renewer.start(
                active.token or "", lambda token: active.session.notify("gateway.token", {"token": token})
            )
        if self._on_connected is not None:
            maybeDeferred(self._on_connected, self).addErrback(lambda f: self._log.failure("on_connected failed", f))
        self._connected_observers.callback(self)
        await active.finished
        if self._token_renewer is not None:
            self._token_renewer.stop()
        self._session = self._connected_url = None
        if active.next_attempt is not None:
            self._reconnect_policy.record_handoff()
            self._connection = self._active = None
            self._handed_off.add(active)
            Deferred.fromCoroutine(active.wait_closed()).addErrback(self._log_unexpected_error).addCallback(
                lambda _: self._handed_off.discard(active)
            )
            return active.next_attempt
        event = await active.wait_closed()
        self._connection = self._active = None
        duration = self._clock.seconds() - active.opened_at
        return self._reconnect_policy.after_close(target, event, connected_for=duration, goaway=active.goaway)

    def _notification_received(self, connection: ClientConnection, method: str, params: Any) -> object:
        if method == "gateway.goaway":
            # A goaway on a connection that was handed off is ignored.
            if self._active is not None and self._active.connection is connection:
                goaway = GoAway.from_params(params)
                duration = self._clock.seconds() - self._active.opened_at
                attempt = self._reconnect_policy.after_goaway(connection.target, goaway, connected_for=duration)
                # With too many connections handed off, wait for the gateway to close this one.
                self._active.goaway_received(goaway, attempt if len(self._handed_off) < MAX_HANDED_OFF else None)
        elif not method.startswith("gateway."):
            if method in self._notifications:
                return self._notifications[method](params)
            if self._on_notification is not None:
                return self._on_notification(method, params)
        return None

    def _log_unexpected_error(self, failure: Failure) -> None:
        self._log.failure("agent {id}: error in closing a connection", failure, id=self._log_name)

    def _on_crash(self, failure: Failure) -> Stopped:
        self._log.failure("agent {id} stops because of an internal error", failure, id=self._log_name)
        if self._connection is not None:
            self._connection.abort("the agent has stopped")
        if self._token_renewer is not None:
            self._token_renewer.stop()
        self._connection = self._session = None
        return Stopped(None, f"internal error: {failure.getErrorMessage()}")

    def _on_stopped(self, stopped: Stopped) -> None:
        self._state, self._stopped, self._pending = AgentState.STOPPED, stopped, None
        self._connected_observers.errback(NotConnected(stopped.reason))
        self._stopped_observers.callback(stopped)


def _as_connection_lost(failure: Failure) -> NoReturn:
    failure.trap(ConnectionClosedError)
    raise ConnectionLost(failure.getErrorMessage())


def _describe(attempt: Attempt) -> str:
    return f"{attempt.target.loggable_url} in {attempt.delay:.1f} s"
