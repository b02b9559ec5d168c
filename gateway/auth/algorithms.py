"""Signature algorithms of tokens (RFC 7518, section 3.1; RFC 8037, section 3.1; RFC 8812, section 3.2; RFC 9864).

The algorithms of one ``--auth`` are either all symmetric (HMAC with a secret), or all of public keys. If both were
allowed for one key, anyone could sign a token with the public key as HMAC secret.
"""

from __future__ import annotations

from itertools import chain

from gateway.settings import ConfigError

#: name -> bytes of its digest, the minimum size of a secret (RFC 7518, section 3.2)
HMAC_ALGORITHMS = {"HS256": 32, "HS384": 48, "HS512": 64}
RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
#: curve, as ``cryptography`` names it -> its algorithm
EC_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512", "secp256k1": "ES256K"}
#: curve -> the names of its algorithm. EdDSA means that of either curve (RFC 9864, section 2.2)
EDDSA_ALGORITHMS = {"Ed25519": ("EdDSA", "Ed25519"), "Ed448": ("EdDSA", "Ed448")}
_EDDSA_NAMES = ("EdDSA", *EDDSA_ALGORITHMS)

#: allowed for a ``jwks:`` without ``algorithms=``
DEFAULT_ALGORITHMS = (*RSA_ALGORITHMS, "ES256", "ES384", "ES512", *_EDDSA_NAMES)

_KNOWN = (*HMAC_ALGORITHMS, *RSA_ALGORITHMS, *EC_ALGORITHMS.values(), *_EDDSA_NAMES)


def parse_algorithms(kind: str, text: str) -> tuple[str, ...]:
    """Parse a list such as ``RS256,ES256``. ``kind`` is the kind of the ``--auth`` spec that has it.

    EdDSA allows Ed25519 and Ed448 as well, which issuers write in its place.

    Raises :class:`~gateway.settings.ConfigError`.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name.lower() == "none":
            raise ConfigError("auth", f"{kind}: anyone could make a token without a signature; leave {name} out")
        if name not in _KNOWN:
            raise ConfigError("auth", f"{kind}: {name!a} is not an algorithm; there are {', '.join(_KNOWN)}")
    if len({name in HMAC_ALGORITHMS for name in names}) > 1:
        raise ConfigError(
            "auth",
            f"{kind}: {text} mixes algorithms of secrets (HS…) and of public keys; give each its own --auth, or anyone "
            "could sign with the public key",
        )
    given = (_EDDSA_NAMES if name == "EdDSA" else (name,) for name in names)
    return tuple(dict.fromkeys(chain.from_iterable(given)))
