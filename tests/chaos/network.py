"""A network namespace for each node, connected by a bridge that can partition them. Requires root.

Each node has an address on the bridge, and so has everything else. Isolated ports of a bridge pass nothing to each
other and everything to other ports: between their nodes packets are dropped silently.
"""

from __future__ import annotations

import itertools
import os
import subprocess

_numbers = itertools.count()


def ip(*arguments: str) -> None:
    """Run ip(8). Raises ``OSError`` or ``subprocess.CalledProcessError``."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def available() -> bool:
    """Whether namespaces and bridges can be created."""
    try:
        Network(1).close()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


class Network:
    """``count`` namespaces and a bridge. Raises ``OSError`` or ``subprocess.CalledProcessError``."""

    def __init__(self, count: int) -> None:
        self._name = f"wg{os.getpid() % 100000}x{next(_numbers)}"
        self._net = f"10.213.{os.getpid() % 250}"
        #: the address of this machine on the bridge
        self.host = f"{self._net}.1"
        self.hosts = [f"{self._net}.{10 + number}" for number in range(count)]
        try:
            ip("link", "add", self._name, "type", "bridge")
            ip("address", "add", f"{self.host}/24", "dev", self._name)
            ip("link", "set", self._name, "up")
            for number, host in enumerate(self.hosts):
                self._add(number, host)
        except BaseException:
            self.close()
            raise

    def _add(self, number: int, host: str) -> None:
        space, port = self._namespace(number), self._port(number)
        ip("netns", "add", space)
        ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", port, "master", self._name, "up")
        for arguments in (["set", "lo", "up"], ["set", "eth0", "up"]):
            ip("-n", space, "link", *arguments)
        ip("-n", space, "address", "add", f"{host}/24", "dev", "eth0")

    def _namespace(self, number: int) -> str:
        return f"{self._name}n{number}"

    def _port(self, number: int) -> str:
        return f"{self._name}p{number}"

    def before(self, number: int) -> tuple[str, ...]:
        """Return the command prefix that runs a command in a namespace."""
        return ("ip", "netns", "exec", self._namespace(number))

    def cut(self, *numbers: int) -> None:
        """Partition these nodes from each other."""
        self._isolate(numbers, "on")

    def restore(self, *numbers: int) -> None:
        """Connect these nodes again."""
        self._isolate(numbers, "off")

    def _isolate(self, numbers: tuple[int, ...], how: str) -> None:
        for number in numbers:
            ip("link", "set", "dev", self._port(number), "type", "bridge_slave", "isolated", how)

    def close(self) -> None:
        """Remove the namespaces and the bridge."""
        for number in range(len(self.hosts)):
            subprocess.run(["ip", "link", "delete", self._port(number)], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "delete", self._namespace(number)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self._name], check=False, capture_output=True)
