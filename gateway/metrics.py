"""What a node counts, and how Prometheus reads it.

The parts add to plain integers: a scrape is rare, a call is not. Gauges are read at the scrape, from the callables
that node.py gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import attrs
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: name of a Counter attribute -> (label, help)
_LABELLED_COUNTERS = {
    "refused": ("reason", "Opening handshakes that were refused."),
    "token_refusals": ("reason", "Tokens and certificates of clients that were not accepted."),
    "closed": ("code", "Connections of clients that ended, by the close code that was sent or received."),
    "calls_failed": ("code", "Calls that ended with an error of the gateway, by its code."),
    "bad_messages": ("source", "Messages that were no JSON-RPC 2.0."),
    "notifications": ("direction", "Notifications, to clients and from them."),
    "upstream_calls": ("outcome", "Calls from clients."),
    "api_requests": ("status", "HTTP requests to the backend endpoint."),
    "registry_errors": ("operation", "Statements that the registry did not carry out."),
    "accept_errors": (
        "reason",
        "Times that no connection was accepted for want of a file: the errno, or that the last are not for clients.",
    ),
    "tls_failures": ("reason", "TLS handshakes that failed, and connections ended for too many records of TLS."),
    "autoscaling_failures": ("request", "Requests to AWS, or to the instance's metadata service, that failed."),
}

#: name of an integer attribute -> help
_PLAIN_COUNTERS = {
    "opened": "Connections of clients that were opened.",
    "woken": "Parked connections that were woken.",
    "replaced": "Connections that a newer one of the same client replaced.",
    "calls": "Calls to clients that were taken on.",
    "calls_answered": "Calls to clients that were answered by them.",
    "late_responses": "Responses to a call that is unknown or was over.",
    "slow_readers": "Connections closed because they did not read what was sent.",
    "slow_senders": "Clients and backends closed because too many messages were not whole; theirs were the idlest.",
    "paused_clients": "Times that a client's reading was paused because it sent too much.",
    "expired": "Connections of clients closed because the token they came by had expired.",
    "renewed": "Tokens that connected clients sent in place of those they came by, and that were accepted.",
    "renewals_refused": "Such tokens that were not accepted.",
    "key_failures": "Times that the keys of who issues tokens could not be fetched.",
    "ping_timeouts": "Clients dropped because they stayed silent after a ping.",
    "claims": "Claims that the registry took.",
    "releases": "Releases that the registry took.",
    "registry_batches": "Batches of claims and releases.",
    "reaped": "Rows of dead nodes that were removed.",
    "heartbeat_failures": "Heartbeats that could not be written.",
    "events_dropped": "Events for a backend that did not read them.",
    "peer_calls": "Calls to clients that were asked of the nodes that hold them.",
    "link_failures": "Links to other nodes that could not be opened, or broke.",
    "relayed": "Clients that were connected to another node through this one.",
    "relay_failures": "Clients that another node could not be asked to take through this one, or did not answer.",
    "rebalanced": "Clients that were told to move to a node with fewer.",
    "dns_failures": "Times that a record of this node or of one that is gone could not be seen to.",
}


@attrs.define
class Metrics:
    """The counters of one node. ``metrics.refused["token"] += 1``, ``metrics.calls += 1``."""

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
    heartbeat_failures: int = 0
    events_dropped: int = 0
    peer_calls: int = 0
    link_failures: int = 0
    relayed: int = 0
    relay_failures: int = 0
    rebalanced: int = 0
    dns_failures: int = 0
    #: name (without the prefix) -> (help, callable that gives the value now)
    gauges: dict[str, tuple[str, Callable[[], float]]] = attrs.field(factory=dict)

    def text(self) -> bytes:
        """The Prometheus text exposition format, version 0.0.4."""
        registry = CollectorRegistry()
        registry.register(_MetricsCollector(self))
        return generate_latest(registry)


class _MetricsCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for name, help_text in _PLAIN_COUNTERS.items():
            family = CounterMetricFamily(f"wsgateway_{name}", help_text)
            family.add_metric([], getattr(self._metrics, name))
            yield family
        for name, (label, help_text) in _LABELLED_COUNTERS.items():
            family = CounterMetricFamily(f"wsgateway_{name}", help_text, labels=[label])
            for value, count in getattr(self._metrics, name).items():
                family.add_metric([value], count)
            yield family
        for name, (help_text, read) in self._metrics.gauges.items():
            gauge = GaugeMetricFamily(f"wsgateway_{name}", help_text)
            gauge.add_metric([], read())
            yield gauge
