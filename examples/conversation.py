"""Continue a conversation that is stored in a file: only new tokens are computed.

python examples/conversation.py "What is a B-tree?"
python examples/conversation.py "And who came up with it?"
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from models import load

from kvmmap.integrations.transformers import KvmmapCache, reuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("message")
    parser.add_argument("--file", type=Path, default=Path("conversation.kvm"), help="where the conversation is kept")
    parser.add_argument("--model", help="a folder or a hub id; SmolLM2-135M by default")
    parser.add_argument("--tokens", type=int, default=80, help="tokens to answer with, at most")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)

    if arguments.file.exists():
        cache = KvmmapCache.open(arguments.file, model, mode="a")
    else:
        cache = KvmmapCache.create(arguments.file, model)
    with cache:
        answer(cache, model, tokenizer, arguments.message, arguments.tokens)


def answer(cache: KvmmapCache, model: Any, tokenizer: Any, message: str, tokens: int) -> None:
    """Generate an answer, and store message and answer in the cache."""
    messages = [*cache.metadata.get("messages", []), {"role": "user", "content": message}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]

    start = time.perf_counter()
    reused = reuse(cache, ids)
    output = model.generate(**inputs, **cache.argument, max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - start

    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    cache.metadata = {"messages": [*messages, {"role": "assistant", "content": text}]}
    print(text)
    print(
        f"[{reused} of {ids.shape[1]} tokens were there, {output.shape[1] - ids.shape[1]} generated, {seconds:.2f} s]"
    )


if __name__ == "__main__":
    main()
