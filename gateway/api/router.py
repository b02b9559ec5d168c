"""Route HTTP requests to their handlers, by path and method.

Paths are compared as received, percent-encoded, since a client_id may contain an encoded slash.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from twisted.internet.defer import Deferred

from gateway.api.client_handlers import ClientHandlers
from gateway.api.errors import BadRequestError
from gateway.api.http_server import CLIENTS_PATH, RPC_PATH, RPC_SUFFIX, HTTPRequest
from gateway.api.node_handlers import NodeHandlers
from gateway.api.responses import Response, error_response
from gateway.auth.errors import ForbiddenError
from gateway.protocol.handshake import retry_after_header, safe_repr
from gateway.registry.errors import LivenessUnknownError, RegistryUnavailableError

Handler: TypeAlias = Callable[[HTTPRequest], Coroutine[Deferred[Any], Any, Response]]
ItemHandler: TypeAlias = Callable[[HTTPRequest, bytes], Coroutine[Deferred[Any], Any, Response]]
HandlersByMethod: TypeAlias = dict[str, Handler]

_NODES_PATH: Final = b"/v1/nodes/"
_DRAIN_SUFFIX: Final = b"/drain"


class Router:
    """Route requests that passed the access policy."""

    def __init__(self, clients: ClientHandlers, nodes: NodeHandlers) -> None:
        self._clients = clients
        self._nodes = nodes
        self._routes: dict[bytes, HandlersByMethod] = {
            b"/v1/clients": {"GET": clients.list_clients, "POST": clients.notify_prefix},
            b"/v1/client": {"GET": clients.get, "DELETE": clients.delete},
            RPC_PATH: {"POST": clients.rpc},
            b"/v1/nodes": {"GET": nodes.list_nodes},
            b"/v1/rebalance": {"POST": nodes.rebalance},
            b"/v1/backend": {"GET": _upgrade_required},
            b"/healthz": {"GET": nodes.healthz},
            b"/readyz": {"GET": nodes.readyz},
            b"/metrics": {"GET": nodes.metrics},
        }

    async def handle(self, request: HTTPRequest) -> Response:
        """Return the response to a request. The errors that a handler may raise become error responses."""
        path = request.raw_path
        methods = self._find_handlers(path)
        if methods is None:
            return error_response(404, "path", _not_found_message(path))
        method = request.method.decode("latin-1")
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
            return error_response(405, "method", f"this path allows {allowed}", ("Allow", allowed))
        try:
            return await handler(request)
        except BadRequestError as e:
            return error_response(400, e.word, str(e))
        except ForbiddenError as e:
            return error_response(403, "forbidden", str(e))
        except RegistryUnavailableError as e:
            # The texts of other errors may name the database, which is not for backends.
            known = isinstance(e, LivenessUnknownError)
            message = str(e) if known else "the registry does not answer; try again later"
            return error_response(503, "registry", message, retry_after_header(1))

    def _find_handlers(self, path: bytes) -> HandlersByMethod | None:
        handlers = self._routes.get(path)
        if handlers is not None:
            return handlers
        if path.startswith(CLIENTS_PATH):
            rest = path[len(CLIENTS_PATH) :]
            if rest.endswith(b"/"):
                return None
            get, delete = _bind_id(self._clients.get, rest), _bind_id(self._clients.delete, rest)
            if not rest.endswith(RPC_SUFFIX):
                return {"GET": get, "DELETE": delete}
            # A client_id may end in /rpc too; only in a POST is that no part of it.
            return {
                "GET": _or_calls_only(get),
                "DELETE": _or_calls_only(delete),
                "POST": _bind_id(self._clients.rpc, rest[: -len(RPC_SUFFIX)]),
            }
        if path.startswith(_NODES_PATH) and path.endswith(_DRAIN_SUFFIX):
            return {"POST": _bind_id(self._nodes.drain, path[len(_NODES_PATH) : -len(_DRAIN_SUFFIX)])}
        return None


def _bind_id(handler: ItemHandler, raw_id: bytes) -> Handler:
    return lambda request: handler(request, raw_id)


def _or_calls_only(handler: Handler) -> Handler:
    """Wrap a handler of a path for calls: unless its client exists, the request was meant for the one without /rpc."""

    async def handle(request: HTTPRequest) -> Response:
        with contextlib.suppress(BadRequestError):
            response = await handler(request)
            if response.status != 404:
                return response
        client = safe_repr(request.raw_path[: -len(RPC_SUFFIX)].decode("latin-1"))
        message = f"this path takes calls, by POST; the client itself is at {client}"
        return error_response(405, "method", message, ("Allow", "POST"))

    return handle


def _not_found_message(path: bytes) -> str:
    if path.startswith(CLIENTS_PATH) and path.endswith(b"/"):
        return f"a path does not end in /; use {safe_repr(path.rstrip(b'/').decode('latin-1'))}"
    return "this path does not exist"


async def _upgrade_required(request: HTTPRequest) -> Response:
    message = "this path is for WebSockets, which need a new connection"
    return error_response(426, "upgrade", message, ("Upgrade", "websocket"), ("Connection", "Upgrade"))
