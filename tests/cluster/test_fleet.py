"""Tests of gateway.cluster.membership."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.membership import NodeDirectory
from gateway.registry.interface import NodeStatus, RegistryUnavailableError
from tests.cluster.fakes import node_status


class FakeNodeRegistry:
    """Lists what the test says."""

    def __init__(self) -> None:
        self.result: Any = []
        self.reads = 0

    def nodes(self) -> Deferred[list[NodeStatus]]:
        self.reads += 1
        if isinstance(self.result, Deferred):
            return self.result
        return fail(self.result) if isinstance(self.result, Exception) else succeed(self.result)


class NodeDirectoryTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.registry = FakeNodeRegistry()
        self.is_stable = True
        self.node_directory = NodeDirectory(self.registry, "a", lambda: self.is_stable)
        self.seen: list[list[str]] = []
        self.gone: list[str] = []
        self.node_directory.on_nodes_changed.append(
            lambda nodes: self.seen.append(sorted(node.node_id for node in nodes))
        )
        self.node_directory.on_node_down.append(self.gone.append)

    def refresh(self, *names: str) -> None:
        self.registry.result = [node_status(name) for name in names]
        self.successResultOf(self.node_directory.refresh())

    def test_the_others(self) -> None:
        self.refresh("a", "b", "c")
        self.assertEqual(self.seen, [["b", "c"]])
        self.assertEqual(
            (len(self.node_directory), self.node_directory.peer_nodes()), (2, [node_status("b"), node_status("c")])
        )
        self.assertEqual((self.node_directory.find("b"), self.node_directory.find("a")), (node_status("b"), None))

    def test_those_that_are_gone(self) -> None:
        self.refresh("a", "b", "c")
        self.refresh("a", "c")
        self.refresh("a", "c")
        self.assertEqual((self.gone, self.seen), (["b"], [["b", "c"], ["c"], ["c"]]))

    def test_a_node_that_is_not_steady_calls_nobody_dead(self) -> None:
        self.refresh("b")
        self.is_stable = False
        self.refresh("c")
        self.assertEqual((self.gone, self.seen[-1]), ([], ["b", "c"]))
        self.is_stable = True
        self.refresh("c")
        self.assertEqual((self.gone, self.seen[-1]), (["b"], ["c"]))

    def test_a_registry_that_is_away_changes_nothing(self) -> None:
        self.refresh("b")
        self.registry.result = RegistryUnavailableError("away")
        self.successResultOf(self.node_directory.refresh())
        self.assertEqual((self.seen, len(self.node_directory)), ([["b"]], 1))

    def test_an_error_is_logged_and_the_next_look_is_made(self) -> None:
        self.registry.result = ZeroDivisionError()
        self.successResultOf(self.node_directory.refresh())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.refresh("b")
        self.assertEqual(len(self.node_directory), 1)

    def test_one_look_at_a_time(self) -> None:
        self.registry.result = waiting = Deferred()
        looks = [self.node_directory.refresh(), self.node_directory.refresh()]
        self.assertEqual(self.registry.reads, 1)
        waiting.callback([node_status("b")])
        for look in looks:
            self.successResultOf(look)
        self.refresh("b")
        self.assertEqual(self.registry.reads, 2)

    def test_the_emptiest_is_filled_evenly_between_two_looks(self) -> None:
        self.registry.result = [
            node_status("b", clients=98),
            node_status("c", clients=96),
            node_status("d", state="draining"),
            node_status("e", clients=100),
        ]
        self.successResultOf(self.node_directory.refresh())
        chosen = [node and node.node_id for node in (self.node_directory.least_loaded() for _ in range(7))]
        self.assertEqual((chosen[:2], sorted(chosen[2:6])), (["c", "c"], ["b", "b", "c", "c"]))
        self.assertIsNone(chosen[6])
        self.successResultOf(self.node_directory.refresh())
        self.assertIsNotNone(self.node_directory.least_loaded())
