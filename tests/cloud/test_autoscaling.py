"""``--autoscaling``: what it may say, and a node's part in a group, with the metadata service on real sockets."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cloud.autoscaling import Autoscaling, AutoscalingGroup, parse_group
from gateway.cloud.imds import ENDPOINT_VARIABLE
from gateway.metrics import Metrics
from gateway.settings import ConfigError
from tests import autoscaling_server, imds_server, moto_server


def make(spec: str = "aws:group=gw", **options: Any) -> Autoscaling:
    given: dict[str, Any] = {
        "reactor": Clock(),
        "metrics": Metrics(),
        "clients": lambda: 0,
        "capacity": 100,
        "accepts_clients": lambda: True,
        "drain": lambda: None,
        "colocated_clients": lambda: 0,
    }
    return Autoscaling(spec, **{**given, **options})


class SpecTests(SynchronousTestCase):
    def refused(self, spec: str) -> str:
        error = self.assertRaises(ConfigError, make, spec)
        self.assertEqual(error.option, "autoscaling")
        self.assertEqual(len(str(error).splitlines()), 1)
        return str(error)

    def test_a_group(self) -> None:
        self.assertEqual(parse_group("aws:group=gw"), AutoscalingGroup("gw", "", "", "wsgateway"))
        self.assertEqual(
            parse_group("aws:group=my gw:region=eu-central-1:hook=empty/it:namespace=Shop/Gateway"),
            AutoscalingGroup("my gw", "eu-central-1", "empty/it", "Shop/Gateway"),
        )

    def test_what_is_wrong_is_named(self) -> None:
        self.assertEqual(
            self.refused("gcp:group=gw"), "--autoscaling: 'gcp' is no kind of autoscaling; write aws:group=NAME"
        )
        self.assertIn("no kind of autoscaling", self.refused(""))
        self.assertIn("'group' is missing", self.refused("aws"))
        self.assertIn("'zone=Z' has no place in it", self.refused("aws:group=gw:zone=Z"))
        self.assertIn("is no group: at most 255", self.refused("aws:group=" + 256 * "x"))
        self.assertIn("is no group", self.refused(r"aws:group=a\:b"))
        self.assertIn("is no region: such as eu-central-1", self.refused("aws:group=gw:region=eu-central-1.example"))
        self.assertIn("is no hook", self.refused("aws:group=gw:hook=a b"))
        self.assertIn("is no namespace", self.refused("aws:group=gw:namespace=AWS/EC2"))

    @given(st.text())
    @example("aws:group=gw\n")
    def test_any_text_is_read_or_refused(self, rest: str) -> None:
        for spec in (rest, f"aws:group={rest}", f"aws:group=gw:hook={rest}", f"aws:group=gw:namespace={rest}"):
            try:
                group = parse_group(spec)
            except ConfigError as e:
                self.assertTrue(str(e).startswith("--autoscaling: "))
            else:
                self.assertTrue(all(value.isprintable() for value in (group.name, group.hook, group.namespace)))

    def test_without_boto3(self) -> None:
        with mock.patch.dict(sys.modules, {"boto3": None}):
            sys.modules.pop("gateway.cloud.aws", None)
            self.assertIn("pip install 'wsgateway[aws]'", self.refused("aws:group=gw"))

    def test_a_metadata_service_that_cannot_be(self) -> None:
        with mock.patch.dict("os.environ", {ENDPOINT_VARIABLE: "https://x"}):
            self.assertIn(f"{ENDPOINT_VARIABLE} is 'https://x'", self.refused("aws:group=gw"))


class NodeTests(TestCase):
    """Of a node, by real HTTP."""

    def setUp(self) -> None:
        self.aws = autoscaling_server.FakeAutoscaling()
        self.addCleanup(self.aws.close)
        self.imds = imds_server.FakeIMDS()
        self.addCleanup(self.imds.close)
        environment = {**moto_server.environment(self.aws.url), ENDPOINT_VARIABLE: self.imds.url}
        # So that it is the instance that tells it.
        del environment["AWS_DEFAULT_REGION"]
        patch = mock.patch.dict("os.environ", environment)
        patch.start()
        self.addCleanup(patch.stop)
        self.metrics = Metrics()

    def make(self, *args: str, **options: Any) -> Autoscaling:
        node = make(*args, reactor=reactor, metrics=self.metrics, **options)
        self.addCleanup(node.stop)
        return node

    async def test_its_instances_end(self) -> None:
        draining: Deferred[None] = Deferred()
        node = self.make(drain=lambda: draining.callback(None))
        self.imds.state = "Terminated"
        self.aws.waiting = True
        node.start()
        await draining
        await node.complete_drain()
        self.assertFalse(self.aws.waiting)
        action = {"LifecycleHookName": "empty-it", "AutoScalingGroupName": "gw", "InstanceId": "i-0123456789abcdef0"}
        self.assertIn(("CompleteLifecycleAction", {**action, "LifecycleActionResult": "CONTINUE"}), self.aws.requests)
        self.assertEqual(self.metrics.autoscaling_failures["CompleteLifecycleAction"], 0)

    async def test_another_node_of_the_instance_was_quicker(self) -> None:
        node = self.make()
        self.imds.state = "Terminated"
        await node.complete_drain()
        self.assertIn("CompleteLifecycleAction", self.aws.operations())
        self.assertEqual(self.metrics.autoscaling_failures["CompleteLifecycleAction"], 0)

    async def test_it_is_on_no_instance(self) -> None:
        self.imds.failure_mode = "error"
        node = self.make()
        node.start()
        await node.complete_drain()
        self.assertTrue(self.metrics.autoscaling_failures["metadata"])
        self.assertEqual(self.aws.requests, [])

    async def test_the_region_that_is_given(self) -> None:
        self.imds.failure_mode = "error"
        node = self.make("aws:group=gw:region=eu-west-3")
        node.start()
        while not self.aws.requests:
            await deferLater(reactor, 0.01)
        self.assertEqual(self.aws.requests[0], ("DescribeLifecycleHooks", {"AutoScalingGroupName": "gw"}))

    async def test_the_region_of_the_environment(self) -> None:
        self.imds.failure_mode = "error"
        with mock.patch.dict("os.environ", {"AWS_DEFAULT_REGION": "eu-west-3"}):
            node = self.make("aws:group=gw")
        node.start()
        while not self.aws.requests:
            await deferLater(reactor, 0.01)
        self.assertEqual(self.aws.requests[0], ("DescribeLifecycleHooks", {"AutoScalingGroupName": "gw"}))
