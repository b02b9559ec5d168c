"""Play one script to the same client sessions in several modes: the result must not depend on the mode.

    PARKED          each session is parked again as soon as possible, before nearly every segment
    PARKED_LATER    the same with the node's own delay for busy sessions
    AWAKE           nothing is parked; complete frames take the fast path of an awake connection
    AUTOBAHN        nothing is parked, and Autobahn reads every byte

The sockets are real, the reactor is Twisted's own and run by the test, and the clock stands still until the script
advances it. A script is a list of steps, each the name of a method of :class:`ScriptedNode` and its arguments. Before
each step, and at the end, everything is idle: only bytes that are sent in several segments may still be on their way.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Any
from unittest import mock

import attrs
from twisted.internet import tcp, unix
from twisted.internet.address import IPv4Address, UNIXAddress

from gateway.auth.authenticator import AuthenticatorChain
from gateway.clients.endpoint import ClientFactory
from gateway.clients.sessions import ClientSessions
from gateway.clients.table import ParkingOptions
from gateway.metrics import Metrics
from gateway.registry.interface import SessionKey
from gateway.util.cork import Cork
from tests.builders.frames import build_request
from tests.fakes.clients import FakeHandler, FakeRegistry, build_settings
from tests.fakes.reactor import ManualReactor, SocketClient, complete_frames

PARKED, PARKED_LATER, AWAKE, AUTOBAHN = "parked", "lingering", "awake", "stock"
ALL_MODES = (PARKED, PARKED_LATER, AWAKE, AUTOBAHN)
#: response to a message that makes the handler send something large
LARGE = b"L" * 40_000
#: more than any kernel accepts at once from a socket with a small buffer
HUGE = b"H" * 150_000
#: what a message that begins so is answered with; empty for the message itself
ANSWERS = {
    b"e": (b"",),
    b"2": (b"", b"again"),
    b"s": (b"s", LARGE, b"s"),
    b"h": (b"s", HUGE, b"s"),
    b"w": (HUGE,),
    b"W": (HUGE,),
}

Step = tuple[Any, ...]


class ScriptedHandler(FakeHandler):
    """Records events with their times, and executes messages that begin with ``!``."""

    sessions: ClientSessions
    reactor: ManualReactor

    def _record(self, *event: Any) -> None:
        self.events.append((self.reactor.seconds() - 1_000_000, *event))

    def client_connected(self, key: SessionKey) -> None:
        self._record("connected", *key)

    def client_disconnected(self, key: SessionKey) -> None:
        self._record("disconnected", *key)

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        self._record("message", client_id, generation, payload)
        if payload[:1] == b"!":
            return self._run_command(client_id, generation, payload)
        return 1

    def _send(self, client_id: str, payload: bytes, generation: int = 0) -> None:
        self._record("sent", client_id, self.sessions.send(client_id, payload, generation))

    def _run_command(self, client_id: str, generation: int, payload: bytes) -> int:
        sessions, letter = self.sessions, payload[1:2]
        for response in ANSWERS.get(letter, ()):
            self._send(client_id, response or payload, generation)
        if letter == b"l":
            self._send(client_id, b"last")
        if letter in (b"c", b"l"):
            sessions.close(client_id, 4003, "as requested")
            self._send(client_id, b"too late")
        elif letter == b"x":
            raise ZeroDivisionError("boom")
        elif letter == b"g":
            self._send(client_id, payload, generation + 1)
        elif letter == b"o":
            self._send("b", payload)
        elif letter == b"O":
            sessions.close("b", 4003, "as requested by a")
        return {b"0": 0, b"5": 5, b"-": -3, b"w": 0, b"W": -3}.get(letter, 1)


class ScriptedNode:
    """A node without a process: client sessions, their factory, and the clients of a script."""

    def __init__(self, mode: str, kind: str, send_size: int, **options: Any) -> None:
        """``kind`` is ``tcp`` or ``unix``; ``send_size`` is the size of the server's socket buffers, 0 for the system's
        default."""
        self._mode = mode
        self._kind = kind
        self._send_size = send_size
        self.reactor = ManualReactor()
        self.metrics = Metrics()
        self.registry = FakeRegistry()
        self.handler = ScriptedHandler()
        settings = build_settings(**options)
        self.cork = Cork(self.reactor.seconds)
        parking = ParkingOptions(self.reactor, self.cork, lambda unparked: self.factory.wake(unparked))
        self.sessions = ClientSessions(
            *(self.registry, self.reactor, settings, self.metrics, lambda _: self.handler, lambda: ""),
            parking=parking if mode in (PARKED, PARKED_LATER) else None,
        )
        self.handler.sessions, self.handler.reactor = self.sessions, self.reactor
        self.factory = ClientFactory(
            sessions=self.sessions,
            authenticator=AuthenticatorChain(("none",)),
            settings=settings,
            metrics=self.metrics,
            reactor=self.reactor,
            cork=self.cork,
        )
        if mode == AUTOBAHN:
            self.factory.protocol.process_fast = lambda self, data: data
            self.factory.protocol.has_partial_frame = lambda self: False
        self.sessions.start()
        self.peers: list[SocketClient] = []
        self._message_number = 0
        self.parked_at_rest = 0
        #: names of the server's sockets, and how many of them are open at the end
        self._sockets: set[str] = set()
        self.open_sockets = 0
        #: observable state at each pause
        self.snapshots: list[Any] = []

    # Connections.

    def dial(self, client_id: str) -> SocketClient:
        """Open a connection and send the opening handshake."""
        near, far = self._pair()
        near.setblocking(False)
        if self._send_size:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_size)
        if self._kind == "unix":
            protocol = self.factory.buildProtocol(UNIXAddress(None))
            transport: Any = unix.Server(near, protocol, "", None, 0, self.reactor)
        else:
            host, port = near.getpeername()
            protocol = self.factory.buildProtocol(IPv4Address("TCP", host, port))
            transport = tcp.Server(near, protocol, (host, port), None, 0, self.reactor)
        transport.repstr = "a connection"
        peer = SocketClient(far)
        peer.set_server_end(near)
        self._sockets.add(os.readlink(f"/proc/self/fd/{near.fileno()}"))
        self.peers.append(peer)
        protocol.makeConnection(transport)
        peer.send(build_request(f"/v1/connect?client_id={client_id}"))
        return peer

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        if self._kind == "unix":
            return socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            return listener.accept()[0], far

    @property
    def peer(self) -> SocketClient:
        """The client ``a``."""
        return self.peers[-1]

    # Waiting.

    def settle_down(self) -> None:
        """Run the reactor until nothing happens any more."""
        for _ in range(10_000):
            # First: what has arrived by now is handled in this iteration.
            arrived = not any(peer.has_bytes_in_flight() for peer in self.peers)
            moved = self.reactor.run_once()
            for peer in self.peers:
                while peer.pump():
                    moved = True
            if not moved and not arrived:
                time.sleep(0.0001)
            elif not moved and not self._park_idle():
                break
        else:
            raise AssertionError("the node does not become idle")
        self.parked_at_rest += self.sessions.parked_count()
        self.snapshots.append(
            (
                [
                    (
                        None if peer.reading_stopped or peer.received_is_uncertain else len(peer.received),
                        bool(peer.how_closed),
                    )
                    for peer in self.peers
                ],
                [(self._session_info(client_id), self.sessions.generation(client_id)) for client_id in ("a", "b")],
                sorted(self.sessions.client_ids()),
                len(self.handler.events),
            )
        )

    def _session_info(self, client_id: str) -> Any:
        info = self.sessions.get(client_id)
        if info is None:
            return None
        # The port differs in each run.
        numbers = [number for number, peer in enumerate(self.peers) if peer.address == info.address]
        return attrs.evolve(info, address=f"of peer {numbers}")

    def _park_idle(self) -> bool:
        """Park all sessions that can be parked, without waiting. Returns whether there were any."""
        if self._mode != PARKED:
            return False
        before = self.sessions.parked_count()
        table = self.sessions._table
        for session in table.awake.values():
            session.idle_before_park = 0.0
            table._idle_detector.watch(session)
        self.reactor.run_once()
        return self.sessions.parked_count() > before

    # Steps.

    def say(self, segments: list[bytes], turns: int | None = None) -> None:
        """The client sends segments. After each, the server has that many iterations, or as many as it can use."""
        for segment in segments:
            self.peer.send(segment)
            if turns is None:
                self.settle_down()
            for _ in range(turns or 0):
                self.reactor.run_once()

    def send(self, sizes: list[int], in_turn: bool) -> None:
        """The server sends messages, all in one iteration or each in its own."""
        corked = in_turn and self.cork.cork()
        for size in sizes:
            self._message_number += 1
            self.sessions.send("a", b"%d:" % self._message_number + b"x" * size)
        if corked:
            self.cork.uncork()

    def close(self, code: int, reason: str) -> None:
        """The server closes the connection."""
        self.sessions.close("a", code, reason)

    def choke(self) -> None:
        """The client stops reading."""
        self.peer.reading_stopped = True

    def unchoke(self) -> None:
        """The client reads again."""
        self.peer.reading_stopped = False

    def answer(self) -> None:
        """The client answers the server's close frame, if it has arrived."""
        self.peer.answer_close()

    def half(self) -> None:
        """The client closes its sending side."""
        self.peer.received_is_uncertain |= self.peer.reading_stopped or self._paused()
        self.peer.half_close()

    def reset(self) -> None:
        """The client resets the connection after all that it sent was read."""
        self._wait_until_resumed()
        self.peer.received_is_uncertain |= self.peer.reading_stopped
        self.peer.reset()

    def last_words(self, data: bytes, how: str) -> None:
        """The client sends bytes, and ends the connection by ``half`` or ``reset`` at once."""
        # What the server has not written when it reads the end is lost; how much depends on the iteration.
        self.peer.received_is_uncertain = self.peer.close_is_uncertain = True
        self.peer.send(data)
        getattr(self, how)()

    def again(self) -> None:
        """The client connects again."""
        self.peer.reading_stopped = False
        self.dial("a")

    def advance(self, seconds: float) -> None:
        """Advance the clock, from timer to timer."""
        self.peer.received_is_uncertain |= self.peer.reading_stopped
        end = self.reactor.current_time + seconds
        while (due := self.reactor.next_call_at()) <= end:
            self.reactor.current_time = max(due, self.reactor.current_time)
            self.settle_down()
            self.snapshots.pop()
        self.reactor.current_time = end

    def _paused(self) -> bool:
        return any(session.paused for session in self.sessions._table.awake.values())

    def _wait_until_resumed(self) -> None:
        """Advance the clock until everything is read that a throttled client has sent."""
        while self._paused():
            self.advance(1)

    # The whole script.

    def play(self, script: list[Step]) -> None:
        """Play the script until all connections have ended."""
        self.dial("b")
        self.settle_down()
        self.dial("a")
        self.settle_down()
        for name, *arguments in script:
            peer = self.peer
            getattr(self, name)(*arguments)
            self.settle_down()
            peer.close_is_uncertain |= name == "say" and bool(peer.how_closed)
        self.unchoke()
        self.settle_down()
        self._wait_until_resumed()
        for peer in self.peers:
            peer.half_close()
        self.settle_down()
        for _ in range(100):
            if all(peer.how_closed for peer in self.peers):
                break
            self.advance(10)

    def frames_of_a(self) -> list[tuple[int, bytes]]:
        """Return what the client ``a`` received after the opening handshake."""
        return complete_frames(bytes(self.peer.received).partition(b"\r\n\r\n")[2])

    def outcome(self) -> dict[str, Any]:
        """Return everything that can be observed."""
        metrics = self.metrics
        return {
            "received": [bytes(peer.received) for peer in self.peers],
            "endings": [peer.comparable_close for peer in self.peers],
            "handler": self.handler.events,
            "rests": self.snapshots,
            "metrics": {
                name: getattr(metrics, name)
                for name in ("opened", "closed", "replaced", "slow_readers", "paused_clients", "ping_timeouts")
            },
            "released": self.registry.released,
            "left": (self.sessions.count(), self.factory.countConnections, self.open_sockets),
        }

    def dispose(self) -> None:
        """Close what is left."""
        self.open_sockets = len(self._sockets & open_sockets())
        self.sessions.stop()
        self.reactor.dispose()
        for peer in self.peers:
            peer.reset()


def open_sockets() -> set[str]:
    """Return the sockets of this process, by name."""
    links = set()
    for name in os.listdir("/proc/self/fd"):
        # One of them was the file descriptor of the directory itself.
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/self/fd/{name}"))
    return links


def play_script(mode: str, script: list[Step], kind: str = "unix", send_size: int = 0, **options: Any) -> ScriptedNode:
    """Play a script in one mode."""
    busy = 0.0 if mode == PARKED else 1.0
    with mock.patch("gateway.clients.table.BUSY_WINDOW", busy):
        stage = ScriptedNode(mode, kind, send_size, **options)
        try:
            stage.play(script)
        finally:
            stage.dispose()
    return stage
