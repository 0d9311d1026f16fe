"""kvmmap's main use, on a real model and real text, in two processes: prefill and save; reopen and continue.

    python demo/demo.py [TEXT...]

TEXT is `manual`, `source` (both by default), or the path of a text of some 3,000 tokens and more. Files go to
demo-out/.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from rich.console import Console
from tables import show
from texts import TEXTS

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "demo-out"


def main() -> int:
    names = sys.argv[1:] or list(TEXTS)
    console = Console(width=None if sys.stdout.isatty() else 100)
    OUT.mkdir(exist_ok=True)
    console.print("[bold]1.[/] a process loads SmolLM2-135M, prefills, and saves the KV cache (about a minute) ...")
    run("save.py", names)
    console.print("[bold]2.[/] a new process loads the model, opens the file, and continues (about a minute) ...")
    run("resume.py", names)
    for name in names:
        saved, resumed = (read(f"{Path(name).stem}-{step}.json") for step in ("saved", "resumed"))
        show(console, saved, resumed)
    path = Path(os.path.relpath(OUT / f"{Path(names[0]).stem}.kvm"))
    console.print(f"[bold]3.[/] kvmmap inspect {path}")
    return inspect(path)


def run(script: str, names: list[str]) -> None:
    """Run one of the demo's two processes."""
    subprocess.run([sys.executable, HERE / script, OUT, *names], check=True, env=os.environ | {"TQDM_DISABLE": "1"})


def read(name: str) -> dict[str, object]:
    facts: dict[str, object] = json.loads((OUT / name).read_text())
    return facts


def inspect(path: Path) -> int:
    """Run the installed command."""
    command = shutil.which("kvmmap", path=sysconfig.get_path("scripts"))
    if command is None:
        print("the kvmmap command is not installed beside this Python: pip install .", file=sys.stderr)
        return 1
    return subprocess.run([command, "inspect", path], check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        # One that failed has said why. One that was ended from outside, as by a lack of memory, could not.
        if error.returncode < 0:
            print(f"{Path(error.cmd[1]).name} was ended by signal {-error.returncode}", file=sys.stderr)
        sys.exit(1)
