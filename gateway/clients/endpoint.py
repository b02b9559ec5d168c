"""Client endpoints: WebSocket connections of clients, direct and relayed by another node.

Direct, at the public URL:

-> GET /v1/connect?client_id=robot-7 HTTP/1.1          Authorization: Bearer T, or
                                                        Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1, wsgateway.bearer.T
                                                        (or wsgateway.bearer64.B, with the token in base64url)
<- HTTP/1.1 101 Switching Protocols                     Sec-WebSocket-Protocol: wsgateway.jsonrpc.v1, if it was offered

or a refusal, with its error word in the body:

<- 307 elsewhere (Location)                             if the client sent Wsgateway-Redirect: 1; else it is relayed
<- 400 request, header, method, upgrade, client_id      401 token, ticket       403 origin, identity        404 path
<- 429 replaced (Retry-After)                           500 internal
<- 503 starting, draining, registry, keys, full, rate, openings, timeout (Retry-After)

Sent here by another node, whose URL has a ticket if the client gets one (``gateway.auth.tickets``):

-> GET /v1/connect?client_id=robot-7&wsgateway_hop=1&wsgateway_ticket=v1.… HTTP/1.1      no token is needed

Relayed, at the peer URL: the client is connected to another node, which relays its bytes.

-> GET /v1/relay?client_id=robot-7&address=192.0.2.7%3A4711&until=0 HTTP/1.1
     Authorization: Wsgateway-Peer …                    signs the request
<- HTTP/1.1 101 Switching Protocols                     from here on the same as a direct connection
<- 401 peer                                             not a node of this fleet
<- the refusals of /v1/connect

The other node has authenticated the client, and signs its id and address. The rest of the request is ignored: tokens,
Origin and ``Wsgateway-*``. There is no handshake limit per address, since relays come from few addresses and the other
node has applied it.
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

from gateway.auth import bearer
from gateway.auth.errors import (
    AuthenticationError,
    ClientIdMissingError,
    IdentityMismatchError,
    KeysUnavailableError,
    TicketRefusedError,
    TokenRefusedError,
)
from gateway.auth.interface import (
    TICKET_METHODS,
    AuthMethod,
    Credentials,
    IAuthenticator,
    Identity,
    no_certificate,
)
from gateway.auth.origin import AllowedOrigins, OwnOrigins, suggest_pattern
from gateway.clients.health_check import health_response, may_be_health_check
from gateway.clients.interface import ConnectRequest, IConnection, Session, UnparkedSession
from gateway.clients.limit_log import LimitLog
from gateway.clients.sessions import ClientSessions
from gateway.metrics import Metrics
from gateway.net.tls import verified_certificate
from gateway.net.transport import adopt_socket
from gateway.protocol.client_id import CLIENT_ID_RULE, is_client_id
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import HandshakeRequest, retry_after_header, safe_repr
from gateway.protocol.jsonrpc import SUBPROTOCOL
from gateway.protocol.uri import TICKET_PARAMETER
from gateway.settings import Settings
from gateway.util.cork import Cork
from gateway.websocket.reassembly import ReassemblyBudget
from gateway.websocket.server import ServerFactory, ServerProtocol, format_address

#: messages of maximum size that may be buffered for a moment beyond --send-buffer, such as a few calls at once
BURST_MESSAGES = 4

#: query parameter of URLs that nodes redirect to: such a client is not routed again
HOP_PARAMETER = "wsgateway_hop=1"

_BEARER_HEADER = re.compile(r"bearer(?: +(.*))?", re.IGNORECASE)
_REFUSALS: dict[type[AuthenticationError], tuple[int, str, tuple[tuple[str, str], ...]]] = {
    ClientIdMissingError: (400, "client_id", ()),
    TokenRefusedError: (401, "token", (("WWW-Authenticate", "Bearer"),)),
    TicketRefusedError: (401, "ticket", (("WWW-Authenticate", "Bearer"),)),
    IdentityMismatchError: (403, "identity", ()),
    KeysUnavailableError: (503, "keys", (retry_after_header(1),)),
}


def parse_client_id(query: str) -> str | None:
    """Return the client_id in a raw query string, or ``None`` if there is none.

    A ``+`` is a plus. Raises ``RequestRefusedError`` if client_id is given twice, or is invalid. Ignores other
    parameters.
    """
    raw: str | None = None
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if unquote_to_bytes(name) != b"client_id":
            continue
        if raw is not None:
            raise RequestRefusedError(400, "client_id", "the query has client_id twice")
        raw = value
    if raw is None:
        return None
    # unquote_to_bytes leaves a % that starts no escape; then the check fails, since no client_id has a %.
    client_id = unquote_to_bytes(raw).decode("latin-1")
    if not is_client_id(client_id):
        raise RequestRefusedError(
            400,
            "client_id",
            f"{safe_repr(client_id)} is not a client_id: {CLIENT_ID_RULE}",
        )
    return client_id


def parse_ticket(query: str) -> str | None:
    """Return the ticket in a raw query string, or ``None`` if there is none.

    Returns an empty string, which is no valid ticket, if there are several, or if the query lacks the parameter of the
    URLs that nodes redirect to. Ignores other parameters.
    """
    if TICKET_PARAMETER not in query:
        return None
    parameters = query.split("&")
    tickets = [value for name, _, value in (part.partition("=") for part in parameters) if name == TICKET_PARAMETER]
    if not tickets:
        return None
    return tickets[0] if len(tickets) == 1 and HOP_PARAMETER in parameters else ""


def extract_token(request: HandshakeRequest) -> str | None:
    """Return the token of a request, from the Authorization header or a subprotocol, or ``None`` if there is none.

    Raises ``RequestRefusedError`` if there are two that differ, or any two of which one is in base64url.
    """
    offered = [name for name in request.subprotocols if bearer.is_bearer(name)]
    if any(name.startswith(bearer.BASE64_PREFIX) for name in offered):
        if len(offered) > 1 or "authorization" in request.headers:
            raise _bad_bearer64("must be the only credential: leave the header Authorization and other tokens out")
        try:
            return bearer.decode_bearer64(offered[0][len(bearer.BASE64_PREFIX) :])
        except ValueError as e:
            raise _bad_bearer64(str(e)) from None
    tokens = {name[len(bearer.PREFIX) :] for name in offered}
    header = _BEARER_HEADER.fullmatch(request.headers.get("authorization", ""))
    if header is not None:
        tokens.add(header[1] or "")
    if len(tokens) > 1:
        raise _to_refused_error(TokenRefusedError("the request has two different tokens"))
    return tokens.pop() if tokens else None


def _bad_bearer64(problem: str) -> RequestRefusedError:
    return RequestRefusedError(400, "header", f"the token behind {bearer.BASE64_PREFIX} {problem}")


def _to_refused_error(error: AuthenticationError) -> RequestRefusedError:
    status, reason, headers = _REFUSALS[type(error)]
    return RequestRefusedError(status, reason, str(error), headers)


@implementer(IConnection)
class ClientProtocol(ServerProtocol):
    """WebSocket connection of one client."""

    path = "/v1/connect"
    factory: Any
    _session: Session | None = None
    #: the relay to the node that serves the client, if it is not this one
    _relay: Any = None
    #: the ticket that was redeemed for this connection, until it opens
    _redeemed_ticket = ""

    def refuse(self, refusal: RequestRefusedError) -> None:
        """Refuse the request; the log tells which limit is the reason, if one is."""
        if self.state == self.STATE_CONNECTING:
            self.factory.limit_log.refused(refusal, self.address or "an unknown address", self._request)
        super().refuse(refusal)

    def limit_exceeded(self, option: str) -> None:
        if self._session is not None:
            self.factory.limit_log.disconnected(self._session, option)

    def may_respond(self, data: bytes) -> bool:
        return may_be_health_check(data)

    def respond(self, head: bytes) -> bytes | None:
        """Respond to health checks."""
        return health_response(head, self.factory.is_ready)

    def admit(self, request: HandshakeRequest) -> Deferred[str | None]:
        """Authenticate the client and claim it."""
        return Deferred.fromCoroutine(self._admit(request))

    async def _admit(self, request: HandshakeRequest) -> str | None:
        identity = self.authenticate(request)
        if isinstance(identity, Deferred):
            identity = await identity
        if identity.ticket:
            self._redeemed_ticket = identity.ticket
        try:
            decision = await self.factory.sessions.admit(self.connect_request(request, identity))
        except BaseException:
            self._restore_ticket()
            raise
        if isinstance(decision, Session):
            self._session = decision
        elif decision.relay is None:
            raise RequestRefusedError(
                307, "elsewhere", "another node serves this client: follow Location", [("Location", decision.url)]
            )
        else:
            self._relay = decision.relay
        return SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None

    def authenticate(self, request: HandshakeRequest) -> Identity | Deferred[Identity]:
        """Return the client's identity. Raises, or fails with, ``RequestRefusedError``."""
        identity: Identity | Deferred[Identity] = self.factory.authenticate(
            request, partial(verified_certificate, self.transport), self.transport.getHost
        )
        return identity

    def _restore_ticket(self) -> None:
        """Let the client try again with its ticket: it is used up only by a connection that opens."""
        if self._redeemed_ticket:
            self.factory.restore_ticket(self._redeemed_ticket)
            del self._redeemed_ticket

    def connect_request(self, request: HandshakeRequest, identity: Identity) -> ConnectRequest:
        accepts_redirect = request.headers.get("wsgateway-redirect") == "1"
        gets_tickets = accepts_redirect and identity.method in TICKET_METHODS
        return ConnectRequest(
            identity.client_id,
            self.address,
            redirected_here=HOP_PARAMETER in request.query.split("&"),
            accepts_redirect=accepts_redirect,
            subprotocols=tuple(name for name in request.subprotocols if not bearer.is_bearer(name)),
            expires_at=identity.expires_at,
            max_expires_at=identity.max_expires_at,
            ticket_method=identity.method if gets_tickets else AuthMethod.NONE,
        )

    def admission_abandoned(self) -> None:
        """Release the claim, or the relay, of a connection that could not be opened."""
        self._restore_ticket()
        if self._session is not None:
            self.factory.sessions.abandon(self._session)
        elif self._relay is not None:
            self._relay.abandon()

    def opened(self) -> None:
        """Register the open connection, or attach it to its relay."""
        if self._redeemed_ticket:
            del self._redeemed_ticket
        if self._session is not None:
            self.factory.sessions.opened(self._session, self)
        else:
            self._relay.attach(self)

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        if self._session is not None and not self.data:
            self.factory.sessions.on_idle(self._session)

    def resume_session(self, unparked: UnparkedSession) -> None:
        """Continue a session that was parked."""
        self._session = unparked.session
        self.address = unparked.session.address
        self.last_received_at = unparked.last_received_at

    def text_received(self, payload: bytes) -> None:
        self.factory.sessions.handle_message(self._session, payload)

    def frame_received(self) -> None:
        self.factory.sessions.frame_received(self._session)

    def closed(self, code: int) -> None:
        if self._session is not None:
            self.factory.sessions.closed(self._session, code)


