"""A TCP proxy that delays data or stops passing it, to simulate a slow or partitioned network.

It runs in a separate process, so that nothing else slows it down. Commands are lines on its standard input:

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
#: chunks in transit in one direction; then reading pauses
_MAX_CHUNKS_IN_TRANSIT = 256

_Chunks = asyncio.Queue[tuple[float, bytes]]


class DelayProxy:
    """Forward connections to a port of this machine.

    ``delay``: seconds of delay in each direction. While it is cut, nothing passes and connections stay open; the data
    arrives after it is restored, as after retransmissions.
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
        """Listen; the port is in ``port``."""
        self._server = await asyncio.start_server(self._accepted, host, port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        """Close the listener and all connections."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Stop passing data."""
        self._connected.clear()

    def restore(self) -> None:
        """Pass data again."""
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
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target)
        to_target: _Chunks = asyncio.Queue(_MAX_CHUNKS_IN_TRANSIT)
        to_client: _Chunks = asyncio.Queue(_MAX_CHUNKS_IN_TRANSIT)
        tasks = [
            asyncio.ensure_future(coroutine)
            for coroutine in (
                self._read_chunks(reader, to_target),
                self._write_chunks(to_target, target_writer),
                self._read_chunks(target_reader, to_client),
                self._write_chunks(to_client, writer),
            )
        ]
        try:
            # The end of one direction ends both.
            await asyncio.wait([tasks[1], tasks[3]], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            target_writer.transport.abort()

    async def _read_chunks(self, reader: asyncio.StreamReader, chunks: _Chunks) -> None:
        loop = asyncio.get_running_loop()
        data = b"begin"
        while data:
            try:
                data = await reader.read(_READ_SIZE)
            except OSError:
                data = b""
            await chunks.put((loop.time() + self.delay, data))

    async def _write_chunks(self, chunks: _Chunks, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while True:
                due, data = await chunks.get()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await self._connected.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()


class ProxyProcess:
    """A proxy in a separate process, on an address of this machine."""

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
        """Send ``cut``, ``mend``, or ``delay SECONDS``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")

    def close(self) -> None:
        """Kill the process."""
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
