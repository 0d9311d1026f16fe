"""The figures of the documentation: collected from benchmarks, and drawn into charts and tables.

    python docs/tools/figures.py collect bench-out "on an idle machine"
    python docs/tools/figures.py draw
    python docs/tools/figures.py check

`collect` puts what `make bench` has written into docs/figures/measured.json, with the date, the machine and, in your
words, the conditions; topics that were not measured keep what they have. `draw` makes the charts in docs/figures/, and
fills the places in the pages that say `<!-- figures: NAME -->`. `check` tells what `draw` would change.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sizes
from charts import Group, Row, chart
from measured import FIGURES, Topics, bar, collect, load, table

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "fidelity.md")
PLACE = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def main() -> int:
    match sys.argv[1:]:
        case ["collect", folder, conditions]:
            collect(Path(folder), conditions)
        case ["draw"]:
            for path, text in rendered().items():
                path.write_text(text)
        case ["check"]:
            stale = [path for path, text in rendered().items() if not path.exists() or path.read_text() != text]
            for path in stale:
                print(f"{path.relative_to(ROOT)} is not what measured.json says: python docs/tools/figures.py draw")
            return 1 if stale else 0
        case _:
            print(__doc__)
            return 2
    return 0


def rendered() -> dict[Path, str]:
    """Return every file that is made of the figures, with its text."""
    topics = load()
    charts = {FIGURES / f"{name}.svg": make(topics) for name, make in CHARTS.items()}
    files = {path: drawn for path, drawn in charts.items() if drawn}
    for page in PAGES:

        def fill(match: re.Match[str]) -> str:
            _, how, topic = match[2].rpartition("how-")
            text = provenance(topics[topic]) if how else TABLES[match[2]](topics)
            return f"{match[1]}{text}\n{match[3]}"

        files[page] = PLACE.sub(fill, page.read_text())
    return files


def times(value: float) -> str:
    """A ratio, with as many digits as it deserves."""
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def with_target(label: str, found: dict[str, Any]) -> Row:
    """Make a chart's bar, with its target, from a bar of the benchmark."""
    measured, required = found["measured"], found["required"]
    return Row(label, measured, f"{times(measured)} of {required:g}x", True, required)


def heads(count: int) -> str:
    return f"{count} query head{'s' * (count > 1)} a KV head"


def attention(topics: Topics) -> str:
    """Attention beside torch's."""
    groups = []
    for count in (1, 4, 8):
        rows = table(topics["attention"], f"decode, {heads(count)}")
        target = 10.0 if count == 1 else 35.0 if count == 4 else None
        own = rows["attend"]["faster_than"]["torch f32"]
        asked = f" of {target:g}x" if target else ""
        found = [
            Row("kvmmap, int8, one thread", own, f"{times(own)}{asked}", True, target),
            Row("torch, f32, one thread", 1.0, "1x", False),
        ]
        if "torch bf16" in rows:
            half = rows["torch bf16"]["faster_than"]["torch f32"]
            found.append(Row("torch, bf16, one thread", half, times(half), False))
        groups.append(Group(heads(count), found))
    return chart("Decode attention: speed to torch's in f32", groups)


def limit(topics: Topics) -> str:
    """Attention beside reading the same bytes."""
    found = [
        with_target(heads(count), bar(topics["attention"], f", {heads(count)}: of the read limit"))
        for count in (1, 4, 8)
    ]
    rows = [
        Row(row.label, row.value, f"{row.value:.2f} of {row.target:g}", row.own, row.target)
        for row in found
        if row.target
    ]
    reading = Row("reading codes and scales, and no more", 1.0, "1", False)
    return chart("Decode attention: speed to reading the bytes", [Group("", [*rows, reading])])


def llama(topics: Topics) -> str:
    """Attention beside llama.cpp's; nothing where that was not measured."""
    if "llama_cpp" not in topics:
        return ""
    rows = [
        with_target(f"kvmmap, to llama.cpp with {kind}", bar(topics["llama_cpp"], "attention", f"({kind})"))
        for kind in ("f16", "q8_0")
    ]
    return chart("Attention of SmolLM2's 30 layers, 7,900 tokens", [Group("", rows)])


