"""Client certificates."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import DNSName, RFC822Name, UniformResourceIdentifier

from tests.builders.tokens import EC

END = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
DNS = DNSName("robot-7.example.com")
URI = UniformResourceIdentifier("spiffe://acme/robot/7")
MAIL = RFC822Name("a@b")


def certificate(*names: x509.GeneralName, end: datetime.datetime = END) -> bytes:
    """Make a self-signed certificate (DER) with these names as its SubjectAlternativeName."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "common-name")])
    builder = (
        x509.CertificateBuilder(name, name, EC.public_key(), 1)
        .not_valid_before(datetime.datetime(1960, 1, 1))
        .not_valid_after(end)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(EC, SHA256()).public_bytes(Encoding.DER)
