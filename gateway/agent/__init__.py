"""Client library for Twisted programs: stay connected to a gateway, serve calls, send calls and notifications.

    agent = Agent("wss://gw.example.com", reactor=reactor, client_id="demo-1", methods={"echo": lambda params: params})
    agent.start()
    result = await agent.call("policy.get")

The names in ``__all__`` are the public API: they keep their meaning between releases.

``python -m gateway.agent --url ws://127.0.0.1:8080 --client-id demo-1`` runs the demo client.
"""

from gateway.agent.client import Agent
from gateway.agent.errors import (
    AgentError,
    CallFailed,
    CallTimedOut,
    ConnectionLost,
    NotConnected,
    RpcFailed,
    Stopped,
)
from gateway.agent.tls import tls_of_files

__all__ = [
    "Agent",
    "AgentError",
    "CallFailed",
    "CallTimedOut",
    "ConnectionLost",
    "NotConnected",
    "RpcFailed",
    "Stopped",
    "tls_of_files",
]
