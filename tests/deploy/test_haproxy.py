"""deploy/haproxy as a text; tests/integration/test_haproxy.py runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import trustme

from gateway.settings import make_settings
from tests.deploy.case import DEPLOY, DeployTestCase

TEXT = (DEPLOY / "haproxy/haproxy.cfg").read_text()
PROGRAM = shutil.which("haproxy") or "/usr/sbin/haproxy"


class Configuration(DeployTestCase):
    def test_haproxy_takes_it(self) -> None:
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

    def test_the_node_decides_who_was_silent_for_too_long(self) -> None:
        defaults = make_settings({})
        (tunnel,) = re.findall(r"timeout tunnel (\d+)s", TEXT)
        self.assertGreater(int(tunnel), defaults.ping_interval + defaults.ping_timeout)

    def test_a_node_that_drains_keeps_its_clients(self) -> None:
        settings = re.sub("#.*", "", TEXT)
        self.assertIn("uri /readyz", settings)
        self.assertNotIn("on-marked-down", settings)
