"""Tell in the log which limit slows, refuses or disconnects a client, and its value.

    client robot-7 at 192.0.2.7:4711 is slowed: --messages-per-client 200
    client robot-7 at 192.0.2.7:4711 is disconnected: --send-buffer 4194304: it reads too slowly
    a client at 192.0.2.7:4711 was refused, its id is not known: --openings-per-address 100 (41 more since …)

Each kind of line at most once in some seconds, however many clients there are. The counters of the metrics have all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from gateway.clients.admission import MAX_REPLACEMENTS, REPLACEMENT_WINDOW
from gateway.clients.interface import Session
from gateway.protocol.errors import RequestRefusedError
from gateway.protocol.handshake import HandshakeRequest, safe_repr
from gateway.settings import Settings
from gateway.util.log import RateLimitedLogger

_CLIENT_ID = re.compile(r"(?:^|&)client_id=([^&]*)")


class LimitLog:
    """Writes these lines for the connections of one node."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._logger = RateLimitedLogger(clock)
        #: the limits behind refusals, by error word
        self._limits = {
            "rate": f"--openings-per-address {settings.openings_per_address:g}",
            "openings": f"--max-openings {settings.max_openings:g}",
            "full": f"--capacity {settings.capacity}",
            "replaced": f"more than {MAX_REPLACEMENTS} connections of one client in {REPLACEMENT_WINDOW:g} s",
        }

    def refused(self, refusal: RequestRefusedError, address: str, request: HandshakeRequest | None) -> None:
        """Report a refused opening handshake, if a limit is the reason. The request is ``None`` if it is not known."""
        limit = self._limits.get(refusal.reason)
        if limit is None:
            return
        claimed = _CLIENT_ID.search(request.query) if request is not None else None
        client = f"it says it is {safe_repr(unquote(claimed[1]))}" if claimed else "its id is not known"
        text = f"a client at {{address}} was refused ({refusal.reason}), {{client}}: {{limit}}"
        self._logger.warn(text, address=address, client=client, limit=limit)

    def dropped(self, address: str) -> None:
        """Report a connection that was dropped without a response."""
        limit = f"{self._limits['rate']} or {self._limits['openings']}, and more refusals than are sent in a second"
        text = "a client at {address} was dropped without a response: {limit}"
        self._logger.warn(text, address=address, limit=limit)

    def disconnected(self, session: Session, option: str) -> None:
        """Report a client that is disconnected because of the limit of an option."""
        text = "client {client_id} at {address} is disconnected: {option}"
        self._logger.warn(text, client_id=session.client_id, address=session.address, option=option)
