"""Echo servers for the fuzzing client: the client endpoint and sessions of a node, and unchanged Autobahn.

    python -m tests.conformance.echo node|hasty|autobahn

<- PORT                 the port on 127.0.0.1, written to stdout once it listens
-> SIGTERM
<- {"opened": 301, …}   the counters, written to stdout at the end

A gateway is not an echo server. This one differs from a node only where the suite requires it: each connection gets a
client_id of its own, binary messages are echoed too, messages may have 16 MiB, and no client is throttled.

A node parks idle connections; a connection that is woken often stays awake for a while. The hasty node parks it again at
once, so that nearly every frame that the fast path does not handle wakes a parked connection.
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
    """Send each text message back to its sender, in the same way as a call."""

    sessions: ClientSessions

    def __init__(self) -> None:
        self.messages = 0
        #: messages received by parked connections; the suite opens one connection at a time
        self.parked = 0

    def client_connected(self, key: SessionKey) -> None:
        """A client connected."""

    def client_disconnected(self, key: SessionKey) -> None:
        """A client disconnected."""

    def client_superseded(self, key: SessionKey) -> None:
        """A newer connection is open elsewhere."""

    def is_finishing_calls(self, key: SessionKey) -> bool:
        """No client is asked to move."""
        return False

    def message_received(self, client_id: str, generation: int, payload: bytes) -> int:
        """A client sent a text message."""
        self.messages += 1
        self.parked += self.sessions.parked_count()
        self.sessions.send(client_id, payload, generation)
        return 1


class BinaryEcho:
    """Mixin before the client protocol: handle and echo binary messages, which it would refuse, like text."""

    _binary = False

    def onMessageBegin(self, isBinary: bool) -> None:
        """A message begins."""
        self._binary = isBinary
        super().onMessageBegin(False)  # type: ignore[misc]

    def text_received(self, payload: bytes) -> None:
        """A message is complete."""
        binary, self._binary = self._binary, False
        if binary:
            self.sendMessage(payload, isBinary=True)  # type: ignore[attr-defined]
        else:
            super().text_received(payload)  # type: ignore[misc]


class EchoFactory(ClientFactory):
    """Client factory that assigns the client_ids."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.protocol = type("EchoProtocol", (BinaryEcho, self.protocol), {})
        self._numbers = itertools.count(1)

    def authenticate(self, request: HandshakeRequest) -> str:
        """Return a new client_id for each connection."""
        return f"case-{next(self._numbers)}"


def settings() -> Settings:
    """Return the settings of the echo node."""
    return make_settings(
        {
            "max-message-size": str(MAX_MESSAGE_SIZE),
            "openings-per-address": "0",
            "messages-per-client": "0",
            "auth": ("none",),
        }
    )


class EchoNode:
    """The client endpoint and sessions of a node, with a registry in memory."""

    def __init__(self, reactor: Any) -> None:
        self.metrics = Metrics()
        self.registry = MemoryRegistry(reactor, LEASE)
        self.handler = EchoHandler()
        config = settings()
        cork = Cork(reactor.seconds)
        self.sessions = self.handler.sessions = ClientSessions(
            registry=self.registry,
            clock=reactor,
            settings=config,
            metrics=self.metrics,
            make_handler=lambda sessions: self.handler,
            unready_reason=lambda: "",
            parking=ParkingOptions(reactor, cork, lambda unparked: self.factory.wake(unparked)),
        )
        self.factory = EchoFactory(
            sessions=self.sessions,
            authenticator=AuthenticatorChain(config.auth),
            settings=config,
            metrics=self.metrics,
            reactor=reactor,
            cork=cork,
        )

    async def start(self) -> ServerFactory:
        """Start; return the factory to listen with."""
        await self.registry.open()
        await self.registry.join(NodeInfo("echo", "echo", "", "", 0))
        self.sessions.start()
        return self.factory

    def counted(self) -> dict[str, Any]:
        """Return the counters."""
        names = ("opened", "woken", "refused", "slow_readers", "paused_clients", "closed")
        return {
            "texts": self.handler.messages,
            "texts_while_parked": self.handler.parked,
            **{name: getattr(self.metrics, name) for name in names},
        }


class HastyNode(EchoNode):
    """A node that parks a connection again in the same reactor iteration."""

    def __init__(self, reactor: Any) -> None:
        assert table.BUSY_WINDOW  # type: ignore[attr-defined]
        table.BUSY_WINDOW = 0.0  # type: ignore[attr-defined]
        super().__init__(reactor)


class AutobahnEcho(WebSocketServerProtocol):  # type: ignore[misc]
    """Autobahn with its defaults, except ``failByDrop``, which would prevent most close codes from being sent."""

    def onOpen(self) -> None:
        """A connection is open."""
        self.factory.opened += 1

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """A message was received."""
        self.sendMessage(payload, isBinary)


class AutobahnNode:
    """The reference server."""

    def __init__(self, reactor: Any) -> None:
        self.factory = WebSocketServerFactory(reactor=reactor)
        self.factory.protocol = AutobahnEcho
        self.factory.opened = 0
        self.factory.setProtocolOptions(failByDrop=False)

    async def start(self) -> ServerFactory:
        """Start; return the factory to listen with."""
        factory: ServerFactory = self.factory
        return factory

    def counted(self) -> dict[str, Any]:
        """Return the counters."""
        return {"opened": self.factory.opened}


def print_line(line: str) -> None:
    """Write a line to stdout, for the process that started this one."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def serve(node: EchoNode | AutobahnNode, reactor: Any) -> None:
    """Listen, and print the port."""
    listening: Deferred[IListeningPort] = serverFromString(reactor, ENDPOINT).listen(await node.start())
    port: Any = (await listening).getHost()
    print_line(str(port.port))


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
    print_line(json.dumps(node.counted()))


if __name__ == "__main__":
    main()
