"""kvmmap[zarr]: a cache to a Zarr group and back, which zarr-python reads too."""

import base
import numpy as np
import zarr

import kvmmap

base.make_and_reopen()
for compressor in (None, "zstd"):
    kvmmap.copy("a.kvm", "a.zarr", compressor=compressor, overwrite=True)
    with kvmmap.fetch("a.zarr", "b.kvm", overwrite=True) as copy, kvmmap.open("a.kvm") as cache:
        np.testing.assert_array_equal(copy.layers[1].value_codes, cache.layers[1].value_codes)
        array = zarr.open_group("a.zarr", mode="r")["layers/1/value_codes"]
        np.testing.assert_array_equal(array[: cache.seq_len], cache.layers[1].value_codes)
