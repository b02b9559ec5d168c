"""The examples of clients in the documentation, without a gateway: they say that, and why, they cannot connect."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from threading import Timer

import pytest
from fleet import CHECKOUT, TIMEOUT, environment

from tests.builders.ports import free_port


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (
            "README.rst",
            "could not connect to ws://127.0.0.1:{port}/v1/connect?client_id=agent-7: ConnectionRefusedError",
        ),
        ("docs/agent.rst", "could not connect to ws://127.0.0.1:{port}/v1/connect?client_id=demo-1: ConnectionRefused"),
        ("docs/clients.rst", "connect failed; reconnecting in"),
    ],
)
def test_a_client_that_cannot_connect(page: str, said: str, tmp_path: Path) -> None:
    port = free_port()
    (example, *_) = re.findall(r"\n\n((?:    import .*\n)(?:    .*\n|\n)+)", (CHECKOUT / page).read_text())
    (tmp_path / "example.py").write_text(textwrap.dedent(example).replace("8080", str(port)))
    process = subprocess.Popen(
        [sys.executable, "-u", "example.py"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(CHECKOUT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = Timer(TIMEOUT, process.kill)
    deadline.start()
    try:
        assert any(said.format(port=port) in line for line in process.stderr)
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
        process.stderr.close()
