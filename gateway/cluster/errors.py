"""Errors between nodes."""

from __future__ import annotations


class PeerUnreachableError(Exception):
    """Another node could not be asked, or did not answer in time. ``sent``: whether it may have got the question;
    ``refused``: whether it is certain that nobody of that node_id listens at its address any more."""

    def __init__(self, problem: str, *, sent: bool = False, refused: bool = False) -> None:
        self.sent = sent
        self.refused = refused
        super().__init__(problem)


class PeerAuthenticationError(Exception):
    """A request is not that of a node of this fleet; the text says why not, without anything of what it sent."""


class RelayRefusedError(Exception):
    """A node answered, but does not take the client."""
