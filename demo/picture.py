"""Draw a command's output on a terminal as an SVG, for the picture in README.md.

    python demo/picture.py OUT.svg COMMAND...

The command runs on its own terminal, with colours, in the current folder.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 96
LINES = 60


def main() -> int:
    out, command = Path(sys.argv[1]), sys.argv[2:]
    code, drawn = on_terminal(command)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), (shlex.join(command), "bold")))
    console.print(Text.from_ansi(drawn.replace("\r\n", "\n")), soft_wrap=True)
    # An identifier of its own choice would change with every making; and a picture loads no fonts from elsewhere.
    svg = console.export_svg(title=" ".join(command[:2]), theme=MONOKAI, unique_id=out.stem)
    out.write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL))
    return code


def on_terminal(command: list[str]) -> tuple[int, str]:
    """Run a command with a terminal for its output; return exit code and what it drew."""
    pid, fd = pty.fork()
    if pid == 0:
        sizes = {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
        path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
        os.execvpe(command[0], command, os.environ | sizes | path)
    drawn = b""
    try:
        while data := os.read(fd, 65536):
            drawn += data
    except OSError:  # Linux's way to say that the other end is gone
        pass
    finally:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), drawn.decode()


if __name__ == "__main__":
    sys.exit(main())
