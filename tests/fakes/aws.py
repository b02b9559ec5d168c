"""AWS client for tests, without threads: boto3 clients answered by a Stubber, called synchronously."""

from __future__ import annotations

import functools
from typing import Any

from botocore.stub import Stubber
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from gateway.cloud.aws import AWSClient
from gateway.cloud.errors import AwsError
from tests.fakes import moto

#: a hook in a response to DescribeLifecycleHooks
HOOK = {
    "LifecycleHookName": "empty-it",
    "AutoScalingGroupName": "gw",
    "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
    "HeartbeatTimeout": 90,
    "GlobalTimeout": 9000,
    "DefaultResult": "CONTINUE",
}
ACTION = {"LifecycleHookName": "empty-it", "AutoScalingGroupName": "gw", "InstanceId": "i-0123456789abcdef0"}
#: the error of AWS if there is nothing to complete
NO_ACTION = ("ValidationError", "No active Lifecycle Action found with instance ID i-0123456789abcdef0")


#: shared by all tests: making a client takes 0.1 s
_client = functools.cache(moto.offline_client)


class StubbedAws:
    """Clients that accept only the expected requests, with exactly these parameters and in this order.

    After :meth:`hold`, requests are answered by :meth:`release`.
    """

    def __init__(self, clock: Clock) -> None:
        self.unexpected_requests: list[str] = []
        self.created_clients: list[tuple[str, str]] = []
        self.held: list[Deferred[None]] = []
        self._is_holding = False
        self._stubbers: dict[str, Stubber] = {}
        self.client = AWSClient(clock, lambda: succeed(moto.REGION), run=self._run, make_client=self._client)

    def request(self, service: str, operation: str, **parameters: Any) -> Deferred[dict[str, Any]]:
        """Same as ``AWSClient.request``; records unexpected requests."""
        return self.client.request(service, operation, **parameters).addErrback(self._failed)

    def _failed(self, failure: Failure) -> Failure:
        if failure.check(AwsError) and failure.value.kind in ("StubAssertionError", "UnStubbedResponseError"):
            self.unexpected_requests.append(str(failure.value))
        return failure

    def _client(self, service: str, region: str) -> Any:
        self.created_clients.append((service, region))
        return self.stubber(service).client

    def stubber(self, service: str = "autoscaling") -> Stubber:
        if service not in self._stubbers:
            self._stubbers[service] = Stubber(_client(service))
            self._stubbers[service].activate()
        return self._stubbers[service]

    def _run(self, work: Any) -> Deferred[Any]:
        if not self._is_holding:
            return maybeDeferred(work)
        held: Deferred[None] = Deferred()
        self.held.append(held)
        return held.addCallback(lambda _: work())

    def hold(self) -> None:
        self._is_holding = True

    def release(self) -> None:
        self._is_holding = False
        while self.held:
            self.held.pop(0).callback(None)

    # Expected requests.

    def expect_describe_hooks(self, *hooks: dict[str, Any], name: str = "") -> None:
        asked: dict[str, Any] = {"AutoScalingGroupName": "gw", **({"LifecycleHookNames": [name]} if name else {})}
        self.stubber().add_response("describe_lifecycle_hooks", {"LifecycleHooks": list(hooks)}, asked)

    def expect_heartbeat(self, **action: str) -> None:
        self.stubber().add_response("record_lifecycle_action_heartbeat", {}, {**ACTION, **action})

    def expect_completion(self, **action: str) -> None:
        asked = {**ACTION, "LifecycleActionResult": "CONTINUE", **action}
        self.stubber().add_response("complete_lifecycle_action", {}, asked)

    def expect_error(
        self, operation: str, code: str = "AccessDenied", message: str = "not authorized", times: int = 1
    ) -> None:
        for _ in range(times):
            self.stubber().add_client_error(operation, code, message)

    def assert_no_pending_requests(self) -> None:
        """Assert that all expected requests were sent, and no others."""
        assert not self.unexpected_requests, self.unexpected_requests
        for stubber in self._stubbers.values():
            stubber.assert_no_pending_responses()

    def close(self) -> None:
        for stubber in self._stubbers.values():
            stubber.deactivate()