class ClientFactory(ServerFactory):
    """Factory for client connections."""

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
        is_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        """``is_ready`` returns whether the node takes clients, for health checks. Raises
        :class:`~gateway.settings.ConfigError` for an invalid origin pattern."""
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
        self.is_ready = is_ready
        self.limit_log = LimitLog(settings, reactor.seconds)
        self._reactor = reactor
        self._authenticator = authenticator
        self._origins = AllowedOrigins(settings.origin)
        #: of the urls of this node, as far as they are known
        self.own_origins = OwnOrigins(settings.public_url)

    def with_proxy_protocol(self) -> ClientFactory:
        """Return a copy for an endpoint behind a load balancer that sends the PROXY protocol. It shares all counters;
        the client's address is known only when the PROXY header was read."""
        factory = copy.copy(self)
        factory.behind_proxy = True
        return factory

    def buildProtocol(self, addr: Any) -> Any:
        # Behind a load balancer, this is the address of the load balancer.
        if not self.behind_proxy and addr is not None and self.handshake_limiter.should_drop(getattr(addr, "host", "")):
            self.metrics.refused["dropped"] += 1
            self.limit_log.dropped(format_address(addr))
            return None
        return super().buildProtocol(addr)

    def wake(self, unparked: UnparkedSession) -> ClientProtocol:
        """Build the connection of a session that was parked. Raises ``OSError`` if the connection is lost; its socket
        is closed then."""
        connection: ClientProtocol = adopt_socket(self._reactor, self, unparked.fd, unparked.family)
        connection.resume_session(unparked)
        return connection

    def authenticate(
        self,
        request: HandshakeRequest,
        certificate: Callable[[], bytes | None] = no_certificate,
        local_address: Callable[[], object] = lambda: None,
    ) -> Identity | Deferred[Identity]:
        """Authenticate the client that sent a request.

        ``certificate`` returns the certificate that TLS has verified, ``local_address`` the address at which the
        connection was accepted. Raises, or fails with, ``RequestRefusedError``.
        """
        origin = request.headers.get("origin")
        if origin is not None:
            self._check_origin(origin, local_address)
        token = extract_token(request)
        ticket = parse_ticket(request.query) if token is None else None
        credentials = Credentials(token, parse_client_id(request.query), certificate, ticket)
        try:
            identity = self._authenticator.authenticate(credentials)
        except AuthenticationError as e:
            raise _to_refused_error(e) from None
        return identity.addErrback(_refuse_failed_authentication) if isinstance(identity, Deferred) else identity

    def restore_ticket(self, ticket: str) -> None:
        """Make a ticket valid again that was redeemed for a connection which did not open."""
        self._authenticator.restore_ticket(ticket)

    def _check_origin(self, origin: str, local_address: Callable[[], object]) -> None:
        """Raise ``RequestRefusedError`` for the origin of a page that may not connect."""
        if self._origins.is_allowed(origin) or self.own_origins.includes(origin, local_address()):
            return
        pattern = suggest_pattern(origin)
        remedy = "" if pattern is None else f"; --origin {pattern} would let them in"
        raise RequestRefusedError(
            403, "origin", f"pages of the origin {safe_repr(origin)} may not connect here{remedy}"
        )


