"""Tests of gateway.api.http_server."""

from __future__ import annotations

from urllib.parse import quote

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import TestCase

from gateway.api.errors import BadRequestError
from gateway.api.http_server import Query, parse_client_id, parse_seconds, percent_decode, rpc_client_id
from gateway.protocol.client_id import is_client_id, is_former_client_id
from tests.builders.client_ids import client_id_parts, client_ids


class QueryTests(TestCase):
    def test_parameters(self):
        query = Query(b"a=1&b=%2Fx&c&d=&e=1+2&=z&&a%61=3")
        self.assertEqual([query.get(name) for name in "abcdef"], ["1", "/x", "", "", "1+2", None])

    def test_repeated_parameter(self):
        with self.assertRaises(BadRequestError) as caught:
            Query(b"a=1&a=1").get("a")
        self.assertEqual(caught.exception.word, "a")
        for raw in (b"a&a", b"a=1&%61=1", b"%61&b&%61=", b"a=%zz&a=1"):
            with self.assertRaises(BadRequestError):
                Query(raw).get("a")
        self.assertIsNone(Query(b"b=1&b=1&%zz&%zz=1&%ff").get("a"))

    def test_encoded_name(self):
        self.assertEqual(Query(b"%61%2F=%62").get("a/"), "b")

    def test_rpc_client_id(self):
        for path, client in (
            (b"/v1/clients/a%2Fb/rpc", "a/b"),
            (b"/v1/clients/a/rpc/rpc", "a/rpc"),
            (b"/v1/clients/rpc", None),
            (b"/v1/clients//rpc", None),
            (b"/v1/clients/%/rpc", None),
            (b"/v1/clients/a", None),
            (b"/v1/nodes/a/rpc", None),
            (b"/v1/clients/a//b/rpc", None),
            (b"/v1/clients/a/rpc?client_id=b", "a"),
            (b"/v1/rpc?timeout=1&client_id=a%2Fb", "a/b"),
            (b"/v1/rpc?client_id=a&client_id=a", None),
            (b"/v1/rpc?client_id=", None),
            (b"/v1/rpc", None),
            (b"/v1/client?client_id=a", None),
        ):
            self.assertEqual(rpc_client_id(path), client)

    def test_integer(self):
        self.assertEqual(Query(b"").get_int("n", 5, 1, 9), 5)
        self.assertEqual(Query(b"n=9").get_int("n", 5, 1, 9), 9)
        for bad in (b"0", b"10", b"+1", b" 1", b"1.0", b"\xd9\xa1", b"%D9%A1"):
            with self.assertRaises(BadRequestError):
                Query(b"n=" + bad).get_int("n", 5, 1, 9)

    def test_percent_decode(self):
        self.assertEqual(percent_decode(b"a%2fb%2Fc%25"), "a/b/c%")
        self.assertEqual(percent_decode(b"%c3%a9"), "é")
        for bad in (b"%", b"%4", b"%4g", b"%ff", b"%ed%a0%80", b"\xff", b"% 41"):
            with self.assertRaises(ValueError):
                percent_decode(bad)

    def test_seconds(self):
        self.assertEqual(
            [parse_seconds("t", text) for text in ("1", "0.5", ".5", "5.", "007")], [1.0, 0.5, 0.5, 5.0, 7.0]
        )
        for bad in ("", ".", "0", "0.0", "-1", "+1", "1e3", "1_0", " 1", "1 ", "nan", "inf", "0x1", "٣", "1\n"):
            with self.assertRaises(BadRequestError, msg=bad):
                parse_seconds("t", bad)

    @given(client_ids)
    @settings(deadline=None)
    def test_encoded_ids_round_trip(self, text):
        self.assertTrue(is_client_id(text))
        self.assertEqual(parse_client_id(quote(text, safe="").encode("ascii")), text)
        self.assertEqual(parse_client_id(text.encode("ascii")), text)
        self.assertEqual(Query(b"after=" + text.encode("ascii")).get_client_id_part("after"), text)
        for encoded in (text, quote(text, safe="")):
            self.assertEqual(Query(b"client_id=" + encoded.encode("ascii")).get_client_id(), text)

    def test_client_id(self):
        for raw in (
            b"",
            b"client_id",
            b"client_id=",
            b"client_id=a&client_id=a",
            b"client_id=a&client%5fid=b",
            b"id=a",
        ):
            for or_former in (False, True):
                with self.assertRaises(BadRequestError) as caught:
                    Query(raw).get_client_id(or_former=or_former)
                self.assertEqual(caught.exception.word, "client_id")
        self.assertEqual(Query(b"client_id=a+b&timeout=5").get_client_id(), "a+b")

    @given(client_id_parts)
    @settings(deadline=None)
    def test_former_client_ids(self, text):
        query = Query(b"client_id=" + quote(text, safe="/").encode("ascii"))
        if not is_client_id(text):
            self.assertRaises(BadRequestError, query.get_client_id)
        if is_client_id(text) or is_former_client_id(text):
            self.assertEqual(query.get_client_id(or_former=True), text)
        else:
            self.assertRaises(BadRequestError, query.get_client_id, or_former=True)

    @given(st.binary(max_size=40))
    @settings(max_examples=300, deadline=None)
    def test_arbitrary_bytes(self, raw):
        try:
            client_id = parse_client_id(raw)
        except BadRequestError as e:
            self.assertEqual(e.word, "client_id")
        else:
            self.assertTrue(is_client_id(client_id))
        try:
            Query(raw).get("a")
        except BadRequestError as e:
            self.assertEqual(e.word, "a")
