"""Health checks at the client endpoint, for proxies that can only ask the port that they forward to.

    -> GET /readyz HTTP/1.1                 <- 200 {"ready":true}, or 503 {"ready":false} without a reason
    -> GET /healthz HTTP/1.1                <- 200 {"healthy":true}
    -> HEAD …                               <- the same without a body

The connection is closed after the response. The Host header does not matter: proxies send anything there.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from gateway.protocol.handshake import encode_response

#: how the requests begin
_BEGINNINGS = (b"GET /healthz", b"GET /readyz", b"HEAD /healthz", b"HEAD /readyz")
_REQUEST = re.compile(rb"(GET|HEAD) /(healthz|readyz)(?:\?[!-~]*)? HTTP/1\.[01]\r\n")


def may_be_health_check(data: bytes) -> bool:
    """Return whether the first bytes of a connection may be those of a health check."""
    return any(beginning.startswith(data[: len(beginning)]) for beginning in _BEGINNINGS)


def health_response(head: bytes, is_ready: Callable[[], bool]) -> bytes | None:
    """Return the whole response to a health check; ``None`` if a request's head is that of anything else."""
    request = _REQUEST.match(head)
    if request is None:
        return None
    method, name = request.groups()
    if name == b"healthz":
        status, body = 200, b'{"healthy":true}'
    elif is_ready():
        status, body = 200, b'{"ready":true}'
    else:
        status, body = 503, b'{"ready":false}'
    response = encode_response(status, body)
    return response[: -len(body)] if method == b"HEAD" else response
