"""``--auth mtls``: who has a client certificate that TLS has verified (RFC 5280).

The client_id is the first DNS name or URI among the SubjectAlternativeName; the subject's common name is not looked at.
"""

from __future__ import annotations

from cryptography.x509 import DNSName, SubjectAlternativeName, UniformResourceIdentifier, load_der_x509_certificate

from gateway.auth.errors import TokenRefusedError
from gateway.auth.interface import Identity, is_client_id


def certificate_identity(der: bytes) -> Identity:
    """Whose certificate it is, and until when. Raises :class:`TokenRefused`."""
    try:
        certificate = load_der_x509_certificate(der)
        until = certificate.not_valid_after_utc.timestamp()
        alternatives = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
        names = [name.value for name in alternatives if isinstance(name, (DNSName, UniformResourceIdentifier))]
    except Exception:  # noqa: BLE001 - each part of a certificate is wrong in ways of its own
        names = []
    if not names:
        raise TokenRefusedError("this client certificate has no DNS name and no URI as its SubjectAlternativeName")
    if not is_client_id(names[0]):
        raise TokenRefusedError("the first DNS name or URI of this client certificate is no client_id")
    # 0 would be never, and what is over is over.
    return Identity(names[0], max(1.0, until))
