"""How nodes prove themselves to each other: a short-lived signature under the cluster secret, once for each request.

-> Authorization: Wsgateway-Peer v1.<from>.<to>.<expires>.<nonce>.<mac>

``from`` and ``to`` are node_ids, ``expires`` is in whole seconds since 1970, the nonce has 32 hexadecimal digits. The
mac is HMAC-SHA256, in hexadecimal, of these lines, joined by a line feed:

    v1.<from>.<to>.<expires>.<nonce>
    the HTTP method
    the request target: the path, and the query if there is one, as this node is asked for it
    the client_id     both empty unless the connection
    its address       is a client's

Whoever records one cannot use it again, nor at another node, nor for another request, nor later. It does not say
anything of the node that is asked: that is what TLS (a wss peer url) is for.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable

from gateway.cluster.secret import Secret
from gateway.settings import ConfigError

SCHEME = "Wsgateway-Peer"
#: for how long a signature is good, in seconds; it is refused if it says that it is so for more than the second
LIFETIME, LONGEST_LIFETIME = 30, 60
#: for how long the nonces of those that were good are remembered, in seconds; and how many at most
NONCE_MEMORY, MAX_NONCES = 60, 262144

#: what :class:`NotAPeer` says of a request for another node: whoever was at this address before is there no more
OTHER_NODE = "it is meant for another node than this one"

_HEADER = re.compile(
    r"(?i:Wsgateway-Peer) +(v1\.([0-9A-Za-z-]{1,64})\.([0-9A-Za-z-]{1,64})\.([0-9]{1,15})\.([0-9a-f]{32}))"
    r"\.([0-9a-f]{64})"
)


class NotAPeer(Exception):
    """A request is not that of a node of this fleet; the text says why not, without anything of what it sent."""


class Credentials:
    """Signs what this node asks of others, and checks what others ask of it."""

    def __init__(
        self, node_id: str, secret: Secret | Callable[[], bytes], now: Callable[[], float] = time.time
    ) -> None:
        """``now`` is in seconds since 1970. ``secret`` gives an empty one where there is none yet."""
        self._node_id = node_id
        self._secret = secret
        self._secret_to_sign = secret.to_sign if isinstance(secret, Secret) else secret
        self._now = now
        #: when each was seen, the oldest first
        self._nonces: dict[str, float] = {}

    def sign(self, to: str, method: str, target: str, client_id: str = "", address: str = "") -> str:
        """The value of the ``Authorization`` header of one request to the node ``to``. Raises
        :class:`~gateway.settings.ConfigError` when the secret cannot be read, or made."""
        signed = f"v1.{self._node_id}.{to}.{int(self._now()) + LIFETIME}.{os.urandom(16).hex()}"
        return f"{SCHEME} {signed}.{_mac(self._secret_to_sign(), signed, method, target, client_id, address)}"

    def verify(self, header: str, method: str, target: str, client_id: str = "", address: str = "") -> str:
        """The node_id of the node that signed a request with that ``Authorization`` header. Raises
        :class:`NotAPeer`."""
        found = _HEADER.fullmatch(header)
        if found is None or "\n" in target + client_id + address:
            raise NotAPeer(f"the Authorization is not {SCHEME} v1.from.to.expires.nonce.mac")
        signed, sender, to, expires, nonce, mac = found.groups()
        if to != self._node_id:
            raise NotAPeer(OTHER_NODE)
        if sender == self._node_id:
            raise NotAPeer("it is this node's own")
        now = self._now()
        if not now <= int(expires) < now + LONGEST_LIFETIME:
            raise NotAPeer("it is not of this time: the clocks of the two nodes are to agree to some seconds")
        try:
            secret = self._secret()
        except ConfigError:
            raise NotAPeer("this node cannot read its own cluster secret") from None
        if not secret:
            raise NotAPeer("this node has no cluster secret: the nodes of one machine share one beside their registry")
        if not hmac.compare_digest(_mac(secret, signed, method, target, client_id, address), mac):
            raise NotAPeer("the signature is wrong: the cluster secrets differ")
        self._remember(nonce, now)
        return sender

    def _remember(self, nonce: str, now: float) -> None:
        nonces = self._nonces
        while nonces:
            oldest = next(iter(nonces))
            if nonces[oldest] + NONCE_MEMORY > now:
                break
            del nonces[oldest]
        if nonce in nonces:
            raise NotAPeer("it was used before")
        if len(nonces) >= MAX_NONCES:
            # To forget one early would let it be used again.
            raise NotAPeer(f"more than {MAX_NONCES} requests of nodes came within {NONCE_MEMORY} s")
        nonces[nonce] = now


def _mac(secret: bytes, *lines: str) -> str:
    text = "\n".join(lines).encode(errors="surrogatepass")
    return hmac.new(secret, text, hashlib.sha256).hexdigest()
