"""Ask a document many questions, in several processes at once, over one saved prompt.

The document is prefilled once. Each process then opens the same file to read it, shares its pages with the others, and
keeps what it adds itself; with --save, in a new cache, which can be continued.

    python examples/document.py FILE "What is it about?" "Who wrote it?"
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any

from models import load

from kvmmap.integrations.transformers import KvmmapCache, reuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", help="a folder or a hub id; SmolLM2-135M by default")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to answer with, at most")
    parser.add_argument("--processes", type=int, default=2, help="how many answer at once")
    parser.add_argument("--save", action="store_true", help="keep each question's continuation as DOCUMENT.N.kvm")
    arguments = parser.parse_args()

    saved = arguments.document.with_suffix(".kvm")
    if not saved.exists():
        prefill(arguments.document, saved, arguments.model)
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    with context.Pool(arguments.processes, prepare, (arguments, saved)) as pool:
        for question, answer in zip(arguments.questions, pool.imap(ask, enumerate(arguments.questions)), strict=True):
            print(f"{question}\n  {answer}")


def prompt(document: Path, question: str) -> str:
    return f"{document.read_text()}\n\nQuestion: {question}\nAnswer:"


def prefill(document: Path, saved: Path, name: str | None) -> None:
    """Compute keys and values of the document's tokens, once."""
    model, tokenizer = load(name)
    inputs = tokenizer(prompt(document, ""), return_tensors="pt")
    start = time.perf_counter()
    with KvmmapCache.create(saved, model) as cache:
        model.generate(**inputs, **cache.argument, max_new_tokens=1, do_sample=False)
        print(f"[{cache.seq_len} tokens prefilled in {time.perf_counter() - start:.2f} s, and saved as {saved}]")


state: tuple[argparse.Namespace, Path, Any, Any]


def prepare(arguments: argparse.Namespace, saved: Path) -> None:
    """Load the model, once in each process."""
    global state
    state = arguments, saved, *load(arguments.model)


def ask(numbered: tuple[int, str]) -> str:
    """Answer one question."""
    arguments, saved, model, tokenizer = state
    number, question = numbered
    inputs = tokenizer(prompt(arguments.document, question), return_tensors="pt")
    ids = inputs["input_ids"]
    start = time.perf_counter()
    with KvmmapCache.open(saved, model) as cache:  # reads; any number of processes may
        reused = reuse(cache, ids)
        output = model.generate(**inputs, **cache.argument, max_new_tokens=arguments.tokens, do_sample=False)
        if arguments.save:
            cache.save(saved.with_suffix(f".{number}.kvm"))
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return f"{text}\n  [{reused} of {ids.shape[1]} tokens were there, {time.perf_counter() - start:.2f} s]"


if __name__ == "__main__":
    main()
