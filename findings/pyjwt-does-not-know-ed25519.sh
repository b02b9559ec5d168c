#!/bin/sh
# PyJWT: the algorithm names "Ed25519" and "Ed448" of RFC 9864, which replace "EdDSA", are not known.
#
# Version:   PyJWT 2.15.1, cryptography 50.0.2 (PyPI), CPython 3.11
# Behavior:  jwt.PyJWK() of a JWK whose "alg" is "Ed25519" raises PyJWKError, and so the key is left out of a PyJWKSet
#            without a word. A token with "alg":"Ed25519" cannot be made or verified. With "EdDSA", which RFC 9864
#            deprecates, the same key works.
# Guess:     A release of 2026 takes the names of RFC 9864 (October 2025): they are the same signatures as "EdDSA".
# Source:    jwt/algorithms.py, get_default_algorithms(); jwt/api_jwk.py, PyJWK.__init__ and PyJWKSet.__init__
# Output:
#            alg EdDSA: a key of type OKP
#            alg Ed25519: PyJWKError
#            keys of a set with both: EdDSA
#            a token with Ed25519: NotImplementedError
#
# An issuer that follows RFC 9864 has keys that such a library does not see. Register the names with
# jwt.register_algorithm(), and map "alg" before a JWK is read.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check PyJWT==2.15.1 cryptography==50.0.2
cat >"$folder/show.py" <<'PYTHON'
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

private = Ed25519PrivateKey.generate()
public = OKPAlgorithm.to_jwk(private.public_key(), as_dict=True)
keys = [{**public, "kid": alg, "alg": alg} for alg in ("EdDSA", "Ed25519")]
for key in keys:
    try:
        print(f"alg {key['alg']}: a key of type {jwt.PyJWK(key).key_type}")
    except jwt.PyJWKError as e:
        print(f"alg {key['alg']}: {type(e).__name__}")
print("keys of a set with both:", *(key.key_id for key in jwt.PyJWKSet(keys).keys))
try:
    jwt.encode({"sub": "robot-7"}, private, algorithm="Ed25519")
except Exception as e:
    print("a token with Ed25519:", type(e).__name__)
PYTHON
"$folder/venv/bin/python" "$folder/show.py" >"$folder/output"
cat "$folder/output"
diff - "$folder/output" <<'EXPECTED'
alg EdDSA: a key of type OKP
alg Ed25519: PyJWKError
keys of a set with both: EdDSA
a token with Ed25519: NotImplementedError
EXPECTED
