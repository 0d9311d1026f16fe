"""Attention over coded rows, and the merging of partial results."""
