"""The command line of ``twistd wsgateway``, its configuration file, and the service that they make.

Wiring only: what an option means, and its check, is in settings.py.
"""

from __future__ import annotations

import configparser
import difflib
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
from twisted.application.service import IService
from twisted.python import usage

from gateway.settings import ConfigError, Settings, make_settings

SECTION = "wsgateway"


def _option_name(field: attrs.Attribute[Any]) -> str:
    return field.name.replace("_", "-")


def _is_repeatable(field: attrs.Attribute[Any]) -> bool:
    return isinstance(field.metadata["default"], tuple)


def _help_text(field: attrs.Attribute[Any]) -> str:
    default = field.metadata["default"]
    shown = " ".join(default) if isinstance(default, tuple) else default
    shown = f"{shown:g}" if isinstance(shown, float) else shown
    text = f"{field.metadata['metavar']}: {field.metadata['help']}"
    if _is_repeatable(field):
        text += " May be given more than once."
    return text if text.endswith("when not given.") else f"{text} [default: {shown or 'none'}]"


FIELDS = {_option_name(field): field for field in attrs.fields(Settings)}


class Options(usage.Options):
    """The options of ``twistd wsgateway``; :meth:`settings` has what came of them."""

    synopsis = "[options]"
    longdesc = (
        "Holds the WebSockets of clients, and lets backends call any of them by its client id. "
        "Every option is also a key of [wsgateway] in the file that --config names (repeatable ones: one value a "
        "line); the command line wins."
    )
    optParameters = [
        ["config", "c", None, "FILE: Read options from this file. [default: none]"],
        *([name, None, None, _help_text(field)] for name, field in FIELDS.items() if not _is_repeatable(field)),
    ]

    def parseArgs(self, *args: str) -> None:
        """Refuse whatever is no option."""
        if args:
            raise usage.UsageError(f"unexpected {args[0]!r}: every option begins with --")

    def postOptions(self) -> None:
        """Make the settings, so that a bad one ends the program before anything is started."""
        self.settings()

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse; what cannot be used ends the program with one line, where twistd would print the whole help."""
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]
        except usage.UsageError as e:
            raise SystemExit(f"wsgateway: {e}; see twistd wsgateway --help") from None
        except ConfigError as e:
            raise SystemExit(f"wsgateway: {e}") from None

    def settings(self) -> Settings:
        """What the command line, the file and the defaults come to.

        Raises :class:`~gateway.settings.ConfigError`.
        """
        values: dict[str, Any] = read_config(self["config"]) if self["config"] else {}
        values.update((name, self[name]) for name in FIELDS if self.get(name) is not None)
        return make_settings(values)


def _make_collector(name: str, field: attrs.Attribute[Any]) -> Callable[[Options, str], None]:
    def collect(self: Options, value: str) -> None:
        self[name] = (*self.get(name, ()), value)

    collect.__doc__ = _help_text(field)
    return collect


# A repeatable option is a method for usage.Options.
for _option, _field in FIELDS.items():
    if _is_repeatable(_field):
        setattr(Options, f"opt_{_field.name}", _make_collector(_option, _field))


def read_config(path: str) -> dict[str, Any]:
    """Read ``[wsgateway]`` of a configuration file: texts by option name, tuples of them for repeatable options.

    Raises :class:`~gateway.settings.ConfigError` when it cannot be read, or has anything else in it.
    """
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#", ";"))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except OSError as e:
        raise ConfigError("config", f"{path} cannot be read: {e.strerror}") from None
    except (configparser.Error, UnicodeDecodeError) as e:
        problem = " ".join(str(e).split())
        raise ConfigError("config", f"{path} is not a configuration file: {problem}") from None
    strangers = [section for section in (*parser.sections(), *parser.defaults()) if section != SECTION]
    if strangers or not parser.has_section(SECTION):
        found = f"has [{strangers[0]}]" if strangers else f"has no [{SECTION}]"
        raise ConfigError("config", f"{path} {found}; its one section is [{SECTION}]")
    values: dict[str, Any] = {}
    for name, value in parser.items(SECTION):
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"; is {close[0]} meant?" if close else ""
            raise ConfigError("config", f"{path} has an unknown key {name!r}{hint}")
        if _is_repeatable(FIELDS[name]):
            lines = tuple(line.strip() for line in value.splitlines() if line.strip())
            if lines:
                values[name] = lines
        elif value:
            values[name] = value
    return values


def makeService(options: Options) -> IService:
    """Make the node; twistd starts it."""
    from twisted.internet import reactor

    from gateway.node import Node

    # A reactor keeps its timers by the wall clock: set back by an hour, it would stop heartbeats and pings for as long.
    reactor.seconds = time.monotonic  # type: ignore[method-assign]
    try:
        return Node(options.settings(), reactor)
    except ConfigError as e:
        raise SystemExit(f"wsgateway: {e}") from None
