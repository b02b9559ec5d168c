"""Tests of gateway.metrics: the text that Prometheus scrapes."""

import platform

import autobahn
from prometheus_client.parser import text_string_to_metric_families
from twisted.copyright import version as twisted_version
from twisted.trial.unittest import SynchronousTestCase

from gateway import __version__
from gateway.metrics import Metrics


class MetricsTextTests(SynchronousTestCase):
    def samples(self, metrics: Metrics) -> dict[tuple[str, ...], float]:
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(metrics.text().decode())
            for sample in family.samples
        }

    def test_counters_and_gauges(self) -> None:
        metrics = Metrics()
        metrics.calls += 3
        metrics.refused["token"] += 2
        metrics.gauges["clients"] = ("Clients.", lambda: 7)
        samples = self.samples(metrics)
        self.assertEqual(samples["wsgateway_calls_total",], 3)
        self.assertEqual(samples["wsgateway_refused_total", "token"], 2)
        self.assertEqual(samples["wsgateway_clients",], 7)

    def test_every_attribute_has_a_metric(self) -> None:
        metrics = Metrics()
        for name in Metrics.__slots__:
            if name.startswith("_") or name == "gauges":
                continue
            value = getattr(metrics, name)
            if isinstance(value, int):
                setattr(metrics, name, 1)
            else:
                value["x"] = 1
            self.assertIn(f"wsgateway_{name}_total", {key[0] for key in self.samples(metrics)})

    def test_build_info(self) -> None:
        (family,) = (
            family
            for family in text_string_to_metric_families(Metrics().text().decode())
            if family.name == "wsgateway_build_info"
        )
        (sample,) = family.samples
        self.assertEqual((sample.name, sample.value), ("wsgateway_build_info", 1))
        self.assertEqual(
            sample.labels,
            {
                "version": __version__,
                "python": platform.python_version(),
                "twisted": twisted_version,
                "autobahn": autobahn.__version__,
            },
        )

    def test_instances_are_independent(self) -> None:
        first, second = Metrics(), Metrics()
        first.calls += 1
        self.assertEqual(self.samples(second)["wsgateway_calls_total",], 0)
