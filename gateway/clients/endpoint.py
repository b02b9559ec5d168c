"""Where clients connect.

-> GET /v1/connect?client_id=robot-7 HTTP/1.1          Authorization: Bearer T, or
                                                        Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1, wsgateway.bearer.T
<- HTTP/1.1 101 Switching Protocols                     Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1, if it was offered

or a refusal, with its word in the body:

<- 307 elsewhere (Location)                            to who sent Wsgateway-Redirect: 1; others are relayed
<- 400 request, header, method, upgrade, client_id      401 token               403 origin, identity        404 path
<- 429 rate, replaced (Retry-After)                     500 internal
<- 503 starting, draining, registry, keys, full, openings, timeout (Retry-After)

Where clients arrive that are connected to another node, which passes their bytes on.

-> GET /v1/relay?client_id=robot-7&address=192.0.2.7%3A4711&until=0 HTTP/1.1     at the peer url, from another node
     Authorization: Wsgateway-Peer …, which signs all that
<- HTTP/1.1 101 Switching Protocols, and from here on a client as any other
<- 401 peer                             it is no node of this fleet
<- what opening.py refuses clients with

Who the client is, and where it is, that node has found out, and has signed. Nothing else of the request counts: no
token, Origin nor ``Wsgateway-*``. Nor is there a limit per address, since all relays come from few, and that node has
kept it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.auth.interface import (
    ClientIdMissing,
    IAuthenticator,
    Identity,
    IdentityRefused,
    KeysUnavailable,
    Presented,
    Refused,
    TokenRefused,
    is_client_id,
    no_certificate,
)
from gateway.auth.origin import Origins
from gateway.clients.interface import Arrival, Client, IConnection, Leaver
from gateway.clients.sessions import Edge
from gateway.metrics import Metrics
from gateway.net.tls import verified_certificate
from gateway.net.transport import adopt
from gateway.protocol.handshake import Refusal, Request, retry_after, shown
from gateway.settings import Settings
from gateway.util.cork import Turn
from gateway.websocket.limits import Unfinished
from gateway.websocket.server import GuardedServerFactory, GuardedServerProtocol

#: what is spoken, by name
SUBPROTOCOL = "wsgateway.jsonrpc.v1"
#: what a browser's token follows, in a subprotocol
BEARER = "wsgateway.bearer."

#: so many of the largest messages may wait for a client beyond --send-buffer for a moment, such as a few calls at once
BURST_MESSAGES = 4

#: what a url has in its query that a node handed out: whoever follows it is not sent on
HOP = "wsgateway_hop=1"

_BEARER = re.compile(r"bearer(?: +(.*))?", re.IGNORECASE)
_REFUSALS: dict[type[Refused], tuple[int, str, tuple[tuple[str, str], ...]]] = {
    ClientIdMissing: (400, "client_id", ()),
    TokenRefused: (401, "token", (("WWW-Authenticate", "Bearer"),)),
    IdentityRefused: (403, "identity", ()),
    KeysUnavailable: (503, "keys", (retry_after(1),)),
}


def client_id_of(query: str) -> str | None:
    """The client_id in a raw query string, where a ``+`` is a plus; ``None`` if there is none.

    Raises :class:`Refusal` if it is given twice, or cannot be one. Other parameters are not looked at.
    """
    found: str | None = None
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if unquote_to_bytes(name) != b"client_id":
            continue
        if found is not None:
            raise Refusal(400, "client_id", "the query has client_id twice")
        found = value
    if found is None:
        return None
    # A % that begins no escape stays one, and no client_id has a %.
    client_id = unquote_to_bytes(found).decode("latin-1")
    if not is_client_id(client_id):
        raise Refusal(
            400,
            "client_id",
            f"{shown(client_id)} is no client_id: 1 to 128 of A-Z a-z 0-9 . _ : @ / + = - and neither . nor ..",
        )
    return client_id


def token_of(request: Request) -> str | None:
    """The token that a request presents, by header or by subprotocol; ``None`` if there is none.

    Raises :class:`Refusal` if there are two that differ.
    """
    tokens = {name[len(BEARER) :] for name in request.subprotocols if name.startswith(BEARER)}
    header = _BEARER.fullmatch(request.headers.get("authorization", ""))
    if header is not None:
        tokens.add(header[1] or "")
    if len(tokens) > 1:
        raise _refusal(TokenRefused("the request has two different tokens"))
    return tokens.pop() if tokens else None


def _refusal(refused: Refused) -> Refusal:
    status, word, headers = _REFUSALS[type(refused)]
    return Refusal(status, word, str(refused), headers)


@implementer(IConnection)
class ClientProtocol(GuardedServerProtocol):
    """The connection of one client."""

    path = "/v1/connect"
    _client: Client | None = None
    #: the way to the node that the client is connected to through this one
    _relay: Any = None

    def admit(self, request: Request) -> Deferred[str | None]:
        """Find out who it is, and claim it."""
        return Deferred.fromCoroutine(self._admit(request))

    async def _admit(self, request: Request) -> str | None:
        identity = self.identity(request)
        if isinstance(identity, Deferred):
            identity = await identity
        admitted = await self.factory.edge.admit(self.arrival(request, identity))
        if isinstance(admitted, Client):
            self._client = admitted
        elif admitted.relay is None:
            raise Refusal(307, "elsewhere", "another node takes you: follow Location", [("Location", admitted.url)])
        else:
            self._relay = admitted.relay
        return SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None

    def identity(self, request: Request) -> Identity | Deferred[Identity]:
        """Who it is. Raises, or fails with, :class:`Refusal`."""
        identity: Identity | Deferred[Identity] = self.factory.identify(
            request, partial(verified_certificate, self.transport)
        )
        return identity

    def arrival(self, request: Request, identity: Identity) -> Arrival:
        """What is known of it."""
        return Arrival(
            identity.client_id,
            self.address,
            sent_here=HOP in request.query.split("&"),
            follows=request.headers.get("wsgateway-redirect") == "1",
            subprotocols=tuple(name for name in request.subprotocols if not name.startswith(BEARER)),
            until=identity.until,
            cap=identity.cap,
        )

    def admission_void(self) -> None:
        """It was claimed, but it could not be opened."""
        if self._client is not None:
            self.factory.edge.void(self._client)
        elif self._relay is not None:
            self._relay.abandon()

    def opened(self) -> None:
        """It is open."""
        if self._client is not None:
            self.factory.edge.opened(self._client, self)
        else:
            self._relay.attach(self)

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        super().dataReceived(data)
        if self._client is not None and not self.data:
            self.factory.edge.rested(self._client)

    def woken(self, leaver: Leaver) -> None:
        """It was parked until now."""
        self._client = leaver.client
        self.address = leaver.client.address
        self.heard_at = leaver.heard_at

    def text_received(self, payload: bytes) -> None:
        """It sent a message."""
        self.factory.edge.message(self._client, payload)

    def metered(self, message: bytes) -> None:
        """It sent a frame."""
        self.factory.edge.metered(self._client, message)

    def ended(self, code: int) -> None:
        """It is over."""
        if self._client is not None:
            self.factory.edge.ended(self._client, code)


class ClientFactory(GuardedServerFactory):
    """Listens for clients."""

    def __init__(
        self,
        *,
        edge: Edge,
        authenticators: IAuthenticator,
        settings: Settings,
        metrics: Metrics,
        reactor: Any,
        turn: Turn | None = None,
        unfinished: Unfinished | None = None,
    ) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for an origin pattern that will not do."""
        super().__init__(
            ClientProtocol,
            metrics=metrics,
            reactor=reactor,
            max_message_size=settings.max_message_size,
            send_buffer=settings.send_buffer,
            burst=BURST_MESSAGES * settings.max_message_size,
            max_openings=settings.max_openings,
            openings_per_address=settings.openings_per_address,
            turn=turn,
            unfinished=unfinished,
        )
        self.edge = edge
        self._reactor = reactor
        self._authenticators = authenticators
        self._origins = Origins(settings.origin)

    def through_proxy(self) -> ClientFactory:
        """The same, all counts included, for an endpoint where the PROXY protocol tells who a client is: by its first
        bytes, while whoever is there before is the load balancer."""
        factory = copy.copy(self)
        factory.behind_proxy = True
        return factory

    def buildProtocol(self, addr: Any) -> Any:
        """Make the protocol of a connection; ``None`` drops it."""
        # Where the PROXY protocol is spoken, this is the address of the load balancer.
        if not self.behind_proxy and addr is not None and self.openings.drops(getattr(addr, "host", "")):
            self.metrics.refused["dropped"] += 1
            return None
        return super().buildProtocol(addr)

    def wake(self, leaver: Leaver) -> ClientProtocol:
        """Make a connection of one that was parked. Raises ``OSError`` if it is lost; its socket is then closed."""
        connection: ClientProtocol = adopt(self._reactor, self, leaver.fd, leaver.family)
        connection.woken(leaver)
        return connection

    def identify(
        self, request: Request, certificate: Callable[[], bytes | None] = no_certificate
    ) -> Identity | Deferred[Identity]:
        """Whoever sent a request; ``certificate`` gives the one that TLS has verified.

        Raises, or fails with, :class:`Refusal`.
        """
        origin = request.headers.get("origin")
        if origin is not None and not self._origins.allow(origin):
            raise Refusal(403, "origin", f"pages of the origin {shown(origin)} may not connect here")
        presented = Presented(token_of(request), client_id_of(request.query), certificate)
        try:
            identity = self._authenticators.authenticate(presented)
        except Refused as refused:
            raise _refusal(refused) from None
        return identity.addErrback(_refused_later) if isinstance(identity, Deferred) else identity


