from typing import Any

class PairEncoder:
    def __init__(
        self,
        key_codec: int,
        key_transform: int,
        key_dim: int,
        value_codec: int,
        value_transform: int,
        value_dim: int,
    ) -> None: ...
    def encode(
        self,
        keys: Any,
        key_dtype: int,
        values: Any,
        value_dtype: int,
        arrays: tuple[Any, ...],
        rings: RecentRings | None,
        start: int,
    ) -> int: ...

class PositionAppender:
    def __init__(
        self,
        codecs: tuple[int, int, int, int],
        kv_heads: int,
        dim: int,
        value_dim: int,
        offsets: list[int],
        rings: RecentRings | None,
        encoded: tuple[Any, ...],
    ) -> None: ...
    def append(self, fd: int, position: int, keys: Any, key_dtype: int, values: Any, value_dtype: int) -> int: ...

class RecentRings:
    def __init__(self, ring: tuple[Any, Any, Any], first: tuple[Any, Any, Any]) -> None: ...
    def keep(self, start: int, keys: Any, key_dtype: int, values: Any, value_dtype: int) -> None: ...
    def records(self, sinks: bool, arrays: tuple[Any, ...], first: int, start: int, stop: int, out: Any) -> None: ...

def quantize_rows(x: Any, dtype: int, codes: Any, scales: Any, threads: int) -> int: ...
def dequantize_rows(codes: Any, scales: Any, dim: int, out: Any, dtype: int, threads: int) -> None: ...
def encode_rows(codec: int, transform: int, x: Any, dtype: int, arrays: tuple[Any, ...], threads: int) -> int: ...
def decode_rows(
    codec: int, transform: int, arrays: tuple[Any, ...], dim: int, out: Any, dtype: int, threads: int
) -> None: ...
def encode_ggml(type: int, group: int, interleaved: bool, x: Any, dtype: int, out: Any, threads: int) -> int: ...
def decode_ggml(
    type: int, group: int, interleaved: bool, rows: Any, dim: int, out: Any, dtype: int, threads: int
) -> None: ...
def special_ggml(type: int, rows: Any) -> int: ...
def attend(
    queries: Any,
    dtype: int,
    slabs: tuple[Any, ...],
    kv_heads: int,
    value_dim: int,
    first_position: int,
    ranges: Any,
    scale: float,
    softcap: float,
    query_start: int,
    causal: bool,
    window: int,
    sinks: int,
    out: Any,
    lse: Any,
    threads: int,
    codecs: tuple[int, int, int, int] = (1, 0, 1, 0),
    recent: tuple[int, int, RecentRings] | None = None,
    exact: bool = False,
    unread: tuple[
        tuple[int, Any, int, int, Any]
        | tuple[int, Any, int, int, Any, int]
        | tuple[int, Any, int, int, Any, int, list[int], int]
        | None,
        ...,
    ]
    | None = None,
) -> int: ...
def read_recent(ring: tuple[Any, Any, Any], keys: bool, start: int, stop: int, out: Any, dtype: int) -> None: ...
def take_recent_records(
    records: Any, ring: tuple[Any, Any, Any], arrays: tuple[Any, ...], first: int, start: int, stop: int
) -> list[int]: ...
def merge_part(state: Any, out: Any, lse: Any) -> None: ...
def merge_end(state: Any, out: Any, lse: Any) -> None: ...
def block_checksums(
    arrays: tuple[Any, ...], track: int, blocks: Any, size: int, stop: int, out: Any, threads: int
) -> None: ...
def import_dlpack(object: Any) -> tuple[Any, int]: ...
def sketch_blocks(codes: Any, scales: Any, heads: int, dim: int, tokens: int, sketches: Any) -> None: ...
def bound_blocks(parts: Any, sketches: Any, heads: int, dim: int, bounds: Any) -> None: ...
def write_all(fd: int, offsets: tuple[int, ...], buffers: tuple[Any, ...]) -> None: ...
def start_sync(fd: int, offset: int, size: int) -> None: ...
def punch_hole(fd: int, offset: int, size: int) -> bool: ...
def store_word(map: Any, offset: int, word: int) -> None: ...
def load_word(map: Any, offset: int) -> int: ...
def publish(map: Any, offset: int, value: int, index: int, salt: int) -> None: ...
def load_checked(map: Any, offset: int, count: int, index: int, salt: int) -> list[int]: ...
def checked_word(value: int, index: int, salt: int) -> int: ...
def use_team(fork: int, threads: int) -> None: ...
def available_kernels() -> list[str]: ...
def current_kernel() -> str: ...
def use_kernel(name: str) -> None: ...

class Step:
    def __init__(
        self,
        codecs: tuple[int, int, int, int],
        kv_heads: int,
        dim: int,
        value_dim: int,
        offsets: list[int],
        rings: RecentRings | None,
        window: int,
        encoded: tuple[Any, ...],
        tensor: type,
        dtypes: tuple[Any, Any, Any],
    ) -> None: ...
    def append(self, fd: int, position: int, keys: Any, values: Any) -> bool: ...
    def prepare(self, like: Any) -> None: ...
    def attend(
        self,
        query: Any,
        slabs: tuple[Any, ...],
        length: int,
        scale: float,
        softcap: float,
        window: int,
        threads: int,
    ) -> Any: ...