def storage(topics: Topics) -> str:
    """Appending and reading beside other files."""

    def group(heading: str, rows: dict[str, Any], base: str, labels: dict[str, str]) -> Group:
        found = []
        for name in (name for name in labels if name in rows):
            value = rows[name]["faster_than"][base]
            found.append(Row(labels[name], value, times(value), name.startswith("kvmmap")))
        return Group(heading, found)

    others = {"safetensors save_file f16": "safetensors, f16", "torch.save f16": "torch.save, f16"}
    loads = {
        "np.memmap f16, to float32": "np.memmap, f16",
        "safetensors load_file f16, to float32": "safetensors, f16",
        "torch.load f16, to float32": "torch.load, f16",
    }
    append = {"kvmmap": "kvmmap, int8", "np.memmap f16": "np.memmap, f16"} | others
    return chart(
        "Speed to memcpy of the same numbers",
        [
            group("Append a prompt of f32 to a fresh file", _append(topics, "f32"), "memcpy", append),
            group("Append a prompt of bf16", _append(topics, "bf16"), "memcpy", append),
            group(
                "Read a layer as f32",
                table(topics["read"], "read"),
                "memcpy f32",
                {"kvmmap to float32, 1 thread": "kvmmap, one thread"} | loads,
            ),
        ],
    )


def _append(topics: Topics, dtype: str) -> dict[str, Any]:
    return next(rows for title, rows in topics["append"]["speeds"].items() if f" of {dtype}," in title)


def streaming(topics: Topics) -> str:
    """Files that are on the disk alone."""
    rows = topics["streaming"]["speeds"][""]
    labels = {
        "pread": "pread, 1 MiB at a time",
        "dd": "dd, bs=1M",
        "attend": 'attend(resident="stream")',
        "keep": "attend, which keeps all",
    }
    found = []
    for name in (name for name in labels if name in rows):
        value = rows[name]["to_pread"]["median"]
        own = name in ("attend", "keep")
        more = f", +{rows[name]['memory_mb']:.0f} MB" if own else ""
        found.append(Row(labels[name], value, f"{times(value)}{more}", own, 0.8 if name == "attend" else None))
    return chart("A cold file: speed to pread, and memory", [Group("", found)])


def generation(topics: Topics) -> str:
    """A token with transformers."""
    beside = {
        "f32: kvmmap, to DynamicCache": "DynamicCache, f32",
        "bf16: kvmmap, to DynamicCache": "DynamicCache, bf16 model",
        "f32: kvmmap, to quanto int4": "QuantizedCache, quanto int4",
        "f32: kvmmap, to hqq int4": "QuantizedCache, HQQ int4",
        "f32: kvmmap, to hqq int8": "QuantizedCache, HQQ int8",
    }
    groups = []
    for length in (4000, 8000):
        whats = [each["what"] for each in topics["transformers"]["bars"]]
        found = {
            label: bar(topics["transformers"], f"at {length}, {what}")
            for what, label in beside.items()
            if any(f"at {length}, {what}" in each for each in whats)
        }
        if found:
            rows = [with_target(f"to {label}", each) for label, each in found.items()]
            groups.append(Group(f"{length:,} tokens of context", rows))
    return chart("A token of SmolLM2-135M: how many times as fast", groups)


def losses_by_size(topics: Topics) -> str:
    """What each codec and preset loses, by bits a number: a factor of ten is as long everywhere."""
    found = json.loads((FIGURES / "fidelity.json").read_text())["rows"]
    others = ("llama.cpp", "transformers")
    groups = []
    for heading, least, most in (("16 bits a number", 16, 17), ("8 bits", 8, 9), ("4 to 7 bits", 0, 8)):
        rows = [
            Row(row["recipe"], math.log10(row["kl"] / 1e-7), f"{row['kl']:.2g}", not row["recipe"].startswith(others))
            for row in found
            if least <= row["bits"] < most
        ]
        groups.append(Group(heading, rows))
    return chart("KL divergence from f32, nats, logarithmic", groups)


CHARTS: dict[str, Callable[[Topics], str]] = {
    "attention": attention,
    "limit": limit,
    "llama": llama,
    "storage": storage,
    "streaming": streaming,
    "generation": generation,
    "fidelity": losses_by_size,
}


def provenance(topic: dict[str, Any]) -> str:
    """How the figures of a topic were taken."""
    machine = topic["machine"]
    return (
        f"*`{topic['command']}`, {topic['date']}, {machine['processor']}, {machine['processors']} processors, "
        f"{machine['kernel']} kernel; {topic['conditions']}.*"
    )


def bars(topics: Topics) -> str:
    """All targets, met or missed."""
    lines = ["| | beside | target | measured | |", "|---|---|---:|---:|---|"]
    for name, topic in topics.items():
        for found in topic["bars"]:
            sign, unit = (">=", "x") if found["unit"] == "x" else ("<=", found["unit"].removesuffix(" at most"))
            verdict = "met" if found["met"] else "**not met**"
            possible = f" of {found['ceiling']:.2f} possible" if found.get("ceiling") else ""
            lines.append(
                f"| {name}: {found['what']} | {found.get('beside', '')} | {sign} {found['required']:g} {unit} | "
                f"{found['measured']:.2f} {unit}{possible} | {verdict} |"
            )
    met = sum(found["met"] for topic in topics.values() for found in topic["bars"])
    return f"{met} of {len(lines) - 2} targets are met.\n\n" + "\n".join(lines)


