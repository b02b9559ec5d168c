"""The faults, injected into a fleet under load. A fault returns its own problems; run.py checks what all have in common."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import websockets

from tests.chaos.fleet import TIMEOUT, Fleet, Timing, wait_until
from tests.chaos.ledger import Call

Problems = list[str]

#: duration of a partition, in leases
CUT_LEASES = 4
#: clients that connect while the database is slow
NEW_CLIENTS = 50


@dataclass(frozen=True)
class Scenario:
    """One fault.

    ``bound`` returns how long a client may be unreachable, in seconds; ``made_of`` describes that. ``stay``: no
    connection of a client may end.
    """

    name: str
    fault: Callable[[Fleet], Awaitable[Problems]]
    bound: Callable[[Fleet], float]
    made_of: str
    stay: bool = False
    network: bool = False
    far_database: bool = False
    #: the share of calls with a response time of up to two seconds
    slow: float = 0.0
    timing: Timing = field(default_factory=Timing)


async def kill_node(fleet: Fleet) -> Problems:
    """Kill a node with SIGKILL."""
    dead = fleet.nodes[0]
    fleet.say(f"kill -9 of a node with {int(await dead.metric('wsgateway_clients'))} clients")
    dead.kill()
    await asyncio.sleep(2 * fleet.timing.lease)
    return []


async def stop_node(fleet: Fleet) -> Problems:
    """Stop a node with SIGSTOP for three leases, then continue it."""
    stopped = fleet.nodes[0]
    fleet.say(f"SIGSTOP of a node with {int(await stopped.metric('wsgateway_clients'))} clients, for three leases")
    stopped.kill(signal.SIGSTOP)
    await asyncio.sleep(3 * fleet.timing.lease)
    fleet.say("SIGCONT")
    stopped.kill(signal.SIGCONT)
    await asyncio.sleep(fleet.timing.lease)
    return []


async def kill_database(fleet: Fleet) -> Problems:
    """Kill MariaDB with SIGKILL, and start it again."""
    # Fills the location cache of every node.
    await fleet.all_answer(TIMEOUT)
    homes = await fleet.node_by_client()
    fleet.say(f"kill -9 of MariaDB, for {fleet.size.outage:g} s")
    began = time.monotonic()
    await asyncio.to_thread(fleet.database.kill)
    await asyncio.sleep(fleet.size.outage)
    fleet.say("MariaDB is started again")
    await asyncio.to_thread(fleet.database.start)
    ended = time.monotonic()
    while fleet.ledger.in_flight and any(fleet.ledger.calls(lambda call: not call.outcome and call.made_at < ended)):
        await asyncio.sleep(0.1)

    during = fleet.ledger.calls(lambda call: began < call.made_at < ended and call.client in homes)
    local = [call for call in during if call.via == str(homes[call.client].client_port)]
    others = [call for call in during if call.via != str(homes[call.client].client_port)]
    fleet.say(f"during the outage: {_summary('local', local)}; {_summary('through a peer', others)}")
    failed = [call for call in local if call.outcome != "answered"]
    return [f"{len(failed)} local calls failed during the database outage"] if failed else []


def _summary(what: str, calls: list[Call]) -> str:
    outcomes = Counter(f"{call.code}" if call.outcome == "failed" else call.outcome for call in calls)
    return f"{what} " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())


async def partition(fleet: Fleet) -> Problems:
    """Partition two nodes from each other, but not from the rest."""
    seconds = CUT_LEASES * fleet.timing.lease
    if fleet.network is not None:
        fleet.say(f"two nodes are partitioned, for {seconds:g} s")
        fleet.network.cut(0, 1)
    else:
        fleet.say(f"not root: the peer urls of two nodes are unreachable, for {seconds:g} s")
        for proxy in fleet.to_peers[:2]:
            proxy.send_command("cut")
    await asyncio.sleep(seconds)
    fleet.say("the partition is healed")
    if fleet.network is not None:
        fleet.network.restore(0, 1)
    for proxy in fleet.to_peers:
        proxy.send_command("mend")
    return []


async def slow_database(fleet: Fleet) -> Problems:
    """Delay all data to and from the database, and connect new clients meanwhile."""
    assert fleet.to_database is not None
    fleet.say(f"the database answers {fleet.size.latency * 2000:g} ms later, for three leases")
    fleet.to_database.send_command(f"delay {fleet.size.latency}")
    newcomers = [
        asyncio.ensure_future(_connect_new_client(fleet, f"newcomer-{number}")) for number in range(NEW_CLIENTS)
    ]
    began, unready = time.monotonic(), 0
    while time.monotonic() < began + 3 * fleet.timing.lease:
        for node in fleet.nodes:
            unready += (await node.request("GET", "/readyz")).status != 200
        await asyncio.sleep(0.2)
    took = await asyncio.gather(*newcomers)
    fleet.say(f"{len(took)} new clients were connected within {max(took):.1f} s")
    fleet.to_database.send_command("delay 0")
    problems = [f"nodes were not ready {unready} times"] if unready else []
    if max(took) > fleet.timing.lease + fleet.timing.reconnect:
        problems.append(f"a new client needed {max(took):.1f} s to connect")
    return problems


async def _connect_new_client(fleet: Fleet, client_id: str) -> float:
    """Connect, with as many attempts as necessary, and disconnect; return the seconds it took."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError, websockets.InvalidHandshake, asyncio.TimeoutError):
            async with random.choice(fleet.nodes).connect(client_id, open_timeout=5):
                return time.monotonic() - began
        await asyncio.sleep(random.uniform(*fleet.timing.backoff))


