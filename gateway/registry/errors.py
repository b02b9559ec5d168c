"""Errors of the registry.

RegistryError
├── RegistryUnavailableError        the database cannot be reached, or did not answer in time
│   ├── RegistryRefusedError        the database answers, but refused this request
│   ├── LeaseLostError              the lease of this node has expired
│   └── LivenessUnknownError        it is too early to tell whether a client's node is alive
├── ClaimSupersededError            a newer connection of the client was claimed
├── OwnedElsewhereError             another node owns the client
└── AssignedElsewhereError          the client is assigned to another node
"""

from __future__ import annotations

from gateway.registry.interface import Assignment, Location


class RegistryError(Exception):
    """Base class of the errors below."""


class RegistryUnavailableError(RegistryError):
    """The database cannot be reached, or did not answer in time.

    Whether the operation took effect is unknown, unless the method documents otherwise.
    """


class RegistryRefusedError(RegistryUnavailableError):
    """The database answers, but refused this request: a limit of it or of a proxy, or a value. Others may succeed."""


class LeaseLostError(RegistryUnavailableError):
    """The lease of this node has expired, or its row is gone. It may not claim before its next successful heartbeat."""


class LivenessUnknownError(RegistryUnavailableError):
    """It is too early to tell whether the node of a client is alive. The text is for backends."""


class ClaimSupersededError(RegistryError):
    """A newer connection of the same client was claimed by this node: close this one with 4001."""


class OwnedElsewhereError(RegistryError):
    """Another node owns the client, and the policy of the claim does not allow a takeover. Nothing was written."""

    def __init__(self, location: Location) -> None:
        self.location = location
        super().__init__(f"{location.client_id} is connected to node {location.node_name}")


class AssignedElsewhereError(RegistryError):
    """The client is assigned to another node, which accepts clients. Nothing was written."""

    def __init__(self, client_id: str, assignment: Assignment) -> None:
        self.assignment = assignment
        super().__init__(f"{client_id} is assigned to node {assignment.name}")
