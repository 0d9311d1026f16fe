"""kvmmap[safetensors]: a cache to a safetensors file and back."""

import base
import numpy as np
from safetensors.numpy import load_file

import kvmmap

base.make_and_reopen()
kvmmap.export_tensors("a.kvm", "a.safetensors", dtype="int8")
assert load_file("a.safetensors")
kvmmap.import_tensors("a.safetensors", "b.kvm")
with kvmmap.open("b.kvm") as copy, kvmmap.open("a.kvm") as cache:
    np.testing.assert_array_equal(copy.layers[1].value_codes, cache.layers[1].value_codes)
