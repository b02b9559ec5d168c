"""Verify JSON Web Tokens (RFC 7519, RFC 7515) with the keys of a file:
``--auth jwt:key-file=F:algorithms=RS256,ES256:audience=A:issuer=I``.

    {"alg":"ES256","kid":"2026-10"}          header: algorithm and key
    {"sub":"robot-7","exp":1798761600}       claims: client_id and expiry; also aud, iss, nbf, iat

Keys in the header of a token, and references to keys (jwk, jku, x5u, x5c), are ignored.
"""

from __future__ import annotations

import base64
import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import jwt
import msgspec
from jwt.algorithms import OKPAlgorithm
from twisted.logger import Logger
from zope.interface import implementer

from gateway.auth.algorithms import EDDSA_ALGORITHMS, HMAC_ALGORITHMS
from gateway.auth.errors import SignatureError, VerificationError
from gateway.auth.files import warn_if_world_readable
from gateway.auth.interface import MAX_TOKEN_LENGTH, AuthMethod, Identity, ITokenVerifier
from gateway.auth.keys import VerificationKey, read_key_file
from gateway.protocol.client_id import is_client_id

#: seconds by which the clock of an issuer may be ahead
LEEWAY = 30.0
#: exclusive bound of a timestamp and its negative, in seconds since 1970: the year 10000
_MAX_TIMESTAMP = 253402300800
#: what PyJWT raises for an invalid token: nearly always an exception of its own
_DECODE_ERRORS = (jwt.PyJWTError, ValueError, TypeError, RecursionError)

for _name in EDDSA_ALGORITHMS:
    # PyJWT knows EdDSA alone, which is the same algorithm. It refuses a name that a later version knows itself.
    with contextlib.suppress(ValueError):
        jwt.register_algorithm(_name, OKPAlgorithm())


@attrs.frozen
class UnverifiedToken:
    """A decoded token whose signature was not verified: its header may be forged."""

    text: str
    algorithm: str
    kid: str | None


class TokenValidator:
    """Validate tokens against the rules of one ``--auth`` spec.

    ``source`` is that spec, for errors. ``wall_clock`` returns seconds since 1970.
    """

    def __init__(
        self,
        source: str,
        algorithms: Sequence[str],
        audience: str | None,
        issuer: str | None,
        wall_clock: Callable[[], float],
        method: AuthMethod,
    ) -> None:
        self._source = source
        self._method = method
        self._algorithms = frozenset(algorithms)
        self._audience = audience
        self._issuer = issuer
        self._wall_clock = wall_clock
        # Times are checked here: PyJWT uses its own clock, and accepts texts as numbers.
        self._options: Any = {
            "verify_aud": audience is not None,
            "verify_iss": issuer is not None,
            **dict.fromkeys(("verify_exp", "verify_nbf", "verify_iat", "verify_sub", "verify_jti"), False),
        }

    def rejection(self, reason: str, **options: str) -> VerificationError:
        """Make the error for a token that is not accepted."""
        return VerificationError(reason, self._source, **options)

    def parse(self, text: str) -> UnverifiedToken:
        """Decode a token without verifying it, so that keys are only tried, or fetched, for tokens that these rules may
        accept.

        Raises :class:`VerificationError`.
        """
        parts = text.split(".") if len(text) <= MAX_TOKEN_LENGTH else ()
        if len(parts) != 3 or not text.isascii():
            raise self.rejection("malformed")
        header, claims = _decode_part(parts[0]), _decode_part(parts[1])
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or not isinstance(kid, (str, type(None))):
            raise self.rejection("malformed")
        if algorithm not in self._algorithms:
            raise self.rejection("algorithm")
        # No critical extension (RFC 7515, section 4.1.11) is supported.
        if "crit" in header:
            raise self.rejection("other")
        if self._issuer not in (None, claims.get("iss")):
            raise self.rejection("issuer")
        return UnverifiedToken(text, algorithm, kid)

    def validate(self, token: UnverifiedToken, keys: Iterable[VerificationKey]) -> Identity:
        """Verify the signature and the claims. The identity of an expired token has an ``expires_at`` in the past.

        Raises :class:`SignatureError` if none of the keys matches, and :class:`VerificationError` if one does but the
        token is not accepted.
        """
        for key in keys:
            if token.algorithm not in key.algorithms:
                continue
            try:
                decoded = jwt.decode_complete(
                    token.text,
                    key.key,
                    algorithms=[token.algorithm],
                    options=self._options,
                    audience=self._audience,
                    issuer=self._issuer,
                )
            except (jwt.InvalidSignatureError, jwt.InvalidKeyError):
                continue
            except _DECODE_ERRORS as e:
                raise self.rejection(_decode_error_reason(e)) from None
            return self._identity(decoded["payload"])
        raise SignatureError

    def _identity(self, claims: dict[str, Any]) -> Identity:
        client_id = claims.get("sub")
        if not isinstance(client_id, str) or not is_client_id(client_id):
            raise self.rejection("subject")
        if not all(_is_numeric_date(claims[name]) for name in ("exp", "nbf", "iat") if name in claims):
            raise self.rejection("malformed")
        valid_from = max(claims.get("nbf", 0), claims.get("iat", 0))
        if valid_from > self._wall_clock() + LEEWAY:
            raise self.rejection("not_yet")
        # An expiry is not 0, which means never.
        expires_at = max(1.0, float(claims["exp"])) if "exp" in claims else 0.0
        return Identity(client_id, expires_at, method=self._method)


