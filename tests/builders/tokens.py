"""Keys, and tokens signed with them."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from twisted.internet.defer import Deferred

from gateway.auth.errors import VerificationError

#: generated once, since that is slow
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
OTHER_EC = ec.generate_private_key(ec.SECP256R1())
EC384 = ec.generate_private_key(ec.SECP384R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
ED448 = ed448.Ed448PrivateKey.generate()

#: the time of the tests' wall clock
NOW = 1_800_000_000.0


def pem(key: Any) -> bytes:
    """Return the public half of a key, in PEM."""
    public: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


def private_pem(key: Any) -> bytes:
    private: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private


def jwk(key: Any, kid: str | None = None, **more: Any) -> dict[str, Any]:
    """Return the public half of a key, as a JSON Web Key."""
    kind: Any = OKPAlgorithm
    if isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)):
        kind = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    made = {**kind.to_jwk(key.public_key(), as_dict=True), **more}
    return made if kid is None else {**made, "kid": kid}


def jwks(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def sign(key: Any, algorithm: str, headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """Sign a token, by default for robot-7. Claims that are ``None`` are left out."""
    payload = {name: value for name, value in {"sub": "robot-7", **claims}.items() if value is not None}
    return jwt.encode(payload, key, algorithm, headers=headers)


def raw_token(header: Any, claims: Any, signature: bytes = b"") -> str:
    """Encode any three parts."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims, signature)]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def verify(verifier: Any, token: str) -> Any:
    """Verify a token. Returns the identity, or ``None`` if it is not accepted, or a Deferred of these."""
    try:
        identity = verifier.verify(token)
    except VerificationError:
        return None
    # trap() returns the class of the exception.
    return (
        identity.addErrback(lambda failure: failure.trap(VerificationError) and None)
        if isinstance(identity, Deferred)
        else identity
    )


def rejection_reason(verifier: Any, token: str) -> str:
    """Return the reason for which a verifier does not accept a token."""
    try:
        verifier.verify(token)
    except VerificationError as e:
        return e.reason
    raise AssertionError("it is accepted")
