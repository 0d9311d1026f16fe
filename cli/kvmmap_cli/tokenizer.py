"""Token ids as text, by a tokenizer that the user names. Without one, ids stay numbers.

`tokenizers` (kvmmap[tokens]) reads a tokenizer.json, or a folder that has one; `transformers`, if it is there, all else
that it can load: a model's name in its local cache, or a GGUF file.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import click

Decode = Callable[[Sequence[int]], str]


def load(name: str) -> Decode:
    """Return the function that decodes ids.

    Raises:
        click.UsageError: there is no such tokenizer, or nothing installed that reads it.
    """
    file = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    if file.endswith(".json") and os.path.isfile(file):
        return _from_json(file)
    return _from_transformers(name)


def _from_json(file: str) -> Decode:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise click.UsageError("reading a tokenizer needs its package: pip install 'kvmmap[tokens]'") from None
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as error:  # whatever a file that is no tokenizer makes of it; the package has no error of its own
        raise click.UsageError(f"{file}: not a tokenizer ({error})") from None
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _from_transformers(name: str) -> Decode:
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise click.UsageError(
            f"{name}: no tokenizer.json there; a model's name or a GGUF file needs transformers: "
            "pip install 'kvmmap[transformers]'"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, file = os.path.split(name)
    where: dict[str, Any] = {"local_files_only": True}
    if name.endswith(".gguf"):
        name, where["gguf_file"] = folder or ".", file
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except Exception as error:  # OSError, ValueError, KeyError, and what the libraries below it raise
        reason = str(error).strip().partition("\n")[0]
        raise click.UsageError(f"{name}: no tokenizer could be loaded ({reason})") from None
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def text_of(ids: Sequence[int], decode: Decode) -> str:
    """Return the text of ids; [?] stands for positions whose id was not recorded."""
    parts = []
    for recorded, run in itertools.groupby(ids, lambda token: token >= 0):
        numbers = list(run)
        parts.append(decode(numbers) if recorded else "[?]" * len(numbers))
    return "".join(parts)
