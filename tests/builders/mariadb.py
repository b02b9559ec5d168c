"""A private MariaDB server for tests, in a temporary folder and on a free port.

    from tests.builders import mariadb

    url = mariadb.server().new_database()      # mysql://root@127.0.0.1:PORT/DATABASE

:func:`server` starts one server for the whole test run, at its first call. A test that stops or kills a server makes
its own ``MariaDBServer()``, whose ``kill``, ``stop`` and ``start`` keep the data and the port. When the process that
started a server ends, in whatever way, the server ends too, and its folder is removed (process_reaper.py).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pymysql

from tests.builders.ports import free_port
from tests.builders.process_reaper import ProcessReaper

MISSING = "MariaDB is missing: apt-get install --no-install-recommends mariadb-server-core mariadb-client-core"
#: seconds in which a server must start
START_TIMEOUT = 60.0

#: Small and fast, but commits survive a SIGKILL of the server (not a crash of the machine).
_OPTIONS = (
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=16M",
    "--innodb-flush-log-at-trx-commit=2",
    "--innodb-fast-shutdown=2",
    "--performance-schema=0",
    "--skip-name-resolve",
    "--skip-log-bin",
)


class ServerError(Exception):
    """The server cannot be started. The text says why, in one line."""


def _find_program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/usr/libexec")
    if found is None:
        raise ServerError(MISSING)
    return found


def _make_folder() -> Path:
    """Make a temporary folder, in memory if possible."""
    memory = "/dev/shm"
    parent = memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**29 else None
    return Path(tempfile.mkdtemp(prefix="wsgateway-mariadb-", dir=parent))


class MariaDBServer:
    """A private server, which is started at once.

    ``options`` are more options of mariadbd, and come last. ``core`` is the CPU core that it is bound to, if any. Raises
    :class:`ServerError` if mariadbd is not installed, or does not start.
    """

    def __init__(self, *options: str, core: int | None = None, folder: Path | None = None) -> None:
        self._program = _find_program("mariadbd")
        self._options = options
        self._core = core
        self._database_count = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.folder = folder or _make_folder()
        self._reaper = ProcessReaper(self.folder)
        self._tmpdir = f"--tmpdir={self.folder / 'tmp'}"
        self._user = ("--user=root",) if os.getuid() == 0 else ()
        try:
            self._install()
            self.start()
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    def _install(self) -> None:
        installer = _find_program("mariadb-install-db")
        # Not shared: a server that starts removes old temporary tables, even those of another server.
        (self.folder / "tmp").mkdir(exist_ok=True)
        command = [installer, "--no-defaults", *self._user, f"--datadir={self.folder / 'data'}", self._tmpdir]
        command += ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            lines = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines() or ["no output"]
            raise ServerError(f"mariadb-install-db failed: {lines[-1]}")

    @property
    def pid(self) -> int:
        """Process id of the server, which must be running."""
        assert self.process is not None
        return self.process.pid

    @property
    def url(self) -> str:
        """URL of the database ``wsgateway``, which is created if necessary."""
        self.execute("CREATE DATABASE IF NOT EXISTS wsgateway")
        return self.url_of("wsgateway")

    def url_of(self, database: str) -> str:
        """Return the URL of a database on this server."""
        return f"mysql://root@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Create an empty database, and return its URL."""
        self._database_count += 1
        name = f"fresh{self._database_count}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url_of(name)

    def connect(self, database: str | None = None, **options: Any) -> Any:
        """Connect as root, with autocommit. Returns a DB-API connection."""
        values: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "user": "root", "autocommit": True, **options}
        return pymysql.connect(database=database, connect_timeout=5, **values)

    def execute(self, *texts: str, database: str | None = None) -> Sequence[tuple[Any, ...]]:
        """Execute statements on a new connection. Returns the rows of the last one."""
        with contextlib.closing(self.connect(database)) as connection, connection.cursor() as cursor:
            rows: Sequence[tuple[Any, ...]] = ()
            for text in texts:
                cursor.execute(text)
                rows = cursor.fetchall()
            return rows

    def launch(self) -> None:
        """Start the server, without waiting until it is ready."""
        core = self._core
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(self._program, "--no-defaults", *self._user, f"--datadir={self.folder / 'data'}"),
                    *(f"--socket={self.folder / 's'}", f"--port={self.port}", "--bind-address=127.0.0.1"),
                    *(f"--pid-file={self.folder / 'pid'}", self._tmpdir, *_OPTIONS, *self._options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
            )
        (self.folder / "running").write_text(str(self.pid))

    def start(self) -> None:
        """Start the server, with its old data and port, and wait until it is ready."""
        self.launch()
        end = time.monotonic() + START_TIMEOUT
        while not self.is_ready():
            if self.process is None or self.process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"mariadbd does not start: {self._last_line()}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        """Whether the server executes statements."""
        try:
            self.execute("SELECT 1")
        except pymysql.err.Error:
            return False
        return True

    def _last_line(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if "[ERROR]" in line), (lines or ["no output"])[-1])

    def pause(self) -> None:
        """Send SIGSTOP: connections stay open, but get no response."""
        os.kill(self.pid, signal.SIGSTOP)
        # Each thread stops when the kernel next schedules it, and may respond until then.
        while not all(_is_stopped(task) for task in Path(f"/proc/{self.pid}/task").iterdir()):
            time.sleep(0.001)

    def resume(self) -> None:
        """Send SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Shut the server down with SIGTERM, and wait until it has ended."""
        self._terminate(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, and wait until the server has ended."""
        self._terminate(signal.SIGKILL)

    def _terminate(self, signum: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signum)
            process.wait()
            (self.folder / "running").unlink(missing_ok=True)

    def close(self) -> None:
        """Kill the server, and remove its folder."""
        atexit.unregister(self.close)
        self.kill()
        self._reaper.reap()


@functools.cache
def server() -> MariaDBServer:
    """Return the server of this test run, which must not be stopped."""
    return MariaDBServer()


def _is_stopped(task: Path) -> bool:
    """Whether a thread is stopped by a signal (``T`` in proc(5)), or gone."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "TtXZ"
    except OSError:
        return True
