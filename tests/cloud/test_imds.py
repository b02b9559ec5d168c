"""Tests of gateway.cloud.imds, over real sockets."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cloud.errors import AwsError
from gateway.cloud.imds import (
    DEFAULT_ENDPOINT,
    ENDPOINT_VARIABLE,
    MAX_BODY_SIZE,
    Imds,
    endpoint_url,
    parse_ipv4,
    parse_token_ttl,
    parse_word,
)
from tests.builders.ports import free_port
from tests.fakes.imds import TARGET_STATE_PATH, FakeIMDS

TOKEN = ("PUT", "/latest/api/token")
ID = ("GET", "/latest/meta-data/instance-id")


class ImdsTests(TestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.server = FakeIMDS(self.clock.seconds)
        self.addCleanup(self.server.close)
        self.imds = self.make()

    def make(self, **options: Any) -> Imds:
        return Imds(reactor, self.server.url, clock=self.clock.seconds, **options)

    async def refused(self, request: Deferred[Any]) -> AwsError:
        error = await self.assertFailure(request, AwsError)
        assert isinstance(error, AwsError)
        self.assertEqual(len(str(error).splitlines()), 1)
        return error

    async def test_items(self) -> None:
        self.assertEqual(await self.imds.instance_id(), "i-0123456789abcdef0")
        self.assertEqual(await self.imds.region(), "eu-central-1")
        self.assertEqual(await self.imds.local_ipv4(), "10.0.0.7")
        self.assertEqual(await self.imds.public_ipv4(), "203.0.113.7")
        self.assertIsNone(await self.imds.target_lifecycle_state())
        self.server.state = "Warmed:Terminated"
        self.assertEqual(await self.imds.target_lifecycle_state(), "Warmed:Terminated")
        del self.server.items["public-ipv4"]
        self.assertIsNone(await self.imds.public_ipv4())

    async def test_nothing_is_logged(self) -> None:
        with capturedLogs() as logs:
            await self.imds.instance_id()
            self.server.failure_mode = "error"
            await self.refused(self.imds.instance_id())
        self.assertEqual(logs, [])

    async def test_required_items(self) -> None:
        self.server.items.clear()
        for request in (self.imds.instance_id(), self.imds.region(), self.imds.local_ipv4()):
            self.assertIn("the metadata service has no", str(await self.refused(request)))

    async def test_token_is_reused_until_shortly_before_expiry(self) -> None:
        await self.imds.instance_id()
        await self.imds.instance_id()
        self.assertEqual(self.server.requests, [TOKEN, ID, ID])
        self.clock.advance(21600 - 61)
        await self.imds.instance_id()
        self.assertEqual(self.server.requests, [TOKEN, ID, ID, ID])
        self.clock.advance(2)
        await self.imds.instance_id()
        self.assertEqual(self.server.requests[4:], [TOKEN, ID])

    async def test_expired_token_is_renewed(self) -> None:
        await self.imds.instance_id()
        self.server.expire_tokens()
        self.assertEqual(await self.imds.instance_id(), "i-0123456789abcdef0")
        self.assertEqual(self.server.requests, [TOKEN, ID, ID, TOKEN, ID])

    async def test_token_refused(self) -> None:
        self.server.overrides[ID[1]] = (401, b"")
        error = await self.refused(self.imds.instance_id())
        self.assertIn("answered 401 for instance-id", str(error))
        self.assertEqual(self.server.requests, [TOKEN, ID, TOKEN, ID])

    async def test_no_token(self) -> None:
        self.server.overrides[TOKEN[1]] = (403, b"")
        error = await self.refused(self.imds.instance_id())
        self.assertIn("refused a token (403)", str(error))
        self.assertEqual(self.server.requests, [TOKEN])
        self.server.overrides[TOKEN[1]] = (200, b"to\r\nken: x")
        self.assertEqual((await self.refused(self.imds.instance_id())).kind, "token")

    async def test_error_response(self) -> None:
        await self.imds.instance_id()
        self.server.failure_mode = "error"
        self.assertIn("answered 500 for instance-id", str(await self.refused(self.imds.instance_id())))
        self.server.failure_mode = ""
        self.assertEqual(await self.imds.instance_id(), "i-0123456789abcdef0")

    async def test_timeout(self) -> None:
        self.server.failure_mode = "hang"
        error = await self.refused(self.make(timeout=0.05).instance_id())
        self.assertEqual(error.kind, "silent")
        self.assertIn("within 0.05 s: this is not an EC2 instance", str(error))
        self.assertIn("HttpPutResponseHopLimit", str(error))

    async def test_connection_refused(self) -> None:
        error = await self.refused(Imds(reactor, f"http://127.0.0.1:{free_port()}").instance_id())
        self.assertIn("refused", str(error))
        self.assertIn("this is not an EC2 instance", str(error))

    async def test_cancel(self) -> None:
        self.server.failure_mode = "hang"
        request = self.imds.instance_id()
        while not self.server.requests:
            await _reactor_iteration()
        request.cancel()
        await self.assertFailure(request, CancelledError)

    async def test_invalid_responses(self) -> None:
        for body in (b"", b"two words", b"<html>", b"\xff", b"line\nline"):
            self.server.overrides[ID[1]] = (200, body)
            self.assertEqual((await self.refused(self.imds.instance_id())).kind, "unreadable")
        self.server.items["local-ipv4"] = "10.0.0.256"
        self.assertEqual((await self.refused(self.imds.local_ipv4())).kind, "unreadable")

    async def test_response_too_large(self) -> None:
        self.server.overrides[f"/latest/meta-data/{TARGET_STATE_PATH}"] = (200, b"x" * (MAX_BODY_SIZE + 1))
        self.assertEqual((await self.refused(self.imds.target_lifecycle_state())).kind, "long")


def _reactor_iteration() -> Deferred[None]:
    iteration: Deferred[None] = Deferred()
    reactor.callLater(0, iteration.callback, None)  # type: ignore[attr-defined]
    return iteration


class EndpointTests(SynchronousTestCase):
    def test_endpoint_url(self) -> None:
        self.assertEqual(endpoint_url({}), DEFAULT_ENDPOINT)
        self.assertEqual(endpoint_url({ENDPOINT_VARIABLE: ""}), DEFAULT_ENDPOINT)
        self.assertEqual(endpoint_url({ENDPOINT_VARIABLE: "http://[fd00:ec2::254]/"}), "http://[fd00:ec2::254]")

    def test_invalid_urls(self) -> None:
        for url in ("169.254.169.254", "https://x", "http://", "http://x?y", "http://u@x", "http://x:y", "http://é"):
            error = self.assertRaises(ValueError, endpoint_url, {ENDPOINT_VARIABLE: url})
            self.assertIn("write http://host[:port]", str(error))

    @given(st.text())
    def test_any_text_is_accepted_or_refused(self, url: str) -> None:
        try:
            taken = endpoint_url({ENDPOINT_VARIABLE: url})
        except ValueError:
            return
        self.assertTrue(taken.startswith("http://"))


class ReadingTests(SynchronousTestCase):
    @given(st.binary() | st.from_regex(rb"[a-zA-Z0-9:-]{1,70}\n?"))
    def test_parse_word(self, body: bytes) -> None:
        try:
            read = parse_word(body)
        except ValueError:
            self.assertIsNone(re.fullmatch(rb"[A-Za-z0-9:-]{1,64}", body.strip(b" \t\r\n")))
        else:
            self.assertEqual(read.encode(), body.strip(b" \t\r\n"))

    @given(st.ip_addresses(v=4))
    def test_parse_ipv4(self, ip: ipaddress.IPv4Address) -> None:
        self.assertEqual(parse_ipv4(f"{ip}\n".encode()), str(ip))

    @given(st.binary())
    def test_any_bytes_are_parsed_or_refused(self, body: bytes) -> None:
        try:
            read = parse_ipv4(body)
        except ValueError:
            return
        self.assertEqual(read.encode(), body.strip(b" \t\r\n"))

    @given(st.integers(0, 21600))
    def test_parse_token_ttl(self, seconds: int) -> None:
        self.assertEqual(parse_token_ttl(str(seconds)), seconds)

    @given(st.text())
    def test_any_token_ttl_header(self, header: str) -> None:
        self.assertTrue(0 <= parse_token_ttl(header) <= 21600)
