"""The storage that is one memory-mapped `.kvm` file."""
