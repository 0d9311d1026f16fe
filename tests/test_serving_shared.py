"""The chat server of the examples on two machines that share an object store, and what it reports to OpenTelemetry."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import seaweed
from helpers.serving import ChatServer, wait_for
from helpers.tiny_models import save_llama

import kvmmap

pytestmark = [
    pytest.mark.torch,
    pytest.mark.s3,
    pytest.mark.long,
    pytest.mark.skipif(seaweed.find_program() is None, reason="needs an S3 server"),
]

PROMPT = "What is a key, and what is a value? " * 20

PROVIDER = '''
import json, os
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader


class Lines(MetricExporter):
    """Writes what is measured to a file of this process."""

    def export(self, data, timeout_millis=10_000, **more):
        found = {
            metric.name: metric.data.data_points[0].value
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.data.data_points
        }
        path = os.path.join(os.environ["MEASURED"], str(os.getpid()))
        with open(path + ".new", "w") as file:
            json.dump(found, file)
        os.replace(path + ".new", path)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=10_000):
        return True

    def shutdown(self, timeout_millis=30_000, **more):
        pass


metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(Lines(), export_interval_millis=100)]))
'''
"""Sets a global meter provider in every process that is started, as `opentelemetry-instrument` does."""


def ask(server: ChatServer, text: str) -> int:
    """Have one turn; return the tokens of the prompt that were not computed."""
    with server.client() as client:
        messages: list[Any] = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def remote_segments(library: Path) -> int:
    """Return how many segments of the object store a library's index has."""
    with kvmmap.Library(library, write_through=False, follow_every=None) as opened:
        return opened._index.remote_count()


def measured(folder: Path, name: str) -> int:
    """Return a counter's sum over all processes."""
    found = [json.loads(path.read_text()) for path in folder.iterdir() if not path.suffix]
    return sum(each.get(f"kvmmap.library.{name}", 0) for each in found)


def test_two_machines_and_what_they_report(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk.metrics")
    for name in ("model", "store", "measured", "site"):
        (tmp_path / name).mkdir()
    save_llama(tmp_path / "model")
    (tmp_path / "site" / "sitecustomize.py").write_text(PROVIDER)
    with seaweed.Server(tmp_path / "store") as store:
        environment = store.environment() | {"AWS_ALLOW_HTTP": "true", "MEASURED": str(tmp_path / "measured")}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
        options = ("--model", tmp_path / "model", "--name", "tiny", "--workers", 1)
        options += ("--remote", f"s3://{seaweed.BUCKET}/chats", "--telemetry")
        one = ChatServer(tmp_path / "one", tmp_path / "log 1", *options, environment=environment)
        try:
            assert ask(one, PROMPT) == 0
            assert ask(one, PROMPT) > len(PROMPT)
            wait_for(lambda: remote_segments(tmp_path / "one"))
            wait_for(lambda: measured(tmp_path / "measured", "tokens_reused") > len(PROMPT))
            assert measured(tmp_path / "measured", "sessions") == 2
            assert measured(tmp_path / "measured", "hits") == 1
            assert measured(tmp_path / "measured", "size") > 0
        finally:
            one.kill()
        two = ChatServer(tmp_path / "two", tmp_path / "log 2", *options, environment=environment)
        try:
            ask(two, "Hello")  # the log is followed from the first session on
            wait_for(lambda: remote_segments(tmp_path / "two"))
            assert ask(two, PROMPT) > len(PROMPT)
            wait_for(lambda: measured(tmp_path / "measured", "segments_fetched"))
            store.kill()
            assert ask(two, PROMPT) > len(PROMPT)  # without the store
            assert ask(two, "Something else " * 20) < 20
        finally:
            two.kill()
