"""Copies between storages."""
