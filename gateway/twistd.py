"""What twistd does around a node: the files that it writes, and the terminal that a daemon leaves.

If twistd cannot write one of its files, it ends with a traceback when the node has begun to start; :func:`check_files`
reports that before. It points the stderr of a daemon to /dev/null, and shows only the first 100 bytes of an error; a
:class:`Terminal` that was made before shows all of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from gateway.settings import ConfigError

#: name of the log of a daemon without ``--logfile``
DEFAULT_LOG = "twistd.log"


def is_daemon(options: Mapping[str, Any] | None) -> bool:
    """Whether the options of the command, which stand before ``wsgateway``, are those of a twistd that daemonizes."""
    return options is not None and "nodaemon" in options and not (options["nodaemon"] or options.get("debug"))


def log_path(options: Mapping[str, Any] | None) -> str:
    """Return the absolute path of the file that twistd logs to; empty if it logs to somewhere else."""
    if options is None or "nodaemon" not in options or options.get("syslog") or options.get("logger"):
        return ""
    name = options.get("logfile") or (DEFAULT_LOG if is_daemon(options) else "-")
    return "" if name == "-" else os.path.abspath(name)


def check_files(options: Mapping[str, Any] | None) -> None:
    """Raise :class:`~gateway.settings.ConfigError` if twistd will not be able to write its pid file or its log.

    ``options`` are those of the command.
    """
    if options is None or options.get("chroot"):
        return
    if options.get("pidfile"):
        _check_writable(
            "pidfile", os.path.abspath(options["pidfile"]), "--pidfile=FILE or, for no such file, --pidfile="
        )
    if log_path(options):
        _check_writable("logfile", log_path(options), "--logfile=FILE")


def _check_writable(option: str, path: str, remedy: str) -> None:
    folder = os.path.dirname(path)
    if os.path.exists(path):
        writable = os.access(path, os.W_OK, effective_ids=True)
    else:
        writable = os.access(folder, os.W_OK | os.X_OK, effective_ids=True)
    if not writable:
        problem = "this user may not write there" if os.path.isdir(folder) else "there is no such folder"
        raise ConfigError(
            option,
            f"twistd cannot write {path}: {problem}; start it in another folder, or write {remedy} before wsgateway",
        )


class Terminal:
    """The stderr of the command, kept while a daemon starts. ``log`` is the path of its log, or empty."""

    def __init__(self, log: str = "") -> None:
        self._log = log
        try:
            self._fd = os.dup(2)
        except OSError:
            self._fd = -1

    def report(self, problem: str) -> None:
        """Write why the node does not start, in one line, and close."""
        where = f"; the log is {self._log}" if self._log else ""
        with contextlib.suppress(OSError):
            os.write(self._fd, f"wsgateway: {problem}{where}\n".encode(errors="backslashreplace"))
        self.close()

    def close(self) -> None:
        """Leave the terminal. A command whose output is read to its end is over now."""
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):
            os.close(fd)
