r"""The texts of ``--auth``, ``--dns`` and ``--autoscaling``: ``kind:key=value:key=value``, where ``\:`` is a colon in
a value, as in Twisted's endpoint strings. What has no ``=``, or a ``/`` or ``?`` before it, goes on with the value
before, so that ``server=192.0.2.1:5353``, ``address=2001:db8::1`` and ``url=https://192.0.2.1:8443/keys?a=b`` need
none.

Every setting of a node: its default, its unit, and its check.

One frozen class. Its fields are the options of ``twistd wsgateway`` and the keys of ``[wsgateway]`` in tap.cfg (with
``-`` for ``_``); each carries in its metadata what ``--help`` says of it. A converter turns the text of an option into
a value, or raises ``ValueError`` with what would be right.
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

# What a backslash stands before is itself.
_SPEC_FIELD = re.compile(r"(?:[^:\\]|\\.)*")
_SPEC_ESCAPE = re.compile(r"\\(.)")
# What stands before an = in a url is no key.
_URL_DELIMITER = re.compile(r"[/?]")


def parse_spec(option: str, spec: str, *, required: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
    """The values in a spec, by key; what is optional and not given is left out.

    Raises :class:`~gateway.settings.ConfigError` for ``option`` where something is missing, given twice, or unknown.
    """
    kind, *fields = [_SPEC_ESCAPE.sub(r"\1", field) for field in _split_spec(option, spec)]
    wanted = ":".join([kind, *(f"{key}=…" for key in required)]) + "".join(f"[:{key}=…]" for key in optional)
    values: dict[str, str] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if values and (not equals or _URL_DELIMITER.search(key)):
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


def _split_spec(option: str, spec: str) -> list[str]:
    fields, at = [], 0
    while True:
        match = _SPEC_FIELD.match(spec, at)
        assert match is not None  # it matches nothing, too
        fields.append(match[0])
        at = match.end()
        if at == len(spec):
            return fields
        if spec[at] != ":":
            raise ConfigError(option, f"{spec!r} ends with a lone backslash")
        at += 1


class ConfigError(Exception):
    """A setting that cannot be used. Its text names the option and what would be right, in one line."""

    def __init__(self, option: str, problem: str) -> None:
        self.option = option
        super().__init__(f"--{option}: {problem}")


#: files kept for what is no client: backends above all; then log, database, epoll, pipes, listening ports
RESERVED_FILES = 1024
#: the open-file limit where the system sets none: what Linux allows a process by default (fs.nr_open)
MAX_OPEN_FILES = 1048576


def _parse_float(value: str | float) -> float:
    """What a text says, or a NaN for one that says no number."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def positive_seconds(*, minimum: float = 0.0) -> Callable[[str | float], float]:
    """A converter for a number of seconds of at least ``least``, exclusive when it is 0."""

    def convert(value: str | float) -> float:
        number = _parse_float(value)
        if not math.isfinite(number) or number < minimum or number <= 0:
            bound = f"of {minimum:g} or more" if minimum else "above 0"
            raise ValueError(f"{value!r} is not a number of seconds {bound}")
        return number

    return convert


def non_negative_seconds(value: str | float) -> float:
    """A converter for a number of seconds of 0 or more."""
    number = _parse_float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} is not a number of seconds of 0 or more")
    return abs(number)


def integer(*, minimum: int, unit: str) -> Callable[[str | int], int]:
    """A converter for a whole number of at least ``least``."""

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
    """A converter for a number per second; ``zero`` says what 0 means."""

    def convert(value: str | float) -> float:
        number = _parse_float(value)
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{value!r} is not a number per second of 0 ({zero_means}) or more")
        return number

    return convert


def websocket_url(value: str) -> str:
    """A converter for ``ws://host[:port][/prefix]``, or wss; http and https are read as these. An empty text is kept,
    a trailing slash dropped."""
    if not value:
        return value
    wanted = "write ws://host[:port][/prefix] or wss://host[:port][/prefix]"
    try:
        parsed = hyperlink.URL.from_text(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a URL; {wanted}") from None
    scheme = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}.get(parsed.scheme)
    if scheme is None or not parsed.host or parsed.query or parsed.fragment or parsed.userinfo:
        raise ValueError(f"{value!r} will not do; {wanted}")
    if value.rstrip("/").endswith("/v1/connect"):
        raise ValueError(f"{value!r} should stop before /v1/connect")
    return f"{scheme}:{value.partition(':')[2].rstrip('/')}"


def printable(value: str) -> str:
    """A converter for a text that will stand in log lines."""
    if not value.isprintable():
        raise ValueError(f"{value!r} has characters that cannot be printed")
    return value


