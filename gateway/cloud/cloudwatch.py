"""How full this node is, told to CloudWatch once a minute.

    -> PutMetricData  CapacityUsed  37.5 Percent   AutoScalingGroupName=gw
                      Clients       3000 Count     AutoScalingGroupName=gw

The group is the only dimension, so that the nodes' datapoints come together: the statistic ``Average`` of
``CapacityUsed`` is the mean over the fleet, and what the ``CustomizedMetricSpecification`` of a target-tracking policy
is to name, with the unit ``Percent``; it falls as nodes are added. ``Clients`` has one datapoint per node and minute:
its ``Sum`` over a minute is about the clients of the fleet.

A node that does not take clients publishes nothing: one that empties itself would pull the average down, and the group
would shrink further.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from gateway.cloud.trouble import AwsError, Trouble

#: seconds from one time to the next, the period of CloudWatch's metrics
INTERVAL = 60.0
#: seconds within which the first time is: nodes that start at the same moment do not all ask at the same moment
FIRST_WITHIN = 10.0


class Publisher:
    """Publishes while ``taking`` says that this node takes clients.

    ``ask`` is that of :class:`~gateway.cloud.aws.Aws`. ``clients`` gives how many are here, of at most ``capacity``.
    ``failures`` counts what fails, by request. ``uniform`` is that of :mod:`random`.
    """

    _log = Logger()

    def __init__(
        self,
        ask: Callable[..., Deferred[dict[str, Any]]],
        clock: IReactorTime,
        *,
        group: str,
        namespace: str,
        clients: Callable[[], int],
        capacity: int,
        taking: Callable[[], bool],
        failures: Counter[str],
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._group = group
        self._namespace = namespace
        self._clients = clients
        self._capacity = capacity
        self._taking = taking
        self._uniform = uniform
        self._trouble = Trouble("metrics do not reach CloudWatch", "PutMetricData", failures)
        self._first: IDelayedCall | None = None
        self._loop = LoopingCall(lambda: Deferred.fromCoroutine(self._publish()))
        self._loop.clock = clock

    def start(self) -> None:
        """Publish soon, and once a minute from then on."""
        self._first = self._clock.callLater(self._uniform(0, FIRST_WITHIN), self._loop.start, INTERVAL)

    def stop(self) -> None:
        """Publish nothing more."""
        if self._first is not None and self._first.active():
            self._first.cancel()
        if self._loop.running:
            self._loop.stop()

    async def _publish(self) -> None:
        try:
            if not self._taking():
                return
            clients = self._clients()
            data = [
                self._datum("CapacityUsed", 100.0 * clients / self._capacity, "Percent"),
                self._datum("Clients", float(clients), "Count"),
            ]
            await self._ask("cloudwatch", "put_metric_data", Namespace=self._namespace, MetricData=data)
        except AwsError as e:
            self._trouble.failed(e)
        except Exception:  # noqa: BLE001 - or it would be the last time
            self._log.failure("error in publishing")
        else:
            self._trouble.worked()

    def _datum(self, name: str, value: float, unit: str) -> dict[str, Any]:
        # Without a time it is the one at which it arrives: this machine's clock may be wrong.
        dimensions = [{"Name": "AutoScalingGroupName", "Value": self._group}]
        return {"MetricName": name, "Dimensions": dimensions, "Value": value, "Unit": unit}
