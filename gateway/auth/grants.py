"""What a backend's token is for: everything, or some verbs alone, for all clients or for those of one customer.

call         ask a client
notify       tell a client, or all whose ids begin alike
read         where clients are, their events, the nodes; without a prefix the metrics, too
disconnect   disconnect a client
serve        answer what clients ask
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs

VERBS: Final = ("call", "notify", "read", "disconnect", "serve")
#: what who comes in by a token is told when it is none any more
WITHDRAWN: Final = "this token was withdrawn"


class Forbidden(Exception):
    """What a token is not for. The text says what it is for, and never shows it."""


@attrs.define(eq=False, init=False)
class Grant:
    """What one token is for. Whoever came in by it keeps this very object: it changes when the file of tokens does."""

    #: how the ids of the clients begin that it is for
    prefix: str
    verbs: frozenset[str]
    #: whether there is anything that it is not for; while ``False``, nothing else need be asked
    limited: bool
    #: whether the token is no longer one
    withdrawn: bool

    def __init__(self, prefix: str = "", verbs: Iterable[str] | None = None) -> None:
        self.limit(prefix, verbs)

    def limit(self, prefix: str, verbs: Iterable[str] | None) -> None:
        """Let it be for this from now on; ``None`` are all verbs, and whatever else there is."""
        self.prefix = prefix
        self.verbs = frozenset(VERBS if verbs is None else verbs)
        self.limited = bool(prefix) or verbs is not None
        self.withdrawn = False

    def withdraw(self) -> None:
        """Let it be for nothing from now on."""
        self.limit("", ())
        self.withdrawn = True

    def allows(self, verb: str, client_id: str) -> bool:
        """Whether it is for doing that to a client; or to all clients whose ids begin so, so that an empty text stands
        for everybody."""
        return verb in self.verbs and client_id.startswith(self.prefix)

    def check(self, verb: str, client_id: str | None = None) -> None:
        """Raise :class:`Forbidden` unless it is; without ``client_id`` it is for something that is about no client."""
        if self.withdrawn:
            raise Forbidden(WITHDRAWN)
        if verb not in self.verbs:
            given = ", ".join(each for each in VERBS if each in self.verbs) or "nothing"
            raise Forbidden(f"this token may not {verb}; it is for {given}")
        if client_id is not None and not client_id.startswith(self.prefix):
            raise Forbidden(f"this token is for clients whose id begins with {self.prefix} alone")

    def check_unlimited(self) -> None:
        """Raise :class:`Forbidden` unless it is for everything."""
        if self.withdrawn:
            raise Forbidden(WITHDRAWN)
        if self.limited:
            raise Forbidden("this is for tokens without a prefix and verbs alone")


#: of who is asked for no token, and of who has one without limits; nobody changes it
UNLIMITED: Final = Grant()
#: of who showed no token, where something may be asked without
NOTHING: Final = Grant(verbs=())
