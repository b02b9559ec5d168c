"""Limits of a machine for very many connections, and the kernel memory that these use."""

from __future__ import annotations

import resource
from pathlib import Path

MIB = 2**20
_PAGE = resource.getpagesize()
#: files that a node reserves for everything but clients (its --capacity is the rest); more than a holder needs
NOT_CLIENTS = 1024
#: plausible range of kernel memory for both ends of a connection, in bytes
MIN_KERNEL_BYTES = 4000
MAX_KERNEL_BYTES = 16000


def sysctl(name: str) -> list[int]:
    """Return the numbers of a kernel setting such as ``fs.file-max``; empty if the setting does not exist."""
    try:
        return list(map(int, Path("/proc/sys", *name.split(".")).read_text().split()))
    except OSError:
        return []


def meminfo() -> dict[str, int]:
    """Read ``/proc/meminfo``, in bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def kernel() -> int:
    """Return the memory of the kernel in bytes: objects, page tables, stacks and socket buffers."""
    memory = meminfo()
    socket_pages = next(
        int(line.split()[-1]) for line in Path("/proc/net/sockstat").read_text().splitlines() if line.startswith("TCP:")
    )
    names = ("Slab", "KernelStack", "PageTables", "Percpu")
    return sum(memory.get(name, 0) for name in names) + socket_pages * _PAGE


def each_or_disturbed(each: float) -> str:
    """Format the kernel memory of a connection with both ends, in bytes.

    It is read from figures of the whole machine. If it is implausible, other processes have started or ended meanwhile.
    """
    return f"{each:,.0f}" if MIN_KERNEL_BYTES <= each <= MAX_KERNEL_BYTES else "disturbed"


class Limits:
    """Check resources that may run out while clients are opened."""

    def __init__(self, keep_free: int) -> None:
        """``keep_free`` is the memory that must stay available, in bytes."""
        self._keep_free = keep_free

    @staticmethod
    def per_process() -> int:
        """Return how many clients one process can have."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1] - NOT_CLIENTS

    @staticmethod
    def ports() -> int:
        """Return how many connections one address can open to one server."""
        low, high = sysctl("net.ipv4.ip_local_port_range") or [32768, 60999]
        return high - low + 1

    @staticmethod
    def available() -> int:
        """Return the available memory in bytes."""
        return meminfo()["MemAvailable"]

    def ahead(self, clients: int) -> list[str]:
        """Return the resources that are known to be insufficient for this number of clients, one line each."""
        problems = []
        used, _, maximum = sysctl("fs.file-nr") or [0, 0, 2 * clients]
        if used + 2 * clients > maximum:
            problems.append(
                f"fs.file-max is {maximum:,}, enough for {(maximum - used) // 2:,} clients, which use two files each: "
                f"sysctl -w fs.file-max={used + 3 * clients}"
            )
        need = clients * 10000 + self._keep_free
        if self.available() < need:
            problems.append(
                f"{self.available() / 2**30:.1f} GiB of memory are available, and about {need / 2**30:.1f} are needed"
            )
        return problems

    def short(self) -> str:
        """Return why no more clients should be opened, or an empty string."""
        if self.available() < self._keep_free:
            return f"less than {self._keep_free / MIB:,.0f} MiB of memory are available (--keep-free)"
        used, _, maximum = sysctl("fs.file-nr") or [0, 0, 1]
        if used > 0.98 * maximum:
            return f"{used:,} files are open, of fs.file-max {maximum:,}"
        tracked, max_tracked = sysctl("net.netfilter.nf_conntrack_count"), sysctl("net.netfilter.nf_conntrack_max")
        if tracked and max_tracked and tracked[0] > 0.97 * max_tracked[0]:
            return (
                f"{tracked[0]:,} connections are tracked, of net.netfilter.nf_conntrack_max {max_tracked[0]:,}: raise "
                "it, or do not track loopback (iptables -t raw -A OUTPUT -o lo -j NOTRACK)"
            )
        return ""
