"""What every registry promises: tests to be mixed into a test case that makes registries."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from gateway.registry import statements
from gateway.registry.interface import (
    Claim,
    ClaimSupersededError,
    IRegistry,
    LeaseLostError,
    NodeInfo,
    RegistryUnavailableError,
)
from gateway.registry.sql import SQLRegistry

LEASE = 15.0


def node_info(name: str) -> NodeInfo:
    """A node whose node_id is its name, filled up."""
    return NodeInfo(name.ljust(36, "-"), name, f"ws://{name}/", f"ws://{name}:81/", 1000)


class RegistryMixin:
    """Needs ``make()``: a registry on the one database of the test, not yet open. Node ``a`` has joined it."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.set_up_database()
        self.a = self.start_node("a")

    def set_up_database(self) -> None:
        """Prepare what ``make`` needs."""

    def make_registry(self) -> SQLRegistry:
        raise NotImplementedError

    def start_node(self, name: str) -> SQLRegistry:
        registry = self.make_registry()
        self.result_of(registry.open())
        self.result_of(registry.join(node_info(name)))
        self.addCleanup(lambda: self.result_of(registry.close()))
        return registry

    def result_of(self, deferred: Deferred[Any]) -> Any:
        """The result of a Deferred, a few milliseconds later at the most."""
        self.clock.pump([0.001] * 5)
        return self.successResultOf(deferred)

    def error_of(self, deferred: Deferred[Any], kind: type[Exception]) -> Any:
        self.clock.pump([0.001] * 5)
        return self.failureResultOf(deferred, kind).value

    def node_name_of(self, client_id: str) -> str | None:
        location = self.result_of(self.a.find(client_id))
        return None if location is None else location.node_name


