"""Counters and gauges of a node, and their Prometheus text format.

The hot path only adds to plain integers. Prometheus objects are made, and the functions of gauges called, at a scrape.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator

import attrs
import autobahn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from twisted.copyright import version as twisted_version

from gateway import __version__

#: name of a Counter attribute -> (label, help)
_LABELED_COUNTERS = {
    "refused": ("reason", "Refused opening handshakes."),
    "token_refusals": ("reason", "Rejected tokens, tickets and client certificates."),
    "closed": ("code", "Ended client connections, by the close code that was sent or received."),
    "calls_failed": ("code", "Calls that ended with an error of the gateway, by its code."),
    "bad_messages": ("source", "Messages that were not valid JSON-RPC 2.0."),
    "notifications": ("direction", "Notifications to clients and from clients."),
    "upstream_calls": ("outcome", "Calls from clients."),
    "api_requests": ("status", "HTTP requests to the backend endpoint."),
    "registry_errors": ("operation", "Failed statements of the registry database."),
    "accept_errors": (
        "reason",
        "Connections not accepted for lack of file descriptors: the errno, or reserve if the last ones are reserved.",
    ),
    "tls_failures": ("reason", "Failed TLS handshakes, and TLS connections closed for too many small records."),
    "autoscaling_failures": ("request", "Failed requests to AWS or to the instance metadata service."),
}

#: name of an integer attribute -> help
_PLAIN_COUNTERS = {
    "opened": "Opened client connections.",
    "woken": "Parked connections that were woken.",
    "replaced": "Connections replaced by a newer connection of the same client.",
    "calls": "Accepted calls to clients.",
    "calls_answered": "Calls that the client answered.",
    "late_responses": "Responses to a call that is unknown or has already ended.",
    "slow_readers": "Connections closed because they did not read what was sent.",
    "slow_senders": "Connections closed because too many messages were incomplete; the longest idle are closed first.",
    "paused_clients": "Times that reading from a client was paused because it sent too much.",
    "expired": "Client connections closed because their token expired.",
    "renewed": "Accepted tokens that connected clients sent to replace their current token.",
    "renewals_refused": "Rejected tokens that connected clients sent to replace their current token.",
    "key_failures": "Failed fetches of the keys of a token issuer.",
    "ping_timeouts": "Clients dropped because they did not respond to a ping.",
    "claims": "Claims written to the registry.",
    "releases": "Releases written to the registry.",
    "registry_batches": "Batches of claims and releases.",
    "reaped": "Removed rows of dead nodes.",
    "orphaned_rows": "Removed rows of this node whose clients are not connected.",
    "heartbeat_failures": "Heartbeats that could not be written.",
    "events_dropped": "Events dropped because a backend did not read them.",
    "peer_calls": "Calls to clients of other nodes, sent to these nodes.",
    "link_failures": "Peer connections that could not be opened or broke.",
    "relayed": "Clients relayed to another node.",
    "relay_failures": "Relays that another node refused or did not answer.",
    "rebalanced": "Clients migrated to a node with fewer clients.",
    "dns_failures": "Failed queries and updates of DNS records.",
}

#: labels of wsgateway_build_info
_BUILD_LABELS = {
    "version": __version__,
    "python": platform.python_version(),
    "twisted": twisted_version,
    "autobahn": autobahn.__version__,
}


@attrs.define
class Metrics:
    """The counters of one node: ``metrics.refused["token"] += 1``, ``metrics.calls += 1``."""

    refused: Counter[str] = attrs.field(factory=Counter)
    token_refusals: Counter[str] = attrs.field(factory=Counter)
    closed: Counter[str] = attrs.field(factory=Counter)
    calls_failed: Counter[str] = attrs.field(factory=Counter)
    bad_messages: Counter[str] = attrs.field(factory=Counter)
    notifications: Counter[str] = attrs.field(factory=Counter)
    upstream_calls: Counter[str] = attrs.field(factory=Counter)
    api_requests: Counter[str] = attrs.field(factory=Counter)
    registry_errors: Counter[str] = attrs.field(factory=Counter)
    accept_errors: Counter[str] = attrs.field(factory=Counter)
    tls_failures: Counter[str] = attrs.field(factory=Counter)
    autoscaling_failures: Counter[str] = attrs.field(factory=Counter)
    opened: int = 0
    woken: int = 0
    replaced: int = 0
    calls: int = 0
    calls_answered: int = 0
    late_responses: int = 0
    slow_readers: int = 0
    slow_senders: int = 0
    paused_clients: int = 0
    expired: int = 0
    renewed: int = 0
    renewals_refused: int = 0
    key_failures: int = 0
    ping_timeouts: int = 0
    claims: int = 0
    releases: int = 0
    registry_batches: int = 0
    reaped: int = 0
    orphaned_rows: int = 0
    heartbeat_failures: int = 0
    events_dropped: int = 0
    peer_calls: int = 0
    link_failures: int = 0
    relayed: int = 0
    relay_failures: int = 0
    rebalanced: int = 0
    dns_failures: int = 0
    #: name without ``wsgateway_`` -> (help, function that returns the current value)
    gauges: dict[str, tuple[str, Callable[[], float]]] = attrs.field(factory=dict)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text exposition format, version 0.0.4."""
        registry = CollectorRegistry()
        registry.register(_MetricsCollector(self))
        return generate_latest(registry)


class _MetricsCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("wsgateway_build", "Version of wsgateway and of what it runs on.", _BUILD_LABELS)
        for name, help_text in _PLAIN_COUNTERS.items():
            family = CounterMetricFamily(f"wsgateway_{name}", help_text)
            family.add_metric([], getattr(self._metrics, name))
            yield family
        for name, (label, help_text) in _LABELED_COUNTERS.items():
            family = CounterMetricFamily(f"wsgateway_{name}", help_text, labels=[label])
            for value, count in getattr(self._metrics, name).items():
                family.add_metric([value], count)
            yield family
        for name, (help_text, read) in self._metrics.gauges.items():
            gauge = GaugeMetricFamily(f"wsgateway_{name}", help_text)
            gauge.add_metric([], read())
            yield gauge
