"""Errors of the communication between nodes.

Exception
 +-- PeerUnreachableError
 +-- PeerAuthenticationError
 |    +-- WrongNodeError
 +-- RelayRefusedError
"""

from __future__ import annotations


class PeerUnreachableError(Exception):
    """Raised when a peer cannot be reached, or does not respond in time.

    ``sent`` tells whether the peer may have received the request. ``refused`` tells whether it is certain that the node
    with that node_id no longer listens at its address.
    """

    def __init__(self, problem: str, *, sent: bool = False, refused: bool = False) -> None:
        self.sent = sent
        self.refused = refused
        super().__init__(problem)


class PeerAuthenticationError(Exception):
    """Raised when a request is not authenticated as one of a node of this fleet. The text gives the reason, and
    contains nothing of the request."""


class WrongNodeError(PeerAuthenticationError):
    """Raised when another node of this fleet has sent a request that is meant for a third one, which listened at this
    node's address before."""


class RelayRefusedError(Exception):
    """Raised when a peer responds to a relay request, but does not accept the client."""
