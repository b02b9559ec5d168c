"""The simulated backends: calls and notifications in numbered streams, over WebSocket and HTTP."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from tests.simulation.ledger import Ledger, Message, Stream
from tests.simulation.network import ActorEnd, Network
from tests.simulation.scheduler import Event, Scheduler
from tests.simulation.websocket import WebSocket, upgrade_request

decode = msgspec.json.decode
encode = msgspec.json.encode

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
#: shortest and longest timeout of a call, in seconds
TIMEOUTS = (0.3, 1.0, 2.0, 5.0, 5.0, 10.0)
RETRY_DELAY = 0.5
#: bytes by which messages are longer
PADDINGS = (0, 0, 0, 0, 0, 0, 0, 0, 0, 40, 500, 4000)
#: messages that a backend sends at once
BURSTS = (1, 1, 2, 4, 12)
#: a backend regards a connection as lost after this time without a byte while it waits for outcomes, in seconds
IDLE_TIMEOUT = 14.0


class Way:
    """One connection of a backend to a node."""

    def __init__(self, backend: str, node_host: str, opened_at: float) -> None:
        self.backend_host = backend
        self.node_host = node_host
        self.opened_at = opened_at
        #: the connection, once it is open
        self.end: ActorEnd | None = None


class Backend:
    """What the kinds of backends have in common."""

    #: messages that are sent at once, on average
    mean_burst = 1.0

    def __init__(
        self,
        name: str,
        *,
        scheduler: Scheduler,
        network: Network,
        ledger: Ledger,
        client_ids: list[str],
        choose_node: Callable[[Random], str],
        on_failure: Callable[[Message, int], None],
        rate: float,
    ) -> None:
        """``rate`` is in messages per second. ``on_failure`` is called with each call that failed with an error of the
        gateway."""
        self.name = name
        self.scheduler = scheduler
        self.ledger = ledger
        self.random = scheduler.make_random(name)
        self.host = f"192.168.251.{int(name.rpartition('-')[2])}"
        self._network = network
        self._client_ids = client_ids
        self._choose_node = choose_node
        self._on_failure = on_failure
        self._rate = rate
        self._is_running = False
        self._way: Way | None = None
        #: what was sent and not answered: id -> number
        self._pending: dict[int, Message] = {}
        self._streams: dict[str, Stream] = {}
        self._connections = 0

    def start(self) -> None:
        self._is_running = True
        self._connect()
        self._schedule()

    def stop(self) -> None:
        """Send nothing more; what is in flight is awaited."""
        self._is_running = False

    def close(self) -> None:
        """Go away."""
        raise NotImplementedError

    def is_waiting(self) -> bool:
        """Whether an outcome is awaited."""
        return bool(self._pending)

    def _schedule(self) -> None:
        if self._is_running:
            self.scheduler.after(self.random.expovariate(self._rate / self.mean_burst), self._tick)

    def _tick(self) -> None:
        if self._is_running:
            self._send_next()
            self._schedule()

    def _send_next(self) -> None:
        raise NotImplementedError

    def _connect(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """Close a connection that seems to be lost."""

    def _stream(self, client_id: str) -> Stream:
        stream = self._streams.get(client_id)
        if stream is None:
            name = f"{self.name} connection {self._connections} to {client_id}"
            stream = self._streams[client_id] = Stream(name)
        return stream

    def _abandon_all(self) -> None:
        for message in self._pending.values():
            self.ledger.abandon(message.number)
        self._pending.clear()

    def handle_response(self, response: dict[str, Any]) -> None:
        """Handle one JSON-RPC response."""
        message = self._pending.pop(response["id"], None)
        if message is None:
            self.ledger.violated("a", f"{self.name} got a response to {response['id']}, which is not in flight")
            return
        number = message.number
        error = response.get("error")
        if error is None:
            result = response["result"]
            if message.is_call and not isinstance(result, dict):
                self.ledger.violated("b", f"call {number} has the result {result}, which is no client's")
            elif message.is_call:
                self.ledger.result(number, result["u"], result["c"])
            else:
                self.ledger.accepted(number)
            return
        data = error.get("data") or {}
        if "u" in data:
            # The client's own error, which only looks like the gateway's.
            self.ledger.result(number, data["u"], data["c"])
            if response.get("gateway"):
                self.ledger.violated("b", f"the client's error of {number} is marked as the gateway's")
            return
        self._error(message, response)

    def _error(self, message: Message, response: dict[str, Any]) -> None:
        """Handle an error of the gateway."""
        if response.get("gateway") is not True:
            self.ledger.violated("b", f"the gateway's error of {message.number} is not marked")
        error = response["error"]
        data = error.get("data") or {}
        self.scheduler.trace(f"{self.name} <- {message.number} failed: {error['code']} {data}")
        self.ledger.failed(message.number, error["code"], data.get("sent"))
        self.message_failed(message, data.get("sent"))
        if not str(data.get("detail", "")).startswith("this node is going away"):
            self._on_failure(message, error["code"])

    def message_failed(self, message: Message, sent: bool | None) -> None:
        """Take note of a message that has failed."""


class WebSocketBackend(Backend):
    """A backend on the WebSocket: many messages at once, in order for each client."""

    _websocket: WebSocket | None = None
    _opening_timer: Event | None = None
    mean_burst = sum(BURSTS) / len(BURSTS)
    #: whether the node is going away: nothing more is sent there
    _is_leaving = False

    def _connect(self) -> None:
        self._connections += 1
        self._streams = {}
        host = self._choose_node(self.random)
        self._is_leaving = False
        self._way = way = Way(self.host, host, self.scheduler.now)
        attempts = self._connections

        def connected(end: ActorEnd) -> None:
            if attempts != self._connections:
                end.close()
                return
            way.end = end
            self._websocket = WebSocket(end, on_response=self._responded, on_text=self._text, on_lost=self._lost)
            end.send(upgrade_request("/v1/backend", f"{host}:8081"))

        def refused() -> None:
            if attempts == self._connections:
                self._reconnect()

        self._network.connect_actor(self.host, (host, 8081), connected, refused)
        self._opening_timer = self.scheduler.after(5.0, self._timed_out)

    def _timed_out(self) -> None:
        if self._websocket is None or not self._websocket.is_open:
            if self._websocket is not None:
                self._websocket.abort()
            self._reconnect()

    def _reconnect(self) -> None:
        self._websocket = None
        self._connections += 1
        if self._opening_timer is not None:
            self._opening_timer.cancel()
        self._abandon_all()
        self.scheduler.after(RETRY_DELAY, self._connect)

    def _responded(self, status: int, headers: dict[str, str]) -> None:
        if self._opening_timer is not None:
            self._opening_timer.cancel()
        if status != 101:
            assert self._websocket is not None
            self._websocket.abort()
            self._reconnect()

    def _lost(self, code: int) -> None:
        self.scheduler.trace(f"{self.name} is closed with {code}")
        self._reconnect()

    def close(self) -> None:
        """Go away, and come back."""
        if self._websocket is not None:
            self.scheduler.trace(f"{self.name} goes away")
            self._websocket.close()
            self._reconnect()

    def reconnect(self) -> None:
        """Close, and connect to another node."""
        self.close()

    def _text(self, payload: bytes) -> None:
        message = decode(payload)
        for item in message if isinstance(message, list) else [message]:
            if item.get("method") == "gateway.goaway":
                # Let what is in flight end here.
                self.scheduler.trace(f"{self.name} <- goaway")
                self._is_leaving = True
                self._leave(self._connections, self.scheduler.now + 3.0)
            elif "method" not in item:
                self.handle_response(item)

    def _leave(self, connection: int, deadline: float) -> None:
        if connection != self._connections:
            return
        if not self._pending or self.scheduler.now > deadline:
            self.close()
        else:
            self.scheduler.after(0.1, self._leave, connection, deadline)

    def check(self) -> None:
        """Close a connection that seems to be lost."""
        websocket = self._websocket
        if websocket is None or not websocket.is_open:
            return
        silence = self.scheduler.now - websocket.last_heard
        if silence > IDLE_TIMEOUT:
            websocket.abort()
            self._lost(1006)
        elif silence > IDLE_TIMEOUT / 2:
            websocket.ping()

    def _send_next(self) -> None:
        if self._websocket is None or not self._websocket.is_open or self._is_leaving:
            return
        # Several at once, so that they overtake each other if they can.
        payloads = [self._encode_next() for _ in range(self.random.choice(BURSTS))]
        self._websocket.send_all(payloads)

    def _encode_next(self) -> bytes:
        random = self.random
        client_id = random.choice(self._client_ids)
        is_call = random.random() < 0.7
        timeout = random.choice(TIMEOUTS)
        needs_response = is_call or random.random() < 0.8
        message = self.ledger.start(
            client_id,
            self._stream(client_id),
            is_call=is_call,
            # The gateway's default applies to notifications.
            timeout=timeout if is_call else 30.0,
            way=self._way,
            expects_outcome=needs_response,
        )
        content = {"u": message.number, "p": "." * random.choice(PADDINGS)}
        params: dict[str, Any] = {"client": client_id, "method": "m", "params": content}
        if is_call:
            params["timeout"] = timeout
        request: dict[str, Any] = {"jsonrpc": "2.0", "method": "client.call" if is_call else "client.notify"}
        if needs_response:
            request["id"] = message.number
            self._pending[message.number] = message
        request["params"] = params
        self.scheduler.trace(f"{self.name} -> {request['method']} {client_id} {message.number}")
        return encode(request)


class HTTPBackend(Backend):
    """A backend that sends one request after the other, over HTTP: each client's messages have one order."""

    _end: ActorEnd | None = None
    _data = b""
    _is_busy = False

    def _connect(self) -> None:
        """Connect with the next request."""
        host = self._choose_node(self.random)
        self._connections += 1
        self._way = way = Way(self.host, host, self.scheduler.now)
        self._data = b""
        self._is_busy = True
        attempt = self._connections

        def connected(end: ActorEnd) -> None:
            if attempt != self._connections:
                end.close()
                return
            self._end = way.end = end
            end.actor = self
            self._is_busy = False

        self._network.connect_actor(self.host, (host, 8081), connected, lambda: self._lost(attempt))
        self.scheduler.after(5.0, lambda: None if self._end is not None else self._lost(attempt))

    def _lost(self, attempt: int) -> None:
        if attempt == self._connections:
            self.connection_lost()

    def check(self) -> None:
        for message in self._pending.values():
            if self.scheduler.now > message.sent_at + message.timeout + 3.0:
                self.close()
                return

    def connection_lost(self) -> None:
        self._end = None
        self._connections += 1
        if self._pending:
            # It may still arrive, after what is sent next.
            self._streams = {}
        self._abandon_all()
        self.scheduler.after(RETRY_DELAY, self._connect)

    def close(self) -> None:
        if self._end is not None:
            self.scheduler.trace(f"{self.name} goes away")
            self._end.close()
            self.connection_lost()

    def _send_next(self) -> None:
        if self._end is None or self._is_busy:
            return
        random = self.random
        client_id = random.choice(self._client_ids)
        is_call = random.random() < 0.7
        timeout = random.choice(TIMEOUTS)
        message = self.ledger.start(
            client_id,
            self._stream(client_id),
            is_call=is_call,
            timeout=timeout if is_call else 30.0,
            way=self._way,
            expects_outcome=True,
        )
        content = {"u": message.number, "p": "." * random.choice(PADDINGS)}
        request: dict[str, Any] = {"jsonrpc": "2.0", "method": "m", "params": content}
        if is_call:
            request["id"] = message.number
        body = encode(request)
        self._pending[message.number] = message
        self._is_busy = True
        assert self._way is not None
        head = (
            f"POST /v1/clients/{client_id}/rpc?timeout={timeout} HTTP/1.1\r\nHost: {self._way.node_host}:8081\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.scheduler.trace(f"{self.name} -> POST {client_id} {message.number}")
        self._end.send(head.encode() + body)

    def message_failed(self, message: Message, sent: bool | None) -> None:
        if sent:
            # It may still arrive, after what is sent next.
            self._streams.pop(message.client_id, None)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        match = _LENGTH.search(head)
        if not end or len(body) < (int(match[1]) if match else 0):
            return
        self._data = b""
        self._is_busy = False
        status = int(head.split(b" ", 2)[1])
        if status == 202:
            ((number, message),) = self._pending.items()
            del self._pending[number]
            self.ledger.accepted(message.number)
            return
        response = decode(body)
        if "jsonrpc" not in response or response.get("id") is None:
            self._refused(status, response)
            return
        self.handle_response(response)

    def _refused(self, status: int, response: dict[str, Any]) -> None:
        ((number, message),) = self._pending.items()
        del self._pending[number]
        error = response.get("error")
        if isinstance(error, dict):
            self._error(message, response)
        else:
            # The node is going away: nothing was sent.
            self.ledger.failed(message.number, -status, False)
