"""Load the keys that verify tokens from a PEM file or a JSON Web Key Set (RFC 7517, section 5)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import attrs
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate
from jwt import PyJWTError
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from gateway.auth.algorithms import EC_ALGORITHMS, EDDSA_ALGORITHMS, HMAC_ALGORITHMS, RSA_ALGORITHMS
from gateway.auth.files import read_bytes
from gateway.settings import ConfigError

#: bytes of a key file
MAX_FILE_SIZE = 2**16
#: keys in a file, and keys of a set that are tried for one token
MAX_CANDIDATE_KEYS = 16
#: keys in a set
MAX_KEYS = 64
#: bits of an RSA key (RFC 7518, section 3.3)
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 16384
#: bytes of a secret
MIN_SECRET_SIZE = 16

_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----.*?-----END \1-----", re.DOTALL)
_PEM_BEGIN = b"-----BEGIN "
_LOADERS: Mapping[str, Any] = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}
_EDDSA_NAMES = {frozenset(names) for names in EDDSA_ALGORITHMS.values()}
#: the members of a public key, by its type
_MEMBERS = {"RSA": ("kty", "n", "e"), "EC": ("kty", "crv", "x", "y"), "OKP": ("kty", "crv", "x")}
#: characters of a member: the longest is an RSA modulus in base64
_MAX_MEMBER_LENGTH = 4 * MAX_RSA_BITS // 24 + 4


@attrs.frozen
class VerificationKey:
    """A key, and the algorithms that it may be used with."""

    #: a public key of ``cryptography``, or a secret
    key: Any
    algorithms: frozenset[str]
    kid: str | None = None


@attrs.frozen
class KeySet:
    """The keys of a JSON Web Key Set."""

    keys: tuple[VerificationKey, ...] = ()
    #: describes the keys that cannot be used, or empty
    left_out: str = ""

    def candidates(self, algorithm: str, kid: str | None) -> tuple[VerificationKey, ...]:
        """Return the keys that may have signed a token: those with its ``kid``, or, if there are none, those without a
        ``kid``. For a token without a ``kid`` all are returned that are for its algorithm."""
        named = [key for key in self.keys if kid in (None, key.kid)]
        candidates = named or [key for key in self.keys if key.kid is None]
        return tuple(key for key in candidates if algorithm in key.algorithms)[:MAX_CANDIDATE_KEYS]

    def has_kid(self, kid: str | None) -> bool:
        """Whether it has a key with this ``kid``."""
        return kid is not None and any(key.kid == kid for key in self.keys)


def read_key_file(path: str, algorithms: Collection[str]) -> tuple[VerificationKey, ...]:
    """Read the keys of a file that are for any of the algorithms: public keys in PEM, or one secret for HMAC.

    Raises :class:`~gateway.settings.ConfigError`.
    """
    content = read_bytes("auth", path, MAX_FILE_SIZE)
    if any(name in HMAC_ALGORITHMS for name in algorithms):
        return (VerificationKey(_parse_secret(path, content), frozenset(algorithms)),)
    keys = [VerificationKey(key, _algorithms_of(key) & set(algorithms)) for key in _parse_public_keys(path, content)]
    usable = tuple(key for key in keys if key.algorithms)
    if not usable:
        raise ConfigError("auth", f"{path} has no key for {','.join(algorithms)}")
    if len(usable) > MAX_CANDIDATE_KEYS:
        raise ConfigError(
            "auth", f"{path} has more than {MAX_CANDIDATE_KEYS} keys; remove those that are not used any more"
        )
    return usable


def _parse_secret(path: str, content: bytes) -> bytes:
    secret = content.strip()
    if len(secret) < MIN_SECRET_SIZE:
        raise ConfigError("auth", f"{path}: a secret of {len(secret)} bytes can be guessed; 32 random ones are right")
    try:
        if secret.startswith(b"{"):
            raise ValueError("a JSON Web Key, which not all versions of PyJWT detect")
        prepared: bytes = HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except (PyJWTError, ValueError, RecursionError):
        raise ConfigError(
            "auth",
            f"{path} has a key of another kind, and no secret; algorithms such as RS256 and ES256 have such keys",
        ) from None
    return prepared


def _parse_public_keys(path: str, content: bytes) -> list[Any]:
    keys: list[Any] = []
    blocks = list(_PEM.finditer(content))
    if len(blocks) != content.count(_PEM_BEGIN):
        raise ConfigError("auth", f"{path} has a PEM block that does not end")
    for number, block in enumerate(blocks, 1):
        label = block[1].decode("ascii")
        if "PRIVATE" in label:
            raise ConfigError(
                "auth",
                f"{path} has a private key, which only the issuer should have; give its public half, as "
                "`openssl pkey -in KEY -pubout` writes it",
            )
        if label not in ("PUBLIC KEY", "RSA PUBLIC KEY", "CERTIFICATE"):
            raise ConfigError("auth", f"{path} has a {label}; write public keys or certificates, in PEM")
        try:
            if label == "CERTIFICATE":
                key: Any = load_pem_x509_certificate(block[0]).public_key()
            else:
                key = load_pem_public_key(block[0])
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError("auth", f"{path}: its {label} no. {number} cannot be read") from None
        if isinstance(key, RSAPublicKey) and not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            raise ConfigError(
                "auth",
                f"{path}: its {label} no. {number} has {key.key_size} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are right",
            )
        keys.append(key)
    if not keys:
        raise ConfigError("auth", f"{path} has no public key and no certificate in PEM")
    return keys


def _algorithms_of(key: Any) -> frozenset[str]:
    """Return all algorithms that a public key can be used with."""
    if isinstance(key, RSAPublicKey):
        return frozenset(RSA_ALGORITHMS)
    if isinstance(key, EllipticCurvePublicKey):
        return frozenset(EC_ALGORITHMS[name] for name in [key.curve.name] if name in EC_ALGORITHMS)
    if isinstance(key, Ed25519PublicKey):
        return frozenset(EDDSA_ALGORITHMS["Ed25519"])
    return frozenset(EDDSA_ALGORITHMS["Ed448"]) if isinstance(key, Ed448PublicKey) else frozenset()


def parse_jwks(document: bytes, algorithms: Collection[str]) -> KeySet:
    """Parse a JSON Web Key Set. Keys that are for none of the algorithms, or cannot be used, are left out.

    Raises ``ValueError`` if it is not a JSON Web Key Set.
    """
    try:
        decoded = msgspec.json.decode(document)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise ValueError("the answer is no JSON") from None
    listed = decoded.get("keys") if isinstance(decoded, dict) else None
    if not isinstance(listed, list):
        raise ValueError('the answer is no JSON Web Key Set, {"keys":[…]}')
    if len(listed) > MAX_KEYS:
        raise ValueError(f"the set has {len(listed)} keys; {MAX_KEYS} are the most")
    keys: list[VerificationKey] = []
    left_out: Counter[str] = Counter()
    for jwk in listed:
        try:
            keys.append(_parse_jwk(jwk, algorithms))
        except _UnusableKeyError as e:
            left_out[str(e)] += 1
    return KeySet(tuple(keys), ", ".join(f"{count} {reason}" for reason, count in left_out.items()))


class _UnusableKeyError(Exception):
    """A key cannot be used. The text says why, and has nothing of the key set."""


def _parse_jwk(jwk: object, algorithms: Collection[str]) -> VerificationKey:
    if not isinstance(jwk, dict):
        raise _UnusableKeyError("that cannot be read")
    kty, kid, algorithm = jwk.get("kty"), jwk.get("kid"), jwk.get("alg")
    if kty == "oct":
        raise _UnusableKeyError("symmetric")
    if "d" in jwk:
        raise _UnusableKeyError("private (they should not be there)")
    if not isinstance(kty, str) or kty not in _MEMBERS:
        raise _UnusableKeyError("of unknown type")
    operations = jwk.get("key_ops")
    if jwk.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        raise _UnusableKeyError("not for signatures")
    if not isinstance(kid, (str, type(None))):
        raise _UnusableKeyError("that cannot be read")
    key = _load_public_key(kty, jwk)
    of_key = _algorithms_of(key)
    usable = of_key & set(algorithms)
    if algorithm is not None:
        # Compared, not hashed: it may be of any JSON type.
        named = {name for name in of_key if name == algorithm}
        # Both names of an EdDSA key are of one algorithm: tokens may have the other one.
        usable &= of_key if of_key in _EDDSA_NAMES and named else named
    if not usable:
        raise _UnusableKeyError("for other algorithms")
    return VerificationKey(key, usable, kid)


def _load_public_key(kty: str, jwk: Mapping[str, Any]) -> Any:
    members = {name: jwk.get(name) for name in _MEMBERS[kty]}
    if not all(isinstance(value, str) and len(value) <= _MAX_MEMBER_LENGTH for value in members.values()):
        raise _UnusableKeyError("that cannot be read")
    try:
        key = _LOADERS[kty].from_jwk(members)
    except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, OverflowError):
        raise _UnusableKeyError("that cannot be read") from None
    if isinstance(key, RSAPublicKey) and not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise _UnusableKeyError(f"of RSA with fewer than {MIN_RSA_BITS} bits, or more than {MAX_RSA_BITS}")
    return key
