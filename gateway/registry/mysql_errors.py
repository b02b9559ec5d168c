"""What the errors of MySQL and MariaDB mean."""

from __future__ import annotations

import ssl

import pymysql

from gateway.registry.mysql_driver import SPOILT
from gateway.registry.mysql_url import Server
from gateway.settings import ConfigError

#: Errors that may be gone at the next try: somebody else's locks (1205, 1213), a connection that is lost or cannot be
#: made (0: it was closed), too many of them, and those of a server that goes away or is read-only.
PASSING = frozenset({0, 1040, 1205, 1213, 1317, 2003, 2006, 2013, 2055, 4031}) | SPOILT


def explain(server: Server, error: BaseException | None) -> str:
    """One line for a log, or an empty text for what is no error of the database or of the way to it."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, pymysql.MySQLError | OSError):
        return f"{server}: {_text(error)}"
    return ""


def unusable(server: Server, has_password: bool, error: BaseException) -> ConfigError:
    """What to tell of an error that came when the registry was opened, in one line."""
    if isinstance(error, ConfigError):
        text = str(error).removeprefix("--registry: ")
        # Some know of the server, some of the URL.
        return (
            error
            if error.option != "registry" or text.startswith(str(server))
            else ConfigError("registry", f"{server}: {text}")
        )
    code = error.args[0] if isinstance(error, pymysql.MySQLError) and error.args else None
    text, database, user = _text(error), repr(server.database), repr(server.user)
    known = {
        1040: "has too many connections; raise its max_connections, or stop what holds them",
        1044: f"does not let {user} use {database}, or has none of that name: CREATE DATABASE {server.database}; "
        f"GRANT ALL ON {server.database}.* TO {user}@'…'",
        1049: f"has no database {database}: CREATE DATABASE {server.database}, or name another",
        1142: f"does not let {user} do what is needed ({text}): GRANT ALL ON {server.database}.* TO {user}@'…'",
        1290: f"cannot be written ({text}); name the server that can be",
        1836: f"cannot be written ({text}); name the server that can be",
        2026: f"has no TLS ({text}); let it have a certificate, or leave the ssl_ parameters out",
    }
    cause = getattr(error, "original_exception", None)
    if code in (1045, 1698):
        problem = f"does not let {user} in ({text}): " + (
            "the password is wrong, or that user may not come from here, or only with TLS (ssl_ca) or a certificate "
            "(ssl_cert, ssl_key)"
            if has_password
            else "no password was given; put it in a file and name that with --registry-password-file, or in the "
            "environment variable WSGATEWAY_REGISTRY_PASSWORD"
        )
    elif isinstance(cause, ssl.SSLError):
        problem = f"has no certificate that will do ({cause}); see ssl_ca and ssl_verify"
    elif code == 2003 or isinstance(error, OSError):
        problem = f"cannot be reached ({cause or text}); is it up, and are host and port right?"
    else:
        problem = known.get(code or 0) or f"cannot be used: {text}"
    return ConfigError("registry", f"{server} {problem}")


def _text(error: BaseException) -> str:
    """What the database said, in one line and without its number."""
    said = error.args[1] if isinstance(error, pymysql.MySQLError) and len(error.args) > 1 else str(error)
    return " ".join(str(said).split()) or "the connection was closed"
