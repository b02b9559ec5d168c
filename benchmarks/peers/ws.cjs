// A gateway on ws and Node: node ws.cjs PORT, with NODE_PATH set to where ws is. See gateway.py for the messages.
"use strict";
const { randomUUID } = require("node:crypto");
const { WebSocketServer } = require("ws");

const clients = new Map();
const calls = new Map();
let backend = null;

function fromBackend(connection, data) {
  const request = JSON.parse(data);
  const client = clients.get(request.client);
  if (client === undefined) {
    connection.send(JSON.stringify({ id: request.id ?? null, error: "not connected" }));
  } else if (request.id === undefined) {
    client.send(JSON.stringify({ method: request.method, params: request.params }));
  } else {
    const id = randomUUID();
    calls.set(id, [connection, request.id]);
    client.send(JSON.stringify({ id, method: request.method, params: request.params }));
  }
}

function fromClient(clientId, data) {
  const response = JSON.parse(data);
  if (response.id !== undefined) {
    const [connection, id] = calls.get(response.id);
    calls.delete(response.id);
    connection.send(JSON.stringify({ id, result: response.result }));
  } else {
    backend.send(JSON.stringify({ client: clientId, method: response.method, params: response.params }));
  }
}

const server = new WebSocketServer({
  host: "127.0.0.1",
  port: Number(process.argv[2]),
  backlog: 4096,
  perMessageDeflate: false,
});

server.on("connection", (connection, request) => {
  const clientId = request.url.slice(1);
  connection.isAlive = true;
  connection.on("pong", () => (connection.isAlive = true));
  connection.on("error", () => {});
  if (clientId === "!backend") {
    backend = connection;
    connection.on("message", (data) => fromBackend(connection, data));
  } else {
    clients.set(clientId, connection);
    connection.on("message", (data) => fromClient(clientId, data));
    connection.on("close", () => clients.delete(clientId));
  }
});

// The keep-alive of ws's own documentation.
setInterval(() => {
  for (const connection of server.clients) {
    if (!connection.isAlive) connection.terminate();
    connection.isAlive = false;
    connection.ping();
  }
}, 40000);
