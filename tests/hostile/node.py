"""Monitor a real node: memory, open files, log, and the calls of a well-behaved client and backend.

With two cores, the node has one for itself. The well-behaved pair and the attackers share the other one; attackers have
a lower priority there, so the latency of the pair's calls is that of the node.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import select
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import jwt
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.builders.ports import free_port
from tests.hostile.attack import Target
from tests.integration.fleet import CHECKOUT, TIMEOUT, Node, environment

CORES = sorted(os.sched_getaffinity(0))
NODE_CORE, OTHER_CORE = CORES[0], CORES[min(1, len(CORES) - 1)]
#: calls per second of the well-behaved backend
CALL_RATE = 100.0
#: seconds between two samples of memory and files
SAMPLE_INTERVAL = 0.02
#: seconds for the node to close all files of an attack
RECOVERY_TIMEOUT = 15.0
MIB = 1 << 20
#: niceness of the node and the well-behaved pair, so that other work on this machine does not delay them
HIGH_PRIORITY = -10
#: tokens of the attackers' client and of the well-behaved client
TOKENS = {"evil-1": "evil-1-token-of-its-own", "well-behaved": "well-behaved-token"}
BACKEND_TOKEN = "backend-token-of-these-tests"
#: issuer and audience of the accepted JSON Web Tokens
ISSUER, AUDIENCE = "https://issuer.example", "gateway"
SECRET = "what only nodes of this fleet know\n"

_ENDED = '{"latencies": [], "failed": ["the well-behaved pair exited"]}'
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def quantile(latencies: list[float], part: float) -> float:
    """Return the quantile of latencies; ``part`` is from 0 to 1."""
    if len(latencies) < 2:
        return math.nan
    return statistics.quantiles(latencies, n=1000, method="inclusive")[round(part * 1000) - 1]


@attrs.frozen
class Report:
    """Observations of a node during a period. ``memory`` is the growth in bytes; times are in seconds."""

    latencies: list[float]
    failed: list[str]
    memory: int
    #: maximum growth of open files, and growth at the end
    files: int
    files_left: int
    #: lines logged during the period
    log: str
    healthy: bool
    #: shares of the period, from 0 to 1: time on the CPU, and time waiting for the CPU
    cpu: float
    held_up: float

    def quantile(self, part: float) -> float:
        """Return a quantile of the calls' latencies."""
        return quantile(self.latencies, part)

    def problems(self, memory: int) -> list[str]:
        """Describe what must not happen during any attack; ``memory`` is the allowed growth in MiB."""
        problems = [f"{len(self.failed)} calls failed, such as {self.failed[0]}"] if self.failed else []
        if not self.latencies:
            problems.append("no call was answered")
        if self.memory > memory * MIB:
            problems.append(f"memory grew by {self.memory / MIB:.0f} MiB; {memory} may be")
        if self.files_left > 0:
            problems.append(f"{self.files_left} files are left open")
        if "Traceback" in self.log:
            problems.append(f"a traceback in the log: {self.log[:800]!r}")
        if len(self.log.splitlines()) > 6:
            problems.append(f"{len(self.log.splitlines())} lines in the log: {self.log[:400]!r}")
        if _CONTROL_CHARACTERS.search(self.log):
            problems.append(f"control characters in the log: {self.log!a:.1000}")
        return problems if self.healthy else [*problems, "/healthz does not answer 200"]


def _raise_priority() -> None:
    os.sched_setaffinity(0, [OTHER_CORE])
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, HIGH_PRIORITY)


