"""Stores of named objects: a directory, an object store, memory; with their locks."""
