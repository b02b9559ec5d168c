"""One script, played to the same edge in several ways: what comes out must not depend on the way.

    PARKED      each connection is parked again as soon as it can be, before nearly every segment
    LINGERING   the same with the node's own patience for connections that are busy
    AWAKE       nothing is parked; whole frames take the fast lane of an awake connection
    STOCK       nothing is parked, and Autobahn reads every byte

The sockets are real, the reactor is Twisted's own, turned by hand, and the clock stands still until the script moves
it. A script is a list of steps, each the name of a method of :class:`Stage` and its arguments. Before each step, and at
the end, everything has come to rest: only bytes that are said in several segments may meet the server half-way.
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

from gateway.auth.authenticator import Authenticators
from gateway.clients.endpoint import ClientFactory
from gateway.clients.sessions import Edge
from gateway.metrics import Metrics
from gateway.util.cork import Turn
from tests.edge.fakes import FakeHandler, FakeRegistry, request, settings_of
from tests.edge.hand_turned import HandTurned, Peer, whole_frames

PARKED, LINGERING, AWAKE, STOCK = "parked", "lingering", "awake", "stock"
ALL_WAYS = (PARKED, LINGERING, AWAKE, STOCK)
#: what a message that has the handler send something large is answered with
LARGE = b"L" * 40_000
#: no kernel takes so much at once from a socket whose buffer is small
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


class Reacting(FakeHandler):
    """Notes what it is told, and when; and does what a message that begins with ``!`` says."""

    edge: Edge
    reactor: HandTurned

    def _note(self, *what: Any) -> None:
        self.seen.append((self.reactor.seconds() - 1_000_000, *what))

    def client_connected(self, client_id: str, generation: int) -> None:
        self._note("connected", client_id, generation)

    def client_disconnected(self, client_id: str, generation: int) -> None:
        self._note("disconnected", client_id, generation)

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        self._note("message", client_id, generation, payload)
        if payload[:1] == b"!":
            return self._do(client_id, generation, payload)
        return 1

    def _send(self, client_id: str, payload: bytes, generation: int = 0) -> None:
        self._note("sent", client_id, self.edge.send(client_id, payload, generation))

    def _do(self, client_id: str, generation: int, payload: bytes) -> int:
        edge, letter = self.edge, payload[1:2]
        for one in ANSWERS.get(letter, ()):
            self._send(client_id, one or payload, generation)
        if letter == b"l":
            self._send(client_id, b"last")
        if letter in (b"c", b"l"):
            edge.close(client_id, 4003, "as it was told")
            self._send(client_id, b"too late")
        elif letter == b"x":
            raise ZeroDivisionError("boom")
        elif letter == b"g":
            self._send(client_id, payload, generation + 1)
        elif letter == b"o":
            self._send("b", payload)
        elif letter == b"O":
            edge.close("b", 4003, "as a was told")
        return {b"0": 0, b"5": 5, b"-": -3, b"w": 0, b"W": -3}.get(letter, 1)


class Stage:
    """A node without a process: an edge, its listener's factory, and the clients that a script speaks of."""

    def __init__(self, way: str, kind: str, send_size: int, **options: Any) -> None:
        """``kind`` is ``tcp`` or ``unix``; ``send_size`` is the size of the server's socket buffers, 0 for the
        system's."""
        self._way = way
        self._kind = kind
        self._send_size = send_size
        self.reactor = HandTurned()
        self.metrics = Metrics()
        self.registry = FakeRegistry()
        self.handler = Reacting()
        settings = settings_of(**options)
        self.turn = Turn(self.reactor.seconds)
        self.edge = Edge(self.registry, self.reactor, settings, self.metrics, self.handler, lambda: "")
        self.handler.edge, self.handler.reactor = self.edge, self.reactor
        self.factory = ClientFactory(
            edge=self.edge,
            authenticators=Authenticators(("none",)),
            settings=settings,
            metrics=self.metrics,
            reactor=self.reactor,
            turn=self.turn,
        )
        if way == STOCK:
            self.factory.protocol.fast_lane = lambda self, data: data
            self.factory.protocol.awaits_rest = lambda self: False
        if way in (PARKED, LINGERING):
            self.edge.park_on(self.reactor, self.factory.wake, self.turn)
        self.edge.start()
        self.peers: list[Peer] = []
        self._number = 0
        self.parked_at_rest = 0
        #: the names of the server's ends, and how many of them are open when all is over
        self._sockets: set[str] = set()
        self.open_sockets = 0
        #: what was to be seen at each rest
        self.rests: list[Any] = []

    # Connections.

    def dial(self, client_id: str) -> Peer:
        """A client whose opening handshake is sent."""
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
        peer = Peer(far)
        peer.meets(near)
        self._sockets.add(os.readlink(f"/proc/self/fd/{near.fileno()}"))
        self.peers.append(peer)
        protocol.makeConnection(transport)
        peer.say(request(f"/v1/connect?client_id={client_id}"))
        return peer

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        if self._kind == "unix":
            return socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            return listener.accept()[0], far

    @property
    def peer(self) -> Peer:
        """The client ``a``."""
        return self.peers[-1]

    # Rest.

    def rest(self) -> None:
        """Turn until nothing more happens."""
        for _ in range(10_000):
            # Asked first: what has arrived by then is found in this turn.
            arrived = not any(peer.under_way() for peer in self.peers)
            moved = self.reactor.turn()
            for peer in self.peers:
                while peer.work():
                    moved = True
            if not moved and not arrived:
                time.sleep(0.0001)
            elif not moved and not self._look_for_quiet():
                break
        else:
            raise AssertionError("it does not come to rest")
        self.parked_at_rest += self.edge.parked()
        self.rests.append(
            (
                [
                    (None if peer.choked or peer.blurred else len(peer.received), bool(peer.ending))
                    for peer in self.peers
                ],
                [(self._presence(one), self.edge.generation(one)) for one in ("a", "b")],
                sorted(self.edge.client_ids()),
                len(self.handler.seen),
            )
        )

    def _presence(self, client_id: str) -> Any:
        presence = self.edge.get(client_id)
        if presence is None:
            return None
        # The port is another one each time.
        whose = [number for number, peer in enumerate(self.peers) if peer.address == presence.address]
        return attrs.evolve(presence, address=f"that of peer {whose}")

    def _look_for_quiet(self) -> bool:
        """Have everybody parked that can be parked, without waiting for it; whether that was anybody."""
        if self._way != PARKED:
            return False
        before = self.edge.parked()
        table = self.edge._table
        for client in table.awake.values():
            client.linger = 0.0
            table._quiet.watch(client)
        self.reactor.turn()
        return self.edge.parked() > before

    # Steps.

    def say(self, segments: list[bytes], turns: int | None = None) -> None:
        """The client sends segments, and after each the server has so many turns, or all that it can use."""
        for segment in segments:
            self.peer.say(segment)
            if turns is None:
                self.rest()
            for _ in range(turns or 0):
                self.reactor.turn()

    def send(self, sizes: list[int], in_turn: bool) -> None:
        """The server sends messages, in a turn of their own or each for itself."""
        begun = in_turn and self.turn.begin()
        for size in sizes:
            self._number += 1
            self.edge.send("a", b"%d:" % self._number + b"x" * size)
        if begun:
            self.turn.end()

    def close(self, code: int, reason: str) -> None:
        """The server closes."""
        self.edge.close("a", code, reason)

    def choke(self) -> None:
        """The client reads nothing."""
        self.peer.choked = True

    def unchoke(self) -> None:
        """The client reads again."""
        self.peer.choked = False

    def answer(self) -> None:
        """The client answers the server's close frame, if it has come."""
        self.peer.answer()

    def half(self) -> None:
        """The client sends no more."""
        self.peer.blurred |= self.peer.choked or self._paused()
        self.peer.half_close()

    def reset(self) -> None:
        """The client's process dies, when all that it said is read."""
        self._await_resumption()
        self.peer.blurred |= self.peer.choked
        self.peer.reset()

    def last_words(self, data: bytes, how: str) -> None:
        """The client speaks, and ends the connection by ``half`` or ``reset`` at once."""
        # What the server has not yet written when it reads the end is lost, and that depends on the turn.
        self.peer.blurred = self.peer.hasty = True
        self.peer.say(data)
        getattr(self, how)()

    def again(self) -> None:
        """The client connects once more."""
        self.peer.choked = False
        self.dial("a")

    def advance(self, seconds: float) -> None:
        """Time passes, from timer to timer."""
        self.peer.blurred |= self.peer.choked
        end = self.reactor.now + seconds
        while (due := self.reactor.due()) <= end:
            self.reactor.now = max(due, self.reactor.now)
            self.rest()
            self.rests.pop()
        self.reactor.now = end

    def _paused(self) -> bool:
        return any(client.paused for client in self.edge._table.awake.values())

    def _await_resumption(self) -> None:
        """Let time pass until what a client that sent too much has said is read."""
        while self._paused():
            self.advance(1)

    # A whole play.

    def play(self, script: list[Step]) -> None:
        """Play the script, and to the end of all connections."""
        self.dial("b")
        self.rest()
        self.dial("a")
        self.rest()
        for name, *arguments in script:
            speaker = self.peer
            getattr(self, name)(*arguments)
            self.rest()
            speaker.hasty |= name == "say" and bool(speaker.ending)
        self.unchoke()
        self.rest()
        self._await_resumption()
        for peer in self.peers:
            peer.half_close()
        self.rest()
        for _ in range(100):
            if all(peer.ending for peer in self.peers):
                break
            self.advance(10)

    def frames_of_a(self) -> list[tuple[int, bytes]]:
        """What the client ``a`` received after the opening handshake."""
        return whole_frames(bytes(self.peer.received).partition(b"\r\n\r\n")[2])

    def outcome(self) -> dict[str, Any]:
        """Everything that came out."""
        metrics = self.metrics
        return {
            "received": [bytes(peer.received) for peer in self.peers],
            "endings": [peer.how_it_ended for peer in self.peers],
            "handler": self.handler.seen,
            "rests": self.rests,
            "metrics": {
                name: getattr(metrics, name)
                for name in ("opened", "closed", "replaced", "slow_readers", "paused_clients", "ping_timeouts")
            },
            "released": self.registry.released,
            "left": (self.edge.count(), self.factory.countConnections, self.open_sockets),
        }

    def dispose(self) -> None:
        """Close what is left."""
        self.open_sockets = len(self._sockets & open_sockets())
        self.edge.stop()
        self.reactor.dispose()
        for peer in self.peers:
            peer.reset()


def open_sockets() -> set[str]:
    """The sockets of this process, by name."""
    links = set()
    for name in os.listdir("/proc/self/fd"):
        # One of them was that of the folder itself.
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/self/fd/{name}"))
    return links


def play(way: str, script: list[Step], kind: str = "unix", send_size: int = 0, **options: Any) -> Stage:
    """Play a script in one way."""
    busy = 0.0 if way == PARKED else 1.0
    with mock.patch("gateway.clients.table.BUSY", busy):
        stage = Stage(way, kind, send_size, **options)
        try:
            stage.play(script)
        finally:
            stage.dispose()
    return stage
