"""Comparing a Zarr-backed cache with its checksums: everything that its last commit promises."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ...geometry import LayerGeometry
from ..protocols import Damage, Progress, VerifyReport, seq_len
from .download import Block, Fetch, ShardRows

if TYPE_CHECKING:
    from .reader import ZarrReader

UNDER_WAY = 2**26
"""Bytes that are being read while others are compared."""


def verify_group(reader: ZarrReader, progress: Progress | None = None) -> VerifyReport:
    """Read every committed block; a writer may be appending meanwhile.

    Raises:
        CacheChangedError: positions were taken back meanwhile.
    """
    root, geometry, layout = reader.root, reader.geometry, reader.layout
    report = VerifyReport(path=reader.path, seq_len=seq_len(reader), verified=root.seq_len)
    total = root.seq_len * sum(layer.position_bytes for layer in geometry.layers) + 4 * root.token_len
    queue: deque[tuple[int, int, ShardRows, Fetch]] = deque()
    waiting = 0
    spare: dict[LayerGeometry, list[ShardRows]] = {layer: [] for layer in geometry.layers}
    for shard in range(-(-root.seq_len // layout.shard_tokens)):
        count = min(layout.shard_tokens, root.seq_len - shard * layout.shard_tokens)
        size = geometry.block_tokens
        blocks = [Block(number, min(size, count - number * size)) for number in range(-(-count // size))]
        sums = reader.pool.submit(reader.read_sums, shard, root)
        for layer, shape in enumerate(geometry.layers):
            target = spare[shape].pop() if spare[shape] else ShardRows(shape, layout)
            queue.append((layer, shard, target, reader.fetch(layer, shard, target, blocks, sums)))
            waiting += count * shape.position_bytes
            while queue and (waiting > UNDER_WAY or len(queue) > 64):
                done, number, room, fetch = queue.popleft()
                waiting -= _finish(reader, report, done, number, fetch)
                spare[geometry.layers[done]].append(room)
                if progress:
                    progress(report.bytes, total)
    while queue:
        done, number, _, fetch = queue.popleft()
        _finish(reader, report, done, number, fetch)
        if progress:
            progress(report.bytes, total)
    _check_tokens(reader, report)
    report.bytes = total
    if progress:
        progress(total, total)
    reader.refuse_changed()
    return report


def _finish(reader: ZarrReader, report: VerifyReport, layer: int, shard: int, fetch: Fetch) -> int:
    """Note what is wrong with the blocks of a shard; return its bytes."""
    size = reader.geometry.block_tokens
    for block, trouble in fetch.finish():
        start = (shard * reader.layout.shard_blocks + block.number) * size
        stop = start + block.rows
        report.damages.append(Damage(f"layer {layer}, positions [{start}, {stop}): {trouble}", layer, start, stop))
    count = sum(block.rows for block in fetch.blocks) * reader.geometry.layers[layer].position_bytes
    report.blocks += len(fetch.blocks)
    report.bytes += count
    return count


def _check_tokens(reader: ZarrReader, report: VerifyReport) -> None:
    size, length = reader.layout.shard_tokens, reader.root.token_len
    for chunk in range(len(reader.root.token_digests)):
        if reader.read_token_chunk(chunk, reader.root) is None:
            start, stop = chunk * size, min(length, (chunk + 1) * size)
            what = f"token ids, positions [{start}, {stop}): missing, or checksum does not match"
            report.damages.append(Damage(what, None, start, stop))
    report.blocks += -(-length // reader.geometry.block_tokens)
