"""Fake of the EC2 instance metadata service, version 2: real HTTP on a free port of the loopback interface.

imds = FakeIMDS()                             # runs in threads of this process
imds.items["instance-id"] = "i-0123456789abcdef0"
imds.failure_mode = "hang"                    # or "error": 500 to all requests; "" is normal operation
imds.expire_tokens()
imds.close()

-> PUT /latest/api/token with a TTL           <- 200 the token · 400 without a valid TTL
-> GET /latest/meta-data/ITEM with the token  <- 200 the item · 401 without a valid token · 404 no such item
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.builders.ports import free_port

TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "X-aws-ec2-metadata-token"
TARGET_STATE_PATH = "autoscaling/target-lifecycle-state"
_METADATA_PATH = "/latest/meta-data/"


class QuietHTTPServer(ThreadingHTTPServer):
    """Does not log clients that disconnect early."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FakeIMDS:
    """The service of one instance. Tokens expire by ``clock``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.items = {
            "instance-id": "i-0123456789abcdef0",
            "placement/region": "eu-central-1",
            "local-ipv4": "10.0.0.7",
            "public-ipv4": "203.0.113.7",
        }
        #: path -> (status, body) that is sent instead
        self.overrides: dict[str, tuple[int, bytes]] = {}
        self.failure_mode = ""
        #: (method, path) of each request
        self.requests: list[tuple[str, str]] = []
        self._clock = clock
        self._tokens: dict[str, float] = {}
        self._closed = threading.Event()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._http = QuietHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"service": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def state(self) -> str | None:
        """The target lifecycle state of the instance."""
        return self.items.get(TARGET_STATE_PATH)

    @state.setter
    def state(self, state: str) -> None:
        self.items[TARGET_STATE_PATH] = state

    def expire_tokens(self) -> None:
        """Expire all tokens."""
        self._tokens.clear()

    def respond(self, method: str, path: str, headers: Any) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        self.requests.append((method, path))
        if self.failure_mode == "hang":
            self._closed.wait()
        if self.failure_mode == "error":
            return 500, {}, b"error"
        if path in self.overrides:
            status, body = self.overrides[path]
            return status, {}, body
        if path == "/latest/api/token":
            return self._token(method, headers.get(TTL_HEADER, ""))
        if self._tokens.get(headers.get(TOKEN_HEADER, ""), 0.0) <= self._clock():
            return 401, {}, b"no valid token"
        item = self.items.get(path.removeprefix(_METADATA_PATH)) if path.startswith(_METADATA_PATH) else None
        return (404, {}, b"<html>not found</html>") if item is None else (200, {}, item.encode())

    def _token(self, method: str, ttl: str) -> tuple[int, dict[str, str], bytes]:
        if method != "PUT":
            return 405, {}, b"PUT it"
        if not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
            return 400, {}, b"a TTL from 1 to 21600"
        token = uuid.uuid4().hex
        self._tokens[token] = self._clock() + int(ttl)
        return 200, {TTL_HEADER: ttl}, token.encode()

    def close(self) -> None:
        """Stop the server; drop hanging requests."""
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    service: FakeIMDS

    def do_GET(self) -> None:
        status, headers, body = self.service.respond(self.command, self.path, self.headers)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass
