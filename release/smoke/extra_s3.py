"""kvmmap[s3]: a cache to an S3 server, which the environment names, and back."""

import base
import numpy as np

import kvmmap

base.make_and_reopen()
url = "s3://caches/smoke/a.zarr"
kvmmap.copy("a.kvm", url, overwrite=True)
assert "40 of 64 positions" in base.run("inspect", url)
with kvmmap.fetch(url, "b.kvm") as copy, kvmmap.open("a.kvm") as cache:
    np.testing.assert_array_equal(copy.layers[1].value_codes, cache.layers[1].value_codes)
kvmmap.remove(url)
