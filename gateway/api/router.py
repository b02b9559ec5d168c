"""The table of what can be asked over HTTP: which method of which path is answered by whom.

Paths are compared as they came, percent-encoded, since a client's id in one may contain an encoded slash.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from twisted.internet.defer import Deferred

from gateway.api.handlers import Clients, Nodes
from gateway.api.http_server import Request
from gateway.api.query import CLIENTS, RPC, BadInput
from gateway.api.responses import Answer, refusal
from gateway.auth.backend_tokens import Forbidden
from gateway.registry.interface import RegistryUnavailable

Handler: TypeAlias = Callable[[Request], Coroutine[Deferred[Any], Any, Answer]]
OneHandler: TypeAlias = Callable[[Request, bytes], Coroutine[Deferred[Any], Any, Answer]]
Methods: TypeAlias = dict[str, Handler]

_NODE: Final = b"/v1/nodes/"
_DRAIN: Final = b"/drain"


class Api:
    """Answers requests that the guard let in."""

    def __init__(self, clients: Clients, nodes: Nodes) -> None:
        self._clients = clients
        self._nodes = nodes
        self._paths: dict[bytes, Methods] = {
            b"/v1/clients": {"GET": clients.page, "POST": clients.notify},
            b"/v1/nodes": {"GET": nodes.page},
            b"/v1/rebalance": {"POST": nodes.rebalance},
            b"/v1/backend": {"GET": _upgrade_required},
            b"/healthz": {"GET": nodes.healthy},
            b"/readyz": {"GET": nodes.ready},
            b"/metrics": {"GET": nodes.metrics},
        }

    async def respond(self, request: Request) -> Answer:
        """The answer to a request; raises only what nobody foresaw."""
        methods = self._methods(request.raw_path)
        if methods is None:
            return refusal(404, "path", "there is nothing at this path")
        method = request.method.decode("latin-1")
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
            return refusal(405, "method", f"this path takes {allowed}", ("Allow", allowed))
        try:
            return await handler(request)
        except BadInput as e:
            return refusal(400, e.word, str(e))
        except Forbidden as e:
            return refusal(403, "forbidden", str(e))
        except RegistryUnavailable:
            return refusal(503, "registry", "the registry does not answer; try again later", ("Retry-After", "1"))

    def _methods(self, path: bytes) -> Methods | None:
        known = self._paths.get(path)
        if known is not None:
            return known
        if path.startswith(CLIENTS):
            rest = path[len(CLIENTS) :]
            # An id may end in /rpc too: only a POST has it as its last segment.
            methods = {"GET": _of(self._clients.get, rest), "DELETE": _of(self._clients.delete, rest)}
            if rest.endswith(RPC):
                methods["POST"] = _of(self._clients.rpc, rest[: -len(RPC)])
            return methods
        if path.startswith(_NODE) and path.endswith(_DRAIN):
            return {"POST": _of(self._nodes.drain, path[len(_NODE) : -len(_DRAIN)])}
        return None


def _of(handler: OneHandler, raw_id: bytes) -> Handler:
    return lambda request: handler(request, raw_id)


async def _upgrade_required(request: Request) -> Answer:
    message = "this is where backends open WebSockets, each on a connection of its own"
    return refusal(426, "upgrade", message, ("Upgrade", "websocket"), ("Connection", "Upgrade"))
