"""kvmmap at a shell: click commands over the public API of `kvmmap`, and over nothing else of it."""
