"""A library's counters as OpenTelemetry instruments, read when a reader collects. Needs `kvmmap[metrics]`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..storage.libraries import need

COUNTERS = {
    "sessions": ("{session}", "Sessions opened"),
    "hits": ("{session}", "Sessions that reused at least one position"),
    "tokens_reused": ("{token}", "Positions of prompts that were not computed"),
    "tokens_computed": ("{token}", "Positions of prompts that were computed"),
    "seconds_saved": ("s", "Computation that the reused positions would have taken, as measured"),
    "segments_added": ("{segment}", "Segments added"),
    "bytes_added": ("By", "Their bytes on the disk"),
    "evictions": ("{segment}", "Segments removed for room, or because their time was over"),
    "bytes_evicted": ("By", "Their bytes on the disk"),
    "segments_fetched": ("{segment}", "Segments fetched from the object store"),
    "bytes_fetched": ("By", "Bytes fetched from the object store"),
    "fetch_failures": ("{fetch}", "Fetches that failed, after which the prompt was computed"),
}
"""Unit and description of each counter, by the name that `Library.metrics` has for it."""

GAUGES = {
    "size": ("By", "Bytes of all segments on the disk"),
    "segments": ("{segment}", "Segments in the library"),
}


def instrument(
    metrics: Callable[[], Mapping[str, float]],
    sizes: Callable[[], Mapping[str, float]],
    attributes: Mapping[str, str],
    provider: Any,
) -> None:
    """Register the instruments.

    Args:
        metrics: returns sums by the names of `COUNTERS`.
        sizes: returns numbers by the names of `GAUGES`.
        attributes: of every measurement.
        provider: a `MeterProvider`; the global one if None.

    Raises:
        MissingLibraryError: OpenTelemetry is not installed.
    """
    api = need("opentelemetry.metrics", "metrics")
    meter = (api.get_meter_provider() if provider is None else provider).get_meter("kvmmap.library")

    def reader(read: Callable[[], Mapping[str, float]], name: str) -> Callable[[Any], Iterable[Any]]:
        return lambda options: [api.Observation(read()[name], dict(attributes))]

    for name, (unit, about) in COUNTERS.items():
        meter.create_observable_counter(f"kvmmap.library.{name}", [reader(metrics, name)], unit, about)
    for name, (unit, about) in GAUGES.items():
        meter.create_observable_gauge(f"kvmmap.library.{name}", [reader(sizes, name)], unit, about)
