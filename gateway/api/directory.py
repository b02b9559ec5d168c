"""What is asked of every node at once: who answered, and who could not be asked.

Where a client is, for whoever asks over HTTP or over a WebSocket.
"""

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
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import IRegistry, Location
from gateway.rpc.interface import IMembership

T = TypeVar("T")

#: what nodes call what one asks of another
_REQUEST_PREFIX = re.compile(r"\Apeer\.[a-z_]+: ")


def peer_error_text(error: PeerUnreachableError) -> str:
    """Why a node could not be asked, for who knows nothing of what nodes say to each other."""
    return _REQUEST_PREFIX.sub("", str(error))


async def gather_nodes(requests: dict[str, Deferred[T]]) -> tuple[dict[str, T], dict[str, PeerUnreachableError]]:
    """Wait for what each node was asked, by node_id: what they answered, and why the others could not be asked. Raises
    what any of it fails with beside that."""
    outcomes: list[tuple[bool, Any]] = await DeferredList(list(requests.values()), consumeErrors=True)
    answered, unreachable = {}, {}
    for node_id, (done, outcome) in zip(requests, outcomes, strict=True):
        if done:
            answered[node_id] = outcome
        elif outcome.check(PeerUnreachableError):
            unreachable[node_id] = outcome.value
        else:
            outcome.raiseException()
    return answered, unreachable


_DISCONNECT_REASON = "disconnected by an operator"

#: a client as backends see it, ready to be made JSON
ClientInfo: TypeAlias = dict[str, str | int]


@attrs.frozen
class ClientDirectory:
    """The clients of this node, and through the registry those of all nodes. Without ``peers`` it is alone."""

    _sessions: IClientSessions
    _registry: IRegistry
    _node: INode
    _membership: IMembership
    _peers: IPeerClient | None = None

    async def find(self, client_id: str) -> ClientInfo | None:
        """A connected client, or ``None``. Raises ``RegistryUnavailable``."""
        here = self._sessions.get(client_id)
        if here is None:
            location = await self._find_remote(client_id)
            if location is not None:
                return _remote_info(location)
            # A row of this node alone does not make a client connected; it may have become so meanwhile.
            here = self._sessions.get(client_id)
        return None if here is None else self._local_info(here)

    async def list_clients(
        self, after: str, limit: int, node_id: str | None, prefix: str
    ) -> tuple[list[ClientInfo], str | None]:
        """Clients in the order of their ids, behind ``after``, and the id behind which there are more, or ``None``.

        Raises ``RegistryUnavailable``.
        """
        found = await self._registry.clients(after, limit + 1, node_id, prefix)
        last = found[limit - 1].client_id if len(found) > limit else None
        return [_remote_info(location) for location in found[:limit]], last

    async def disconnect(self, client_id: str) -> bool:
        """Disconnect a client; ``False`` when it is not connected. Then it cannot be called, and its row is gone.

        Raises ``RegistryUnavailable`` (the client may have been disconnected, and its row follows) and
        :class:`ElsewhereError`.
        """
        found = await self._disconnect_local(client_id)
        if self._peers is None:
            if not found and (location := await self._find_remote(client_id)) is not None:
                raise _disconnect_failed(location, "this node is alone")
            return found
        # Once more for a client that has moved meanwhile.
        for _ in range(2):
            location = await self._registry.find(client_id)
            if location is None:
                break
            if location.node_id == self._node.node_id:
                closed = await self._disconnect_local(client_id)
            else:
                closed = await self._disconnect_remote(self._peers, location)
            if closed:
                return True
        return found

    async def _disconnect_local(self, client_id: str) -> bool:
        opening = self._sessions.claim_in_progress(client_id)
        if opening is not None:
            await opening
        return await self._sessions.close(client_id, CloseCode.DISCONNECTED, _DISCONNECT_REASON)

    async def _disconnect_remote(self, peers: IPeerClient, location: Location) -> bool:
        if not location.live and self._membership.is_stable():
            # A dead node's.
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
        if location is None or location.node_id == self._node.node_id:
            return None
        self._check_liveness_known(location)
        return location if location.live else None

    def _check_liveness_known(self, location: Location) -> None:
        """Raise ``RegistryUnavailable`` where it is too early to tell whether a client's node is dead."""
        if not location.live and not self._membership.is_stable():
            raise RegistryUnavailableError("it cannot be told yet whether the node that had this client is still there")

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
    """Seconds since 1970 as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
