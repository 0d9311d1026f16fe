"""Make the golden states: `python tests/golden/make_llama_cpp.py`, with llama-cpp-python 0.3.36 and SmolLM2's weights.

Two tokens in a slot file of version 3, as f16 and as q8_0 (which llama.cpp rotates), with flash attention.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.llama import llama_cpp, make, token_ids

for name, kind in (("f16", 1), ("q8_0", 8)):
    model = make(type_k=kind, type_v=kind, flash_attn=True)
    ids = token_ids(2)
    model.eval(ids)
    path = Path(__file__).with_name(f"llama-{name}.slot")
    assert llama_cpp.llama_state_seq_save_file(model.ctx, str(path).encode(), 0, (llama_cpp.llama_token * 2)(*ids), 2)
    model.close()
