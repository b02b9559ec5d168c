"""JSON Web Tokens with invalid signatures, for another audience or issuer, or outside of their lifetime."""

from __future__ import annotations

import base64
import json
import select
import socket
import time
from collections import Counter
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from tests.hostile.attack import Seen, Size, Target, attack
from tests.hostile.attacks.frames import BUFFERS, PAUSED
from tests.hostile.attacks.tokens import EVIL, connect_response
from tests.hostile.node import AUDIENCE, ISSUER
from tests.hostile.raw_connection import frame, name

LATER = 3600
_OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _claims(**changed: Any) -> dict[str, Any]:
    claims = {"sub": EVIL, "aud": AUDIENCE, "iss": ISSUER, "exp": int(time.time()) + LATER, **changed}
    return {name: value for name, value in claims.items() if value is not None}


def _bytes(part: object) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _signed(target: Target, headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """Sign claims with the right key."""
    return jwt.encode(_claims(**claims), target.signing_key, "RS256", headers)


def _raw(target: Target, header: object, claims: object) -> str:
    """Sign a payload that PyJWT refuses to sign."""
    text = f"{_bytes(header)}.{_bytes(claims)}"
    algorithm = jwt.get_algorithm_by_name("RS256")
    return f"{text}.{_bytes(algorithm.sign(text.encode(), algorithm.prepare_key(target.signing_key)))}"


def _by_public_key(target: Target, algorithm: str) -> str:
    """Sign with HS256, using the public key as the secret."""
    key = load_pem_private_key(target.signing_key.encode(), None).public_key()
    public = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    text = f"{_bytes({'alg': algorithm, 'typ': 'JWT'})}.{_bytes(_claims())}"
    # PyJWT refuses a public key as a secret.
    signature = jwt.get_algorithm_by_name(algorithm).sign(text.encode(), public)
    return f"{text}.{_bytes(signature)}"


def _forged(target: Target, url: str) -> list[str]:
    """Return tokens that can be made without the key."""
    good = _signed(target)
    header, claims, signature = good.split(".")
    mine = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(_OTHER.public_key()))
    forged = [
        jwt.encode(_claims(), _OTHER, "RS256", more)
        for more in (
            {},
            {"jku": f"{url}/keys"},
            {"x5u": f"{url}/chain"},
            {"jwk": mine},
            {"jwk": mine, "kid": "mine"},
            {"kid": "../../../../dev/null"},
            {"kid": "/etc/passwd"},
            {"kid": "x' UNION SELECT 'key"},
            {"kid": "|/bin/true"},
            {"kid": url},
            {"kid": "k" * 5000},
        )
    ]
    forged += [f"{_bytes({'alg': none, 'typ': 'JWT'})}.{claims}." for none in ("none", "None", "NONE", "", "nOnE")]
    forged += [
        f"{_bytes({'alg': alg})}.{claims}.{signature}" for alg in (None, 7, [], ["RS256"], "RS512", "ES256", "x")
    ]
    forged += [_by_public_key(target, one) for one in ("HS256", "HS384", "HS512")]
    forged += [f"{header}.{_bytes(_claims(sub='well-behaved'))}.{signature}"]
    forged += [
        f"{header}.{claims}",
        f"{header}.{claims}.",
        f"{good}.{signature}.{signature}",
        f"..{signature}",
        "...",
        ".",
    ]
    forged += [f"{header}.{claims}.{signature[:-4]}", f"{header}.{claims}.{signature}AAAA", "A" * 15_000]
    forged += [f"{_bytes(b'[' * 8000)}.{claims}.{signature}", f"{_bytes({'alg': 'RS256', 'a': 'b' * 8000})}.{claims}.A"]
    return forged


