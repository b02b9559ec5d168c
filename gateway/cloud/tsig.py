"""The file of a TSIG key (RFC 8945), as tsig-keygen writes it and BIND's named.conf has it:

    key "wsgateway" {
            algorithm hmac-sha256;
            secret "c2VjcmV0IG9mIHRoZSBmbGVldA==";
    };

Comments are those of named.conf: ``//`` and ``#`` to the end of the line, and ``/* */``. Anything else is refused.
"""

from __future__ import annotations

import base64
import binascii
import re

import attrs

#: the most bytes of a file that are read
MAX_BYTES = 65536

ALGORITHMS = frozenset({"hmac-md5", "hmac-sha1", "hmac-sha224", "hmac-sha256", "hmac-sha384", "hmac-sha512"})

_WANTED = 'write key "NAME" { algorithm hmac-sha256; secret "BASE64"; }; as tsig-keygen does'

_SKIPPED = re.compile(r"(?:\s|//[^\n]*|\#[^\n]*|/\*.*?\*/)+", re.DOTALL)
_TOKEN = re.compile(r'"([^"\\\n]*)"|([{};])|((?:[A-Za-z0-9._+=-]|/(?![/*]))+)')
#: of letters, digits, hyphens and underscores, each label of at most 63
_NAME = re.compile(r"(?=.{1,253}\.?\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


class KeyFileError(Exception):
    """A key file that will not do. Its text says why, in one line, and nothing of what is in the file."""


@attrs.frozen
class Key:
    """A key. ``secret`` is what the base64 of the file stands for."""

    name: str
    algorithm: str
    secret: bytes = attrs.field(repr=False)


def read(path: str) -> Key:
    """The key in this file. Raises :class:`KeyFileError`."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:
        raise KeyFileError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(content) > MAX_BYTES:
        raise KeyFileError(f"{path} has more than {MAX_BYTES} bytes; {_WANTED}")
    try:
        return parse(content.decode("ascii"))
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} has bytes that are no ASCII; {_WANTED}") from None
    except KeyFileError as e:
        raise KeyFileError(f"{path}: {e}; {_WANTED}") from None


def parse(text: str) -> Key:
    """The one key in this text. Raises :class:`KeyFileError`."""
    tokens = _tokens(text)
    if [kind for kind, _ in tokens] != ["word", "word", "{", "word", "word", ";", "word", "word", ";", "}", ";"]:
        raise KeyFileError("it is not one key, with its algorithm and its secret")
    words = [word for kind, word in tokens if kind == "word"]
    values = {words[2]: words[3], words[4]: words[5]}
    if words[0] != "key" or values.keys() != {"algorithm", "secret"}:
        raise KeyFileError("it is not one key, with its algorithm and its secret")
    name, algorithm = words[1], values["algorithm"].lower().rstrip(".")
    if not _NAME.fullmatch(name):
        raise KeyFileError("the name of its key is no domain name")
    if algorithm not in ALGORITHMS:
        raise KeyFileError(f"the algorithm of its key is none of {', '.join(sorted(ALGORITHMS))}")
    try:
        secret = base64.b64decode(values["secret"], validate=True)
    except binascii.Error:
        raise KeyFileError("the secret of its key is no base64") from None
    if not secret:
        raise KeyFileError("the secret of its key is empty")
    return Key(name.rstrip(".").lower(), algorithm, secret)


def _tokens(text: str) -> list[tuple[str, str]]:
    """What is in the text, as (kind, text): ``word``, with or without quotation marks, or a sign, which is its kind."""
    tokens = []
    at = 0
    while at < len(text):
        if skipped := _SKIPPED.match(text, at):
            at = skipped.end()
            continue
        match = _TOKEN.match(text, at)
        if match is None:
            raise KeyFileError(f"line {text.count(chr(10), 0, at) + 1} has something that does not belong there")
        quoted, sign, bare = match.groups()
        tokens.append((sign, sign) if sign else ("word", bare if quoted is None else quoted))
        at = match.end()
    return tokens
