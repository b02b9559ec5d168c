"""Tests of gateway.demo; the integration tests run the whole demo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from threading import Thread
from typing import Any
from unittest import mock

from twisted.trial.unittest import SynchronousTestCase

from gateway import demo


class FreePortTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.listening.close)
        self.port: int = self.listening.getsockname()[1]

    def test_preferred_port(self) -> None:
        self.listening.close()
        self.assertEqual(demo.free_port(self.port), self.port)

    def test_other_port_if_preferred_is_taken(self) -> None:
        port = demo.free_port(self.port)
        self.assertNotIn(port, (0, self.port))
        with socket.create_server(("127.0.0.1", port)):
            pass


class ChoosePortTests(SynchronousTestCase):
    def choose(self, port: int) -> str:
        with mock.patch.object(demo, "free_port", return_value=port), mock.patch("sys.stdout", StringIO()) as out:
            self.assertEqual(demo.choose_port(8080), port)
        return str(out.getvalue())

    def test_preferred_port_is_not_reported(self) -> None:
        self.assertEqual(self.choose(8080), "")

    def test_other_port_is_reported(self) -> None:
        self.assertEqual(self.choose(4711), "port 8080 is in use: using port 4711 instead\n")


class NeverEndingProcess(subprocess.Popen):  # type: ignore[type-arg]
    """A process whose wait() always times out."""

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return super().wait()


class StopAllTests(SynchronousTestCase):
    def start(
        self, on_interrupt: str, kind: type[subprocess.Popen[bytes]] = subprocess.Popen
    ) -> subprocess.Popen[bytes]:
        program = (
            f"import signal; signal.signal(signal.SIGINT, signal.{on_interrupt}); print(flush=True); signal.pause()"
        )
        process = kind([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE)
        self.addCleanup(subprocess.Popen.wait, process)
        self.addCleanup(process.kill)
        assert process.stdout is not None
        with process.stdout:
            self.assertEqual(process.stdout.readline(), b"\n")
        return process

    def test_processes_are_interrupted(self) -> None:
        processes = [self.start("SIG_DFL"), self.start("SIG_DFL")]
        demo.stop_all(processes)
        self.assertEqual([process.returncode for process in processes], [-signal.SIGINT] * 2)

    def test_process_that_ignores_sigint_is_killed(self) -> None:
        process = self.start("SIG_IGN", NeverEndingProcess)
        demo.stop_all([process])
        self.assertEqual(process.returncode, -signal.SIGKILL)

    def test_exited_process_is_ignored(self) -> None:
        process = self.start("SIG_DFL")
        process.terminate()
        process.wait()
        demo.stop_all([process])
        self.assertEqual(process.returncode, -signal.SIGTERM)


class Handler(BaseHTTPRequestHandler):
    """Sends the server's response, and records the requests."""

    server: Any

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.asked.append((self.command, self.path, self.headers.get("Content-Type"), body.decode()))
        status, answer = self.server.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


class BackendTests(SynchronousTestCase):
    """Tests with a small HTTP server as the node."""

    def setUp(self) -> None:
        self.server: Any = HTTPServer(("127.0.0.1", 0), Handler)
        self.server.asked, self.server.answers = [], []
        serving = Thread(target=self.server.serve_forever, args=(0.005,))
        serving.start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(serving.join)
        self.addCleanup(self.server.shutdown)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # A proxy of the environment must not be used.
        environment = mock.patch.dict(os.environ, {"no_proxy": "*"})
        environment.start()
        self.addCleanup(environment.stop)

    def test_call(self) -> None:
        answer = '{"jsonrpc":"2.0","id":1,"result":"é"}'
        self.server.answers = [(200, answer.encode())]
        self.assertEqual(demo.call(self.url, "demo-1"), answer)
        self.assertEqual(self.server.asked, [("POST", "/v1/clients/demo-1/rpc", "application/json", demo.CALL_BODY)])

    def test_call_fails(self) -> None:
        self.server.answers = [(404, b'{"error":"no"}')]
        ended = self.assertRaises(SystemExit, demo.call, self.url, "demo-1")
        self.assertEqual(ended.code, 'call demo-1 echo failed: HTTP 404 {"error":"no"}')

    def node(self, returncode: int | None = None) -> Any:
        return mock.Mock(poll=mock.Mock(return_value=returncode), returncode=returncode)

    def test_await_ready_polls(self) -> None:
        self.server.answers = [(503, b""), (503, b""), (200, b"")]
        with mock.patch.object(demo, "time", mock.Mock(monotonic=lambda: 0.0)):
            demo.await_ready(self.node(), self.url)
        self.assertEqual([asked[1] for asked in self.server.asked], ["/readyz"] * 3)

    def test_node_exited(self) -> None:
        ended = self.assertRaises(SystemExit, demo.await_ready, self.node(3), self.url)
        self.assertEqual(ended.code, "the node exited with status 3")
        self.assertEqual(self.server.asked, [])

    def test_node_not_ready_in_time(self) -> None:
        self.server.answers = [(503, b"")]
        seconds = iter([0.0, demo.START_TIMEOUT - 1.0, float(demo.START_TIMEOUT)])
        with mock.patch.object(demo, "time", mock.Mock(monotonic=lambda: next(seconds))):
            ended = self.assertRaises(SystemExit, demo.await_ready, self.node(), self.url)
        self.assertEqual(ended.code, "the node was not ready within 30 s")


class SigtermTests(SynchronousTestCase):
    def test_sigterm_raises_keyboard_interrupt(self) -> None:
        self.assertRaises(KeyboardInterrupt, demo.on_sigterm, signal.SIGTERM, None)
