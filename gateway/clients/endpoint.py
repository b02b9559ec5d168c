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

from gateway.auth.errors import (
    AuthenticationError,
    ClientIdMissingError,
    IdentityMismatchError,
    KeysUnavailableError,
    TokenRefusedError,
)
from gateway.auth.interface import Credentials, IAuthenticator, Identity, is_client_id, no_certificate
from gateway.auth.origin import AllowedOrigins
from gateway.clients.interface import ConnectRequest, IConnection, Session, UnparkedSession
from gateway.clients.sessions import ClientSessions
from gateway.metrics import Metrics
from gateway.net.tls import verified_certificate
from gateway.net.transport import adopt_socket
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import HandshakeRequest, retry_after_header, safe_repr
from gateway.protocol.jsonrpc import SUBPROTOCOL
from gateway.settings import Settings
from gateway.util.cork import Cork
from gateway.websocket.limits import ReassemblyBudget
from gateway.websocket.server import ServerFactory, ServerProtocol

#: what a browser's token follows, in a subprotocol
BEARER_PREFIX = "wsgateway.bearer."

#: so many of the largest messages may wait for a client beyond --send-buffer for a moment, such as a few calls at once
BURST_MESSAGES = 4

#: what a url has in its query that a node handed out: whoever follows it is not sent on
HOP_PARAMETER = "wsgateway_hop=1"

_BEARER_HEADER = re.compile(r"bearer(?: +(.*))?", re.IGNORECASE)
_REFUSALS: dict[type[AuthenticationError], tuple[int, str, tuple[tuple[str, str], ...]]] = {
    ClientIdMissingError: (400, "client_id", ()),
    TokenRefusedError: (401, "token", (("WWW-Authenticate", "Bearer"),)),
    IdentityMismatchError: (403, "identity", ()),
    KeysUnavailableError: (503, "keys", (retry_after_header(1),)),
}


def parse_client_id(query: str) -> str | None:
    """The client_id in a raw query string, where a ``+`` is a plus; ``None`` if there is none.

    Raises :class:`Refusal` if it is given twice, or cannot be one. Other parameters are not looked at.
    """
    found: str | None = None
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if unquote_to_bytes(name) != b"client_id":
            continue
        if found is not None:
            raise RequestRefusedError(400, "client_id", "the query has client_id twice")
        found = value
    if found is None:
        return None
    # A % that begins no escape stays one, and no client_id has a %.
    client_id = unquote_to_bytes(found).decode("latin-1")
    if not is_client_id(client_id):
        raise RequestRefusedError(
            400,
            "client_id",
            f"{safe_repr(client_id)} is no client_id: 1 to 128 of A-Z a-z 0-9 . _ : @ / + = - and neither . nor ..",
        )
    return client_id


def extract_token(request: HandshakeRequest) -> str | None:
    """The token that a request presents, by header or by subprotocol; ``None`` if there is none.

    Raises :class:`Refusal` if there are two that differ.
    """
    tokens = {name[len(BEARER_PREFIX) :] for name in request.subprotocols if name.startswith(BEARER_PREFIX)}
    header = _BEARER_HEADER.fullmatch(request.headers.get("authorization", ""))
    if header is not None:
        tokens.add(header[1] or "")
    if len(tokens) > 1:
        raise _to_refused_error(TokenRefusedError("the request has two different tokens"))
    return tokens.pop() if tokens else None


def _to_refused_error(error: AuthenticationError) -> RequestRefusedError:
    status, word, headers = _REFUSALS[type(error)]
    return RequestRefusedError(status, word, str(error), headers)


@implementer(IConnection)
class ClientProtocol(ServerProtocol):
    """The connection of one client."""

    path = "/v1/connect"
    _session: Session | None = None
    #: the way to the node that the client is connected to through this one
    _relay: Any = None

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        """Find out who it is, and claim it."""
        return Deferred.fromCoroutine(self._admit(request))

    async def _admit(self, request: HandshakeRequest) -> str | None:
        identity = self.authenticate(request)
        if isinstance(identity, Deferred):
            identity = await identity
        admitted = await self.factory.sessions.admit(self.connect_request(request, identity))
        if isinstance(admitted, Session):
            self._session = admitted
        elif admitted.relay is None:
            raise RequestRefusedError(
                307, "elsewhere", "another node takes you: follow Location", [("Location", admitted.url)]
            )
        else:
            self._relay = admitted.relay
        return SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None

    def authenticate(self, request: HandshakeRequest) -> Identity | Deferred[Identity]:
        """Who it is. Raises, or fails with, :class:`Refusal`."""
        identity: Identity | Deferred[Identity] = self.factory.authenticate(
            request, partial(verified_certificate, self.transport)
        )
        return identity

    def connect_request(self, request: HandshakeRequest, identity: Identity) -> ConnectRequest:
        """What is known of it."""
        return ConnectRequest(
            identity.client_id,
            self.address,
            redirected_here=HOP_PARAMETER in request.query.split("&"),
            accepts_redirect=request.headers.get("wsgateway-redirect") == "1",
            subprotocols=tuple(name for name in request.subprotocols if not name.startswith(BEARER_PREFIX)),
            expires_at=identity.expires_at,
            max_expires_at=identity.max_expires_at,
        )

    def admission_abandoned(self) -> None:
        """It was claimed, but it could not be opened."""
        if self._session is not None:
            self.factory.sessions.abandon(self._session)
        elif self._relay is not None:
            self._relay.abandon()

    def opened(self) -> None:
        """It is open."""
        if self._session is not None:
            self.factory.sessions.opened(self._session, self)
        else:
            self._relay.attach(self)

    def dataReceived(self, data: bytes) -> None:
        """Bytes came."""
        super().dataReceived(data)
        if self._session is not None and not self.data:
            self.factory.sessions.on_idle(self._session)

    def resume_session(self, unparked: UnparkedSession) -> None:
        """It was parked until now."""
        self._session = unparked.session
        self.address = unparked.session.address
        self.last_received_at = unparked.last_received_at

    def text_received(self, payload: bytes) -> None:
        """It sent a message."""
        self.factory.sessions.handle_message(self._session, payload)

    def frame_received(self, message: bytes) -> None:
        """It sent a frame."""
        self.factory.sessions.frame_received(self._session, message)

    def closed(self, code: int) -> None:
        """It is over."""
        if self._session is not None:
            self.factory.sessions.closed(self._session, code)


class ClientFactory(ServerFactory):
    """Listens for clients."""

    def __init__(
        self,
        *,
        sessions: ClientSessions,
        authenticator: IAuthenticator,
        settings: Settings,
        metrics: Metrics,
        reactor: Any,
        cork: Cork | None = None,
        reassembly_budget: ReassemblyBudget | None = None,
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
            cork=cork,
            reassembly_budget=reassembly_budget,
        )
        self.sessions = sessions
        self._reactor = reactor
        self._authenticator = authenticator
        self._origins = AllowedOrigins(settings.origin)

    def with_proxy_protocol(self) -> ClientFactory:
        """The same, all counts included, for an endpoint where the PROXY protocol tells who a client is: by its first
        bytes, while whoever is there before is the load balancer."""
        factory = copy.copy(self)
        factory.behind_proxy = True
        return factory

    def buildProtocol(self, addr: Any) -> Any:
        """Make the protocol of a connection; ``None`` drops it."""
        # Where the PROXY protocol is spoken, this is the address of the load balancer.
        if not self.behind_proxy and addr is not None and self.handshake_limiter.should_drop(getattr(addr, "host", "")):
            self.metrics.refused["dropped"] += 1
            return None
        return super().buildProtocol(addr)

    def wake(self, unparked: UnparkedSession) -> ClientProtocol:
        """Make a connection of one that was parked. Raises ``OSError`` if it is lost; its socket is then closed."""
        connection: ClientProtocol = adopt_socket(self._reactor, self, unparked.fd, unparked.family)
        connection.resume_session(unparked)
        return connection

    def authenticate(
        self, request: HandshakeRequest, certificate: Callable[[], bytes | None] = no_certificate
    ) -> Identity | Deferred[Identity]:
        """Whoever sent a request; ``certificate`` gives the one that TLS has verified.

        Raises, or fails with, :class:`Refusal`.
        """
        origin = request.headers.get("origin")
        if origin is not None and not self._origins.is_allowed(origin):
            raise RequestRefusedError(403, "origin", f"pages of the origin {safe_repr(origin)} may not connect here")
        presented = Credentials(extract_token(request), parse_client_id(request.query), certificate)
        try:
            identity = self._authenticator.authenticate(presented)
        except AuthenticationError as refused:
            raise _to_refused_error(refused) from None
        return identity.addErrback(_refuse_failed_authentication) if isinstance(identity, Deferred) else identity


