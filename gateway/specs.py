r"""The texts of ``--auth``, ``--dns`` and ``--autoscaling``: ``kind:key=value:key=value``, where ``\:`` is a colon in
a value, as in Twisted's endpoint strings. What has no ``=``, or a ``/`` or ``?`` before it, goes on with the value
before, so that ``server=192.0.2.1:5353``, ``address=2001:db8::1`` and ``url=https://192.0.2.1:8443/keys?a=b`` need
none.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from gateway.settings import ConfigError

# What a backslash stands before is itself.
_FIELD = re.compile(r"(?:[^:\\]|\\.)*")
_ESCAPED = re.compile(r"\\(.)")
# What stands before an = in a url is no key.
_IN_A_URL = re.compile(r"[/?]")


def parse(option: str, spec: str, *, required: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
    """The values in a spec, by key; what is optional and not given is left out.

    Raises :class:`~gateway.settings.ConfigError` for ``option`` where something is missing, given twice, or unknown.
    """
    kind, *fields = [_ESCAPED.sub(r"\1", field) for field in _split(option, spec)]
    wanted = ":".join([kind, *(f"{key}=…" for key in required)]) + "".join(f"[:{key}=…]" for key in optional)
    values: dict[str, str] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if values and (not equals or _IN_A_URL.search(key)):
            values[list(values)[-1]] += f":{field}"
            continue
        if not equals or key not in {*required, *optional}:
            raise ConfigError(option, f"{field!r} has no place in it; write {wanted}")
        if key in values:
            raise ConfigError(option, f"{key!r} is given twice")
        if not value:
            raise ConfigError(option, f"{key!r} is empty; write {wanted}")
        values[key] = value
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(option, f"{missing[0]!r} is missing; write {wanted}")
    return values


def _split(option: str, spec: str) -> list[str]:
    fields, at = [], 0
    while True:
        match = _FIELD.match(spec, at)
        assert match is not None  # it matches nothing, too
        fields.append(match[0])
        at = match.end()
        if at == len(spec):
            return fields
        if spec[at] != ":":
            raise ConfigError(option, f"{spec!r} ends with a lone backslash")
        at += 1
