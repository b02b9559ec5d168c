"""Base class for tests of deploy/: check that a node starts with the settings there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from twisted.internet.endpoints import serverFromString
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import TestCase

from gateway import settings
from gateway.node import Node
from gateway.settings import Settings
from gateway.tap import Options

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
#: where everything in deploy/ has its files
FOLDER = "/etc/wsgateway"
#: the files that are there, with what a node takes
FILES = {
    "registry-password": "change-me\n",
    "cluster-secret": "at least sixteen bytes\n",
    "backends": "a-token\n",
    "clients": f"agent-7 {'0' * 64}\n",
}
#: the time that a node takes to end, beyond its drain and its longest call, in seconds
STOP_SECONDS = 25


class DeployTestCase(TestCase):
    """A test of something in deploy/."""

    def settings(self, arguments: Sequence[str], *, config: str = "", open_files: int = 1048576) -> Settings:
        """The settings that a command line, without ``twistd wsgateway``, and the text of a tap.cfg come to, where
        ``open_files`` are allowed; fails unless a node can be made of them. Nothing is opened."""
        folder = Path(self.mktemp())
        folder.mkdir()
        for name, content in FILES.items():
            (folder / name).touch(0o600)
            (folder / name).write_text(content)
        (folder / "tap.cfg").write_text(config.replace(FOLDER, str(folder)))
        self.patch(settings, "open_file_limit", lambda: open_files)
        options = Options()
        options.parseOptions([argument.replace(FOLDER, str(folder)) for argument in arguments])
        made = options.settings()
        Node(made, Clock())
        for endpoint in (*made.listen, *made.backend):
            serverFromString(MemoryReactorClock(), endpoint.replace(":reuseport=yes", ""))
            self.assertIn(":backlog=4096", endpoint)
        return made

    def assert_stop_timeout(self, seconds: float, made: Settings) -> None:
        """The stop timeout must cover the drain and the longest call."""
        drain_time = made.drain_delay + made.drain_seconds
        self.assertGreaterEqual(seconds, drain_time + made.max_call_timeout + STOP_SECONDS)


def port_of(endpoint: str) -> int:
    """The port in an endpoint string."""
    found = re.match(r"(?:haproxy:)?tcp:(\d+)", endpoint)
    assert found is not None, endpoint
    return int(found[1])
