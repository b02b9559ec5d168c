"""Fake of EC2 Auto Scaling for lifecycle actions, which moto lacks: real HTTP on the loopback interface.

    aws = FakeAutoscaling()              # runs in threads of this process; AWS_ENDPOINT_URL=aws.url
    aws.waiting = True                   # a lifecycle action is active: heartbeats and completion are accepted
    aws.requests                         # [("DescribeLifecycleHooks", {"AutoScalingGroupName": "gw"}), …]
    aws.close()

It speaks the query protocol: a form with an Action, and a response in XML. PutMetricData of CloudWatch is accepted
without parsing, as a form or as JSON.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

from tests.builders.ports import free_port
from tests.fakes.imds import QuietHTTPServer

_NAMESPACE = "http://autoscaling.amazonaws.com/doc/2011-01-01/"
_COMMON = {"Action", "Version"}


class FakeAutoscaling:
    """One region with one group, which has one hook; ``heartbeat`` is its timeout in seconds."""

    def __init__(self, group: str = "gw", hook: str = "empty-it", heartbeat: int = 60) -> None:
        self.group, self.hook, self.heartbeat = group, hook, heartbeat
        #: whether a lifecycle action is active, until its completion
        self.waiting = False
        #: (operation, parameters) of each request
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._http = QuietHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"service": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def operations(self) -> list[str]:
        """Return the requested operations of Auto Scaling, in order."""
        return [operation for operation, _ in self.requests if operation != "PutMetricData"]

    def respond(self, form: dict[str, str]) -> tuple[int, str]:
        """Return status and body."""
        operation = form.get("Action", "")
        self.requests.append((operation, {name: value for name, value in form.items() if name not in _COMMON}))
        if operation == "PutMetricData":
            return _result(operation, "")
        if form.get("AutoScalingGroupName") != self.group:
            return _error("ValidationError", "AutoScalingGroup name not found")
        if operation == "DescribeLifecycleHooks":
            return _result(operation, f"<LifecycleHooks><member>{self._describe_hook()}</member></LifecycleHooks>")
        if operation not in ("RecordLifecycleActionHeartbeat", "CompleteLifecycleAction"):
            return _error("InvalidAction", f"there is no {escape(operation)} here")
        if not self.waiting or form.get("LifecycleHookName") != self.hook:
            instance = escape(form.get("InstanceId", ""))
            return _error("ValidationError", f"No active Lifecycle Action found with instance ID {instance}")
        if operation == "CompleteLifecycleAction":
            self.waiting = False
        return _result(operation, "")

    def _describe_hook(self) -> str:
        hook = {
            "LifecycleHookName": self.hook,
            "AutoScalingGroupName": self.group,
            "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
            "HeartbeatTimeout": self.heartbeat,
            "GlobalTimeout": 100 * self.heartbeat,
            "DefaultResult": "CONTINUE",
        }
        return "".join(f"<{name}>{value}</{name}>" for name, value in hook.items())

    def close(self) -> None:
        """Stop the server."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _result(operation: str, content: str) -> tuple[int, str]:
    result = f"<{operation}Result>{content}</{operation}Result>"
    return 200, f'<{operation}Response xmlns="{_NAMESPACE}">{result}</{operation}Response>'


def _error(code: str, message: str) -> tuple[int, str]:
    error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
    return 400, f'<ErrorResponse xmlns="{_NAMESPACE}">{error}<RequestId>1</RequestId></ErrorResponse>'


class _Handler(BaseHTTPRequestHandler):
    service: FakeAutoscaling

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("X-Amz-Target", "").endswith(".PutMetricData"):
            self.service.requests.append(("PutMetricData", {}))
            return self._send(200, "application/x-amz-json-1.0", b"{}")
        status, text = self.service.respond(dict(parse_qsl(body.decode())))
        self._send(status, "text/xml", text.encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