def _refuse_failed_authentication(failure: Failure) -> NoReturn:
    if isinstance(failure.value, AuthenticationError):
        raise _to_refused_error(failure.value) from None
    failure.raiseException()


#: longest accepted address, in characters: an IPv6 address with an interface name, and a port
MAX_ADDRESS = 128

_TIMESTAMP = re.compile(r"[0-9]{1,12}")
_RELAY_PARAMETERS = ("client_id", "address", "until", "cap")


def parse_relay_query(query: str) -> tuple[str, str, int, int]:
    """Parse the raw query string of a relay request.

    Returns the client_id, the address, when the token expires and when the certificate expires (in seconds since 1970;
    0: never). Raises ``RequestRefusedError`` unless each parameter is there once and valid; only ``cap`` may be
    missing. Ignores other parameters.
    """
    values: dict[str, str] = {}
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if name not in _RELAY_PARAMETERS:
            continue
        if name in values:
            raise _bad_relay_query(f"it has {name} twice")
        values[name] = unquote_to_bytes(value).decode("latin-1")
    values.setdefault("cap", "0")
    for name in _RELAY_PARAMETERS:
        if name not in values:
            raise _bad_relay_query(f"it has no {name}")
    client_id, address, until, cap = (values[name] for name in _RELAY_PARAMETERS)
    if not is_client_id(client_id):
        raise RequestRefusedError(400, "client_id", "the client_id in the query of this relay is invalid")
    if not 0 < len(address) <= MAX_ADDRESS or not address.isascii() or not address.isprintable():
        raise _bad_relay_query(f"its address is not 1 to {MAX_ADDRESS} printable characters")
    for name in ("until", "cap"):
        if not _TIMESTAMP.fullmatch(values[name]):
            raise _bad_relay_query(f"its {name} is not a number of seconds")
    return client_id, address, int(until), int(cap)


