"""Tests that every registry must pass, as mixins for a test case that makes registries."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from gateway.registry import statements
from gateway.registry.errors import ClaimSupersededError, LeaseLostError, OwnedElsewhereError, RegistryUnavailableError
from gateway.registry.interface import Claim, ClaimPolicy, IRegistry, Location, NodeInfo, SessionKey
from gateway.registry.sql import SQLRegistry

LEASE = 15.0


def node_info(name: str) -> NodeInfo:
    """Describe a node whose node_id is its name, padded."""
    return NodeInfo(name.ljust(36, "-"), name, f"ws://{name}/", f"ws://{name}:81/", 1000, f"{name}.1")


class RegistryMixin:
    """Start registries on the database of the test. Node ``a`` has joined.

    Test cases implement ``make_registry``, which makes a registry that is not open yet.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.set_up_database()
        self.a = self.start_node("a")

    def set_up_database(self) -> None:
        """Prepare the database that ``make_registry`` uses."""

    def make_registry(self) -> SQLRegistry:
        raise NotImplementedError

    def start_node(self, name: str) -> SQLRegistry:
        registry = self.make_registry()
        self.result_of(registry.open())
        self.result_of(registry.join(node_info(name)))
        self.addCleanup(lambda: self.result_of(registry.close()))
        return registry

    def result_of(self, deferred: Deferred[Any]) -> Any:
        """Return the result of a Deferred, which must fire within a few milliseconds."""
        self.clock.pump([0.001] * 5)
        return self.successResultOf(deferred)

    def error_of(self, deferred: Deferred[Any], kind: type[Exception]) -> Any:
        self.clock.pump([0.001] * 5)
        return self.failureResultOf(deferred, kind).value

    def node_name_of(self, client_id: str) -> str | None:
        location = self.result_of(self.a.find(client_id))
        return None if location is None else location.node_name


