"""The simulated clients."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Any

import attrs
import msgspec

from tests.simulation.ledger import Ledger
from tests.simulation.network import ActorEnd, Network
from tests.simulation.scheduler import Event, Scheduler
from tests.simulation.websocket import WebSocket, upgrade_request

_URL = re.compile(r"ws://([^:/]+):(\d+)(/.*)")
#: a client regards a connection as lost after this time without a byte, in seconds
IDLE_TIMEOUT = 14.0
#: time that an opening handshake may take, in seconds
OPEN_TIMEOUT = 6.0
#: time that a client keeps its old connection once it has the next one, in seconds
OVERLAP = 5.0
MIN_BACKOFF, MAX_BACKOFF = 0.05, 3.0

decode = msgspec.json.decode
encode = msgspec.json.encode


@attrs.frozen
class ClientTraits:
    """What a client does."""

    #: whether it moves when it is told to
    follows_goaway: bool = True
    #: whether it follows a redirect
    follows_redirect: bool = True
    #: share of the calls that it never answers
    silent_share: float = 0.0
    #: the longest time that an answer takes, in seconds
    max_delay: float = 0.0
    #: whether it sends an answer that is late for its connection on the next one
    answers_elsewhere: bool = False
    #: share of the answers that are errors, which look like the gateway's
    error_share: float = 0.0
    #: mean time between two times that it drops its connection by itself, in seconds; 0: never
    flap_interval: float = 0.0


class ClientConnection:
    """One connection of a client."""

    def __init__(self, client: Client, number: int, end: ActorEnd) -> None:
        self.client = client
        self.number = number
        self.is_leaving = False
        self.websocket = WebSocket(end, on_response=self._responded, on_text=self._text, on_lost=self._lost)

    @property
    def is_open(self) -> bool:
        return self.websocket.is_open

    def _responded(self, status: int, headers: dict[str, str]) -> None:
        self.client.responded(self, status, headers)

    def _text(self, payload: bytes) -> None:
        try:
            message = decode(payload)
        except ValueError:
            self.client.ledger.violated("d", f"{self.client.program} received what is no message: {payload[:80]!r}")
            return
        method = message.get("method")
        if method == "gateway.goaway":
            self.client.told_to_go(self, message["params"])
        elif method is not None:
            self._message(message)

    def _message(self, message: dict[str, Any]) -> None:
        client, number = self.client, message["params"]["u"]
        client.scheduler.trace(f"{client.program} #{self.number} <- {message['method']} {number}")
        client.ledger.delivered(number, client.client_id, client.program, self.number)
        if "id" not in message:
            return
        random, traits = client.random, client.traits
        if traits.silent_share and random.random() < traits.silent_share:
            client.ignored.add(number)
            return
        is_error = bool(traits.error_share) and random.random() < traits.error_share
        if traits.max_delay:
            client.scheduler.after(random.random() * traits.max_delay, self._answer, message["id"], number, is_error)
        else:
            self._answer(message["id"], number, is_error)

    def _answer(self, id: str, number: int, is_error: bool) -> None:
        connection: ClientConnection | None = self
        if not self.is_open and self.client.traits.answers_elsewhere:
            connection = self.client.current
        if connection is None or not connection.is_open:
            return
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": id}
        # The gateway must take an answer only from the connection that was asked.
        says = {"c": connection.number, "u": number}
        if is_error:
            data = {"client": self.client.client_id, "sent": False, **says}
            answer["error"] = {"code": -32004, "message": "the client's node cannot be reached", "data": data}
        else:
            answer["result"] = says
        connection.websocket.send(encode(answer))

    def _lost(self, code: int) -> None:
        self.client.connection_lost(self, code)

    def drop(self) -> None:
        """Close it without waiting."""
        self.websocket.close()


class Client:
    """One program that is connected as a client."""

    def __init__(
        self,
        client_id: str,
        program: str,
        *,
        scheduler: Scheduler,
        network: Network,
        ledger: Ledger,
        traits: ClientTraits,
        choose_node: Callable[[Random], str],
        numbers: Any,
    ) -> None:
        """``program`` names this program. ``choose_node`` returns the host that the load balancer sends it to.
        ``numbers`` gives connections their numbers."""
        self.client_id = client_id
        self.program = program
        self.scheduler = scheduler
        self.ledger = ledger
        self.traits = traits
        self.host = f"192.168.{hash_of(program) % 250}.{hash_of(program) // 250 % 250}"
        self.random = scheduler.make_random(program)
        self._network = network
        self._choose_node = choose_node
        self._numbers = numbers
        self._is_running = self._was_started = False
        self.current: ClientConnection | None = None
        #: the connections that it has left, until they are closed
        self._old: dict[ClientConnection, None] = {}
        self._opening: ClientConnection | None = None
        self._attempt: Any = None
        self._open_timer: Event | None = None
        self._retry: Event | None = None
        self._backoff = MIN_BACKOFF
        #: since when it can be reached without a gap that is not a handoff
        self.reachable_since = 0.0
        #: the calls that it does not answer
        self.ignored: set[int] = set()
        #: whether it was told that a newer connection replaced it
        self.was_replaced = False

    # Life.

    def start(self) -> None:
        """Connect, and stay connected."""
        self._is_running = True
        self._connect()
        if not self._was_started:
            self._was_started = True
            self._check()
            if self.traits.flap_interval:
                self._schedule_flap()

    def stop(self) -> None:
        """Disconnect, and stay away."""
        self._is_running = False
        for event in (self._retry, self._open_timer):
            if event is not None:
                event.cancel()
        if self._attempt is not None:
            self._attempt.cancel()
        self._attempt = self._retry = self._open_timer = None
        for connection in [self.current, self._opening, *self._old]:
            if connection is not None:
                connection.drop()
        self.current = self._opening = None
        self._old.clear()

    @property
    def is_connected(self) -> bool:
        return self.current is not None and self.current.is_open

    @property
    def is_running(self) -> bool:
        return self._is_running

    def connections(self) -> int:
        """Return the number of open connections."""
        return sum(
            connection is not None and connection.is_open for connection in [self.current, *self._old, self._opening]
        )

    def stop_flapping(self) -> None:
        """Keep the connection from now on."""
        self.traits = attrs.evolve(self.traits, flap_interval=0.0)

    def always_answers(self) -> None:
        """Answer every call at once from now on."""
        self.traits = attrs.evolve(self.traits, silent_share=0.0, max_delay=0.0)

    def stop_reading(self) -> Callable[[], None]:
        """Read nothing; returns what ends that."""
        connection = self.current
        if connection is None:
            return lambda: None
        end = connection.websocket.end
        end.set_reading(False)
        self.reachable_since = float("inf")
        return lambda: end.set_reading(True)

    def _schedule_flap(self) -> None:
        self.scheduler.after(self.random.expovariate(1 / self.traits.flap_interval), self._flap)

    def _flap(self) -> None:
        if not self.traits.flap_interval:
            return
        if self.current is not None:
            self.scheduler.trace(f"{self.program} drops its connection")
            self.current.drop()
            self.current = None
            self.reachable_since = float("inf")
            self._connect_later(self.random.random() * 0.3)
        self._schedule_flap()

    def _check(self) -> None:
        self.scheduler.after(2.0, self._check)
        now = self.scheduler.now
        for connection in [self.current, *self._old]:
            if connection is None:
                continue
            silence = now - connection.websocket.last_heard
            if silence > IDLE_TIMEOUT:
                connection.websocket.abort()
                self.connection_lost(connection, 1006)
            elif silence > IDLE_TIMEOUT / 2:
                connection.websocket.ping()

    # Connecting.

    def _connect_later(self, delay: float, url: str | None = None) -> None:
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self.scheduler.after(delay, self._connect, url)

    def _connect(self, url: str | None = None) -> None:
        self._retry = None
        if not self._is_running or self._attempt is not None:
            return
        host, port, target = self._choose_node(self.random), 8080, f"/v1/connect?client_id={self.client_id}"
        match = _URL.fullmatch(url) if url else None
        if match:
            host, port, target = match[1], int(match[2]), match[3]
        headers = ("Wsgateway-Redirect: 1",) if self.traits.follows_redirect else ()
        request = upgrade_request(target, f"{host}:{port}", *headers)

        def connected(end: ActorEnd) -> None:
            self._attempt = None
            self._opening = ClientConnection(self, next(self._numbers), end)
            end.send(request)

        def refused() -> None:
            self._attempt = None
            self._failed()

        self._open_timer = self.scheduler.after(OPEN_TIMEOUT, self._timed_out)
        self._attempt = self._network.connect_actor(self.host, (host, port), connected, refused)

    def _timed_out(self) -> None:
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None
        elif self._opening is not None:
            self._opening.websocket.abort()
            self._opening = None
        else:
            return
        self._failed()

    def _failed(self) -> None:
        if self._open_timer is not None:
            self._open_timer.cancel()
        self._opening = None
        if not self._is_running:
            return
        self._connect_later(self._backoff * self.random.uniform(0.5, 1.0))
        self._backoff = min(MAX_BACKOFF, 2 * self._backoff)

    def responded(self, connection: ClientConnection, status: int, headers: dict[str, str]) -> None:
        """Handle the response of an opening handshake."""
        if connection is not self._opening:
            return
        if self._open_timer is not None:
            self._open_timer.cancel()
        if status == 101:
            self._opened(connection)
        else:
            connection.websocket.abort()
            self._opening = None
            if status == 307 and "location" in headers:
                self._connect(headers["location"])
            else:
                self.scheduler.trace(f"{self.program} <- {status}")
                self._failed()

    def _opened(self, connection: ClientConnection) -> None:
        self.scheduler.trace(f"{self.program} #{connection.number} is open")
        self._opening = None
        self._backoff = MIN_BACKOFF
        old, self.current = self.current, connection
        if old is None:
            self.reachable_since = self.scheduler.now
        else:
            self._old[old] = None
            self.scheduler.after(OVERLAP, self._leave, old)

    def _leave(self, connection: ClientConnection) -> None:
        if self._old.pop(connection, 0) is None:
            connection.drop()

    def told_to_go(self, connection: ClientConnection, params: dict[str, Any]) -> None:
        """Handle goaway."""
        self.scheduler.trace(f"{self.program} #{connection.number} <- goaway {params.get('url')}")
        if self.traits.follows_goaway and connection is self.current:
            connection.is_leaving = True
            self._connect_later(min(1.0, params.get("after", 0.0)), params.get("url"))

    def connection_lost(self, connection: ClientConnection, code: int) -> None:
        """Handle the loss of a connection."""
        self._old.pop(connection, None)
        if connection is self._opening:
            if self._open_timer is not None:
                self._open_timer.cancel()
            self._failed()
        elif connection is self.current:
            self.scheduler.trace(f"{self.program} #{connection.number} is closed with {code}")
            self.current = None
            if not connection.is_leaving:
                self.reachable_since = float("inf")
            if not self._is_running or self._attempt is not None or self._opening is not None:
                return
            if code == 4001:
                self.was_replaced = True
            if self._retry is None:
                self._connect_later(self.random.random() * (5.0 if code == 4001 else 0.2))


def hash_of(text: str) -> int:
    """Return a number that depends on the text only."""
    return int.from_bytes(text.encode()[-6:], "big") * 2654435761 % 2**32