def open_file_limit() -> int:
    """Raise the soft limit of open files to the hard one, as far as the system lets it, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < highest:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            soft = highest
    return highest if soft == resource.RLIM_INFINITY else soft


def reserved_files() -> int:
    """How many of the files that this process may open are not for clients."""
    return min(RESERVED_FILES, open_file_limit() // 4)


def files_reserved_for_backends() -> int:
    """How many of the reserved files clients leave free even while their opening handshakes are in progress."""
    return reserved_files() // 4


def capacity(value: str | int) -> int:
    """A converter for the number of clients; an empty text is what the open-file limit allows."""
    limit = open_file_limit() - reserved_files()
    if value == "":
        return max(1, limit)
    number = integer(minimum=1, unit="clients")(value)
    if number > limit:
        raise ValueError(
            f"{number} is more than this process may open: {limit} clients at the open-file limit of "
            f"{open_file_limit()} (raise it, by `ulimit -n` or LimitNOFILE, or start more nodes)"
        )
    return number


def one_of(*choices: str) -> Callable[[str], str]:
    """A converter for one word of a few."""

    def convert(value: str) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return value

    return convert


def option(
    default: Any,
    metavar: str,
    help: str,
    converter: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of :class:`Settings` that is an option; a tuple as its default makes it repeatable."""
    return attrs.field(
        default=default,
        converter=converter,
        metadata={"metavar": metavar, "help": help, "default": default, "converter": converter},
    )