def _bad_relay_query(problem: str) -> RequestRefusedError:
    return RequestRefusedError(400, "request", f"the query of this relay is invalid: {problem}")


class RelayedClientProtocol(ClientProtocol):
    """WebSocket connection of one client, relayed by another node."""

    path = "/v1/relay"

    def may_respond(self, data: bytes) -> bool:
        return False

    def respond(self, head: bytes) -> None:
        """Refuse any other request."""

    def authenticate(self, request: HandshakeRequest) -> Identity:
        """Return the identity that the other node has signed. Raises ``RequestRefusedError``."""
        client_id, address, until, cap = parse_relay_query(request.query)
        self.factory.check_peer(request, client_id, address)
        self.address = address
        return Identity(client_id, until, cap)

    def connect_request(self, request: HandshakeRequest, identity: Identity) -> ConnectRequest:
        return ConnectRequest(
            identity.client_id,
            self.address,
            redirected_here=True,
            subprotocols=request.subprotocols,
            expires_at=identity.expires_at,
            max_expires_at=identity.max_expires_at,
        )


class RelayedClientFactory(ServerFactory):
    """Factory for relayed client connections to the backend endpoint.

    A relayed connection that was parked is a :class:`ClientProtocol` when it is woken.
    """

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
        """``authenticate_peer(header, method, target, client_id, address)`` returns the node_id of the node that signed
        a request, or raises ``authentication_error``, whose text is sent to the peer."""
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
        self.limit_log = LimitLog(settings, reactor.seconds)
        self._authenticate_peer = authenticate_peer
        self._authentication_error = authentication_error

    def check_peer(self, request: HandshakeRequest, client_id: str, address: str) -> None:
        """Raise ``RequestRefusedError`` unless a node of this fleet has signed a request."""
        target = f"{request.path}?{request.query}"
        try:
            self._authenticate_peer(request.headers.get("authorization", ""), "GET", target, client_id, address)
        except self._authentication_error as e:
            raise RequestRefusedError(401, "peer", f"only nodes of this fleet may relay clients: {e}") from None
