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

from gateway.api.directory import ClientDirectory
from gateway.api.query import CLIENT_ID_RULE
from gateway.api.responses import require
from gateway.api.upstream import EVENT_KINDS, BackendDispatcher, IBackendConnection
from gateway.auth.backend_tokens import REVOKED_MESSAGE
from gateway.auth.interface import is_client_id
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.protocol.jsonrpc import (
    BACKSLASH,
    ID_FIRST_BYTES,
    MAX_DEPTH,
    PARAMS_FIRST_BYTES,
    decode_nested,
    validate_payload,
)
from gateway.registry.errors import RegistryUnavailableError
from gateway.rpc.interface import IDispatcher
from gateway.rpc.pending import Reply

_T = TypeVar("_T")
_Caller = TypeVar("_Caller")
MethodResult: TypeAlias = Reply | Deferred[Reply]

#: the answer to what has no result
NULL_REPLY = Reply(b"null", None)
_INFINITY = float("inf")


class _CallParams(msgspec.Struct, gc=False):
    client: str
    method: str
    params: Raw | UnsetType = UNSET
    timeout: float | None = None


class _NotifyParams(msgspec.Struct, gc=False):
    client: str
    method: str
    params: Raw | UnsetType = UNSET


class _FastMessage(msgspec.Struct, gc=False):
    """A whole request for one of the methods that make nearly all of the traffic."""

    jsonrpc: Literal["2.0"]
    method: Literal["client.call", "client.notify"]
    params: _CallParams
    id: Raw | UnsetType = UNSET
    # These two must not be there.
    result: UnsetType = UNSET
    error: UnsetType = UNSET


class _GetParams(msgspec.Struct, gc=False):
    client: str


class _SubscribeParams(msgspec.Struct, gc=False):
    kinds: list[str]


_decode_fast_message = msgspec.json.Decoder(_FastMessage).decode
_decode_call = msgspec.json.Decoder(_CallParams).decode
_decode_notify = msgspec.json.Decoder(_NotifyParams).decode
_decode_get = msgspec.json.Decoder(_GetParams).decode
_decode_subscribe = msgspec.json.Decoder(_SubscribeParams).decode


#: whether it is a call; its raw id, or ``None``; the client, the method, the params and the time-out
FastRequest: TypeAlias = tuple[bool, bytes | None, str, str, bytes | None, float | None]


def decode_fast(payload: bytes) -> FastRequest | None:
    """Read a ``client.call``, or a ``client.notify``, in which nothing is wrong but perhaps the client's id.

    ``None`` for everything else, to be read by :func:`~gateway.protocol.jsonrpc.decode` and carried out by
    :meth:`Methods.start`, with the same outcome. Those read the params a second time: this takes 0.8 of their time.
    """
    # Nearly all pass at a glance: flaw() would find nothing.
    if (not payload.isascii() or len(payload) > MAX_DEPTH or BACKSLASH in payload) and validate_payload(
        payload
    ) is not None:
        return None
    try:
        plain = _decode_fast_message(payload)
    except (msgspec.DecodeError, RecursionError):
        return None
    asked = plain.params
    id = params = None
    if plain.id is not UNSET:
        id = bytes(plain.id)
        if id[0] not in ID_FIRST_BYTES:
            return None
    if asked.params is not UNSET:
        params = bytes(asked.params)
        if params[0] not in PARAMS_FIRST_BYTES:
            return None
    timeout = asked.timeout
    is_call = plain.method == "client.call"
    if is_call and (id is None or (timeout is not None and not 0 < timeout < _INFINITY)):
        return None
    return is_call, id, asked.client, asked.method, params, timeout


class MethodTable(Generic[_Caller]):
    """What can be asked on one kind of connection."""

    def __init__(
        self, dispatcher: IDispatcher, table: Mapping[str, Callable[[_Caller, bytes | None], MethodResult]]
    ) -> None:
        self.dispatcher = dispatcher
        self._table = table

    def start(self, caller: _Caller, method: str, params: bytes | None) -> MethodResult:
        """Begin to carry out a request. Raises ``RpcError``; a Deferred fails with it too."""
        carry_out = self._table.get(method)
        if carry_out is None:
            raise RpcError(ErrorKind.METHOD_NOT_FOUND, detail=f"there are {', '.join(self._table)}")
        return carry_out(caller, params)


