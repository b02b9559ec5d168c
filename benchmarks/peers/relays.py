"""Relays, and the echo server behind them: ``python -m benchmarks.peers.relays KIND PORT [TARGET]``.

table          gateway/cluster/relay.py
portforward    twisted.protocols.portforward: two protocols for each relay
echo           an echo server on one epoll
"""

from __future__ import annotations

import select
import socket
import sys


def echo(port: int) -> None:
    listening = socket.create_server(("127.0.0.1", port), backlog=4096)
    poll = select.epoll()
    poll.register(listening.fileno(), select.EPOLLIN)
    sockets: dict[int, socket.socket] = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listening.fileno():
                here, _ = listening.accept()
                here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sockets[here.fileno()] = here
                poll.register(here.fileno(), select.EPOLLIN)
                continue
            try:
                data = sockets[fd].recv(65536)
                sockets[fd].sendall(data)
            except OSError:
                data = b""
            if not data:
                poll.unregister(fd)
                sockets.pop(fd).close()


def relay(kind: str, port: int, target: int) -> None:
    from twisted.internet import epollreactor

    epollreactor.install()

    from twisted.internet import reactor
    from twisted.internet.endpoints import TCP4ClientEndpoint
    from twisted.internet.protocol import Factory, Protocol
    from twisted.protocols.portforward import ProxyFactory

    from gateway.cluster.relay import SocketRelays
    from gateway.metrics import Metrics
    from gateway.net.transport import set_protocol

    relays = SocketRelays(reactor, Metrics())
    relays.start()

    class Arriving(Protocol):
        def connectionMade(self):
            self.transport.setTcpNoDelay(True)
            self.transport.pauseProducing()
            relays_begun[0] += 1
            self.client_id = f"robot-{relays_begun[0]:010}"
            endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", target)
            endpoint.connect(Factory.forProtocol(Protocol)).addCallback(self.reached)

        def reached(self, node):
            if not self.transport.connected:
                node.transport.abortConnection()
                return
            node.transport.setTcpNoDelay(True)
            pipe = relays.create(self.client_id, "7b2b1c1e-3d0c-4f0e-9d51-2f6a0a1b6c1d")
            set_protocol(self.transport, pipe.client)
            set_protocol(node.transport, pipe.node)
            pipe.start(b"", b"")

    relays_begun = [0]
    factory = Factory.forProtocol(Arriving) if kind == "table" else ProxyFactory("127.0.0.1", target)
    factory.noisy = False
    reactor.listenTCP(port, factory, backlog=4096, interface="127.0.0.1")
    reactor.run()


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo(int(sys.argv[2]))
    else:
        relay(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
