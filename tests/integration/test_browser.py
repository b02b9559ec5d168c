"""Clients in a real browser: Chromium runs a page that opens WebSockets, and posts what it saw."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest
from fleet import TIMEOUT, Node, asynchronous

#: the first that is installed is used
PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
#: of the kinds that browsers take as a subprotocol, and do not take
PLAIN, BASE64 = "letmein-0123456789", "bGV0/bWVpbg+0123=="

#: opens one WebSocket after the other, and posts for each its subprotocol, or the name of what went wrong
PAGE = """<!doctype html><script>
const open = ([url, offered]) => new Promise((resolve) => {
    let socket;
    try { socket = new WebSocket(url, offered); } catch (error) { return resolve(error.name); }
    socket.onopen = () => { resolve("open: " + socket.protocol); socket.close(1000); };
    socket.onclose = (event) => resolve("closed: " + event.code);
});
(async () => {
    const seen = [];
    for (const attempt of ATTEMPTS) seen.push(await open(attempt));
    await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
})();
</script>"""


class Browser:
    """Chromium, and the server of the pages that it runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: Queue[list[str]] = Queue()
        self._page = b""
        browser = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._respond(browser._page if self.path == "/" else b"")

            def do_POST(self) -> None:
                browser._seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._respond(b"")

            def _respond(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    async def open(self, *attempts: tuple[str, list[str]]) -> list[str]:
        """Open WebSockets at urls with subprotocols from a page at ``origin``; return what the page saw of each."""
        self._page = PAGE.replace("ATTEMPTS", json.dumps(attempts)).encode()
        program = next(filter(None, map(shutil.which, PROGRAMS)), PROGRAMS[0])
        command = [
            *(program, "--headless"),
            # Tests may run as root, where the sandbox does not start; the page is the test's own.
            *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={self._folder / 'chromium'}", "--remote-debugging-port=0", self.origin),
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return await asyncio.to_thread(self._seen.get, timeout=3 * TIMEOUT)
        finally:
            # With all of its child processes.
            os.killpg(process.pid, signal.SIGKILL)
            await asyncio.to_thread(process.wait)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path)
    yield browser
    browser.close()


def bearer64(token: str) -> str:
    return "wsgateway.bearer64." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


@asynchronous
async def test_tokens_in_subprotocols(start: Callable[..., Node], browser: Browser, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    lines = [f"{name} {hashlib.sha256(token.encode()).hexdigest()}\n" for name, token in (("a", PLAIN), ("b", BASE64))]
    tokens.write_text("".join(lines))
    node = start("--auth", f"tokens:{tokens}", "--origin", browser.origin)
    ours = "wsgateway.jsonrpc.v1"
    seen = await browser.open(
        (f"{node.url}?client_id=a", [ours, f"wsgateway.bearer.{PLAIN}"]),
        (f"{node.url}?client_id=b", [ours, f"wsgateway.bearer.{BASE64}"]),
        (f"{node.url}?client_id=a", [ours, bearer64(PLAIN)]),
        (f"{node.url}?client_id=b", [ours, bearer64(BASE64)]),
        (f"{node.url}?client_id=b", [ours, bearer64(PLAIN)]),
        (f"{node.url}?client_id=b", [ours, bearer64("wrong")]),
    )
    assert seen == [f"open: {ours}", "SyntaxError", f"open: {ours}", f"open: {ours}", "closed: 1006", "closed: 1006"]
    assert await node.metric('wsgateway_refused_total{reason="identity"}') == 1
    assert await node.metric('wsgateway_refused_total{reason="token"}') == 1
    log = node.log.read_text()
    assert not [text for text in (PLAIN, BASE64, "bearer") if text in log]


@asynchronous
async def test_pages_of_other_origins(node: Node, browser: Browser) -> None:
    """The node's own origin is no page's but one that its own address serves."""
    assert await browser.open((f"{node.url}?client_id=a", [])) == ["closed: 1006"]
    assert await node.metric('wsgateway_refused_total{reason="origin"}') == 1
