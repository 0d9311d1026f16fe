"""The storage that is a Zarr group, over any store of objects."""
