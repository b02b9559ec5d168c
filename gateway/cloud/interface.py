"""The seam between a node and the cloud that it runs in."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from zope.interface import Interface


class NameServiceError(Exception):
    """A name service did not do what it was asked; its text says why, in one line. ``throttled``: it asks to be asked
    less often; ``hopeless``: it will say the same until somebody changes something, such as rights or a zone."""

    def __init__(self, problem: str, *, throttled: bool = False, hopeless: bool = False) -> None:
        self.throttled = throttled
        self.hopeless = hopeless
        super().__init__(problem)


class INameService(Interface):
    """The records of one DNS name, one for each node that takes clients.

    Each method does its whole work once, in a thread where it would block, within some seconds, and without trying
    again; every Deferred fails with :class:`NameServiceError` alone, and then nothing is known of what was done. Doing
    again what is done already is no error. Records that no node has made are left alone.
    """

    def announce(node_id: str, address: str) -> Deferred[None]:
        """Have the name lead to a node as well, at that IPv4 or IPv6 address: always the same for one node."""

    def withdraw(node_ids: frozenset[str]) -> Deferred[frozenset[str]]:
        """Have the name not lead to these nodes any more. An address that another announced node has, too, stays. Fires
        with those of them that had a record."""

    def announced() -> Deferred[dict[str, str]]:
        """The nodes of which there is a record: node_id -> address, or an empty text for one whose address the name
        does not lead to."""

    def close() -> Deferred[None]:
        """Wait for what is under way, and let go of threads and connections. Nothing is asked of it after that."""
