"""Start holder processes (``benchmarks/holder.py``), each with the clients of one server."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import measure

PROGRAM = Path(__file__).with_name("holder.py")
#: client ids as people choose them
SHORT_CLIENT_ID = "agent-{:06d}"
#: client ids as programs generate them
LONG_CLIENT_ID = "5f0c3a6e-8d1b-4c57-9b1e-{:012d}"
#: first address that clients connect from
SOURCE = "127.0.1.1"
#: number of addresses: each has 28,000 ports for one server, and the kernel takes long to find a free one when half of
#: them are in use
SOURCES = 4
#: first message of an agent of nats-server
NATS_HELLO = (
    'CONNECT {"verbose":false,"pedantic":false,"lang":"bench","version":"1","protocol":1}\r\nSUB agent.{id} 1\r\n'
)


class HolderError(Exception):
    """Clients could not be opened. The message gives the reason in one line."""


class ClientHolder:
    """One holder process.

    :meth:`open` and :meth:`close` wait for the report; :meth:`send_command` and :meth:`read_reports` do not.
    """

    def __init__(
        self,
        port: int,
        path: str,
        *,
        hello: str = "",
        name: str = SHORT_CLIENT_ID,
        in_progress: int = 200,
        source: str = SOURCE,
        core: int | None = measure.LOAD_CORE,
    ) -> None:
        """``path`` is the request target, with ``{id}``. The process is pinned to ``core`` unless that is ``None``."""
        options = {
            "--port": port,
            "--path": path,
            "--name": name,
            "--hello": hello,
            "--in-progress": in_progress,
            "--source": source,
            "--sources": SOURCES,
        }
        self.process = subprocess.Popen(
            # -I and -S: no unnecessary imports.
            [sys.executable, "-I", "-S", str(PROGRAM), *(str(text) for pair in options.items() for text in pair)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._partial = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def fileno(self) -> int:
        """Return a file descriptor that is readable when there is a report."""
        return self._stdout.fileno()

    def send_command(self, command: str) -> None:
        """Send a command."""
        try:
            self._stdin.write(f"{command}\n".encode())
        except BrokenPipeError:
            raise HolderError(f"the holder exited with {self.process.wait()}") from None

    def read_reports(self) -> list[dict[str, Any]]:
        """Wait for bytes and return the complete reports. Raises :class:`HolderError` if the holder exited."""
        data = self._stdout.read(65536)
        if not data:
            raise HolderError(f"the holder exited with {self.process.wait()}")
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def run_command(self, command: str, timeout: float = 120.0) -> dict[str, Any]:
        """Send a command and return its report.

        Raises :class:`HolderError` if the holder exited, or does not answer within ``timeout`` seconds.
        """
        self.send_command(command)
        end = time.monotonic() + timeout
        while True:
            ready, _, _ = select.select([self], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise HolderError(f"{command!r} is not done after {timeout:g} s")
            reports = self.read_reports()
            if reports:
                return reports[-1]

    def open(self, count: int) -> dict[str, Any]:
        """Open more clients. Raises :class:`HolderError` if some could not be opened, or were lost."""
        report = self.run_command(f"open {count}")
        if report["failed"] or report["lost"]:
            raise HolderError(f"{report['failed']} clients failed, {report['lost']} were lost: {report['problem']}")
        return report

    def close(self, count: int) -> dict[str, Any]:
        """Reset clients, the newest first."""
        return self.run_command(f"close {count}")

    def stop(self) -> None:
        """Kill the holder with its clients."""
        self.process.kill()
        self.process.wait()
        self._stdin.close()
        self._stdout.close()


@contextmanager
def client_holder(server: measure.Server, **options: Any) -> Iterator[ClientHolder]:
    """Start a holder for a server until the end of the ``with`` block."""
    path = server.client_path("ID").replace("ID", "{id}")
    hello = NATS_HELLO if server.name == "nats" else ""
    holder = ClientHolder(server.port, path, hello=hello, **options)
    try:
        yield holder
    finally:
        holder.stop()
