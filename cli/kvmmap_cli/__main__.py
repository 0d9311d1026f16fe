"""`python -m kvmmap_cli` is `kvmmap`."""

from .main import main

main()