def _refused_later(failure: Failure) -> NoReturn:
    if isinstance(failure.value, Refused):
        raise _refusal(failure.value) from None
    failure.raiseException()


#: the longest address that is believed, in characters: an IPv6 address with the name of its interface, and a port
MAX_ADDRESS = 128

_UNTIL = re.compile(r"[0-9]{1,12}")
_FIELDS = ("client_id", "address", "until", "cap")


def fields_of(query: str) -> tuple[str, str, int, int]:
    """The client_id, the address, when its token expires, and its certificate (in seconds since 1970; 0: never), of a
    raw query string.

    Raises :class:`Refusal` unless each is there once, but for the last that may be missing, and will do. Other
    parameters are not looked at.
    """
    found: dict[str, str] = {}
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if name not in _FIELDS:
            continue
        if name in found:
            raise _bad(f"it has {name} twice")
        found[name] = unquote_to_bytes(value).decode("latin-1")
    found.setdefault("cap", "0")
    for name in _FIELDS:
        if name not in found:
            raise _bad(f"it has no {name}")
    client_id, address, until, cap = (found[name] for name in _FIELDS)
    if not is_client_id(client_id):
        raise Refusal(400, "client_id", "the client_id in the query of this relay is none")
    if not 0 < len(address) <= MAX_ADDRESS or not address.isascii() or not address.isprintable():
        raise _bad(f"its address is not 1 to {MAX_ADDRESS} printable characters")
    for name in ("until", "cap"):
        if not _UNTIL.fullmatch(found[name]):
            raise _bad(f"its {name} is no number of seconds")
    return client_id, address, int(until), int(cap)


