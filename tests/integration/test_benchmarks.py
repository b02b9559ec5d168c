"""The benchmarks run, small, with the node alone: what they print, not how fast anything is."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fleet import CHECKOUT, asynchronous


async def results(folder: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """The text that a benchmark prints, and its JSON lines."""
    lines = folder / "lines"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *arguments, "--json", str(lines)),
        cwd=CHECKOUT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    text = output.decode()
    assert process.returncode == 0, text
    return text, [json.loads(line) for line in lines.read_text().splitlines()]


@pytest.mark.parametrize("name", ["calls", "notifications"])
@asynchronous
async def test_messages(tmp_path: Path, name: str) -> None:
    alone = ("--peers", "none", "--runs", "1", "--seconds", "0.2", "--clients", "20")
    text, lines = await results(tmp_path, f"benchmarks.{name}", *alone)
    assert "wsgateway" in text
    assert lines


@asynchronous
async def test_openings(tmp_path: Path) -> None:
    text, lines = await results(tmp_path, "benchmarks.openings", "--peers", "none", "--runs", "1", "--clients", "100")
    assert "wsgateway" in text
    assert lines


@asynchronous
async def test_million_clients_benchmark_on_a_small_scale(tmp_path: Path) -> None:
    text, lines = await results(tmp_path, "benchmarks.million", "60", "--per-node", "30", "--seconds", "0.5")
    assert "60, of them 60 parked" in text
    assert "0 failed" in text
    assert lines


@asynchronous
async def test_answer_limit(tmp_path: Path) -> None:
    text, lines = await results(tmp_path, "benchmarks.answer_limit", "--runs", "1", "--seconds", "0.2")
    assert "--messages-per-client 200" in text
    # The responses are not slowed to the limit.
    assert lines[0]["at the default"] > 400
