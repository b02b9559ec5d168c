"""deploy/systemd and deploy/sysctl."""

from __future__ import annotations

import http.server
import os
import re
import shlex
import subprocess
import threading
from pathlib import Path

from tests.builders.ports import free_port
from tests.deploy.case import DEPLOY, DeployTestCase, port_of

UNIT = "wsgateway@.service"
CONFIG = DEPLOY / "systemd/tap.cfg"
#: those that a kernel has only with a module, or in its first network namespace alone
NOT_EVERYWHERE = {"net.netfilter.nf_conntrack_max", "net.ipv4.tcp_mem", "fs.epoll.max_user_watches"}
_SETTING = re.compile(r"(?P<off>#?)(?P<optional>-?)(?P<key>[a-z0-9_.-]+) = (?P<value>[0-9 ,-]+)")


def unit() -> dict[str, list[str]]:
    """The settings of the unit, each as often as it is given."""
    text = (DEPLOY / "systemd" / UNIT).read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def arguments(instance: str, environment: str = "") -> list[str]:
    """Those of a node that the unit starts on the machine gw-1, where ``/etc/wsgateway/environment`` has that text."""
    given = {"%i": instance, "%H": "gw-1"}
    pairs = [pair for line in unit()["Environment"] for pair in shlex.split(line)] + shlex.split(environment)
    for name, _, value in (pair.partition("=") for pair in pairs):
        given[f"${{{name}}}"] = value.replace("%i", instance).replace("%H", "gw-1")
    (command,) = unit()["ExecStart"]
    program, *options = [re.sub(r"%.|\$\{\w+\}", lambda found: given[found[0]], word) for word in shlex.split(command)]
    assert program == "/opt/wsgateway/bin/twistd", program
    return options


def sysctls() -> dict[str, re.Match[str]]:
    lines = (DEPLOY / "sysctl/90-wsgateway.conf").read_text().splitlines()
    return {found["key"]: found for found in map(_SETTING.fullmatch, lines) if found}


class Unit(DeployTestCase):
    def analyze(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What systemd-analyze says of it, with programs that are there."""
        folder = Path(self.mktemp())
        folder.mkdir()
        text = (DEPLOY / "systemd" / UNIT).read_text()
        self.assertEqual(text.count("/opt/wsgateway/bin/twistd"), 1)
        (folder / UNIT).write_text(text.replace("/opt/wsgateway/bin/twistd", "/bin/true"))
        command = ["systemd-analyze", *arguments, str((folder / UNIT.replace("@", "@8081")).absolute())]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_systemd_accepts_the_units(self) -> None:
        said = self.analyze("verify", "--man=no", "--recursive-errors=no")
        self.assertEqual((said.returncode, said.stdout + said.stderr), (0, ""))

    def test_service_is_sandboxed(self) -> None:
        said = self.analyze("security", "--offline=true", "--threshold=25")
        self.assertEqual(said.returncode, 0, said.stdout[-200:])

    def test_node_accepts_the_options(self) -> None:
        self.assertEqual(arguments("8081")[:3], ["--nodaemon", "--pidfile=", "wsgateway"])
        (limit,) = unit()["LimitNOFILE"]
        made = self.settings(arguments("8081")[3:], config=CONFIG.read_text(), open_files=int(limit))
        self.assertEqual(made.peer_url, "ws://gw-1:8081")
        self.assertEqual(made.backend, ("tcp:8081:backlog=4096",))
        self.assertEqual(made.listen, ("haproxy:tcp:18081:backlog=4096",))
        (seconds,) = unit()["TimeoutStopSec"]
        self.assert_stop_timeout(int(seconds), made)
        self.assertLessEqual(int(limit), int(sysctls()["fs.nr_open"]["value"]))

    def test_ports_are_unique_and_reserved(self) -> None:
        reserved = [span.split("-") for span in sysctls()["net.ipv4.ip_local_reserved_ports"]["value"].split(",")]
        ports = []
        for instance in ("8081", "8082", "8083", "8084"):
            made = self.settings(arguments(instance)[3:], config=CONFIG.read_text())
            ports += [port_of(made.listen[0]), port_of(made.backend[0])]
        self.assertEqual(len(set(ports)), 8)
        for port in ports:
            self.assertTrue(any(int(first) <= port <= int(last) for first, last in reserved), port)

    def test_nodes_share_a_port_if_configured(self) -> None:
        (line,) = re.findall(r"^# +(LISTEN=\S+)$", CONFIG.read_text(), flags=re.MULTILINE)
        # In the place of a certificate, which is not here.
        environment = re.sub("=ssl:443:.*:certKey=[^:]+:", "=tcp:443:", line)
        self.assertEqual(environment, "LISTEN=tcp:443:backlog=4096:reuseport=yes")
        made = self.settings(arguments("8082", environment)[3:], config=CONFIG.read_text())
        self.assertEqual(made.listen, ("tcp:443:backlog=4096:reuseport=yes",))

    def test_user_is_created(self) -> None:
        # The name of a user that this machine has already makes it say nothing.
        said = subprocess.run(
            ["systemd-sysusers", f"--root={self.mktemp()}", "--dry-run", DEPLOY / "systemd/sysusers.conf"],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(said.returncode, 0, said.stderr)
        self.assertIn(f"Creating user '{unit()['User'][0]}'", said.stdout + said.stderr)


class Readiness(DeployTestCase):
    """The program that lets `systemctl start` wait."""

    def wait(self, port: int, process: int) -> int:
        (command,) = unit()["ExecStartPost"]
        program = shlex.split(command.replace("%i", str(port)).replace("$$", "$"))
        return subprocess.run(
            program, env={**os.environ, "MAINPID": str(process)}, stderr=subprocess.DEVNULL, check=False, timeout=30
        ).returncode

    def test_waits_until_the_node_is_ready(self) -> None:
        requests: list[str] = []

        class Node(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                self.send_response(503 if len(requests) < 3 else 200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Node)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        self.assertEqual(self.wait(server.server_port, os.getpid()), 0)
        self.assertEqual(requests, ["/readyz"] * 3)

    def test_ends_when_the_node_has_exited(self) -> None:
        ended = subprocess.Popen(["true"])
        ended.wait()
        self.assertEqual(self.wait(free_port(), ended.pid), 1)


class Sysctl(DeployTestCase):
    def test_kernel_settings_exist(self) -> None:
        unknown = {key for key in sysctls() if not Path("/proc/sys", *key.split(".")).exists()}
        self.assertLessEqual(unknown, NOT_EVERYWHERE | {key for key, found in sysctls().items() if found["optional"]})

    def test_no_other_settings(self) -> None:
        lines = (DEPLOY / "sysctl/90-wsgateway.conf").read_text().splitlines()
        settings = [line for line in lines if line and not re.match(r"#( |$)", line)]
        self.assertEqual(len(settings), len(sysctls()))

    def test_queue_lengths_match_the_backlogs(self) -> None:
        for key in ("net.core.somaxconn", "net.ipv4.tcp_max_syn_backlog"):
            self.assertEqual(sysctls()[key]["value"], "4096")
