"""Free ports for servers that tests start.

They are below the range of ephemeral ports: a free port of that range could be the local port of an outgoing connection
by the time the server listens.
"""

from __future__ import annotations

import itertools
import os
import socket

_FIRST_PORT = 10_000
#: exclusive; the ephemeral ports of Linux begin at 32768 (net.ipv4.ip_local_port_range)
_END_PORT = 32_000
#: processes start far from each other, even with consecutive pids
_candidates = itertools.count(os.getpid() * 7919)


def free_port() -> int:
    """Return a port that is free for TCP and UDP. It is returned only once in this process."""
    for number in itertools.islice(_candidates, _END_PORT - _FIRST_PORT):
        port = _FIRST_PORT + number % (_END_PORT - _FIRST_PORT)
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            try:
                # Free on every address of this machine.
                tcp.bind(("", port))
                udp.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port from {_FIRST_PORT} to {_END_PORT} is free")
