"""Settings of a node: names, defaults, units and checks.

The fields of :class:`Settings` are the options of ``twistd wsgateway`` and the keys of ``[wsgateway]`` in tap.cfg (with
``-`` for ``_``). The metadata of each field contains its text for ``--help``. A converter turns the text of an option
into its value, or raises ``ValueError`` with a message that says what is expected.

:func:`parse_spec` parses the values of ``--auth``, ``--dns`` and ``--autoscaling``.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import socket
from collections.abc import Callable, Collection
from typing import Any

import attrs
import hyperlink

#: file descriptors not used for clients but mainly for backends, and for log, database, epoll, pipes, listening ports
RESERVED_FILES = 1024
#: open-file limit if the system sets none: the Linux default of fs.nr_open, which bounds the limit of a process
MAX_OPEN_FILES = 2**20


class ConfigError(Exception):
    """An invalid setting. The message is one line that names the option and what is expected."""

    def __init__(self, option: str, problem: str) -> None:
        self.option = option
        super().__init__(f"--{option}: {problem}")


def _parse_float(value: str | float) -> float:
    """Parse a number; return NaN for a text that is not a number."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def positive_seconds(*, minimum: float = 0.0) -> Callable[[str | float], float]:
    """Make a converter for a number of seconds of at least ``minimum``; above 0 if ``minimum`` is 0."""

    def convert(value: str | float) -> float:
        number = _parse_float(value)
        if not math.isfinite(number) or number < minimum or number <= 0:
            bound = f"of {minimum:g} or more" if minimum else "above 0"
            raise ValueError(f"{value!r} is not a number of seconds {bound}")
        return number

    return convert


def non_negative_seconds(value: str | float) -> float:
    """Convert a number of seconds of 0 or more."""
    number = _parse_float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} is not a number of seconds of 0 or more")
    return abs(number)


def integer(*, minimum: int, unit: str) -> Callable[[str | int], int]:
    """Make a converter for an integer of at least ``minimum``. ``unit`` is a plural noun for the error message."""

    def convert(value: str | int) -> int:
        try:
            number = int(value)
        except ValueError:
            number = minimum - 1
        if number < minimum:
            raise ValueError(f"{value!r} is not a whole number of {unit} of {minimum} or more")
        return number

    return convert


def per_second(*, zero_means: str) -> Callable[[str | float], float]:
    """Make a converter for a rate per second of 0 or more. ``zero_means`` explains 0 in the error message."""

    def convert(value: str | float) -> float:
        number = _parse_float(value)
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{value!r} is not a number per second of 0 ({zero_means}) or more")
        return number

    return convert


def websocket_url(value: str) -> str:
    """Convert ``ws://host[:port][/prefix]``, or the same with wss.

    http and https become ws and wss. A trailing slash is removed. An empty string is returned unchanged.
    """
    if not value:
        return value
    expected = "write ws://host[:port][/prefix] or wss://host[:port][/prefix]"
    try:
        parsed = hyperlink.URL.from_text(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a URL; {expected}") from None
    scheme = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}.get(parsed.scheme)
    if scheme is None or not parsed.host or parsed.query or parsed.fragment or parsed.userinfo:
        raise ValueError(f"{value!r} is not the URL of a node; {expected}")
    if value.rstrip("/").endswith("/v1/connect"):
        raise ValueError(f"{value!r} must be written without /v1/connect")
    return f"{scheme}:{value.partition(':')[2].rstrip('/')}"


def printable(value: str) -> str:
    """Convert a text that appears in log lines: printable characters only."""
    if not value.isprintable():
        raise ValueError(f"{value!r} contains characters that are not printable")
    return value


def open_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit, if the system permits it, and return the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < highest:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            soft = highest
    return highest if soft == resource.RLIM_INFINITY else soft


