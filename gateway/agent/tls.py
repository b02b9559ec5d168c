"""What an agent speaks TLS with, of PEM files: whom it trusts, and the certificate that it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import crypto
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates


def tls_of_files(ca_file: str = "", certificate: str = "", key: str = "") -> Callable[[str], Any]:
    """For ``Agent(tls=…)``. ``ca_file`` has the CAs that vouch for the gateway, in place of those that the platform
    trusts; ``certificate`` this client's own, then those that vouch for it; ``key`` its key, which is in the same file
    if that is left out. They are read anew for each attempt to connect, so that renewed ones are used.

    What it returns raises ``OSError`` or ``ValueError`` for files that cannot be used, naming the file.
    """
    if key and not certificate:
        raise ValueError("there is a key without a certificate")

    def tls(host: str) -> Any:
        trust_root = trustRootFromCertificates(_load_certificates(ca_file)) if ca_file else None
        own = _client_certificate_options(certificate, key or certificate) if certificate else {}
        return optionsForClientTLS(host, trustRoot=trust_root, extraCertificateOptions=own)

    return tls


def _client_certificate_options(certificate: str, key: str) -> dict[str, Any]:
    leaf, *others = (each.original for each in _load_certificates(certificate))
    try:
        private: Any = load_pem_private_key(_read_file(key), None)
        own = crypto.PKey.from_cryptography_key(private)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"{key} has no key that can be read; it must be in PEM, and not encrypted") from None
    if private.public_key() != leaf.to_cryptography().public_key():
        raise ValueError(f"the key in {key} is not that of the certificate in {certificate}")
    return {"privateKey": own, "certificate": leaf, "extraCertChain": others or None}


def _load_certificates(path: str) -> list[Any]:
    try:
        found = x509.load_pem_x509_certificates(_read_file(path))
    except ValueError:
        raise ValueError(f"{path} has no certificate in PEM") from None
    return [Certificate(crypto.X509.from_cryptography(each)) for each in found]


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
