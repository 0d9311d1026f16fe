"""kvmmap[plot]: a picture of a cache."""

from pathlib import Path

import base

base.make_and_reopen()
base.run("inspect", "a.kvm", "--plot", "a.png")
assert Path("a.png").read_bytes().startswith(b"\x89PNG")
