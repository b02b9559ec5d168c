"""Tests of gateway.cloud.autoscaling: the option, a node in a group over real HTTP, and the CloudWatch metrics."""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from typing import Any
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock, deferLater
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cloud.autoscaling import PUBLISH_INTERVAL, Autoscaling, AutoscalingGroup, MetricsPublisher, parse_group
from gateway.cloud.aws import AWSClient
from gateway.cloud.errors import AwsError
from gateway.cloud.imds import ENDPOINT_VARIABLE
from gateway.metrics import Metrics
from gateway.settings import ConfigError
from tests.fakes import autoscaling, imds, moto


def make(spec: str = "aws:group=gw", **options: Any) -> Autoscaling:
    defaults: dict[str, Any] = {
        "reactor": Clock(),
        "metrics": Metrics(),
        "clients": lambda: 0,
        "capacity": 100,
        "accepts_clients": lambda: True,
        "drain": lambda: None,
        "colocated_clients": lambda: 0,
    }
    return Autoscaling(spec, **{**defaults, **options})


class SpecTests(SynchronousTestCase):
    def refused(self, spec: str) -> str:
        error = self.assertRaises(ConfigError, make, spec)
        self.assertEqual(error.option, "autoscaling")
        self.assertEqual(len(str(error).splitlines()), 1)
        return str(error)

    def test_parse_group(self) -> None:
        self.assertEqual(parse_group("aws:group=gw"), AutoscalingGroup("gw", "", "", "wsgateway"))
        self.assertEqual(
            parse_group("aws:group=my gw:region=eu-central-1:hook=empty/it:namespace=Shop/Gateway"),
            AutoscalingGroup("my gw", "eu-central-1", "empty/it", "Shop/Gateway"),
        )

    def test_errors_name_the_problem(self) -> None:
        self.assertEqual(
            self.refused("gcp:group=gw"), "--autoscaling: 'gcp' is not a kind of autoscaling; write aws:group=NAME"
        )
        self.assertIn("not a kind of autoscaling", self.refused(""))
        self.assertIn("'group' is missing", self.refused("aws"))
        self.assertIn("'zone=Z' has no place in it", self.refused("aws:group=gw:zone=Z"))
        self.assertIn("is not a valid group: at most 255", self.refused("aws:group=" + 256 * "x"))
        self.assertIn("is not a valid group", self.refused(r"aws:group=a\:b"))
        self.assertIn(
            "is not a valid region: such as eu-central-1", self.refused("aws:group=gw:region=eu-central-1.example")
        )
        self.assertIn("is not a valid hook", self.refused("aws:group=gw:hook=a b"))
        self.assertIn("is not a valid namespace", self.refused("aws:group=gw:namespace=AWS/EC2"))

    @given(st.text())
    @example("aws:group=gw\n")
    def test_any_text_is_parsed_or_refused(self, rest: str) -> None:
        for spec in (rest, f"aws:group={rest}", f"aws:group=gw:hook={rest}", f"aws:group=gw:namespace={rest}"):
            try:
                group = parse_group(spec)
            except ConfigError as e:
                self.assertTrue(str(e).startswith("--autoscaling: "))
            else:
                self.assertTrue(all(value.isprintable() for value in (group.name, group.hook, group.namespace)))

    def test_missing_boto3(self) -> None:
        with mock.patch.dict(sys.modules, {"boto3": None}):
            sys.modules.pop("gateway.cloud.aws", None)
            self.assertIn("pip install 'wsgateway[aws]'", self.refused("aws:group=gw"))

    def test_invalid_metadata_endpoint(self) -> None:
        with mock.patch.dict("os.environ", {ENDPOINT_VARIABLE: "https://x"}):
            self.assertIn(f"{ENDPOINT_VARIABLE} is 'https://x'", self.refused("aws:group=gw"))


