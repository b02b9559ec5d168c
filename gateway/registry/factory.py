"""Make the registry that ``--registry`` names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from gateway.metrics import Metrics
from gateway.registry.interface import OnClaimRevoked, ignore_claim_revoked
from gateway.registry.sql import CollectFloors, SQLRegistry, no_floors
from gateway.registry.sqlite import SQLiteRegistry
from gateway.settings import ConfigError, Settings
from gateway.util.files import FileError, read_bounded

#: environment variable with the password, used without ``--registry-password-file``
PASSWORD_VARIABLE = "WSGATEWAY_REGISTRY_PASSWORD"
#: bytes of the password file
MAX_PASSWORD_SIZE = 2**12


def make_registry(
    settings: Settings,
    *,
    reactor: Any,
    metrics: Metrics,
    on_claim_revoked: OnClaimRevoked = ignore_claim_revoked,
    clock: Callable[[], float] = time.monotonic,
    collect_floors: CollectFloors = no_floors,
) -> SQLRegistry:
    """Make the registry that the settings name. It is not opened yet. ``clock`` is a monotonic clock, in seconds;
    ``collect_floors`` asks the other nodes for the highest generations that they know of.

    Raises ``ConfigError`` for an invalid URL or file. Errors that need a connection are left to the registry's
    ``check``.
    """
    scheme, colon, rest = settings.registry.partition(":")
    if colon and scheme == "sqlite":
        if not rest:
            raise ConfigError("registry", "the path is missing; write sqlite:PATH")
        return SQLiteRegistry(
            rest,
            lease=settings.lease,
            reactor=reactor,
            metrics=metrics,
            clock=clock,
            on_claim_revoked=on_claim_revoked,
            heartbeat=settings.heartbeat,
            collect_floors=collect_floors,
        )
    if not colon or scheme != "mysql":
        shown = scheme if scheme.isprintable() else repr(scheme)
        raise ConfigError("registry", f"{shown!r} is no registry; write sqlite:PATH or mysql://user@host:3306/database")
    try:
        from gateway.registry.mysql import MySQLRegistry
    except ImportError:
        raise ConfigError("registry", "a mysql: registry needs PyMySQL: pip install 'wsgateway[mysql]'") from None
    from gateway.registry.mysql import parse_url

    server = parse_url(settings.registry)
    # Read now, so that a missing file is an error at startup; read again for each connection.
    read_password(settings.registry_password_file)
    return MySQLRegistry(
        server,
        password=lambda: read_password(settings.registry_password_file),
        lease=settings.lease,
        reactor=reactor,
        metrics=metrics,
        clock=clock,
        on_claim_revoked=on_claim_revoked,
        heartbeat=settings.heartbeat,
        collect_floors=collect_floors,
    )


def read_password(path: str) -> bytes:
    """Read the password from a file, without its newline, or, if ``path`` is empty, from the environment.

    Raises ``ConfigError`` if the file cannot be read, or does not have exactly one line.
    """
    if not path:
        return os.environb.get(PASSWORD_VARIABLE.encode(), b"")
    try:
        password = read_bounded(path, MAX_PASSWORD_SIZE).rstrip(b"\r\n")
    except FileError as e:
        raise ConfigError("registry-password-file", str(e)) from None
    if not password or b"\n" in password:
        raise ConfigError("registry-password-file", f"{path} should have the password in one line, and nothing else")
    return password
