"""What the eviction policy of a library saves on traces of services, and what a bucket that machines share takes.

    python benchmarks/bench_library_policy.py [--requests 3000] [--json FILE]

Traces and the simulation are in `library_traces.py`; nothing is stored.
"""

from __future__ import annotations

from harness import Bar, Report, arguments
from library_traces import POSITION_BYTES, TRACES, rates

BUDGETS = (100_000, 300_000, 1_000_000)
"""Tokens."""

OF_CLAIRVOYANT = 0.9
"""Of the clairvoyant's rate on the chat trace, that the policy must reach."""


def main() -> None:
    parser = arguments("Benchmark the eviction policy of a library.", rounds=1)
    parser.add_argument("--requests", type=int, default=3000, help="of each trace")
    parser.add_argument("--seeds", type=int, default=2, help="traces of each kind")
    args = parser.parse_args()
    report = Report("library_policy")
    worst, chat = 1.0, 1.0
    for name, trace in TRACES.items():
        for seed in range(1, args.seeds + 1):
            requests = trace(seed, args.requests)
            for budget in BUDGETS:
                found = dict(rates(requests, budget))
                told = ", ".join(f"{policy} {share:.4f}" for policy, share in found.items())
                report.note(f"tokens reused, {name} {seed}, {budget:,} tokens", told)
                worst = min(worst, found["kvmmap"] / found["LRU"])
                if name == "chat":
                    chat = min(chat, found["kvmmap"] / found["clairvoyant"])
    costs(report, args.requests)
    report.bars.append(Bar("tokens reused, of the longest unused first, worst trace", 1.0, worst, "x"))
    report.bars.append(Bar("tokens reused on chats, of the clairvoyant's, worst", OF_CLAIRVOYANT, chat, "x"))
    report.finish(args.json)


def costs(report: Report, requests: int) -> None:
    """Note what a bucket shared by 1,000 machines takes, by the chat trace: one session a minute and machine."""
    trace = TRACES["chat"](3, requests)
    asked = sum(sum(size for _, size in request.chunks) for request in trace)
    new = sum(request.chunks[-1][1] + request.answer[1] for request in trace)
    per_session = new / len(trace) * POSITION_BYTES
    machines, sessions = 1000, 60 * 24
    puts = machines * sessions * 2  # a segment and its manifest
    lists = machines * 24 * 3600 / 5
    report.note(
        "a session of the chat trace", f"{asked / len(trace):,.0f} tokens, of which {new / len(trace):,.0f} new"
    )
    report.note(
        "1,000 machines, a session a minute each, in a day", f"{puts / 1e6:.1f} M puts, {lists / 1e6:.1f} M lists"
    )
    report.note("and what they store", f"{machines * sessions * per_session / 1e12:.1f} TB (SmolLM2-135M, int8)")
    fetched = machines * sessions * 0.02
    report.note(
        "and fetch, if 2 % of sessions change machines",
        f"{fetched * asked / len(trace) * POSITION_BYTES / 1e12:.2f} TB",
    )


if __name__ == "__main__":
    main()
