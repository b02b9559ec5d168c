"""A node with default settings is reachable from this machine only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from fleet import CHECKOUT, TIMEOUT, TWISTD, environment

HOSTS = ("127.0.0.1", "127.1.2.3", "::1", "192.0.2.1", "2001:db8::1")
PORTS = (8080, 8081)
#: Runs this module in a network namespace of its own, where the node's ports are free, with additional addresses.
IN_A_NETWORK = (
    "ip link set lo up && ip addr add 192.0.2.1/32 dev lo && ip -6 addr add 2001:db8::1/128 dev lo nodad"
    f" && exec {sys.executable} {__file__}"
)


def _reached() -> list[str]:
    found = []
    for host in HOSTS:
        for port in PORTS:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
                one.settimeout(2)
                if one.connect_ex((host, port)) == 0:
                    found.append(f"{host} {port}")
    return found


def _print_reachable() -> None:
    """Start a node as it is by default, and say where it is reached."""
    node = subprocess.Popen([*TWISTD, "--nodaemon", "--pidfile=", "--logfile=node.log", "wsgateway"])
    try:
        ends = time.monotonic() + TIMEOUT
        while len(found := _reached()) < len(PORTS) and time.monotonic() < ends:
            time.sleep(0.05)
        sys.stdout.write(json.dumps(found))
    finally:
        node.kill()
        node.wait()


def test_a_node_with_defaults_is_reached_by_this_machine_alone(tmp_path: Path) -> None:
    alone = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    done = subprocess.run(
        [*alone, "sh", "-c", IN_A_NETWORK],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/tests/integration"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    # By the one address that it listens on; loopback's others are no way around it.
    assert json.loads(done.stdout) == ["127.0.0.1 8080", "127.0.0.1 8081"]


LOOPBACK = {"--listen": "tcp:0:interface=127.0.0.1:backlog=4096", "--backend": "tcp:0:interface=127.0.0.1:backlog=4096"}


#: listening option that is reachable from elsewhere -> the option that the error message requires
OPEN = {
    ("--listen", "tcp:0"): "--auth",
    ("--listen", "haproxy:tcp:0"): "--auth",
    ("--backend", "tcp:0:interface=0.0.0.0"): "--backend-token-file",
    ("--backend", "tcp6:0:interface=\\:\\:"): "--backend-token-file",
}


def _start(where: str, endpoint: str, folder: Path) -> subprocess.Popen[str]:
    options = {**LOOPBACK, where: f"{endpoint}:backlog=4096"}
    # Consent at one endpoint is none at the other.
    consent = ["--auth", "none"] if where == "--backend" else []
    given = [part for option in options.items() for part in option]
    return subprocess.Popen(
        [*TWISTD, "--nodaemon", "--pidfile=", "--logfile=node.log", "wsgateway", *given, *consent],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(CHECKOUT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_node_that_others_could_reach_does_not_start_without_tokens(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(OPEN))]
    for folder in folders:
        folder.mkdir()
    nodes = [_start(*option, folder) for option, folder in zip(OPEN, folders, strict=True)]
    try:
        for ((where, _), wanted), node in zip(OPEN.items(), nodes, strict=True):
            said = node.communicate(timeout=TIMEOUT)[1].splitlines()
            assert node.returncode == 1
            assert len(said) == 1, said
            assert said[0].startswith(f"wsgateway: {where}: "), said
            assert "is reachable from other machines" in said[0], said
            assert f"set {wanted}" in said[0], said
    finally:
        for node in nodes:
            node.kill()
            node.communicate()


if __name__ == "__main__":
    _print_reachable()
