"""A gateway on websockets and uvloop: ``python -m benchmarks.peers.websockets PORT``."""

from __future__ import annotations

import sys

import uvloop
from websockets.asyncio.server import ServerConnection, serve

from benchmarks.peers.gateway import Gateway

gateway = Gateway()


async def serve_backend(connection: ServerConnection) -> None:
    gateway.backend = connection
    while True:
        to, message = gateway.from_backend(connection, await connection.recv(decode=False))
        await to.send(message, text=True)


async def serve_client(connection: ServerConnection, client_id: str) -> None:
    gateway.clients[client_id] = connection
    try:
        while True:
            to, message = gateway.from_client(client_id, await connection.recv(decode=False))
            await to.send(message, text=True)
    finally:
        del gateway.clients[client_id]


async def handle(connection: ServerConnection) -> None:
    assert connection.request is not None
    client_id = connection.request.path[1:]
    await (serve_backend(connection) if client_id == "!backend" else serve_client(connection, client_id))


async def main() -> None:
    port = int(sys.argv[1])
    async with serve(
        handle, "127.0.0.1", port, compression=None, ping_interval=40, ping_timeout=20, backlog=4096
    ) as server:
        await server.serve_forever()


uvloop.run(main())
