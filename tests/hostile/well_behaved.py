"""A well-behaved client and backend in a separate process, to measure success and latency of their calls.

    python -m tests.hostile.well_behaved CLIENT_PORT BACKEND_PORT RATE [CLIENT_TOKEN BACKEND_TOKEN]

Calls are made at a fixed rate, whether or not earlier ones were answered; the client returns the random text of each.
For each line on standard input, one line of JSON is written: the results since the last line.

    {"latencies": [seconds, ...], "failed": ["..."], "waiting": 0}
"""

from __future__ import annotations

import json
import os
import selectors
import sys
import time

from tests.hostile.raw_connection import PING, PONG, TEXT, RawConnection, frame, opening

CLIENT_ID = "well-behaved"
#: the source address, which no attacker uses
SOURCE_ADDRESS = "127.0.0.2"
#: seconds of delay that the backend makes up for
MAX_IDLE = 0.5
#: seconds
CALL_TIMEOUT = 20.0


class WellBehavedPair:
    def __init__(self, client_port: int, backend_port: int, rate: float, tokens: list[str]) -> None:
        lines = [[f"Authorization: Bearer {token}"] if token else [] for token in tokens] or [[], []]
        self._client = RawConnection(("127.0.0.1", client_port), source_address=SOURCE_ADDRESS)
        self._client.send(opening(CLIENT_ID, *lines[0]))
        self._backend = RawConnection(("127.0.0.1", backend_port), source_address=SOURCE_ADDRESS)
        self._backend.send(opening("", *lines[1], target="/v1/backend"))
        for connection in (self._client, self._backend):
            answer = connection.response()
            if answer != "101":
                raise SystemExit(f"the response to the well-behaved pair is {answer}")
        self._interval = 1 / rate
        self._number = 0
        self._pending: dict[int, tuple[float, str]] = {}
        self._latencies: list[float] = []
        self._failed: list[str] = []

    def run(self) -> None:
        """Run until the end of standard input."""
        selector = selectors.DefaultSelector()
        for file, what in ((self._client.socket, self._answer), (self._backend.socket, self._match)):
            selector.register(file, selectors.EVENT_READ, what)
        selector.register(sys.stdin, selectors.EVENT_READ, None)
        due = time.perf_counter()
        while True:
            wait = due - time.perf_counter()
            if wait <= 0:
                self._call()
                due = max(due + self._interval, time.perf_counter() - MAX_IDLE)
                continue
            for key, _ in selector.select(wait):
                if key.data is not None:
                    if not key.data():
                        selector.unregister(key.fileobj)
                        self._failed.append("a connection of the well-behaved pair was lost")
                elif not sys.stdin.readline():
                    return
                else:
                    self._report()

    def _call(self) -> None:
        self._number += 1
        text = os.urandom(16).hex()
        params = {"client": CLIENT_ID, "method": "echo", "params": [text], "timeout": CALL_TIMEOUT}
        message = {"jsonrpc": "2.0", "id": self._number, "method": "client.call", "params": params}
        self._pending[self._number] = (time.perf_counter(), text)
        self._backend.send(frame(json.dumps(message)))

    def _answer(self) -> bool:
        for opcode, payload in received(self._client):
            if opcode == PING:
                self._client.send(frame(payload, PONG))
            elif opcode == TEXT:
                request = json.loads(payload)
                response = {"jsonrpc": "2.0", "id": request["id"], "result": request["params"]}
                self._client.send(frame(json.dumps(response)))
            else:
                return False
        return self._client.alive

    def _match(self) -> bool:
        for opcode, payload in received(self._backend):
            if opcode == PING:
                self._backend.send(frame(payload, PONG))
                continue
            if opcode != TEXT:
                return False
            now = time.perf_counter()
            answer = json.loads(payload)
            began, text = self._pending.pop(answer["id"])
            if answer.get("result") == [text]:
                self._latencies.append(now - began)
            else:
                self._failed.append(json.dumps(answer))
        return self._backend.alive

    def _report(self) -> None:
        now = time.perf_counter()
        late = [number for number, (began, _) in self._pending.items() if now - began > CALL_TIMEOUT]
        failed = [*self._failed, *(f"call {number} had no answer" for number in late)]
        results = {"latencies": self._latencies, "failed": failed, "waiting": len(self._pending)}
        self._latencies, self._failed = [], []
        sys.stdout.write(json.dumps(results) + "\n")
        sys.stdout.flush()


def received(connection: RawConnection) -> list[tuple[int, bytes]]:
    """Read once; return the complete frames."""
    connection.read()
    return list(connection.whole_frames())


if __name__ == "__main__":
    WellBehavedPair(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]).run()
