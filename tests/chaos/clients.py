"""A process with many clients. Each answers calls with its own id, after the number of seconds in the call, and
records the calls that it received.

Commands are lines on standard input, responses lines of JSON on standard output:

    -> {"clients": [...], "nodes": [[host, port], ...], "backoff": [0.5, 4.0], "idle": 5.0}      first; all connect
    -> stat
    <- {"connected": 500, "ended": 12, "stopped": 0, "received": [[call number, client], ...]}    since the last stat

The process exits at the end of its input.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.stdio import StandardIO
from twisted.internet.task import deferLater
from twisted.protocols.basic import LineReceiver

from gateway.agent import Agent

#: stands for any node, as a DNS name with the addresses of all nodes does
ANY_NODE_URL = "ws://anywhere.invalid"
#: seconds
OPEN_TIMEOUT = 3.0


class Client:
    """One client, which reconnects to any node but the last one."""

    def __init__(self, client_id: str, order: dict[str, Any], received: list[tuple[int, str]]) -> None:
        self.client_id = client_id
        self.connections = 0
        self.stopped = False
        self._nodes: list[tuple[str, int]] = [(host, port) for host, port in order["nodes"]]
        self._last: tuple[str, int] | None = None
        self._received = received
        self.agent = Agent(
            ANY_NODE_URL,
            reactor=reactor,
            client_id=client_id,
            methods={"whoami": self._whoami},
            on_connected=self._connected,
            backoff=tuple(order["backoff"]),
            idle_timeout=order["idle"],
            open_timeout=OPEN_TIMEOUT,
            connect=self._endpoint,
        )
        self.agent.whenStopped().addCallback(self._on_stopped)
        self.agent.start()

    def _whoami(self, params: Any) -> Deferred[str]:
        number, seconds = params
        self._received.append((number, self.client_id))
        return deferLater(reactor, seconds, lambda: self.client_id) if seconds else succeed(self.client_id)

    def _connected(self, agent: Agent) -> None:
        self.connections += 1

    def _on_stopped(self, stopped: object) -> None:
        self.stopped = True

    def _endpoint(self, url: str) -> TCP4ClientEndpoint:
        if url.startswith(ANY_NODE_URL):
            others = [node for node in self._nodes if node != self._last] or self._nodes
            self._last = random.choice(others)
        else:
            host, _, port = url.split("/")[2].rpartition(":")
            self._last = host, int(port)
        return TCP4ClientEndpoint(reactor, *self._last, timeout=OPEN_TIMEOUT)


class CommandReceiver(LineReceiver):
    """Executes the commands."""

    delimiter = b"\n"
    MAX_LENGTH = 2**20

    def __init__(self) -> None:
        self._clients: list[Client] = []
        self._received: list[tuple[int, str]] = []

    def lineReceived(self, line: bytes) -> None:
        if line != b"stat":
            order = json.loads(line)
            self._clients = [Client(client_id, order, self._received) for client_id in order["clients"]]
            return
        connected = sum(client.agent.connected for client in self._clients)
        answer = {
            "connected": connected,
            "ended": sum(client.connections for client in self._clients) - connected,
            "stopped": sum(client.stopped for client in self._clients),
            "received": self._received[:],
        }
        self._received.clear()
        self.sendLine(json.dumps(answer).encode())

    def connectionLost(self, reason: object = None) -> None:
        # The end of the process closes the connections.
        if reactor.running:
            reactor.stop()


if __name__ == "__main__":
    StandardIO(CommandReceiver())
    reactor.run()
    sys.exit()