def beside_llama(topics: Topics) -> str:
    """The chart, if there is one, and a table of all that was measured beside."""
    if not llama(topics):
        return "Not measured since the last change."
    topic = topics["llama_cpp"]
    lines = ["| kvmmap | to llama.cpp's | f16 | q8_0 |", "|---|---|---:|---:|"]
    for start, name, how, what, beside in BESIDE_LLAMA:
        ratios = table(topic, start)[name]["faster_than"]
        found = " | ".join(times(ratios[f"llama.cpp {kind}{how}"]) for kind in ("f16", "q8_0"))
        lines.append(f"| {what} | {beside} | {found} |")
    picture = "![Attention beside llama.cpp](figures/llama.svg)"
    return "\n\n".join([picture, "\n".join(lines), provenance(topic)])


BESIDE_LLAMA = (
    ("attention of a token, 2 threads", "kvmmap", "", "attention of a token, two threads", "the same"),
    ("attention of a token, 1 thread", "kvmmap", "", "attention of a token, one thread", "the same"),
    ("saving", "kvmmap, copy to a file", ", synced", "copy all of it to a new file", "save, synced"),
    ("saving", "kvmmap, append a token and flush", ", synced", "append a token and flush", "save, synced"),
    ("reopening 7,900 tokens, in the page", "kvmmap, open", "", "open, file in the page cache", "load"),
    (
        "reopening 7,900 tokens, in the page",
        "kvmmap, open and attend in all layers",
        "",
        "open it and attend in all layers",
        "load",
    ),
    ("reopening 7,900 tokens, on the disk", "kvmmap, open", "", "open, file on the disk alone", "load"),
    (
        "reopening 7,900 tokens, on the disk",
        "kvmmap, open and attend in all layers",
        "",
        "open it and attend in all layers",
        "load",
    ),
)
"""Table and row of the benchmark, how the name of what is beside ends there; what the page calls both."""


def losses(topics: Topics) -> str:
    """What codecs cost in perplexity."""
    lines = ["| keys and values as | perplexity, to f32's |", "|---|---|"]
    for name, text in topics["transformers"]["notes"].items():
        if name.startswith("perplexity, ") and not name.endswith(" f32"):
            lines.append(f"| {name.removeprefix('perplexity, ')} | {', '.join(changes(text))} |")
    return "\n".join(lines)


def changes(text: str) -> Iterator[str]:
    """What a note of the benchmark says of each text: its name, and the change in percent."""
    for name, change in re.findall(r"(\w+) [\d.]+ \(([^)]+)\)", text):
        yield f"{name} {change}"


def readme(topics: Topics) -> str:
    """The few figures that matter most."""
    decode = [table(topics["attention"], f"decode, {heads(count)}")["attend"] for count in (1, 4, 8)]
    torch = ", ".join(times(row["faster_than"]["torch f32"]) for row in decode)

    cold = topics["streaming"]["speeds"][""]["attend"]["to_pread"]["median"]

    def ratio(topic: str, *words: str) -> str:
        return times(bar(topics[topic], *words)["measured"])

    rows = [
        ("attention of a query over 32k tokens; 1, 4, 8 query heads a KV head", "torch, f32", torch),
        ("first token of a saved prompt of 4,000 tokens", "prefilling it", ratio("transformers", "first token")),
        (
            "a token at 8,000 tokens with transformers, f32",
            "`DynamicCache`",
            ratio("transformers", "at 8000, f32: kvmmap, to DynamicCache"),
        ),
        ("append a prompt of f32 to a fresh file", "`np.memmap`, f16", ratio("append", "append f32", "np.memmap")),
        ("read a layer back as f32", "memcpy", ratio("read", "memcpy")),
        ("go through a cold file with attention", "`pread`", times(cold)),
    ]
    return "\n".join(["| | beside | as fast |", "|---|---|---:|", *(f"| {' | '.join(row)} |" for row in rows)])


def fidelity(topics: Topics) -> str:
    """What each codec and preset loses, beside other programs' recipes."""
    lines = ["| keys and values as | bits | KL | worst text | 99th percentile | same best token | perplexity | texts |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in json.loads((FIGURES / "fidelity.json").read_text())["rows"]:
        cells = [f"{row['bits']:.2f}", *(f"{row[key]:.2g}" for key in ("kl", "worst", "kl_p99"))]
        cells += [f"{row['top1']:.1%}", f"{row['perplexity']:+.2%}", str(row["texts"])]
        lines.append(f"| {row['recipe']} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Topics], str]] = {
    "bars": bars,
    "losses": losses,
    "llama": beside_llama,
    "readme": readme,
    "fidelity": fidelity,
    "sizes": lambda topics: sizes.table(),
}


if __name__ == "__main__":
    sys.exit(main())
