"""Errors of TLS, HTTP requests and the PROXY protocol."""

from __future__ import annotations

from OpenSSL import SSL


class InvalidProxyHeaderError(Exception):
    """What came is no PROXY header. Its text says why, and has nothing of what came."""


class ResponseTooLargeError(Exception):
    """An answer of more bytes than it may have."""


class FetchError(Exception):
    """There is no document. The text says why, in one line."""


class TLSError(SSL.Error):
    """TLS cannot go on. ``word`` is one of few, ``detail`` OpenSSL's own."""

    def __init__(self, detail: str, reason: str = "") -> None:
        super().__init__([("SSL routines", "", detail)])
        self.detail = detail
        self.reason = reason or next((word for part, word in _OPENSSL_REASONS.items() if part in detail), "other")


#: a part of OpenSSL's reason -> word; the first that fits
_OPENSSL_REASONS = {
    "DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "CERTIFICATE_HAS_ENDED": "certificate_expired",
    "ALERT_UNKNOWN_CA": "refused_by_client",
    "ALERT_BAD_CERTIFICATE": "refused_by_client",
    "ALERT_UNSUPPORTED_CERTIFICATE": "refused_by_client",
    "ALERT_CERTIFICATE": "refused_by_client",
    "UNSUPPORTED_PROTOCOL": "version",
    "VERSION_TOO_LOW": "version",
    "ALERT_PROTOCOL_VERSION": "version",
    "NO_SHARED_CIPHER": "version",
    "HTTP_REQUEST": "not_tls",
    "HTTPS_PROXY_REQUEST": "not_tls",
    "WRONG_VERSION_NUMBER": "not_tls",
    "UNKNOWN_PROTOCOL": "not_tls",
    "RECORD_LAYER_FAILURE": "not_tls",
    "PACKET_LENGTH_TOO_LONG": "not_tls",
    "TOO_MANY_RECORDS": "records",
}
