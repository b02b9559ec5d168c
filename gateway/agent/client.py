"""A client for Twisted programs: it stays connected to the gateway, serves methods, calls and notifies.

    -> GET /v1/connect?client_id=demo-1                              the opening handshake; the token in Authorization
    <- {"jsonrpc":"2.0","id":"5f0c…","method":"echo","params":[1]}   a call from a backend
    -> {"jsonrpc":"2.0","id":"5f0c…","result":[1]}                   its response
    <- {"jsonrpc":"2.0","method":"gateway.goaway","params":{"reason":"drain","url":"wss://…","after":1.5}}   move
    -> {"jsonrpc":"2.0","method":"gateway.token","params":{"token":"…"}}                                     a new one

``python -m gateway.agent --url ws://127.0.0.1:8080 --client-id demo-1`` is the demo client.
"""

from __future__ import annotations

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
from twisted.python.failure import Failure

from gateway.agent.errors import ConnectionLost, NotConnected, Stopped
from gateway.agent.reconnect import ActiveConnection, Attempt, Backoff, GoAway, ReconnectPolicy
from gateway.agent.session import Handler, RPCSession
from gateway.agent.token import Token, check_token, make_token_renewer
from gateway.protocol import uri as urls
from gateway.protocol.uri import WebSocketURI
from gateway.util.deferred import Observers
from gateway.websocket.client import ClientConnection, ClientConnectionFactory, ConnectionOptions
from gateway.websocket.errors import ConnectionClosedError, HandshakeError

#: the most connections that are left to the gateway for the calls on them
MAX_HANDED_OFF = 4


