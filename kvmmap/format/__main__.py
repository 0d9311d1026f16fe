"""Print the layout's tables, as they stand in docs/format.md."""

from . import tables

print(tables(), end="")