async def restart_storm(fleet: Fleet) -> Problems:
    """Kill a node and start it at once; all its clients reconnect within half a second."""
    dead = fleet.nodes[0]
    count = int(await dead.metric("wsgateway_clients"))
    fleet.say(f"kill -9 of a node with {count} clients, and restart; they reconnect at once")
    dead.kill()
    await dead.ended()
    began = time.monotonic()
    await fleet.restart(0)
    await wait_until(fleet.all_connected, "all clients are connected again")
    fleet.say(f"all are connected again after {time.monotonic() - began:.1f} s")
    return []


async def drain_node(fleet: Fleet) -> Problems:
    """Drain a node, as for an upgrade, and start it again."""
    drained, other, _ = fleet.nodes
    nodes = (await other.request("GET", "/v1/nodes")).json["nodes"]
    node_id = next(node["node_id"] for node in nodes if node["name"] == "node-0")
    fleet.say(f"a node with {int(await drained.metric('wsgateway_clients'))} clients is drained, through another")
    began = time.monotonic()
    status = (await other.request("POST", f"/v1/nodes/{node_id}/drain", b"")).status
    problems = [] if status == 202 else [f"the drain was answered with {status}"]
    exit_status = await drained.ended()
    problems += [f"the node exited with status {exit_status}"] if exit_status else []
    fleet.say(f"it exited after {time.monotonic() - began:.1f} s")
    problems += _uncertain_calls(fleet, began)
    await fleet.restart(0)
    return problems


async def rolling_restart(fleet: Fleet) -> Problems:
    """Stop one node after the other with SIGTERM, and start it again, as for an upgrade."""
    problems, began = [], time.monotonic()
    for number, node in enumerate(fleet.nodes[:]):
        fleet.say(f"SIGTERM to node {number}, with {int(await node.metric('wsgateway_clients'))} clients")
        node.kill(signal.SIGTERM)
        status = await node.ended()
        if status:
            problems.append(f"node {number} exited with status {status}")
        await fleet.restart(number)
    fleet.say(f"all have been restarted, {time.monotonic() - began:.1f} s later")
    return problems + _uncertain_calls(fleet, began)


def _uncertain_calls(fleet: Fleet, began: float) -> Problems:
    """Report calls with an unknown result: a graceful exit must leave none."""
    outcomes = ("failed", "cut off", "lost")
    unknown = fleet.ledger.calls(lambda call: call.made_at > began and call.outcome in outcomes and call.sent)
    what = Counter(f"{call.code or call.outcome}" for call in unknown)
    return [f"{len(unknown)} calls failed that clients may have received: {dict(what)}"] if unknown else []


def _reconnect_bound(fleet: Fleet) -> float:
    return fleet.timing.lease + fleet.timing.reconnect


def _partition_bound(fleet: Fleet) -> float:
    # With proxies instead of namespaces, clients of a node behind a cut proxy are reachable only through that node.
    return _reconnect_bound(fleet) + (0 if fleet.network else CUT_LEASES * fleet.timing.lease)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("kill-node", kill_node, _reconnect_bound, "lease + reconnect"),
        Scenario(
            "stop-node",
            stop_node,
            lambda fleet: fleet.timing.idle + _reconnect_bound(fleet),
            "idle time-out of the clients + lease + reconnect",
        ),
        Scenario(
            "kill-database",
            kill_database,
            lambda fleet: fleet.size.outage + _reconnect_bound(fleet),
            "outage + lease + reconnect",
            stay=True,
        ),
        Scenario("partition", partition, _partition_bound, "lease + reconnect", stay=True, network=True),
        Scenario(
            "slow-database",
            slow_database,
            _reconnect_bound,
            "lease + reconnect",
            stay=True,
            far_database=True,
            timing=Timing(lease=5.0),
        ),
        Scenario("drain-node", drain_node, lambda fleet: fleet.timing.reconnect, "reconnect", slow=0.05),
        Scenario(
            "rolling-restart",
            rolling_restart,
            lambda fleet: 1.0,
            "the delay of a goaway, and an opening handshake",
            slow=0.05,
            timing=Timing(drain=15.0),
        ),
        Scenario(
            "restart-storm",
            restart_storm,
            # They reconnect at once, but a busy machine may need as long as above.
            lambda fleet: Timing().lease + Timing().reconnect,
            "lease + reconnect",
            timing=Timing(backoff=(0.5, 0.5)),
        ),
    )
}
