"""The checks at the end of a run, when all faults are over, and those of bounds at any time.

f   exactly one connection and one row, the same, for each client that is there; no row for one that is not; each
    node can call each client
h   no memory or queue beyond its bound, or left over
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.rpc.pending import Reply

if TYPE_CHECKING:
    from tests.simulation.fleet import Fleet
    from tests.simulation.process import NodeProcess

#: time for the calls at the end, in seconds
CALL_TIME = 6.0
#: how often it is looked what is left over
SAMPLES = 4
#: calls at once: fewer than the lowest --max-calls of a run
CALLS_AT_ONCE = 20


def check_bounds(fleet: Fleet) -> None:
    """Check what must hold at any time (h)."""
    for process in fleet.processes:
        if not process.is_running or process.node is None:
            continue
        dispatcher = process.node.components.dispatcher
        if len(dispatcher._locations) > 16384 or dispatcher.calls_in_flight() > 100_000:
            fleet.ledger.violated("h", f"{process.name} has more in memory than allowed")


class FinalChecks:
    """The checks of one run."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._ledger = fleet.ledger

    def run(self) -> None:
        self._check_clients()
        self._check_rows()
        self._check_left_over()
        self._check_calls()

    def _nodes(self) -> list[NodeProcess]:
        return [process for process in self._fleet.processes if process.is_up]

    def _check_clients(self) -> None:
        fleet = self._fleet
        if len(self._nodes()) != len(fleet.processes):
            self._ledger.violated("f", "not every node is up")
        for client in fleet.clients:
            holders = {
                process.name: process.node.sessions.generation(client.client_id)
                for process in self._nodes()
                if process.node.sessions.generation(client.client_id)
            }
            if client.is_connected != client.is_running or len(holders) != client.is_running:
                self._ledger.violated(
                    "f",
                    f"{client.client_id} has {client.connections()} connections, and is connected to {holders}",
                )

    def _check_rows(self) -> None:
        fleet = self._fleet
        rows = {
            client_id: (node_id, generation)
            for client_id, node_id, generation in fleet.database.rows(
                "SELECT c.client_id, n.node_id, c.generation FROM clients c LEFT JOIN nodes n ON n.id = c.node"
            )
        }
        held = {}
        for process in self._nodes():
            sessions = process.node.sessions
            for client_id in sessions._table.client_ids():
                held[client_id] = (process.node.node_id, sessions.generation(client_id))
        for client_id in sorted(rows.keys() | held.keys()):
            if rows.get(client_id) != held.get(client_id):
                self._ledger.violated(
                    "f", f"{client_id} has the row {rows.get(client_id)} and the session {held.get(client_id)}"
                )
        nodes = fleet.database.rows("SELECT node_id FROM nodes ORDER BY node_id")
        if sorted(process.node.node_id for process in self._nodes()) != [node_id for (node_id,) in nodes]:
            self._ledger.violated("f", f"{len(nodes)} nodes have rows")

    def _check_left_over(self) -> None:
        if self._ledger.outstanding():
            self._ledger.violated("a", f"{self._ledger.outstanding()} messages have no outcome")
        left: dict[str, dict[str, int]] = {process.name: sizes(process) for process in self._nodes()}
        # What goes on at one moment, such as a heartbeat, is not left over.
        for _ in range(SAMPLES):
            self._fleet.scheduler.run(self._fleet.scheduler.now + 0.37)
            for process in self._nodes():
                now = sizes(process)
                left[process.name] = {name: size for name, size in left[process.name].items() if size and now[name]}
        for name, of_node in left.items():
            if of_node:
                self._ledger.violated("h", f"{name} has something left over: {of_node}")

    def _check_calls(self) -> None:
        """Call each client from each node."""
        fleet = self._fleet
        for client in fleet.clients:
            client.always_answers()
        results: dict[tuple[str, str], Any] = {}
        for process in self._nodes():
            for at in range(0, len(fleet.clients), CALLS_AT_ONCE):
                for client in fleet.clients[at : at + CALLS_AT_ONCE]:
                    if not client.is_running:
                        continue
                    self._call(process, client.client_id, results)
                fleet.scheduler.run(fleet.scheduler.now + 0.5)
        fleet.scheduler.run(fleet.scheduler.now + CALL_TIME)
        for (name, client_id), result in results.items():
            if not isinstance(result, Reply):
                self._ledger.violated("f", f"{name} cannot call {client_id}: {result and result.getErrorMessage()}")

    def _call(self, process: NodeProcess, client_id: str, results: dict[tuple[str, str], Any]) -> None:
        message = self._ledger.start(client_id, None, is_call=True, timeout=5.0, way=None, expects_outcome=False)
        key = (process.name, client_id)
        results[key] = None

        def call() -> None:
            called = process.node.components.dispatcher.call(client_id, "m", b'{"u":%d}' % message.number, 5.0)
            called.addBoth(lambda result: results.__setitem__(key, result))

        process.reactor.run(call)


def sizes(process: NodeProcess) -> dict[str, int]:
    """Return the sizes of what must be empty when nothing goes on."""
    components = process.node.components
    dispatcher, registry, peers = components.dispatcher, components.registry, components.peer_client
    return {
        "calls in flight": dispatcher.calls_in_flight(),
        "calls through peers": len(dispatcher._remote),
        "deadlines": len(dispatcher._remote._deadlines),
        "requests to peers": peers.requests_in_flight(),
        "ownership notices": len(peers._outboxes),
        "handoffs": dispatcher.handoffs(),
        "sessions told to go": len(dispatcher._local.goaway_sessions),
        "superseded sessions": len(dispatcher._superseded),
        "claims and releases": len(registry._batcher) if registry._batcher else 0,
        "clients with messages that wait": len(dispatcher._queues),
        "clients with messages of peers that wait": sum(
            len(connection.client_locks.held) for connection in components.backend_endpoint.peer_factory._connections
        ),
        "look-ups": len(dispatcher._locations._lookups),
        "conflicts": len(components.reconciler._conflicts),
        "orphaned rows": len(dispatcher.orphaned_rows),
        "requests of peers": sum(
            len(connection._in_progress) for connection in components.backend_endpoint.peer_factory._connections
        ),
    }
