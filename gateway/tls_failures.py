"""Why TLS was not to be had with a client: by a word that is counted, and now and then by a line in the log.

Who looks for open ports makes TLS fail all day, and that is only counted. The log tells of certificates: what is wrong
there keeps out who should come in.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable

from OpenSSL import SSL
from twisted.logger import Logger

from gateway.telemetry.metrics import Metrics

#: the log tells of failures once in so many seconds
TELL_EVERY = 60.0
#: so many addresses are told apart between two lines
MAX_HOSTS = 1000

#: what the log tells of, and how
_TOLD = {
    "no_certificate": "the client has no certificate",
    "unknown_ca": "its certificate is of no CA in the file clientCAs",
    "certificate_expired": "its certificate has ended, or has not begun",
    "certificate": "its certificate will not do ({detail})",
    "refused_by_client": "the client does not take this node's certificate ({detail})",
}
#: what OpenSSL found wrong with a certificate (X509_V_ERR_…, openssl-verification-options(1))
_VERIFIED = {
    2: "unknown_ca",  # unable to get the issuer's certificate
    18: "unknown_ca",  # self-signed
    19: "unknown_ca",  # self-signed, in the chain
    20: "unknown_ca",  # unable to get the issuer's certificate locally
    21: "unknown_ca",  # unable to verify the first certificate
    9: "certificate_expired",  # not valid yet
    10: "certificate_expired",
}
#: a part of OpenSSL's reason -> word; the first that fits
_REASONS = {
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


class TLSError(SSL.Error):
    """TLS cannot go on. ``word`` is one of few, ``detail`` OpenSSL's own."""

    def __init__(self, detail: str, word: str = "") -> None:
        super().__init__([("SSL routines", "", detail)])
        self.detail = detail
        self.word = word or next((word for part, word in _REASONS.items() if part in detail), "other")


def of(e: ssl.SSLError) -> TLSError:
    """An error of Python's OpenSSL, as one of pyOpenSSL."""
    if isinstance(e, ssl.SSLCertVerificationError):
        return TLSError(e.verify_message, _VERIFIED.get(e.verify_code, "certificate"))
    return TLSError(e.reason or str(e))


class Failures:
    """Counts them for the endpoints of an option, and tells of some in the log."""

    _log = Logger()

    def __init__(self, option: str, metrics: Metrics, seconds: Callable[[], float]) -> None:
        self._option = option
        self._metrics = metrics
        self._seconds = seconds
        self._told_at = -math.inf
        self._untold = 0
        self._hosts: set[str] = set()

    def add(self, address: object, word: str, detail: str = "") -> None:
        """TLS failed with who is at that address."""
        self._metrics.tls_failures[word] += 1
        if word not in _TOLD:
            return
        host = str(getattr(address, "host", "here"))
        now = self._seconds()
        if now - self._told_at < TELL_EVERY:
            self._untold += 1
            if len(self._hosts) < MAX_HOSTS:
                self._hosts.add(host)
            return
        self._log.warn(
            "--{option}: TLS failed with {host}: {why} ({untold} times more since this was last said, with {hosts} "
            "addresses)",
            option=self._option,
            host=host,
            why=_TOLD[word].format(detail=" ".join(detail.split())),
            untold=self._untold,
            hosts=len(self._hosts),
        )
        self._told_at, self._untold, self._hosts = now, 0, set()
