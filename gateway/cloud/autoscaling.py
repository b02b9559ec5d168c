"""The option ``--autoscaling``: publish metrics for an autoscaling group, and drain before the instance is terminated.

    aws:group=NAME[:region=REGION][:hook=NAME][:namespace=NAME]

``region`` defaults to that of the environment, as boto3 reads it, or else that of the instance; ``hook``, a lifecycle
hook, to the only one of the group; ``namespace``, that of the CloudWatch metrics, to ``wsgateway``. Termination is
handled by :mod:`gateway.cloud.lifecycle`. Nothing here fails: if AWS is unavailable, the node keeps serving.

Once a minute:

    -> PutMetricData  CapacityUsed  37.5 Percent   AutoScalingGroupName=gw
                      Clients       3000 Count     AutoScalingGroupName=gw

The group is the only dimension, so the datapoints of all nodes are aggregated. The statistic ``Average`` of
``CapacityUsed`` is the mean over the fleet and falls as nodes are added: use it, with the unit ``Percent``, in the
``CustomizedMetricSpecification`` of a target-tracking policy. ``Clients`` has one datapoint per node and minute: its
``Sum`` over a minute is about the number of clients of the fleet.

A node that does not accept clients publishes nothing: a draining node would lower the average, and the group would
shrink further.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from gateway.cloud.errors import AwsError, FailureLog
from gateway.cloud.imds import Imds
from gateway.cloud.lifecycle import Lifecycle
from gateway.metrics import Metrics
from gateway.settings import ConfigError, parse_spec

#: seconds, the period of CloudWatch's metrics
PUBLISH_INTERVAL = 60.0
#: seconds; the first publication is delayed at random, so that nodes started together do not publish together
MAX_INITIAL_DELAY = 10.0


class MetricsPublisher:
    """Publish the load of this node to CloudWatch once a minute, while ``accepts_clients()`` is true.

    ``request`` is that of :class:`~gateway.cloud.aws.AWSClient`. ``clients()`` returns the number of connected clients,
    at most ``capacity``. ``failures`` counts failures by request. ``uniform`` is :func:`random.uniform`.
    """

    _log = Logger()

    def __init__(
        self,
        request: Callable[..., Deferred[dict[str, Any]]],
        clock: IReactorTime,
        *,
        group: str,
        namespace: str,
        clients: Callable[[], int],
        capacity: int,
        accepts_clients: Callable[[], bool],
        failures: Counter[str],
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._request = request
        self._clock = clock
        self._group = group
        self._namespace = namespace
        self._clients = clients
        self._capacity = capacity
        self._accepts_clients = accepts_clients
        self._uniform = uniform
        self._failure_log = FailureLog("metrics cannot be published to CloudWatch", "PutMetricData", failures)
        self._start_timer: IDelayedCall | None = None
        self._loop = LoopingCall(lambda: Deferred.fromCoroutine(self._publish()))
        self._loop.clock = clock

    def start(self) -> None:
        """Publish after a random delay, then once a minute."""
        self._start_timer = self._clock.callLater(
            self._uniform(0, MAX_INITIAL_DELAY), self._loop.start, PUBLISH_INTERVAL
        )

    def stop(self) -> None:
        if self._start_timer is not None and self._start_timer.active():
            self._start_timer.cancel()
        if self._loop.running:
            self._loop.stop()

    async def _publish(self) -> None:
        try:
            if not self._accepts_clients():
                return
            clients = self._clients()
            data = [
                self._datum("CapacityUsed", 100.0 * clients / self._capacity, "Percent"),
                self._datum("Clients", float(clients), "Count"),
            ]
            await self._request("cloudwatch", "put_metric_data", Namespace=self._namespace, MetricData=data)
        except AwsError as e:
            self._failure_log.record_failure(e)
        except Exception:  # noqa: BLE001 - an exception would end the loop
            self._log.failure("error in publishing metrics")
        else:
            self._failure_log.record_success()

    def _datum(self, name: str, value: float, unit: str) -> dict[str, Any]:
        # No timestamp: CloudWatch uses the time of arrival, and this machine's clock may be wrong.
        dimensions = [{"Name": "AutoScalingGroupName", "Value": self._group}]
        return {"MetricName": name, "Dimensions": dimensions, "Value": value, "Unit": unit}


OPTION = "autoscaling"

#: key -> pattern of its value, and the same in words; AWS would refuse anything else at the first request
_VALUE_PATTERNS = {
    "group": (r"[ -9;-~]{1,255}", "at most 255 characters of ASCII, without a colon"),
    "region": (r"[a-z0-9]+(-[a-z0-9]+){2,4}", "such as eu-central-1"),
    "hook": (r"[A-Za-z0-9_/-]{1,255}", "at most 255 letters, digits, and any of - _ /"),
    "namespace": (r"(?!AWS/)[A-Za-z0-9._/#-][A-Za-z0-9._/#: -]{0,254}", "letters, digits, and any of . - _ / #"),
}


@attrs.frozen
class AutoscalingGroup:
    """The value of ``--autoscaling``. Keys that are not given are empty."""

    name: str
    region: str = ""
    hook: str = ""
    namespace: str = "wsgateway"


def parse_group(spec: str) -> AutoscalingGroup:
    """Parse the value of ``--autoscaling``. Raises :class:`~gateway.settings.ConfigError`."""
    kind = spec.partition(":")[0]
    if kind != "aws":
        raise ConfigError(OPTION, f"{kind!r} is not a kind of autoscaling; write aws:group=NAME")
    values = parse_spec(OPTION, spec, required=("group",), optional=("region", "hook", "namespace"))
    for key, value in values.items():
        pattern, words = _VALUE_PATTERNS[key]
        if not re.fullmatch(pattern, value):
            raise ConfigError(OPTION, f"{value!r} is not a valid {key}: {words}")
    return AutoscalingGroup(values.pop("group"), **values)


class Autoscaling:
    """Publish metrics for the autoscaling group of this node's instance, and handle the instance's termination.

    ``clients()`` returns the number of connected clients, at most ``capacity``; ``accepts_clients()`` whether the node
    accepts new ones. ``drain`` is called at most once, when AWS terminates the instance. ``colocated_clients()``
    returns the number of clients on other live nodes of this instance; a node that has not begun to drain must count as
    at least one.

    Raises :class:`~gateway.settings.ConfigError` if ``spec`` is invalid or boto3 is missing.
    """

    def __init__(
        self,
        spec: str,
        *,
        reactor: Any,
        metrics: Metrics,
        clients: Callable[[], int],
        capacity: int,
        accepts_clients: Callable[[], bool],
        drain: Callable[[], object],
        colocated_clients: Callable[[], int],
    ) -> None:
        group = parse_group(spec)
        try:
            from gateway.cloud.aws import AWSClient
        except ImportError:
            raise ConfigError(OPTION, "aws: needs boto3: pip install 'wsgateway[aws]'") from None
        try:
            imds = Imds(reactor)
        except ValueError as e:
            raise ConfigError(OPTION, str(e)) from None
        self._imds = imds
        region = group.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "")
        self._aws = AWSClient(reactor, (lambda: succeed(region)) if region else imds.region)
        self._publisher = MetricsPublisher(
            self._aws.request,
            reactor,
            group=group.name,
            namespace=group.namespace,
            clients=clients,
            capacity=capacity,
            accepts_clients=accepts_clients,
            failures=metrics.autoscaling_failures,
        )
        self._lifecycle = Lifecycle(
            self._aws.request,
            imds,
            reactor,
            group=group.name,
            hook=group.hook,
            drain=drain,
            colocated_clients=colocated_clients,
            failures=metrics.autoscaling_failures,
        )

    def start(self) -> None:
        """Start publishing and watching. Call this when the node accepts clients."""
        self._publisher.start()
        self._lifecycle.start()

    def address(self) -> Deferred[str]:
        """Return the IPv4 address of this instance: public if it has one, else private. Fails with ``AwsError``."""
        return Deferred.fromCoroutine(self._address())

    async def _address(self) -> str:
        return await self._imds.public_ipv4() or await self._imds.local_ipv4()

    def complete_drain(self) -> Deferred[None]:
        """Complete the termination of the instance, if AWS is terminating it and no node of it has clients.

        Call this when the node has drained, before the process exits. Fires when the process may exit; never fails.
        Bounded as :meth:`gateway.cloud.lifecycle.Lifecycle.complete_drain`.
        """
        return self._lifecycle.complete_drain()

    def skip_colocated_nodes(self) -> None:
        """Do not wait for other nodes of this instance: leave the termination to them."""
        self._lifecycle.skip_colocated_nodes()

    def stop(self) -> Deferred[None]:
        """Stop, and wait at most 3 s for requests in flight. Never fails."""
        self._publisher.stop()
        self._lifecycle.stop()
        return self._aws.stop()
