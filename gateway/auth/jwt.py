"""``--auth jwt:key-file=F:algorithms=RS256,ES256:audience=A:issuer=I``: who has a JSON Web Token (RFC 7519) that a key
of the file has signed (RFC 7515).

    {"alg":"ES256","kid":"2026-10"}          the header: which key, and how it signs
    {"sub":"robot-7","exp":1798761600}       the claims: the client_id, and until when; also aud, iss, nbf, iat

A header may bring a key along, or say where there is one (jwk, jku, x5u, x5c): nobody looks there.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import jwt
import msgspec
from twisted.logger import Logger
from zope.interface import implementer

from gateway.auth.algorithms import HMAC_ALGORITHMS
from gateway.auth.errors import SignatureError, VerificationError
from gateway.auth.files import warn_if_world_readable
from gateway.auth.interface import MAX_TOKEN_LENGTH, Identity, ITokenVerifier, is_client_id
from gateway.auth.keys import VerificationKey, read_key_file

#: by so many seconds the clock of who issues a token may be ahead
LEEWAY = 30.0
#: in seconds since 1970, the year 10000: no time is that late, nor that long before
_MAX_TIMESTAMP = 253402300800
#: whatever is wrong with a token that cannot be read; PyJWT has its own exceptions for nearly all of it
_DECODE_ERRORS = (jwt.PyJWTError, ValueError, TypeError, RecursionError)


@attrs.frozen
class UnverifiedToken:
    """A token that can be read; what it says of itself may be a lie."""

    text: str
    algorithm: str
    kid: str | None


class TokenValidator:
    """What a token must be like. ``where`` is the ``--auth`` that says so; ``now`` is the wall clock, in seconds since
    1970."""

    def __init__(
        self,
        source: str,
        algorithms: Sequence[str],
        audience: str | None,
        issuer: str | None,
        wall_clock: Callable[[], float],
    ) -> None:
        self._source = source
        self._algorithms = frozenset(algorithms)
        self._audience = audience
        self._issuer = issuer
        self._wall_clock = wall_clock
        # Its own look at the clock is of another one, and takes texts for numbers.
        self._options: Any = {
            "verify_aud": audience is not None,
            "verify_iss": issuer is not None,
            **dict.fromkeys(("verify_exp", "verify_nbf", "verify_iat", "verify_sub", "verify_jti"), False),
        }

    def rejection(self, reason: str, **options: str) -> VerificationError:
        """What is raised for a token that is not accepted."""
        return VerificationError(reason, self._source, **options)

    def parse(self, text: str) -> UnverifiedToken:
        """A token that these rules could be for. Nothing is verified: what is of no use here is no reason to try keys,
        or to fetch any.

        Raises :class:`NotAccepted`.
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
        # Whatever is critical (RFC 7515, section 4.1.11), nothing of it is known here.
        if "crit" in header:
            raise self.rejection("other")
        if self._issuer not in (None, claims.get("iss")):
            raise self.rejection("issuer")
        return UnverifiedToken(text, algorithm, kid)

    def validate(self, token: UnverifiedToken, keys: Iterable[VerificationKey]) -> Identity:
        """Whose token it is. Of one that has expired the ``until`` is over.

        Raises :class:`NotSigned`, and :class:`NotAccepted` for one that is signed and all the same not accepted.
        """
        for key in keys:
            if token.algorithm not in key.algorithms:
                continue
            try:
                signed = jwt.decode_complete(
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
            return self._identity(signed["payload"])
        raise SignatureError

    def _identity(self, claims: dict[str, Any]) -> Identity:
        client_id = claims.get("sub")
        if not isinstance(client_id, str) or not is_client_id(client_id):
            raise self.rejection("subject")
        if not all(_is_numeric_date(claims[name]) for name in ("exp", "nbf", "iat") if name in claims):
            raise self.rejection("malformed")
        begins = max(claims.get("nbf", 0), claims.get("iat", 0))
        if begins > self._wall_clock() + LEEWAY:
            raise self.rejection("not_yet")
        # 0 would be never, and what is over is over.
        return Identity(client_id, max(1.0, float(claims["exp"])) if "exp" in claims else 0.0)


def _decode_error_reason(error: Exception) -> str:
    """The reason, for what PyJWT raises of a token that is signed."""
    claim = error.claim if isinstance(error, jwt.MissingRequiredClaimError) else ""
    if isinstance(error, jwt.InvalidAudienceError) or claim == "aud":
        return "audience"
    return "issuer" if isinstance(error, jwt.InvalidIssuerError) or claim == "iss" else "malformed"


def _decode_part(part: str) -> dict[str, Any]:
    """A part of a token, decoded; empty if it cannot be."""
    try:
        decoded = msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _is_numeric_date(value: object) -> bool:
    """Whether it is a NumericDate (RFC 7519, section 2) that a calendar has."""
    # Nothing that is no number is less than one, nor is infinity.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MAX_TIMESTAMP


def warn_without_audience(log: Logger, kind: str, audience: str | None) -> None:
    """Say what comes of leaving it out."""
    if audience is None:
        log.warn(
            "--auth {kind}: without audience=, a token that the same issuer made for another service is accepted",
            kind=kind,
        )


@implementer(ITokenVerifier)
class JwtVerifier:
    """The tokens that the keys of one file have signed."""

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
        """Raises :class:`~gateway.settings.ConfigError` for a file that will not do."""
        self._path = path
        self._algorithms = algorithms
        self._audience = audience
        self._validator = TokenValidator(f"--auth jwt:key-file={path}", algorithms, audience, issuer, wall_clock)
        self._keys = read_key_file(path, algorithms)

    def start(self) -> None:
        """Warn of what the settings allow."""
        warn_without_audience(self._log, f"jwt:key-file={self._path}", self._audience)
        self._warn_of_weak_secret()

    def reload(self) -> None:
        """Read the file again; the old keys stay if that fails, with ``ConfigError``."""
        self._keys = read_key_file(self._path, self._algorithms)
        self._warn_of_weak_secret()

    def verify(self, token: str) -> Identity:
        """See :meth:`ITokenVerifier.verify`; raises :class:`NotAccepted`."""
        unverified = self._validator.parse(token)
        try:
            return self._validator.validate(unverified, self._keys)
        except SignatureError:
            raise self._validator.rejection("signature") from None

    def _warn_of_weak_secret(self) -> None:
        wanted = max(HMAC_ALGORITHMS.get(name, 0) for name in self._algorithms)
        if wanted:
            warn_if_world_readable("auth", self._path)
        if wanted and len(self._keys[0].key) < wanted:
            # PyJWT would do so as well, when the first token comes, and not name the file.
            warnings.filterwarnings("ignore", message="The HMAC key is")
            self._log.warn(
                "--auth jwt:key-file={path}: the secret has {size} bytes; {wanted} random ones are right",
                path=self._path,
                size=len(self._keys[0].key),
                wanted=wanted,
            )
