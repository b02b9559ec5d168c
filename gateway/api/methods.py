"""What a backend can ask over its WebSocket.

client.call       {"client","method","params"?,"timeout"?}   the client's own result or error
client.notify     {"client","method","params"?}              null, once it was handed to the client's transport
client.get        {"client"}                                 where it is connected
events.subscribe  {"kinds":[…]}                              null; kinds add up
upstream.serve                                               null; clients' calls come from now on

What a backend's token is not for is answered with -32008, before anything is looked up that is about the client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType
from twisted.internet.defer import Deferred

from gateway.api.directory import Directory
from gateway.api.query import CLIENT_ID_RULE
from gateway.api.responses import permit
from gateway.api.upstream import KINDS, IBackend, Upstream
from gateway.auth.backend_tokens import WITHDRAWN
from gateway.auth.interface import is_client_id
from gateway.protocol.errors import Kind, RpcError
from gateway.protocol.jsonrpc import BACKSLASH, ID_STARTS, MAX_DEPTH, PARAMS_STARTS, decode_nested, flaw
from gateway.registry.interface import RegistryUnavailable
from gateway.rpc.interface import IHub
from gateway.rpc.pending import Reply

_T = TypeVar("_T")
_Asker = TypeVar("_Asker")
Outcome: TypeAlias = Reply | Deferred[Reply]

#: the answer to what has no result
NULL = Reply(b"null", None)
_INFINITE = float("inf")


class _Call(msgspec.Struct, gc=False):
    client: str
    method: str
    params: Raw | UnsetType = UNSET
    timeout: float | None = None


class _Notify(msgspec.Struct, gc=False):
    client: str
    method: str
    params: Raw | UnsetType = UNSET


class _Plain(msgspec.Struct, gc=False):
    """A whole request for one of the methods that make nearly all of the traffic."""

    jsonrpc: Literal["2.0"]
    method: Literal["client.call", "client.notify"]
    params: _Call
    id: Raw | UnsetType = UNSET
    # These two must not be there.
    result: UnsetType = UNSET
    error: UnsetType = UNSET


class _Get(msgspec.Struct, gc=False):
    client: str


class _Subscribe(msgspec.Struct, gc=False):
    kinds: list[str]


_plain = msgspec.json.Decoder(_Plain).decode
_call = msgspec.json.Decoder(_Call).decode
_notify = msgspec.json.Decoder(_Notify).decode
_get = msgspec.json.Decoder(_Get).decode
_subscribe = msgspec.json.Decoder(_Subscribe).decode


#: whether it is a call; its raw id, or ``None``; the client, the method, the params and the time-out
Plain: TypeAlias = tuple[bool, bytes | None, str, str, bytes | None, float | None]


def read_plain(payload: bytes) -> Plain | None:
    """Read a ``client.call``, or a ``client.notify``, in which nothing is wrong but perhaps the client's id.

    ``None`` for everything else, to be read by :func:`~gateway.protocol.jsonrpc.decode` and carried out by
    :meth:`Methods.start`, with the same outcome. Those read the params a second time: this takes 0.8 of their time.
    """
    # Nearly all pass at a glance: flaw() would find nothing.
    if (not payload.isascii() or len(payload) > MAX_DEPTH or BACKSLASH in payload) and flaw(payload) is not None:
        return None
    try:
        plain = _plain(payload)
    except (msgspec.DecodeError, RecursionError):
        return None
    asked = plain.params
    id = params = None
    if plain.id is not UNSET:
        id = bytes(plain.id)
        if id[0] not in ID_STARTS:
            return None
    if asked.params is not UNSET:
        params = bytes(asked.params)
        if params[0] not in PARAMS_STARTS:
            return None
    timeout = asked.timeout
    is_call = plain.method == "client.call"
    if is_call and (id is None or (timeout is not None and not 0 < timeout < _INFINITE)):
        return None
    return is_call, id, asked.client, asked.method, params, timeout


class MethodTable(Generic[_Asker]):
    """What can be asked on one kind of connection."""

    def __init__(self, hub: IHub, table: Mapping[str, Callable[[_Asker, bytes | None], Outcome]]) -> None:
        self.hub = hub
        self._table = table

    def start(self, asker: _Asker, method: str, params: bytes | None) -> Outcome:
        """Begin to carry out a request. Raises ``RpcError``; a Deferred fails with it too."""
        carry_out = self._table.get(method)
        if carry_out is None:
            raise RpcError(Kind.METHOD_NOT_FOUND, detail=f"there are {', '.join(self._table)}")
        return carry_out(asker, params)


class Methods(MethodTable[IBackend]):
    """The methods of one node, for all backends."""

    def __init__(self, *, hub: IHub, directory: Directory, upstream: Upstream) -> None:
        table = {
            "client.call": self._client_call,
            "client.notify": self._client_notify,
            "client.get": self._client_get,
            "events.subscribe": self._events_subscribe,
            "upstream.serve": self._upstream_serve,
        }
        super().__init__(hub, table)
        self._directory = directory
        self._upstream = upstream

    def start(self, asker: IBackend, method: str, params: bytes | None) -> Outcome:
        """See :meth:`MethodTable.start`."""
        if asker.grant.withdrawn:
            raise RpcError(Kind.FORBIDDEN, detail=WITHDRAWN)
        return super().start(asker, method, params)

    def _client_call(self, backend: IBackend, params: bytes | None) -> Outcome:
        asked = decoded(_call, params)
        client_id = _permitted(backend, "call", asked.client)
        timeout = asked.timeout
        if timeout is not None and not 0 < timeout < _INFINITE:
            raise RpcError(Kind.INVALID_PARAMS, client_id, detail="timeout is no positive number")
        return self.hub.call(client_id, asked.method, passed_on(asked.params, client_id), timeout)

    def _client_notify(self, backend: IBackend, params: bytes | None) -> Outcome:
        asked = decoded(_notify, params)
        client_id = _permitted(backend, "notify", asked.client)
        telling = self.hub.notify(client_id, asked.method, passed_on(asked.params, client_id))
        return telling.addCallback(lambda _: NULL)

    def _client_get(self, backend: IBackend, params: bytes | None) -> Outcome:
        return Deferred.fromCoroutine(self._find(_permitted(backend, "read", decoded(_get, params).client)))

    async def _find(self, client_id: str) -> Reply:
        try:
            found = await self._directory.find(client_id)
        except RegistryUnavailable:
            raise RpcError(Kind.REGISTRY_UNAVAILABLE, client_id) from None
        if found is None:
            raise RpcError(Kind.NOT_CONNECTED, client_id)
        return Reply(msgspec.json.encode(found), None)

    def _events_subscribe(self, backend: IBackend, params: bytes | None) -> Outcome:
        permit(backend.grant, "read")
        kinds = decoded(_subscribe, params).kinds
        if not kinds or not set(kinds) <= set(KINDS):
            raise RpcError(Kind.INVALID_PARAMS, detail=f"kinds are some of {', '.join(KINDS)}")
        self._upstream.subscribe(backend, kinds)
        return NULL

    def _upstream_serve(self, backend: IBackend, params: bytes | None) -> Outcome:
        permit(backend.grant, "serve")
        self._upstream.serve(backend)
        return NULL


def _permitted(backend: IBackend, verb: str, client_id: str) -> str:
    """A client's id. Raises ``RpcError`` for what cannot be one, and for one that the backend's token is not for."""
    permit(backend.grant, verb, checked(client_id))
    return client_id


def decoded(decode: Callable[[Any], _T], params: bytes | None) -> _T:
    """The params of one method. Raises ``RpcError`` that names what is wrong with them."""
    try:
        return decode_nested(decode, params or b"{}")
    except msgspec.DecodeError as e:
        raise RpcError(Kind.INVALID_PARAMS, detail=f"{e}") from None


def checked(client_id: str) -> str:
    """A client's id. Raises ``RpcError`` for what cannot be one."""
    if is_client_id(client_id):
        return client_id
    raise RpcError(Kind.INVALID_PARAMS, detail=f"client: {CLIENT_ID_RULE}")


def passed_on(params: Raw | UnsetType, client_id: str | None) -> bytes | None:
    """The bytes of ``params`` as the client gets them (JSON-RPC 2.0, section 4.2). Raises ``RpcError``."""
    if params is UNSET:
        return None
    raw = bytes(params)
    if raw[:1] in (b"[", b"{"):
        return raw
    raise RpcError(Kind.INVALID_PARAMS, client_id, detail="params, for the client, is no array and no object")
