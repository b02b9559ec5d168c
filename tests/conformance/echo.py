"""What the fuzzing client talks to: an edge that echoes, and stock Autobahn that does the same.

    python -m tests.conformance.echo node|hasty|autobahn

<- PORT                 the port on 127.0.0.1, as soon as it listens; on stdout, as is
-> SIGTERM
<- {"opened": 301, …}   what was counted, as it ends

A gateway is no echo server. Where its rules differ by design this one gives way, and nowhere else: a connection is a
client of its own without saying so, binary messages are echoed too, a message may have 16 MiB, and nobody is slowed down.

A node parks connections that are quiet; one that is woken while it is busy it leaves awake for a while. A hasty one
parks it at once, so that about every frame of the suite that is not for the fast lane goes over the seam and back.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import ServerFactory
from zope.interface import implementer

from gateway.auth.authenticator import AuthenticatorChain
from gateway.clients import table
from gateway.clients.endpoint import ClientFactory
from gateway.clients.interface import IClientHandler
from gateway.clients.sessions import ClientSessions
from gateway.clients.table import ParkingOptions
from gateway.metrics import Metrics
from gateway.protocol.handshake import HandshakeRequest
from gateway.registry.interface import NodeInfo, SessionKey
from gateway.registry.memory import MemoryRegistry
from gateway.settings import Settings, make_settings
from gateway.util.cork import Cork

#: the largest message of the cases 9.*, in bytes
MAX_MESSAGE_SIZE = 16 * 1024 * 1024
#: There is no heartbeat: the lease is longer than any run, in seconds.
LEASE = 86400.0
ENDPOINT = "tcp:0:interface=127.0.0.1:backlog=4096"


@implementer(IClientHandler)
class EchoHandler:
    """Sends each text message back to whoever sent it, as a call is sent."""

    sessions: ClientSessions

    def __init__(self) -> None:
        self.messages = 0
        #: those of parked connections: the suite has no more than one connection at a time
        self.parked = 0

    def client_connected(self, key: SessionKey) -> None:
        """A client came."""

    def client_disconnected(self, key: SessionKey) -> None:
        """A client went."""

    def client_superseded(self, key: SessionKey) -> None:
        """A newer connection is open elsewhere."""

    def is_finishing_calls(self, key: SessionKey) -> bool:
        """Nobody is told to go."""
        return False

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        """A client sent a text message."""
        self.messages += 1
        self.parked += self.sessions.parked_count()
        self.sessions.send(client_id, payload, generation)
        return 1


class BinaryEcho:
    """Goes before the protocol of a client: binary messages, which it would refuse, are read as text is and echoed."""

    _binary = False

    def onMessageBegin(self, isBinary: bool) -> None:
        """A message begins."""
        self._binary = isBinary
        super().onMessageBegin(False)  # type: ignore[misc]

    def text_received(self, payload: bytes) -> None:
        """A message is whole."""
        binary, self._binary = self._binary, False
        if binary:
            self.sendMessage(payload, isBinary=True)  # type: ignore[attr-defined]
        else:
            super().text_received(payload)  # type: ignore[misc]


class EchoFactory(ClientFactory):
    """Listens for clients whom it names itself."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.protocol = type("EchoProtocol", (BinaryEcho, self.protocol), {})
        self._numbers = itertools.count(1)

    def authenticate(self, request: HandshakeRequest) -> str:
        """Another client each time."""
        return f"case-{next(self._numbers)}"


def settings() -> Settings:
    """What the edge runs with."""
    return make_settings(
        {
            "max-message-size": str(MAX_MESSAGE_SIZE),
            "openings-per-address": "0",
            "messages-per-client": "0",
            "auth": ("none",),
        }
    )


class EchoNode:
    """The edge of a node, on a registry in memory."""

    def __init__(self, reactor: Any) -> None:
        self.metrics = Metrics()
        self.registry = MemoryRegistry(reactor, LEASE)
        self.handler = EchoHandler()
        given = settings()
        turn = Cork(reactor.seconds)
        self.sessions = self.handler.sessions = ClientSessions(
            registry=self.registry,
            clock=reactor,
            settings=given,
            metrics=self.metrics,
            make_handler=lambda sessions: self.handler,
            unready_reason=lambda: "",
            parking=ParkingOptions(reactor, turn, lambda unparked: self.factory.wake(unparked)),
        )
        self.factory = EchoFactory(
            sessions=self.sessions,
            authenticator=AuthenticatorChain(given.auth),
            settings=given,
            metrics=self.metrics,
            reactor=reactor,
            cork=turn,
        )

    async def start(self) -> ServerFactory:
        """Begin; the factory is to be listened with."""
        await self.registry.open()
        await self.registry.join(NodeInfo("echo", "echo", "", "", 0))
        self.sessions.start()
        return self.factory

    def counted(self) -> dict[str, Any]:
        """What came to pass."""
        names = ("opened", "woken", "refused", "slow_readers", "paused_clients", "closed")
        return {
            "texts": self.handler.messages,
            "texts_while_parked": self.handler.parked,
            **{name: getattr(self.metrics, name) for name in names},
        }


class HastyNode(EchoNode):
    """One that parks again in the very turn in which a connection is quiet."""

    def __init__(self, reactor: Any) -> None:
        assert table.BUSY_WINDOW  # type: ignore[attr-defined]
        table.BUSY_WINDOW = 0.0  # type: ignore[attr-defined]
        super().__init__(reactor)


class AutobahnEcho(WebSocketServerProtocol):  # type: ignore[misc]
    """Autobahn as it is, but for ``failByDrop``, which would keep most close codes from being sent."""

    def onOpen(self) -> None:
        """A connection is open."""
        self.factory.opened += 1

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """A message came."""
        self.sendMessage(payload, isBinary)


class AutobahnNode:
    """The server that the node is compared with."""

    def __init__(self, reactor: Any) -> None:
        self.factory = WebSocketServerFactory(reactor=reactor)
        self.factory.protocol = AutobahnEcho
        self.factory.opened = 0
        self.factory.setProtocolOptions(failByDrop=False)

    async def start(self) -> ServerFactory:
        """Begin; the factory is to be listened with."""
        factory: ServerFactory = self.factory
        return factory

    def counted(self) -> dict[str, Any]:
        """What came to pass."""
        return {"opened": self.factory.opened}


def say(line: str) -> None:
    """Tell whoever started this."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def serve(node: EchoNode | AutobahnNode, reactor: Any) -> None:
    """Listen, and say where."""
    listening: Deferred[IListeningPort] = serverFromString(reactor, ENDPOINT).listen(await node.start())
    port: Any = (await listening).getHost()
    say(str(port.port))


def main() -> None:
    """Run until SIGTERM."""
    from twisted.internet import reactor

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=["node", "hasty", "autobahn"])
    kinds: dict[str, type[EchoNode | AutobahnNode]] = {"node": EchoNode, "hasty": HastyNode, "autobahn": AutobahnNode}
    node = kinds[parser.parse_args().server](reactor)

    def failed(failure: Any) -> None:
        failure.printTraceback()
        reactor.stop()

    reactor.callWhenRunning(lambda: Deferred.fromCoroutine(serve(node, reactor)).addErrback(failed))
    reactor.run()
    say(json.dumps(node.counted()))


if __name__ == "__main__":
    main()
