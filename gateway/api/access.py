"""Who may come in at the backend endpoint, for HTTP and WebSocket alike.

A browser must not become a backend by accident: it can be made to send requests to loopback and to private networks
by any page that it shows. So whatever a page can send is refused, in this order:

    -> an Origin header                                           <- 403 origin
    -> a node's credentials (but for /healthz and /readyz)        <- 401 peer
    -> without tokens: a Host that is not this endpoint's         <- 403 host (DNS rebinding)
    -> with tokens: no Authorization: Bearer, or a wrong one      <- 401 token, but for /healthz and /readyz
    -> a POST that is not application/json                        <- 415 content_type (forms, text/plain)

Whoever comes in has a grant: what its token is for. Whether it is for what is asked is for those to see who know what
that is about (clients.py, nodes.py, methods.py, upstream.py).

A node's credentials are for its link (peer_websocket.py) and its relays alone. There they are all that counts:

    -> an Origin header                                           <- 403 origin
    -> Authorization: Wsgateway-Peer, which is not right          <- 401 peer
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias
from urllib.parse import urlsplit

import attrs

from gateway.auth.backend_tokens import NO_GRANT, UNLIMITED, Grant
from gateway.cluster.errors import PeerAuthenticationError
from gateway.protocol.errors import RequestRefusedError

#: Tells the node_id of the node that sent a request, by the ``Authorization`` header, the HTTP method, the request
#: target, and the id and the address of the client that it is for, or two empty texts. Raises ``NotAPeer``.
AuthenticatePeer: TypeAlias = Callable[[str, str, str, str, str], str]
#: Tells what a token is for; ``None`` if it is not a backend's.
AuthenticateBackend: TypeAlias = Callable[[str], "Grant | None"]

#: what may be asked without a token
PUBLIC_PATHS = frozenset({"/healthz", "/readyz"})

_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[^][:]{1,255})(?::[0-9]{0,5})?")
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)
_PEER_SCHEME = re.compile(r"wsgateway-peer(?: |$)", re.IGNORECASE)
_PEER_CHALLENGE = [("WWW-Authenticate", "Wsgateway-Peer")]

_ORIGIN_REFUSED = (403, "origin", "browsers may not come in here: the request has an Origin header")


def has_peer_credentials(authorization: str) -> bool:
    """Whether the value of an ``Authorization`` header has a node's credentials, be they right or wrong."""
    return _PEER_SCHEME.match(authorization.strip()) is not None


@attrs.frozen
class AccessPolicy:
    """The rules of one node. ``grant_of`` tells what a backend's token is for; ``None``: nobody is asked for one, and
    everybody may do everything. ``peer_ok`` tells who another node is; ``None``: there are no others."""

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
        """``urls`` are those by which this node may be reached; an empty one is skipped."""
        hosts = (urlsplit(url).hostname for url in urls)
        return cls(authenticate_backend, frozenset(_normalize_host(host) for host in hosts if host), authenticate_peer)

    def check(self, method: str, path: str, header_values: Callable[[str], Sequence[str]]) -> Grant:
        """What who sends a request may do. Raises ``Refusal``. ``header`` gives the values of a header, ``path`` has no
        query."""
        if header_values("Origin"):
            raise RequestRefusedError(*_ORIGIN_REFUSED)
        if path not in PUBLIC_PATHS and any(map(has_peer_credentials, header_values("Authorization"))):
            message = "a node's own credentials are for its link at /v1/backend, and for its relays, alone"
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
        """The node_id of the node that asks for a link. Raises ``Refusal``. ``target`` is the path, and the query if
        there is one."""
        if header_values("Origin"):
            raise RequestRefusedError(*_ORIGIN_REFUSED)
        if self._authenticate_peer is None:
            raise RequestRefusedError(
                401, "peer", "this node is alone: it takes no links of other nodes", _PEER_CHALLENGE
            )
        try:
            return self._authenticate_peer(header_values("Authorization")[0], "GET", target, "", "")
        except PeerAuthenticationError as e:
            raise RequestRefusedError(
                401, "peer", f"no request of a node of this fleet: {e}", _PEER_CHALLENGE
            ) from None

    def _check_host(self, values: Sequence[str]) -> None:
        # None at all is HTTP/1.0: a load balancer's health check, and no browser.
        found = _HOST.fullmatch(values[0].strip().lower()) if len(values) == 1 else None
        if not values or (found and self._is_own_host(found[1])):
            return
        raise RequestRefusedError(
            403,
            "host",
            "the Host header names neither this machine's loopback nor the host of --public-url or --peer-url; "
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
    found = _BEARER.fullmatch(values[0].strip()) if len(values) == 1 else None
    grant = authenticate_backend(found[1]) if found else None
    if grant is not None:
        return grant
    message = (
        "this token is not in --backend-token-file"
        if found
        else "send one of the tokens of --backend-token-file, as one header Authorization: Bearer TOKEN"
    )
    raise RequestRefusedError(401, "token", message, [("WWW-Authenticate", "Bearer")])


def _normalize_host(host: str) -> str:
    """One way to write each host."""
    host = host.strip("[]").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _check_content_type(values: Sequence[str]) -> None:
    kind = values[0].partition(";")[0].strip().lower() if len(values) == 1 else ""
    if kind != "application/json":
        raise RequestRefusedError(415, "content_type", "a POST needs the header Content-Type: application/json")
