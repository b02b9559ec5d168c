"""The URL of a database: ``mysql://user@host:3306/database?ssl_ca=…&ssl_cert=…&ssl_key=…&ssl_verify=…``

A part with other characters than a URL has is percent-encoded; an IPv6 address stands in square brackets. The password
is never part of it.

With any ``ssl_`` parameter the connection is by TLS, and never without: ``ssl_ca`` is a file of the authorities that
are trusted (those of the system if it is not given), ``ssl_cert`` and ``ssl_key`` are this node's own certificate and
its key, and ``ssl_verify=false`` takes any certificate.
"""

from __future__ import annotations

import ssl
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs

from gateway.settings import ConfigError

PORT = 3306
WANTED = "write mysql://user@host:3306/database"
PARAMETERS = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_verify")


@attrs.frozen
class Tls:
    """How a connection is encrypted. Texts are paths; an empty one is none."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """A context for one connection, of what is in the files now. Raises ``ConfigError``."""
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ssl.SSLError) as e:
            raise _unusable("ssl_ca", self.ca, e) from None
        # Servers make certificates for themselves that are no strict X.509; Python 3.13 would refuse them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert:
            try:
                # Without a password: it would be asked for on the terminal.
                context.load_cert_chain(self.cert, self.key or None, password="")
            except (OSError, ssl.SSLError) as e:
                raise _unusable("ssl_cert", f"{self.cert} with ssl_key={self.key or self.cert}", e) from None
        return context


@attrs.frozen
class Server:
    """A database, and how it is reached."""

    host: str
    port: int
    user: str
    database: str
    tls: Tls | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        text = f"{host}:{self.port}/{self.database}"
        return text if text.isprintable() else repr(text)


def parse(url: str) -> Server:
    """Read a URL. Raises ``ConfigError``, whose text never shows the password that somebody wrote in it."""
    try:
        parts = urlsplit(url)
        port = PORT if parts.port is None else parts.port
    except ValueError as e:
        raise ConfigError("registry", f"no URL ({e}); {WANTED}") from None
    if parts.password is not None:
        raise ConfigError(
            "registry",
            "a password in the URL would be seen by whoever lists processes; put it in a file and name that with "
            "--registry-password-file, or in the environment variable WSGATEWAY_REGISTRY_PASSWORD",
        )
    user, host = unquote(parts.username or ""), unquote(parts.hostname or "")
    database = unquote(parts.path[1:])
    for what, value in (("user", user), ("host", host), ("database", database)):
        if not value:
            raise ConfigError("registry", f"the {what} is missing; {WANTED}")
        if not value.isprintable():
            raise ConfigError("registry", f"the {what} {value!r} has characters that cannot be printed; {WANTED}")
    if "/" in parts.path[1:] or parts.fragment or port == 0:
        raise ConfigError("registry", f"{url!r} will not do; {WANTED}")
    return Server(host, port, user, database, _tls(parts.query))


def _tls(query: str) -> Tls | None:
    values: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in PARAMETERS:
            raise ConfigError("registry", f"{name!r} is no parameter of its URL; there are {', '.join(PARAMETERS)}")
        if name in values or not value:
            raise ConfigError("registry", f"the parameter {name} of its URL should be given once, with a value")
        values[name] = value
    if query and not values:
        raise ConfigError("registry", f"{query!r} is no parameter of its URL; there are {', '.join(PARAMETERS)}")
    if not values:
        return None
    verify = values.get("ssl_verify", "true")
    if verify not in ("true", "false"):
        raise ConfigError("registry", f"ssl_verify={verify} is neither true nor false; write one of these")
    if "ssl_key" in values and "ssl_cert" not in values:
        raise ConfigError("registry", "ssl_key is the key of a certificate; give ssl_cert as well, or neither")
    tls = Tls(values.get("ssl_ca", ""), values.get("ssl_cert", ""), values.get("ssl_key", ""), verify == "true")
    tls.context()
    return tls


def _unusable(parameter: str, value: str, error: OSError) -> ConfigError:
    return ConfigError("registry", f"{parameter}={value} cannot be used: {error.strerror or error}")