class RegistryContractMixin(RegistryMixin):
    """Everything except claims of another node's clients: see :class:`ClaimPolicyContractMixin`."""

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
        pending = [self.a.find(client_id) for client_id in ("x", "y", "x", "z")]
        self.assertEqual([found and found.address for found in map(self.result_of, pending)], ["x", "y", "x", None])

    def test_an_invalid_client_id_is_not_found(self) -> None:
        self.assertIsNone(self.result_of(self.a.find("\ud800")))
        self.error_of(self.a.claim("\ud800", "h:1"), ValueError)
        self.error_of(self.a.reclaim(SessionKey("x", 2**63), "h:1"), ValueError)
        self.result_of(self.a.release(SessionKey("\ud800", 1)))
        self.result_of(self.a.release(SessionKey("x", 2**70)))
        self.assertEqual(self.result_of(self.a.clients("", 10, prefix="\ud800")), [])
        self.assertEqual(self.result_of(self.a.clients("", 10, node_id="\ud800")), [])

    def test_text_that_cannot_be_stored_is_replaced(self) -> None:
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
        self.result_of(self.a.release(SessionKey("x", first.generation)))
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
        self.result_of(self.a.release(SessionKey("x", first.generation)))
        self.assertEqual(self.result_of(self.a.find("x")).generation, second.generation)
        third = self.result_of(b.claim("x", "h:3"))
        self.result_of(self.a.release(SessionKey("x", second.generation)))
        self.result_of(self.a.release(SessionKey("x", third.generation)))  # another node's
        self.assertEqual(self.node_name_of("x"), "b")

    def test_of_several_claims_at_once_the_newest_wins(self) -> None:
        first, second, other, third = (self.a.claim(client_id, "h:1") for client_id in ("x", "x", "y", "x"))
        claim = self.result_of(third)
        self.failureResultOf(first, ClaimSupersededError)
        self.failureResultOf(second, ClaimSupersededError)
        self.assertIsInstance(self.result_of(other), Claim)
        self.assertEqual(self.result_of(self.a.find("x")).generation, claim.generation)

    def test_a_claim_cancelled_before_it_was_sent_is_not_written(self) -> None:
        first, second = self.a.claim("x", "h:1"), self.a.claim("x", "h:2")
        second.cancel()
        self.result_of(first)
        self.failureResultOf(second, CancelledError)
        self.assertEqual(self.result_of(self.a.find("x")).address, "h:1")

    def test_release_then_claim_at_once(self) -> None:
        first = self.result_of(self.a.claim("x", "h:1"))
        released, claimed = self.a.release(SessionKey("x", first.generation)), self.a.claim("x", "h:2")
        claim = self.result_of(claimed)
        self.result_of(released)
        self.assertGreater(claim.generation, first.generation)
        self.assertEqual(self.result_of(self.a.find("x")).generation, claim.generation)

    def test_releases_of_one_claim_are_one(self) -> None:
        claim = self.result_of(self.a.claim("x", "h:1"))
        releases = [self.a.release(SessionKey("x", claim.generation)) for _ in range(3)]
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
        self.result_of(registry.release(SessionKey("x", 1)))
        self.result_of(registry.leave())
        self.result_of(self.a.leave())
        self.error_of(self.a.claim("x", "h:1"), LeaseLostError)
        self.error_of(self.a.heartbeat("up", 0), RegistryUnavailableError)

    def test_leaving_removes_the_rows_that_the_node_still_owns(self) -> None:
        b = self.start_node("b")
        for client_id in ("w", "x", "y"):
            self.result_of(self.a.claim(client_id, "h:1"))
        self.result_of(b.claim("x", "h:2"))
        self.result_of(self.a.leave())
        self.assertEqual([location.client_id for location in self.result_of(b.clients("", 10))], ["x"])
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 1))
        self.assertEqual(self.result_of(b.reap(10)), 0)

    def test_without_a_lease_nothing_is_claimed_but_releases_are_written(self) -> None:
        b = self.start_node("b")
        claim = self.result_of(self.a.claim("x", "h:1"))
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 0))
        self.error_of(self.a.claim("y", "h:1"), LeaseLostError)
        # The registry does not decide that the node is dead.
        self.assertFalse(self.result_of(b.find("x")).live)
        self.assertEqual(self.result_of(b.clients("", 10)), [])
        self.result_of(self.a.release(SessionKey("x", claim.generation)))
        self.assertFalse(self.result_of(self.a.heartbeat("up", 1)))
        self.assertIsNone(self.node_name_of("x"))
        self.assertIsInstance(self.result_of(self.a.claim("y", "h:1")), Claim)

    def test_an_expired_lease_is_reported_by_one_heartbeat(self) -> None:
        self.clock.advance(LEASE - 1)
        self.assertTrue(self.result_of(self.a.heartbeat("up", 0)))
        self.clock.advance(LEASE + 1)
        self.assertFalse(self.result_of(self.a.heartbeat("up", 0)))
        self.assertTrue(self.result_of(self.a.heartbeat("up", 0)))

    def test_a_dead_node_is_reaped_in_segments(self) -> None:
        b = self.start_node("b")
        for number in range(5):
            self.result_of(self.a.claim(f"c{number}", "h:1"))
        self.result_of(b.claim("mine", "h:1"))
        self.assertEqual(self.result_of(b.reap(10)), 0)
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 1))
        self.assertEqual([self.result_of(b.reap(2)) for _ in range(4)], [2, 2, 1, 0])
        self.assertEqual([location.client_id for location in self.result_of(b.clients("", 10))], ["mine"])
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
        self.assertEqual([location.client_id for location in self.result_of(b.clients("", 10))], ["c2", "c3"])

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
        self.assertEqual(self.result_of(self.a.reclaim(SessionKey("x", claim.generation), "h:1")), claim)
        self.assertEqual(self.result_of(b.find("x")).connected_at, claim.connected_at)
        self.assertEqual(self.result_of(self.a.reclaim(SessionKey("x", claim.generation), "h:1")), claim)

    def test_reclaim_yields_to_a_newer_claim(self) -> None:
        b = self.start_node("b")
        claim = self.result_of(self.a.claim("x", "h:1"))
        self.result_of(b.claim("x", "h:2"))
        self.assertIsNone(self.result_of(self.a.reclaim(SessionKey("x", claim.generation), "h:1")))
        self.assertEqual(self.node_name_of("x"), "b")

    def test_release_after_reclaim_at_once(self) -> None:
        claim = self.result_of(self.a.claim("x", "h:1"))
        reclaimed, released = (
            self.a.reclaim(SessionKey("x", claim.generation), "h:1"),
            self.a.release(SessionKey("x", claim.generation)),
        )
        self.result_of(released)
        self.result_of(reclaimed)
        self.assertIsNone(self.node_name_of("x"))

    def test_clients_are_listed_by_code_point(self) -> None:
        b = self.start_node("b")
        names = ["a%", "a_", "a-1", "ab", "aB", "a", "A", "b", "a/", "~"]
        # No client_id has "%" and "~": the first is special in LIKE, the second sorts last.
        for index, name in enumerate(names):
            self.result_of((self.a, b)[index % 2].claim(name, "h:1"))

        def ids(*args: Any, **kwargs: Any) -> list[str]:
            return [location.client_id for location in self.result_of(self.a.clients(*args, **kwargs))]

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

    def test_a_table_of_many_segments(self) -> None:
        self.patch(statements, "MAX_SCANNED_ROWS", 2)
        b = self.start_node("b")
        for number in range(9):
            self.result_of((self.a if number % 4 else b).claim(f"c{number}", "h:1"))
        listed = self.result_of(self.a.clients("", 2, "b".ljust(36, "-")))
        self.assertEqual([location.client_id for location in listed], ["c0", "c4"])
        self.assertEqual(len(self.result_of(self.a.clients("", 100))), 9)
        self.clock.advance(LEASE + 1)
        self.result_of(b.heartbeat("up", 1))
        self.assertEqual([self.result_of(b.reap(4)) for _ in range(2)], [4, 2])
        self.assertEqual([location.client_id for location in self.result_of(b.clients("", 100))], ["c0", "c4", "c8"])
        self.assertFalse(self.result_of(self.a.heartbeat("up", 0)))
        self.result_of(b.leave())
        self.assertEqual(self.result_of(self.a.clients("", 100)), [])
        self.assertEqual([node.name for node in self.result_of(self.a.nodes())], ["a"])

    def test_own_rows_in_segments(self) -> None:
        b = self.start_node("b")
        generations = {}
        for number in range(7):
            registry = b if number % 3 == 0 else self.a
            generations[f"c{number}"] = self.result_of(registry.claim(f"c{number}", "h:1")).generation
        segments = []
        first: str | None = ""
        while first is not None:
            rows, first = self.result_of(self.a.own_rows(first, 3))
            segments.append(sorted(rows))
        expected = [["c1", "c2"], ["c4", "c5"], []]
        self.assertEqual(
            segments, [[(client_id, generations[client_id]) for client_id in segment] for segment in expected]
        )
        self.assertEqual(self.result_of(self.make_registry().own_rows("", 3)), ([], None))

    def test_joining_ends_the_lease_of_a_node_at_the_same_address(self) -> None:
        """That node was killed. Its rows have no owner from now on, and are reaped at once."""
        b = self.start_node("b")
        for client_id in ("x", "y"):
            self.result_of(self.a.claim(client_id, "h:1"))
        again = self.make_registry()
        self.result_of(again.open())
        self.addCleanup(lambda: self.result_of(again.close()))
        self.result_of(again.join(attrs.evolve(node_info("again"), peer_url=node_info("a").peer_url)))
        self.assertEqual([node.name for node in self.result_of(b.nodes())], ["b", "again"])
        self.assertIsNone(self.result_of(b.find("x")))
        self.assertEqual(self.result_of(b.clients("", 10)), [])
        claim = self.result_of(again.claim("x", "h:2", ClaimPolicy(0)))
        self.assertIsNone(claim.previous_owner)
        self.assertEqual(self.result_of(b.reap(10)), 1)
        self.assertEqual(self.result_of(b.find("x")).node_name, "again")
        self.assertTrue(self.result_of(b.heartbeat("up", 0)))

    def test_node_that_lives_at_the_same_address_renews_its_lease(self) -> None:
        """As with two nodes that were given one peer URL by mistake."""
        claim = self.result_of(self.a.claim("x", "h:1"))
        other = self.make_registry()
        self.result_of(other.open())
        self.addCleanup(lambda: self.result_of(other.close()))
        self.result_of(other.join(attrs.evolve(node_info("other"), peer_url=node_info("a").peer_url)))
        self.assertFalse(self.result_of(self.a.heartbeat("up", 1)))
        self.result_of(self.a.reclaim(SessionKey("x", claim.generation), "h:1"))
        self.assertTrue(self.result_of(other.heartbeat("up", 0)))
        self.assertTrue(self.result_of(self.a.heartbeat("up", 1)))
        self.assertEqual([node.name for node in self.result_of(other.nodes())], ["a", "other"])
        self.assertEqual(self.result_of(other.find("x")).generation, claim.generation)

    def test_is_writing_until_the_outcome_is_known(self) -> None:
        claiming = self.a.claim("x", "h:1")
        claim = self.result_of(claiming)
        key = SessionKey("x", claim.generation)
        self.assertFalse(self.a.is_writing(key))
        releasing = self.a.release(key)
        self.assertTrue(self.a.is_writing(key))
        self.assertFalse(self.a.is_writing(SessionKey("y", claim.generation)))
        self.result_of(releasing)
        self.assertFalse(self.a.is_writing(key))

    def test_closing_writes_queued_releases(self) -> None:
        b = self.start_node("b")
        claim = self.result_of(b.claim("x", "h:1"))
        released, claimed = b.release(SessionKey("x", claim.generation)), b.claim("y", "h:1")
        self.result_of(b.close())
        self.result_of(released)
        self.error_of(claimed, RegistryUnavailableError)
        self.assertIsNone(self.node_name_of("x"))
        self.error_of(b.claim("x", "h:1"), RegistryUnavailableError)
        self.error_of(b.release(SessionKey("x", 1)), RegistryUnavailableError)
        self.error_of(b.find("x"), RegistryUnavailableError)
        self.error_of(b.clients("", 1), RegistryUnavailableError)
        self.error_of(b.nodes(), RegistryUnavailableError)
        self.error_of(b.reap(1), RegistryUnavailableError)
        self.error_of(b.heartbeat("up", 1), RegistryUnavailableError)
        self.result_of(b.close())


