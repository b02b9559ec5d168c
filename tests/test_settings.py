"""Tests of gateway.settings."""

from __future__ import annotations

import resource
from unittest import mock

import attrs
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.endpoints import quoteStringArgument
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.settings import (
    MAX_OPEN_FILES,
    ConfigError,
    Settings,
    files_reserved_for_backends,
    make_settings,
    open_file_limit,
    parse_spec,
    reserved_files,
)


class MakeSettingsTests(TestCase):
    def test_defaults(self) -> None:
        settings = make_settings({})
        self.assertEqual(settings.listen, ("tcp:8080:interface=127.0.0.1:backlog=4096",))
        self.assertEqual(settings.backend, ("tcp:8081:interface=127.0.0.1:backlog=4096",))
        self.assertEqual((settings.lease, settings.heartbeat), (15, 5))
        self.assertEqual((settings.call_timeout, settings.max_call_timeout), (30, 300))
        self.assertEqual((settings.ping_interval, settings.ping_timeout), (40, 20))
        self.assertEqual((settings.max_message_size, settings.max_calls_per_client), (1048576, 128))
        self.assertEqual((settings.max_calls, settings.max_openings), (100000, 4096))
        self.assertEqual((settings.openings_per_address, settings.messages_per_client), (200, 200))
        self.assertEqual((settings.send_buffer, settings.drain_seconds, settings.rebalance_rate), (1048576, 30, 50))

    def test_ping_interval_is_below_the_idle_timeout_of_load_balancers(self) -> None:
        """That of Debian's haproxy.cfg is 50 s."""
        self.assertLessEqual(make_settings({}).ping_interval, 45)

    def test_default_capacity_follows_the_open_file_limit(self) -> None:
        allowed = make_settings({}).capacity
        self.assertLess(allowed, open_file_limit())
        self.assertEqual(make_settings({"capacity": "10"}).capacity, 10)
        with self.assertRaisesRegex(ConfigError, f"--capacity: .*{allowed} clients"):
            make_settings({"capacity": str(allowed + 1)})

    def test_invalid_values_are_refused_with_the_name_of_their_option(self) -> None:
        for name, value in [
            ("lease", "-1"),
            ("lease", "nan"),
            ("lease", "inf"),
            ("ping-interval", "0"),
            ("max-calls", "1.5"),
            ("max-calls", "0"),
            ("openings-per-address", "-1"),
            ("openings-per-address", "many"),
            ("public-url", "ftp://gateway.example"),
            ("public-url", "//gateway.example"),
            ("node-name", "two\nlines"),
            ("public-url", "wss://gateway.example/v1/connect"),
            ("public-url", "wss://gateway.example?x=1"),
            ("peer-url", "gateway.example:8081"),
            ("on-elsewhere", "somewhere"),
            ("registry-password-file", "f"),
            ("registry", "postgresql://u@h/d"),
            ("registry", "sqlite:"),
            ("listen", ()),
            ("park-after", "x"),
        ]:
            with self.assertRaises(ConfigError, msg=f"{name}={value}") as caught:
                make_settings({name: value})
            self.assertEqual(caught.exception.option, name)
            self.assertTrue(str(caught.exception).startswith(f"--{name}: "), caught.exception)
            self.assertEqual(len(str(caught.exception).splitlines()), 1)

    def test_mysql_registry_requires_urls_and_a_secret(self) -> None:
        values = {"registry": "mysql://u@h/d"}
        for name, value in (("public-url", "wss://gw"), ("peer-url", "ws://10.0.0.5:81"), ("cluster-secret-file", "f")):
            with self.assertRaisesRegex(ConfigError, f"^--{name}: must be given with a mysql: registry"):
                make_settings(values)
            values[name] = value
        self.assertEqual(make_settings(values).registry, "mysql://u@h/d")

    def test_contradictory_settings(self) -> None:
        with self.assertRaisesRegex(ConfigError, "--heartbeat: .*--lease"):
            make_settings({"lease": "5"})
        with self.assertRaisesRegex(ConfigError, "--call-timeout: .*--max-call-timeout"):
            make_settings({"max-call-timeout": "10"})
        with self.assertRaisesRegex(ConfigError, "--auth: mtls requires a --listen that asks for client certificates"):
            make_settings({"auth": ("none", "mtls"), "listen": ("ssl:8443",), "backend": ("mtls:8444",)})
        for name in ("mtls:8443", "haproxy:mtls:8443"):
            make_settings({"auth": ("mtls",), "listen": ("tcp:8080", name)})

    def test_trailing_slash_of_urls_is_removed(self) -> None:
        self.assertEqual(make_settings({"public-url": "wss://h.example/a/"}).public_url, "wss://h.example/a")

    def test_http_urls_become_websocket_urls(self) -> None:
        for url, expected in (
            ("http://h:80", "ws://h:80"),
            ("https://h/a", "wss://h/a"),
            ("ws://[::1]:1", "ws://[::1]:1"),
        ):
            self.assertEqual(make_settings({"peer-url": url}).peer_url, expected)

    def test_zero_seconds(self) -> None:
        for zero in ("0.00", "-0", "0e0"):
            self.assertEqual(make_settings({"park-after": zero}).park_after, 0)
        with self.assertRaisesRegex(ConfigError, "'-1' is not a number of seconds of 0 or more"):
            make_settings({"park-after": "-1"})
        settings = make_settings({"drain-seconds": "0", "park-after": "0"})
        self.assertEqual((settings.drain_seconds, settings.park_after), (0, 0))

    @given(st.sampled_from([field.name for field in attrs.fields(Settings)]), st.text(max_size=20))
    def test_any_text_is_accepted_or_refused(self, name: str, text: str) -> None:
        try:
            make_settings({name.replace("_", "-"): text})
        except ConfigError as e:
            self.assertTrue(str(e).startswith("--"))


