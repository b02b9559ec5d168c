"""What the API needs to know of the node that it speaks for."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface


class INode(Interface):
    """This node."""

    node_id: str = Attribute("Its UUID, new at every start.")
    name: str = Attribute("What operators call it.")
    public_url: str = Attribute("How clients reach it, without /v1/connect.")
    peer_url: str = Attribute("How other nodes, and backends, reach it.")

    def unready() -> str:
        """Why this node takes no clients (``starting``, ``draining``, ``registry``), or an empty text when it does."""

    def steady() -> bool:
        """Whether this node may call another one dead whose lease has run out."""

    def drain() -> Deferred[None]:
        """Send every client away, spread over ``--drain-seconds``, and refuse new ones; fires when none is left.
        Asking again returns a Deferred for the drain that is under way. The process then ends."""
