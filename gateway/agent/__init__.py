"""A client of the gateway for Twisted programs. Public: the names below keep their meaning between releases.

``python -m gateway.agent --url ws://127.0.0.1:8080 --client-id demo-1`` is the demo client.
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
