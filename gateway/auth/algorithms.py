"""The algorithms by which tokens are signed (RFC 7518, section 3.1; RFC 8037, section 3.1; RFC 8812, section 3.2).

Those of one ``--auth`` are either of secrets, which whoever checks a token has too, or of public keys: if both were
allowed with one key, anybody could make tokens by taking the public key for a secret.
"""

from __future__ import annotations

from gateway.settings import ConfigError

#: a secret that both sides have -> the bytes of its digest, which the secret should have too (RFC 7518, section 3.2)
HMAC_ALGORITHMS = {"HS256": 32, "HS384": 48, "HS512": 64}
RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
#: a curve, as cryptography names it -> the one algorithm that goes with it
EC_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512", "secp256k1": "ES256K"}
EDDSA_ALGORITHMS = ("EdDSA",)

#: what is allowed of a set of keys when nothing is said
DEFAULT_ALGORITHMS = (*RSA_ALGORITHMS, "ES256", "ES384", "ES512", *EDDSA_ALGORITHMS)

_KNOWN = (*HMAC_ALGORITHMS, *RSA_ALGORITHMS, *EC_ALGORITHMS.values(), *EDDSA_ALGORITHMS)


def parse_algorithms(kind: str, text: str) -> tuple[str, ...]:
    """The algorithms of a text such as ``RS256,ES256``; ``kind`` begins the ``--auth`` that it stands in.

    Raises :class:`~gateway.settings.ConfigError`.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name.lower() == "none":
            raise ConfigError("auth", f"{kind}: a token without a signature could be anybody's; leave {name} out")
        if name not in _KNOWN:
            raise ConfigError("auth", f"{kind}: {name!a} is no algorithm; there are {', '.join(_KNOWN)}")
    if len({name in HMAC_ALGORITHMS for name in names}) > 1:
        raise ConfigError(
            "auth",
            f"{kind}: {text} is of secrets (HS…) and of public keys; give each its own --auth, or anybody could sign "
            "with the public key",
        )
    return names
