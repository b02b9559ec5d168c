"""The limits of a machine that stop a program which opens very many connections, and what the kernel takes for them."""

from __future__ import annotations

import resource
from pathlib import Path

MIB = 2**20
_PAGE = resource.getpagesize()
#: files that a node keeps for what is no client (its --capacity is the rest), and more than a holder needs
NOT_CLIENTS = 1024
#: what a client and its end at the server take in the kernel, in bytes, lies between these
LEAST_EACH, MOST_EACH = 4000, 16000


def sysctl(name: str) -> list[int]:
    """The numbers of a kernel setting such as ``fs.file-max``; none where there is no such setting."""
    try:
        return list(map(int, Path("/proc/sys", *name.split(".")).read_text().split()))
    except OSError:
        return []


def meminfo() -> dict[str, int]:
    """``/proc/meminfo``, in bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def kernel() -> int:
    """Bytes that the kernel uses: its objects, page tables and stacks, and the buffers of sockets."""
    memory = meminfo()
    socket_pages = next(
        int(line.split()[-1]) for line in Path("/proc/net/sockstat").read_text().splitlines() if line.startswith("TCP:")
    )
    names = ("Slab", "KernelStack", "PageTables", "Percpu")
    return sum(memory.get(name, 0) for name in names) + socket_pages * _PAGE


def each_or_disturbed(each: float) -> str:
    """Bytes of the kernel for a client with both of its ends, as text. They are read from figures of the whole machine:
    what no two sockets take tells that something else has ended, or begun, meanwhile."""
    return f"{each:,.0f}" if LEAST_EACH <= each <= MOST_EACH else "disturbed"


class Limits:
    """Looks at what may run short while clients are opened."""

    def __init__(self, keep_free: int) -> None:
        """``keep_free`` is how many bytes of memory must stay available."""
        self._keep_free = keep_free

    @staticmethod
    def per_process() -> int:
        """How many clients one process can have."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1] - NOT_CLIENTS

    @staticmethod
    def ports() -> int:
        """How many connections one address can make to one server."""
        low, high = sysctl("net.ipv4.ip_local_port_range") or [32768, 60999]
        return high - low + 1

    @staticmethod
    def available() -> int:
        """Bytes of memory that are available."""
        return meminfo()["MemAvailable"]

    def ahead(self, clients: int) -> list[str]:
        """What will not be enough for so many clients, known before the first is opened: a line each."""
        problems = []
        used, _, most = sysctl("fs.file-nr") or [0, 0, 2 * clients]
        if used + 2 * clients > most:
            problems.append(
                f"fs.file-max is {most:,}, enough for {(most - used) // 2:,} clients, which have two files each: "
                f"sysctl -w fs.file-max={used + 3 * clients}"
            )
        need = clients * 10000 + self._keep_free
        if self.available() < need:
            problems.append(
                f"{self.available() / 2**30:.1f} GiB of memory are available, and some {need / 2**30:.1f} are needed"
            )
        return problems

    def short(self) -> str:
        """Why no more clients should be opened, or an empty text."""
        if self.available() < self._keep_free:
            return f"less than {self._keep_free / MIB:,.0f} MiB of memory are available (--keep-free)"
        used, _, most = sysctl("fs.file-nr") or [0, 0, 1]
        if used > 0.98 * most:
            return f"{used:,} files are open, of fs.file-max {most:,}"
        tracked, most_tracked = sysctl("net.netfilter.nf_conntrack_count"), sysctl("net.netfilter.nf_conntrack_max")
        if tracked and most_tracked and tracked[0] > 0.97 * most_tracked[0]:
            return (
                f"{tracked[0]:,} connections are tracked, of net.netfilter.nf_conntrack_max {most_tracked[0]:,}: raise "
                "it, or do not track loopback (iptables -t raw -A OUTPUT -o lo -j NOTRACK)"
            )
        return ""
