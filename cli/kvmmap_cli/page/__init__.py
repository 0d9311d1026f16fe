"""A report on one cache as one HTML page: no script, no network, for any screen, light and dark."""

from .document import Facts, build

__all__ = ["Facts", "build"]