def _misused(target: Target) -> list[str]:
    """Return tokens with a valid signature and invalid claims."""
    now = time.time()
    odd: dict[str, list[Any]] = {
        "exp": [now - 1, 0, -1, 1, "soon", str(now + LATER), True, [now + LATER], {}],
        "nbf": [now + LATER, "now", [], True],
        "iat": [now + LATER, "now"],
        "aud": ["another", ["another"], [], {}, None, f"{AUDIENCE}x", 7],
        "iss": ["another", [ISSUER], None, f"{ISSUER}/", 7],
        "sub": [None, "", "..", "a b", "x\x00", "x\n", "ä", [EVIL], {}, 7, "a" * 129, "';--"],
    }
    claims = [_claims(**{claim: value}) for claim, values in odd.items() for value in values]
    tokens = [_raw(target, {"alg": "RS256", "typ": "JWT"}, one) for one in claims]
    tokens += [_raw(target, {"alg": "RS256"}, b) for b in (b"[]", b"7", b"", b"\xff", b'{"sub":', b"[" * 5000)]
    tokens += [_signed(target, {"crit": ["x"], "x": 1}), _signed(target, {"crit": ["b64"], "b64": False})]
    infinite = b'{"sub":"%b","aud":"%b","iss":"%b","exp":1e999}' % (EVIL.encode(), AUDIENCE.encode(), ISSUER.encode())
    return [*tokens, _raw(target, {"alg": "RS256"}, infinite)]


def _tried(target: Target, token: str) -> str:
    return connect_response(target, EVIL, f"Authorization: Bearer {token}")


@attack(
    "forged tokens: another key, alg none, HS256 with the public key, keys in the header or at a url, a "
    "kid that is a path",
    "401, without fetching any key",
    "401 token",
    "101",
    node="jwt",
)
def forged_jwts(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    with socket.create_server(("127.0.0.1", 0)) as keys:
        url = f"http://127.0.0.1:{keys.getsockname()[1]}"
        for _ in size.rounds():
            for token in _forged(target, url):
                seen[_tried(target, token)] += 1
        seen[_tried(target, _signed(target))] += 1
        if select.select([keys], [], [], 0.2)[0]:
            seen["keys were requested"] += 1
    return seen


@attack(
    "signed tokens that are expired, not valid yet, for another audience, or of another or no issuer",
    "401",
    "401 token",
    "101",
    node="jwt",
)
def misused_jwts(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        for token in _misused(target):
            if (answer := _tried(target, token)) == "101":
                seen[f"accepted: {token}"] += 1
            else:
                seen[answer] += 1
    seen[_tried(target, _signed(target, exp=None))] += 1
    return seen


@attack("a signed token with the client_id of another client", "403", "403 identity", "101", node="jwt")
def jwts_of_another(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    for _ in size.rounds():
        bearer = f"Authorization: Bearer {_signed(target)}"
        for client_id in ("well-behaved", name(), EVIL.upper()):
            seen[connect_response(target, client_id, bearer)] += 1
    seen[connect_response(target, EVIL, bearer)] += 1
    return seen


@attack("forged tokens at full speed, each from a different address", "401", "401 token", node="jwt", memory=32)
def guessed_jwts(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    token = jwt.encode(_claims(), _OTHER, "RS256")
    for _ in size.rounds():
        for _ in range(16):
            seen[_tried(target, token)] += 1
    return seen


@attack(
    "renewals with forged tokens, tokens of another client, or none, from a connected client at full speed",
    "-32602 to each, at the rate limit; the connection keeps its expiry time",
    PAUSED,
    "error -32602",
    node="jwt",
)
def forged_renewals(target: Target, size: Size) -> Seen:
    seen: Seen = Counter()
    tokens = [
        jwt.encode(_claims(), _OTHER, "RS256"),
        _signed(target, sub="well-behaved"),
        _signed(target, exp=1),
        "",
        "a.b.c",
    ]
    params: list[Any] = [*({"token": token} for token in tokens), [], {"token": 7}, {}]
    messages = [{"jsonrpc": "2.0", "id": 1, "method": "gateway.token", "params": each} for each in params]
    with target.client(EVIL, f"Authorization: Bearer {_signed(target)}") as connection:
        for message in messages:
            connection.send(frame(json.dumps(message)))
            answer = json.loads(connection.text())
            seen[f"error {answer['error']['code']}" if "error" in answer else f"accepted: {message}"] += 1
        data = b"".join(frame(json.dumps(message)) for message in messages)
        paused, before = False, target.pauses()
        for _ in size.rounds():
            connection.read_all()
            paused |= not connection.send_repeatedly(data, BUFFERS)
        seen[PAUSED if paused and connection.alive and target.pauses() > before else "never paused"] += 1
    return seen