def _decode_error_reason(error: Exception) -> str:
    """Return the reason for an exception of PyJWT about a token with a valid signature."""
    claim = error.claim if isinstance(error, jwt.MissingRequiredClaimError) else ""
    if isinstance(error, jwt.InvalidAudienceError) or claim == "aud":
        return "audience"
    return "issuer" if isinstance(error, jwt.InvalidIssuerError) or claim == "iss" else "malformed"


def _decode_part(part: str) -> dict[str, Any]:
    """Decode the header or the claims of a token. Returns an empty dict if they are invalid."""
    try:
        decoded = msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _is_numeric_date(value: object) -> bool:
    """Whether it is a NumericDate (RFC 7519, section 2) before the year 10000."""
    # The comparison is false for NaN and infinity.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MAX_TIMESTAMP


def warn_without_audience(log: Logger, kind: str, audience: str | None) -> None:
    """Log a warning if no audience is required."""
    if audience is None:
        log.warn(
            "--auth {kind}: without audience=, a token that the same issuer made for another service is accepted",
            kind=kind,
        )


@implementer(ITokenVerifier)
class JwtVerifier:
    """Verify tokens with the keys of one file."""

    _log = Logger()

    def __init__(
        self,
        path: str,
        algorithms: Sequence[str],
        *,
        audience: str | None,
        issuer: str | None,
        wall_clock: Callable[[], float],
    ) -> None:
        """Raises :class:`~gateway.settings.ConfigError` for an invalid file."""
        self._path = path
        self._algorithms = algorithms
        self._audience = audience
        source = f"--auth jwt:key-file={path}"
        self._validator = TokenValidator(source, algorithms, audience, issuer, wall_clock, AuthMethod.JWT)
        self._keys = read_key_file(path, algorithms)

    def start(self) -> None:
        """Log warnings about the settings."""
        warn_without_audience(self._log, f"jwt:key-file={self._path}", self._audience)
        self._warn_of_weak_secret()

    def reload(self) -> None:
        """Read the file again. Raises ``ConfigError``, and keeps the old keys, if it is not valid."""
        self._keys = read_key_file(self._path, self._algorithms)
        self._warn_of_weak_secret()

    def verify(self, token: str) -> Identity:
        """Verify a token. Raises :class:`VerificationError`."""
        unverified = self._validator.parse(token)
        try:
            return self._validator.validate(unverified, self._keys)
        except SignatureError:
            raise self._validator.rejection("signature") from None

    def _warn_of_weak_secret(self) -> None:
        min_size = max(HMAC_ALGORITHMS.get(name, 0) for name in self._algorithms)
        if min_size:
            warn_if_world_readable("auth", self._path)
        if min_size and len(self._keys[0].key) < min_size:
            # PyJWT would warn as well, at the first token, without naming the file.
            warnings.filterwarnings("ignore", message="The HMAC key is")
            self._log.warn(
                "--auth jwt:key-file={path}: the secret has {size} bytes; use {min_size} random bytes",
                path=self._path,
                size=len(self._keys[0].key),
                min_size=min_size,
            )
