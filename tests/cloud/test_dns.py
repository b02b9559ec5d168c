from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway import cloud
from gateway.cloud import dns
from gateway.cloud.dns import make_name_service, make_registrar
from gateway.cloud.errors import AwsError, NameServiceError
from gateway.cloud.registrar import DnsRegistrar
from gateway.metrics import Metrics
from gateway.settings import ConfigError, Settings

KEY = 'key "k" { algorithm hmac-sha256; secret "c2VjcmV0"; };'


class Resolver:
    """A resolver that resolves every name to the given addresses."""

    def __init__(self, *addresses: Any) -> None:
        self._addresses = addresses

    def resolveHostName(self, receiver: Any, host: str) -> None:
        receiver.resolutionBegan(self)
        for address in self._addresses:
            receiver.addressResolved(address)
        receiver.resolutionComplete()


class DnsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.key_file = Path(self.mktemp()).absolute()
        self.key_file.write_text(KEY)
        self.clock: Any = Clock()

    def rfc2136(self, more: str = "", name: str = "gw.example.com", server: str = "192.0.2.1") -> str:
        return f"rfc2136:server={server}:zone=example.com:name={name}:key-file={self.key_file}{more}"

    def refused(self, spec: str) -> str:
        error = self.assertRaises(ConfigError, make_name_service, spec, self.clock)
        self.assertEqual(error.option, "dns")
        self.assertNotIn("\n", str(error))
        return str(error)


class ServiceTests(DnsTestCase):
    def test_kinds(self) -> None:
        for spec in (
            "route53:zone=Z1:name=gw.example.com",
            "route53:zone=/hostedzone/Z1:name=gw.example.com:ttl=5:address=192.0.2.1:health-check=0-a",
            self.rfc2136(),
            self.rfc2136(":port=5353:ttl=5:address=192.0.2.1"),
        ):
            make_name_service(spec, self.clock)

    def test_errors_name_the_problem(self) -> None:
        for spec, problem in (
            ("bind:zone=Z1", "'bind' is not a name service"),
            ("route53", "'zone' is missing"),
            ("route53:zone=Z1:name=gw.example.com:colour=red", "'colour=red' has no place"),
            ("route53:zone=example.com:name=gw.example.com", "zone='example.com' is not a hosted zone id"),
            ("route53:zone=Z1:name=gw..com", "name='gw..com' is not a domain name"),
            ("route53:zone=Z1:name=gw.example.com:ttl=soon", "ttl 'soon' is not an integer from 1 to 86400"),
            ("route53:zone=Z1:name=gw.example.com:ttl=0", "ttl '0'"),
            ("route53:zone=Z1:name=gw.example.com:ttl=86401", "ttl '86401'"),
            ("route53:zone=Z1:name=gw.example.com:health-check=a b", "health-check='a b'"),
            (self.rfc2136(name="gw.example.org"), "name=gw.example.org is not in zone=example.com"),
            (self.rfc2136(name="gwexample.com"), "is not in zone=example.com"),
            (self.rfc2136(name="gw_1.example.com"), "is not a domain name such as"),
            (self.rfc2136(name=".".join(["a" * 60] * 3 + ["a" * 58, "example.com"])), "is too long"),
            (self.rfc2136(":port=0"), "port '0'"),
            (self.rfc2136(":port=65536"), "port '65536'"),
            (self.rfc2136(":port=1", server=r"192.0.2.1\:2"), "has a port, and port= is given as well"),
            (self.rfc2136(server="a b"), "server='a b' is not a host"),
            (self.rfc2136(server=r"[gw]\:53"), ""),
            (f"{self.rfc2136()}.gone", "cannot be read: No such file"),
        ):
            if problem:
                self.assertIn(problem, self.refused(spec))

    def test_malformed_key_file(self) -> None:
        self.key_file.write_text(KEY.replace("sha256", "sha3"))
        problem = self.refused(self.rfc2136())
        self.assertIn(f"key-file= {self.key_file}: the algorithm of the key is not one of", problem)

    def test_servers(self) -> None:
        for server, expected in (
            ("192.0.2.1", ("192.0.2.1", 53)),
            ("ns.example.com", ("ns.example.com", 53)),
            ("192.0.2.1:5353", ("192.0.2.1", 5353)),
            ("2001:db8::1", ("2001:db8::1", 53)),
            ("[2001:db8::1]:5353", ("2001:db8::1", 5353)),
            ("[2001:db8::1]", ("2001:db8::1", 53)),
        ):
            self.assertEqual(dns._server_value({"server": server}), expected)
        self.assertEqual(dns._server_value({"server": "ns", "port": "7"}), ("ns", 7))

    @given(st.text() | st.text(alphabet="[]:.0a"))
    def test_any_server_is_parsed_or_refused(self, text: str) -> None:
        try:
            host, port = dns._server_value({"server": text})
        except ConfigError as e:
            self.assertEqual(e.option, "dns")
        else:
            self.assertTrue(host)
            self.assertTrue(0 < port < 65536)

    def test_missing_library(self) -> None:
        for library, module, spec, extra in (
            ("boto3", "route53", "route53:zone=Z1:name=gw.example.com", "wsgateway[aws]"),
            ("dns", "rfc2136", self.rfc2136(), "wsgateway[dns]"),
        ):
            make_name_service(spec, self.clock)
            whole = f"gateway.cloud.{module}"
            hidden = {name: None for name in sys.modules if name.split(".")[0] == library}
            with mock.patch.dict(sys.modules, hidden), mock.patch.object(cloud, module):
                del sys.modules[whole], cloud.__dict__[module]
                self.assertIn(f"pip install '{extra}'", self.refused(spec))


