"""Hostile files, made by the structure of sound ones with checksums made right again: `python -m fuzz.run`."""
