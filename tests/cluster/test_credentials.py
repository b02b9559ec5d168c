"""gateway.cluster.auth"""

from __future__ import annotations

import hashlib
import hmac
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster import auth
from gateway.cluster.auth import (
    MAX_SIGNATURE_LIFETIME,
    NONCE_WINDOW,
    SIGNATURE_LIFETIME,
    WRONG_NODE,
    ClusterSecret,
    PeerAuth,
    PeerAuthenticationError,
)
from gateway.settings import ConfigError

A, B, C = (f"{digit * 8}-0000-4000-8000-000000000000" for digit in "abc")
SECRET = b"a secret of both nodes"
REQUEST = ("GET", "/v1/relay?client_id=x&address=1", "x", "192.0.2.1:4711")


class PeerAuthTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.wall_time = 1763000000.25
        self.secret = SECRET
        self.a = PeerAuth(A, lambda: SECRET, lambda: self.wall_time)
        self.b = PeerAuth(B, lambda: self.secret, lambda: self.wall_time)

    def assert_refused(self, why: str, header: str, *request: str) -> None:
        with self.assertRaises(PeerAuthenticationError) as caught:
            self.b.verify(header, *(request or REQUEST))
        self.assertIn(why, str(caught.exception))

    def test_form(self) -> None:
        header = self.a.sign(B, *REQUEST)
        scheme, _, value = header.partition(" ")
        version, sender, to, expires, nonce, mac = value.split(".")
        self.assertEqual((scheme, version, sender, to, int(expires)), ("Wsgateway-Peer", "v1", A, B, 1763000030))
        self.assertRegex(nonce, "^[0-9a-f]{32}$")
        lines = "\n".join((value.rpartition(".")[0], *REQUEST)).encode()
        self.assertEqual(mac, hmac.new(SECRET, lines, hashlib.sha256).hexdigest())

    def test_round_trip(self) -> None:
        self.assertEqual(self.b.verify(self.a.sign(B, *REQUEST), *REQUEST), A)
        self.assertEqual(self.b.verify(self.a.sign(B, "GET", "/v1/backend"), "GET", "/v1/backend"), A)
        header = self.a.sign(B, *REQUEST).replace("Wsgateway-Peer", "wsgateway-PEER")
        self.assertEqual(self.b.verify(header, *REQUEST), A)

    def test_each_field_is_signed(self) -> None:
        for index, other in enumerate(("POST", "/v1/relay", "y", "192.0.2.1:4712")):
            request = [*REQUEST]
            request[index] = other
            self.assert_refused("the cluster secrets differ", self.a.sign(B, *REQUEST), *request)
        header = self.a.sign(B, *REQUEST)
        self.assert_refused("secrets differ", header.replace(A, C))
        for index in (3, 4, 5):
            fields = header.split(".")
            fields[index] = fields[index][:-1] + ("0" if fields[index][-1] != "0" else "1")
            self.assert_refused("secrets differ", ".".join(fields))

    def test_lines_cannot_be_moved(self) -> None:
        header = self.a.sign(B, "GET", "/", "x\ny", "z")
        self.assert_refused("is not Wsgateway-Peer", header, "GET", "/", "x\ny", "z")
        self.assert_refused("is not Wsgateway-Peer", header, "GET", "/", "x", "y\nz")

    def test_another_node(self) -> None:
        self.assert_refused(WRONG_NODE, self.a.sign(C, *REQUEST))

    def test_secret(self) -> None:
        header = self.a.sign(B, *REQUEST)
        self.secret = SECRET + b"!"
        self.assert_refused("secrets differ", header)
        self.secret = b""
        self.assert_refused("no cluster secret", header)
        self.b._secret = mock.Mock(side_effect=ConfigError("cluster-secret-file", "bad"))
        self.assert_refused("cannot read its own cluster secret", header)
        self.b._secret = lambda: SECRET
        self.assertEqual(self.b.verify(header, *REQUEST), A)

    def test_of_a_file(self) -> None:
        path = self.mktemp()
        a, b = (PeerAuth(each, ClusterSecret(path, create_if_missing=True), lambda: self.wall_time) for each in (A, B))
        with self.assertRaises(PeerAuthenticationError):
            b.verify(self.a.sign(B, *REQUEST), *REQUEST)
        self.assertEqual(b.verify(a.sign(B, *REQUEST), *REQUEST), A)

    def test_time(self) -> None:
        began = self.wall_time
        for later, good in ((0, True), (29.5, True), (31, False), (-30, True), (-31, False)):
            self.wall_time = began
            header = self.a.sign(B, *REQUEST)
            self.wall_time = began + later
            if good:
                self.assertEqual(self.b.verify(header, *REQUEST), A, later)
            else:
                self.assert_refused("clocks", header)
        self.assertEqual((SIGNATURE_LIFETIME, MAX_SIGNATURE_LIFETIME), (30, 60))

    def test_once(self) -> None:
        header = self.a.sign(B, *REQUEST)
        self.b.verify(header, *REQUEST)
        self.wall_time += 29
        self.assert_refused("used before", header)
        self.assertEqual(self.b.verify(self.a.sign(B, *REQUEST), *REQUEST), A)

    def test_a_refused_one_is_not_remembered(self) -> None:
        header = self.a.sign(B, *REQUEST)
        self.assert_refused("secrets differ", header[:-1] + ("0" if header[-1] != "0" else "1"))
        self.assertEqual(len(self.b._nonces), 0)
        self.b.verify(header, *REQUEST)

    def test_memory_is_bounded(self) -> None:
        self.patch(auth, "MAX_NONCES", 3)
        for _ in range(3):
            self.b.verify(self.a.sign(B, *REQUEST), *REQUEST)
            self.wall_time += 1
        header = self.a.sign(B, *REQUEST)
        self.assert_refused("more than 3 requests", header)
        # The first of them was 60 s ago.
        self.wall_time += NONCE_WINDOW - 3
        self.b.verify(self.a.sign(B, *REQUEST), *REQUEST)
        self.assertEqual(len(self.b._nonces), 3)
        self.wall_time += NONCE_WINDOW
        self.b.verify(self.a.sign(B, *REQUEST), *REQUEST)
        self.assertEqual(len(self.b._nonces), 1)

    def test_malformed(self) -> None:
        header = self.a.sign(B, *REQUEST)
        for bad in (
            "",
            "Bearer x",
            header + " ",
            header + "\n",
            " " + header,
            header.replace("v1", "v2"),
            header.replace(" ", ""),
            header[:-1],
            header + "0",
            header.upper(),
            header.replace("1763000030", "17630000e0"),
            header.replace("1763000030", "1" * 16),
            header.replace("1763000030", "\u0661" * 10),
            header.replace("1763000030", "-1"),
            header.replace(A, ""),
            header.replace(A, "a.b"),
            header.replace(A, "a" * 65),
        ):
            self.assert_refused("is not Wsgateway-Peer", bad)

    @settings(deadline=None, max_examples=200)
    @given(
        st.one_of(st.text(max_size=300), st.text("v1.0af- ", max_size=200).map("Wsgateway-Peer ".__add__)), st.text()
    )
    def test_generated(self, header: str, target: str) -> None:
        with self.assertRaises(PeerAuthenticationError):
            PeerAuth(B, lambda: SECRET).verify(header, "GET", target)

    @settings(deadline=None, max_examples=100)
    @given(st.text(), st.text(), st.text())
    def test_generated_round_trip(self, target: str, client_id: str, address: str) -> None:
        a, b = PeerAuth(A, lambda: SECRET, lambda: 9.0), PeerAuth(B, lambda: SECRET, lambda: 9.0)
        header = a.sign(B, "GET", target, client_id, address)
        if "\n" in target + client_id + address:
            with self.assertRaises(PeerAuthenticationError):
                b.verify(header, "GET", target, client_id, address)
        else:
            self.assertEqual(b.verify(header, "GET", target, client_id, address), A)
