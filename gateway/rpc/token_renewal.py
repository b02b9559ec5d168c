"""Token renewal: a connected client presents a new token before the current one expires.

    client -> {"jsonrpc":"2.0","method":"gateway.token","params":{"token":"T"}}            no response
    client -> {"jsonrpc":"2.0","id":1,"method":"gateway.token","params":{"token":"T"}}     the same as a request:
    client <- {"jsonrpc":"2.0","id":1,"result":null}                                       accepted
    client <- {"jsonrpc":"2.0","id":1,"error":{"code":-32602,…},"gateway":true}            refused, with the reason

A refused token changes nothing: the session still expires with the current token.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from twisted.internet.defer import Deferred

from gateway.auth.errors import AuthenticationError
from gateway.auth.interface import IAuthenticator, Identity
from gateway.clients.interface import IClientSessions
from gateway.metrics import Metrics
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.interface import SessionKey
from gateway.util.rate_limit import SlidingWindow

TOKEN_METHOD = "gateway.token"
#: Tokens of one client that are verified within the window: to verify a signature takes as long as a hundred messages,
#: and a batch has a thousand.
MAX_RENEWALS = 8
#: seconds
RENEWAL_WINDOW = 60.0
#: clients whose renewals are counted at once
MAX_TRACKED_CLIENTS = 2**14


class _Params(msgspec.Struct):
    token: str


_decode = msgspec.json.Decoder(_Params).decode


class TokenRenewal:
    """Verify new tokens of the clients of one node: one at a time for each connection, and few for each client."""

    def __init__(
        self, authenticator: IAuthenticator, sessions: IClientSessions, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        """``clock`` is the node's clock, in seconds."""
        self._recent = SlidingWindow(MAX_RENEWALS, RENEWAL_WINDOW, clock, max_keys=MAX_TRACKED_CLIENTS)
        self._authenticator = authenticator
        self._sessions = sessions
        self._metrics = metrics
        #: sessions whose new token is being verified
        self._checking: set[SessionKey] = set()

    def renew(self, key: SessionKey, params: bytes | None) -> Deferred[None]:
        """Verify the token in ``params``. Fires when the session is set to expire with that token. Fails with
        ``RpcError``; any other failure is an internal error."""
        return Deferred.fromCoroutine(self._renew(key, params))

    async def _renew(self, key: SessionKey, params: bytes | None) -> None:
        try:
            identity = await self._verify(key, params)
        except RpcError:
            self._metrics.renewals_refused += 1
            raise
        # Returns False if the client has disconnected meanwhile.
        if self._sessions.renew(key, identity.expires_at):
            self._metrics.renewed += 1

    async def _verify(self, key: SessionKey, params: bytes | None) -> Identity:
        client_id = key.client_id
        if key in self._checking:
            raise RpcError(
                ErrorKind.TOO_MANY_CALLS, client_id, detail="a token of this connection is just being checked"
            )
        try:
            token = _decode(params or b"").token
        except (msgspec.DecodeError, RecursionError):
            raise RpcError(ErrorKind.INVALID_PARAMS, client_id, detail='params are {"token": "…"}') from None
        if self._recent.wait_time(client_id):
            detail = (
                f"more than {MAX_RENEWALS} tokens in {RENEWAL_WINDOW:g} s; show one when the last is about to expire"
            )
            raise RpcError(ErrorKind.TOO_MANY_CALLS, client_id, detail=detail)
        self._recent.add(client_id)
        self._checking.add(key)
        try:
            identity = self._authenticator.renew(token, client_id)
            return await identity if isinstance(identity, Deferred) else identity
        except AuthenticationError as e:
            raise RpcError(ErrorKind.INVALID_PARAMS, client_id, detail=str(e)) from None
        finally:
            self._checking.discard(key)
