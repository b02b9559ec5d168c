"""Free ports for servers that tests start.

They lie below those that the kernel gives to outgoing connections: one that is free now, of those, may be somebody's own
end of a connection by the time that the server listens there.
"""

from __future__ import annotations

import itertools
import os
import socket

#: Linux begins to give its own at 32768 (net.ipv4.ip_local_port_range)
_FIRST_PORT, _END_PORT = 10_000, 32_000
#: programs that run at the same time begin far from each other, also those that were started one after the other
_candidates = itertools.count(os.getpid() * 7919)


def free_port() -> int:
    """A port on which nobody listens, for TCP and UDP; this process gets each one once."""
    for number in itertools.islice(_candidates, _END_PORT - _FIRST_PORT):
        port = _FIRST_PORT + number % (_END_PORT - _FIRST_PORT)
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            try:
                # Nor on another address of this machine.
                tcp.bind(("", port))
                udp.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port from {_FIRST_PORT} to {_END_PORT} is free")
