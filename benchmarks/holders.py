"""Holders of clients (``benchmarks/holder.py``) in processes of their own, each for one server."""

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
#: client_ids: the shorter kind that people give, and the kind that programs give
SHORT_CLIENT_ID, LONG_CLIENT_ID = "agent-{:06d}", "5f0c3a6e-8d1b-4c57-9b1e-{:012d}"
#: Connections come from several addresses: one has 28,000 ports for a server, and the kernel looks for a free one for
#: long when half of them are taken.
SOURCE, SOURCES = "127.0.1.1", 4
#: what makes a connection an agent of nats-server
NATS_HELLO = (
    'CONNECT {"verbose":false,"pedantic":false,"lang":"bench","version":"1","protocol":1}\r\nSUB agent.{id} 1\r\n'
)


class HolderError(Exception):
    """Clients could not be opened. Its text says why, in one line."""


class ClientHolder:
    """One holder. :meth:`open` and :meth:`close` wait for what they ask; :meth:`tell` and :meth:`told` do not."""

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
        """``path`` is the target of the opening handshakes, with ``{id}``; ``core`` is where it runs, or ``None``."""
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
            # -S and -I: nothing is imported that it does not need.
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
        self._said = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def fileno(self) -> int:
        """Readable when there is an answer."""
        return self._stdout.fileno()

    def send_command(self, command: str) -> None:
        """Give it a line."""
        try:
            self._stdin.write(f"{command}\n".encode())
        except BrokenPipeError:
            raise HolderError(f"the holder ended with {self.process.wait()}") from None

    def read_reports(self) -> list[dict[str, Any]]:
        """The answers that have come; waits for some bytes.

        :raises HolderError: it has ended.
        """
        data = self._stdout.read(65536)
        if not data:
            raise HolderError(f"the holder ended with {self.process.wait()}")
        *lines, self._said = (self._said + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def run_command(self, command: str, timeout: float = 120.0) -> dict[str, Any]:
        """Give it a line and wait for the answer.

        :raises HolderError: it has ended, or there is no answer in so many seconds.
        """
        self.send_command(command)
        end = time.monotonic() + timeout
        while True:
            ready, _, _ = select.select([self], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise HolderError(f"{command!r} is not done after {timeout:g} s")
            answers = self.read_reports()
            if answers:
                return answers[-1]

    def open(self, count: int) -> dict[str, Any]:
        """Open so many more clients.

        :raises HolderError: not all of them could be opened, or some were lost.
        """
        answer = self.run_command(f"open {count}")
        if answer["failed"] or answer["lost"]:
            raise HolderError(f"{answer['failed']} clients failed, {answer['lost']} were lost: {answer['problem']}")
        return answer

    def close(self, count: int) -> dict[str, Any]:
        """Reset so many."""
        return self.run_command(f"close {count}")

    def stop(self) -> None:
        """End it, and its clients with it."""
        self.process.kill()
        self.process.wait()
        self._stdin.close()
        self._stdout.close()


@contextmanager
def client_holder(server: measure.Server, **options: Any) -> Iterator[ClientHolder]:
    """A holder for a server, until the end of the ``with``."""
    path = server.client_path("ID").replace("ID", "{id}")
    hello = NATS_HELLO if server.name == "nats" else ""
    holder = ClientHolder(server.port, path, hello=hello, **options)
    try:
        yield holder
    finally:
        holder.stop()
