"""The code blocks of the documentation run, and print the output that the pages show."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.pages import Session, blocks
from helpers.seaweed import BUCKET, Server
from helpers.tiny_models import model, prompt, save_llama

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A reader in an empty folder."""
    monkeypatch.chdir(tmp_path)
    reader = Session(tmp_path)
    yield reader
    reader.close()


def test_the_tutorial(session: Session) -> None:
    session.run(DOCS / "tutorial.md")


@pytest.mark.parametrize("name", ["howto/install.md", "performance.md"])
def test_commands_that_exist(session: Session, name: str) -> None:
    session.run(DOCS / name)


def test_checkpoints(session: Session) -> None:
    session.run(DOCS / "howto/checkpoints.md")


def test_more_than_memory(session: Session) -> None:
    session.run(DOCS / "howto/larger-than-memory.md")


def test_continuing_a_prefix(session: Session) -> None:
    session.run(DOCS / "howto/continue-a-prefix.md")


def test_measuring_a_library(session: Session) -> None:
    pytest.importorskip("opentelemetry.sdk")
    session.run(DOCS / "howto/library-metrics.md")


def test_a_server(session: Session) -> None:
    session.run(DOCS / "howto/server.md")


@pytest.mark.torch
@pytest.mark.long
def test_serving_chats(session: Session) -> None:
    save_llama(session.folder / "model")
    session.environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "examples")}
    session.run(DOCS / "howto/chat-server.md")


def test_sharing_through_s3(session: Session, s3: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Server(tmp_path_factory.mktemp("s3-of-its-own")) as server:  # the page shows all caches that there are
        session.environment |= s3.environment() | server.environment()
        session.run(DOCS / "howto/share-s3.md")


@pytest.mark.torch
@pytest.mark.long
def test_saving_a_prompt(session: Session) -> None:
    save_llama(session.folder / "model")
    session.environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    session.run(DOCS / "howto/save-a-prompt.md")


def test_the_python_of_readme(session: Session, s3: Server) -> None:
    net = model("llama")
    KvmmapCache.create("chat.kvm", net, capacity=100).close()
    session.names |= {"model": net, "input_ids": prompt(20)}
    for block in blocks(ROOT / "README.md"):
        if block.kind == "python":
            text = block.text.replace("s3://bucket/", f"s3://{BUCKET}/of-readme/")
            assert session.python(dataclasses.replace(block, text=text)) == ""
    with session.names["library"] as library:  # closing it ends its thread
        library.push()  # what the thread has not shared yet
    assert list(s3.store("of-readme/prompts").list())
    with kvmmap.open("chat.kvm") as cache:
        assert cache.seq_len == 20 + 50 - 1


def test_every_how_to_page_is_run() -> None:
    here = Path(__file__).read_text()
    for page in (DOCS / "howto").glob("*.md"):
        assert f"howto/{page.name}" in here
