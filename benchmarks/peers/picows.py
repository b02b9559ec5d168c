"""A gateway on picows and uvloop: ``python -m benchmarks.peers.picows PORT``."""

from __future__ import annotations

import sys

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

from benchmarks.peers.gateway import Gateway

gateway = Gateway()


class Backend(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        gateway.backend = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            to, message = gateway.from_backend(transport, frame.get_payload_as_bytes())
            to.send(WSMsgType.TEXT, message)


class Client(WSListener):
    def __init__(self, client_id: str) -> None:
        super().__init__()
        self.client_id = client_id

    def on_ws_connected(self, transport: WSTransport) -> None:
        gateway.clients[self.client_id] = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            to, message = gateway.from_client(self.client_id, frame.get_payload_as_bytes())
            to.send(WSMsgType.TEXT, message)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        gateway.clients.pop(self.client_id, None)


def listener(request: WSUpgradeRequest) -> WSListener:
    client_id = request.path[1:].decode()
    return Backend() if client_id == "!backend" else Client(client_id)


async def main() -> None:
    server = await ws_create_server(
        listener,
        "127.0.0.1",
        int(sys.argv[1]),
        backlog=4096,
        enable_auto_ping=True,
        auto_ping_idle_timeout=40,
        auto_ping_reply_timeout=20,
    )
    await server.serve_forever()


uvloop.run(main())
