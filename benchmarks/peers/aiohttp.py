"""A gateway on aiohttp and uvloop: ``python -m benchmarks.peers.aiohttp PORT``."""

from __future__ import annotations

import asyncio
import sys

import uvloop
from aiohttp import WSMsgType, web

from benchmarks.peers.gateway import Gateway

gateway = Gateway()


async def handle(request: web.Request) -> web.WebSocketResponse:
    connection = web.WebSocketResponse(compress=False, heartbeat=50, decode_text=False)
    await connection.prepare(request)
    client_id = request.path[1:]
    if client_id == "!backend":
        gateway.backend = connection
        async for message in connection:
            to, reply = gateway.from_backend(connection, message.data)
            await to.send_frame(reply, WSMsgType.TEXT)
        return connection
    gateway.clients[client_id] = connection
    try:
        async for message in connection:
            to, reply = gateway.from_client(client_id, message.data)
            await to.send_frame(reply, WSMsgType.TEXT)
    finally:
        del gateway.clients[client_id]
    return connection


async def main() -> None:
    app = web.Application()
    app.router.add_get("/{client_id}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1]), backlog=4096).start()
    await asyncio.Event().wait()


uvloop.run(main())
