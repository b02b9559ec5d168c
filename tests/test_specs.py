from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.endpoints import quoteStringArgument
from twisted.trial.unittest import SynchronousTestCase

from gateway.settings import ConfigError, parse_spec


class ParseSpecTests(SynchronousTestCase):
    def refused(self, spec: str) -> str:
        error = self.assertRaises(ConfigError, parse_spec, "dns", spec, required=("zone", "name"), optional=("ttl",))
        return str(error)

    def test_values(self) -> None:
        self.assertEqual(
            parse_spec("dns", "route53:zone=Z1:name=gw.example.com", required=("zone", "name"), optional=("ttl",)),
            {"zone": "Z1", "name": "gw.example.com"},
        )

    def test_a_colon_and_a_backslash_in_a_value(self) -> None:
        self.assertEqual(parse_spec("dns", r"k:a=fe80\:\:1", required=("a",)), {"a": "fe80::1"})
        self.assertEqual(parse_spec("dns", r"k:a=c\\d=e", required=("a",)), {"a": "c\\d=e"})

    def test_colons_that_nobody_quoted(self) -> None:
        self.assertEqual(
            parse_spec("dns", "k:a=192.0.2.1:5353:b=2001:db8::1:c=x", required=("a", "b", "c")),
            {"a": "192.0.2.1:5353", "b": "2001:db8::1", "c": "x"},
        )

    def test_a_url_needs_no_escapes(self) -> None:
        for url in (
            "https://idp.example.com/realm?a=b",
            "https://idp.example.com:8443/realm?a=b&c=d:e",
            "http://[::1]:8080/?x=/=y",
            "https://idp.example.com?a=b",
            "8443/x?a=b",
        ):
            self.assertEqual(parse_spec("auth", f"k:a={url}:b=c=d", required=("a", "b")), {"a": url, "b": "c=d"})

    def test_what_is_wrong_is_named(self) -> None:
        self.assertEqual(
            self.refused("route53:zone=Z1"), "--dns: 'name' is missing; write route53:zone=…:name=…[:ttl=…]"
        )
        self.assertIn("'zone' is given twice", self.refused("route53:zone=Z1:zone=Z2:name=n"))
        self.assertIn("'name' is empty", self.refused("route53:zone=Z1:name="))
        self.assertIn("'color=red' has no place in it", self.refused("route53:zone=Z1:name=n:color=red"))
        self.assertIn("'flag' has no place in it", self.refused("route53:flag:zone=Z1:name=n"))
        self.assertIn("'zone' is given twice", self.refused("route53:zone=Z1:x:zone=Z2:name=n"))
        self.assertIn("'//a=b' has no place in it", self.refused("route53://a=b:zone=Z1:name=n"))
        self.assertIn("'b=c' has no place in it", self.refused("route53:zone=https://a:b=c:name=n"))
        self.assertIn("lone backslash", self.refused("route53:zone=Z1:name=n\\"))

    @given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(min_size=1)))
    def test_what_twisted_quotes_is_read(self, values: dict[str, str]) -> None:
        spec = ":".join(["k", *(f"{key}={quoteStringArgument(value)}" for key, value in values.items())])
        self.assertEqual(parse_spec("dns", spec, required=(), optional=("a", "b", "c")), values)

    @given(st.text())
    def test_any_text_is_read_or_refused(self, spec: str) -> None:
        try:
            parse_spec("dns", spec, required=(), optional=("a",))
        except ConfigError as e:
            self.assertEqual(e.option, "dns")
