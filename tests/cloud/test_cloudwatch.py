"""How full a node is: told once a minute, in the form that a target-tracking policy needs."""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Any
from unittest import mock

from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cloud.autoscaling import PUBLISH_INTERVAL, MetricsPublisher
from gateway.cloud.aws import AWSClient
from gateway.cloud.errors import AwsError
from tests import moto_server

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

    def test_what_is_asked(self) -> None:
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

    def test_soon_and_then_once_a_minute(self) -> None:
        self.publisher.start()
        self.assertEqual(self.requests, [])
        self.clock.advance(5)
        self.assertEqual(len(self.requests), 1)
        self.clock.advance(PUBLISH_INTERVAL - 1)
        self.assertEqual(len(self.requests), 1)
        self.clock.advance(1)
        self.assertEqual(len(self.requests), 2)

    def test_a_node_that_drains_publishes_nothing(self) -> None:
        self.accepts_clients = False
        self.publisher.start()
        self.clock.advance(5)
        self.assertEqual(self.requests, [])
        self.accepts_clients = True
        self.clock.advance(PUBLISH_INTERVAL)
        self.assertEqual(len(self.requests), 1)

    def test_a_failure_is_counted_told_once_and_tried_again_a_minute_later(self) -> None:
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

    def test_an_error_of_its_own_is_not_the_end(self) -> None:
        with mock.patch.object(self, "clients", "none"):
            self.publisher.start()
            self.clock.advance(5)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)
        self.clock.advance(PUBLISH_INTERVAL)
        self.assertEqual(len(self.requests), 1)

    def test_one_at_a_time(self) -> None:
        slow: Deferred[dict[str, Any]] = Deferred()
        self.answers = [slow]
        self.publisher.start()
        self.clock.advance(5)
        self.clock.pump([PUBLISH_INTERVAL] * 3)
        self.assertEqual(len(self.requests), 1)
        slow.callback({})
        self.clock.advance(PUBLISH_INTERVAL)
        self.assertEqual(len(self.requests), 2)

    def test_stopped(self) -> None:
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
    """On moto's server."""

    async def test_a_policy_would_find_it(self) -> None:
        moto = moto_server.server()
        moto.reset()
        # Its first answer for a service may take longer than a node waits for one.
        moto.client("cloudwatch").list_metrics()
        for name, value in moto.environment.items():
            patch = mock.patch.dict("os.environ", {name: value})
            patch.start()
            self.addCleanup(patch.stop)
        aws = AWSClient(reactor, lambda: succeed(moto_server.REGION))
        self.addCleanup(aws.stop)
        failures: Counter[str] = Counter()
        told: list[Deferred[dict[str, Any]]] = []

        def ask(*what: str, **parameters: Any) -> Deferred[dict[str, Any]]:
            told.append(aws.request(*what, **parameters))
            return told[-1]

        nodes = [(3000, Clock()), (5000, Clock())]
        for clients, clock in nodes:
            publisher = MetricsPublisher(
                ask, clock, clients=lambda n=clients: n, accepts_clients=lambda: True, failures=failures, **OPTIONS
            )
            publisher.start()
            self.addCleanup(publisher.stop)
            clock.advance(60)
            await told[-1]
        self.assertEqual(failures, {})
        self.assertEqual(self.average(moto, "CapacityUsed", "Percent"), 50.0)
        self.assertEqual(self.average(moto, "Clients", "Count"), 4000.0)

    def average(self, moto: moto_server.MotoServer, name: str, unit: str) -> float:
        """Of the fleet, as a CustomizedMetricSpecification has it."""
        cloudwatch = moto.client("cloudwatch")
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
