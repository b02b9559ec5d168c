"""How TLS is spoken with other nodes: whom to trust, and what this node shows them.

A node is verified by the host in its peer url, a name or an address, against the CAs that the platform trusts;
``SSL_CERT_FILE`` in the environment names a file of others, such as a fleet's own. TLS 1.2 or newer is Twisted's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from OpenSSL import crypto
from twisted.internet.ssl import optionsForClientTLS

from gateway.certificates import Certificates

#: of so many hosts it is remembered how TLS is spoken with them
MAX_HOSTS = 256


class PeerTLS:
    """What TLS connections to other nodes are made of."""

    def __init__(self, trust_root: Any = None, own: Callable[[], Certificates | None] = lambda: None) -> None:
        """``trust_root`` (Twisted's ``IOpenSSLTrustRoot``) vouches for the others' certificates; by default who the
        platform trusts. ``own`` gives what this node shows to those that ask for a certificate."""
        self._trust_root = trust_root
        self._own = own
        #: host -> how TLS is spoken with it
        self._options: dict[str, Any] = {}

    def options(self, host: str) -> Any:
        """How TLS is spoken with a host (Twisted's ``IOpenSSLClientConnectionCreator``). Raises ``ValueError`` for what
        is no name."""
        # To read what the platform trusts takes longer than all the rest.
        options = self._options.get(host)
        if options is None:
            if len(self._options) >= MAX_HOSTS:
                self._options.clear()
            options = optionsForClientTLS(host, trustRoot=self._trust_root, extraCertificateOptions=_shown(self._own()))
            self._options[host] = options
        return options

    def renew(self) -> None:
        """Read anew whom to trust, and what to show, for connections from now on."""
        self._options.clear()


def _shown(own: Certificates | None) -> dict[str, Any]:
    if own is None:
        return {}
    leaf, *others = (crypto.X509.from_cryptography(certificate) for certificate in own.chain)
    key = crypto.load_privatekey(crypto.FILETYPE_PEM, own.key)
    return {"privateKey": key, "certificate": leaf, "extraCertChain": others or None}
