"""Tests of gateway.net.tls; tests.cluster.test_peer_tls and tests.auth.test_fetching have them of real TLS."""

from __future__ import annotations

from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.error import ConnectionDone
from twisted.trial.unittest import SynchronousTestCase

from gateway.net.tls import describe_tls_error


class DescribeTLSErrorTests(SynchronousTestCase):
    def test_what_goes_wrong(self) -> None:
        for problem, said in [
            (ConnectionDone(), "^$"),
            (None, "^$"),
            (VerificationError([]), "^its certificate is not for the host"),
            (SSL.Error([("SSL routines", "", "certificate verify failed")]), "SSL_CERT_FILE"),
            (SSL.Error([("SSL routines", "", "wrong version number")]), r"^TLS failed \(wrong version number\)$"),
            (SSL.Error([]), "TLS failed"),
            (SSL.Error(), "TLS failed"),
            (SSL.ZeroReturnError(), "TLS failed"),
            (SSL.SysCallError(-1, "Unexpected EOF"), "TLS failed"),
        ]:
            self.assertRegex(describe_tls_error(problem), said)
            self.assertNotIn("\n", describe_tls_error(problem))
