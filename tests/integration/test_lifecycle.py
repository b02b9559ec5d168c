"""How a node starts, fails to start, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import websockets
from fleet import CHECKOUT, TWISTD, Node, asynchronous, closed, eventually, serving_client

from gateway import __version__


@asynchronous
async def test_sigterm_moves_the_clients_and_exits_with_0(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", "--drain-seconds", "1")
    clients = [await node.connect(f"c-{i}") for i in range(5)]
    calling = asyncio.ensure_future(node.call("c-0", "echo"))
    request = json.loads(await clients[0].recv())
    node.kill(signal.SIGTERM)
    for client in reversed(clients):
        goaway = json.loads(await client.recv())
        assert goaway["method"] == "gateway.goaway"
        assert goaway["params"]["reason"] == "drain"
        assert goaway["params"]["after"] >= 0
        assert "client_id=c-" in goaway["params"]["url"]
        assert "wsgateway_hop=1" in goaway["params"]["url"]
        if client is clients[0]:
            # A call in flight ends first.
            assert (await node.request("GET", "/readyz")).status == 503
            with pytest.raises(websockets.InvalidStatus) as refusal:
                await node.connect("too-late")
            assert refusal.value.response.status_code == 503
            assert int(refusal.value.response.headers["Retry-After"]) > 0
            await client.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "answered"}))
            assert (await calling).json["result"] == "answered"
        assert await closed(client) == 1012
    assert await node.ended() == 0
    assert node.rows("clients") == []
    assert node.rows("nodes") == []


@asynchronous
async def test_sigterm_without_clients_ends_at_once(node: Node) -> None:
    node.kill(signal.SIGTERM)
    assert await node.ended() == 0
    assert node.rows("nodes") == []


@asynchronous
async def test_a_second_sigterm_ends_at_once(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", "--drain-seconds", "300")
    clients = [await node.connect(f"c-{i}") for i in range(3)]
    node.kill(signal.SIGTERM)
    await asyncio.wait([asyncio.ensure_future(client.recv()) for client in clients], return_when="FIRST_COMPLETED")
    node.kill(signal.SIGTERM)
    assert await node.ended() == 1


@asynchronous
async def test_sigint_closes_all_clients_with_1001(node: Node) -> None:
    async with node.connect("c") as client, node.backend() as backend:
        node.kill(signal.SIGINT)
        assert await closed(client) == 1001
        assert await closed(backend.socket) == 1001
        assert await node.ended() == 0
    assert node.rows("clients") == []


@asynchronous
async def test_drain_by_the_api(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", "--drain-seconds", "1")
    async with node.connect("c") as client:
        node_id = (await node.request("GET", "/v1/nodes")).json["nodes"][0]["node_id"]
        assert (await node.request("POST", f"/v1/nodes/{node_id}/drain", b"")).status == 202
        assert json.loads(await client.recv())["method"] == "gateway.goaway"
        assert await closed(client) == 1012
    assert await node.ended() == 0


@asynchronous
async def test_rows_of_a_killed_node_are_ignored(start: Callable[..., Node]) -> None:
    options = ("--auth", "none", "--lease", "1", "--heartbeat", "0.3")
    first = start(*options)
    clients = [await first.connect(f"c-{i}") for i in range(3)]
    old = {row[0]: row[2] for row in first.rows("clients")}
    first.kill(signal.SIGKILL)
    await first.ended()
    second = start(*options)
    async with serving_client(second, "c-0"):
        assert (await second.request("GET", "/v1/clients/c-0")).json["generation"] > old["c-0"]
        while len(second.rows("clients")) > 1 or len(second.rows("nodes")) > 1:
            await second.request("GET", "/healthz")
        assert (await second.call("c-0", "echo", [1])).json["result"] == [1]
        assert (await second.call("c-1", "echo", [1])).json["error"]["code"] == -32001
    for client in clients:
        await client.close()


@asynchronous
async def test_audit_finds_what_a_restored_database_has_wrong(start: Callable[..., Node]) -> None:
    """On a single node, too."""
    node = start("--auth", "none")
    async with serving_client(node, "here"):
        ((_, number, generation, *_),) = node.rows("clients")
        with contextlib.closing(sqlite3.connect(node.database, isolation_level=None)) as database:
            database.execute("UPDATE clients SET client_id = 'gone'")

        async def repaired() -> bool:
            return [row[:3] for row in node.rows("clients")] == [("here", number, generation)]

        await eventually(repaired, "the row of the client that is gone is replaced", 5)
        assert await node.metric("wsgateway_orphaned_rows_total") == 1


@asynchronous
async def test_locked_registry_does_not_affect_connected_clients(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", "--lease", "2", "--heartbeat", "0.5")
    async with serving_client(node, "here"):
        other = sqlite3.connect(node.database, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(websockets.InvalidStatus) as refusal:
            await node.connect("newcomer")
        assert refusal.value.response.status_code == 503
        assert (await node.call("here", "echo", [1])).json["result"] == [1]
        absent = await node.call("absent", "echo")
        assert (absent.status, absent.json["error"]["code"]) == (503, -32007)
        while (await node.request("GET", "/readyz")).status != 503:
            pass
        other.execute("ROLLBACK")
        other.close()
        while (await node.request("GET", "/readyz")).status != 200:
            pass
        async with serving_client(node, "newcomer"):
            assert (await node.call("newcomer", "echo", [2])).json["result"] == [2]
        assert (await node.call("here", "echo", [3])).json["result"] == [3]


def ended(node: Node) -> str:
    """Wait for a node that will not start; what it said on stderr, which must be one line."""
    assert node.process.wait(30) != 0
    said = node.process.stderr.read().decode()
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lisen", "tcp:1"], "--lisen"),
        (["stray"], "stray"),
        (["--lease", "soon"], "--lease"),
        (["--auth", "tokens:/no/such/file"], "--auth"),
        (["--auth", "jwt:key-file=x"], "--auth"),
        (["--backend-token-file", "/no/such/file"], "--backend-token-file"),
        (["--registry", "sqlite:/no/such/folder/r.sqlite"], "--registry"),
        (["--registry", "sqlite:/proc"], "--registry"),
        (["--registry", "postgres://x"], "--registry"),
        (["--listen", "tcp:nonsense"], "--listen"),
        (["--listen", "carrier-pigeon:1"], "--listen"),
        (["--listen", "ssl:0:privateKey=/no/such/key.pem:interface=127.0.0.1"], "--listen"),
        (["--config", "/no/such/tap.cfg"], "--config"),
        (["--capacity", "100000000"], "--capacity"),
        (["--origin", "not an origin"], "--origin"),
        (["--public-url", "ftp://x"], "--public-url"),
        (["--listen", "tcp:99999"], "--listen"),
    ],
)
def test_settings_that_cannot_be_used(start: Callable[..., Node], options: list[str], named: str) -> None:
    assert named in ended(start(*options, ready=False))


def test_a_taken_port(start: Callable[..., Node]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = ended(start("--listen", f"tcp:{port}:interface=127.0.0.1", ready=False))
    assert f"--listen: tcp:{port}" in said
    assert "in use" in said


def test_public_endpoint_requires_an_auth_option(start: Callable[..., Node]) -> None:
    assert "--auth" in ended(start(ready=False, listen="tcp:0:backlog=4096"))
    assert "--backend-token-file" in ended(start("--auth", "none", ready=False, backend="tcp:0:backlog=4096"))


def test_a_configuration_file(start: Callable[..., Node], tmp_path: Path) -> None:
    config = tmp_path / "tap.cfg"
    config.write_text("[wsgateway]\nnode-name = from-the-file\nauth =\n    none\nlease = 30\n")
    node = start("--config", str(config), "--lease", "20")
    assert node._request("GET", "/v1/nodes").json["nodes"][0]["name"] == "from-the-file"
    config.write_text("[wsgateway]\nlisten-on = tcp:1\n")
    said = ended(start("--config", str(config), ready=False))
    assert "listen-on" in said
    assert "--config" in said


def test_the_demo_prints_its_call_and_ends() -> None:
    demo = subprocess.run(
        [sys.executable, "-m", "gateway.demo"],
        env={**os.environ, "DEMO_ONCE": "1"},
        cwd=CHECKOUT,
        capture_output=True,
        timeout=60,
    )
    assert demo.returncode == 0, demo.stderr
    line = next(line for line in demo.stdout.decode().splitlines() if line.startswith("call demo-1 echo -> "))
    assert "Try it" not in demo.stdout.decode()
    assert json.loads(line.removeprefix("call demo-1 echo -> ")) == {
        "jsonrpc": "2.0",
        "id": 1,
        "result": {"hello": "world"},
    }


@pytest.mark.parametrize("named", ["--listen", "--registry"])
def test_daemon_that_cannot_start_reports_the_error(tmp_path: Path, named: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        any_port = "tcp:0:interface=127.0.0.1:backlog=4096"
        taken_port = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1:backlog=4096"
        daemon = subprocess.run(
            [
                *(*TWISTD, "--pidfile=d.pid", "--logfile=d.log", "wsgateway", "--backend", any_port),
                *("--listen", taken_port if named == "--listen" else any_port),
                *("--registry", "sqlite:/no/such/folder/r.sqlite" if named == "--registry" else "sqlite:r.sqlite"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            timeout=60,
        )
    assert daemon.returncode != 0
    # The whole error, and where the log is; twistd adds the start of the error.
    line, *_ = daemon.stderr.decode().splitlines()
    assert line.startswith(f"wsgateway: {named}: ")
    assert line.endswith(f"; the log is {tmp_path / 'd.log'}")
    assert line.removesuffix(f"; the log is {tmp_path / 'd.log'}") in (tmp_path / "d.log").read_text()
    assert not (tmp_path / "d.pid").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--pidfile: twistd cannot write {}/twistd.pid: "),
        (("--nodaemon",), "--pidfile: twistd cannot write {}/twistd.pid: "),
        (("--pidfile=",), "--logfile: twistd cannot write {}/twistd.log: "),
        (("--nodaemon", "--pidfile="), "--registry: {}/wsgateway.sqlite cannot be written "),
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    tmp_path.chmod(0o555)
    # Root can write anywhere, unless it has no capabilities.
    powerless = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    any_port = "tcp:0:interface=127.0.0.1:backlog=4096"
    twistd = subprocess.run(
        [*powerless, *TWISTD, *options, "wsgateway", "--listen", any_port, "--backend", any_port],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    (line,) = twistd.stderr.decode().splitlines()
    assert line.startswith(f"wsgateway: {said.format(tmp_path)}")
    assert twistd.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_starts_and_ends(start: Callable[..., Node]) -> None:
    node = start("--auth", "none", daemon=True)
    (status,) = node._request("GET", "/v1/nodes").json["nodes"]
    assert node.process.wait(30) == 0
    pid = int((node.folder / "twistd.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    while (node.folder / "twistd.pid").exists():
        pass
    assert node.rows("nodes") == []
    assert status["state"] == "up"


def test_version_is_printed_first(tmp_path: Path) -> None:
    twistd = subprocess.run(
        [*TWISTD, "wsgateway", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert twistd.returncode == 0, twistd.stderr
    lines = twistd.stdout.splitlines()
    assert lines[0] == f"wsgateway {__version__}"
    assert [line.split()[0] for line in lines[1:]] == ["Twisted", "Autobahn", "Python"]
    assert list(tmp_path.iterdir()) == []
