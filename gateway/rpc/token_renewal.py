"""A client that is connected shows a new token, before the one that it came by has expired.

    client -> {"jsonrpc":"2.0","method":"gateway.token","params":{"token":"T"}}            nothing is answered
    client -> {"jsonrpc":"2.0","id":1,"method":"gateway.token","params":{"token":"T"}}     the same as a request:
    client <- {"jsonrpc":"2.0","id":1,"result":null}                                       accepted, or
    client <- {"jsonrpc":"2.0","id":1,"error":{"code":-32602,…}}                           not, with the reason

A token that is not accepted changes nothing: the connection lasts as long as the one before.
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
from gateway.util.rate_limit import SlidingWindow

#: the client's method
TOKEN_METHOD = "gateway.token"
#: So many tokens of one client are looked at within so many seconds: to check a signature takes as long as a hundred
#: messages, and a batch has a thousand. Of so many clients it is remembered.
MAX_RENEWALS, RENEWAL_WINDOW, MAX_TRACKED_CLIENTS = 8, 60.0, 16384


class _Params(msgspec.Struct):
    token: str


_decode = msgspec.json.Decoder(_Params).decode


class TokenRenewal:
    """Checks the new tokens of the clients of one node; of each connection one at a time, and of each client few."""

    def __init__(
        self, authenticator: IAuthenticator, sessions: IClientSessions, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        """``seconds`` is the node's clock."""
        self._recent = SlidingWindow(MAX_RENEWALS, RENEWAL_WINDOW, clock, max_keys=MAX_TRACKED_CLIENTS)
        self._authenticator = authenticator
        self._sessions = sessions
        self._metrics = metrics
        #: the connections whose new token is being checked
        self._checking: set[tuple[str, int]] = set()

    def renew(self, client_id: str, generation: int, params: bytes | None) -> Deferred[None]:
        """Fires when the connection lasts as long as the token in ``params``; fails with ``RpcError`` alone, or with
        what nobody foresaw."""
        return Deferred.fromCoroutine(self._renew((client_id, generation), params))

    async def _renew(self, session: tuple[str, int], params: bytes | None) -> None:
        client_id, generation = session
        try:
            identity = await self._verify(session, params)
        except RpcError:
            self._metrics.renewals_refused += 1
            raise
        # It may be gone by now; then nobody is told.
        if self._sessions.renew(client_id, generation, identity.expires_at):
            self._metrics.renewed += 1

    async def _verify(self, session: tuple[str, int], params: bytes | None) -> Identity:
        client_id = session[0]
        if session in self._checking:
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
        self._checking.add(session)
        try:
            identity = self._authenticator.renew(token, client_id)
            return await identity if isinstance(identity, Deferred) else identity
        except AuthenticationError as e:
            raise RpcError(ErrorKind.INVALID_PARAMS, client_id, detail=str(e)) from None
        finally:
            self._checking.discard(session)
