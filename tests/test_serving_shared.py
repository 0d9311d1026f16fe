"""The chat server of the examples over a library that is shared through an object store, and what it reports."""

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


def compute_elsewhere(folder: Path, library: Path, remote: str, options: dict[str, Any]) -> None:
    """Have another machine compute the prompt, and store it in the bucket."""
    import transformers as tf

    from kvmmap.integrations.transformers import open_session

    net = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    net.set_attn_implementation("kvmmap")
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    with kvmmap.Library(library, remote=remote, storage_options=options, write_through=False) as opened:
        with open_session(opened, net, ids) as cache:
            net.generate(ids, **cache.argument, max_new_tokens=1, do_sample=False)
        assert opened.push() == 1


def test_a_server_that_shares_a_library_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk.metrics")
    for name in ("model", "store", "measured", "site"):
        (tmp_path / name).mkdir()
    save_llama(tmp_path / "model")
    (tmp_path / "site" / "sitecustomize.py").write_text(PROVIDER)
    remote = f"s3://{seaweed.BUCKET}/chats"
    with seaweed.Server(tmp_path / "store") as store:
        compute_elsewhere(tmp_path / "model", tmp_path / "one", remote, store.options())
        environment = store.environment() | {"AWS_ALLOW_HTTP": "true", "MEASURED": str(tmp_path / "measured")}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
        options = ("--model", tmp_path / "model", "--name", "tiny", "--workers", 1, "--remote", remote, "--telemetry")
        server = ChatServer(tmp_path / "two", tmp_path / "log", *options, environment=environment)
        try:
            assert ask(server, "Hello") == 0  # the log is followed from the first session on
            wait_for(lambda: remote_segments(tmp_path / "two"))
            assert ask(server, PROMPT) > len(PROMPT)
            wait_for(lambda: measured(tmp_path / "measured", "sessions") == 2)
            for name, least in (("hits", 1), ("segments_fetched", 1), ("tokens_reused", len(PROMPT)), ("size", 1)):
                assert measured(tmp_path / "measured", name) >= least
            wait_for(lambda: remote_segments(tmp_path / "two") >= 2)  # what was computed here is pushed
            store.kill()
            assert ask(server, PROMPT) > len(PROMPT)  # without the store
            assert ask(server, "Something else " * 20) < 20
        finally:
            server.kill()