def _refuse_failed_authentication(failure: Failure) -> NoReturn:
    if isinstance(failure.value, AuthenticationError):
        raise _to_refused_error(failure.value) from None
    failure.raiseException()


#: the longest address that is believed, in characters: an IPv6 address with the name of its interface, and a port
MAX_ADDRESS = 128

_TIMESTAMP = re.compile(r"[0-9]{1,12}")
_RELAY_PARAMETERS = ("client_id", "address", "until", "cap")


def parse_relay_query(query: str) -> tuple[str, str, int, int]:
    """The client_id, the address, when its token expires, and its certificate (in seconds since 1970; 0: never), of a
    raw query string.

    Raises :class:`Refusal` unless each is there once, but for the last that may be missing, and will do. Other
    parameters are not looked at.
    """
    found: dict[str, str] = {}
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if name not in _RELAY_PARAMETERS:
            continue
        if name in found:
            raise _bad_relay_query(f"it has {name} twice")
        found[name] = unquote_to_bytes(value).decode("latin-1")
    found.setdefault("cap", "0")
    for name in _RELAY_PARAMETERS:
        if name not in found:
            raise _bad_relay_query(f"it has no {name}")
    client_id, address, until, cap = (found[name] for name in _RELAY_PARAMETERS)
    if not is_client_id(client_id):
        raise RequestRefusedError(400, "client_id", "the client_id in the query of this relay is none")
    if not 0 < len(address) <= MAX_ADDRESS or not address.isascii() or not address.isprintable():
        raise _bad_relay_query(f"its address is not 1 to {MAX_ADDRESS} printable characters")
    for name in ("until", "cap"):
        if not _TIMESTAMP.fullmatch(found[name]):
            raise _bad_relay_query(f"its {name} is no number of seconds")
    return client_id, address, int(until), int(cap)


def _bad_relay_query(problem: str) -> RequestRefusedError:
    return RequestRefusedError(400, "request", f"the query of this relay will not do: {problem}")


class RelayedClientProtocol(ClientProtocol):
    """The connection of one client, through another node."""

    path = "/v1/relay"

    def authenticate(self, request: HandshakeRequest) -> Identity:
        """Who it is, as that node says. Raises :class:`Refusal`."""
        client_id, address, until, cap = parse_relay_query(request.query)
        self.factory.check_peer(request, client_id, address)
        self.address = address
        return Identity(client_id, until, cap)

    def connect_request(self, request: HandshakeRequest, identity: Identity) -> ConnectRequest:
        """What is known of it."""
        return ConnectRequest(
            identity.client_id,
            self.address,
            redirected_here=True,
            subprotocols=request.subprotocols,
            expires_at=identity.expires_at,
            max_expires_at=identity.max_expires_at,
        )


class RelayedClientFactory(ServerFactory):
    """Takes over connections to the backend endpoint that are relays. Once parked, and woken again, they are those of
    :class:`~gateway.clients.endpoint.ClientFactory`."""

    def __init__(
        self,
        *,
        sessions: ClientSessions,
        authenticate_peer: Callable[[str, str, str, str, str], str],
        authentication_error: type[Exception],
        settings: Settings,
        metrics: Metrics,
        reactor: Any,
        cork: Cork | None = None,
        reassembly_budget: ReassemblyBudget | None = None,
    ) -> None:
        """``peer_ok(header, method, target, client_id, address)`` gives the node_id of the node that signed a request,
        or raises ``not_a_peer``, whose text may be shown."""
        super().__init__(
            RelayedClientProtocol,
            metrics=metrics,
            reactor=reactor,
            max_message_size=settings.max_message_size,
            send_buffer=settings.send_buffer,
            burst=BURST_MESSAGES * settings.max_message_size,
            max_openings=settings.max_openings,
            cork=cork,
            reassembly_budget=reassembly_budget,
        )
        self.sessions = sessions
        self._authenticate_peer = authenticate_peer
        self._authentication_error = authentication_error

    def check_peer(self, request: HandshakeRequest, client_id: str, address: str) -> None:
        """Raises :class:`Refusal` unless a node of this fleet has signed a request."""
        target = f"{request.path}?{request.query}"
        try:
            self._authenticate_peer(request.headers.get("authorization", ""), "GET", target, client_id, address)
        except self._authentication_error as e:
            raise RequestRefusedError(401, "peer", f"this is for nodes of this fleet alone: {e}") from None
