"""Tests of the plan functions of gateway.cluster.rebalance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.rebalance import (
    CountHistory,
    MigrationPlans,
    intersect_plans,
    is_unbalanced,
    plan_migrations,
    split_proportionally,
    target_counts,
)
from gateway.registry.interface import NodeStatus
from tests.fakes.cluster import node_status


def apply_plans(nodes: list[NodeStatus], plans: MigrationPlans) -> dict[str, int]:
    """Return the counts of all nodes after every plan has been carried out."""
    counts = {node.node_id: node.clients for node in nodes}
    for source, targets in plans.items():
        for node_id, number in targets.items():
            counts[source] -= number
            counts[node_id] += number
    return counts


@st.composite
def node_lists(draw: st.DrawFn) -> list[NodeStatus]:
    """Make nodes, each with a URL of its own."""
    return [
        node_status(
            f"n{number}",
            clients=draw(st.integers(0, 5000) | st.just(0)),
            capacity=draw(st.sampled_from([1000, 5000, 5001, 20000, 1_000_000]) | st.integers(1, 10_000)),
            state=draw(st.sampled_from(["up", "up", "up", "draining"])),
        )
        for number in range(draw(st.integers(1, 12)))
    ]


class MigrationPlanTests(SynchronousTestCase):
    def plan(self, *clients: int) -> MigrationPlans:
        return plan_migrations(
            [node_status(f"n{number}", clients=count, capacity=5000) for number, count in enumerate(clients)]
        )

    def test_fourth_node_joins_three(self) -> None:
        self.assertEqual(self.plan(1000, 1000, 1000, 0), {f"n{number}": {"n3": 250} for number in range(3)})

    def test_single_node_and_none(self) -> None:
        self.assertEqual((self.plan(1000), self.plan(), self.plan(0, 0)), ({}, {}, {}))
        self.assertFalse(is_unbalanced([], 1.2))

    def test_in_proportion_to_what_is_lacking(self) -> None:
        self.assertEqual(self.plan(900, 0, 300), {"n0": {"n1": 400, "n2": 100}})

    def test_every_node_above_the_mean_moves(self) -> None:
        """Even one that is only a little above, or the new node would not reach the mean."""
        plan = self.plan(1500, 1100, 1000, 0)
        self.assertEqual(
            {node_id: sum(targets.values()) for node_id, targets in plan.items()}, {"n0": 600, "n1": 200, "n2": 100}
        )

    def test_share_of_the_capacity(self) -> None:
        small, large = (
            node_status("small", clients=500, capacity=1000),
            node_status("large", clients=500, capacity=9000),
        )
        self.assertEqual(plan_migrations([small, large]), {"small": {"large": 400}})
        self.assertTrue(is_unbalanced([small, large], 1.2))

    def test_none_to_a_node_that_is_draining_or_has_no_url(self) -> None:
        full = node_status("a", clients=90)
        self.assertEqual(plan_migrations([full, node_status("b", state="draining")]), {})
        self.assertEqual(plan_migrations([full, NodeStatus("b", "b", "", "ws://b", 0, 100, "up", 0.5)]), {})

    def test_behind_two_ports(self) -> None:
        """Nodes behind one load balancer move clients to those behind another."""
        nodes = [
            NodeStatus(f"n{number}", "n", f"ws://{number // 2}", "ws://n", clients, 1000, "up", 0.5)
            for number, clients in enumerate((400, 400, 0, 0))
        ]
        self.assertEqual(plan_migrations(nodes), {"n0": {"n2": 100, "n3": 100}, "n1": {"n2": 100, "n3": 100}})

    def test_is_unbalanced(self) -> None:
        nodes = [node_status("a", clients=12), node_status("b", clients=8)]
        self.assertTrue(is_unbalanced(nodes, 1.19))
        self.assertFalse(is_unbalanced(nodes, 1.2))
        self.assertTrue(is_unbalanced(nodes, 1.3, 0.81))
        self.assertFalse(is_unbalanced(nodes, 1.3, 0.8))

    def test_intersect_plans(self) -> None:
        self.assertEqual(intersect_plans({"b": 5, "c": 2, "d": 1}, {"b": 3, "c": 4}), {"b": 3, "c": 2})

    @given(node_lists())
    def test_all_plans_together(self, nodes: list[NodeStatus]) -> None:
        plan, wanted = plan_migrations(nodes), target_counts(nodes)
        counts = apply_plans(nodes, plan)
        up = [node for node in nodes if node.state == "up"]
        clients, capacity = sum(node.clients for node in up), sum(node.capacity for node in up)
        self.assertEqual(sum(counts.values()), sum(node.clients for node in nodes))
        for node in nodes:
            if node.state != "up":
                self.assertEqual(counts[node.node_id], node.clients)
                continue
            mean = clients * node.capacity / capacity
            self.assertLessEqual(abs(wanted[node.node_id] - mean), 1)
            if clients <= capacity:
                self.assertEqual(counts[node.node_id], wanted[node.node_id])
            elif node.node_id in plan:
                self.assertGreaterEqual(counts[node.node_id], wanted[node.node_id])
            else:
                self.assertLessEqual(counts[node.node_id], max(node.clients, node.capacity))
        for source, targets in plan.items():
            self.assertNotIn(source, targets)
            self.assertTrue(all(number > 0 for number in targets.values()))
            self.assertTrue(plan.keys().isdisjoint(targets))

    @given(node_lists(), st.randoms())
    def test_order_of_the_nodes_does_not_matter(self, nodes: list[NodeStatus], random: object) -> None:
        shuffled = list(nodes)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        self.assertEqual(plan_migrations(nodes), plan_migrations(shuffled))

    @given(node_lists())
    def test_balanced_after_one_plan(self, nodes: list[NodeStatus]) -> None:
        counts = apply_plans(nodes, plan_migrations(nodes))
        self.assertEqual(
            plan_migrations(
                [node_status(n.node_id, clients=counts[n.node_id], capacity=n.capacity, state=n.state) for n in nodes]
            ),
            {},
        )

    @given(st.lists(st.integers(0, 1000), max_size=10), st.integers(0, 10_000))
    def test_split(self, weights: list[int], number: int) -> None:
        total = sum(weights)
        if total == 0:
            return
        parts = split_proportionally(number % (total + 1), weights)
        self.assertEqual(sum(parts), number % (total + 1))
        for part, weight in zip(parts, weights, strict=True):
            self.assertTrue(0 <= part <= weight)
            self.assertLess(abs(part - (number % (total + 1)) * weight / total), 1)


class CountHistoryTests(SynchronousTestCase):
    def test_counts_of_one_time(self) -> None:
        history = CountHistory()
        for node_id, first in (("a", 0.0), ("b", 2.0), ("c", 4.0)):
            for heartbeat in range(3):
                at = first + 5.0 * heartbeat
                history.add(node_id, at, round(100 * at))
        at = history.last_common_time()
        self.assertEqual(at, 10.0)
        self.assertEqual([history.count_at(node_id, at) for node_id in "abc"], [1000, 1000, 1000])

    def test_known_heartbeat(self) -> None:
        history = CountHistory()
        history.add("a", 1.0, 5)
        history.add("a", 1.02, 6)
        self.assertEqual(history.count_at("a", 9.0), 5)

    def test_time_before_the_first_count(self) -> None:
        history = CountHistory()
        history.add("a", 10.0, 5)
        self.assertEqual(history.count_at("a", 1.0), 5)

    def test_node_that_is_gone(self) -> None:
        history = CountHistory()
        history.add("a", 1.0, 5)
        history.add("b", 9.0, 5)
        history.keep_only(["b", "c"])
        self.assertEqual(history.last_common_time(), 9.0)

    @given(st.lists(st.tuples(st.floats(0.1, 10.0), st.integers(0, 10**6)), min_size=1, max_size=20), st.floats(0, 300))
    def test_between_the_counts_around_it(self, steps: list[tuple[float, int]], at: float) -> None:
        history, time = CountHistory(), 0.0
        for seconds, clients in steps:
            time += seconds
            history.add("a", time, clients)
        kept = [clients for _, clients in steps][-8:]
        self.assertTrue(min(kept) <= history.count_at("a", at) <= max(kept))
