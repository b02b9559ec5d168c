"""WebSocket URIs that an agent connects to.

A user gives the URI of a node or of the fleet, ``ws://host[:port][/prefix]``; the path ``/v1/connect`` and the
``client_id`` are added. The URIs that a gateway hands out are complete.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs, quote, urljoin, urlsplit

import attrs

from gateway.protocol.client_id import CLIENT_ID_RULE, is_client_id

#: the path of the opening handshake, after the prefix
CONNECT_PATH = "/v1/connect"
#: query parameter of a credential that is in no log line and no repr; in the URIs that a gateway hands out
TICKET_PARAMETER = "wsgateway_ticket"

_TICKET = re.compile(rf"[?&]{TICKET_PARAMETER}=[^&#]*")
_VISIBLE_ASCII = re.compile(r"[!-~]+")
_DEFAULT_PORTS = {"ws": 80, "wss": 443}
_EXPECTED_FORM = "write ws://host[:port][/prefix] or wss://host[:port][/prefix]"


def without_ticket(url: str) -> str:
    """Remove the ticket from a URI, for a log line; the URI may be invalid."""
    return _TICKET.sub("", url)


@attrs.frozen
class WebSocketURI:
    """A parsed ``ws:`` or ``wss:`` URI (RFC 6455, section 3)."""

    secure: bool
    #: a name or an address; an IPv6 address without its brackets
    host: str
    port: int
    #: path and query, as in the request line
    resource: str = attrs.field(repr=lambda resource: repr(without_ticket(resource)))

    @property
    def host_header(self) -> str:
        """The host as in the ``Host`` header (RFC 3986, section 3.2.2)."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        """The whole URI; its port is always explicit."""
        return f"{'wss' if self.secure else 'ws'}://{self.host_header}:{self.port}{self.resource}"

    @property
    def loggable_url(self) -> str:
        """The whole URI without the ticket, for log lines and messages."""
        return without_ticket(self.url)

    def resolve_redirect(self, url: str) -> WebSocketURI:
        """Parse a URI that the gateway at this one handed out; it may be relative.

        Raises ``ValueError`` if it is not a URI, or if it has no TLS where this one has.
        """
        joined = urljoin(self.url, url)
        if joined.startswith("http"):  # from a load balancer that does not know WebSockets
            joined = "ws" + joined[len("http") :]
        target = parse_uri(joined)
        if self.secure and not target.secure:
            raise ValueError("it would go on without TLS")
        return target


def parse_uri(url: str) -> WebSocketURI:
    """Parse a complete URI. Raises ``ValueError``."""
    if not _VISIBLE_ASCII.fullmatch(url):
        raise ValueError(f"it has characters that a URL cannot have; {_EXPECTED_FORM}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"its host or port is invalid; {_EXPECTED_FORM}") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError(f"its scheme is neither ws nor wss; {_EXPECTED_FORM}")
    if not parts.hostname or port == 0:
        raise ValueError(f"it has no host, or port 0; {_EXPECTED_FORM}")
    if "@" in parts.netloc or "#" in url:
        raise ValueError(f"it has a user or a fragment; {_EXPECTED_FORM}")
    resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return WebSocketURI(parts.scheme == "wss", parts.hostname, port or _DEFAULT_PORTS[parts.scheme], resource)


def check_client_id(client_id: str) -> None:
    """Raise ``ValueError`` if this is not a client_id."""
    if not is_client_id(client_id):
        raise ValueError(f"client_id {client_id!r} is not {CLIENT_ID_RULE}")


def make_connect_uri(url: str, client_id: str | None) -> WebSocketURI:
    """Complete the URI that a user gave. Raises ``ValueError`` if it is invalid, or is for another client."""
    try:
        target = parse_uri(url)
    except ValueError as e:
        raise ValueError(f"{url!r} is not a valid URL: {e}") from None
    path, _, query = target.resource.partition("?")
    if not path.endswith(CONNECT_PATH):
        path = path.rstrip("/") + CONNECT_PATH
    if client_id is not None:
        check_client_id(client_id)
        client_ids = parse_qs(query).get("client_id")
        if client_ids is None:
            query = f"{query}&" if query else ""
            query += f"client_id={quote(client_id, safe='')}"
        elif client_ids != [client_id]:
            raise ValueError(f"url {url!r} names another client than client_id {client_id!r}")
    return attrs.evolve(target, resource=f"{path}?{query}" if query else path)
