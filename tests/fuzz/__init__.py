"""Hostile files: valid ones with changed fields and recomputed checksums. `python -m fuzz.run`."""
