"""Tickets: credentials in the URLs at which a node sends a client to another node.

Client libraries leave ``Authorization`` out when they follow a redirect to another host or port. The node that sends
the client away has authenticated it, and says so in the URL:

    wss://gw2.example.com/v1/connect?client_id=robot-7&wsgateway_hop=1&wsgateway_ticket=<ticket>
    <ticket>: v1.<method>.<valid until>.<expires at>.<nonce>.<mac>

``method`` is the ``--auth`` that accepted the client. The times are in whole seconds since 1970: when the ticket ends,
and when what the client has proved expires (0: never). The nonce has 32 hexadecimal digits. The mac is HMAC-SHA256, in
hexadecimal, of these lines, joined by a line feed. Its key is derived from the cluster secret for this purpose alone:

    v1.<method>.<valid until>.<expires at>.<nonce>
    the client_id
    the node_id of the node that the client is sent to

So a ticket is of no use to another client, at another node (or at the same one after a restart), later, or a second
time. A client certificate is proved by each connection itself: there is no ticket for it.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Container

from gateway.auth.errors import VerificationError
from gateway.auth.interface import TICKET_METHODS, AuthMethod, Identity
from gateway.settings import ConfigError

#: how long a ticket is valid after the client was asked to use it, in seconds
TICKET_LIFETIME = 30
#: a ticket that ends later than this is refused, in seconds: it would have to be remembered for as long
MAX_TICKET_LIFETIME = 120
#: the most tickets remembered as used: about what a node can open in TICKET_LIFETIME, and some 12 MiB
MAX_SPENT = 2**16

#: the purpose of the derived key: ``info`` of RFC 5869, section 2.3
_KEY_LABEL = b"wsgateway ticket v1"
_METHODS = {method.name.lower(): method for method in sorted(TICKET_METHODS)}
_TIMESTAMP = "0|[1-9][0-9]{0,11}"
_TICKET = re.compile(
    rf"(v1\.({'|'.join(_METHODS)})\.({_TIMESTAMP})\.({_TIMESTAMP})\.([0-9a-f]{{32}}))\.([0-9a-f]{{64}})"
)


class Tickets:
    """Issues tickets for other nodes, and redeems those for this one."""

    def __init__(
        self,
        node_id: str,
        secret: Callable[[], bytes],
        *,
        signing_secret: Callable[[], bytes] | None = None,
        wall_clock: Callable[[], float] = time.time,
        max_spent: int = MAX_SPENT,
    ) -> None:
        """``secret`` returns the cluster secret, empty if there is none yet; ``signing_secret`` creates it then. Both
        may raise :class:`~gateway.settings.ConfigError`. ``wall_clock`` is in seconds since 1970. With ``max_spent``
        tickets remembered, no other is redeemed until the first of them ends."""
        self._node_id = node_id
        self._secret = secret
        self._signing_secret = signing_secret or secret
        self._wall_clock = wall_clock
        self._max_spent = max_spent
        #: nonce -> when its ticket ends, in the order in which they were used
        self._spent: OrderedDict[str, int] = OrderedDict()
        #: the latest end of a ticket that was used and is forgotten
        self._forgotten_until = 0

    def issue(self, identity: Identity, node_id: str, after: float = 0.0) -> str:
        """Return a ticket for a client that is sent to a node, which it is to use in ``after`` seconds.

        Raises :class:`~gateway.settings.ConfigError` if the cluster secret cannot be read or created.
        """
        assert identity.method in TICKET_METHODS
        valid_until = math.ceil(self._wall_clock() + after) + TICKET_LIFETIME
        method, expires_at = identity.method.name.lower(), math.ceil(identity.expires_at)
        signed = f"v1.{method}.{valid_until}.{expires_at}.{os.urandom(16).hex()}"
        return f"{signed}.{_mac(self._signing_secret(), signed, identity.client_id, node_id)}"

    def redeem(self, ticket: str, client_id: str | None, methods: Container[AuthMethod]) -> Identity:
        """Return the identity of the client that presents a ticket, which is used up by that. ``methods`` are those
        that this node accepts.

        Raises :class:`~gateway.auth.errors.VerificationError`.
        """
        match = _TICKET.fullmatch(ticket)
        if match is None or client_id is None:
            raise _refusal("malformed")
        signed, method_name, end, expiry, nonce, mac = match.groups()
        try:
            secret = self._secret()
        except ConfigError:
            secret = b""
        if not secret or not hmac.compare_digest(_mac(secret, signed, client_id, self._node_id), mac):
            raise _refusal("signature")
        method, valid_until, expires_at = _METHODS[method_name], int(end), int(expiry)
        if method not in methods:
            raise _refusal("method")
        now = self._wall_clock()
        # After the clock was set back, a ticket could be valid again that is forgotten.
        if valid_until <= max(now, self._forgotten_until) or 0 < expires_at <= now:
            raise _refusal("expired")
        if valid_until > now + MAX_TICKET_LIFETIME:
            raise _refusal("early")
        self._spend(nonce, valid_until, now)
        return Identity(client_id, float(expires_at), method=method, ticket=ticket)

    def restore(self, ticket: str) -> None:
        """Make a ticket valid again that was redeemed for a connection which could not be opened."""
        match = _TICKET.fullmatch(ticket)
        if match is not None:
            self._spent.pop(match[5], None)

    def _spend(self, nonce: str, valid_until: int, now: float) -> None:
        spent = self._spent
        while spent and next(iter(spent.values())) <= now:
            _, end = spent.popitem(last=False)
            self._forgotten_until = max(self._forgotten_until, end)
        if nonce in spent:
            raise _refusal("spent")
        if len(spent) >= self._max_spent:
            # A ticket that is forgotten early could be used again.
            raise _refusal("full")
        spent[nonce] = valid_until


def _refusal(reason: str) -> VerificationError:
    return VerificationError(f"ticket_{reason}", text="the ticket in this URL is not accepted here")


def _mac(secret: bytes, *lines: str) -> str:
    return hmac.new(derive_key(secret), "\n".join(lines).encode(), hashlib.sha256).hexdigest()


def derive_key(secret: bytes) -> bytes:
    """Derive the key of tickets from the cluster secret: HKDF with SHA-256 (RFC 5869), without a salt, 32 bytes."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, _KEY_LABEL + b"\x01", "sha256")
