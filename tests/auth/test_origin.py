"""Tests of gateway.auth.origin."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.origin import AllowedOrigins, OwnOrigins, suggest_pattern
from gateway.settings import ConfigError


class AllowedOriginsTest(SynchronousTestCase):
    def assert_allows(self, patterns: tuple[str, ...], *origins: str) -> None:
        for origin in origins:
            self.assertTrue(AllowedOrigins(patterns).is_allowed(origin), origin)

    def assert_refuses(self, patterns: tuple[str, ...], *origins: str) -> None:
        for origin in origins:
            self.assertFalse(AllowedOrigins(patterns).is_allowed(origin), origin)

    def test_none(self) -> None:
        self.assert_refuses((), "https://a.com", "null", "", "*")

    def test_exact(self) -> None:
        pattern = ("https://App.example.com",)
        self.assert_allows(pattern, "https://app.example.com", "HTTPS://APP.EXAMPLE.COM", "https://app.example.com:443")
        self.assert_refuses(
            pattern,
            "http://app.example.com",
            "https://app.example.com:8443",
            "https://app.example.com.evil.com",
            "https://evil.com/https://app.example.com",
            "https://app.example.com/",
            "app.example.com",
            "null",
            "",
        )

    def test_port(self) -> None:
        self.assert_allows(("http://a.com:80",), "http://a.com")
        self.assert_refuses(("http://a.com:8080",), "http://a.com", "http://a.com:80800")

    def test_any_subdomain(self) -> None:
        pattern = ("https://*.example.com",)
        self.assert_allows(pattern, "https://a.example.com", "https://a.b.example.com")
        self.assert_refuses(
            pattern,
            "https://example.com",
            "https://evilexample.com",
            "https://a.example.com:8443",
            "https://evil.com/.example.com",
            "https://evil.com#.example.com",
            "https://evil.com?.example.com",
            "https://evil.com\\.example.com",
            "https://evil@a.example.com",
            "https://evil.com:1.example.com",
            "https://evil.com a.example.com",
        )

    def test_any_port(self) -> None:
        self.assert_allows(("http://localhost:*",), "http://localhost:3000", "http://localhost:8")
        self.assert_refuses(("http://localhost:*",), "http://localhost.evil.com:3000")
        self.assert_allows(("http://[::1]:*",), "http://[::1]:3000")

    def test_any_scheme_and_all_of_one(self) -> None:
        self.assert_allows(("*://a.com",), "https://a.com", "chrome-extension://a.com")
        self.assert_allows(("https://*",), "https://a.com", "https://a.com:8443", "https://[::1]")
        self.assert_refuses(("https://*",), "http://a.com", "null")
        self.assert_allows(("chrome-extension://abc",), "chrome-extension://abc")

    def test_stars_anywhere(self) -> None:
        self.assert_allows(("https://a*b*c.com",), "https://abc.com", "https://axxbxbxc.com")
        self.assert_refuses(("https://a*b*c.com",), "https://acb.com", "https://ac.com", "https://abc.co")
        self.assert_refuses(("https://ab*ba.com",), "https://aba.com")
        self.assert_refuses(("https://a*bc*c.com",), "https://abc.com")

    def test_null_and_all(self) -> None:
        self.assert_allows(("null",), "null")
        self.assert_refuses(("null",), "https://a.com", "NULL")
        self.assert_allows(("*",), "null", "https://a.com", "whatever it is")

    def test_long_origins_are_cheap(self) -> None:
        origins = AllowedOrigins(("https://" + "*a" * 40 + "b",))
        self.assertFalse(origins.is_allowed("https://" + "a" * 900))
        self.assertFalse(origins.is_allowed("https://" + "a" * 16000))

    def test_problems(self) -> None:
        for pattern in (
            "",
            "example.com",
            "*.example.com",
            "https://",
            "https://a.com/",
            "https://a.com/path",
            "https:// a.com",
            "https://user@a.com",
            "https://a.com:port",
            "https://a.com?x",
            "nul",
            "https//a.com",
        ):
            error = self.assertRaises(ConfigError, AllowedOrigins, (pattern,))
            self.assertEqual(str(error)[:9], "--origin:")
            self.assertIn("write scheme://host[:port]", str(error))

    @settings(deadline=None, max_examples=200)
    @given(st.text(max_size=40), st.sampled_from(["https://*.example.com", "*://*:*", "http://localhost:*"]))
    def test_generated(self, text: str, pattern: str) -> None:
        """Nothing raises, and an origin that matches has no slashes except two."""
        origins = AllowedOrigins((pattern,))
        for origin in (text, f"https://{text}.example.com", f"http://localhost:{text}"):
            if origins.is_allowed(origin):
                self.assertEqual(origin.count("/"), 2)


class SuggestPatternTest(SynchronousTestCase):
    def test_the_pattern_allows_the_origin(self) -> None:
        for origin, pattern in (
            ("https://App.example.com", "https://app.example.com"),
            ("https://a.com:443", "https://a.com"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("chrome-extension://abc", "chrome-extension://abc"),
            ("null", "null"),
        ):
            self.assertEqual(suggest_pattern(origin), pattern)
            self.assertTrue(AllowedOrigins((pattern,)).is_allowed(origin))

    def test_no_pattern(self) -> None:
        """Nothing that would allow more than was asked for, or that a shell would read as a command."""
        for origin in (
            "",
            "*",
            "https://*",
            "https://*.com",
            "https://a.com/",
            "a.com",
            "https://$(reboot)",
            "x" * 2000,
        ):
            self.assertIsNone(suggest_pattern(origin))

    @settings(deadline=None, max_examples=200)
    @given(st.text(max_size=40))
    @example("NULL")
    def test_generated(self, text: str) -> None:
        for origin in (text, f"https://{text}.example.com", f"http://localhost:{text}"):
            pattern = suggest_pattern(origin)
            if pattern is not None:
                self.assertTrue(AllowedOrigins((pattern,)).is_allowed(origin))
                self.assertNotIn("*", pattern)


def address(host: str, port: int) -> IPv4Address | IPv6Address:
    return IPv6Address("TCP", host, port) if ":" in host else IPv4Address("TCP", host, port)


class OwnOriginsTest(SynchronousTestCase):
    def assert_own(self, own: OwnOrigins, *origins: str, at: object = None) -> None:
        for origin in origins:
            self.assertTrue(own.includes(origin, at), origin)

    def assert_foreign(self, own: OwnOrigins, *origins: str, at: object = None) -> None:
        for origin in origins:
            self.assertFalse(own.includes(origin, at), origin)

    def test_nothing_is_known(self) -> None:
        self.assert_foreign(OwnOrigins(), "http://127.0.0.1:8080", "null", "", "*", at=address("127.0.0.1", 8080))

    def test_public_url(self) -> None:
        own = OwnOrigins("wss://GW.example.com/prefix")
        self.assert_own(own, "https://gw.example.com", "HTTPS://gw.Example.com:443", "wss://gw.example.com")
        self.assert_foreign(
            own,
            "http://gw.example.com",
            "https://gw.example.com:8443",
            "https://gw.example.com/prefix",
            "https://gw.example.com.evil.com",
            "https://evil@gw.example.com",
            "https://evil.com",
            "https://example.com",
            "null",
        )

    def test_public_url_with_a_port(self) -> None:
        self.assert_own(OwnOrigins("ws://192.0.2.7:8080"), "http://192.0.2.7:8080", "ws://192.0.2.7:8080")
        self.assert_own(OwnOrigins("ws://192.0.2.7:80"), "http://192.0.2.7")
        self.assert_own(OwnOrigins("wss://192.0.2.7:443"), "https://192.0.2.7")
        self.assert_foreign(OwnOrigins("ws://192.0.2.7:443"), "https://192.0.2.7", "http://192.0.2.7")
        self.assert_own(OwnOrigins("ws://192.0.2.7:443"), "http://192.0.2.7:443")
        self.assert_foreign(OwnOrigins("ws://192.0.2.7:8080"), "http://192.0.2.7", "https://192.0.2.7:8080")

    def test_ipv6(self) -> None:
        own = OwnOrigins("wss://[2001:DB8:0:0::7]:8443")
        self.assert_own(own, "https://[2001:db8::7]:8443", "https://[2001:db8:0::7]:8443")
        self.assert_foreign(own, "https://[2001:db8::8]:8443", "https://2001:db8::7:8443")

    def test_international_name(self) -> None:
        self.assert_own(OwnOrigins("wss://b\xfccher.example"), "https://xn--bcher-kva.example")

    def test_dns_name(self) -> None:
        own = OwnOrigins("wss://gw-1.example.com:8443")
        own.add_dns_name("gw.example.com")
        self.assert_own(own, "https://gw.example.com:8443", "https://gw-1.example.com:8443")
        self.assert_foreign(own, "https://gw.example.com", "http://gw.example.com:8443")

    def test_dns_name_without_a_public_url(self) -> None:
        own = OwnOrigins()
        own.add_dns_name("gw.example.com")
        self.assert_foreign(own, "https://gw.example.com", "http://gw.example.com", "http://gw.example.com:8080")

    def test_loopback(self) -> None:
        own, at = OwnOrigins(), address("127.0.0.1", 8080)
        own.add_loopback_url("ws://127.0.0.1:8080")
        self.assert_own(own, "http://127.0.0.1:8080", "http://localhost:8080", "http://LocalHost:8080", at=at)
        self.assert_foreign(
            own,
            "http://127.0.0.2:8080",
            "http://[::1]:8080",
            "https://127.0.0.1:8080",
            "http://127.0.0.1:8081",
            "http://127.0.0.1",
            "http://localhost.evil.com:8080",
            "http://rebound.example:8080",
            at=at,
        )

    def test_loopback_with_tls(self) -> None:
        own, at = OwnOrigins(), address("::1", 443)
        own.add_loopback_url("wss://[::1]:443")
        self.assert_own(own, "https://[::1]", "https://localhost", "https://[0:0::1]:443", at=at)
        self.assert_foreign(own, "https://127.0.0.1", "http://localhost", at=at)

    def test_a_loopback_origin_is_own_at_its_port_alone(self) -> None:
        """Another machine has a localhost as well."""
        own = OwnOrigins("ws://gw.example.com:8080")
        own.add_loopback_url("ws://127.0.0.1:8080")
        for other in (address("192.0.2.7", 8080), address("127.0.0.1", 8443), UNIXAddress(b"/run/gw"), None):
            self.assert_foreign(own, "http://localhost:8080", "http://127.0.0.1:8080", at=other)
            self.assert_own(own, "http://gw.example.com:8080", at=other)

    @settings(deadline=None, max_examples=200)
    @given(st.text(max_size=40))
    def test_generated(self, text: str) -> None:
        """Nothing raises, and only one origin is own."""
        own = OwnOrigins("wss://gw.example.com")
        for origin in (text, f"https://{text}", f"https://gw.example.com{text}", f"https://[{text}]"):
            if own.includes(origin):
                self.assertIn(origin.lower(), ("https://gw.example.com", "https://gw.example.com:443"))