class BackendMethods(MethodTable[IBackendConnection]):
    """The methods of one node, for all backends."""

    def __init__(self, *, dispatcher: IDispatcher, directory: ClientDirectory, upstream: BackendDispatcher) -> None:
        table = {
            "client.call": self._client_call,
            "client.notify": self._client_notify,
            "client.get": self._client_get,
            "events.subscribe": self._events_subscribe,
            "upstream.serve": self._upstream_serve,
        }
        super().__init__(dispatcher, table)
        self._directory = directory
        self._upstream = upstream

    def start(self, caller: IBackendConnection, method: str, params: bytes | None) -> MethodResult:
        """See :meth:`MethodTable.start`."""
        if caller.grant.is_revoked:
            raise RpcError(ErrorKind.FORBIDDEN, detail=REVOKED_MESSAGE)
        return super().start(caller, method, params)

    def _client_call(self, backend: IBackendConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_call, params)
        client_id = _authorized_client_id(backend, "call", asked.client)
        timeout = asked.timeout
        if timeout is not None and not 0 < timeout < _INFINITY:
            raise RpcError(ErrorKind.INVALID_PARAMS, client_id, detail="timeout is no positive number")
        return self.dispatcher.call(client_id, asked.method, raw_params(asked.params, client_id), timeout)

    def _client_notify(self, backend: IBackendConnection, params: bytes | None) -> MethodResult:
        asked = decode_params(_decode_notify, params)
        client_id = _authorized_client_id(backend, "notify", asked.client)
        telling = self.dispatcher.notify(client_id, asked.method, raw_params(asked.params, client_id))
        return telling.addCallback(lambda _: NULL_REPLY)

    def _client_get(self, backend: IBackendConnection, params: bytes | None) -> MethodResult:
        return Deferred.fromCoroutine(
            self._get_client(_authorized_client_id(backend, "read", decode_params(_decode_get, params).client))
        )

    async def _get_client(self, client_id: str) -> Reply:
        try:
            found = await self._directory.find(client_id)
        except RegistryUnavailableError:
            raise RpcError(ErrorKind.REGISTRY_UNAVAILABLE, client_id) from None
        if found is None:
            raise RpcError(ErrorKind.NOT_CONNECTED, client_id)
        return Reply(msgspec.json.encode(found), None)

    def _events_subscribe(self, backend: IBackendConnection, params: bytes | None) -> MethodResult:
        require(backend.grant, "read")
        kinds = decode_params(_decode_subscribe, params).kinds
        if not kinds or not set(kinds) <= set(EVENT_KINDS):
            raise RpcError(ErrorKind.INVALID_PARAMS, detail=f"kinds are some of {', '.join(EVENT_KINDS)}")
        self._upstream.subscribe(backend, kinds)
        return NULL_REPLY

    def _upstream_serve(self, backend: IBackendConnection, params: bytes | None) -> MethodResult:
        require(backend.grant, "serve")
        self._upstream.serve(backend)
        return NULL_REPLY


def _authorized_client_id(backend: IBackendConnection, verb: str, client_id: str) -> str:
    """A client's id. Raises ``RpcError`` for what cannot be one, and for one that the backend's token is not for."""
    require(backend.grant, verb, check_client_id(client_id))
    return client_id


def decode_params(decode: Callable[[Any], _T], params: bytes | None) -> _T:
    """The params of one method. Raises ``RpcError`` that names what is wrong with them."""
    try:
        return decode_nested(decode, params or b"{}")
    except msgspec.DecodeError as e:
        raise RpcError(ErrorKind.INVALID_PARAMS, detail=f"{e}") from None


def check_client_id(client_id: str) -> str:
    """A client's id. Raises ``RpcError`` for what cannot be one."""
    if is_client_id(client_id):
        return client_id
    raise RpcError(ErrorKind.INVALID_PARAMS, detail=f"client: {CLIENT_ID_RULE}")


def raw_params(params: Raw | UnsetType, client_id: str | None) -> bytes | None:
    """The bytes of ``params`` as the client gets them (JSON-RPC 2.0, section 4.2). Raises ``RpcError``."""
    if params is UNSET:
        return None
    raw = bytes(params)
    if raw[:1] in (b"[", b"{"):
        return raw
    raise RpcError(ErrorKind.INVALID_PARAMS, client_id, detail="params, for the client, is no array and no object")
