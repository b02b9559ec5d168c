"""Authenticate clients by their TLS client certificates (RFC 5280): ``--auth mtls``.

The client_id is the first DNS name or URI of the SubjectAlternativeName. The common name of the subject is ignored.
"""

from __future__ import annotations

from cryptography.x509 import DNSName, SubjectAlternativeName, UniformResourceIdentifier, load_der_x509_certificate

from gateway.auth.errors import TokenRefusedError
from gateway.auth.interface import AuthMethod, Identity
from gateway.protocol.client_id import is_client_id


def certificate_identity(der: bytes) -> Identity:
    """Return the identity of a certificate that TLS has verified. Raises :class:`TokenRefusedError`."""
    try:
        certificate = load_der_x509_certificate(der)
        expires_at = certificate.not_valid_after_utc.timestamp()
        alternatives = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
        names = [name.value for name in alternatives if isinstance(name, (DNSName, UniformResourceIdentifier))]
    except Exception:  # noqa: BLE001 - an invalid certificate may raise nearly anything
        names = []
    if not names:
        raise TokenRefusedError("this client certificate has no DNS name and no URI as its SubjectAlternativeName")
    if not is_client_id(names[0]):
        raise TokenRefusedError("the first DNS name or URI of this client certificate is not a client_id")
    # Not 0, which means never.
    return Identity(names[0], max(1.0, expires_at), method=AuthMethod.MTLS)
