"""Servers that hold TLS connections: ``python -m benchmarks.peers.tls KIND PORT PEM``.

    autobahn     stock Autobahn on Twisted's own ssl: endpoint
    pyopenssl    no WebSocket at all: OpenSSL connections in memory, as Twisted uses them, with released buffers
    sslsocket    no WebSocket at all: Python's ssl.SSLSocket

The last two respond to the first bytes of each connection with a 101, so that the same clients work with them. They
accept one connection at a time.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL

ANSWER = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"


def autobahn(port: int, pem: str) -> None:
    from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
    from twisted.internet import epollreactor

    epollreactor.install()
    from twisted.internet import reactor
    from twisted.internet.endpoints import serverFromString

    factory = WebSocketServerFactory()
    factory.protocol = WebSocketServerProtocol
    endpoint = serverFromString(reactor, f"ssl:{port}:interface=127.0.0.1:backlog=4096:privateKey={pem}")
    endpoint.listen(factory)
    reactor.run()


def serve(port: int, opening: Callable[[socket.socket], Any]) -> None:
    held = []
    with socket.create_server(("127.0.0.1", port), backlog=4096) as listener:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Readiness probes connect without sending anything.
            with contextlib.suppress(OSError, SSL.Error):
                held.append(opening(connection))


def sslsocket(port: int, pem: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)

    def opening(connection: socket.socket) -> Any:
        secure = context.wrap_socket(connection, server_side=True)
        secure.recv(4096)
        secure.sendall(ANSWER)
        return secure

    serve(port, opening)


def pyopenssl(port: int, pem: str) -> None:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_privatekey_file(pem)
    context.use_certificate_chain_file(pem)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)

    def opening(connection: socket.socket) -> Any:
        secure = SSL.Connection(context, None)
        secure.set_accept_state()

        def until_done(step: Callable[[], Any]) -> None:
            while True:
                try:
                    step()
                    return
                except SSL.WantReadError:
                    flush()
                    secure.bio_write(connection.recv(65536))

        def flush() -> None:
            with contextlib.suppress(SSL.WantReadError):
                connection.sendall(secure.bio_read(65536))

        until_done(secure.do_handshake)
        flush()
        until_done(lambda: secure.recv(4096))
        secure.send(ANSWER)
        flush()
        return connection, secure

    serve(port, opening)


if __name__ == "__main__":
    {"autobahn": autobahn, "pyopenssl": pyopenssl, "sslsocket": sslsocket}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
