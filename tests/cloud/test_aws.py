"""Tests of gateway.cloud.aws: errors of boto3, and its threads."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

from botocore.exceptions import NoCredentialsError
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, fail, maybeDeferred, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cloud import aws as module
from gateway.cloud.aws import MAX_THREADS, AWSClient
from gateway.cloud.errors import AwsError
from tests.builders.ports import free_port
from tests.fakes import moto
from tests.fakes.aws import HOOK, NO_ACTION, StubbedAws


class RequestTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.stubbed = StubbedAws(self.clock)
        self.addCleanup(self.stubbed.close)

    def request(self, aws: AWSClient | None = None) -> Deferred[dict[str, Any]]:
        return (aws or self.stubbed.client).request(
            "autoscaling", "describe_lifecycle_hooks", AutoScalingGroupName="gw"
        )

    def refused(self, aws: AWSClient | None = None) -> AwsError:
        error = self.failureResultOf(self.request(aws), AwsError).value
        assert isinstance(error, AwsError)
        return error

    def test_response(self) -> None:
        self.stubbed.expect_describe_hooks(HOOK)
        self.stubbed.expect_describe_hooks()
        self.assertEqual(self.successResultOf(self.request())["LifecycleHooks"], [HOOK])
        self.assertEqual(self.successResultOf(self.request())["LifecycleHooks"], [])
        self.assertEqual(self.stubbed.created_clients, [("autoscaling", moto.REGION)])

    def test_error_response(self) -> None:
        self.stubbed.expect_error("describe_lifecycle_hooks", *NO_ACTION)
        error = self.refused()
        self.assertEqual(error.kind, "ValidationError")
        self.assertEqual(str(error), "describe_lifecycle_hooks: ValidationError: " + NO_ACTION[1])

    def test_error_message_becomes_one_line(self) -> None:
        self.stubbed.expect_error("describe_lifecycle_hooks", "Odd", "one\ntwo\x1b[31m" + 1000 * "x")
        self.assertTrue(str(self.refused()).isprintable())
        self.stubbed.expect_error("describe_lifecycle_hooks", "Odd", "one\ntwo\x1b[31m" + 1000 * "x")
        self.assertTrue(len(str(self.refused())) < 400)

    def test_missing_credentials_are_looked_for_again(self) -> None:
        made: list[str] = []

        def make(service: str, region: str) -> Any:
            made.append(service)
            client = mock.Mock()
            client.describe_lifecycle_hooks.side_effect = NoCredentialsError()
            return client

        aws = AWSClient(self.clock, lambda: succeed("r-1"), run=maybeDeferred, make_client=make)
        for _ in range(2):
            error = self.refused(aws)
            self.assertEqual(error.kind, "NoCredentials")
            self.assertIn("give the instance a role", str(error))
        self.assertEqual(made, ["autoscaling", "autoscaling"])

    def test_any_exception_of_botocore(self) -> None:
        client = mock.Mock()
        client.describe_lifecycle_hooks.side_effect = ZeroDivisionError()
        error = self.refused(
            AWSClient(self.clock, lambda: succeed("r-1"), run=maybeDeferred, make_client=lambda *_: client)
        )
        self.assertEqual((error.kind, str(error)), ("ZeroDivisionError", "describe_lifecycle_hooks: ZeroDivisionError"))

    def test_find_region_is_retried(self) -> None:
        regions: list[Deferred[str]] = [fail(AwsError("no region", kind="r")), succeed("r-1")]
        aws = AWSClient(
            self.clock,
            lambda: regions.pop(0),
            run=maybeDeferred,
            make_client=lambda _, region: mock.Mock(x=lambda: {"r": region}),
        )
        self.assertEqual(str(self.failureResultOf(aws.request("s", "x"), AwsError).value), "no region")
        self.assertEqual(self.successResultOf(aws.request("s", "x")), {"r": "r-1"})
        self.assertEqual(self.successResultOf(aws.request("s", "x")), {"r": "r-1"})

    def test_requests_in_flight_are_limited(self) -> None:
        self.stubbed.hold()
        requests = [self.request() for _ in range(MAX_THREADS)]
        self.assertEqual(self.refused().kind, "busy")
        # A cancelled request still occupies its thread.
        requests[0].cancel()
        self.failureResultOf(requests[0], CancelledError)
        self.assertEqual(self.refused().kind, "busy")
        for _ in range(MAX_THREADS):
            self.stubbed.expect_describe_hooks(HOOK)
        self.stubbed.release()
        for pending in requests[1:]:
            self.successResultOf(pending)
        self.stubbed.expect_describe_hooks(HOOK)
        self.successResultOf(self.request())


class ThreadTests(TestCase):
    """Tests with threads and real boto3 clients."""

    def setUp(self) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        patch = mock.patch.dict("os.environ", moto.environment(url))
        patch.start()
        self.addCleanup(patch.stop)

    async def test_connection_refused(self) -> None:
        aws = AWSClient(reactor, lambda: succeed(moto.REGION))
        self.addCleanup(aws.stop)
        request = aws.request("autoscaling", "describe_lifecycle_hooks", AutoScalingGroupName="gw")
        error = await self.assertFailure(request, AwsError)
        self.assertEqual(error.kind, "EndpointConnectionError")

    async def test_no_credentials(self) -> None:
        with mock.patch.dict("os.environ", clear=False) as environment:
            del environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
            aws = AWSClient(reactor, lambda: succeed(moto.REGION))
            self.addCleanup(aws.stop)
            request = aws.request("autoscaling", "describe_lifecycle_hooks", AutoScalingGroupName="gw")
            error = await self.assertFailure(request, AwsError)
        self.assertEqual(error.kind, "NoCredentials")

    async def test_stop_waits_for_requests_in_flight(self) -> None:
        client, go = mock.Mock(), threading.Event()
        client.x = lambda: {"in order": go.wait()}
        aws = AWSClient(reactor, lambda: succeed("r-1"), make_client=lambda *_: client)
        request, stopped = aws.request("s", "x"), aws.stop()
        self.assertFalse(stopped.called)
        go.set()
        await stopped
        self.assertEqual(await request, {"in order": True})
        client.close.assert_called_once_with()

    async def test_stop_times_out(self) -> None:
        self.patch(module, "STOP_TIMEOUT", 0.01)
        client, go = mock.Mock(), threading.Event()
        client.x = lambda: {"in order": go.wait()}
        aws = AWSClient(reactor, lambda: succeed("r-1"), make_client=lambda *_: client)
        request = aws.request("s", "x")
        await aws.stop()
        self.assertFalse(request.called)
        go.set()
        await request
        await aws.stop()
