"""Names of hosts and zones (RFC 1035, section 2.3.1; RFC 1123, section 2.1), and addresses that a name may lead to."""

from __future__ import annotations

import ipaddress
import re

#: letters, digits and hyphens, but no hyphen at either end; a digit may come first (RFC 1123)
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
#: with their dots, less the last one: 255 octets on the wire
MOST_CHARACTERS = 253


def domain(text: str) -> str:
    """A name in small letters and without a dot at its end.

    Raises ``ValueError``, which says what would be right.
    """
    name = text[:-1] if text.endswith(".") else text
    name = name.lower()
    if not name.isascii() or len(name) > MOST_CHARACTERS or not _DOMAIN.fullmatch(name):
        raise ValueError(
            f"{text!r} is no name such as gw.example.com: labels of 1 to 63 letters, digits and hyphens, at most "
            f"{MOST_CHARACTERS} characters in all"
        )
    return name


def is_within(name: str, zone: str) -> bool:
    """Whether a name is in a zone, or is its own name."""
    return name == zone or name.endswith(f".{zone}")


def address(text: str) -> str:
    """An IPv4 or IPv6 address, in the one way in which programs write it.

    Raises ``ValueError`` for what is none, and for one that is not of one host.
    """
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is no IPv4 or IPv6 address") from None
    if found.is_unspecified or found.is_multicast or str(found) == "255.255.255.255" or "%" in text:
        raise ValueError(f"{text!r} is no address that a name can lead to")
    return str(found)


def as_address(host: str) -> str | None:
    """A host as an address, or ``None`` if it is a name; ``[::1]`` as in a url, too."""
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return None


def usable(text: str) -> str:
    """An address that others can reach: not one of this machine alone. Raises ``ValueError``."""
    found = ipaddress.ip_address(address(text))
    if found.is_loopback or found.is_link_local:
        raise ValueError(f"{text} is an address of this machine alone")
    return str(found)