class AddressTests(DnsTestCase):
    def make_registrar(
        self, spec: str, public_url: str = "", *, listen: str = "tcp:80:backlog=4096", **more: Any
    ) -> DnsRegistrar | None:
        settings = Settings(dns=spec, public_url=public_url, listen=(listen,))
        return make_registrar(
            settings,
            node_id="b",
            reactor=self.clock,
            metrics=Metrics(),
            live_nodes=lambda: ["b"],
            refresh_live_nodes=lambda: succeed(None),
            **more,
        )

    def address(self, *args: Any, **more: Any) -> Deferred[str]:
        names = self.make_registrar(*args, **more)
        assert names is not None
        return names._find_address()

    def address_error(self, *args: Any, **more: Any) -> str:
        error = self.assertRaises(ConfigError, self.make_registrar, *args, **more)
        self.assertIn("write address=…", str(error))
        return str(error)

    def test_without_dns(self) -> None:
        self.assertIsNone(self.make_registrar(""))

    def test_address_option(self) -> None:
        for url in ("", "ws://192.0.2.2", "ws://gw.example.com"):
            self.assertEqual(self.successResultOf(self.address(self.rfc2136(":address=127.0.0.2"), url)), "127.0.0.2")
        self.assertIn("'0.0.0.0' is not an address", self.address_error(self.rfc2136(":address=0.0.0.0")))
        self.assertIn("'gw1' is not an IPv4 or IPv6 address", self.address_error(self.rfc2136(":address=gw1")))

    def test_address_of_public_url(self) -> None:
        for url, address in (("wss://192.0.2.2:8443/gw", "192.0.2.2"), ("ws://[2001:db8:0::2]:80", "2001:db8::2")):
            self.assertEqual(self.successResultOf(self.address(self.rfc2136(), url)), address)

    def test_loopback_public_url_is_logged(self) -> None:
        """Accepted, since clients receive the same url, but logged."""
        for url, address in (("127.0.0.1", "127.0.0.1"), ("[::1]:1", "::1"), ("localhost", "127.0.0.1")):
            with capturedLogs() as logs:
                self.assertEqual(self.successResultOf(self.address(self.rfc2136(), f"ws://{url}")), address)
            self.assertEqual([log["problem"] for log in logs], [f"{address} cannot be reached from other machines"])
        self.assertIn("'0.0.0.0' is not an address", self.address_error(self.rfc2136(), "ws://0.0.0.0"))

    def test_address_of_listen(self) -> None:
        for listen, address in (
            ("tcp:80:interface=192.0.2.4:backlog=4096", "192.0.2.4"),
            (r"haproxy:tcp:80:interface=2001\:db8\:\:4", "2001:db8::4"),
        ):
            self.assertEqual(self.successResultOf(self.address(self.rfc2136(), listen=listen)), address)
        address = self.address(self.rfc2136(), "ws://192.0.2.2", listen="tcp:80:interface=192.0.2.4")
        self.assertEqual(self.successResultOf(address), "192.0.2.2")
        self.address_error(self.rfc2136(), listen="tcp:80:interface=0.0.0.0")

    def test_unknown_address(self) -> None:
        self.assertIn("--public-url is not given", self.address_error(self.rfc2136()))
        self.assertIn(
            "--public-url is gw.example.com itself", self.address_error(self.rfc2136(), "ws://gw.Example.com")
        )

    def test_resolved_address(self) -> None:
        six, four = IPv6Address("TCP", "2001:db8::2", 0), IPv4Address("TCP", "192.0.2.2", 0)
        for addresses, chosen in (((six, four), "192.0.2.2"), ((six,), "2001:db8::2"), ((four,), "192.0.2.2")):
            self.clock.nameResolver = Resolver(*addresses)
            address = self.address(self.rfc2136(), "ws://gw1.example.com")
            self.assertEqual(self.successResultOf(address), chosen)

    def test_resolution_fails(self) -> None:
        self.clock.nameResolver = Resolver()
        error = self.failureResultOf(self.address(self.rfc2136(), "ws://gw1.example.com"), NameServiceError).value
        self.assertIn("gw1.example.com, the host of --public-url, has no address", str(error))
        self.assertFalse(error.permanent)
        # As in the /etc/hosts of Debian.
        self.clock.nameResolver = Resolver(IPv4Address("TCP", "127.0.1.1", 0))
        error = self.failureResultOf(self.address(self.rfc2136(), "ws://gw1.example.com"), NameServiceError).value
        self.assertIn("127.0.1.1 cannot be reached from other machines", str(error))
        self.assertTrue(error.permanent)

    def test_instance_address(self) -> None:
        address = self.address(self.rfc2136(), "ws://gw.example.com", instance_address=lambda: succeed("192.0.2.4"))
        self.assertEqual(self.successResultOf(address), "192.0.2.4")
        address = self.address(self.rfc2136(), instance_address=lambda: fail(AwsError("no instance", kind="absent")))
        self.assertIn("no instance", str(self.failureResultOf(address, NameServiceError).value))
        address = self.address(self.rfc2136(), "ws://192.0.2.5", instance_address=lambda: succeed("192.0.2.4"))
        self.assertEqual(self.successResultOf(address), "192.0.2.5")


