"""Message handling that all peers share, so that they differ only in their WebSocket library.

    backend -> {"id":1,"client":"agent-0","method":"echo","params":…}         a call
    client  <- {"id":"5f0c…","method":"echo","params":…}
    client  -> {"id":"5f0c…","result":…}
    backend <- {"id":1,"result":…}
    backend -> {"client":"agent-0","method":"echo","params":…}                a notification to a client
    client  <- {"method":"echo","params":…}
    client  -> {"method":"done","params":…}                                   and from one
    backend <- {"client":"agent-0","method":"done","params":…}

There is no registry, no timeout, no limit, and no check of UTF-8 or of the sender of a response.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec

NONE = msgspec.Raw(b"null")
NOTHING = msgspec.Raw()


class FromBackend(msgspec.Struct):
    client: str
    method: msgspec.Raw
    id: msgspec.Raw = NOTHING
    params: msgspec.Raw = NONE


class FromClient(msgspec.Struct):
    id: str = ""
    result: msgspec.Raw = NONE
    method: msgspec.Raw = NOTHING
    params: msgspec.Raw = NONE


decode_backend = msgspec.json.Decoder(FromBackend).decode
decode_client = msgspec.json.Decoder(FromClient).decode


class Gateway:
    """Connected clients and pending calls. A connection is of the type of the library."""

    def __init__(self) -> None:
        self.clients: dict[str, Any] = {}
        self.backend: Any = None
        self.calls: dict[str, tuple[Any, bytes]] = {}

    def from_backend(self, backend: Any, message: str | bytes) -> tuple[Any, bytes]:
        """Return the receiver and the message to send, for a message of a backend."""
        request = decode_backend(message)
        client = self.clients.get(request.client)
        if client is None:
            return backend, b'{"id":%s,"error":"not connected"}' % (bytes(request.id) or b"null")
        if not request.id:
            return client, b'{"method":%s,"params":%s}' % (request.method, request.params)
        call = os.urandom(16).hex()
        self.calls[call] = backend, bytes(request.id)
        return client, b'{"id":"%s","method":%s,"params":%s}' % (call.encode(), request.method, request.params)

    def from_client(self, client_id: str | Callable[[], str], message: str | bytes) -> tuple[Any, bytes]:
        """Return the receiver and the message to send, for a message of a client. Its id may be a function, if it is
        expensive to compute."""
        response = decode_client(message)
        if response.id:
            backend, number = self.calls.pop(response.id)
            return backend, b'{"id":%s,"result":%s}' % (number, response.result)
        return self.backend, b'{"client":"%s","method":%s,"params":%s}' % (
            (client_id if isinstance(client_id, str) else client_id()).encode(),
            response.method,
            response.params,
        )
