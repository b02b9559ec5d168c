"""TLS options of an agent from PEM files: trusted CAs and a client certificate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import crypto
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates


def tls_of_files(ca_file: str = "", certificate: str = "", key: str = "") -> Callable[[str], Any]:
    """Return a function for ``Agent(tls=…)`` that makes TLS options from PEM files.

    ``ca_file`` contains the CAs to trust, instead of the platform's. ``certificate`` contains the client certificate,
    followed by its intermediates; ``key`` its unencrypted private key, by default in the same file. The files are read
    for each attempt to connect, so renewed ones are used.

    Raises ``ValueError`` for a key without a certificate. The returned function raises ``OSError`` or ``ValueError``,
    with the name of the file, if a file cannot be used.
    """
    if key and not certificate:
        raise ValueError("key is given without certificate")

    def tls(host: str) -> Any:
        trust_root = trustRootFromCertificates(_load_certificates(ca_file)) if ca_file else None
        options = _client_certificate_options(certificate, key or certificate) if certificate else {}
        return optionsForClientTLS(host, trustRoot=trust_root, extraCertificateOptions=options)

    return tls


def _client_certificate_options(certificate: str, key: str) -> dict[str, Any]:
    leaf, *intermediates = (loaded.original for loaded in _load_certificates(certificate))
    try:
        private_key: Any = load_pem_private_key(_read_file(key), None)
        pkey = crypto.PKey.from_cryptography_key(private_key)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"{key} has no usable key: it must be PEM, and not encrypted") from None
    if private_key.public_key() != leaf.to_cryptography().public_key():
        raise ValueError(f"the key in {key} does not match the certificate in {certificate}")
    return {"privateKey": pkey, "certificate": leaf, "extraCertChain": intermediates or None}


def _load_certificates(path: str) -> list[Any]:
    try:
        certificates = x509.load_pem_x509_certificates(_read_file(path))
    except ValueError:
        raise ValueError(f"{path} has no PEM certificate") from None
    return [Certificate(crypto.X509.from_cryptography(certificate)) for certificate in certificates]


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