class DomainParserTests(SynchronousTestCase):
    def test_valid_names(self) -> None:
        longest = ".".join(["a" * 63] * 3 + ["a" * 61])
        for text, name in (
            ("gw.example.com", "gw.example.com"),
            ("GW.Example.com.", "gw.example.com"),
            ("localhost", "localhost"),
            ("1.a--b.c", "1.a--b.c"),
            (longest, longest),
        ):
            self.assertEqual(dns.parse_domain(text), name)

    def test_invalid_values(self) -> None:
        too_long = ".".join(["a" * 63] * 3 + ["a" * 62])
        for text in ("", ".", "a..b", ".a", "a..", "-a", "a-", "a_b", "*.a", "a b", "a\n", "ä.de", "a" * 64, too_long):
            self.assertIn("is not a domain name such as", str(self.assertRaises(ValueError, dns.parse_domain, text)))

    @given(st.text(max_size=300) | st.text(alphabet="abAB01-._", max_size=300))
    def test_any_text(self, text: str) -> None:
        try:
            name = dns.parse_domain(text)
        except ValueError:
            return
        # RFC 1035, section 2.3.4
        self.assertTrue(all(1 <= len(label) <= 63 for label in name.encode("ascii").split(b".")))
        self.assertLessEqual(len(name) + 2, 255)
        self.assertEqual(dns.parse_domain(name), name)

    def test_is_in_zone(self) -> None:
        self.assertTrue(dns.is_in_zone("gw.example.com", "example.com"))
        self.assertTrue(dns.is_in_zone("example.com", "example.com"))
        self.assertFalse(dns.is_in_zone("gwexample.com", "example.com"))
        self.assertFalse(dns.is_in_zone("example.com", "gw.example.com"))


class AddressParserTests(SynchronousTestCase):
    def test_valid_addresses(self) -> None:
        for text, address in (("192.0.2.1", "192.0.2.1"), ("2001:DB8:0::1", "2001:db8::1"), ("127.0.0.1", "127.0.0.1")):
            self.assertEqual(dns.parse_address(text), address)

    def test_invalid_values(self) -> None:
        for text in (
            "",
            "gw",
            "192.0.2",
            "192.0.2.1:80",
            "[::1]",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "fe80::1%eth0",
            "255.255.255.255",
        ):
            self.assertRaises(ValueError, dns.parse_address, text)

    def test_local_addresses(self) -> None:
        self.assertEqual(dns.parse_public_address("10.0.0.1"), "10.0.0.1")
        for text in ("127.0.0.1", "127.0.1.1", "::1", "169.254.1.1", "fe80::1", "0.0.0.0"):
            self.assertRaises(ValueError, dns.parse_public_address, text)

    def test_literal_address(self) -> None:
        self.assertEqual(dns.literal_address("[2001:db8::1]"), "2001:db8::1")
        self.assertEqual(dns.literal_address("192.0.2.1"), "192.0.2.1")
        self.assertIsNone(dns.literal_address("gw.example.com"))
