"""Two tasks beside divergence: finding a pass key in a long text again, and agreeing with f32 when generating greedily.

Both are read with the right continuation fed in: a recipe whose most probable token is the right one at every position
generates exactly that continuation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from corpus import Text
from model import Model
from reading import Reader
from recipes import F32
from results import Store, key_of, tried
from torch.nn.functional import cross_entropy

PASSKEY_TOKENS = 7000
PASSKEY_TEXT = "licence"
PASSKEYS = {"early": (0.1, "71432"), "middle": (0.5, "58096"), "late": (0.8, "20917")}
"""How deep in the text a number is hidden, as a part of its length; and the number."""

GREEDY_PROMPT, GREEDY_TOKENS = 513, 256  # HQQ packs even numbers of positions, and the last one is read
GREEDY_TEXTS = ("manual", "python", "html", "licence", "german")


def passkey_task(store: Store, reader: Reader, model: Model, found: Sequence[Text], recipes: Sequence[str]) -> None:
    """Hide a number in a text of 7,000 tokens, at three depths, and ask for it at the end."""
    for text in found:
        if text.name != PASSKEY_TEXT:
            continue
        filler = model.encode(text.text)
        question = model.encode("\n\nWhat is the pass key? The pass key is")
        for name, (depth, number) in PASSKEYS.items():
            secret = model.encode(f"\n\nThe pass key is {number}. Remember it: {number}.\n\n")
            answer = model.encode(f" {number}")
            room = PASSKEY_TOKENS - len(secret) - len(question) - len(answer)
            at = int(min(room, len(filler)) * depth)
            ids, read = filler[:at] + secret + filler[at:room], question + answer[:-1]
            hidden = Text(name=f"{text.name}, {name}", kind=text.kind, text=text.text)
            keys = {recipe: key_of(recipe, ids + read, model.config) for recipe in (F32.name, *recipes)}
            missing = [one for one, key in keys.items() if not store.has("passkey", hidden.name, one, key)]
            if not missing:
                continue
            prompt, expected = reader.prompt(ids), torch.tensor(answer)
            for recipe in missing:
                whole = tried(reader, prompt, read, recipe)
                if whole is None:
                    continue
                logits = whole[-len(answer) :]
                correct = bool((logits.argmax(-1) == expected).all())
                loss = float(cross_entropy(logits, expected))
                facts = {"found": correct, "loss": loss, "tokens": len(ids) + len(read) + 1}
                store.put("passkey", hidden, recipe, keys[recipe], facts)
                print(f"passkey: {hidden.name}: {recipe}: {'found' if correct else 'missed'}, {loss:.3g}", flush=True)


def greedy_task(store: Store, reader: Reader, model: Model, found: Sequence[Text], recipes: Sequence[str]) -> None:
    """Count the greedily generated tokens that agree with those of f32 before the first that does not."""
    for text in found:
        if text.name not in GREEDY_TEXTS:
            continue
        ids = model.encode(text.text)[:GREEDY_PROMPT]
        keys = {recipe: key_of(recipe, ids, GREEDY_TOKENS, model.config) for recipe in recipes}
        missing = [recipe for recipe, key in keys.items() if not store.has("greedy", text.name, recipe, key)]
        if not missing:
            continue
        model.net.set_attn_implementation("plain")
        generated, _ = model.greedy(ids[-1], model.prefill(ids[:-1]), GREEDY_TOKENS)
        prompt, fed = reader.prompt(ids[:-1]), [ids[-1], *generated[:-1]]
        for recipe in missing:
            logits = tried(reader, prompt, fed, recipe)
            if logits is None:
                continue
            same = logits.argmax(-1) == torch.tensor(generated)
            agree = len(generated) if bool(same.all()) else int(same.int().argmin())
            facts = {"agree": agree, "generated": len(generated), "same": float(same.double().mean())}
            store.put("greedy", text, recipe, keys[recipe], facts)
            print(f"greedy: {text.name}: {recipe}: {agree} of {len(generated)}", flush=True)
