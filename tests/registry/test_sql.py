"""The order and the outcomes of the jobs of an SQL registry, for any database."""

from __future__ import annotations

import os
import sqlite3
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.errors import (
    ClaimSupersededError,
    LeaseLostError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from gateway.registry.interface import Claim, SessionKey
from gateway.registry.memory import EPOCH, InlinePool
from gateway.registry.statements import Statements
from tests.builders.registry_contract import LEASE, node_info
from tests.builders.sqlite_registry import ManualPool, ManualPoolTestCase, make_sqlite_registry


class JobOrderTests(ManualPoolTestCase):
    """One node, whose database jobs are run by ``step``."""

    def test_the_heartbeat_overtakes_queued_work(self) -> None:
        claims = [self.registry.claim(f"c{i}", "h:1") for i in range(1000)]
        self.clock.advance(0.003)
        heartbeat = self.registry.heartbeat("up", 0)
        self.step()  # the batch in flight
        self.step()
        self.assertTrue(self.successResultOf(heartbeat))
        self.assertNoResult(claims[-1])
        for _ in range(4):
            self.step()
        self.assertEqual([type(self.successResultOf(claim)) for claim in claims], [Claim] * 1000)
        self.assertEqual((self.metrics.claims, self.metrics.registry_batches), (1000, 5))

    def test_a_release_does_not_overtake_its_claim(self) -> None:
        claim = self.registry.claim("x", "h:1")
        self.clock.advance(0.003)
        claim.cancel()  # in flight
        self.failureResultOf(claim)
        self.step()
        self.step()
        found = self.registry.find("x")
        self.step()
        self.assertIsNone(self.successResultOf(found))
        self.assertEqual((self.metrics.claims, self.metrics.releases), (1, 1))

    def test_the_lease_counts_from_before_the_heartbeat_was_sent(self) -> None:
        self.clock.advance(LEASE - 1)
        heartbeat = self.registry.heartbeat("up", 0)
        self.clock.advance(2)
        self.assertFalse(self.registry.has_lease())
        self.failureResultOf(self.registry.claim("x", "h:1"), LeaseLostError)
        self.step()
        self.assertFalse(self.successResultOf(heartbeat))
        self.assertTrue(self.registry.has_lease())
        self.clock.advance(LEASE - 3)
        self.assertTrue(self.registry.has_lease())
        self.clock.advance(1)
        self.assertFalse(self.registry.has_lease())

    def test_a_claim_that_reaches_the_database_too_late_is_not_written(self) -> None:
        claim = self.registry.claim("x", "h:1")
        self.clock.advance(LEASE)
        self.step()
        self.failureResultOf(claim, LeaseLostError)

    def test_a_successful_heartbeat_ends_the_backoff(self) -> None:
        self.execute("PRAGMA query_only = 1")
        release = self.registry.release(SessionKey("x", 1))
        self.step(0.003)
        self.failureResultOf(release, RegistryUnavailableError)
        heartbeat = self.registry.heartbeat("up", 0)
        self.step()
        self.successResultOf(heartbeat)
        self.step()
        self.assertEqual(self.metrics.releases, 1)

    def test_an_outage_of_hundreds_of_clients(self) -> None:
        """Releases stay queued and are written later, each once; claims fail at once."""
        claims = [self.registry.claim(f"c{i:03}", "h:1") for i in range(300)]
        self.step(0.003)
        self.step()
        generations = [self.successResultOf(claim).generation for claim in claims]
        self.execute("PRAGMA query_only = 1")
        releases = [
            self.registry.release(SessionKey(f"c{i:03}", generation)) for i, generation in enumerate(generations)
        ]
        claim = self.registry.claim("new", "h:1")
        self.step(0.003)
        for each in [*releases, claim]:
            self.failureResultOf(each, RegistryUnavailableError)
        self.clock.advance(0.2)
        for _ in range(4):
            self.step()
        found = self.registry.clients("", 1000)
        self.step()
        self.assertEqual(self.successResultOf(found), [])
        self.assertEqual(self.metrics.releases, 300)


NODES = st.integers(0, 1)
CLIENTS = st.sampled_from("xyz")
STEPS = st.one_of(
    st.tuples(st.just("claim"), NODES, CLIENTS),
    st.tuples(st.just("cancel"), NODES, CLIENTS),
    st.tuples(st.just("release"), NODES, CLIENTS),
    st.tuples(st.just("flush"), NODES, CLIENTS),
    st.tuples(st.just("step"), NODES, CLIENTS),
)


class RefusalTests(SynchronousTestCase):
    """A database that refuses some statements."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.pools: list[InlinePool] = []
        self.registry = make_sqlite_registry(self.mktemp(), self.clock, self.make_pool)
        self.successResultOf(self.registry.open())
        self.addCleanup(lambda: self.successResultOf(self.registry.close()))
        self.successResultOf(self.registry.join(node_info("a")))

    def make_pool(self, *args: Any, **kwargs: Any) -> InlinePool:
        self.pools.append(InlinePool(*args, **kwargs))
        return self.pools[-1]

    def execute(self, text: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self.pools[-1].connect().execute(text).fetchall()
        return rows

    def refuse(self, event: str, row: str = "NEW") -> None:
        self.execute(
            f"CREATE TRIGGER refusal BEFORE {event} WHEN {row}.client_id = 'bad'"
            " BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )

    def claim(self, *client_ids: str) -> list[Deferred[Claim]]:
        claims = [self.registry.claim(client_id, "h:1") for client_id in client_ids]
        self.clock.advance(0.01)
        return claims

    def test_a_row_that_is_refused_fails_alone(self) -> None:
        self.refuse("INSERT ON clients")
        first, bad, last = self.claim("a", "bad", "c")
        error = self.failureResultOf(bad, RegistryRefusedError).value
        self.assertIn("not this one", str(error))
        self.assertEqual(self.successResultOf(first).generation, EPOCH + 10_000)
        self.successResultOf(last)
        self.successResultOf(self.claim("d")[0])

    def test_a_release_that_is_refused_is_written_once_it_can_be(self) -> None:
        claims = [self.successResultOf(claim) for claim in self.claim("bad", "c")]
        self.refuse("DELETE ON clients", "OLD")
        releases = [
            self.registry.release(SessionKey(client_id, claim.generation))
            for client_id, claim in zip(("bad", "c"), claims, strict=True)
        ]
        self.clock.advance(0.01)
        self.failureResultOf(releases[0], RegistryRefusedError)
        self.successResultOf(releases[1])
        self.assertEqual(self.execute("SELECT client_id FROM clients"), [("bad",)])
        self.execute("DROP TRIGGER refusal")
        self.clock.advance(1)
        self.assertEqual(self.execute("SELECT client_id FROM clients"), [])

    def test_an_assignment_that_is_refused_is_left_out(self) -> None:
        self.refuse("INSERT ON placements")
        node_id = node_info("a").node_id
        assigned = self.registry.assign(["a", "b", "bad", "c", "d"], node_id)
        self.assertEqual(self.successResultOf(assigned), ["a", "b", "c", "d"])
        self.failureResultOf(self.registry.assign(["bad"], node_id), RegistryRefusedError)

    def test_rows_are_removed_in_segments_that_the_database_accepts(self) -> None:
        for claim in self.claim(*(f"c{number:02}" for number in range(40))):
            self.successResultOf(claim)
        self.execute("UPDATE nodes SET heartbeat_at = 1")
        self.execute("INSERT INTO nodes SELECT 90, 'b', 'b', '', '', 'up', 0, 1, 1, 1, '', 0")
        self.execute("UPDATE clients SET node = 90")
        limits: list[int] = []
        original = Statements._remove_clients

        def remove(statements: Statements, cursor: Any, numbers: list[int], first: str, limit: int) -> Any:
            limits.append(limit)
            if limit > 10:
                raise sqlite3.DataError("string or blob too big")
            return original(statements, cursor, numbers, first, limit)

        self.patch(Statements, "_remove_clients", remove)
        self.assertEqual(self.successResultOf(self.registry.reap(100)), 40)
        self.assertEqual(limits, [100, 50, 25, 12, 6, 6, 6, 6, 6, 6, 6])
        self.assertEqual(self.execute("SELECT node_id FROM nodes"), [(node_info("a").node_id,)])

    def test_work_of_which_nothing_is_accepted_fails(self) -> None:
        self.execute("INSERT INTO nodes SELECT 90, 'b', 'b', '', '', 'up', 0, 1, 1, 1, '', 0")

        def remove(*args: Any) -> Any:
            raise sqlite3.DataError("string or blob too big")

        self.patch(Statements, "_remove_clients", remove)
        self.failureResultOf(self.registry.reap(100), RegistryRefusedError)


class _Node:
    """One node of the model: a registry, the open connections of its clients, and its pending claims."""

    def __init__(self, name: str, path: str, clock: Clock) -> None:
        self.name = name
        self.pool: ManualPool
        self.registry = make_sqlite_registry(path, clock, self.make_pool)
        self.open: dict[str, int] = {}
        self.claiming: dict[str, list[Deferred[Any]]] = {}
        for deferred in (self.registry.open(), self.registry.join(node_info(name))):
            self.pool.run_next()
            deferred.addErrback(lambda failure: failure.raiseException())

    def make_pool(self, *args: Any, **kwargs: Any) -> ManualPool:
        self.pool = ManualPool(*args, **kwargs)
        return self.pool

    def claim(self, client_id: str, check: Any) -> None:
        deferred = self.registry.claim(client_id, "h:1")
        self.claiming.setdefault(client_id, []).append(deferred)

        def claimed(claim: Claim) -> None:
            check(client_id, claim.generation)
            self.open[client_id] = claim.generation

        deferred.addCallback(claimed).addErrback(lambda failure: failure.trap(ClaimSupersededError, CancelledError))
        deferred.addCallback(lambda _: self.claiming[client_id].remove(deferred))

    def queued(self) -> int:
        """Return the number of claims and releases that are queued or in flight."""
        assert self.registry._batcher is not None
        return len(self.registry._batcher)

    def drain(self) -> None:
        while self.pool.pending:
            self.pool.run_next()


class InterleavingTests(SynchronousTestCase):
    """Two nodes on one file, with any order of the actions of clients, nodes and the database."""

    @settings(deadline=None, max_examples=60)
    @given(st.lists(STEPS, max_size=30))
    def test_the_newest_claim_that_was_not_released_is_found(self, steps: list[tuple[str, int, str]]) -> None:
        clock = Clock()
        path = os.path.abspath(self.mktemp())
        nodes = [_Node(name, path, clock) for name in "ab"]
        newest: dict[str, tuple[int, _Node]] = {}
        superseded: set[str] = set()

        for action, which, client_id in steps:
            node = nodes[which]
            if action == "claim":

                def check(client_id: str, generation: int, node: _Node = node) -> None:
                    before = newest.get(client_id, (0, node))[0]
                    self.assertGreater(generation, before, "a generation that did not grow")
                    newest[client_id] = (generation, node)

                node.claim(client_id, check)
            elif action == "cancel" and node.claiming.get(client_id):
                queued = node.queued()
                node.claiming[client_id][0].cancel()
                if node.queued() == queued:
                    # It was in flight: it supersedes the open connection, and is then released.
                    superseded.add(client_id)
            elif action == "release" and client_id in node.open:
                node.registry.release(SessionKey(client_id, node.open.pop(client_id))).addErrback(lambda _: None)
            elif action == "flush":
                clock.advance(0.003)
            elif action == "step":
                node.pool.run_next()

        for _ in range(3):
            clock.advance(0.01)
            for node in nodes:
                node.drain()
        for node in nodes:
            self.assertEqual(sum(map(len, node.claiming.values())), 0)

        looked_up = nodes[0].registry.clients("", 10)
        nodes[0].drain()
        found = {location.client_id: location for location in self.successResultOf(looked_up)}
        for client_id, (generation, node) in newest.items():
            if node.open.get(client_id) == generation and client_id not in superseded:
                self.assertIn(client_id, found, "a connection without its row")
        for location in found.values():
            generation, node = newest[location.client_id]
            self.assertEqual((location.generation, location.node_name), (generation, node.name))
            self.assertEqual(node.open.get(location.client_id), generation, "a row of no connection")
        for node in nodes:
            closed = node.registry.close()
            node.drain()
            self.successResultOf(closed)
