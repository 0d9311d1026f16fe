"""What is known of a cache, as dataclasses: facts, statistics, grids for pictures, differences, the map of its file.

All of it is read through the public face of a cache, block by block, so any storage and any size will do. Nothing is
formatted here; printing and drawing are the caller's. Modules are loaded when something of theirs is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .difference import CacheDifference, LayerDifference, PartDifference, compare
    from .facts import CacheReport, CommitReport, LayerReport, ParentReport, inspect
    from .filemap import FileMap, FileSection, file_map
    from .gathering import CacheStatistics, LayerStatistics, Outliers, statistics
    from .grids import ScaleGrid, scale_grids
    from .states import CheckpointReport, StateReport, StatesReport
    from .tally import ChannelOutlier, PositionOutlier, RowStatistics, ScaleStatistics

_HOMES = {
    "facts": ("CacheReport", "CommitReport", "LayerReport", "ParentReport", "inspect"),
    "gathering": ("CacheStatistics", "LayerStatistics", "Outliers", "statistics"),
    "tally": ("ChannelOutlier", "PositionOutlier", "RowStatistics", "ScaleStatistics"),
    "grids": ("ScaleGrid", "scale_grids"),
    "difference": ("CacheDifference", "LayerDifference", "PartDifference", "compare"),
    "states": ("CheckpointReport", "StateReport", "StatesReport"),
    "filemap": ("FileMap", "FileSection", "file_map"),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # type checkers would take every misspelt name for one of these
    __getattr__, __dir__ = lazy_names(globals(), _WHERE)


__all__ = [
    "CacheDifference",
    "CacheReport",
    "CacheStatistics",
    "ChannelOutlier",
    "CheckpointReport",
    "CommitReport",
    "FileMap",
    "FileSection",
    "LayerDifference",
    "LayerReport",
    "LayerStatistics",
    "Outliers",
    "ParentReport",
    "PartDifference",
    "PositionOutlier",
    "RowStatistics",
    "ScaleGrid",
    "ScaleStatistics",
    "StateReport",
    "StatesReport",
    "compare",
    "file_map",
    "inspect",
    "scale_grids",
    "statistics",
]