class NodeTests(TestCase):
    """A node in a group, over real HTTP."""

    def setUp(self) -> None:
        self.aws = autoscaling.FakeAutoscaling()
        self.addCleanup(self.aws.close)
        self.imds = imds.FakeIMDS()
        self.addCleanup(self.imds.close)
        environment = {**moto.environment(self.aws.url), ENDPOINT_VARIABLE: self.imds.url}
        # The region must come from the instance.
        del environment["AWS_DEFAULT_REGION"]
        patch = mock.patch.dict("os.environ", environment)
        patch.start()
        self.addCleanup(patch.stop)
        self.metrics = Metrics()

    def make(self, *args: str, **options: Any) -> Autoscaling:
        node = make(*args, reactor=reactor, metrics=self.metrics, **options)
        self.addCleanup(node.stop)
        return node

    async def test_instance_terminates(self) -> None:
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

    async def test_action_completed_by_another_node(self) -> None:
        node = self.make()
        self.imds.state = "Terminated"
        await node.complete_drain()
        self.assertIn("CompleteLifecycleAction", self.aws.operations())
        self.assertEqual(self.metrics.autoscaling_failures["CompleteLifecycleAction"], 0)

    async def test_not_on_an_instance(self) -> None:
        self.imds.failure_mode = "error"
        node = self.make()
        node.start()
        await node.complete_drain()
        self.assertTrue(self.metrics.autoscaling_failures["metadata"])
        self.assertEqual(self.aws.requests, [])

    async def test_region_of_the_option(self) -> None:
        self.imds.failure_mode = "error"
        node = self.make("aws:group=gw:region=eu-west-3")
        node.start()
        # Without the region of the option there would be none. Another request may be the first.
        while ("DescribeLifecycleHooks", {"AutoScalingGroupName": "gw"}) not in self.aws.requests:
            await deferLater(reactor, 0.01)

    async def test_region_of_the_environment(self) -> None:
        self.imds.failure_mode = "error"
        with mock.patch.dict("os.environ", {"AWS_DEFAULT_REGION": "eu-west-3"}):
            node = self.make("aws:group=gw")
        node.start()
        # Without the region of the option there would be none. Another request may be the first.
        while ("DescribeLifecycleHooks", {"AutoScalingGroupName": "gw"}) not in self.aws.requests:
            await deferLater(reactor, 0.01)


OPTIONS: dict[str, Any] = {"group": "gw", "namespace": "wsgateway", "capacity": 8000}


class MetricsPublisherTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.failures: Counter[str] = Counter()
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.answers: list[Deferred[dict[str, Any]]] = []
        self.accepts_clients = True
        self.clients = 3000
        self.publisher = MetricsPublisher(
            self.request,
            self.clock,
            clients=lambda: self.clients,
            accepts_clients=lambda: self.accepts_clients,
            failures=self.failures,
            uniform=lambda low, high: (low + high) / 2,
            **OPTIONS,
        )

    def request(self, service: str, operation: str, **parameters: Any) -> Deferred[dict[str, Any]]:
        self.requests.append((service, operation, parameters))
        return self.answers.pop(0) if self.answers else succeed({})

    def test_request_parameters(self) -> None:
        self.publisher.start()
        self.clock.advance(5)
        dimensions = [{"Name": "AutoScalingGroupName", "Value": "gw"}]
        data = [
            {"MetricName": "CapacityUsed", "Dimensions": dimensions, "Value": 37.5, "Unit": "Percent"},
            {"MetricName": "Clients", "Dimensions": dimensions, "Value": 3000.0, "Unit": "Count"},
        ]
        self.assertEqual(
            self.requests, [("cloudwatch", "put_metric_data", {"Namespace": "wsgateway", "MetricData": data})]
        )

    def test_publishes_once_a_minute(self) -> None:
        self.publisher.start()
        self.assertEqual(self.requests, [])
        self.clock.advance(5)
        self.assertEqual(len(self.requests), 1)
        self.clock.advance(PUBLISH_INTERVAL - 1)
        self.assertEqual(len(self.requests), 1)
        self.clock.advance(1)
        self.assertEqual(len(self.requests), 2)

    def test_draining_node_publishes_nothing(self) -> None:
        self.accepts_clients = False
        self.publisher.start()
        self.clock.advance(5)
        self.assertEqual(self.requests, [])
        self.accepts_clients = True
        self.clock.advance(PUBLISH_INTERVAL)
        self.assertEqual(len(self.requests), 1)

    def test_failure_is_counted_logged_once_and_retried(self) -> None:
        self.answers = [fail(AwsError("put_metric_data: no", kind="no")) for _ in range(2)]
        with capturedLogs() as logs:
            self.publisher.start()
            self.clock.advance(5)
            self.clock.pump([1] * 59)
            self.assertEqual(len(self.requests), 1)
            self.clock.pump([PUBLISH_INTERVAL] * 2)
        self.assertEqual(self.failures, {"PutMetricData": 2})
        self.assertEqual([event.get("problem") for event in logs], ["put_metric_data: no", None])
        self.assertIn("works again", logs[1]["log_format"])

    def test_unexpected_error_does_not_end_the_loop(self) -> None:
        with mock.patch.object(self, "clients", "none"):
            self.publisher.start()
            self.clock.advance(5)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)
        self.clock.advance(PUBLISH_INTERVAL)
        self.assertEqual(len(self.requests), 1)

    def test_one_request_in_flight(self) -> None:
        slow: Deferred[dict[str, Any]] = Deferred()
        self.answers = [slow]
        self.publisher.start()
        self.clock.advance(5)
        self.clock.pump([PUBLISH_INTERVAL] * 3)
        self.assertEqual(len(self.requests), 1)
        slow.callback({})
        self.clock.advance(PUBLISH_INTERVAL)
        self.assertEqual(len(self.requests), 2)

    def test_stop(self) -> None:
        self.publisher.stop()
        self.publisher.start()
        self.publisher.stop()
        self.clock.advance(5)
        self.assertEqual(self.requests, [])
        self.publisher.start()
        self.clock.advance(5)
        self.publisher.stop()
        self.clock.pump([PUBLISH_INTERVAL] * 2)
        self.assertEqual(len(self.requests), 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class CloudWatchTests(TestCase):
    """Tests with moto's server."""

    async def test_statistics_of_a_scaling_policy(self) -> None:
        server = moto.server()
        server.reset()
        # moto's first response for a service may take longer than a node's timeout.
        server.client("cloudwatch").list_metrics()
        for name, value in server.environment.items():
            patch = mock.patch.dict("os.environ", {name: value})
            patch.start()
            self.addCleanup(patch.stop)
        aws = AWSClient(reactor, lambda: succeed(moto.REGION))
        self.addCleanup(aws.stop)
        failures: Counter[str] = Counter()
        requests: list[Deferred[dict[str, Any]]] = []

        def request(*operation: str, **parameters: Any) -> Deferred[dict[str, Any]]:
            requests.append(aws.request(*operation, **parameters))
            return requests[-1]

        nodes = [(3000, Clock()), (5000, Clock())]
        for clients, clock in nodes:
            publisher = MetricsPublisher(
                request, clock, clients=lambda n=clients: n, accepts_clients=lambda: True, failures=failures, **OPTIONS
            )
            publisher.start()
            self.addCleanup(publisher.stop)
            clock.advance(60)
            await requests[-1]
        self.assertEqual(failures, {})
        self.assertEqual(self.average(server, "CapacityUsed", "Percent"), 50.0)
        self.assertEqual(self.average(server, "Clients", "Count"), 4000.0)

    def average(self, server: moto.MotoServer, name: str, unit: str) -> float:
        """Return the average over the fleet, as a CustomizedMetricSpecification computes it."""
        cloudwatch = server.client("cloudwatch")
        dimensions = [{"Name": "AutoScalingGroupName", "Value": "gw"}]
        (metric,) = cloudwatch.list_metrics(Namespace="wsgateway", MetricName=name)["Metrics"]
        self.assertEqual(metric["Dimensions"], dimensions)
        now, hour = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(hours=1)
        (point,) = cloudwatch.get_metric_statistics(
            Namespace="wsgateway",
            MetricName=name,
            Dimensions=dimensions,
            Unit=unit,
            Statistics=["Average", "SampleCount"],
            StartTime=now - hour,
            EndTime=now + hour,
            Period=7200,
        )["Datapoints"]
        self.assertEqual(point["SampleCount"], 2)
        return float(point["Average"])
