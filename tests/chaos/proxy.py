"""A TCP proxy that makes what is behind it slow, or silent: a way through a network that can be cut."""

from __future__ import annotations

import asyncio
import contextlib

_AT_ONCE = 65536
#: so many pieces are on their way in one direction before the sender has to wait
_ON_THE_WAY = 256

_Pieces = asyncio.Queue[tuple[float, bytes]]


class Proxy:
    """Passes bytes on to a port of this machine.

    ``delay``: the seconds that each byte takes, either way. While it is cut nothing passes, and nobody is told; what
    was said meanwhile arrives when it is mended, as it would after some retransmissions.
    """

    def __init__(self, port: int, *, delay: float = 0.0) -> None:
        self.target = port
        self.delay = delay
        self.port = 0
        self._whole = asyncio.Event()
        self._whole.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> Proxy:
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
        self._whole.clear()

    def mend(self) -> None:
        """Let everything pass again."""
        self._whole.set()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._pass(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        behind, to_behind = await asyncio.open_connection("127.0.0.1", self.target)
        there: _Pieces = asyncio.Queue(_ON_THE_WAY)
        back: _Pieces = asyncio.Queue(_ON_THE_WAY)
        ways = [
            asyncio.ensure_future(way)
            for way in (
                self._take(reader, there),
                self._give(there, to_behind),
                self._take(behind, back),
                self._give(back, writer),
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

    async def _take(self, reader: asyncio.StreamReader, pieces: _Pieces) -> None:
        loop = asyncio.get_running_loop()
        data = b"begin"
        while data:
            try:
                data = await reader.read(_AT_ONCE)
            except OSError:
                data = b""
            await pieces.put((loop.time() + self.delay, data))

    async def _give(self, pieces: _Pieces, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while True:
                due, data = await pieces.get()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await self._whole.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()
