"""How full this node is, told to CloudWatch once a minute.

    -> PutMetricData  CapacityUsed  37.5 Percent   AutoScalingGroupName=gw
                      Clients       3000 Count     AutoScalingGroupName=gw

The group is the only dimension, so that the nodes' datapoints come together: the statistic ``Average`` of
``CapacityUsed`` is the mean over the fleet, and what the ``CustomizedMetricSpecification`` of a target-tracking policy
is to name, with the unit ``Percent``; it falls as nodes are added. ``Clients`` has one datapoint per node and minute:
its ``Sum`` over a minute is about the clients of the fleet.

A node that does not take clients publishes nothing: one that empties itself would pull the average down, and the group
would shrink further.

A node as part of an autoscaling group: it tells how full it is, and empties itself when its instance is to end.

``--autoscaling aws:group=NAME``, with ``region=`` (when not given that of the environment, as boto3 takes it, or else
that of the instance), ``hook=`` (a lifecycle hook; the only one of the group when not given) and ``namespace=`` (of the
metrics in CloudWatch; ``wsgateway``).
cloudwatch.py publishes, lifecycle.py watches. Neither fails, whatever AWS does: a node goes on serving.
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

#: seconds from one time to the next, the period of CloudWatch's metrics
PUBLISH_INTERVAL = 60.0
#: seconds within which the first time is: nodes that start at the same moment do not all ask at the same moment
MAX_INITIAL_DELAY = 10.0


class MetricsPublisher:
    """Publishes while ``taking`` says that this node takes clients.

    ``ask`` is that of :class:`~gateway.cloud.aws.Aws`. ``clients`` gives how many are here, of at most ``capacity``.
    ``failures`` counts what fails, by request. ``uniform`` is that of :mod:`random`.
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
        self._failure_log = FailureLog("metrics do not reach CloudWatch", "PutMetricData", failures)
        self._start_timer: IDelayedCall | None = None
        self._loop = LoopingCall(lambda: Deferred.fromCoroutine(self._publish()))
        self._loop.clock = clock

    def start(self) -> None:
        """Publish soon, and once a minute from then on."""
        self._start_timer = self._clock.callLater(
            self._uniform(0, MAX_INITIAL_DELAY), self._loop.start, PUBLISH_INTERVAL
        )

    def stop(self) -> None:
        """Publish nothing more."""
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
        except Exception:  # noqa: BLE001 - or it would be the last time
            self._log.failure("error in publishing")
        else:
            self._failure_log.record_success()

    def _datum(self, name: str, value: float, unit: str) -> dict[str, Any]:
        # Without a time it is the one at which it arrives: this machine's clock may be wrong.
        dimensions = [{"Name": "AutoScalingGroupName", "Value": self._group}]
        return {"MetricName": name, "Dimensions": dimensions, "Value": value, "Unit": unit}


#: in ConfigError
OPTION = "autoscaling"

#: key -> what its value looks like, and in words; what AWS itself would refuse at the first request
_VALUE_PATTERNS = {
    "group": (r"[ -9;-~]{1,255}", "at most 255 characters of ASCII, without a colon"),
    "region": (r"[a-z0-9]+(-[a-z0-9]+){2,4}", "such as eu-central-1"),
    "hook": (r"[A-Za-z0-9_/-]{1,255}", "at most 255 letters, digits, and any of - _ /"),
    "namespace": (r"(?!AWS/)[A-Za-z0-9._/#-][A-Za-z0-9._/#: -]{0,254}", "letters, digits, and any of . - _ / #"),
}


@attrs.frozen
class AutoscalingGroup:
    """An autoscaling group, as ``--autoscaling`` names it; what is not given is empty."""

    name: str
    region: str = ""
    hook: str = ""
    namespace: str = "wsgateway"


def parse_group(spec: str) -> AutoscalingGroup:
    """Read the text of ``--autoscaling``. Raises :class:`~gateway.settings.ConfigError`."""
    kind = spec.partition(":")[0]
    if kind != "aws":
        raise ConfigError(OPTION, f"{kind!r} is no kind of autoscaling; write aws:group=NAME")
    values = parse_spec(OPTION, spec, required=("group",), optional=("region", "hook", "namespace"))
    for key, value in values.items():
        pattern, words = _VALUE_PATTERNS[key]
        if not re.fullmatch(pattern, value):
            raise ConfigError(OPTION, f"{value!r} is no {key}: {words}")
    return AutoscalingGroup(values.pop("group"), **values)


class Autoscaling:
    """This node in its group.

    ``clients`` gives how many clients are here, of at most ``capacity``, and ``taking`` whether the node takes any.
    ``drain`` is called, at most once, when AWS wants the instance to end. ``neighbours`` gives how many clients are
    still on other live nodes of this instance, where a node that has not begun to drain counts for more than none.

    Raises :class:`~gateway.settings.ConfigError` for a spec that cannot be used, and where boto3 is missing.
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
        """Begin, when the node takes clients."""
        self._publisher.start()
        self._lifecycle.start()

    def address(self) -> Deferred[str]:
        """The IPv4 address of this machine: the public one if it has any, else that within its network. Fails with
        ``AwsError``."""
        return Deferred.fromCoroutine(self._address())

    async def _address(self) -> str:
        return await self._imds.public_ipv4() or await self._imds.local_ipv4()

    def complete_drain(self) -> Deferred[None]:
        """To be called when the node has drained, before its process ends; fires when it may end. If AWS waits for the
        instance it is told that it need not any more, but not before the other nodes of it have no clients either. Does
        not fail; bounded as in :meth:`gateway.cloud.lifecycle.Lifecycle.drained`."""
        return self._lifecycle.complete_drain()

    def skip_colocated_nodes(self) -> None:
        """Somebody wants this process to end: do not wait for the clients of other nodes, but leave the instance to
        these."""
        self._lifecycle.skip_colocated_nodes()

    def stop(self) -> Deferred[None]:
        """Leave off, and wait for what is under way: 3 s at most. Does not fail."""
        self._publisher.stop()
        self._lifecycle.stop()
        return self._aws.stop()
