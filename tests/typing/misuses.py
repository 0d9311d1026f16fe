"""What a type checker must refuse: every line that ends with "# wrong", and no other.

Checked by mypy --strict and pyright against an installed kvmmap (`make check-wheels`); never run.
"""

import kvmmap
from kvmmap import QuantizedKvLayer

kvmmap.open("a.kvm", "w")  # wrong
kvmmap.open("a.kvm", mode="rb")  # wrong
kvmmap.open(3)  # wrong
kvmmap.open("a.kvm", "a", durability="always")  # wrong
kvmmap.opne("a.kvm")  # wrong
kvmmap.create("a.kvm", num_layers=2, capacity=8, heads=1)  # wrong
kvmmap.create("a.kvm", num_layers="2", capacity=8, num_kv_heads=1, head_dim=8)  # wrong
kvmmap.copy("a.kvm", "b.zarr", layers="all")  # wrong
kvmmap.copy("a.kvm", "b.zarr", progress=print).nonesuch  # wrong
kvmmap.export_tensors("a.kvm", "a.safetensors", dtype="int4")  # wrong
kvmmap.report.inspekt  # wrong

cache = kvmmap.QuantizedKvCache(2, 8, 1, 8)
cache.layers["0"]  # wrong
cache.seq_len = 3  # wrong
cache.push_step(1.0)  # wrong
cache.truncate("all")  # wrong

layer = QuantizedKvLayer(8, 1, 8)
layer.attend(None, resident="disk")  # wrong
layer.attend(None, windows=3)  # wrong
number: int = layer.attend(None)  # wrong
both: tuple[int, int] = layer.attend(None, return_lse=True)  # wrong
layer.key_codes = layer.value_codes  # wrong