class MonitoredNode:
    """A node with a well-behaved client and backend, until :meth:`stop`."""

    def __init__(self, folder: Path, kind: str = "open", *options: str) -> None:
        """``kind``: an ``open`` node has no authentication; ``tokens`` and ``jwt`` require tokens of that kind."""
        given, tokens, key = KINDS[kind](folder)
        secret = folder / "secret"
        secret.touch(0o600)
        secret.write_text(SECRET)
        # Without the permission to raise the priority, nice starts the node anyway.
        pinned = ("taskset", "--cpu-list", str(NODE_CORE), "nice", "-n", str(HIGH_PRIORITY))
        tls_port = free_port()
        given = (*given, "--listen", _tls(folder, tls_port), "--cluster-secret-file", str(secret))
        self.node = Node(folder, *given, *options, before=pinned)
        self.node.headers = {"Authorization": f"Bearer {tokens[1]}"} if tokens[1] else {}
        self.node.await_ready()
        self.pid = self.node.process.pid
        ports = str(self.node.client_port), str(self.node.backend_port)
        self._pair = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.well_behaved", *ports, str(CALL_RATE), *tokens],
            cwd=CHECKOUT,
            env={**environment(), "PYTHONPATH": str(CHECKOUT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=_raise_priority,
        )
        self.target = Target(
            self.node.client_port,
            self.node.backend_port,
            tls_port,
            secret=SECRET.strip().encode(),
            node_id=self.node.node_id,
            token=TOKENS["evil-1"] if kind == "tokens" else "",
            backend_token=tokens[1],
            signing_key=key,
        )
        time.sleep(0.5)
        self.since()

    def since(self) -> dict[str, Any]:
        """Return the results of the well-behaved pair since the last call."""
        assert self._pair.stdin is not None
        assert self._pair.stdout is not None
        self._pair.stdin.write(b"\n")
        self._pair.stdin.flush()
        if not select.select([self._pair.stdout], [], [], 60)[0]:
            raise AssertionError("the well-behaved pair does not respond")
        results: dict[str, Any] = json.loads(self._pair.stdout.readline() or _ENDED)
        return results

    def files(self) -> int:
        """Return the number of open files of the node."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def cpu(self) -> tuple[float, float]:
        """Return the seconds of the node's main thread on the CPU, and waiting for it."""
        had, waited, _ = Path(f"/proc/{self.pid}/schedstat").read_text().split()
        return int(had) / 1e9, int(waited) / 1e9

    @contextlib.contextmanager
    def monitor(self) -> Iterator[list[Report]]:
        """Monitor the node; at the end the report is appended to the list."""
        self.since()
        log_offset = self.node.log.stat().st_size
        memory, files, cpu, began = self.node.memory(), self.files(), self.cpu(), time.monotonic()
        worst = [memory, files]
        over = threading.Event()

        def sample() -> None:
            while not over.wait(SAMPLE_INTERVAL):
                with contextlib.suppress(OSError):
                    worst[:] = max(worst[0], self.node.memory()), max(worst[1], self.files())

        watching = threading.Thread(target=sample)
        watching.start()
        reports: list[Report] = []
        try:
            yield reports
        finally:
            over.set()
            watching.join()
        lasted = time.monotonic() - began
        had, waited = (after - before for after, before in zip(self.cpu(), cpu, strict=True))
        latencies, failed = self._read_report()
        left = self._wait_for_recovery(files)
        log = self.node.log.read_bytes()[log_offset:].decode("utf-8", "replace")
        grown = worst[0] - memory, worst[1] - files
        healthy = self.node._request("GET", "/healthz").status == 200
        reports.append(Report(latencies, failed, *grown, left, log, healthy, had / lasted, waited / lasted))

    def _read_report(self) -> tuple[list[float], list[str]]:
        """Return the latencies of answered calls, and the failures; of all calls in flight and at least a few more."""
        latencies: list[float] = []
        failed: list[str] = []
        ends = time.monotonic() + TIMEOUT
        for number in itertools.count():
            results = self.since()
            latencies += results["latencies"]
            failed += results["failed"]
            if (number and latencies) or failed or time.monotonic() > ends:
                return latencies, failed
            time.sleep(0.03)
        raise AssertionError

    def _wait_for_recovery(self, files: int) -> int:
        ends = time.monotonic() + RECOVERY_TIMEOUT
        while (left := self.files() - files) > 0 and time.monotonic() < ends:
            time.sleep(0.02)
        return left

    def stop(self) -> None:
        """Kill the node and the well-behaved pair."""
        self._pair.kill()
        self._pair.communicate()
        if self.node.process.poll() is None:
            self.node.kill()
        self.node.process.communicate()


def _tls(folder: Path, port: int) -> str:
    certificate = trustme.CA().issue_cert("localhost")
    key, chain = folder / "key.pem", folder / "chain.pem"
    certificate.private_key_pem.write_to_path(key)
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(chain, append=True)
    return f"ssl:{port}:privateKey={key}:certKey={chain}:interface=127.0.0.1:backlog=4096"


#: options of a kind of node, tokens of the well-behaved client and backend, and the key that signs tokens
Given = tuple[tuple[str, ...], list[str], str]


def _open(folder: Path) -> Given:
    return ("--auth", "none"), ["", ""], ""


def _with_tokens(folder: Path) -> Given:
    tokens = folder / "tokens"
    lines = (f"{name} {hashlib.sha256(token.encode()).hexdigest()}\n" for name, token in TOKENS.items())
    tokens.write_text("".join(lines))
    return ("--auth", f"tokens:{tokens}", *_backends(folder)), [TOKENS["well-behaved"], BACKEND_TOKEN], ""


def _with_jwt(folder: Path) -> Given:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path = folder / "public.pem"
    path.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    claims = {"sub": "well-behaved", "aud": AUDIENCE, "iss": ISSUER, "exp": int(time.time()) + 3600}
    token = jwt.encode(claims, private, "RS256")
    spec = f"jwt:key-file={path}:algorithms=RS256:audience={AUDIENCE}:issuer={ISSUER}"
    key = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return ("--auth", spec, *_backends(folder)), [token, BACKEND_TOKEN], key


def _backends(folder: Path) -> tuple[str, str]:
    path = folder / "backends"
    path.write_text(f"{BACKEND_TOKEN}\n")
    return "--backend-token-file", str(path)


KINDS: dict[str, Callable[[Path], Given]] = {"open": _open, "tokens": _with_tokens, "jwt": _with_jwt}
