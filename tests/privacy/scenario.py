"""Everything that makes files, under a umask: `python scenario.py FOLDER UMASK`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from helpers.support import fill, make_file

import kvmmap


def main(folder: Path, umask: int) -> None:
    os.umask(umask)
    path = folder / "cache.kvm"
    make_file(path, 300).close()
    make_file(path, 300, overwrite=True).close()
    with kvmmap.open(path, "a") as cache:
        fill(cache, 310)
        cache.flush()
        cache.truncate(305)
    kvmmap.resize(path, 2000)
    kvmmap.compact(path)
    kvmmap.fork(path, folder / "fork.kvm", length=100).close()
    kvmmap.repair(path, folder / "repaired.kvm")
    kvmmap.copy(path, folder / "copy.kvm")
    kvmmap.copy(path, folder / "copy.zarr")
    with kvmmap.open(folder / "copy.zarr", "a") as cache:
        cache.truncate(20)
    kvmmap.fetch(folder / "copy.zarr", folder / "fetched.kvm").close()
    with kvmmap.create(folder / "new.zarr", num_layers=2, capacity=500, num_kv_heads=2, head_dim=8) as cache:
        fill(cache, 300)
    kvmmap.export_tensors(path, folder / "rows.safetensors")
    kvmmap.import_tensors(folder / "rows.safetensors", folder / "imported.kvm")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2], 8))
