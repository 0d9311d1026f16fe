"""Attention over coded rows: masks, queries, kernels, merging of partial results, and choosing blocks."""
