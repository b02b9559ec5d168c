"""Which registry a node has, by the URL of its setting."""

from __future__ import annotations

import os
from typing import Any

from gateway.metrics import Metrics
from gateway.registry.interface import OnClaimRevoked, ignore_claim_revoked
from gateway.registry.sql import SQLRegistry
from gateway.registry.sqlite import SQLiteRegistry
from gateway.settings import ConfigError, Settings

#: the environment variable that has the password where no file is named
PASSWORD_VARIABLE = "WSGATEWAY_REGISTRY_PASSWORD"


def make_registry(
    settings: Settings, *, reactor: Any, metrics: Metrics, on_claim_revoked: OnClaimRevoked = ignore_claim_revoked
) -> SQLRegistry:
    """Make the registry that the settings name; nothing is opened yet.

    Raises ``ConfigError`` for a URL or a file that will not do. What can be known only by asking, ``check`` of the
    registry finds out.
    """
    scheme, colon, rest = settings.registry.partition(":")
    if colon and scheme == "sqlite":
        if not rest:
            raise ConfigError("registry", "the path is missing; write sqlite:PATH")
        return SQLiteRegistry(
            rest, lease=settings.lease, reactor=reactor, metrics=metrics, on_claim_revoked=on_claim_revoked
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
    # Read now, so that a file that is not there is told of at once, and again for each connection.
    read_password(settings.registry_password_file)
    return MySQLRegistry(
        server,
        password=lambda: read_password(settings.registry_password_file),
        lease=settings.lease,
        reactor=reactor,
        metrics=metrics,
        on_claim_revoked=on_claim_revoked,
    )


def read_password(path: str) -> bytes:
    """The password out of this file, less the end of its line; without a file, out of the environment.

    Raises ``ConfigError`` when the file cannot be read, or is empty.
    """
    if not path:
        return os.environb.get(PASSWORD_VARIABLE.encode(), b"")
    try:
        with open(path, "rb") as file:
            password = file.read(4096).rstrip(b"\r\n")
    except OSError as e:
        raise ConfigError("registry-password-file", f"{path} cannot be read: {e.strerror}") from None
    if not password or b"\n" in password:
        raise ConfigError("registry-password-file", f"{path} should have the password in one line, and nothing else")
    return password
