from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud import dns


class DomainParserTests(SynchronousTestCase):
    def test_names(self) -> None:
        longest = ".".join(["a" * 63] * 3 + ["a" * 61])
        for text, name in (
            ("gw.example.com", "gw.example.com"),
            ("GW.Example.com.", "gw.example.com"),
            ("localhost", "localhost"),
            ("1.a--b.c", "1.a--b.c"),
            (longest, longest),
        ):
            self.assertEqual(dns.parse_domain(text), name)

    def test_what_is_none(self) -> None:
        too_long = ".".join(["a" * 63] * 3 + ["a" * 62])
        for text in ("", ".", "a..b", ".a", "a..", "-a", "a-", "a_b", "*.a", "a b", "a\n", "ä.de", "a" * 64, too_long):
            self.assertIn("is no name such as", str(self.assertRaises(ValueError, dns.parse_domain, text)))

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

    def test_within(self) -> None:
        self.assertTrue(dns.is_in_zone("gw.example.com", "example.com"))
        self.assertTrue(dns.is_in_zone("example.com", "example.com"))
        self.assertFalse(dns.is_in_zone("gwexample.com", "example.com"))
        self.assertFalse(dns.is_in_zone("example.com", "gw.example.com"))


class AddressParserTests(SynchronousTestCase):
    def test_addresses(self) -> None:
        for text, address in (("192.0.2.1", "192.0.2.1"), ("2001:DB8:0::1", "2001:db8::1"), ("127.0.0.1", "127.0.0.1")):
            self.assertEqual(dns.parse_address(text), address)

    def test_what_is_none(self) -> None:
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

    def test_those_of_this_machine_alone(self) -> None:
        self.assertEqual(dns.parse_public_address("10.0.0.1"), "10.0.0.1")
        for text in ("127.0.0.1", "127.0.1.1", "::1", "169.254.1.1", "fe80::1", "0.0.0.0"):
            self.assertRaises(ValueError, dns.parse_public_address, text)

    def test_a_host_of_a_url(self) -> None:
        self.assertEqual(dns.literal_address("[2001:db8::1]"), "2001:db8::1")
        self.assertEqual(dns.literal_address("192.0.2.1"), "192.0.2.1")
        self.assertIsNone(dns.literal_address("gw.example.com"))
