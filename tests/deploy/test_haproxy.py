"""deploy/haproxy as a text; tests/integration/test_haproxy.py runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import trustme

from gateway.settings import make_settings
from tests.deploy.case import DEPLOY, DeployTestCase, port_of
from tests.deploy.test_systemd import CONFIG, UNIT, arguments, sysctls

TEXT = (DEPLOY / "haproxy/haproxy.cfg").read_text()
PROGRAM = shutil.which("haproxy") or "/usr/sbin/haproxy"


class Configuration(DeployTestCase):
    def test_haproxy_accepts_the_configuration(self) -> None:
        folder = Path(self.mktemp()).absolute()
        (folder / "certs").mkdir(parents=True)
        issued = trustme.CA().issue_cert("gateway.example.com")
        issued.private_key_and_cert_chain_pem.write_to_path(str(folder / "certs/gateway.pem"))
        (folder / "haproxy.cfg").write_text(TEXT.replace("/etc/haproxy/certs", str(folder / "certs")))
        said = subprocess.run(
            [PROGRAM, "-c", "-f", folder / "haproxy.cfg"], capture_output=True, text=True, check=False
        )
        self.assertEqual(said.returncode, 0, said.stderr)
        self.assertNotIn("WARNING", said.stderr)

    def test_one_server_line_per_node(self) -> None:
        (instances,) = re.findall(r"wsgateway@808\{(\d)\.\.(\d)\}", (DEPLOY / "systemd" / UNIT).read_text())
        wanted = []
        for machine in (1, 2):
            for i in range(int(instances[0]), int(instances[1]) + 1):
                made = self.settings(arguments(f"808{i}")[3:], config=CONFIG.read_text())
                client, backend = port_of(made.listen[0]), port_of(made.backend[0])
                wanted.append(f"server node-{machine}-{backend} 10.0.0.1{machine}:{client} check port {backend}")
        self.assertEqual(re.findall(r"^ +(server .*)$", TEXT, flags=re.MULTILINE), wanted)

    def test_documented_number_of_ports(self) -> None:
        first, last = map(int, sysctls()["net.ipv4.ip_local_port_range"]["value"].split())
        reserved = [span.split("-") for span in sysctls()["net.ipv4.ip_local_reserved_ports"]["value"].split(",")]
        taken = [port for lowest, highest in reserved for port in range(int(lowest), int(highest) + 1) if port >= first]
        self.assertIn(f"; {last - first + 1 - len(taken):,} by deploy/sysctl", TEXT)

    def test_timeouts_are_longer_than_those_of_the_node(self) -> None:
        defaults = make_settings({})
        (tunnel,) = re.findall(r"timeout tunnel (\d+)s", TEXT)
        self.assertGreater(int(tunnel), defaults.ping_interval + defaults.ping_timeout)

    def test_drain_delay_is_longer_than_the_checks_need(self) -> None:
        ((interval, fall),) = re.findall(r"inter (\d+)s fall (\d+)", TEXT)
        made = self.settings(arguments("8081")[3:], config=CONFIG.read_text())
        self.assertGreater(made.drain_delay, int(interval) * (int(fall) + 1))

    def test_it_has_no_privileges(self) -> None:
        settings = re.sub("#.*", "", TEXT)
        for line in ("user haproxy", "group haproxy", "chroot /var/lib/haproxy"):
            self.assertIn(line, settings)
        # It would not start where files are limited.
        self.assertNotRegex(settings, r"(?m)^ *maxconn")

    def test_draining_node_keeps_its_clients(self) -> None:
        settings = re.sub("#.*", "", TEXT)
        self.assertIn("uri /readyz", settings)
        self.assertNotIn("on-marked-down", settings)