class RegistryContractMixin(RegistryMixin):
    """Everything but claims over another node's: see ``claims``."""

    def test_provides_the_interface(self) -> None:
        self.assertTrue(verifyObject(IRegistry, self.a))

    def test_a_node_that_joined_is_shown_until_it_leaves(self) -> None:
        b = self.start_node("b")
        self.clock.advance(2)
        self.assertTrue(self.result_of(self.a.heartbeat("draining", 7)))
        first, second = self.result_of(b.nodes())
        self.assertEqual((first.name, first.state, first.clients, first.capacity), ("a", "draining", 7, 1000))
        self.assertEqual((second.name, second.state, second.public_url), ("b", "up", "ws://b/"))
        self.assertLess(first.heartbeat_age, 0.1)
        self.assertAlmostEqual(second.heartbeat_age, 2, places=1)
        self.result_of(self.a.leave())
        self.assertEqual([node.name for node in self.result_of(b.nodes())], ["b"])

    def test_joining_twice_is_joining_once(self) -> None:
        self.result_of(self.a.join(node_info("a")))
        self.assertEqual(len(self.result_of(self.a.nodes())), 1)
        self.result_of(self.a.claim("x", "h:1"))
        self.assertEqual(self.node_name_of("x"), "a")

    def test_a_claim_is_found_from_every_node(self) -> None:
        b = self.start_node("b")
        claim = self.result_of(self.a.claim("x", "10.0.0.1:5"))
        location = self.result_of(b.find("x"))
        self.assertEqual((location.client_id, location.node_id, location.node_name), ("x", "a".ljust(36, "-"), "a"))
        self.assertEqual((location.peer_url, location.address), ("ws://a:81/", "10.0.0.1:5"))
        self.assertEqual((location.generation, location.connected_at), (claim.generation, claim.connected_at))
        self.assertIsNone(self.result_of(b.find("y")))

    def test_many_look_ups_at_once_each_get_their_own_answer(self) -> None:
        for client_id in ("x", "y"):
            self.result_of(self.a.claim(client_id, client_id))
        asked = [self.a.find(client_id) for client_id in ("x", "y", "x", "z")]
        self.assertEqual([found and found.address for found in map(self.result_of, asked)], ["x", "y", "x", None])

    def test_an_impossible_client_id_is_nowhere(self) -> None:
        self.assertIsNone(self.result_of(self.a.find("\ud800")))
        self.error_of(self.a.claim("\ud800", "h:1"), ValueError)
        self.error_of(self.a.reclaim("x", 2**63, "h:1"), ValueError)
        self.result_of(self.a.release("\ud800", 1))
        self.result_of(self.a.release("x", 2**70))
        self.assertEqual(self.result_of(self.a.clients("", 10, prefix="\ud800")), [])
        self.assertEqual(self.result_of(self.a.clients("", 10, node_id="\ud800")), [])

    def test_text_that_cannot_be_stored_is_mended(self) -> None:
        info = node_info("c")
        self.result_of(self.a.join(NodeInfo(info.node_id, "c\ud800", "ws://c", "ws://c", 1)))
        self.result_of(self.a.claim("x", "\udcff:1"))
        self.assertEqual(self.result_of(self.a.find("x")).address, "?:1")
        self.assertIn("c?", [node.name for node in self.result_of(self.a.nodes())])

    def test_generations_grow_from_node_to_node(self) -> None:
        b = self.start_node("b")
        generations = []
        for registry in (self.a, b, b, self.a):
            generations.append(self.result_of(registry.claim("x", "h:1")).generation)
        self.assertEqual(generations, sorted(set(generations)))

    def test_generations_grow_across_a_removed_row(self) -> None:
        first = self.result_of(self.a.claim("x", "h:1"))
        self.result_of(self.a.release("x", first.generation))
        self.assertIsNone(self.node_name_of("x"))
        self.assertGreater(self.result_of(self.a.claim("x", "h:1")).generation, first.generation)

    def test_a_claim_takes_over(self) -> None:
        b = self.start_node("b")
        self.result_of(self.a.claim("x", "h:1"))
        self.result_of(b.claim("x", "h:2"))
        self.assertEqual(self.node_name_of("x"), "b")

    def test_a_late_release_never_removes_a_newer_claim(self) -> None:
        b = self.start_node("b")
        first = self.result_of(self.a.claim("x", "h:1"))
        second = self.result_of(self.a.claim("x", "h:2"))
        self.result_of(self.a.release("x", first.generation))
        self.assertEqual(self.result_of(self.a.find("x")).generation, second.generation)
        third = self.result_of(b.claim("x", "h:3"))
        self.result_of(self.a.release("x", second.generation))
        self.result_of(self.a.release("x", third.generation))  # another node's
        self.assertEqual(self.node_name_of("x"), "b")

    def test_of_several_claims_at_once_the_newest_wins(self) -> None:
        first, second, other, third = (self.a.claim(client_id, "h:1") for client_id in ("x", "x", "y", "x"))
        claim = self.result_of(third)
        self.failureResultOf(first, ClaimSupersededError)
        self.failureResultOf(second, ClaimSupersededError)
        self.assertIsInstance(self.result_of(other), Claim)
        self.assertEqual(self.result_of(self.a.find("x")).generation, claim.generation)

    def test_a_claim_that_is_cancelled_before_it_was_sent_leaves_nothing(self) -> None:
        first, second = self.a.claim("x", "h:1"), self.a.claim("x", "h:2")
        second.cancel()
        self.result_of(first)
        self.failureResultOf(second, CancelledError)
        self.assertEqual(self.result_of(self.a.find("x")).address, "h:1")

    def test_release_then_claim_at_once(self) -> None:
        first = self.result_of(self.a.claim("x", "h:1"))
        released, claimed = self.a.release("x", first.generation), self.a.claim("x", "h:2")
        claim = self.result_of(claimed)
        self.result_of(released)
        self.assertGreater(claim.generation, first.generation)
        self.assertEqual(self.result_of(self.a.find("x")).generation, claim.generation)

    def test_releases_of_one_claim_are_one(self) -> None:
        claim = self.result_of(self.a.claim("x", "h:1"))
        releases = [self.a.release("x", claim.generation) for _ in range(3)]
        releases[1].cancel()
        self.result_of(releases[0])
        self.result_of(releases[2])
        self.failureResultOf(releases[1], CancelledError)
        self.assertIsNone(self.node_name_of("x"))

    def test_nothing_is_claimed_before_joining_or_after_leaving(self) -> None:
        registry = self.make_registry()
        self.result_of(registry.open())
        self.addCleanup(lambda: self.result_of(registry.close()))
        self.error_of(registry.claim("x", "h:1"), LeaseLostError)
        self.error_of(registry.heartbeat("up", 0), RegistryUnavailableError)
        self.result_of(registry.release("x", 1))
        self.result_of(registry.leave())
        self.result_of(self.a.leave())
        self.error_of(self.a.claim("x", "h:1"), LeaseLostError)
        self.error_of(self.a.heartbeat("up", 0), RegistryUnavailableError)

    def test_leaving_removes_what_is_still_its_own(self) -> None:
        b = self.start_node("b")
        for client_id in ("w", "x", "y"):
            self.result_of(self.a.claim(client_id, "h:1"))
        self.result_of(b.claim("x", "h:2"))
        self.result_of(self.a.leave())
        self.assertEqual([found.client_id for found in self.result_of(b.clients("", 10))], ["x"])
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 1))
        self.assertEqual(self.result_of(b.reap(10)), 0)

    def test_without_a_lease_nothing_is_claimed_but_releases_go(self) -> None:
        b = self.start_node("b")
        claim = self.result_of(self.a.claim("x", "h:1"))
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 0))
        self.error_of(self.a.claim("y", "h:1"), LeaseLostError)
        # It is not for the registry to say that the node is dead.
        self.assertFalse(self.result_of(b.find("x")).live)
        self.assertEqual(self.result_of(b.clients("", 10)), [])
        self.result_of(self.a.release("x", claim.generation))
        self.assertFalse(self.result_of(self.a.heartbeat("up", 1)))
        self.assertIsNone(self.node_name_of("x"))
        self.assertIsInstance(self.result_of(self.a.claim("y", "h:1")), Claim)

    def test_a_heartbeat_after_the_lease_ran_out_says_so_once(self) -> None:
        self.clock.advance(LEASE - 1)
        self.assertTrue(self.result_of(self.a.heartbeat("up", 0)))
        self.clock.advance(LEASE + 1)
        self.assertFalse(self.result_of(self.a.heartbeat("up", 0)))
        self.assertTrue(self.result_of(self.a.heartbeat("up", 0)))

    def test_a_dead_node_is_reaped_in_pieces(self) -> None:
        b = self.start_node("b")
        for number in range(5):
            self.result_of(self.a.claim(f"c{number}", "h:1"))
        self.result_of(b.claim("mine", "h:1"))
        self.assertEqual(self.result_of(b.reap(10)), 0)
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 1))
        self.assertEqual([self.result_of(b.reap(2)) for _ in range(4)], [2, 2, 1, 0])
        self.assertEqual([found.client_id for found in self.result_of(b.clients("", 10))], ["mine"])
        self.assertFalse(self.result_of(self.a.heartbeat("up", 5)))  # its row is there again
        self.assertEqual({node.name for node in self.result_of(b.nodes())}, {"a", "b"})

    def test_a_node_that_comes_back_while_it_is_reaped_is_spared(self) -> None:
        b = self.start_node("b")
        for number in range(4):
            self.result_of(self.a.claim(f"c{number}", "h:1"))
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 0))
        self.assertEqual(self.result_of(b.reap(2)), 2)
        self.assertFalse(self.result_of(self.a.heartbeat("up", 4)))
        self.assertEqual(self.result_of(b.reap(2)), 0)
        self.assertEqual([found.client_id for found in self.result_of(b.clients("", 10))], ["c2", "c3"])

    def test_a_node_never_reaps_itself(self) -> None:
        self.result_of(self.a.claim("x", "h:1"))
        self.clock.advance(LEASE + 1)
        self.assertEqual(self.result_of(self.a.reap(10)), 0)
        self.result_of(self.a.heartbeat("up", 1))
        self.assertEqual(self.node_name_of("x"), "a")

    def test_reclaim_puts_a_row_back_with_its_generation(self) -> None:
        b = self.start_node("b")
        claim = self.result_of(self.a.claim("x", "h:1"))
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 0))
        self.result_of(b.reap(10))
        self.assertFalse(self.result_of(self.a.heartbeat("up", 1)))
        self.assertEqual(self.result_of(self.a.reclaim("x", claim.generation, "h:1")), claim)
        self.assertEqual(self.result_of(b.find("x")).connected_at, claim.connected_at)
        self.assertEqual(self.result_of(self.a.reclaim("x", claim.generation, "h:1")), claim)

    def test_reclaim_yields_to_a_newer_claim(self) -> None:
        b = self.start_node("b")
        claim = self.result_of(self.a.claim("x", "h:1"))
        self.result_of(b.claim("x", "h:2"))
        self.assertIsNone(self.result_of(self.a.reclaim("x", claim.generation, "h:1")))
        self.assertEqual(self.node_name_of("x"), "b")

    def test_release_after_reclaim_at_once(self) -> None:
        claim = self.result_of(self.a.claim("x", "h:1"))
        reclaimed, released = self.a.reclaim("x", claim.generation, "h:1"), self.a.release("x", claim.generation)
        self.result_of(released)
        self.result_of(reclaimed)
        self.assertIsNone(self.node_name_of("x"))

    def test_clients_are_listed_by_code_point(self) -> None:
        b = self.start_node("b")
        names = ["a%", "a_", "a-1", "ab", "aB", "a", "A", "b", "a/", "~"]
        # "%" and "~" are in no client_id; here they stand for what LIKE would take amiss, and for the end.
        for index, name in enumerate(names):
            self.result_of((self.a, b)[index % 2].claim(name, "h:1"))

        def ids(*args: Any, **kwargs: Any) -> list[str]:
            return [found.client_id for found in self.result_of(self.a.clients(*args, **kwargs))]

        self.assertEqual(ids("", 100), sorted(names))
        self.assertEqual(ids("", 3), sorted(names)[:3])
        self.assertEqual(ids("a", 100), [name for name in sorted(names) if name > "a"])
        self.assertEqual(ids("", 100, prefix="a_"), ["a_"])
        self.assertEqual(ids("", 100, prefix="a"), [name for name in sorted(names) if name.startswith("a")])
        self.assertEqual(ids("a/", 2, prefix="a"), ["aB", "a_"])
        self.assertEqual(ids("", 100, "b".ljust(36, "-")), sorted(names[1::2]))
        self.assertEqual(ids("", 100, "nobody"), [])
        self.assertEqual(ids("", 0), [])
        self.assertEqual(ids("", -1), [])
        self.assertEqual(ids("a\u00e9", 100), [name for name in sorted(names) if name > "a\u00e9"])
        self.assertEqual(ids("zz", 100, prefix="a"), [])

    def test_a_table_of_many_pieces(self) -> None:
        self.patch(statements, "MAX_SCANNED_ROWS", 2)
        b = self.start_node("b")
        for number in range(9):
            self.result_of((self.a if number % 4 else b).claim(f"c{number}", "h:1"))
        listed = self.result_of(self.a.clients("", 2, "b".ljust(36, "-")))
        self.assertEqual([found.client_id for found in listed], ["c0", "c4"])
        self.assertEqual(len(self.result_of(self.a.clients("", 100))), 9)
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 1))
        self.assertEqual([self.result_of(b.reap(4)) for _ in range(2)], [4, 2])
        self.assertEqual([found.client_id for found in self.result_of(b.clients("", 100))], ["c0", "c4", "c8"])
        self.assertFalse(self.result_of(self.a.heartbeat("up", 0)))
        self.result_of(b.leave())
        self.assertEqual(self.result_of(self.a.clients("", 100)), [])
        self.assertEqual([node.name for node in self.result_of(self.a.nodes())], ["a"])

    def test_closing_writes_what_is_queued(self) -> None:
        b = self.start_node("b")
        claim = self.result_of(b.claim("x", "h:1"))
        released, claimed = b.release("x", claim.generation), b.claim("y", "h:1")
        self.result_of(b.close())
        self.result_of(released)
        self.error_of(claimed, RegistryUnavailableError)
        self.assertIsNone(self.node_name_of("x"))
        self.error_of(b.claim("x", "h:1"), RegistryUnavailableError)
        self.error_of(b.release("x", 1), RegistryUnavailableError)
        self.error_of(b.find("x"), RegistryUnavailableError)
        self.error_of(b.clients("", 1), RegistryUnavailableError)
        self.error_of(b.nodes(), RegistryUnavailableError)
        self.error_of(b.reap(1), RegistryUnavailableError)
        self.error_of(b.heartbeat("up", 1), RegistryUnavailableError)
        self.result_of(b.close())
