"""What has gone wrong with TLS to another server, in words."""

from __future__ import annotations

from OpenSSL import SSL
from service_identity import VerificationError


def explain_tls(e: BaseException | None) -> str:
    """Why TLS was not to be had with a server, in a line; an empty text if it is not TLS that failed."""
    if isinstance(e, VerificationError):
        return "its certificate is not for the host in this url"
    if not isinstance(e, SSL.Error):
        return ""
    errors = e.args[0] if e.args else ()
    reason = errors[-1][2] if isinstance(errors, (list, tuple)) and errors else "it ended"
    if reason == "certificate verify failed":
        return f"its certificate has ended, or is of no CA that is trusted here ({reason}); is SSL_CERT_FILE needed?"
    return f"TLS failed ({reason})"
