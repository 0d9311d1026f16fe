"""Copies with other codecs: the same as decoding and encoding again, by every storage, and what they say it cost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli_support import click_run
from numpy.typing import NDArray
from test_cli import run

import kvmmap
from kvmmap import codecs
from kvmmap.transfer import plan, transcoding

LAYERS, LENGTH, HEADS, DIM, VALUE_DIM = 2, 300, 2, 32, 16
SHAPE: dict[str, Any] = {
    "num_layers": LAYERS,
    "capacity": LENGTH,
    "num_kv_heads": HEADS,
    "head_dim": DIM,
    "value_head_dim": VALUE_DIM,
}
PRESETS = ("int8", "fidelity", "compact", "small", "tiny", "lossless")


def numbers(seed: int, length: int = LENGTH) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((LAYERS, length, HEADS, DIM), np.float32)
    return keys, rng.standard_normal((LAYERS, length, HEADS, VALUE_DIM), np.float32)


def filled(path: Any, length: int = LENGTH, **codec: Any) -> None:
    with kvmmap.create(path, **SHAPE | {"capacity": length}, **codec, metadata={"a": 1}) as cache:
        cache.extend(*numbers(1, length), range(length))


def encoded(codec: codecs.RowCodec, given: NDArray[np.float32]) -> list[NDArray[Any]]:
    arrays = [np.empty((*given.shape[:2], *one.shape), one.dtype) for one in codec.arrays(given.shape[2])]
    assert codec.encode(given, 0, arrays, 1) == -1
    return arrays


@pytest.mark.parametrize("target", ["b.kvm", "b.zarr"])
@pytest.mark.parametrize("source", ["a.kvm", "a.zarr", None])
@pytest.mark.parametrize(("old", "new"), list(itertools.pairwise([*PRESETS, "int8"])))
def test_a_transcoded_copy_has_what_encoding_again_gives(
    tmp_path: Path, source: str | None, target: str, old: str, new: str
) -> None:
    given: Any
    if source is None:
        given = kvmmap.QuantizedKvCache(**SHAPE, preset=old, metadata={"a": 1})
        given.extend(*numbers(1), range(LENGTH))
    else:
        given = tmp_path / source
        filled(given, preset=old)
    report = kvmmap.copy(given, tmp_path / target, preset=new)
    assert report.bytes == LENGTH * kvmmap.bytes_per_token(**_shape(), preset=new)
    assert report.source_bytes == LENGTH * kvmmap.bytes_per_token(**_shape(), preset=old)
    one = given if source is None else kvmmap.open(given)
    with kvmmap.open(tmp_path / target) as made:
        assert (made.metadata, made.token_ids.tolist()) == ({"a": 1}, list(range(LENGTH)))
        for layer, other, loss in zip(one.layers, made.layers, report.losses, strict=True):
            shape = other.geometry
            wanted = kvmmap.CacheGeometry.build(**_shape(), capacity=1, **_codecs(new)).layers[0]
            assert (shape.key_codec, shape.value_codec) == (wanted.key_codec, wanted.value_codec)
            stored, found = layer.read_quantized(), other.read_quantized()
            for part, codec, before, lost in (
                ("keys", shape.key_codec, layer.geometry.key_codec, loss.keys),
                ("values", shape.value_codec, layer.geometry.value_codec, loss.values),
            ):
                decoded = before.decoded(getattr(stored, part), DIM if part == "keys" else VALUE_DIM)
                expected = getattr(stored, part) if before is codec else encoded(codec, decoded)
                for array, wished in zip(getattr(found, part), expected, strict=True):
                    np.testing.assert_array_equal(array, wished)
                again = codec.decoded(getattr(found, part), decoded.shape[-1])
                error = np.linalg.norm(again - decoded, axis=-1) / np.linalg.norm(decoded, axis=-1)
                assert lost.mean == pytest.approx(float(error.mean()), rel=1e-4)
                assert lost.worst == pytest.approx(float(error.max()), rel=1e-4)
                assert (lost.mean == 0) == (before is codec or not error.any())
    one.close()


def _shape() -> dict[str, Any]:
    return {name: value for name, value in SHAPE.items() if name != "capacity"}


def _codecs(preset: str) -> dict[str, Any]:
    size = next(size for size in kvmmap.sizes(**_shape()) if size.preset == preset)
    return {"key_codec": size.key_codec, "value_codec": size.value_codec}


def test_copies_with_the_codecs_that_are_there_are_bit_by_bit(tmp_path: Path) -> None:
    filled(tmp_path / "a.kvm", preset="compact")
    report = kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", preset="compact")
    assert report.losses == ()
    with kvmmap.open(tmp_path / "a.kvm") as one, kvmmap.open(tmp_path / "b.kvm") as other:
        for layer, copied in zip(one.layers, other.layers, strict=True):
            for array, wished in zip(copied.read_quantized(), layer.read_quantized(), strict=True):
                np.testing.assert_array_equal(array, wished)


def test_codecs_by_layer_of_layers_in_another_order(tmp_path: Path) -> None:
    filled(tmp_path / "a.kvm")
    report = kvmmap.copy(
        tmp_path / "a.kvm", tmp_path / "b.kvm", layers=[1, 0, 1], start=7, stop=290, value_codec=["bf16", "f16", "int8"]
    )
    assert [loss.values.mean > 0 for loss in report.losses] == [True, True, False]
    assert all(loss.keys.mean == 0 for loss in report.losses)
    with kvmmap.open(tmp_path / "a.kvm") as one, kvmmap.open(tmp_path / "b.kvm") as made:
        assert [layer.geometry.value_codec.name for layer in made.layers] == ["bf16", "f16", "int8"]
        for layer, number in zip(made.layers, (1, 0, 1), strict=True):
            np.testing.assert_array_equal(layer.read_keys(), one.layers[number].read_keys(7, 290))
            np.testing.assert_allclose(layer.read_values(), one.layers[number].read_values(7, 290), rtol=2**-8)


def test_rows_are_transcoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "a.kvm", 601)
    kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", preset="small")
    monkeypatch.setattr(transcoding, "PART_NUMBERS", 7 * HEADS * DIM)
    kvmmap.copy(tmp_path / "a.kvm", tmp_path / "c.kvm", preset="small")
    with kvmmap.open(tmp_path / "b.kvm") as one, kvmmap.open(tmp_path / "c.kvm") as other:
        assert one.verify().sound
        assert other.verify().sound
        for layer, copied in zip(one.layers, other.layers, strict=True):
            for array, wished in zip(copied.read_quantized(), layer.read_quantized(), strict=True):
                np.testing.assert_array_equal(array, wished)


def test_an_interrupted_transcoding_is_resumed_by_the_same_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "STEP_TOKENS", 256)
    filled(tmp_path / "a.kvm", 700)

    def interrupt(done: int, total: int) -> None:
        if done > 256 * kvmmap.bytes_per_token(**_shape(), preset="tiny"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", preset="tiny", progress=interrupt)
    assert not (tmp_path / "b.kvm").exists()
    other = kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", preset="small")
    assert other.resumed == 0
    same = kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", preset="tiny", overwrite=True)
    assert same.resumed >= 256
    with kvmmap.open(tmp_path / "b.kvm") as made:
        assert made.layers[0].geometry.key_codec.name == "int4-rotated"
        assert made.verify().sound


def test_what_a_codec_refuses_names_where_it_is(tmp_path: Path) -> None:
    keys, values = numbers(1)
    values[1, 263, 1, 3] = 1000
    with kvmmap.create(tmp_path / "a.kvm", **SHAPE) as cache:
        cache.extend(keys, values)
    with pytest.raises(kvmmap.NonFiniteError, match=r"beyond 448.* at position 263, head 1.*layer 1") as caught:
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", value_codec="fp8-e4m3")
    assert (caught.value.layer, caught.value.position, caught.value.head) == (1, 263, 1)
    assert not (tmp_path / "b.kvm").exists()
    with pytest.raises(kvmmap.DtypeError, match="no codec 'int9'"):
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", key_codec="int9")
    with pytest.raises(kvmmap.DtypeError, match="no preset 'huge'"):
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", preset="huge")
    with pytest.raises(kvmmap.ShapeMismatchError, match="key_codec has 3 entries for 2 layers"):
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", key_codec=["int8"] * 3)


@pytest.mark.parametrize("target", ["b.kvm", "b.zarr"])
def test_states_come_along_and_layers_without_rows_stay(tmp_path: Path, target: str) -> None:
    spec = kvmmap.StateSpec(1, "conv", "float32", (2, 3))
    shape = SHAPE | {"num_kv_heads": [HEADS, 0], "head_dim": [DIM, 0], "value_head_dim": [VALUE_DIM, 0]}
    keys, values = numbers(1)
    state = np.arange(6, dtype=np.float32).reshape(2, 3)
    with kvmmap.create(tmp_path / "a.kvm", **shape, states=[spec]) as cache:
        cache.extend([keys[0], None], [values[0], None])
        cache.write_states([state])
    report = kvmmap.copy(tmp_path / "a.kvm", tmp_path / target, preset="compact")
    assert report.losses[1] == kvmmap.LayerLoss(
        keys=kvmmap.CodecLoss(mean=0, worst=0), values=kvmmap.CodecLoss(mean=0, worst=0)
    )
    assert report.losses[0].values.mean > 0
    with kvmmap.open(tmp_path / target) as made:
        assert len(made) == LENGTH
        np.testing.assert_array_equal(made.read_states()[1, "conv"], state)


@pytest.mark.parametrize("target", ["b.kvm", "b.zarr"])
def test_the_recent_window_of_a_preset(tmp_path: Path, target: str) -> None:
    filled(tmp_path / "a.kvm", preset="fidelity")
    kvmmap.copy(tmp_path / "a.kvm", tmp_path / target, preset="tiny")
    keys, values = numbers(1)
    with kvmmap.open(tmp_path / target) as made:
        assert (made.geometry.recent_window, made.geometry.sinks) == (256, 4)
        for number, layer in enumerate(made.layers):  # what was kept in 16 bits is so in the copy, whatever the codec
            for part, given in (("keys", keys), ("values", values)):
                found = getattr(layer, f"read_{part}")()
                exact = given[number].astype(np.float16).astype(np.float32)
                np.testing.assert_array_equal(found[-128:], exact[-128:])
                np.testing.assert_array_equal(found[:4], exact[:4])
                assert not np.array_equal(found[4:-128], exact[4:-128])
    plain = kvmmap.copy(tmp_path / "a.kvm", tmp_path / f"plain-{target}", preset="int8")
    assert plain.losses
    kvmmap.copy(tmp_path / f"plain-{target}", tmp_path / f"c-{target}", recent_window=8, sinks=0)
    with kvmmap.open(tmp_path / f"plain-{target}") as one, kvmmap.open(tmp_path / f"c-{target}") as other:
        assert (one.geometry.recent_window, one.geometry.sinks) == (0, 0)
        assert (other.geometry.recent_window, other.geometry.sinks) == (8, 0)
        np.testing.assert_array_equal(one.layers[1].key_codes, other.layers[1].key_codes)


def test_damage_is_not_transcoded(tmp_path: Path) -> None:
    filled(tmp_path / "a.kvm")
    data = bytearray((tmp_path / "a.kvm").read_bytes())
    with kvmmap.open(tmp_path / "a.kvm") as cache:
        data[data.find(cache.layers[1].key_codes[20].tobytes())] ^= 1
    (tmp_path / "a.kvm").write_bytes(data)
    with pytest.raises(kvmmap.CorruptCacheError, match="layer 1 is damaged"):
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", preset="tiny")


def test_raw_rows_of_another_codec_are_refused() -> None:
    one = kvmmap.QuantizedKvLayer(10, HEADS, DIM, preset="compact")
    other = kvmmap.QuantizedKvLayer(10, HEADS, DIM)
    keys = numbers(1, 3)[0][0]
    one.extend(keys, keys)
    with pytest.raises((kvmmap.ShapeMismatchError, kvmmap.DtypeError)):
        other.extend_quantized(*one.read_quantized())
    assert len(other) == 0


def test_presets_in_memory() -> None:
    for preset in PRESETS:
        cache = kvmmap.QuantizedKvCache(**SHAPE, preset=preset)
        names = {(layer.key_codec.name, layer.value_codec.name) for layer in cache.geometry.layers}
        assert names == {tuple(_codecs(preset).values())}
        layer = kvmmap.QuantizedKvLayer(4, HEADS, DIM, VALUE_DIM, preset=preset)
        assert {(layer.geometry.key_codec.name, layer.geometry.value_codec.name)} == names
    mixed = kvmmap.QuantizedKvCache(**SHAPE, preset="small", value_codec=["int8", "bf16"])
    assert [layer.value_codec.name for layer in mixed.geometry.layers] == ["int8", "bf16"]
    assert {layer.key_codec.name for layer in mixed.geometry.layers} == {"int5-rotated"}
    with pytest.raises(kvmmap.DtypeError, match="no preset 'huge'"):
        kvmmap.QuantizedKvCache(**SHAPE, preset="huge")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_is_as_large_as_the_documentation_says(tmp_path: Path, preset: str) -> None:
    """Of sections; rows are not needed for that. Metadata has room for 64 KiB twice."""
    shape: dict[str, Any] = {"num_layers": 10, "num_kv_heads": 8, "head_dim": 128}
    plain = {"preset": preset, "recent_window": 0, "sinks": 0}
    kvmmap.create(tmp_path / "a.kvm", capacity=32_768, **shape, **plain).close()
    of_rows = 32_768 * kvmmap.bytes_per_token(**shape, preset=preset)
    assert 1.003 < (tmp_path / "a.kvm").stat().st_size / of_rows < 1.02


def test_sizes() -> None:
    shape: dict[str, Any] = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}
    found = {size.preset: size for size in kvmmap.sizes(**shape)}
    assert list(found) == list(PRESETS)
    numbers_a_token = 32 * 8 * 128 * 2
    assert found["lossless"].bytes_per_token == numbers_a_token * 2
    assert found["int8"].bytes_per_token == numbers_a_token * 8.25 / 8
    for preset, size in found.items():
        assert size.bits_per_number == 8 * size.bytes_per_token / numbers_a_token
        cache = kvmmap.QuantizedKvCache(**shape, capacity=3, preset=preset)
        assert size.bytes_per_token == kvmmap.bytes_per_token(**shape, preset=preset) == cache.memory_bytes // 3
        assert size.recent_bytes == cache.geometry.recent_bytes
    assert found["int8"].recent_bytes == found["lossless"].recent_bytes == 0
    assert found["fidelity"].recent_bytes > 132 * numbers_a_token * 2
    assert found["tiny"].recent_bytes == found["compact"].recent_bytes > 260 * numbers_a_token * 2
    assert [size.preset for size in kvmmap.sizes(num_layers=1, num_kv_heads=1, head_dim=7)] == ["int8", "lossless"]
    with pytest.raises(kvmmap.ShapeMismatchError):
        kvmmap.sizes(num_layers=0, num_kv_heads=1, head_dim=7)
    with pytest.raises(kvmmap.ShapeMismatchError):
        kvmmap.bytes_per_token(num_layers=1, num_kv_heads=1, head_dim=7, preset="tiny")


def test_the_command_transcodes_and_says_what_it_cost(tmp_path: Path) -> None:
    filled(tmp_path / "a.kvm")
    done = run("copy", tmp_path / "a.kvm", tmp_path / "b.kvm", "--preset", "compact")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{tmp_path}/b.kvm: 300 positions, 53.9 KiB (65.6 KiB before), verified\n"
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["layer", "keys", "lost", "at", "worst", "values", "lost", "at", "worst"]
    assert [line.split()[0] for line in lines] == ["0", "1"]
    with kvmmap.open(tmp_path / "a.kvm") as one, kvmmap.open(tmp_path / "b.kvm") as made:
        decoded, again = one.layers[0].read_values(), made.layers[0].read_values()
    error = np.linalg.norm(again - decoded, axis=-1) / np.linalg.norm(decoded, axis=-1)
    assert float(lines[0].split()[3].rstrip("%")) == pytest.approx(100 * float(error.mean()), abs=2e-3)
    done = run("copy", tmp_path / "a.kvm", tmp_path / "c.kvm", "--codec", "bf16")
    assert done.returncode == 0
    with kvmmap.open(tmp_path / "c.kvm") as made:
        assert {(layer.key_codec.name, layer.value_codec.name) for layer in made.geometry.layers} == {("bf16", "bf16")}
    for arguments, what in (
        (("--codec", "int8", "--preset", "tiny"), "--codec names the codec"),
        (("--codec", "int9"), "no codec 'int9'"),
        (("--preset", "huge"), "no preset 'huge'"),
        (("--key-codec", "int8,int8,int8"), "3 entries for 2 layers"),
    ):
        done = run("copy", tmp_path / "a.kvm", tmp_path / "d.kvm", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert what in done.stderr


def test_a_dry_run_shows_sizes_and_makes_nothing(tmp_path: Path) -> None:
    shape = ("--layers", 32, "--kv-heads", 8, "--head-dim", 128, "--capacity", 8192)
    done = run("create", tmp_path / "a.kvm", *shape, "--preset", "compact", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    first, header, *lines = done.stdout.splitlines()
    size = kvmmap.bytes_per_token(num_layers=32, num_kv_heads=8, head_dim=128, preset="compact")
    assert f"{size:,} bytes a token" in first
    assert header.split()[:3] == ["preset", "keys", "values"]
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert f"{size:,}" in lines[PRESETS.index("compact")].split()
    assert run("create", tmp_path / "a.kvm", *shape, "--preset", "huge", "--dry-run").returncode == 2
    assert run("create", tmp_path / "a.kvm", *shape[:-1], -1, "--dry-run").returncode == 2


def test_a_dry_run_takes_the_same_arguments_as_creating(tmp_path: Path) -> None:
    shape = ("--layers", 3, "--kv-heads", 2, "--head-dim", 64, "--capacity", 1000)

    def first_line(*more: Any) -> str:
        done = click_run("create", tmp_path / "new.kvm", *more, "--dry-run")
        assert done.exit_code == 0, done.stderr
        assert not (tmp_path / "new.kvm").exists()
        return str(done.stdout.splitlines()[0])

    plain = "456 bytes a token, 445 KiB when full with 1,000 positions"
    record = 24 + 2 * 2 * 2 * 64
    for more, slots in (((), 516), (("--recent-window", 64), 68), (("--recent-window", 0, "--sinks", 9), 9)):
        size = f"{3 * slots * record / 1024:.3g} KiB"
        assert f"{plain}, {size} in 16 bits besides; nothing was made" in first_line(*shape, "--preset", "small", *more)
    nothing = first_line(*shape, "--preset", "small", "--recent-window", 0, "--sinks", 0)
    assert f"{plain}; nothing was made" in nothing
    for wrong in (("--recent-window", -1), ("--recent-window", 65537), ("--sinks", -1), ("--sinks", 65537)):
        made, dry = (click_run("create", tmp_path / "new.kvm", *shape, *wrong, *more) for more in ((), ("--dry-run",)))
        assert (dry.exit_code, dry.stderr) == (made.exit_code, made.stderr)
        assert dry.exit_code == 2

    filled(tmp_path / "parent.kvm", key_codec="f16")
    with kvmmap.open(tmp_path / "parent.kvm") as parent:
        row = sum(layer.position_bytes for layer in parent.geometry.layers)
    assert f": {row:,} bytes a token" in first_line("--parent", tmp_path / "parent.kvm")
    for option in ("--recent-window", "--sinks", "--preset", "--key-codec"):
        done = click_run("create", tmp_path / "new.kvm", "--parent", tmp_path / "parent.kvm", option, 4)
        assert done.exit_code == 2
        assert f"{option} is the parent's" in done.stderr
    assert not (tmp_path / "new.kvm").exists()


def test_an_empty_name_of_a_codec_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "a.kvm")
    for option in ("--codec", "--key-codec", "--value-codec", "--preset"):
        done = click_run("copy", tmp_path / "a.kvm", tmp_path / "b.kvm", option, "")
        assert (done.exit_code, done.stdout) == (2, "")
        assert "there is no" in done.stderr
    assert not (tmp_path / "b.kvm").exists()
