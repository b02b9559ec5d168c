"""Access policy of the backend endpoint, the same for HTTP and WebSocket.

A browser must not become a backend by accident: any page can make it send requests to loopback and to private
networks. So whatever a page can send is refused. The checks, in this order:

    -> an Origin header                                           <- 403 origin
    -> a peer's credentials (except on /healthz and /readyz)      <- 401 peer
    -> without tokens: a Host that is not this endpoint's         <- 403 host (DNS rebinding)
    -> with tokens: no Authorization: Bearer, or a wrong one      <- 401 token (except on /healthz and /readyz)
    -> a POST that is not application/json                        <- 415 content_type (forms, text/plain)

The result is a grant: what the backend's token allows. The handlers check it (client_handlers.py,
node_handlers.py, methods.py, upstream.py).

A peer's credentials are valid only for its connection (peer_server.py) and for relays. The checks there:

    -> an Origin header                                           <- 403 origin
    -> Authorization: Wsgateway-Peer, invalid                     <- 401 peer
    -> … of a node of this fleet, but for another node            <- 401 wrong_node
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias
from urllib.parse import urlsplit

import attrs

from gateway.auth.backend_tokens import NO_GRANT, UNLIMITED, Grant
from gateway.cluster.errors import PeerAuthenticationError, WrongNodeError
from gateway.protocol.errors import RequestRefusedError

#: Takes the ``Authorization`` header, the HTTP method, the request target, and the client_id and address of a relayed
#: client (else two empty strings). Returns the node_id of the peer; raises ``PeerAuthenticationError``.
AuthenticatePeer: TypeAlias = Callable[[str, str, str, str, str], str]
#: Takes a token and returns its grant, or ``None`` if the token is unknown.
AuthenticateBackend: TypeAlias = Callable[[str], "Grant | None"]

#: paths that need no token
PUBLIC_PATHS = frozenset({"/healthz", "/readyz"})

_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[^][:]{1,255})(?::[0-9]{0,5})?")
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)
_PEER_SCHEME = re.compile(r"wsgateway-peer(?: |$)", re.IGNORECASE)
_PEER_CHALLENGE = [("WWW-Authenticate", "Wsgateway-Peer")]

_ORIGIN_REFUSED = (
    403,
    "origin",
    "browsers are not allowed here: the request has an Origin header; a program must leave it out "
    "(websocket-client: suppress_origin=True)",
)


def has_peer_credentials(authorization: str) -> bool:
    """Return whether the value of an ``Authorization`` header has a peer's credentials, valid or not."""
    return _PEER_SCHEME.match(authorization.strip()) is not None


@attrs.frozen
class AccessPolicy:
    """Access policy of one node.

    Without ``authenticate_backend`` no token is needed, and every request is allowed everything. Without
    ``authenticate_peer`` no peer is admitted.
    """

    _authenticate_backend: AuthenticateBackend | None
    _hosts: frozenset[str]
    _authenticate_peer: AuthenticatePeer | None = None

    @classmethod
    def make(
        cls,
        *,
        authenticate_backend: AuthenticateBackend | None,
        urls: Iterable[str],
        authenticate_peer: AuthenticatePeer | None = None,
    ) -> AccessPolicy:
        """Make the policy of a node that is reached at ``urls``; empty ones are skipped."""
        hosts = (urlsplit(url).hostname for url in urls)
        return cls(authenticate_backend, frozenset(_normalize_host(host) for host in hosts if host), authenticate_peer)

    def check(self, method: str, path: str, header_values: Callable[[str], Sequence[str]]) -> Grant:
        """Return the grant of a request, or raise ``RequestRefusedError``.

        ``path`` has no query; ``header_values`` returns the values of a header.
        """
        if header_values("Origin"):
            raise RequestRefusedError(*_ORIGIN_REFUSED)
        if path not in PUBLIC_PATHS and any(map(has_peer_credentials, header_values("Authorization"))):
            message = "a node's credentials are valid only for its connection to /v1/backend and for relays"
            raise RequestRefusedError(401, "peer", message, [("WWW-Authenticate", "Bearer")])
        grant = NO_GRANT
        if self._authenticate_backend is None:
            self._check_host(header_values("Host"))
            grant = UNLIMITED
        elif path not in PUBLIC_PATHS:
            grant = _check_token(self._authenticate_backend, header_values("Authorization"))
        if method == "POST":
            _check_content_type(header_values("Content-Type"))
        return grant

    def check_peer(self, target: str, header_values: Callable[[str], Sequence[str]]) -> str:
        """Return the node_id of a peer that opens a connection, or raise ``RequestRefusedError``.

        ``target`` is the path, with the query if there is one.
        """
        if header_values("Origin"):
            raise RequestRefusedError(*_ORIGIN_REFUSED)
        if self._authenticate_peer is None:
            raise RequestRefusedError(401, "peer", "this node has no peers", _PEER_CHALLENGE)
        try:
            return self._authenticate_peer(header_values("Authorization")[0], "GET", target, "", "")
        except PeerAuthenticationError as e:
            message = f"this is not a request of a node of this fleet: {e}"
            if isinstance(e, WrongNodeError):
                # Not alarming: the other node does not know yet that this one has been started here.
                message = f"the node that was here has been replaced: {e}"
                raise RequestRefusedError(401, "wrong_node", message, _PEER_CHALLENGE) from None
            raise RequestRefusedError(401, "peer", message, _PEER_CHALLENGE) from None

    def _check_host(self, values: Sequence[str]) -> None:
        # A request without Host is HTTP/1.0: a load balancer's health check, not a browser.
        match = _HOST.fullmatch(values[0].strip().lower()) if len(values) == 1 else None
        if not values or (match and self._is_own_host(match[1])):
            return
        raise RequestRefusedError(
            403,
            "host",
            "the Host header is neither a loopback address nor the host of --public-url or --peer-url; "
            "use one of these, or set --backend-token-file",
        )

    def _is_own_host(self, host: str) -> bool:
        host = _normalize_host(host)
        if host == "localhost" or host in self._hosts:
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def _check_token(authenticate_backend: AuthenticateBackend, values: Sequence[str]) -> Grant:
    match = _BEARER.fullmatch(values[0].strip()) if len(values) == 1 else None
    grant = authenticate_backend(match[1]) if match else None
    if grant is not None:
        return grant
    message = (
        "this token is not in --backend-token-file"
        if match
        else "send one of the tokens of --backend-token-file, as one header Authorization: Bearer TOKEN"
    )
    raise RequestRefusedError(401, "token", message, [("WWW-Authenticate", "Bearer")])


def _normalize_host(host: str) -> str:
    """Return the canonical form of a host name or address."""
    host = host.strip("[]").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _check_content_type(values: Sequence[str]) -> None:
    media_type = values[0].partition(";")[0].strip().lower() if len(values) == 1 else ""
    if media_type != "application/json":
        raise RequestRefusedError(415, "content_type", "a POST needs the header Content-Type: application/json")
