"""A TCP proxy that makes what is behind it slow, or silent: a way through a network that can be cut.

In a process of its own, so that nothing else makes it slow, it is told what to do by lines on its standard input:

    python -m tests.chaos.proxy 3306 127.0.0.1
    <- 40123                  the port that it listens on
    -> delay 0.1 | cut | mend
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys

_READ_SIZE = 65536
#: so many pieces are on their way in one direction before the sender has to wait
_MAX_CHUNKS_IN_TRANSIT = 256

_Chunks = asyncio.Queue[tuple[float, bytes]]


class DelayProxy:
    """Passes bytes on to a port of this machine.

    ``delay``: the seconds that each byte takes, either way. While it is cut nothing passes, and nobody is told; what
    was said meanwhile arrives when it is mended, as it would after some retransmissions.
    """

    def __init__(self, port: int, *, delay: float = 0.0) -> None:
        self.target = port
        self.delay = delay
        self.port = 0
        self._connected = asyncio.Event()
        self._connected.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> DelayProxy:
        """Listen; ``port`` says where."""
        self._server = await asyncio.start_server(self._accepted, host, port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        """End, with all connections."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Let nothing pass."""
        self._connected.clear()

    def restore(self) -> None:
        """Let everything pass again."""
        self._connected.set()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._relay(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._connected.wait()
        behind, to_behind = await asyncio.open_connection("127.0.0.1", self.target)
        there: _Chunks = asyncio.Queue(_MAX_CHUNKS_IN_TRANSIT)
        back: _Chunks = asyncio.Queue(_MAX_CHUNKS_IN_TRANSIT)
        ways = [
            asyncio.ensure_future(way)
            for way in (
                self._read_chunks(reader, there),
                self._write_chunks(there, to_behind),
                self._read_chunks(behind, back),
                self._write_chunks(back, writer),
            )
        ]
        try:
            # One end is the end of both.
            await asyncio.wait([ways[1], ways[3]], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            to_behind.transport.abort()

    async def _read_chunks(self, reader: asyncio.StreamReader, pieces: _Chunks) -> None:
        loop = asyncio.get_running_loop()
        data = b"begin"
        while data:
            try:
                data = await reader.read(_READ_SIZE)
            except OSError:
                data = b""
            await pieces.put((loop.time() + self.delay, data))

    async def _write_chunks(self, pieces: _Chunks, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while True:
                due, data = await pieces.get()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await self._connected.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()


class ProxyProcess:
    """A proxy in a process of its own, on an address of this machine."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.proxy", str(port), host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def send_command(self, line: str) -> None:
        """``cut``, ``mend``, or ``delay`` and the seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


async def _run_commands(port: int, host: str) -> None:
    proxy = await DelayProxy(port).start(host)
    sys.stdout.write(f"{proxy.port}\n")
    sys.stdout.flush()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while words := (await lines.readline()).decode().split():
        if words[0] == "delay":
            proxy.delay = float(words[1])
        else:
            {"cut": proxy.cut, "mend": proxy.restore}[words[0]]()


if __name__ == "__main__":
    asyncio.run(_run_commands(int(sys.argv[1]), sys.argv[2]))