class Agent(Service):
    """A client of the gateway that stays connected. A Twisted service; :meth:`start` and :meth:`stop` do without one.

    ``url``: ``ws://host[:port][/prefix]`` of a node or of the fleet (wss for TLS), or a complete one with
    ``/v1/connect``. ``client_id``: who this is; may be left out with a token that says so. ``token``: goes into the
    ``Authorization`` header; a callable (its result may be a Deferred or a coroutine) is asked anew for each attempt,
    and by :meth:`renew`.

    ``methods`` and ``notifications``: by name, what serves calls and notifications of backends. A handler gets the
    decoded params (``None``, a list or a dict) and returns a value, a Deferred or a coroutine.
    ``on_notification(method, params)`` gets the notifications that have no handler. ``on_connected(agent)`` is called
    for each new connection.

    ``max_message_size`` is in bytes, either way; ``call_timeout`` in seconds, for calls that do not say; ``backoff``
    the initial and the maximum wait between attempts, in seconds; ``idle_timeout`` the seconds of silence after which
    the gateway counts as dead (it pings every 50 s); ``open_timeout`` the seconds that one attempt may take, the token
    included. ``tls(host)`` gives what a TLS connection is verified by, and what is shown over it (:func:`tls_of_files`
    makes one); it is asked anew for each attempt. ``connect(url)`` gives an endpoint, in place of DNS and TCP;
    ``jitter()`` a random number from 0 to 1; ``now()`` the wall clock, in seconds since 1970.

    Raises ``ValueError`` for what cannot be used.
    """

    _log = Logger()

    _started = False
    _stopping = False
    _stopped: Stopped | None = None
    #: the attempt or the wait that stop() cuts short
    _pending: Deferred[Any] | None = None
    #: what the latest attempt made
    _attempted_connection: ClientConnection | None = None
    #: the open connection, until its transport is gone
    _connection: ClientConnection | None = None
    #: what is said over it, as long as something can be
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
        max_message_size: int = 1048576,
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
                raise ValueError(f"{name!r} is no name for a handler: gateway.* is the gateway's own")
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
        # Whoever shows a certificate gives the function that does; it may have been renewed since.
        certified = target.secure and tls is not optionsForClientTLS
        self._reconnect_policy = ReconnectPolicy(
            target,
            Backoff(*backoff, jitter),
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
        #: connections that are left to the gateway, which still awaits responses over them
        self._handed_off: set[ActiveConnection] = set()

    # Life

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self.start()

    def stopService(self) -> Deferred[None]:
        super().stopService()  # type: ignore[no-untyped-call]
        return self.stop()

    def start(self) -> None:
        """Connect, and stay connected until :meth:`stop`, or until the gateway says that it is no use."""
        if self._started:
            return
        self._started, self._stopping, self._stopped = True, False, None
        Deferred.fromCoroutine(self._run()).addErrback(self._on_crash).addCallback(self._on_stopped)

    def stop(self) -> Deferred[None]:
        """Close the connection with 1000; fires when it is gone. Responses of handlers that still run are dropped."""
        if not self._started:
            return succeed(None)
        self._stopping = True
        stopped = self._stopped_observers.observe().addCallback(lambda _: None)
        for left in list(self._handed_off):
            left.connection.close()
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
        """The url that it is connected to now: that of a redirect, maybe."""
        return self._connected_url

    def whenConnected(self) -> Deferred[Agent]:
        """Fires with the agent when it is connected, at once if it is. Fails with ``NotConnected`` when it stops."""
        if self._session is not None:
            return succeed(self)
        if self._stopped is not None:
            return fail(NotConnected(self._stopped.reason))
        return self._connected_observers.observe()

    def whenStopped(self) -> Deferred[Stopped]:
        """Fires with the reason when it has stopped, by :meth:`stop` or because the gateway said that it is no use."""
        if self._stopped is not None:
            return succeed(self._stopped)
        return self._stopped_observers.observe()

    # Calls

    def call(self, method: str, params: object = None, timeout: float | None = None) -> Deferred[Any]:
        """Ask whoever serves agents' calls at the backend; fires with the decoded result.

        ``params`` is ``None`` or becomes a JSON array or object; ``timeout`` is in seconds. Fails with ``NotConnected``
        (at once), ``RpcFailed``, ``ConnectionLost`` or ``CallTimedOut``; with ``TypeError`` or ``ValueError`` for what
        cannot be sent. Cancelling forgets the call.
        """
        if self._session is None:
            return fail(NotConnected("not connected to the gateway"))
        return self._session.call(method, params, self._call_timeout if timeout is None else timeout)

    def notify(self, method: str, params: object = None) -> Deferred[None]:
        """Tell the backends that subscribed; fires when the transport has room for more.

        Fails with ``NotConnected`` (at once) or ``ConnectionLost``; with ``TypeError`` or ``ValueError`` for what
        cannot be sent. That it was sent does not say that it arrived.
        """
        if self._session is None or self._connection is None:
            return fail(NotConnected("not connected to the gateway"))
        try:
            self._session.notify(method, params)
        except (TypeError, ValueError, ConnectionLost):
            return fail(Failure())
        return self._connection.wait_writable().addErrback(_as_connection_lost)

    def renew(self) -> Deferred[None]:
        """Show the gateway another token on this connection, before that by which it was opened has expired; fires when
        it is sent. Where a token says that it will expire, as a JWT does, this is done without being asked for.

        Fails with ``NotConnected``, with what ``token`` fails with, and with ``ValueError`` if that is no callable.
        Cancelling only stops the wait.
        """
        if self._token_renewer is None:
            return fail(ValueError("there is no other token: it is not a callable"))
        return self._token_renewer.renew()

    # One attempt after the other

    async def _run(self) -> Stopped:
        stopped = await self._connect_loop()
        for left in list(self._handed_off):
            await left.connection.disconnected
        return stopped

    async def _connect_loop(self) -> Stopped:
        step = self._reconnect_policy.first_attempt()
        while not self._stopping:
            self._pending = maybeDeferred(self._open, step.target)
            self._pending.addTimeout(self._open_timeout, self._clock, self._open_timed_out)
            try:
                connection = await self._pending
            except Exception as e:  # noqa: BLE001  whatever the token, DNS, TCP, TLS or the gateway refuse by
                step = self._reconnect_policy.after_failure(step.target, e)
                if self._attempted_connection is not None and self._attempted_connection.connected:
                    self._attempted_connection.abort("given up")
                    await self._attempted_connection.disconnected
            else:
                step = await self._stay_connected(connection, step.target)
            if self._stopping:
                break
            if step.stop is not None:
                self._log.error("agent {id} stops: {why}", id=self._log_name, why=step.stop.reason)
                return step.stop
            self._log.warn("agent {id}: {why}; next {step}", id=self._log_name, why=step.reason, step=_describe(step))
            await self._sleep(step.delay)
        return Stopped(None, "told to stop")

    async def _sleep(self, delay: float) -> None:
        # Even without a delay, so that attempts that fail at once leave the reactor to others.
        self._pending = deferLater(self._clock, delay)
        # Nothing but stop() cancels it, and the loop sees that.
        await self._pending.addErrback(lambda failure: None)

    def _open_timed_out(self, result: object, timeout: float) -> Failure:
        return Failure(HandshakeError(f"not open within {timeout:g} s"))

    async def _open(self, target: WebSocketURI) -> ClientConnection:
        """Open a connection. Raises ``Refused``, ``OpeningFailed``, or what the token or the endpoint failed with."""
        headers = {"Wsgateway-Redirect": "1"}
        token = await maybeDeferred(self._token) if callable(self._token) else self._token
        shown = None if token is None else check_token(token)
        if shown is not None:
            headers["Authorization"] = f"Bearer {shown}"
        opening = ConnectionOptions(
            target=target,
            headers=headers,
            clock=self._clock,
            max_message_size=self._max_message_size,
            idle_timeout=self._idle_timeout,
        )
        connection = ClientConnection(opening)
        session = RPCSession(
            self._clock,
            connection.send,
            handler_for=self._methods.get,
            on_notification=partial(self._notification_received, connection),
            max_message_size=self._max_message_size,
        )
        connection.on_message = session.message_received
        self._attempted_connection = connection
        # Before there is a message: a goaway may come together with the answer to the opening handshake.
        self._active = ActiveConnection(connection, session, self._clock, shown)
        await self._connect(target.url).connect(ClientConnectionFactory(connection, self._clock))
        await connection.opened
        self._connection, self._session = connection, session
        return connection

    def _endpoint(self, url: str) -> IStreamClientEndpoint:
        target = urls.parse_uri(url)
        endpoint: IStreamClientEndpoint = HostnameEndpoint(self._clock, target.host, target.port)
        return wrapClientTLS(self._tls(target.host), endpoint) if target.secure else endpoint

    async def _stay_connected(self, connection: ClientConnection, target: WebSocketURI) -> Attempt:
        """Stay, until the connection has ended, or is left to the gateway."""
        stay = self._active
        assert stay is not None
        self._connected_url = target.url
        self._log.info("agent {id} is connected to {url}", id=self._log_name, url=target.url)
        if self._token_renewer is not None:
            self._token_renewer.start(
                stay.token or "", lambda token: stay.session.notify("gateway.token", {"token": token})
            )
        if self._on_connected is not None:
            maybeDeferred(self._on_connected, self).addErrback(lambda f: self._log.failure("on_connected failed", f))
        self._connected_observers.callback(self)
        await stay.finished
        if self._token_renewer is not None:
            self._token_renewer.stop()
        self._session = self._connected_url = None
        if stay.next_attempt is not None:
            self._reconnect_policy.record_handoff()
            self._connection = self._active = None
            self._handed_off.add(stay)
            Deferred.fromCoroutine(stay.wait_closed()).addErrback(self._log_unexpected_error).addCallback(
                lambda _: self._handed_off.discard(stay)
            )
            return stay.next_attempt
        ended = await stay.wait_closed()
        self._connection = self._active = None
        stayed = self._clock.seconds() - stay.opened_at
        return self._reconnect_policy.after_close(target, ended, connected_for=stayed, goaway=stay.goaway)

    def _notification_received(self, connection: ClientConnection, method: str, params: Any) -> object:
        if method == "gateway.goaway":
            # One that was left has nothing to say any more.
            if self._active is not None and self._active.connection is connection:
                goaway = GoAway.from_params(params)
                stayed = self._clock.seconds() - self._active.opened_at
                onward = self._reconnect_policy.after_goaway(connection.target, goaway, connected_for=stayed)
                # A gateway that keeps so many of them open waits for no call any more.
                self._active.goaway_received(goaway, onward if len(self._handed_off) < MAX_HANDED_OFF else None)
        elif not method.startswith("gateway."):
            if method in self._notifications:
                return self._notifications[method](params)
            if self._on_notification is not None:
                return self._on_notification(method, params)
        return None

    def _log_unexpected_error(self, failure: Failure) -> None:
        self._log.failure("agent {id}: error in leaving a connection", failure, id=self._log_name)

    def _on_crash(self, failure: Failure) -> Stopped:
        self._log.failure("agent {id} stops because of an error of its own", failure, id=self._log_name)
        if self._connection is not None:
            self._connection.abort("the agent has stopped")
        if self._token_renewer is not None:
            self._token_renewer.stop()
        self._connection = self._session = None
        return Stopped(None, f"an error of its own: {failure.getErrorMessage()}")

    def _on_stopped(self, stopped: Stopped) -> None:
        self._started, self._pending = False, None
        self._stopped = stopped
        self._connected_observers.errback(NotConnected(stopped.reason))
        self._stopped_observers.callback(stopped)


def _as_connection_lost(failure: Failure) -> NoReturn:
    failure.trap(ConnectionClosedError)
    raise ConnectionLost(failure.getErrorMessage())


def _describe(step: Attempt) -> str:
    return f"{step.target.url} in {step.delay:.1f} s"
