"""The live nodes, as this one last saw them in the registry.

It looks after every heartbeat of its own. Who is no longer listed is gone, but only to a node that is steady: to any
other all leases may look as if they had run out.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.registry.interface import IRegistry, NodeStatus, RegistryUnavailable


class Fleet:
    """The other nodes. ``steady`` tells whether this node may call another dead."""

    _log = Logger()

    def __init__(self, registry: IRegistry, node_id: str, steady: Callable[[], bool]) -> None:
        self._registry = registry
        self._node_id = node_id
        self._steady = steady
        self._nodes: dict[str, NodeStatus] = {}
        #: told of the list of other nodes each time that it is read anew
        self.watchers: list[Callable[[list[NodeStatus]], None]] = []
        #: told of the node_id of each that is gone
        self.mourners: list[Callable[[str], None]] = []
        self._looking: Deferred[None] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    def others(self) -> list[NodeStatus]:
        """The other live nodes."""
        return list(self._nodes.values())

    def find(self, node_id: str) -> NodeStatus | None:
        """Another live node."""
        return self._nodes.get(node_id)

    def emptiest(self) -> NodeStatus | None:
        """The other node that takes clients and has the most room, or ``None`` if none has any. Whoever is told of it
        sends one client there: that is counted until the list is read anew."""
        roomy = [node for node in self._nodes.values() if node.state == "up" and node.clients < node.capacity]
        if not roomy:
            return None
        node = max(roomy, key=lambda node: node.capacity - node.clients)
        self._nodes[node.node_id] = attrs.evolve(node, clients=node.clients + 1)
        return node

    def look(self) -> Deferred[None]:
        """Read the list anew; one reading at a time. Does not fail."""
        waiter: Deferred[None] = Deferred()
        looking = self._looking
        if looking is None:
            looking = self._looking = Deferred.fromCoroutine(self._look()).addErrback(self._failed)
            looking.addCallback(self._looked)
            if looking.called:
                self._looking = None
        looking.addCallback(lambda _: waiter.callback(None))
        return waiter

    def _looked(self, _: object) -> None:
        self._looking = None

    async def _look(self) -> None:
        seen = {node.node_id: node for node in await self._registry.nodes() if node.node_id != self._node_id}
        missing = self._nodes.keys() - seen.keys()
        if missing and not self._steady():
            seen.update((node_id, self._nodes[node_id]) for node_id in missing)
            missing = set()
        for node_id in seen.keys() - self._nodes.keys():
            node = seen[node_id]
            self._log.info("node {name} is there, at {url}", **_shown(node))
        gone = [self._nodes[node_id] for node_id in sorted(missing)]
        self._nodes = seen
        for node in gone:
            if node.state == "up":
                self._log.warn("node {name}, at {url}, is gone: it ended, or its lease ran out", **_shown(node))
            else:
                self._log.info("node {name}, at {url}, is gone, which it said beforehand", **_shown(node))
            for mourn in self.mourners:
                mourn(node.node_id)
        for watch in self.watchers:
            watch(list(seen.values()))

    def _failed(self, failure: Failure) -> None:
        if not failure.check(RegistryUnavailable):
            self._log.failure("error in looking at the other nodes", failure)


def _shown(node: NodeStatus) -> dict[str, str]:
    """What stands in a log line: the registry is not to be trusted with that."""
    return {"name": ascii(node.name)[1:-1], "url": ascii(node.peer_url)[1:-1]}
