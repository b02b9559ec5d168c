"""Where clients arrive that are connected to another node, which passes their bytes on.

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

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes

from gateway.auth.interface import Identity, is_client_id
from gateway.edge.connections import Edge
from gateway.edge.handshake import GuardedServerFactory
from gateway.edge.head import Refusal, Request
from gateway.edge.interface import Arrival
from gateway.edge.opening import BURST_MESSAGES, ClientProtocol
from gateway.edge.turn import Turn
from gateway.edge.unfinished import Unfinished
from gateway.settings import Settings
from gateway.telemetry.metrics import Metrics

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
    :class:`~gateway.edge.opening.ClientFactory`."""

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