class ClaimPolicyContractMixin(RegistryMixin):
    """Node ``a`` owns client ``x`` by ``self.claim_of_a``; node ``b`` claims it."""

    def setUp(self) -> None:
        super().setUp()
        self.b = self.start_node("b")
        self.claim_of_a: Claim = self.result_of(self.a.claim("x", "h:1"))

    def expire_lease_of_a(self) -> None:
        """Let the lease of ``a`` expire, but not that of ``b``."""
        self.clock.advance(LEASE - 1)
        self.result_of(self.b.heartbeat("up", 0))
        self.clock.advance(2)

    def owner_location(self, deferred: Deferred[Any]) -> Location:
        location: Location = self.error_of(deferred, OwnedElsewhereError).location
        return location

    def test_a_client_without_an_owner_is_claimed_under_every_policy(self) -> None:
        for over, judge in ((None, False), (0, False), (5, True)):
            claim = self.result_of(
                self.b.claim(f"y{over}", "h:2", ClaimPolicy(takeover_up_to=over, ignore_expired_owner=judge))
            )
            self.assertIsNone(claim.previous_owner)

    def test_a_claim_without_takeover_reports_the_owner(self) -> None:
        location = self.owner_location(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0)))
        self.assertEqual(location, self.result_of(self.b.find("x")))
        self.assertEqual(
            (location.node_name, location.generation, location.live), ("a", self.claim_of_a.generation, True)
        )
        self.assertEqual((location.public_url, location.peer_url, location.state), ("ws://a/", "ws://a:81/", "up"))
        self.assertEqual(self.node_name_of("x"), "a")

    def test_a_draining_owner_is_reported_as_such(self) -> None:
        self.result_of(self.a.heartbeat("draining", 1))
        self.assertEqual(self.owner_location(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0))).state, "draining")
        self.assertEqual(self.result_of(self.b.find("x")).state, "draining")

    def test_takeover_up_to_a_generation(self) -> None:
        self.owner_location(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=self.claim_of_a.generation - 1)))
        before = self.result_of(self.b.find("x"))
        claim = self.result_of(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=self.claim_of_a.generation)))
        self.assertEqual(claim.previous_owner, before)
        self.assertGreater(claim.generation, self.claim_of_a.generation)
        self.assertEqual(self.node_name_of("x"), "b")
        back = self.result_of(self.a.claim("x", "h:1", ClaimPolicy(takeover_up_to=claim.generation + 1)))
        self.assertEqual(back.previous_owner.node_name, "b")

    def test_takeover_of_any_owner(self) -> None:
        claim = self.result_of(self.b.claim("x", "h:2"))
        self.assertEqual(
            (claim.previous_owner.node_name, claim.previous_owner.generation), ("a", self.claim_of_a.generation)
        )

    def test_a_client_of_this_node_is_claimed_under_every_policy(self) -> None:
        for over in (None, 0, 5):
            claim = self.result_of(self.a.claim("x", "h:2", ClaimPolicy(takeover_up_to=over)))
            self.assertIsNone(claim.previous_owner)

    def test_an_expired_owner_is_ignored_only_if_the_policy_says_so(self) -> None:
        self.expire_lease_of_a()
        self.assertFalse(self.owner_location(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0))).live)
        claim = self.result_of(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0, ignore_expired_owner=True)))
        self.assertEqual((claim.previous_owner.node_name, claim.previous_owner.live), ("a", False))

    def test_a_live_owner_is_never_ignored(self) -> None:
        self.owner_location(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0, ignore_expired_owner=True)))

    def test_a_leaving_node_owns_no_clients(self) -> None:
        self.patch(self.a, "_run_job", self.expire_lease_only)
        self.jobs_of_leave = 0
        self.result_of(self.a.leave())
        self.assertIsNone(self.result_of(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0))).previous_owner)

    def expire_lease_only(self, priority: Any, operation: str, work: Any) -> Deferred[Any]:
        """Run the job of ``leave`` that ends the lease, but not the one that removes the rows."""
        self.jobs_of_leave += 1
        result: Deferred[Any] = Deferred()
        if self.jobs_of_leave > 1:
            result.callback(None)
            return result
        return type(self.a)._run_job(self.a, priority, operation, work)

    def test_a_removed_node_is_not_a_previous_owner(self) -> None:
        self.expire_lease_of_a()
        self.result_of(self.b.reap(10))
        self.assertIsNone(self.result_of(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0))).previous_owner)

    def test_a_conflict_fails_only_its_own_claim(self) -> None:
        pending = [
            self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0)),
            self.b.claim("y", "h:2", ClaimPolicy(takeover_up_to=0)),
            self.b.claim("z", "h:2"),
        ]
        self.owner_location(pending[0])
        for each in pending[1:]:
            self.assertIsInstance(self.result_of(each), Claim)
        self.assertEqual(self.node_name_of("x"), "a")

    def test_an_older_claim_wins_over_a_newer_one_that_conflicts(self) -> None:
        older, newer = self.b.claim("x", "h:2"), self.b.claim("x", "h:3", ClaimPolicy(takeover_up_to=0))
        first, second = self.result_of(older), self.result_of(newer)
        # When the newer one is resolved, its own node owns the client.
        self.assertEqual((first.previous_owner.node_name, second.previous_owner), ("a", None))
        self.assertGreater(second.generation, first.generation)
        self.assertEqual(self.result_of(self.b.find("x")).address, "h:3")

    def test_a_newer_claim_supersedes_one_that_conflicts(self) -> None:
        older, newer = self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0)), self.b.claim("x", "h:3")
        claim = self.result_of(newer)
        self.failureResultOf(older, ClaimSupersededError)
        self.assertEqual(claim.previous_owner.node_name, "a")

    def test_two_claims_may_both_conflict(self) -> None:
        pending = [self.b.claim("x", address, ClaimPolicy(takeover_up_to=0)) for address in ("h:2", "h:3")]
        for each in pending:
            self.assertEqual(self.owner_location(each).node_name, "a")

    def test_without_a_lease_no_owner_is_reported(self) -> None:
        self.clock.advance(LEASE + 1)
        self.error_of(self.b.claim("x", "h:2", ClaimPolicy(takeover_up_to=0)), LeaseLostError)

    def test_a_reclaim_has_no_previous_owner(self) -> None:
        self.assertIsNone(
            self.result_of(self.b.reclaim(SessionKey("x", self.claim_of_a.generation + 1), "h:2")).previous_owner
        )
        self.assertEqual(self.node_name_of("x"), "b")

    def test_an_id_that_is_too_long(self) -> None:
        self.assertIsInstance(self.result_of(self.a.claim("l" * 128, "h:1")), Claim)
        self.error_of(self.a.claim("l" * 129, "h:1"), ValueError)
        self.assertIsNone(self.result_of(self.a.find("l" * 129)))

    def test_text_that_has_a_meaning_in_sql(self) -> None:
        strange = "'\"\\%_?%s{}`;--\0\n\r\t\x1a\u00e9\U0001f600"
        self.result_of(self.a.join(NodeInfo("a".ljust(36, "-"), strange, "ws://'", "ws://\\", 1)))
        name = "".join(chr(code) for code in range(128))
        claim = self.result_of(self.a.claim(name, strange))
        location = self.result_of(self.b.find(name))
        self.assertEqual((location.client_id, location.address, location.node_name), (name, strange, strange))
        self.assertEqual((location.public_url, location.peer_url), ("ws://'", "ws://\\"))
        self.assertIn(name, [location.client_id for location in self.result_of(self.b.clients("", 10))])
        self.result_of(self.a.release(SessionKey(name, claim.generation)))
        self.assertIsNone(self.result_of(self.b.find(name)))
        self.assertEqual(self.node_name_of("x"), None)  # it joined anew
        for wrong in ("' OR '1'='1", "x' -- ", "\\"):
            self.assertIsNone(self.result_of(self.b.find(wrong)))

    def test_an_address_of_any_length_is_cut(self) -> None:
        self.result_of(self.a.claim("y", "\u00e9" * 1000))
        self.assertEqual(self.result_of(self.b.find("y")).address, "\u00e9" * 255)

    def test_ids_differ_by_case_and_by_every_byte(self) -> None:
        names = ["k", "K", "k ", "k\0", "k.", "k:", "kk"]
        for name in names:
            self.result_of(self.a.claim(name, repr(name)))
        for name in names:
            self.assertEqual(self.result_of(self.b.find(name)).address, repr(name))
        listed = [location.client_id for location in self.result_of(self.b.clients("", 100, prefix="k"))]
        self.assertEqual(listed, sorted(name for name in names if name.startswith("k")))
        for index, name in enumerate(listed):
            after = [location.client_id for location in self.result_of(self.b.clients(name, 100, prefix="k"))]
            self.assertEqual(after, listed[index + 1 :])
