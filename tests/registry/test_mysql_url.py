from __future__ import annotations

import os
import ssl
from urllib.parse import quote

import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.mysql import MySQLServer, TLSOptions, parse_url
from gateway.settings import ConfigError

NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)


class ParseURLTests(SynchronousTestCase):
    def refused(self, url: str) -> str:
        text = str(self.assertRaises(ConfigError, parse_url, url))
        self.assertTrue(text.startswith("--registry: "), text)
        self.assertTrue(text.isprintable(), text)
        return text

    def test_the_parts(self) -> None:
        self.assertEqual(parse_url("mysql://gw@db.example:3307/fleet"), MySQLServer("db.example", 3307, "gw", "fleet"))
        self.assertEqual(parse_url("mysql://gw@db.example/fleet").port, 3306)

    def test_an_ipv6_address(self) -> None:
        server = parse_url("mysql://gw@[2001:db8::1]:3307/fleet")
        self.assertEqual((server.host, server.port, str(server)), ("2001:db8::1", 3307, "[2001:db8::1]:3307/fleet"))

    @given(NAMES, NAMES)
    def test_percent_encoding(self, user: str, database: str) -> None:
        server = parse_url(f"mysql://{quote(user, safe='')}@h/{quote(database, safe='')}")
        self.assertEqual((server.user, server.database), (user, database))

    def test_a_password_is_refused_and_not_shown(self) -> None:
        for url in ("mysql://gw:hunter2@h/d", "mysql://gw:@h/d", "mysql://gw:hunter2@h"):
            text = self.refused(url)
            self.assertIn("--registry-password-file", text)
            self.assertIn("WSGATEWAY_REGISTRY_PASSWORD", text)
            self.assertNotIn("hunter2", text)

    def test_what_is_missing(self) -> None:
        for url, what in (
            ("mysql://h/d", "user"),
            ("mysql://gw@/d", "host"),
            ("mysql://gw@h", "database"),
            ("mysql://gw@h/", "database"),
            ("mysql:", "user"),
        ):
            self.assertIn(f"the {what} is missing; write mysql://", self.refused(url))

    def test_what_will_not_do(self) -> None:
        for url in (
            "mysql://gw@h:port/d",
            "mysql://gw@h:99999/d",
            "mysql://gw@h:0/d",
            "mysql://gw@h/d/e",
            "mysql://gw@h/d#f",
            "mysql://gw@[::1/d",
            "mysql://gw@h/%00",
            "mysql://g%0aw@h/d",
        ):
            self.refused(url)

    def test_parameters(self) -> None:
        self.assertIn(
            "there are ssl_ca, ssl_cert, ssl_key, ssl_verify", self.refused("mysql://gw@h/d?sslca=/etc/ca.pem")
        )
        self.assertIn("no parameter", self.refused("mysql://gw@h/d?nonsense"))
        self.assertIn("given once", self.refused("mysql://gw@h/d?ssl_verify=true&ssl_verify=true"))
        self.assertIn("given once", self.refused("mysql://gw@h/d?ssl_verify="))
        self.assertIn("neither true nor false", self.refused("mysql://gw@h/d?ssl_verify=no"))
        self.assertIn("give ssl_cert as well", self.refused("mysql://gw@h/d?ssl_key=k"))

    def test_files_that_cannot_be_used(self) -> None:
        self.assertIn("ssl_ca=/nowhere cannot be used: No such file", self.refused("mysql://gw@h/d?ssl_ca=/nowhere"))
        self.assertIn("ssl_cert=/nowhere", self.refused("mysql://gw@h/d?ssl_cert=/nowhere"))
        self.assertIn("ssl_ca=", self.refused(f"mysql://gw@h/d?ssl_ca={quote(__file__)}"))

    def test_certificates(self) -> None:
        authority = trustme.CA()
        ca, cert = os.path.abspath(self.mktemp()), os.path.abspath(self.mktemp())
        authority.cert_pem.write_to_path(ca)
        authority.issue_cert("gw").private_key_and_cert_chain_pem.write_to_path(cert)
        tls = parse_url(f"mysql://gw@h/d?ssl_ca={quote(ca)}&ssl_cert={quote(cert)}&ssl_key={quote(cert)}").tls
        assert tls is not None
        self.assertEqual(tls, TLSOptions(ca, cert, cert, True))
        context = tls.make_context()
        self.assertEqual((context.check_hostname, context.verify_mode), (True, ssl.CERT_REQUIRED))
        self.assertEqual(len(context.get_ca_certs()), 1)

    def test_tls_is_verified_unless_it_is_said_not_to_be(self) -> None:
        self.assertIsNone(parse_url("mysql://gw@h/d").tls)
        for value, mode in (("true", ssl.CERT_REQUIRED), ("false", ssl.CERT_NONE)):
            tls = parse_url(f"mysql://gw@h/d?ssl_verify={value}").tls
            assert tls is not None
            self.assertEqual(tls.make_context().verify_mode, mode)
            self.assertEqual(tls.make_context().check_hostname, value == "true")

    @settings(max_examples=300)
    @given(st.text(st.sampled_from("mysql:/@?#[]%&=;.0 aZ\n\0\u00e9\ud800"), max_size=30))
    def test_any_text_is_a_server_or_an_error_of_one_line(self, text: str) -> None:
        try:
            server = parse_url("mysql:" + text)
        except ConfigError as e:
            self.assertNotIn("\n", str(e))
        else:
            self.assertTrue(server.user and server.host and server.database and server.port)