def reserved_files() -> int:
    """Return how many of the files that this process may open are not for clients."""
    return min(RESERVED_FILES, open_file_limit() // 4)


def files_reserved_for_backends() -> int:
    """Return how many of the reserved files stay free even while opening handshakes of clients are in progress."""
    return reserved_files() // 4


def capacity(value: str | int) -> int:
    """Convert the maximum number of clients. An empty string means as many as the open-file limit allows."""
    limit = open_file_limit() - reserved_files()
    if value == "":
        return max(1, limit)
    number = integer(minimum=1, unit="clients")(value)
    if number > limit:
        raise ValueError(
            f"{number} is more than this process may open: {limit} clients at the open-file limit of "
            f"{open_file_limit()} (raise it with `ulimit -n` or LimitNOFILE, or start more nodes)"
        )
    return number


def one_of(*choices: str) -> Callable[[str], str]:
    """Make a converter for one of the given words."""

    def convert(value: str) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return convert


def option(
    default: Any,
    metavar: str,
    help: str,
    converter: Callable[[Any], Any] | None = None,
) -> Any:
    """Define a field of :class:`Settings`. The option is repeatable if ``default`` is a tuple."""
    return attrs.field(
        default=default,
        converter=converter,
        metadata={"metavar": metavar, "help": help, "default": default, "converter": converter},
    )


def _non_empty_endpoints(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("requires an endpoint such as tcp:8080:interface=127.0.0.1:backlog=4096")
    return tuple(value)


def default_node_name() -> str:
    """Return the name of a node without ``--node-name``: host name and pid."""
    return f"{socket.gethostname()}-{os.getpid()}"


DEFAULT_LISTEN = ("tcp:8080:interface=127.0.0.1:backlog=4096",)
DEFAULT_BACKEND = ("tcp:8081:interface=127.0.0.1:backlog=4096",)


@attrs.frozen(kw_only=True)
class Settings:
    """Settings of a node. Times are in seconds and sizes in bytes unless the help text says otherwise."""

    listen: tuple[str, ...] = option(
        DEFAULT_LISTEN, "ENDPOINT", "Endpoint for clients: a Twisted endpoint string.", _non_empty_endpoints
    )
    backend: tuple[str, ...] = option(
        DEFAULT_BACKEND,
        "ENDPOINT",
        "Endpoint for backends and operators: a Twisted endpoint string.",
        _non_empty_endpoints,
    )
    public_url: str = option(
        "",
        "URL",
        "URL at which clients reach this node: ws://host[:port][/prefix]. From the first --listen when not given.",
        websocket_url,
    )
    peer_url: str = option(
        "",
        "URL",
        "URL at which other nodes reach this node: ws://host[:port][/prefix]. From the first --backend when not given.",
        websocket_url,
    )
    registry: str = option(
        "sqlite:wsgateway.sqlite",
        "URL",
        "Database that records which node each client is connected to: sqlite:PATH, or "
        "mysql://user@host:3306/database for nodes on several machines. The password of a mysql: registry is read from "
        "--registry-password-file or the environment variable WSGATEWAY_REGISTRY_PASSWORD.",
    )
    registry_password_file: str = option("", "FILE", "File with the password of a mysql: registry.")
    node_name: str = option("", "NAME", "Name of this node for operators. Host name and pid when not given.", printable)
    auth: tuple[str, ...] = option(
        (),
        "SPEC",
        "How clients are authenticated: none (any client can use any client id), tokens:FILE, "
        "jwt:key-file=FILE:algorithms=RS256,ES256 or jwks:url=URL, both with :audience=A and :issuer=I, or mtls "
        "(client certificates, at an mtls: endpoint).",
        tuple,
    )
    origin: tuple[str, ...] = option(
        (),
        "PATTERN",
        "Browser origin that may connect, such as https://*.example.com, beside the origin of the node's own URL.",
        tuple,
    )
    backend_token_file: str = option(
        "",
        "FILE",
        "File with the tokens of backends, one per line. prefix=acme/ and verbs=call,notify,read,disconnect,serve "
        "after a token restrict it. Without this option backends need no token.",
    )
    cluster_secret_file: str = option(
        "",
        "FILE",
        "File with the secret by which the nodes of a fleet authenticate to each other, the same on all nodes. "
        "Required with a mysql: registry; nodes that share a sqlite: file otherwise keep a secret next to that file.",
    )
    on_elsewhere: str = option(
        "route",
        "route|takeover",
        "What to do with a client that another node holds: route it to that node, or take it over.",
        one_of("route", "takeover"),
    )
    lease: float = option(
        15.0, "SECONDS", "Time without a heartbeat after which a node is considered dead.", positive_seconds()
    )
    heartbeat: float = option(
        5.0,
        "SECONDS",
        "Interval between heartbeats, less than --lease. At most half of --lease tolerates one missed heartbeat.",
        positive_seconds(),
    )
    call_timeout: float = option(30.0, "SECONDS", "Timeout of a call that does not specify one.", positive_seconds())
    max_call_timeout: float = option(
        300.0, "SECONDS", "Maximum timeout of a call; a longer timeout is reduced to this.", positive_seconds()
    )
    ping_interval: float = option(
        40.0,
        "SECONDS",
        "Time of silence after which a client is pinged. Keep it below the idle timeout of a load balancer.",
        positive_seconds(),
    )
    ping_timeout: float = option(
        20.0, "SECONDS", "Time of silence after a ping after which a client is dropped.", positive_seconds()
    )
    capacity: int = option(
        "", "N", "Maximum number of clients. As many as the open-file limit allows when not given.", capacity
    )
    max_message_size: int = option(
        2**20, "BYTES", "Maximum size of a message, in either direction.", integer(minimum=1, unit="bytes")
    )
    max_calls_per_client: int = option(
        128,
        "N",
        "Maximum number of calls in flight to one client, and from one client.",
        integer(minimum=1, unit="calls"),
    )
    max_calls: int = option(
        100000, "N", "Maximum number of calls in flight on this node.", integer(minimum=1, unit="calls")
    )
    max_openings: int = option(
        4096, "N", "Maximum number of opening handshakes in progress.", integer(minimum=1, unit="opening handshakes")
    )
    openings_per_address: float = option(
        200.0,
        "N/SECOND",
        "Maximum rate of opening handshakes from one address. At most 5 s of that rate, but at least 64, may be in "
        "progress. 0: no limit.",
        per_second(zero_means="no limit"),
    )
    messages_per_client: float = option(
        200.0,
        "N/SECOND",
        "Message rate above which a client is read more slowly. Each 16 KiB of a message, and each message of a batch, "
        "count as one message. 0: no limit.",
        per_second(zero_means="no limit"),
    )
    send_buffer: int = option(
        2**20,
        "BYTES",
        "A client or backend that leaves more than this unread for 3 s is closed with 1013. A burst may be larger.",
        integer(minimum=1, unit="bytes"),
    )
    drain_delay: float = option(
        0.0,
        "SECONDS",
        "Time between a node's report that it is not ready and its drain: longer than load balancers need to notice.",
        non_negative_seconds,
    )
    drain_seconds: float = option(
        30.0, "SECONDS", "Time over which a draining node disconnects its clients.", non_negative_seconds
    )
    rebalance_rate: float = option(
        50.0,
        "N/SECOND",
        "Rate at which a node migrates clients to a node that has joined and has fewer clients. 0: no migration.",
        per_second(zero_means="none"),
    )
    dns: str = option(
        "",
        "SPEC",
        "DNS name that resolves to every node that accepts clients: route53:zone=ID:name=NAME, or "
        "rfc2136:server=HOST:zone=ZONE:name=NAME:key-file=FILE. Both take :ttl=SECONDS and :address=IP, the address of "
        "this node.",
    )
    autoscaling: str = option(
        "",
        "SPEC",
        "Autoscaling group of this node, aws:group=NAME: the node reports to CloudWatch how full it is, and drains "
        "before its instance is terminated. Also takes :region=, :hook= and :namespace=.",
    )
    park_after: float = option(
        0.0,
        "SECONDS",
        "Time of silence after which an idle connection is parked (plain TCP and UNIX sockets only). 0: at once.",
        non_negative_seconds,
    )

    def __attrs_post_init__(self) -> None:
        if self.heartbeat >= self.lease:
            raise ConfigError("heartbeat", f"{self.heartbeat:g} s is not less than --lease {self.lease:g} s")
        if self.call_timeout > self.max_call_timeout:
            raise ConfigError(
                "call-timeout",
                f"{self.call_timeout:g} s is more than --max-call-timeout {self.max_call_timeout:g} s",
            )
        if "mtls" in self.auth and not any(name.startswith(("mtls:", "haproxy:mtls:")) for name in self.listen):
            raise ConfigError(
                "auth",
                "mtls requires a --listen that asks for client certificates, such as "
                "mtls:8443:privateKey=k.pem:certKey=c.pem:clientCAs=ca.pem",
            )
        kind, _, rest = self.registry.partition(":")
        if kind == "mysql":
            self._check_cluster_options()
        elif kind != "sqlite":
            raise ConfigError(
                "registry", f"{kind!r} is not a kind of registry; write sqlite:PATH or mysql://user@host/database"
            )
        elif self.registry_password_file:
            raise ConfigError("registry-password-file", "a sqlite: registry has no password; leave it out")
        elif not rest:
            raise ConfigError("registry", "the path is missing; write sqlite:PATH")

    def _check_cluster_options(self) -> None:
        """Require what nodes on several machines need, which can share a mysql: registry."""
        for option, value, example in (
            ("public-url", self.public_url, "the URL at which clients reach this node, such as wss://gw1.example.com"),
            ("peer-url", self.peer_url, "the URL at which other nodes reach this node, such as ws://10.0.0.5:8081"),
            (
                "cluster-secret-file",
                self.cluster_secret_file,
                "a file with a secret, the same on all nodes of the fleet",
            ),
        ):
            if not value:
                raise ConfigError(option, f"must be given with a mysql: registry: {example}")


def make_settings(values: dict[str, Any]) -> Settings:
    """Convert and check the values of options by name (with ``-``); options that are not given have their default.

    Raises :class:`ConfigError` for the first invalid value.
    """
    converted = {}
    for field in attrs.fields(Settings):
        name = field.name.replace("_", "-")
        value = values.get(name, field.metadata["default"])
        try:
            convert = field.metadata["converter"]
            converted[field.name] = convert(value) if convert else value
        except ValueError as e:
            raise ConfigError(name, str(e)) from None
    return Settings(**converted)


#: up to the next unescaped colon
_SPEC_FIELD = re.compile(r"(?:[^:\\]|\\.)*")
_SPEC_ESCAPE = re.compile(r"\\(.)")
#: before an ``=``: the text before it is part of a url, not a key
_URL_DELIMITER = re.compile(r"[/?]")


def parse_spec(option: str, spec: str, *, required: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
    r"""Parse ``kind:key=value:key=value``; return the values by key, without optional keys that are not given.

    ``\:`` is a colon in a value, as in Twisted's endpoint strings. A field without ``=``, or with ``/`` or ``?`` before
    its ``=``, continues the value before it, so that ``server=192.0.2.1:5353``, ``address=2001:db8::1`` and
    ``url=https://192.0.2.1:8443/keys?a=b`` need no escapes.

    Raises :class:`ConfigError` for ``option`` if a key is missing, repeated or unknown, or a value is empty.
    """
    kind, *fields = [_SPEC_ESCAPE.sub(r"\1", field) for field in _split_spec(option, spec)]
    usage = ":".join([kind, *(f"{key}=…" for key in required)]) + "".join(f"[:{key}=…]" for key in optional)
    values: dict[str, str] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if values and (not equals or _URL_DELIMITER.search(key)):
            values[list(values)[-1]] += f":{field}"
            continue
        if not equals or key not in {*required, *optional}:
            raise ConfigError(option, f"{field!r} has no place in it; write {usage}")
        if key in values:
            raise ConfigError(option, f"{key!r} is given twice")
        if not value:
            raise ConfigError(option, f"{key!r} is empty; write {usage}")
        values[key] = value
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(option, f"{missing[0]!r} is missing; write {usage}")
    return values


def _split_spec(option: str, spec: str) -> list[str]:
    """Split at unescaped colons. The fields keep their escapes."""
    fields, at = [], 0
    while True:
        match = _SPEC_FIELD.match(spec, at)
        assert match is not None  # it matches the empty string
        fields.append(match[0])
        at = match.end()
        if at == len(spec):
            return fields
        if spec[at] != ":":
            raise ConfigError(option, f"{spec!r} ends with a lone backslash")
        at += 1
