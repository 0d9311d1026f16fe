"""What a library counts, and how OpenTelemetry sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.library_support import prompt, say, text

import kvmmap
from kvmmap.library.metrics import COUNTED
from kvmmap.library.telemetry import COUNTERS


def test_what_is_counted(tmp_path: Path) -> None:
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, text(300, 0))
        say(library, prompt(text(300, 0), text(40, 1)))
        say(library, text(100, 2))
        found = library.metrics()
        assert (found["sessions"], found["hits"]) == (3, 1)
        assert (found["tokens_reused"], found["tokens_computed"]) == (300, 440)
        assert found["seconds_saved"] > 0
        assert found["segments_added"] == 2
        library.evict(1)
        assert library.metrics()["evictions"] == library.stats().evictions == 2
        stats = library.stats()
        assert stats.hit_rate == 300 / 740
        assert stats.seconds_saved == pytest.approx(found["seconds_saved"])
    assert set(COUNTERS) == set(COUNTED)


def test_instruments(tmp_path: Path) -> None:
    metrics = pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = metrics.MeterProvider([reader])
    with kvmmap.Library(tmp_path / "library") as library:
        library.instrument(provider)
        say(library, text(300, 0))
        say(library, prompt(text(300, 0), [1]))
        (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
        found = {metric.name: metric.data.data_points[0].value for metric in scope.metrics}
        assert {name.removeprefix("kvmmap.library.") for name in found} == {*COUNTED, "size", "segments"}
        assert found["kvmmap.library.tokens_reused"] == 300
        assert found["kvmmap.library.segments"] == 1
        assert found["kvmmap.library.size"] == library.stats().bytes
    assert reader.get_metrics_data() is not None
    provider.shutdown()


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    with kvmmap.Library(tmp_path / "library") as library, pytest.raises(kvmmap.MissingLibraryError, match="metrics"):
        library.instrument()
