"""kvmmap[gguf]: a state of llama.cpp into a cache and back."""

import struct

import gguf
import numpy as np

import kvmmap

writer = gguf.GGUFWriter("model.gguf", "qwen2")
writer.add_block_count(1)
writer.add_embedding_length(64)
writer.add_head_count(2)
writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

rows = np.arange(3 * 64, dtype=np.float16).tobytes()
cells = b"".join(struct.pack("<iIi", position, 1, 0) for position in range(3))
part = struct.pack("<iQ", 1, 128) + rows
state = struct.pack("<III3i", 0x67677371, 3, 3, 7, 8, 9) + struct.pack("<II", 1, 3) + cells
state += struct.pack("<II", 0, 1) + part + part
kvmmap.import_llama_cpp(state, "b.kvm", gguf="model.gguf")
with kvmmap.open("b.kvm") as cache:
    assert cache.token_ids.tolist() == [7, 8, 9]
kvmmap.export_llama_cpp("b.kvm", "slot.bin", gguf="model.gguf")
with open("slot.bin", "rb") as file:
    assert file.read() == state
