"""The files of a checkpoint's weights: which they are, and whose keys and values they give."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..formats.portable import MemberFacts
from ..formats.safetensors_file import ROW_DTYPES, open_tensors
from ..geometry import LayerGeometry

WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
"""Files of weights; those of the first kind that a checkpoint has count."""

VOLATILE = frozenset({"_name_or_path", "transformers_version", "_model_name_or_path", "architectures"})
"""Keys of a config that change nothing in what is computed."""


def weight_files(model: str, revision: str | None) -> tuple[Path, ...]:
    """Return the files of a model's weights, in order; none if they are not on this machine."""
    if os.path.isfile(model):
        return (Path(model),)
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except Exception:  # many kinds, none of which is ours to judge: the caller says what to do
            return ()
    for pattern in WEIGHTS:
        if found := sorted(folder.glob(pattern)):
            return tuple(found)
    return ()


def files_digest(files: Sequence[Path]) -> str:
    """Return a digest of everything in files, XXH3 with 128 bits. Once for each version of a file in a process."""
    digest = xxhash.xxh3_128()
    for path in files:
        found = path.stat()
        digest.update(_file_digest(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)))
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _file_digest(path: Path, _version: tuple[int, ...]) -> bytes:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(8 << 20):
            digest.update(data)
    return digest.digest()


def portable_id_of(layers: Sequence[LayerGeometry], theta: float | None, files: Sequence[Path]) -> str | None:
    """Return the identity of the model across programs; None where its norms can't be read or RoPE has no theta."""
    if theta is None or not files or files[0].suffix != ".safetensors":
        return None
    norms: dict[int, NDArray[np.float32]] = {}
    for path in files:
        with open_tensors(str(path)) as file:
            for name in file.names():
                head, _, rest = name.partition("layers.")
                number, _, what = rest.partition(".")
                if head in ("", "model.", "model.language_model.") and what == "input_layernorm.weight":
                    file.check_dtype(name, ROW_DTYPES)
                    norms[int(number)] = file.read(name).astype(np.float32)
    if sorted(norms) != list(range(len(layers))):
        return None
    return MemberFacts(
        layers=tuple(layers), rope_theta=float(theta), norms=tuple(norms[number] for number in range(len(layers)))
    ).portable_id()
