"""Tests of gateway.auth.origin."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.origin import AllowedOrigins
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