def _bad(problem: str) -> Refusal:
    return Refusal(400, "request", f"the query of this relay will not do: {problem}")


class RelayedProtocol(ClientProtocol):
    """The connection of one client, through another node."""

    path = "/v1/relay"

    def identity(self, request: Request) -> Identity:
        """Who it is, as that node says. Raises :class:`Refusal`."""
        client_id, address, until, cap = fields_of(request.query)
        self.factory.check_peer(request, client_id, address)
        self.address = address
        return Identity(client_id, until, cap)

    def arrival(self, request: Request, identity: Identity) -> Arrival:
        """What is known of it."""
        return Arrival(
            identity.client_id,
            self.address,
            sent_here=True,
            subprotocols=request.subprotocols,
            until=identity.until,
            cap=identity.cap,
        )


class RelayedFactory(GuardedServerFactory):
    """Takes over connections to the backend endpoint that are relays. Once parked, and woken again, they are those of
    :class:`~gateway.clients.endpoint.ClientFactory`."""

    def __init__(
        self,
        *,
        edge: Edge,
        peer_ok: Callable[[str, str, str, str, str], str],
        not_a_peer: type[Exception],
        settings: Settings,
        metrics: Metrics,
        reactor: Any,
        turn: Turn | None = None,
        unfinished: Unfinished | None = None,
    ) -> None:
        """``peer_ok(header, method, target, client_id, address)`` gives the node_id of the node that signed a request,
        or raises ``not_a_peer``, whose text may be shown."""
        super().__init__(
            RelayedProtocol,
            metrics=metrics,
            reactor=reactor,
            max_message_size=settings.max_message_size,
            send_buffer=settings.send_buffer,
            burst=BURST_MESSAGES * settings.max_message_size,
            max_openings=settings.max_openings,
            turn=turn,
            unfinished=unfinished,
        )
        self.edge = edge
        self._peer_ok = peer_ok
        self._not_a_peer = not_a_peer

    def check_peer(self, request: Request, client_id: str, address: str) -> None:
        """Raises :class:`Refusal` unless a node of this fleet has signed a request."""
        target = f"{request.path}?{request.query}"
        try:
            self._peer_ok(request.headers.get("authorization", ""), "GET", target, client_id, address)
        except self._not_a_peer as e:
            raise Refusal(401, "peer", f"this is for nodes of this fleet alone: {e}") from None
