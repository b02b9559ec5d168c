"""Errors of the registry."""

from __future__ import annotations

from gateway.registry.interface import Assignment, Location


class RegistryUnavailableError(Exception):
    """The database cannot be asked, or did not answer in time. Nothing is known of the outcome but what the method
    says."""


class LeaseLostError(RegistryUnavailableError):
    """This node's own lease ran out (or its row is gone): it may not claim until it has heartbeaten again."""


class ClaimSupersededError(Exception):
    """A newer connection of the same client claimed it in the same batch: this one is to be closed with 4001."""


class OwnedElsewhereError(Exception):
    """Another node has the client, and the claim was not to be over that. Nothing was written."""

    def __init__(self, location: Location) -> None:
        self.location = location
        super().__init__(f"{location.client_id} is connected to node {location.node_name}")


class AssignedElsewhereError(Exception):
    """The client is placed on another node, which takes clients. Nothing was written."""

    def __init__(self, client_id: str, assignment: Assignment) -> None:
        self.assignment = assignment
        super().__init__(f"{client_id} is placed on node {assignment.name}")
