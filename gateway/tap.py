"""Command line, configuration file and service of ``twistd wsgateway``.

Wiring only: options, their defaults and their checks are in settings.py.
"""

from __future__ import annotations

import configparser
import difflib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import autobahn
from twisted.application.service import IService
from twisted.copyright import version as twisted_version
from twisted.python import usage

from gateway import __version__
from gateway.settings import ConfigError, Settings, make_settings
from gateway.twistd import Terminal, check_files, is_daemon, log_path

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
        text += " Can be given more than once."
    return text if text.endswith("when not given.") else f"{text} [default: {shown or 'none'}]"


FIELDS = {_option_name(field): field for field in attrs.fields(Settings)}


class Options(usage.Options):
    """Options of ``twistd wsgateway``. :meth:`settings` returns the resulting settings."""

    synopsis = "[options]"
    longdesc = (
        "Keep the WebSocket connections of clients, and let backends call each client by its client id. "
        "Every option is also a key of [wsgateway] in the file given with --config (repeatable options: one value per "
        "line). The command line takes precedence."
    )
    optParameters = [
        ["config", "c", None, "FILE: Read options from this file. [default: none]"],
        *([name, None, None, _help_text(field)] for name, field in FIELDS.items() if not _is_repeatable(field)),
    ]

    def parseArgs(self, *args: str) -> None:
        """Refuse positional arguments."""
        if args:
            raise usage.UsageError(f"unexpected {args[0]!r}: every option begins with --")

    def postOptions(self) -> None:
        """Check the settings, and the files of twistd, so that an invalid one ends the program before anything is
        started."""
        self.settings()
        check_files(self.parent)

    def opt_version(self) -> None:
        """Print the versions of wsgateway, Twisted, Autobahn and Python, and exit."""
        sys.stdout.write(
            f"wsgateway {__version__}\n"
            f"Twisted {twisted_version}\n"
            f"Autobahn {autobahn.__version__}\n"
            f"Python {platform.python_version()}\n"
        )
        raise SystemExit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse the command line.

        Exits with one line on stderr if an option is invalid, where twistd would print the whole help.
        """
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]
        except usage.UsageError as e:
            raise SystemExit(f"wsgateway: {e}; see twistd wsgateway --help") from None
        except ConfigError as e:
            raise SystemExit(f"wsgateway: {e}") from None

    def settings(self) -> Settings:
        """Merge the command line, the configuration file and the defaults.

        Raises :class:`~gateway.settings.ConfigError` if the file or a value is invalid.
        """
        values: dict[str, Any] = read_config(self["config"]) if self["config"] else {}
        values.update((name, self[name]) for name in FIELDS if self.get(name) is not None)
        return make_settings(values)


def _make_collector(name: str, field: attrs.Attribute[Any]) -> Callable[[Options, str], None]:
    def collect(self: Options, value: str) -> None:
        self[name] = (*self.get(name, ()), value)

    collect.__doc__ = _help_text(field)
    return collect


# usage.Options needs a method for each repeatable option.
for _option, _field in FIELDS.items():
    if _is_repeatable(_field):
        setattr(Options, f"opt_{_field.name}", _make_collector(_option, _field))


def read_config(path: str) -> dict[str, Any]:
    """Read ``[wsgateway]`` of a configuration file: option name to string, or to a tuple for a repeatable option.

    Raises :class:`~gateway.settings.ConfigError` if the file cannot be read or has other sections or unknown keys.
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
    other_sections = [section for section in (*parser.sections(), *parser.defaults()) if section != SECTION]
    if other_sections or not parser.has_section(SECTION):
        problem = f"has [{other_sections[0]}]" if other_sections else f"has no [{SECTION}]"
        raise ConfigError("config", f"{path} {problem}; its only section is [{SECTION}]")
    values: dict[str, Any] = {}
    for name, value in parser.items(SECTION):
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError("config", f"{path} has an unknown key {name!r}{hint}")
        if _is_repeatable(FIELDS[name]):
            lines = tuple(line.strip() for line in value.splitlines() if line.strip())
            if lines:
                values[name] = lines
        elif value:
            values[name] = value
    return values


def makeService(options: Options) -> IService:
    """Make the node as a service, which twistd starts. Exits with one line on stderr if a setting is invalid."""
    from twisted.internet import reactor

    from gateway.node import Node

    # The reactor's timers follow the wall clock: setting it back by an hour would stop heartbeats and pings that long.
    reactor.seconds = time.monotonic  # type: ignore[method-assign]
    # Before twistd daemonizes.
    terminal = Terminal(log_path(options.parent)) if is_daemon(options.parent) else None
    try:
        return Node(options.settings(), reactor, terminal=terminal)
    except ConfigError as e:
        raise SystemExit(f"wsgateway: {e}") from None
