"""Races of several nodes at one database: each client has one owner, which its row names."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, DeferredList, gatherResults, maybeDeferred
from twisted.trial.unittest import TestCase

from gateway.registry.errors import LeaseLostError, OwnedElsewhereError
from gateway.registry.interface import ALWAYS_TAKE_OVER, Claim, ClaimPolicy, Location, SessionKey
from gateway.registry.mysql import MySQLRegistry
from tests.builders import mariadb
from tests.builders.mysql_registry import ThreadedRegistryMixin
from tests.builders.registry_contract import LEASE

#: clients that all nodes claim at once
CLIENTS = 1000


class RaceTests(ThreadedRegistryMixin, TestCase):
    timeout = 120

    def setUp(self) -> None:
        self.url = mariadb.server().new_database()
        self.database = self.url.rpartition("/")[2]
        self.names = [f"c{number:04}" for number in range(CLIENTS)]

    async def nodes(self, count: int) -> list[MySQLRegistry]:
        return [await self.start_node(f"n{number}", batch_delay=0.0) for number in range(count)]

    async def race(
        self, nodes: list[MySQLRegistry], policy: ClaimPolicy = ALWAYS_TAKE_OVER
    ) -> dict[str, list[Claim | OwnedElsewhereError]]:
        """Let all nodes claim each client at once, each starting with another client. Returns the outcomes by client."""
        pending: dict[str, list[Deferred[Any]]] = {name: [] for name in self.names}
        for index in range(CLIENTS):
            for number, node in enumerate(nodes):
                name = self.names[(index + number * 7) % CLIENTS]
                deferred = maybeDeferred(node.claim, name, f"{number}:1", policy)
                pending[name].append(
                    deferred.addErrback(lambda failure: failure.trap(OwnedElsewhereError) and failure.value)
                )
        return {name: list(await gatherResults(claims)) for name, claims in pending.items()}

    async def found(self, node: MySQLRegistry) -> dict[str, Location]:
        return {each.client_id: each for each in await node.clients("", 2 * CLIENTS)}

    def test_two_nodes(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._over_none(2))

    def test_eight_nodes(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._over_none(8))

    async def _over_none(self, count: int) -> None:
        """Without takeover, one node owns each client, and the others learn which."""
        nodes = await self.nodes(count)
        outcomes = await self.race(nodes, ClaimPolicy(takeover_up_to=0))
        found = await self.found(nodes[0])
        self.assertEqual(sorted(found), self.names)
        for name, each in outcomes.items():
            claims = [outcome for outcome in each if isinstance(outcome, Claim)]
            self.assertEqual(len(claims), 1, f"{name} has {len(claims)} owners")
            self.assertEqual(found[name].generation, claims[0].generation)
            for outcome in each:
                if isinstance(outcome, OwnedElsewhereError):
                    self.assertEqual(outcome.location, found[name])
        self.assertEqual(self.metrics.registry_errors, {})

    def test_two_nodes_over_each_other(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._over_each_other(2))

    def test_eight_nodes_over_each_other(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._over_each_other(8))

    async def _over_each_other(self, count: int) -> None:
        """With takeover, the last one owns the client, and each of the others is the previous owner of the next."""
        nodes = await self.nodes(count)
        outcomes = await self.race(nodes)
        found = await self.found(nodes[0])
        for name, each in outcomes.items():
            claims = sorted((claim for claim in each if isinstance(claim, Claim)), key=lambda claim: claim.generation)
            generations = [claim.generation for claim in claims]
            self.assertEqual(len(set(generations)), count)
            self.assertEqual(found[name].generation, generations[-1])
            befores = [None if claim.previous_owner is None else claim.previous_owner.generation for claim in claims]
            self.assertEqual(befores, [None, *generations[:-1]])
        await self._late_releases(nodes, outcomes, found)

    async def _late_releases(
        self, nodes: list[MySQLRegistry], outcomes: dict[str, list[Any]], found: dict[str, Location]
    ) -> None:
        """Let each loser release its claim: no newer claim is removed."""
        for release_winner in (False, True):
            await gatherResults(
                [
                    node.release(SessionKey(name, claim.generation))
                    for name, claims in outcomes.items()
                    for claim in claims
                    for node in nodes
                    if release_winner or claim.generation != found[name].generation
                ]
            )
            self.assertEqual(await self.found(nodes[0]), {} if release_winner else found)

    def test_claims_and_late_releases_at_once(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._at_once())

    async def _at_once(self) -> None:
        a, b = await self.nodes(2)
        first = await gatherResults([a.claim(name, "a:1") for name in self.names])
        released = [
            a.release(SessionKey(name, claim.generation)) for name, claim in zip(self.names, first, strict=True)
        ]
        claimed = [b.claim(name, "b:1") for name in reversed(self.names)]
        second = dict(zip(reversed(self.names), await gatherResults(claimed), strict=True))
        await gatherResults(released)
        found = await self.found(a)
        self.assertEqual(
            {name: each.generation for name, each in found.items()}, {n: c.generation for n, c in second.items()}
        )
        for name, claim in zip(self.names, first, strict=True):
            self.assertGreater(second[name].generation, claim.generation)

    def test_claims_in_flight_while_their_node_leaves(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._leaving())

    async def _leaving(self) -> None:
        for number in range(5):
            node = await self.start_node(f"n{number}", batch_delay=0.0)
            claims = [node.claim(name, "h:1") for name in self.names]
            await claims[0]
            leaving = node.leave()
            outcomes = await DeferredList(claims, consumeErrors=True)
            await leaving
            for ok, outcome in outcomes:
                self.assertTrue(ok or outcome.check(LeaseLostError))
            for table in ("clients", "nodes"):
                text = f"SELECT COUNT(*) FROM {table}"
                self.assertEqual(mariadb.server().execute(text, database=self.database), ((0,),))

    def test_several_nodes_reap_while_others_claim(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._reap())

    async def _reap(self) -> None:
        dead, *nodes = await self.nodes(5)
        await gatherResults([dead.claim(name, "dead:1") for name in self.names])
        await dead.close()
        text = f"UPDATE nodes SET heartbeat_at = heartbeat_at - INTERVAL {LEASE} SECOND WHERE name = 'n0'"
        mariadb.server().execute(text, database=self.database)
        taken = {name: nodes[index % 2] for index, name in enumerate(self.names) if index % 3 == 0}
        claimed = gatherResults(
            [
                node.claim(name, "h:1", ClaimPolicy(takeover_up_to=0, ignore_expired_owner=True))
                for name, node in taken.items()
            ]
        )
        await gatherResults([node.reap(300) for node in nodes for _ in range(6)])
        await claimed
        self.assertEqual(sorted(await self.found(nodes[0])), sorted(taken))
        left = mariadb.server().execute("SELECT COUNT(*) FROM clients", database=self.database)
        self.assertEqual(left, ((len(taken),),))
        names = mariadb.server().execute("SELECT name FROM nodes ORDER BY name", database=self.database)
        self.assertEqual(names, tuple((f"n{number}",) for number in range(1, 5)))
