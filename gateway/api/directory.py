"""Find, list and disconnect clients, wherever they are connected; gather results from all nodes."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any, TypeAlias, TypeVar

import attrs
from twisted.internet.defer import Deferred, DeferredList

from gateway.api.errors import RemoteNodeError
from gateway.clients.interface import IClientSessions, SessionInfo
from gateway.cluster.errors import PeerUnreachableError
from gateway.cluster.interface import INode, IPeerClient
from gateway.protocol.frames import CloseCode
from gateway.registry.errors import LivenessUnknownError
from gateway.registry.interface import IRegistry, Location, SessionKey
from gateway.rpc.interface import IMembership, IOrphanedRows

_T = TypeVar("_T")

#: a client as the API shows it, ready for JSON
ClientInfo: TypeAlias = dict[str, str | int]

#: timeout of asking a client's node whether it has the client, in seconds
CONFIRMATION_TIMEOUT = 1.0

_DISCONNECT_REASON = "disconnected by an operator"
#: the name of a peer method, at the start of an error text
_METHOD_PREFIX = re.compile(r"\Apeer\.[a-z_]+: ")


def peer_error_text(error: PeerUnreachableError) -> str:
    """Return the text of the error without the name of the peer method, which means nothing to API users."""
    return _METHOD_PREFIX.sub("", str(error))


async def gather_nodes(requests: dict[str, Deferred[_T]]) -> tuple[dict[str, _T], dict[str, PeerUnreachableError]]:
    """Wait for one request per node. Returns the results and the errors of unreachable nodes, by node_id.

    Raises any other error that a request fails with.
    """
    outcomes: list[tuple[bool, Any]] = await DeferredList(list(requests.values()), consumeErrors=True)
    results, unreachable = {}, {}
    for node_id, (succeeded, outcome) in zip(requests, outcomes, strict=True):
        if succeeded:
            results[node_id] = outcome
        elif outcome.check(PeerUnreachableError):
            unreachable[node_id] = outcome.value
        else:
            outcome.raiseException()
    return results, unreachable


@attrs.frozen
class ClientDirectory:
    """The clients of this node and, through the registry, of all nodes. Without ``peers`` this node is the only one."""

    _sessions: IClientSessions
    _registry: IRegistry
    _node: INode
    _membership: IMembership
    _orphaned_rows: IOrphanedRows
    _peers: IPeerClient | None = None

    async def find(self, client_id: str) -> ClientInfo | None:
        """Return a connected client, or ``None``. Raises ``RegistryUnavailableError``."""
        asked = False
        while (session := self._sessions.get(client_id)) is None:
            location = await self._find_remote(client_id)
            if location is None:
                # It may have connected meanwhile.
                session = self._sessions.get(client_id)
                break
            if asked or await self._is_at_its_node(location):
                return _remote_info(location)
            # If its node does not have the client, it has removed the row.
            asked = True
        return None if session is None else self._local_info(session)

    async def _is_at_its_node(self, location: Location) -> bool:
        """Return ``False`` if the client's node says that it does not have the client. One that drains says so, too."""
        if self._peers is None:
            return True
        try:
            return await self._peers.has_client(location, CONFIRMATION_TIMEOUT)
        except PeerUnreachableError:
            return True

    async def list_clients(
        self, after: str, limit: int, node_id: str | None, prefix: str
    ) -> tuple[list[ClientInfo], str | None]:
        """Return a page of clients, in the order of their client_ids and beginning behind ``after``, and the ``after``
        of the next page, or ``None`` on the last one.

        Raises ``RegistryUnavailableError``.
        """
        locations = await self._registry.clients(after, limit + 1, node_id, prefix)
        next_after = locations[limit - 1].client_id if len(locations) > limit else None
        return [_remote_info(location) for location in locations[:limit]], next_after

    async def disconnect(self, client_id: str) -> bool:
        """Disconnect a client; returns ``False`` if it is not connected. Afterwards it cannot be called, and its row is
        gone.

        Raises ``RegistryUnavailableError`` (the client may be disconnected; its row is removed later) and
        ``RemoteNodeError``.
        """
        disconnected = await self._disconnect_local(client_id)
        if self._peers is None:
            if not disconnected and (location := await self._find_remote(client_id)) is not None:
                raise _disconnect_failed(location, "this node has no peers")
            return disconnected
        # Twice, for a client that moves meanwhile.
        for _ in range(2):
            location = await self._registry.find(client_id)
            if location is None:
                break
            if location.node_id == self._node.node_id:
                closed = await self._disconnect_local(client_id)
                if not closed:
                    await self._orphaned_rows.check(SessionKey(client_id, location.generation))
            else:
                closed = await self._disconnect_remote(self._peers, location)
            if closed:
                return True
        return disconnected

    async def disconnect_former(self, client_id: str) -> bool:
        """Disconnect a client whose id is none any more, as :meth:`disconnect` does. Returns also ``True`` if there was
        only a row, which is gone then."""
        had_row = await self._registry.find(client_id) is not None
        if await self.disconnect(client_id):
            return True
        return had_row and await self._registry.find(client_id) is None

    async def _disconnect_local(self, client_id: str) -> bool:
        claim = self._sessions.claim_in_progress(client_id)
        if claim is not None:
            await claim
        return await self._sessions.close(client_id, CloseCode.DISCONNECTED, _DISCONNECT_REASON)

    async def _disconnect_remote(self, peers: IPeerClient, location: Location) -> bool:
        if not location.live and self._membership.is_stable():
            # The node is dead.
            return False
        try:
            return await peers.close_session(location, CloseCode.DISCONNECTED, _DISCONNECT_REASON)
        except PeerUnreachableError as e:
            if e.refused:
                return False
            self._check_liveness_known(location)
            raise _disconnect_failed(location, peer_error_text(e)) from None

    async def _find_remote(self, client_id: str) -> Location | None:
        location = await self._registry.find(client_id)
        if location is None:
            return None
        if location.node_id == self._node.node_id:
            await self._orphaned_rows.check(SessionKey(client_id, location.generation))
            return None
        self._check_liveness_known(location)
        return location if location.live else None

    def _check_liveness_known(self, location: Location) -> None:
        """Raise ``LivenessUnknownError`` if it is too early to tell whether the client's node is dead."""
        if not location.live and not self._membership.is_stable():
            raise LivenessUnknownError("it is not known yet whether the client's node is alive; try again later")

    def _local_info(self, session: SessionInfo) -> ClientInfo:
        return {
            "client_id": session.client_id,
            "node": self._node.node_id,
            "node_name": self._node.name,
            "generation": session.generation,
            "connected_at": _iso_timestamp(session.connected_at),
            "address": session.address,
        }


def _disconnect_failed(location: Location, problem: str) -> RemoteNodeError:
    return RemoteNodeError(
        f"the client is connected to node {location.node_name}, which did not disconnect it: {problem}"
    )


def _remote_info(location: Location) -> ClientInfo:
    return {
        "client_id": location.client_id,
        "node": location.node_id,
        "node_name": location.node_name,
        "generation": location.generation,
        "connected_at": _iso_timestamp(location.connected_at),
        "address": location.address,
    }


def _iso_timestamp(seconds: float) -> str:
    """Format seconds since 1970 as ISO 8601 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