def _non_empty_endpoints(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("needs an endpoint such as tcp:8080:interface=127.0.0.1:backlog=4096")
    return tuple(value)


def default_node_name() -> str:
    """The name of a node that was given none: host name and pid."""
    return f"{socket.gethostname()}-{os.getpid()}"


DEFAULT_LISTEN = ("tcp:8080:interface=127.0.0.1:backlog=4096",)
DEFAULT_BACKEND = ("tcp:8081:interface=127.0.0.1:backlog=4096",)


@attrs.frozen(kw_only=True)
class Settings:
    """What a node runs with. Times are in seconds and sizes in bytes unless a help text says otherwise."""

    listen: tuple[str, ...] = option(
        DEFAULT_LISTEN, "ENDPOINT", "Where clients connect: a Twisted endpoint string.", _non_empty_endpoints
    )
    backend: tuple[str, ...] = option(
        DEFAULT_BACKEND,
        "ENDPOINT",
        "Where backends and operators connect: a Twisted endpoint string.",
        _non_empty_endpoints,
    )
    public_url: str = option(
        "",
        "URL",
        "How clients reach this node: ws://host[:port][/prefix]. From the first --listen when not given.",
        websocket_url,
    )
    peer_url: str = option(
        "",
        "URL",
        "How other nodes reach this one: ws://host[:port][/prefix]. From the first --backend when not given.",
        websocket_url,
    )
    registry: str = option(
        "sqlite:wsgateway.sqlite",
        "URL",
        "Where it is written who is where: sqlite:PATH, or mysql://user@host:3306/database for nodes on several "
        "machines; its password is in WSGATEWAY_REGISTRY_PASSWORD, or in --registry-password-file.",
    )
    registry_password_file: str = option("", "FILE", "The password of a mysql: registry, in a file.")
    node_name: str = option("", "NAME", "What operators call this node. Host name and pid when not given.", printable)
    auth: tuple[str, ...] = option(
        (),
        "SPEC",
        "Who may connect as a client: none (anybody, by client_id), tokens:FILE, "
        "jwt:key-file=FILE:algorithms=RS256,ES256 or jwks:url=URL, both with :audience=A and :issuer=I, or mtls "
        "(who has a client certificate, at an mtls: endpoint).",
        tuple,
    )
    origin: tuple[str, ...] = option(
        (), "PATTERN", "A browser origin that may connect, such as https://*.example.com.", tuple
    )
    backend_token_file: str = option(
        "",
        "FILE",
        "The tokens of backends, one a line; behind it prefix=acme/ and verbs=call,notify,read,disconnect,serve limit "
        "it. Nobody is asked for one without.",
    )
    cluster_secret_file: str = option(
        "",
        "FILE",
        "The secret by which the nodes of a fleet know each other, the same for all; must be given with mysql:. Nodes "
        "on one sqlite: file keep one beside it when it is not given.",
    )
    on_elsewhere: str = option(
        "route",
        "route|takeover",
        "What to do with a client that another node holds: send it there, or take it.",
        one_of("route", "takeover"),
    )
    lease: float = option(
        15.0, "SECONDS", "A node that has not written its heartbeat for so long counts as dead.", positive_seconds()
    )
    heartbeat: float = option(
        5.0,
        "SECONDS",
        "How often a node writes its heartbeat, less than --lease; with at most half of it, one may be missed.",
        positive_seconds(),
    )
    call_timeout: float = option(
        30.0, "SECONDS", "How long a call waits for its response when it does not say.", positive_seconds()
    )
    max_call_timeout: float = option(
        300.0, "SECONDS", "The longest that a call may wait; a longer wish is cut to it.", positive_seconds()
    )
    ping_interval: float = option(
        50.0,
        "SECONDS",
        "A client that was silent for so long is pinged; less than what a load balancer allows.",
        positive_seconds(),
    )
    ping_timeout: float = option(
        20.0, "SECONDS", "A client that stays silent for so long after a ping is dropped.", positive_seconds()
    )
    capacity: int = option("", "N", "The most clients here. What the open-file limit allows when not given.", capacity)
    max_message_size: int = option(
        1048576, "BYTES", "The largest message, either way.", integer(minimum=1, unit="bytes")
    )
    max_calls_per_client: int = option(
        128, "N", "The most calls in flight to one client, and from it.", integer(minimum=1, unit="calls")
    )
    max_calls: int = option(100000, "N", "The most calls in flight on this node.", integer(minimum=1, unit="calls"))
    max_openings: int = option(
        4096, "N", "The most opening handshakes in progress.", integer(minimum=1, unit="opening handshakes")
    )
    openings_per_address: float = option(
        200.0,
        "N/SECOND",
        "The most opening handshakes from one address a second (and what comes to that in 5 s, at least 64, in "
        "progress); 0: no limit.",
        per_second(zero_means="no limit"),
    )
    messages_per_client: float = option(
        200.0,
        "N/SECOND",
        "A client that sends more messages a second is read more slowly; each 16 KiB of a message, and each message "
        "of a batch, count as one; 0: no limit.",
        per_second(zero_means="no limit"),
    )
    send_buffer: int = option(
        1048576,
        "BYTES",
        "A client or backend that has had more than this unread for 3 s is closed with 1013; a burst may be larger.",
        integer(minimum=1, unit="bytes"),
    )
    drain_seconds: float = option(
        30.0, "SECONDS", "At the end of a node its clients are told to go, spread over this time.", non_negative_seconds
    )
    rebalance_rate: float = option(
        50.0,
        "N/SECOND",
        "How many clients a node moves to others a second when one joins that has fewer; 0: none.",
        per_second(zero_means="none"),
    )
    dns: str = option(
        "",
        "SPEC",
        "The name in DNS that leads to every node that takes clients: route53:zone=ID:name=NAME, or "
        "rfc2136:server=HOST:zone=ZONE:name=NAME:key-file=FILE; both take :ttl=SECONDS and :address=IP, this node's.",
    )
    autoscaling: str = option(
        "",
        "SPEC",
        "The autoscaling group that this node is of, aws:group=NAME: CloudWatch is told how full it is, and it drains "
        "when its instance is to end. Also :region=, :hook= and :namespace=.",
    )
    park_after: float = option(
        0.0,
        "SECONDS",
        "How long an idle connection must be silent before it is parked (plain TCP and UNIX sockets only); 0: at once.",
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
                "mtls needs a --listen that asks for client certificates, such as "
                "mtls:8443:privateKey=k.pem:certKey=c.pem:clientCAs=ca.pem",
            )
        kind, _, rest = self.registry.partition(":")
        if kind == "mysql":
            self._check_cluster_options()
        elif kind != "sqlite":
            raise ConfigError("registry", f"{kind!r} is no registry; write sqlite:PATH or mysql://user@host/database")
        elif self.registry_password_file:
            raise ConfigError("registry-password-file", "a sqlite: registry has no password; leave it out")
        elif not rest:
            raise ConfigError("registry", "the path is missing; write sqlite:PATH")

    def _check_cluster_options(self) -> None:
        """With a mysql: registry there may be nodes on other machines."""
        for option, value, example in (
            ("public-url", self.public_url, "how clients reach this node, such as wss://gw1.example.com"),
            ("peer-url", self.peer_url, "how other nodes reach this one, such as ws://10.0.0.5:8081"),
            ("cluster-secret-file", self.cluster_secret_file, "a file with a secret that all nodes of the fleet have"),
        ):
            if not value:
                raise ConfigError(option, f"must be given with a mysql: registry: {example}")


def make_settings(values: dict[str, Any]) -> Settings:
    """Make settings of texts, by option name (with ``-``); what is not given has its default.

    Raises :class:`ConfigError`.
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