class OpenFileLimitTests(TestCase):
    """The limits of the system are faked, since a process cannot raise a hard limit that it has lowered."""

    def limits(self, soft: int, hard: int, problem: Exception | None = None) -> None:
        self.current = (soft, hard)

        def set_limits(which: int, limits: tuple[int, int]) -> None:
            if problem is not None:
                raise problem
            self.current = limits

        self.patch(resource, "getrlimit", lambda which: self.current)
        self.patch(resource, "setrlimit", mock.Mock(side_effect=set_limits))

    def test_soft_limit_is_raised_to_the_hard_limit(self) -> None:
        self.limits(1024, 20000)
        self.assertEqual(open_file_limit(), 20000)
        self.assertEqual(self.current, (20000, 20000))
        resource.setrlimit.assert_called_once_with(resource.RLIMIT_NOFILE, (20000, 20000))

    def test_soft_limit_equal_to_the_hard_limit_is_left_unchanged(self) -> None:
        self.limits(20000, 20000)
        self.assertEqual(open_file_limit(), 20000)
        resource.setrlimit.assert_not_called()

    def test_unlimited(self) -> None:
        self.limits(1024, resource.RLIM_INFINITY)
        self.assertEqual(open_file_limit(), MAX_OPEN_FILES)
        self.assertEqual(self.current, (MAX_OPEN_FILES, resource.RLIM_INFINITY))
        self.limits(resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        self.assertEqual(open_file_limit(), MAX_OPEN_FILES)
        resource.setrlimit.assert_not_called()

    def test_system_that_does_not_permit_raising_the_limit(self) -> None:
        for problem in (
            ValueError("current limit exceeds maximum limit"),
            PermissionError(1, "Operation not permitted"),
        ):
            self.limits(1024, 20000, problem)
            self.assertEqual(open_file_limit(), 1024)
            self.assertEqual(make_settings({}).capacity, 1024 - 256)

    def test_reserved_files(self) -> None:
        for limit, reserved in [(256, 64), (4096, 1024), (1000000, 1024)]:
            self.limits(limit, limit)
            self.assertEqual(reserved_files(), reserved)
            self.assertEqual(make_settings({}).capacity, limit - reserved)
            self.assertEqual(files_reserved_for_backends(), reserved // 4)

    def test_capacity_above_the_limit_names_the_limit(self) -> None:
        self.limits(256, 256)
        with self.assertRaisesRegex(
            ConfigError, "--capacity: 193 .*: 192 clients at the open-file limit of 256 .*Limit"
        ):
            make_settings({"capacity": "193"})
        self.assertEqual(make_settings({"capacity": "192"}).capacity, 192)


class ParseSpecTests(SynchronousTestCase):
    def refused(self, spec: str) -> str:
        error = self.assertRaises(ConfigError, parse_spec, "dns", spec, required=("zone", "name"), optional=("ttl",))
        return str(error)

    def test_values(self) -> None:
        self.assertEqual(
            parse_spec("dns", "route53:zone=Z1:name=gw.example.com", required=("zone", "name"), optional=("ttl",)),
            {"zone": "Z1", "name": "gw.example.com"},
        )

    def test_escaped_colon_and_backslash(self) -> None:
        self.assertEqual(parse_spec("dns", r"k:a=fe80\:\:1", required=("a",)), {"a": "fe80::1"})
        self.assertEqual(parse_spec("dns", r"k:a=c\\d=e", required=("a",)), {"a": "c\\d=e"})

    def test_unescaped_colons(self) -> None:
        self.assertEqual(
            parse_spec("dns", "k:a=192.0.2.1:5353:b=2001:db8::1:c=x", required=("a", "b", "c")),
            {"a": "192.0.2.1:5353", "b": "2001:db8::1", "c": "x"},
        )

    def test_urls_need_no_escapes(self) -> None:
        for url in (
            "https://idp.example.com/realm?a=b",
            "https://idp.example.com:8443/realm?a=b&c=d:e",
            "http://[::1]:8080/?x=/=y",
            "https://idp.example.com?a=b",
            "8443/x?a=b",
        ):
            self.assertEqual(parse_spec("auth", f"k:a={url}:b=c=d", required=("a", "b")), {"a": url, "b": "c=d"})

    def test_errors_name_the_problem(self) -> None:
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
    def test_values_quoted_by_twisted(self, values: dict[str, str]) -> None:
        spec = ":".join(["k", *(f"{key}={quoteStringArgument(value)}" for key, value in values.items())])
        self.assertEqual(parse_spec("dns", spec, required=(), optional=("a", "b", "c")), values)

    @given(st.text())
    def test_any_text_is_parsed_or_refused(self, spec: str) -> None:
        try:
            parse_spec("dns", spec, required=(), optional=("a",))
        except ConfigError as e:
            self.assertEqual(e.option, "dns")
