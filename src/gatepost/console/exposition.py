"""The workers' counts as Prometheus text.

Promise: exactly the families declared in ``telemetry``, each with help and type; a worker's restart lowers no counter.
Sources: Prometheus text exposition format 0.0.4, as prometheus_client writes it.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from gatepost.telemetry.metrics import CATALOGUE, SECONDS_BUCKETS, Family, Kind, Metrics

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_BOUNDS = (*(f"{bound:g}" for bound in SECONDS_BUCKETS), "+Inf")


class _Collector(Collector):
    def __init__(self, metrics: Metrics, version: str) -> None:
        self._metrics = metrics
        self._version = version

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("gatepost_info", "1, with the version of this gate.", labels=["version"])
        info.add_metric([self._version], 1)
        yield info
        for family in CATALOGUE:
            yield self._family(family)

    def _family(self, family: Family) -> Metric:
        samples = self._metrics.read(family)
        if family.kind is Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
            for sample in samples:
                buckets = [(bound, float(count)) for bound, count in zip(_BOUNDS, sample.buckets, strict=True)]
                histogram.add_metric(sample.labels, buckets, sample.value)
            return histogram
        metric: CounterMetricFamily | GaugeMetricFamily
        if family.kind is Kind.COUNTER:
            metric = CounterMetricFamily(family.name, family.help, labels=family.labels)
        else:
            metric = GaugeMetricFamily(family.name, family.help, labels=family.labels)
        for sample in samples:
            metric.add_metric(sample.labels, sample.value)
        return metric


def exposition(metrics: Metrics, version: str) -> bytes:
    """All metrics, as they are this moment."""
    registry = CollectorRegistry()
    registry.register(_Collector(metrics, version))
    return generate_latest(registry)
