"""Tests of gateway.cluster.membership."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.membership import Fleet
from gateway.registry.interface import NodeStatus, RegistryUnavailable
from tests.cluster.fakes import status


class FakeRegistry:
    """Lists what the test says."""

    def __init__(self) -> None:
        self.listed: Any = []
        self.looked = 0

    def nodes(self) -> Deferred[list[NodeStatus]]:
        self.looked += 1
        if isinstance(self.listed, Deferred):
            return self.listed
        return fail(self.listed) if isinstance(self.listed, Exception) else succeed(self.listed)


class FleetTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.registry = FakeRegistry()
        self.is_steady = True
        self.fleet = Fleet(self.registry, "a", lambda: self.is_steady)
        self.seen: list[list[str]] = []
        self.gone: list[str] = []
        self.fleet.watchers.append(lambda nodes: self.seen.append(sorted(node.node_id for node in nodes)))
        self.fleet.mourners.append(self.gone.append)

    def look(self, *names: str) -> None:
        self.registry.listed = [status(name) for name in names]
        self.successResultOf(self.fleet.look())

    def test_the_others(self) -> None:
        self.look("a", "b", "c")
        self.assertEqual(self.seen, [["b", "c"]])
        self.assertEqual((len(self.fleet), self.fleet.others()), (2, [status("b"), status("c")]))
        self.assertEqual((self.fleet.find("b"), self.fleet.find("a")), (status("b"), None))

    def test_those_that_are_gone(self) -> None:
        self.look("a", "b", "c")
        self.look("a", "c")
        self.look("a", "c")
        self.assertEqual((self.gone, self.seen), (["b"], [["b", "c"], ["c"], ["c"]]))

    def test_a_node_that_is_not_steady_calls_nobody_dead(self) -> None:
        self.look("b")
        self.is_steady = False
        self.look("c")
        self.assertEqual((self.gone, self.seen[-1]), ([], ["b", "c"]))
        self.is_steady = True
        self.look("c")
        self.assertEqual((self.gone, self.seen[-1]), (["b"], ["c"]))

    def test_a_registry_that_is_away_changes_nothing(self) -> None:
        self.look("b")
        self.registry.listed = RegistryUnavailable("away")
        self.successResultOf(self.fleet.look())
        self.assertEqual((self.seen, len(self.fleet)), ([["b"]], 1))

    def test_an_error_is_logged_and_the_next_look_is_made(self) -> None:
        self.registry.listed = ZeroDivisionError()
        self.successResultOf(self.fleet.look())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.look("b")
        self.assertEqual(len(self.fleet), 1)

    def test_one_look_at_a_time(self) -> None:
        self.registry.listed = waiting = Deferred()
        looks = [self.fleet.look(), self.fleet.look()]
        self.assertEqual(self.registry.looked, 1)
        waiting.callback([status("b")])
        for look in looks:
            self.successResultOf(look)
        self.look("b")
        self.assertEqual(self.registry.looked, 2)

    def test_the_emptiest_is_filled_evenly_between_two_looks(self) -> None:
        self.registry.listed = [
            status("b", clients=98),
            status("c", clients=96),
            status("d", state="draining"),
            status("e", clients=100),
        ]
        self.successResultOf(self.fleet.look())
        chosen = [node and node.node_id for node in (self.fleet.emptiest() for _ in range(7))]
        self.assertEqual((chosen[:2], sorted(chosen[2:6])), (["c", "c"], ["b", "b", "c", "c"]))
        self.assertIsNone(chosen[6])
        self.successResultOf(self.fleet.look())
        self.assertIsNotNone(self.fleet.emptiest())
