"""Exceptions of this package.

* :exc:`InvalidProxyHeaderError`
* :exc:`FetchError`
* ``ValueError``

  * :exc:`FileContentError`
* :exc:`ResponseTooLargeError`
* ``OpenSSL.SSL.Error``

  * :exc:`TLSError`
"""

from __future__ import annotations

from OpenSSL import SSL


class InvalidProxyHeaderError(Exception):
    """The bytes received are not a PROXY header. The message gives the reason and contains nothing of these bytes."""


class FileContentError(ValueError):
    """A file of a TLS endpoint cannot be used. The message names it, and is one line."""


class ResponseTooLargeError(Exception):
    """An HTTP response exceeds its maximum size."""


class FetchError(Exception):
    """A document could not be fetched. The message gives the reason in one line."""


class TLSError(SSL.Error):
    """A TLS connection failed. ``detail`` is the reason of OpenSSL; ``reason`` is the label value for metrics."""

    def __init__(self, detail: str, reason: str = "") -> None:
        super().__init__([("SSL routines", "", detail)])
        self.detail = detail
        self.reason = reason or next((label for part, label in _OPENSSL_REASONS.items() if part in detail), "other")


#: substring of OpenSSL's reason -> label value; the first match applies
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
