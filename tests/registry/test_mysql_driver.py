"""The formatting of statements, and how a real server parses them."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry import mysql_driver
from gateway.registry.mysql import MySQL, parse_url
from tests.builders import mariadb

#: any text in UTF-8, with many characters that are special in SQL
TEXTS = st.text(st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from("'\"\\\0\n\r\x1a%_?`;-#/*")))
#: the range of a DATETIME
TIMES = st.integers(0, 253402300799999999)


class TextTests(SynchronousTestCase):
    @given(TIMES)
    def test_a_time_is_read_as_it_was_written(self, microseconds: int) -> None:
        self.assertEqual(mysql_driver.parse_datetime(mysql_driver.format_datetime(microseconds)), microseconds)

    def test_times(self) -> None:
        self.assertEqual(mysql_driver.format_datetime(0), "1970-01-01 00:00:00.000000")
        self.assertEqual(mysql_driver.parse_datetime("2023-11-14 22:13:20"), 1_700_000_000_000_000)
        self.assertEqual(mysql_driver.parse_datetime("2023-11-14 22:13:20.000001"), 1_700_000_000_000_001)

    def test_an_invalid_date_is_0(self) -> None:
        for text in ("0000-00-00 00:00:00.000000", "0000-00-00 00:00:00", "2023-00-00 00:00:00", "2023-01-00 10:00:00"):
            self.assertEqual(mysql_driver.parse_datetime(text), 0)

    def test_literals(self) -> None:
        for value, text in (
            (None, "NULL"),
            (7, "7"),
            (-7, "-7"),
            (True, "1"),
            ("", "''"),
            ("it's", "'it\\'s'"),
            ("\\", "'\\\\'"),
        ):
            self.assertEqual(mysql_driver.literal(value), text)
        for wrong in (1.5, b"x", [1], object()):
            self.assertRaises(TypeError, mysql_driver.literal, wrong)

    def test_a_statement_has_as_many_values_as_parameters(self) -> None:
        self.assertEqual(mysql_driver.format_statement("a = ? AND b = ?", ("?", 1)), "a = '?' AND b = 1")
        for values in ((1,), (1, 2, 3)):
            self.assertRaises(ValueError, mysql_driver.format_statement, "a = ? AND b = ?", values)


class ConnectionTests(SynchronousTestCase):
    """The server parses literals as the values that were formatted."""

    def setUp(self) -> None:
        mysql = MySQL(parse_url(mariadb.server().new_database()), bytes, 15.0)
        self.connection = mysql_driver.connect(mysql.make_connection)
        self.addCleanup(self.connection.close)
        mysql.prepare(self.connection)
        self.mysql = mysql

    def ask(self, text: str, *values: Any) -> Any:
        with contextlib.closing(self.connection.cursor()) as cursor:
            cursor.execute(text, values)
            return cursor.fetchall()

    @settings(deadline=None, max_examples=300)
    @given(TEXTS)
    def test_texts(self, text: str) -> None:
        self.assertEqual(self.ask("SELECT ?, ?", text, 1), ((text, 1),))

    @settings(deadline=None, max_examples=50)
    @given(TIMES)
    def test_times(self, microseconds: int) -> None:
        ((read,),) = self.ask("SELECT CAST(? AS DATETIME(6))", mysql_driver.format_datetime(microseconds))
        self.assertEqual(read, microseconds)

    @settings(deadline=None, max_examples=100)
    @given(
        st.dictionaries(
            st.text(st.characters(max_codepoint=127), min_size=1, max_size=8),
            st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 2**63 - 1), TIMES, TEXTS.map(lambda text: text[:255])),
            min_size=1,
            max_size=5,
        )
    )
    def test_rows(self, clients: dict[str, tuple[int, int, int, str]]) -> None:
        rows = [(client_id, *rest) for client_id, rest in sorted(clients.items())]
        with contextlib.closing(self.connection.cursor()) as cursor:
            self.assertEqual(self.mysql.lock_clients(cursor, [(row[0], "") for row in rows]), len(rows))
            self.assertEqual(self.mysql.lock_clients(cursor, [(row[0], "other") for row in rows]), 0)
            self.mysql.write_clients(cursor, rows)
            self.assertEqual(list(self.ask("SELECT * FROM clients ORDER BY client_id")), rows)
            self.mysql.remove_clients(cursor, [(row[0], 0) for row in rows])
            self.assertEqual(len(self.ask("SELECT * FROM clients")), len(rows))
            self.mysql.remove_clients(cursor, [(row[0], row[1]) for row in rows])
        self.assertEqual(self.ask("SELECT * FROM clients"), ())

    def test_commits_are_sent_only_in_a_transaction(self) -> None:
        (before,) = self.ask("SHOW SESSION STATUS LIKE 'Com_commit'")
        self.connection.commit()
        self.connection.rollback()
        self.assertEqual(self.ask("SHOW SESSION STATUS LIKE 'Com_commit'"), (before,))
        self.ask("START TRANSACTION")
        self.connection.commit()
        ((_, count),) = self.ask("SHOW SESSION STATUS LIKE 'Com_commit'")
        self.assertEqual(int(count), int(before[1]) + 1)

    def test_a_connection_that_was_idle_for_long_is_not_used(self) -> None:
        self.assertTrue(self.connection.is_usable(60.0))
        self.assertFalse(self.connection.is_usable(0.0))
        self.connection.needs_reconnect = True
        self.assertFalse(self.connection.is_usable(60.0))

    def test_other_rows_are_not_read(self) -> None:
        """Rows are found by key even in a small table, since a scan would wait for other rows' locks."""
        for text in (
            "DELETE c FROM clients c FORCE INDEX (PRIMARY) WHERE c.client_id IN ('a', 'c') AND c.node IN (1)",
            "UPDATE clients FORCE INDEX (PRIMARY) SET node = 1 WHERE client_id IN ('a', 'c')",
        ):
            for count in (0, 1, 3, 100):
                self.ask("DELETE FROM clients")
                names = [(f"{number:03}", "") for number in range(count)]
                with contextlib.closing(self.connection.cursor()) as cursor:
                    if names:
                        self.mysql.lock_clients(cursor, [("a", ""), *names, ("c", "")])
                        ((_, _, _, kind, _, key, *_),) = self.ask(f"EXPLAIN {text}")
                        self.assertEqual((kind, key), ("range", "PRIMARY"), f"{text} with {count} rows")
