"""A gateway on stock Autobahn and Twisted: ``python -m benchmarks.peers.autobahn PORT``."""

from __future__ import annotations

import sys

from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet import epollreactor

epollreactor.install()

from twisted.internet import reactor  # noqa: E402

from benchmarks.peers.gateway import Gateway  # noqa: E402

gateway = Gateway()


class Connection(WebSocketServerProtocol):  # type: ignore[misc]
    def onConnect(self, request):
        self.client_id = request.path[1:]

    def onOpen(self):
        if self.client_id == "!backend":
            gateway.backend = self
        else:
            gateway.clients[self.client_id] = self

    def onMessage(self, payload, isBinary):
        if self is gateway.backend:
            to, message = gateway.from_backend(self, payload)
        else:
            to, message = gateway.from_client(self.client_id, payload)
        to.sendMessage(message)

    def onClose(self, wasClean, code, reason):
        gateway.clients.pop(getattr(self, "client_id", None), None)


factory = WebSocketServerFactory()
factory.protocol = Connection
factory.setProtocolOptions(autoPingInterval=50, autoPingTimeout=20, tcpNoDelay=True)
reactor.listenTCP(int(sys.argv[1]), factory, backlog=4096, interface="127.0.0.1")
reactor.run()
