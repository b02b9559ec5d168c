"""A gateway on socketify, which is uWebSockets: ``python -m benchmarks.peers.socketify PORT``."""

from __future__ import annotations

import sys

from socketify import App, CompressOptions, OpCode

from benchmarks.peers.gateway import Gateway

gateway = Gateway()
options = {
    "compression": CompressOptions.DISABLED,
    "max_payload_length": 1 << 20,
    "max_backpressure": 16 << 20,
    "idle_timeout": 120,
    "send_pings_automatically": True,
}


def upgrade(response, request, context):
    key, protocol = request.get_header("sec-websocket-key"), request.get_header("sec-websocket-protocol")
    extensions = request.get_header("sec-websocket-extensions")
    response.upgrade(key, protocol, extensions, context, request.get_url()[1:])


def open_backend(connection):
    gateway.backend = connection


def open_client(connection):
    gateway.clients[connection.get_user_data()] = connection


def from_backend(connection, message, opcode):
    to, reply = gateway.from_backend(gateway.backend, message)
    to.send(reply, OpCode.TEXT)


def from_client(connection, message, opcode):
    to, reply = gateway.from_client(connection.get_user_data, message)
    to.send(reply, OpCode.TEXT)


def close_client(connection, code, message):
    gateway.clients.pop(connection.get_user_data(), None)


app = App()
app.ws("/!backend", {**options, "open": open_backend, "message": from_backend})
app.ws("/*", {**options, "upgrade": upgrade, "open": open_client, "message": from_client, "close": close_client})
app.listen({"port": int(sys.argv[1]), "host": "127.0.0.1"})
app.run()
