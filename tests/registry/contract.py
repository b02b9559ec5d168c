"""What every registry promises: tests to be mixed into a test case that makes registries."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from gateway.registry import statements
from gateway.registry.interface import Claim, IRegistry, LeaseLost, NodeInfo, RegistryUnavailable, Superseded
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
        self.a = self.start("a")

    def set_up_database(self) -> None:
        """Prepare what ``make`` needs."""

    def make(self) -> SQLRegistry:
        raise NotImplementedError

    def start(self, name: str) -> SQLRegistry:
        registry = self.make()
        self.get(registry.open())
        self.get(registry.join(node_info(name)))
        self.addCleanup(lambda: self.get(registry.close()))
        return registry

    def get(self, deferred: Deferred[Any]) -> Any:
        """The result of a Deferred, a few milliseconds later at the most."""
        self.clock.pump([0.001] * 5)
        return self.successResultOf(deferred)

    def fails(self, deferred: Deferred[Any], kind: type[Exception]) -> Any:
        self.clock.pump([0.001] * 5)
        return self.failureResultOf(deferred, kind).value

    def where(self, client_id: str) -> str | None:
        location = self.get(self.a.find(client_id))
        return None if location is None else location.node_name


class ContractMixin(RegistryMixin):
    """Everything but claims over another node's: see ``claims``."""

    def test_provides_the_interface(self) -> None:
        self.assertTrue(verifyObject(IRegistry, self.a))

    def test_a_node_that_joined_is_shown_until_it_leaves(self) -> None:
        b = self.start("b")
        self.clock.advance(2)
        self.assertTrue(self.get(self.a.heartbeat("draining", 7)))
        first, second = self.get(b.nodes())
        self.assertEqual((first.name, first.state, first.clients, first.capacity), ("a", "draining", 7, 1000))
        self.assertEqual((second.name, second.state, second.public_url), ("b", "up", "ws://b/"))
        self.assertLess(first.heartbeat_age, 0.1)
        self.assertAlmostEqual(second.heartbeat_age, 2, places=1)
        self.get(self.a.leave())
        self.assertEqual([node.name for node in self.get(b.nodes())], ["b"])

    def test_joining_twice_is_joining_once(self) -> None:
        self.get(self.a.join(node_info("a")))
        self.assertEqual(len(self.get(self.a.nodes())), 1)
        self.get(self.a.claim("x", "h:1"))
        self.assertEqual(self.where("x"), "a")

    def test_a_claim_is_found_from_every_node(self) -> None:
        b = self.start("b")
        claim = self.get(self.a.claim("x", "10.0.0.1:5"))
        location = self.get(b.find("x"))
        self.assertEqual((location.client_id, location.node_id, location.node_name), ("x", "a".ljust(36, "-"), "a"))
        self.assertEqual((location.peer_url, location.address), ("ws://a:81/", "10.0.0.1:5"))
        self.assertEqual((location.generation, location.connected_at), (claim.generation, claim.connected_at))
        self.assertIsNone(self.get(b.find("y")))

    def test_many_look_ups_at_once_each_get_their_own_answer(self) -> None:
        for client_id in ("x", "y"):
            self.get(self.a.claim(client_id, client_id))
        asked = [self.a.find(client_id) for client_id in ("x", "y", "x", "z")]
        self.assertEqual([found and found.address for found in map(self.get, asked)], ["x", "y", "x", None])

    def test_an_impossible_client_id_is_nowhere(self) -> None:
        self.assertIsNone(self.get(self.a.find("\ud800")))
        self.fails(self.a.claim("\ud800", "h:1"), ValueError)
        self.fails(self.a.reclaim("x", 2**63, "h:1"), ValueError)
        self.get(self.a.release("\ud800", 1))
        self.get(self.a.release("x", 2**70))
        self.assertEqual(self.get(self.a.clients("", 10, prefix="\ud800")), [])
        self.assertEqual(self.get(self.a.clients("", 10, node_id="\ud800")), [])

    def test_text_that_cannot_be_stored_is_mended(self) -> None:
        info = node_info("c")
        self.get(self.a.join(NodeInfo(info.node_id, "c\ud800", "ws://c", "ws://c", 1)))
        self.get(self.a.claim("x", "\udcff:1"))
        self.assertEqual(self.get(self.a.find("x")).address, "?:1")
        self.assertIn("c?", [node.name for node in self.get(self.a.nodes())])

    def test_generations_grow_from_node_to_node(self) -> None:
        b = self.start("b")
        generations = []
        for registry in (self.a, b, b, self.a):
            generations.append(self.get(registry.claim("x", "h:1")).generation)
        self.assertEqual(generations, sorted(set(generations)))

    def test_generations_grow_across_a_removed_row(self) -> None:
        first = self.get(self.a.claim("x", "h:1"))
        self.get(self.a.release("x", first.generation))
        self.assertIsNone(self.where("x"))
        self.assertGreater(self.get(self.a.claim("x", "h:1")).generation, first.generation)

    def test_a_claim_takes_over(self) -> None:
        b = self.start("b")
        self.get(self.a.claim("x", "h:1"))
        self.get(b.claim("x", "h:2"))
        self.assertEqual(self.where("x"), "b")

    def test_a_late_release_never_removes_a_newer_claim(self) -> None:
        b = self.start("b")
        first = self.get(self.a.claim("x", "h:1"))
        second = self.get(self.a.claim("x", "h:2"))
        self.get(self.a.release("x", first.generation))
        self.assertEqual(self.get(self.a.find("x")).generation, second.generation)
        third = self.get(b.claim("x", "h:3"))
        self.get(self.a.release("x", second.generation))
        self.get(self.a.release("x", third.generation))  # another node's
        self.assertEqual(self.where("x"), "b")

    def test_of_several_claims_at_once_the_newest_wins(self) -> None:
        first, second, other, third = (self.a.claim(client_id, "h:1") for client_id in ("x", "x", "y", "x"))
        claim = self.get(third)
        self.failureResultOf(first, Superseded)
        self.failureResultOf(second, Superseded)
        self.assertIsInstance(self.get(other), Claim)
        self.assertEqual(self.get(self.a.find("x")).generation, claim.generation)

    def test_a_claim_that_is_cancelled_before_it_was_sent_leaves_nothing(self) -> None:
        first, second = self.a.claim("x", "h:1"), self.a.claim("x", "h:2")
        second.cancel()
        self.get(first)
        self.failureResultOf(second, CancelledError)
        self.assertEqual(self.get(self.a.find("x")).address, "h:1")

    def test_release_then_claim_at_once(self) -> None:
        first = self.get(self.a.claim("x", "h:1"))
        released, claimed = self.a.release("x", first.generation), self.a.claim("x", "h:2")
        claim = self.get(claimed)
        self.get(released)
        self.assertGreater(claim.generation, first.generation)
        self.assertEqual(self.get(self.a.find("x")).generation, claim.generation)

    def test_releases_of_one_claim_are_one(self) -> None:
        claim = self.get(self.a.claim("x", "h:1"))
        releases = [self.a.release("x", claim.generation) for _ in range(3)]
        releases[1].cancel()
        self.get(releases[0])
        self.get(releases[2])
        self.failureResultOf(releases[1], CancelledError)
        self.assertIsNone(self.where("x"))

    def test_nothing_is_claimed_before_joining_or_after_leaving(self) -> None:
        registry = self.make()
        self.get(registry.open())
        self.addCleanup(lambda: self.get(registry.close()))
        self.fails(registry.claim("x", "h:1"), LeaseLost)
        self.fails(registry.heartbeat("up", 0), RegistryUnavailable)
        self.get(registry.release("x", 1))
        self.get(registry.leave())
        self.get(self.a.leave())
        self.fails(self.a.claim("x", "h:1"), LeaseLost)
        self.fails(self.a.heartbeat("up", 0), RegistryUnavailable)

    def test_leaving_removes_what_is_still_its_own(self) -> None:
        b = self.start("b")
        for client_id in ("w", "x", "y"):
            self.get(self.a.claim(client_id, "h:1"))
        self.get(b.claim("x", "h:2"))
        self.get(self.a.leave())
        self.assertEqual([found.client_id for found in self.get(b.clients("", 10))], ["x"])
        self.clock.advance(LEASE + 1)
        self.get(b.heartbeat("up", 1))
        self.assertEqual(self.get(b.reap(10)), 0)

    def test_without_a_lease_nothing_is_claimed_but_releases_go(self) -> None:
        b = self.start("b")
        claim = self.get(self.a.claim("x", "h:1"))
        self.clock.advance(LEASE + 1)
        self.get(b.heartbeat("up", 0))
        self.fails(self.a.claim("y", "h:1"), LeaseLost)
        # It is not for the registry to say that the node is dead.
        self.assertFalse(self.get(b.find("x")).live)
        self.assertEqual(self.get(b.clients("", 10)), [])
        self.get(self.a.release("x", claim.generation))
        self.assertFalse(self.get(self.a.heartbeat("up", 1)))
        self.assertIsNone(self.where("x"))
        self.assertIsInstance(self.get(self.a.claim("y", "h:1")), Claim)

    def test_a_heartbeat_after_the_lease_ran_out_says_so_once(self) -> None:
        self.clock.advance(LEASE - 1)
        self.assertTrue(self.get(self.a.heartbeat("up", 0)))
        self.clock.advance(LEASE + 1)
        self.assertFalse(self.get(self.a.heartbeat("up", 0)))
        self.assertTrue(self.get(self.a.heartbeat("up", 0)))

    def test_a_dead_node_is_reaped_in_pieces(self) -> None:
        b = self.start("b")
        for number in range(5):
            self.get(self.a.claim(f"c{number}", "h:1"))
        self.get(b.claim("mine", "h:1"))
        self.assertEqual(self.get(b.reap(10)), 0)
        self.clock.advance(LEASE + 1)
        self.get(b.heartbeat("up", 1))
        self.assertEqual([self.get(b.reap(2)) for _ in range(4)], [2, 2, 1, 0])
        self.assertEqual([found.client_id for found in self.get(b.clients("", 10))], ["mine"])
        self.assertFalse(self.get(self.a.heartbeat("up", 5)))  # its row is there again
        self.assertEqual({node.name for node in self.get(b.nodes())}, {"a", "b"})

    def test_a_node_that_comes_back_while_it_is_reaped_is_spared(self) -> None:
        b = self.start("b")
        for number in range(4):
            self.get(self.a.claim(f"c{number}", "h:1"))
        self.clock.advance(LEASE + 1)
        self.get(b.heartbeat("up", 0))
        self.assertEqual(self.get(b.reap(2)), 2)
        self.assertFalse(self.get(self.a.heartbeat("up", 4)))
        self.assertEqual(self.get(b.reap(2)), 0)
        self.assertEqual([found.client_id for found in self.get(b.clients("", 10))], ["c2", "c3"])

    def test_a_node_never_reaps_itself(self) -> None:
        self.get(self.a.claim("x", "h:1"))
        self.clock.advance(LEASE + 1)
        self.assertEqual(self.get(self.a.reap(10)), 0)
        self.get(self.a.heartbeat("up", 1))
        self.assertEqual(self.where("x"), "a")

    def test_reclaim_puts_a_row_back_with_its_generation(self) -> None:
        b = self.start("b")
        claim = self.get(self.a.claim("x", "h:1"))
        self.clock.advance(LEASE + 1)
        self.get(b.heartbeat("up", 0))
        self.get(b.reap(10))
        self.assertFalse(self.get(self.a.heartbeat("up", 1)))
        self.assertEqual(self.get(self.a.reclaim("x", claim.generation, "h:1")), claim)
        self.assertEqual(self.get(b.find("x")).connected_at, claim.connected_at)
        self.assertEqual(self.get(self.a.reclaim("x", claim.generation, "h:1")), claim)

    def test_reclaim_yields_to_a_newer_claim(self) -> None:
        b = self.start("b")
        claim = self.get(self.a.claim("x", "h:1"))
        self.get(b.claim("x", "h:2"))
        self.assertIsNone(self.get(self.a.reclaim("x", claim.generation, "h:1")))
        self.assertEqual(self.where("x"), "b")

    def test_release_after_reclaim_at_once(self) -> None:
        claim = self.get(self.a.claim("x", "h:1"))
        reclaimed, released = self.a.reclaim("x", claim.generation, "h:1"), self.a.release("x", claim.generation)
        self.get(released)
        self.get(reclaimed)
        self.assertIsNone(self.where("x"))

    def test_clients_are_listed_by_code_point(self) -> None:
        b = self.start("b")
        names = ["a%", "a_", "a-1", "ab", "aB", "a", "A", "b", "a/", "~"]
        # "%" and "~" are in no client_id; here they stand for what LIKE would take amiss, and for the end.
        for index, name in enumerate(names):
            self.get((self.a, b)[index % 2].claim(name, "h:1"))

        def ids(*args: Any, **kwargs: Any) -> list[str]:
            return [found.client_id for found in self.get(self.a.clients(*args, **kwargs))]

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
        self.patch(statements, "PIECE", 2)
        b = self.start("b")
        for number in range(9):
            self.get((self.a if number % 4 else b).claim(f"c{number}", "h:1"))
        listed = self.get(self.a.clients("", 2, "b".ljust(36, "-")))
        self.assertEqual([found.client_id for found in listed], ["c0", "c4"])
        self.assertEqual(len(self.get(self.a.clients("", 100))), 9)
        self.clock.advance(LEASE + 1)
        self.get(b.heartbeat("up", 1))
        self.assertEqual([self.get(b.reap(4)) for _ in range(2)], [4, 2])
        self.assertEqual([found.client_id for found in self.get(b.clients("", 100))], ["c0", "c4", "c8"])
        self.assertFalse(self.get(self.a.heartbeat("up", 0)))
        self.get(b.leave())
        self.assertEqual(self.get(self.a.clients("", 100)), [])
        self.assertEqual([node.name for node in self.get(self.a.nodes())], ["a"])

    def test_closing_writes_what_is_queued(self) -> None:
        b = self.start("b")
        claim = self.get(b.claim("x", "h:1"))
        released, claimed = b.release("x", claim.generation), b.claim("y", "h:1")
        self.get(b.close())
        self.get(released)
        self.fails(claimed, RegistryUnavailable)
        self.assertIsNone(self.where("x"))
        self.fails(b.claim("x", "h:1"), RegistryUnavailable)
        self.fails(b.release("x", 1), RegistryUnavailable)
        self.fails(b.find("x"), RegistryUnavailable)
        self.fails(b.clients("", 1), RegistryUnavailable)
        self.fails(b.nodes(), RegistryUnavailable)
        self.fails(b.reap(1), RegistryUnavailable)
        self.fails(b.heartbeat("up", 1), RegistryUnavailable)
        self.get(b.close())
