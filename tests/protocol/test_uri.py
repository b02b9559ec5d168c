"""Tests of gateway.protocol.uri."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.protocol.uri import WebSocketURI, make_connect_uri, parse_uri, without_ticket


class MakeConnectURITests(SynchronousTestCase):
    """make_connect_uri()"""

    def test_path_and_client_id_are_added(self) -> None:
        for url, whole in [
            ("ws://gw:8080", "ws://gw:8080/v1/connect?client_id=demo-1"),
            ("ws://gw", "ws://gw:80/v1/connect?client_id=demo-1"),
            ("wss://gw/", "wss://gw:443/v1/connect?client_id=demo-1"),
            ("ws://gw/a/b", "ws://gw:80/a/b/v1/connect?client_id=demo-1"),
            ("ws://gw/v1/connect", "ws://gw:80/v1/connect?client_id=demo-1"),
            ("ws://gw/v1/connect?client_id=demo-1&x=1", "ws://gw:80/v1/connect?client_id=demo-1&x=1"),
            ("ws://gw/v1/connect?x=1", "ws://gw:80/v1/connect?x=1&client_id=demo-1"),
            ("ws://[::1]:8080", "ws://[::1]:8080/v1/connect?client_id=demo-1"),
        ]:
            self.assertEqual(make_connect_uri(url, "demo-1").url, whole)

    def test_no_client_id(self) -> None:
        self.assertEqual(make_connect_uri("wss://gw", None).url, "wss://gw:443/v1/connect")

    def test_client_id_is_escaped(self) -> None:
        self.assertEqual(
            make_connect_uri("ws://gw", "a+b=c/d@e:f").resource, "/v1/connect?client_id=a%2Bb%3Dc%2Fd%40e%3Af"
        )

    def test_bad_client_ids(self) -> None:
        for client_id in ["", ".", "..", "a b", "a\n", "ä", "x" * 129, "a//b", "a/../b", "/a", "a/", "spiffe:/a"]:
            with self.assertRaisesRegex(ValueError, "is not 1 to 128 characters"):
                make_connect_uri("ws://gw", client_id)
        make_connect_uri("ws://gw", "x" * 128)
        make_connect_uri("ws://gw", "spiffe://acme/robot/7")

    def test_url_for_another_client_id(self) -> None:
        with self.assertRaisesRegex(ValueError, "names another client"):
            make_connect_uri("ws://gw/v1/connect?client_id=other", "demo-1")

    def test_bad_urls(self) -> None:
        for url in [
            "",
            "gw:8080",
            "http://gw",
            "ws://",
            "ws://:80",
            "ws://gw:0",
            "ws://gw:70000",
            "ws://gw:x",
            "ws://user@gw",
            "ws://gw#f",
            "ws://gw#",
            "ws://gw/ x",
            "ws://gw/\r\nX: y",
            "ws://gä",
            "ws://[::1",
        ]:
            with self.assertRaisesRegex(ValueError, "^'.*' is not a valid URL: .*write ws://host"):
                make_connect_uri(url, None)


class ResolveRedirectTests(SynchronousTestCase):
    """WebSocketURI.resolve_redirect()"""

    def test_complete(self) -> None:
        target = parse_uri("ws://a/v1/connect?client_id=x").resolve_redirect(
            "wss://b:9/p/v1/connect?client_id=x&wsgateway_hop=1"
        )
        self.assertEqual(target, WebSocketURI(True, "b", 9, "/p/v1/connect?client_id=x&wsgateway_hop=1"))

    def test_ticket_is_for_the_request_alone(self) -> None:
        target = parse_uri("ws://a/v1/connect?client_id=x").resolve_redirect(
            "ws://b/v1/connect?client_id=x&wsgateway_hop=1&wsgateway_ticket=v1.secret"
        )
        self.assertTrue(target.resource.endswith("&wsgateway_ticket=v1.secret"))
        self.assertEqual(target.loggable_url, "ws://b:80/v1/connect?client_id=x&wsgateway_hop=1")
        self.assertNotIn("secret", repr(target))
        self.assertIn("client_id=x", repr(target))
        for url in ("wsgateway_ticket=secret&x=1", "ws://[?a&wsgateway_ticket=secret#x", "/?wsgateway_ticket=secret"):
            self.assertNotIn("secret", without_ticket(f"/?{url}"))

    def test_relative(self) -> None:
        self.assertEqual(parse_uri("wss://a:9/v1/connect?x=1").resolve_redirect("/v2?y").url, "wss://a:9/v2?y")

    def test_http_means_ws(self) -> None:
        self.assertEqual(parse_uri("ws://a/x").resolve_redirect("http://b/x").url, "ws://b:80/x")
        self.assertEqual(parse_uri("ws://a/x").resolve_redirect("https://b/x").url, "wss://b:443/x")

    def test_never_from_tls_to_plain(self) -> None:
        for url in ["ws://a/x", "http://a/x", "WS://a/x"]:
            with self.assertRaisesRegex(ValueError, "without TLS"):
                parse_uri("wss://a/x").resolve_redirect(url)

    @settings(deadline=None, max_examples=200)
    @given(st.text(max_size=60) | st.text(alphabet="ws:/?#[]@.%ahtp019\r\n ", max_size=40).map("ws://".__add__))
    def test_anything(self, url: str) -> None:
        """Any input is a URI that fits into a request line, or a ValueError."""
        try:
            target = parse_uri("wss://a/x").resolve_redirect(url)
        except ValueError:
            return
        self.assertTrue(target.secure)
        self.assertTrue(all("!" <= c <= "~" for c in target.resource + target.host_header))
        self.assertTrue(1 <= target.port <= 65535)
        self.assertTrue(target.resource.startswith("/"))
        self.assertEqual(parse_uri(target.url), target)
