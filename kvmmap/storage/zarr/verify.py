"""Comparing a Zarr-backed cache with its checksums: everything that its last commit promises."""

from __future__ import annotations

from collections import deque

from ...geometry import LayerGeometry
from ...recent import RecentRows
from ..protocols import Damage, Progress, Rows, VerifyReport, damaged_record
from .checkpoints import check_checkpoints
from .committed import BlockChecksums, read_token_chunk
from .download import Block, Fetch, ShardRows
from .handle import GroupHandle
from .recent_rows import load_recent
from .shard_cache import ShardCache

UNDER_WAY = 2**26
"""Bytes that are being read while others are compared."""


def verify_group(
    handle: GroupHandle, shards: ShardCache, checksums: BlockChecksums, progress: Progress | None = None
) -> VerifyReport:
    """Read every committed block; a writer may be appending meanwhile.

    Raises:
        CacheChangedError: positions were truncated meanwhile.
    """
    root, geometry, layout = handle.root, handle.geometry, handle.layout
    report = VerifyReport(path=handle.path, seq_len=max(handle.seq_len, root.seq_len), verified=root.seq_len)
    total = root.seq_len * sum(layer.position_bytes for layer in geometry.layers) + 4 * root.token_len
    queue: deque[tuple[int, int, ShardRows, Fetch]] = deque()
    waiting = 0
    spare: dict[LayerGeometry, list[ShardRows]] = {layer: [] for layer in geometry.layers}
    for shard in range(-(-root.seq_len // layout.shard_tokens)):
        count = min(layout.shard_tokens, root.seq_len - shard * layout.shard_tokens)
        size = geometry.block_tokens
        blocks = [Block(number, min(size, count - number * size)) for number in range(-(-count // size))]
        sums = handle.pool.submit(checksums.read, shard, root)
        for layer in geometry.row_layers:
            shape = geometry.layers[layer]
            target = spare[shape].pop() if spare[shape] else ShardRows(shape, layout)
            queue.append((layer, shard, target, shards.fetch(layer, shard, target, blocks, sums)))
            waiting += count * shape.position_bytes
            while queue and (waiting > UNDER_WAY or len(queue) > 64):
                done, number, room, fetch = queue.popleft()
                waiting -= _finish(handle, report, done, number, fetch)
                spare[geometry.layers[done]].append(room)
                if progress:
                    progress(report.bytes, total)
    while queue:
        done, number, _, fetch = queue.popleft()
        _finish(handle, report, done, number, fetch)
        if progress:
            progress(report.bytes, total)
    report.damages += check_checkpoints(handle)
    _check_tokens(handle, report)
    _check_recent(handle, report)
    report.bytes = total
    if progress:
        progress(total, total)
    handle.refuse_changed()
    return report


def _finish(handle: GroupHandle, report: VerifyReport, layer: int, shard: int, fetch: Fetch) -> int:
    """Note what is wrong with the blocks of a shard; return its bytes."""
    size = handle.geometry.block_tokens
    for block, trouble in fetch.finish():
        start = (shard * handle.layout.shard_blocks + block.number) * size
        stop = start + block.rows
        report.damages.append(Damage(f"layer {layer}, positions [{start}, {stop}): {trouble}", layer, start, stop))
    count = sum(block.rows for block in fetch.blocks) * handle.geometry.layers[layer].position_bytes
    report.blocks += len(fetch.blocks)
    report.bytes += count
    return count


def _check_tokens(handle: GroupHandle, report: VerifyReport) -> None:
    size, length = handle.layout.shard_tokens, handle.root.token_len
    for chunk in range(len(handle.root.token_digests)):
        if read_token_chunk(handle, chunk, handle.root) is None:
            start, stop = chunk * size, min(length, (chunk + 1) * size)
            what = f"token ids, positions [{start}, {stop}): missing, or checksum does not match"
            report.damages.append(Damage(what, None, start, stop))
    report.blocks += -(-length // handle.geometry.block_tokens)


def _check_recent(handle: GroupHandle, report: VerifyReport) -> None:
    """Note records of rows in 16 bits that are damaged. What they are compared with are their own checksums."""
    for layer, shape in enumerate(handle.geometry.layers) if handle.geometry.keeps_recent else ():
        rows = RecentRows.of(handle.geometry, layer)
        if rows is None:
            continue
        nothing = Rows.allocate(shape, 0)
        damaged = load_recent(handle, layer, rows, lambda start, stop: nothing, report.verified)  # noqa: B023
        report.inexact += [damaged_record(layer, position) for position in damaged]
