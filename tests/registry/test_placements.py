"""What every registry promises of placements."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.registry import statements
from gateway.registry.interface import Claim, HeldElsewhere, Place, PlacedElsewhere, RegistryUnavailable
from gateway.registry.job_queue import Turn
from gateway.registry.sql import SQLRegistry
from tests import mariadb
from tests.registry.contract import LEASE, RegistryMixin, node_info
from tests.registry.mysql_case import RealMixin
from tests.registry.test_mysql import MySQLMixin
from tests.registry.test_sqlite import SQLiteMixin

MINUTE = 60.0


def id_of(name: str) -> str:
    return node_info(name).node_id


class PlacementsMixin(RegistryMixin):
    """Clients of node ``a`` are placed on node ``b``; node ``c`` is there, too."""

    def setUp(self) -> None:
        super().setUp()
        self.b, self.c = self.start("b"), self.start("c")
        self.where_b = Place(id_of("b"), "b", "ws://b/", "ws://b:81/")

    def wait(self, seconds: float, *dead: SQLRegistry) -> None:
        """Time passes, some milliseconds more than that for each heartbeat, and all heartbeat but the dead."""
        while seconds > 0:
            self.clock.advance(min(seconds, LEASE / 3))
            seconds -= LEASE / 3
            for each in (self.a, self.b, self.c):
                if each not in dead:
                    self.get(each.heartbeat("up", 0))

    def place(self, *client_ids: str, by: SQLRegistry | None = None, on: str = "b") -> list[str]:
        return sorted(self.get((by or self.a).place(client_ids, id_of(on))))

    def claim(self, registry: SQLRegistry, client_id: str = "x", **options: Any) -> Deferred[Claim]:
        return registry.claim(client_id, "h:1", **{"over": 0, "judge": True, "placed": True, **options})

    def sent(self, deferred: Deferred[Any]) -> Place:
        place: Place = self.fails(deferred, PlacedElsewhere).place
        return place

    def test_one_that_is_only_written_down(self) -> None:
        """It is sent nowhere, but counts as moved."""
        self.assertEqual(self.get(self.a.place(["x"], id_of("b"), binding=False)), ["x"])
        self.assertIsNone(self.get(self.a.placed("x")))
        self.get(self.claim(self.c))
        self.assertEqual(self.place("x"), [])

    def test_it_wins_wherever_the_client_arrives(self) -> None:
        self.get(self.claim(self.a))
        self.assertEqual(self.place("x", "y"), ["x", "y"])
        for registry in (self.a, self.c):
            self.assertEqual(self.sent(self.claim(registry)), self.where_b)
            self.assertEqual(self.sent(self.claim(registry, "y", over=None)), self.where_b)
            self.assertEqual(self.get(registry.placed("x")), self.where_b)
        self.assertEqual((self.where("x"), self.where("y")), ("a", None))

    def test_where_it_is_placed_it_is_taken_from_whoever_has_it(self) -> None:
        had = self.get(self.claim(self.a))
        self.place("x")
        claim = self.get(self.claim(self.b))
        self.assertEqual((claim.before.node_name, claim.before.generation), ("a", had.generation))
        self.assertEqual(self.where("x"), "b")
        self.assertEqual(self.sent(self.claim(self.a)), self.where_b)

    def test_who_does_not_ask_is_not_told(self) -> None:
        had = self.get(self.claim(self.a))
        self.place("x", "y")
        self.fails(self.claim(self.c, placed=False), HeldElsewhere)
        self.assertIsInstance(self.get(self.claim(self.c, "y", placed=False)), Claim)
        self.assertEqual(self.get(self.a.reclaim("x", had.generation, "h:1")), had)

    def test_one_that_is_placed_nowhere(self) -> None:
        self.place("y")
        self.assertIsInstance(self.get(self.claim(self.c)), Claim)
        self.assertIsNone(self.get(self.c.placed("x")))
        self.assertIsNone(self.get(self.c.placed("\ud800")))

    def test_a_batch_of_all_kinds(self) -> None:
        self.get(self.claim(self.a, "held"))
        own = self.get(self.claim(self.c, "own"))
        self.place("placed", "own", "other")
        asked = [self.claim(self.c, name) for name in ("placed", "free", "held")]
        released, forced = self.c.release("own", own.generation), self.claim(self.c, "other", placed=False)
        self.assertEqual(self.sent(asked[0]), self.where_b)
        self.assertIsInstance(self.get(asked[1]), Claim)
        self.fails(asked[2], HeldElsewhere)
        self.get(released)
        self.assertIsInstance(self.get(forced), Claim)
        self.assertEqual([self.where(name) for name in ("placed", "own", "other")], [None, None, "c"])

    def test_a_newer_claim_that_is_sent_away_turns_no_older_one_away(self) -> None:
        self.place("x")
        older, newer = self.claim(self.c, placed=False), self.claim(self.c)
        self.assertIsInstance(self.get(older), Claim)
        self.sent(newer)

    def test_it_counts_for_two_minutes(self) -> None:
        self.place("x")
        self.wait(2 * MINUTE - 3)
        self.assertEqual(self.sent(self.claim(self.c)), self.where_b)
        self.wait(3)
        self.assertIsNone(self.get(self.c.placed("x")))
        self.assertIsInstance(self.get(self.claim(self.c)), Claim)

    def test_nobody_is_moved_twice_within_ten_minutes_by_whomever(self) -> None:
        self.place("x")
        for seconds in (0, 5 * MINUTE, 5 * MINUTE - 10):
            self.wait(seconds)
            for registry, name in ((self.a, "b"), (self.b, "c"), (self.c, "a")):
                self.assertEqual(self.place("x", by=registry, on=name), [])
        self.assertEqual(self.place("x", "y", by=self.b, on="c"), ["y"])
        self.wait(10)
        self.assertEqual(self.place("x", by=self.b, on="c"), ["x"])
        self.assertEqual(self.sent(self.claim(self.a)).name, "c")

    def test_of_two_movers_at_once_one_wins(self) -> None:
        names = [f"c{number:02}" for number in range(20)]
        first, second = self.a.place(names[:15], id_of("c")), self.b.place(names[5:], id_of("a"))
        self.assertEqual(sorted(self.get(first) + self.get(second)), names)
        self.assertEqual(len(self.get(self.b.place(names, id_of("c")))), 0)

    def test_a_node_that_takes_no_clients(self) -> None:
        self.get(self.b.heartbeat("draining", 1))
        self.assertEqual(self.place("x"), [])
        self.get(self.b.heartbeat("up", 1000))
        self.assertEqual(self.place("x"), [])
        self.assertEqual(self.place("x", on="nobody"), [])
        # It may be placed elsewhere at once.
        self.assertEqual(self.place("x", on="c"), ["x"])

    def test_it_counts_only_while_that_node_takes_clients(self) -> None:
        self.place("x")
        for state, clients in (("draining", 1), ("up", 1000)):
            self.get(self.b.heartbeat(state, clients))
            self.assertIsNone(self.get(self.c.placed("x")))
            self.get(self.c.release("x", self.get(self.claim(self.c)).generation))
        self.get(self.b.heartbeat("up", 999))
        self.assertEqual(self.sent(self.claim(self.c)), self.where_b)

    def test_a_node_whose_lease_ran_out(self) -> None:
        self.place("x", "y")
        self.wait(LEASE + 1, self.b)
        self.assertIsNone(self.get(self.c.placed("x")))
        self.assertIsInstance(self.get(self.claim(self.c)), Claim)
        self.assertEqual(self.place("z"), [])
        self.get(self.c.reap(10))
        self.assertIsInstance(self.get(self.claim(self.c, "y")), Claim)

    def test_a_node_that_has_left(self) -> None:
        self.place("x")
        self.get(self.b.leave())
        self.assertIsInstance(self.get(self.claim(self.c)), Claim)
        self.assertEqual(self.place("y"), [])

    def test_the_end_of_a_placement(self) -> None:
        self.patch(statements, "PIECE", 4)
        self.patch(statements, "CHUNK", 3)
        self.place(*(f"c{number}" for number in range(10)))
        self.wait(5 * MINUTE)
        self.place("c45", "d")
        self.assertEqual([self.get(self.c.tidy()) for _ in range(3)], [False, False, True])
        self.assertEqual(len(self.left()), 12)
        self.wait(5 * MINUTE)
        # Of a piece no more are removed at a time than may be.
        tidied = [self.get(self.c.tidy()) for _ in range(8)]
        self.assertIn(True, tidied)
        self.assertEqual(self.left(), ["c45", "d"])
        self.wait(10 * MINUTE)
        self.assertIs(self.get(self.b.tidy()), True)
        self.assertEqual(self.left(), [])

    def left(self) -> list[str]:
        """The clients whose rows there are."""

        def read(connection: Any) -> list[str]:
            with closing(connection.cursor()) as cursor:
                cursor.execute("SELECT client_id FROM placements ORDER BY client_id")
                return [row[0] for row in cursor.fetchall()]

        found: list[str] = self.get(self.a._do(Turn.CHORES, "read", read))
        return found

    def test_text_that_has_a_meaning_in_sql(self) -> None:
        names = ["'", "\\", "%", "' OR '1'='1", '"', "\n", "\0"]
        self.assertEqual(self.place(*names, "\ud800", "l" * 129), sorted(names))
        for name in names:
            self.assertEqual(self.sent(self.claim(self.c, name)), self.where_b)
        self.assertEqual(self.place("y", on="' OR '1'='1"), [])
        self.assertEqual(self.place(), [])

    def test_when_it_is_closed(self) -> None:
        self.get(self.c.close())
        for asked in (self.c.place(["x"], id_of("b")), self.c.placed("x"), self.c.tidy()):
            self.fails(asked, RegistryUnavailable)


class SQLitePlacementsTests(SQLiteMixin, PlacementsMixin, SynchronousTestCase):
    pass


class MySQLPlacementsTests(MySQLMixin, PlacementsMixin, SynchronousTestCase):
    pass


class RaceTests(RealMixin, TestCase):
    """Several nodes at one server at once."""

    timeout = 60

    async def test_each_client_is_moved_by_one(self) -> None:
        self.url = mariadb.server().fresh()
        nodes = [await self.start(f"n{number}", gather=0.0) for number in range(4)]
        names = [f"c{number:03}" for number in range(300)]
        # Each begins with other clients, and moves them to the next node.
        asked = [
            node.place((names * 2)[start : start + 60], id_of(f"n{(number + 1) % 4}"))
            for start in range(0, 300, 30)
            for number, node in enumerate(nodes)
        ]
        moved = [name for each in await gatherResults(asked) for name in each]
        self.assertEqual(sorted(moved), names)
        self.assertEqual(self.metrics.registry_errors, {})
        found = await gatherResults([nodes[0].placed(name) for name in names])
        self.assertNotIn(None, found)
