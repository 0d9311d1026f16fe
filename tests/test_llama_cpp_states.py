"""States of llama.cpp in and out: every type, kind, version and layout, byte by byte. llama.cpp itself is not
needed."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.llama_states import TYPES, TinyModel, TinyState, hadamard, halves

import kvmmap
from kvmmap.formats.llama_cpp.exporting import export_llama_cpp
from kvmmap.formats.llama_cpp.importing import import_llama_cpp

QUANTIZED = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


def there_and_back(state: TinyState, folder: Path, **options: Any) -> bytes:
    """Import a state, and export it again without saying what it was."""
    model = state.model.write(folder / "model.gguf")
    import_llama_cpp(state.build(), folder / "made.kvm", gguf=model, **options)
    export_llama_cpp(folder / "made.kvm", folder / "again.bin", gguf=model)
    return (folder / "again.bin").read_bytes()


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("key_type", TYPES)
def test_every_pair_of_types_comes_back_byte_by_byte(key_type: str, value_type: str, tmp_path: Path) -> None:
    state = TinyState(model=TinyModel(), key_type=key_type, value_type=value_type)
    assert there_and_back(state, tmp_path) == state.build()


@pytest.mark.parametrize("count", [1, 256, 257, 700])
@pytest.mark.parametrize("kv_heads", [2, [2, 4, 2]])
@pytest.mark.parametrize(("key_type", "value_type"), [("f16", "f16"), ("q8_0", "q8_0"), ("bf16", "q4_1")])
def test_few_and_many_cells_come_back(
    count: int, kv_heads: int | list[int], key_type: str, value_type: str, tmp_path: Path
) -> None:
    """Few are appended to all layers at once, many layer by layer; layers are alike, or not."""
    model = TinyModel(layers=3, kv_heads=kv_heads)
    state = TinyState(model=model, count=count, key_type=key_type, value_type=value_type)
    assert there_and_back(state, tmp_path) == state.build()


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("rotated", [True, False])
def test_every_head_dim_and_order_comes_back(head_dim: int, architecture: str, rotated: bool, tmp_path: Path) -> None:
    state = TinyState(model=TinyModel(architecture=architecture, head_dim=head_dim), key_type="q8_0", value_type="q5_1")
    assert there_and_back(state, tmp_path, rotated=rotated) == state.build()


LAYOUTS = [
    {"kind": kind, "version": version, "streams": streams, "stream": stream, "transposed": transposed}
    for (kind, version), (streams, stream), transposed in itertools.product(
        [("slot", 2), ("slot", 3), ("session", 9), ("session", 10), ("sequence", 0), ("context", 0)],
        [(0, 0), (1, 0), (3, 1)],
        [False, True],
    )
    if streams or version in (2, 9)
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
@pytest.mark.parametrize("extension", [0, 2, 3])
def test_every_layout_comes_back_byte_by_byte(layout: dict[str, Any], extension: int, tmp_path: Path) -> None:
    if extension == 2 and layout["version"] in (0, 3, 10):
        layout = layout | {"key_type": "bf16"}  # older builds' buffers had two numbers, too
    model = TinyModel(architecture="qwen2vl" if extension else "llama")
    state = TinyState(model=model, extension=extension, sequence=4, **layout)
    options = {} if layout["kind"] in ("slot", "session") or extension == 3 else {"token_ids": range(100, 107)}
    assert there_and_back(state, tmp_path, **options) == state.build()
    with kvmmap.open(tmp_path / "made.kvm") as cache:
        np.testing.assert_array_equal(cache.token_ids, range(100, 107))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("key_type", TYPES)
def test_rows_are_those_of_the_checkpoint(key_type: str, architecture: str, tmp_path: Path) -> None:
    """In its order, and with the rotation undone; by plain numpy."""
    state = TinyState(model=TinyModel(architecture=architecture, head_dim=128), key_type=key_type, value_type="q8_0")
    there_and_back(state, tmp_path)
    with kvmmap.open(tmp_path / "made.kvm") as cache:
        for number, layer in enumerate(cache.layers):
            keys = state.numbers(number, keys=True)
            if key_type in QUANTIZED:
                keys = hadamard(keys, 128)
            if architecture == "llama":
                keys = halves(keys)
            np.testing.assert_allclose(layer.read_keys(0, 7), keys, atol=2e-6)
            values = hadamard(state.numbers(number, keys=False), 64)
            np.testing.assert_allclose(layer.read_values(0, 7), values, atol=2e-6)


@pytest.mark.parametrize("preset", ["int8", "fidelity", "lossless"])
@pytest.mark.parametrize("key_type", ["f32", "f16", "q8_0"])
def test_presets_quantise_rows_of_the_checkpoint(preset: str, key_type: str, tmp_path: Path) -> None:
    state = TinyState(model=TinyModel(), key_type=key_type, value_type=key_type)
    again = there_and_back(state, tmp_path, preset=preset)
    assert len(again) == len(state.build())
    with kvmmap.open(tmp_path / "made.kvm") as cache:
        keys = state.numbers(0, keys=True)
        expected = halves(hadamard(keys, 64) if key_type == "q8_0" else keys)
        np.testing.assert_allclose(cache.layers[0].read_keys(0, 7), expected, atol=0.03)
        assert cache.layers[0].geometry.key_codec.name != key_type


@pytest.mark.parametrize(("tokens", "known"), [([], 0), ([5] * 7, 7), ([5] * 9, 7), ([5] * 4, 4)])
def test_tokens_may_be_fewer_or_more_than_cells(tokens: list[int], known: int, tmp_path: Path) -> None:
    state = TinyState(model=TinyModel(), tokens=tokens)
    again = there_and_back(state, tmp_path)
    with kvmmap.open(tmp_path / "made.kvm") as cache:
        assert cache.token_len == known
    assert again == state.build() or len(tokens) == 4  # fewer tokens than cells are not written


def test_cells_in_another_order_are_sorted(tmp_path: Path) -> None:
    state = TinyState(model=TinyModel(), key_type="q8_0", order=[3, 4, 5, 6, 0, 1, 2])
    sorted_state = TinyState(model=TinyModel(), key_type="q8_0")
    assert there_and_back(state, tmp_path) == sorted_state.build()
    shuffled = TinyState(model=TinyModel(), order=[3, 1, 5, 6, 0, 4, 2], transposed=True)
    (tmp_path / "made.kvm").unlink()
    (tmp_path / "again.bin").unlink()
    assert there_and_back(shuffled, tmp_path) == TinyState(model=TinyModel(), transposed=True).build()


def test_an_old_session_with_outputs_is_read(tmp_path: Path) -> None:
    state = TinyState(model=TinyModel(), kind="session", version=9, streams=0, outputs=True)
    again = there_and_back(state, tmp_path)
    assert again == TinyState(model=TinyModel(), kind="session", version=9, streams=0).build()


def test_layers_may_differ_in_heads(tmp_path: Path) -> None:
    state = TinyState(model=TinyModel(kv_heads=[1, 4]), key_type="q8_0", value_type="f16")
    assert there_and_back(state, tmp_path) == state.build()


def test_many_positions(tmp_path: Path) -> None:
    """More than are converted at once."""
    model = TinyModel(layers=1, kv_heads=1, embedding=128)
    state = TinyState(model=model, count=5000, key_type="q8_0", value_type="f16", transposed=True)
    assert there_and_back(state, tmp_path) == state.build()


def several_sequences(model: TinyModel) -> bytes:
    """A context whose first two cells belong to two sequences, and the third to one of them."""
    state = TinyState(model=model, count=3, kind="context")
    cells = b"".join(struct.pack("<iIii", position, 2, 0, 1) for position in (0, 1)) + struct.pack("<iIi", 2, 1, 1)
    whole = state.build()
    start = whole.index(struct.pack("<II", 1, 3)) + 8
    return whole[:start] + cells + whole[start + 36 :]


def test_one_of_several_sequences_is_chosen(tmp_path: Path) -> None:
    model = TinyModel()
    path = model.write(tmp_path / "model.gguf")
    with pytest.raises(kvmmap.UnsupportedModelError, match="several sequences \\(0, 1\\)"):
        import_llama_cpp(several_sequences(model), tmp_path / "made.kvm", gguf=path)
    for sequence, length in ((0, 2), (1, 3)):
        import_llama_cpp(several_sequences(model), tmp_path / f"{sequence}.kvm", gguf=path, sequence=sequence)
        with kvmmap.open(tmp_path / f"{sequence}.kvm") as cache:
            assert cache.seq_len == length
            keys = halves(TinyState(model=model, count=3, kind="context").numbers(0, keys=True))
            np.testing.assert_array_equal(cache.layers[0].read_keys(0, length), keys[:length])


REFUSED = {
    "a newer slot": (TinyState(model=TinyModel(), version=4).build(), kvmmap.VersionMismatchError, "version 4"),
    "a newer session": (
        TinyState(model=TinyModel(), kind="session", version=11).build(),
        kvmmap.VersionMismatchError,
        "version 11",
    ),
    "an older slot": (TinyState(model=TinyModel(), version=1).build(), kvmmap.VersionMismatchError, "reads 2 and 3"),
    "no state": (b"GGUFxxxxxxxxxxx", kvmmap.NotACacheError, "a GGUF file, the model itself"),
    "text": (b"hello, world" * 9, kvmmap.NotACacheError, "neither a slot's nor a session's"),
    "nothing": (b"", kvmmap.NotACacheError, "ends at byte 0"),
    "an empty sequence": (TinyState(model=TinyModel(), count=0).build(), kvmmap.NotACacheError, "is empty"),
    "cut": (TinyState(model=TinyModel()).build()[:-5], kvmmap.NotACacheError, "ends at byte"),
    "longer": (TinyState(model=TinyModel()).build() + b"12345", kvmmap.NotACacheError, "5 bytes follow"),
    "other heads": (TinyState(model=TinyModel(kv_heads=4)).build(), kvmmap.ModelMismatchError, "512 bytes a position"),
    "other layers": (TinyState(model=TinyModel(layers=3)).build(), kvmmap.ModelMismatchError, "3 layers"),
    "another architecture": (
        TinyState(model=TinyModel(architecture="qwen2"), kind="session", version=10).build(),
        kvmmap.ModelMismatchError,
        "'qwen2'",
    ),
    "multimodal": (
        TinyState(model=TinyModel(), tokens=[-1, 5, 6]).build(),
        kvmmap.UnsupportedModelError,
        "packed with images",
    ),
    "shifted": (
        TinyState(model=TinyModel(), order=[0, 1, 2, 3, 4, 5, 6])
        .build()
        .replace(struct.pack("<iIi", 6, 1, 0), struct.pack("<iIi", 9, 1, 0)),
        kvmmap.UnsupportedModelError,
        "go from 0 to 9",
    ),
    "one position twice": (
        TinyState(model=TinyModel()).build().replace(struct.pack("<iIi", 6, 1, 0), struct.pack("<iIi", 5, 1, 0)),
        kvmmap.UnsupportedModelError,
        "one position",
    ),
    "another type": (
        TinyState(model=TinyModel()).build().replace(struct.pack("<iQ", 1, 256), struct.pack("<iQ", 20, 256), 1),
        kvmmap.DtypeError,
        "iq4_nl",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, kind, message = REFUSED[name]
    path = TinyModel().write(tmp_path / "model.gguf")
    (tmp_path / "state.bin").write_bytes(data)
    for state in (data, tmp_path / "state.bin"):
        with pytest.raises(kind, match=message):
            import_llama_cpp(state, tmp_path / "made.kvm", gguf=path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.gguf", "state.bin"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TinyModel(architecture="mamba2"), "is recurrent"),
        (TinyModel(architecture="nomic-bert"), "keeps no keys and values of it"),
        (TinyModel(architecture="t5"), "has an encoder"),
        (TinyModel(architecture="qwen35"), "is a hybrid"),
        (TinyModel(architecture="jamba"), "is a hybrid"),
        (TinyModel(architecture="deepseek2"), "latent attention"),
        (TinyModel(architecture="deepseek32"), "an indexer"),
        (TinyModel(architecture="gemma3", more={"attention.sliding_window": 512}), "sliding windows"),
        (TinyModel(architecture="made-up"), "order"),
        (TinyModel(kv_heads=[2, 0]), "no keys and values of its own"),
        (TinyModel(more={"rope.dimension_count": 16}), "16 of 64"),
    ],
    ids=lambda value: value.architecture if isinstance(value, TinyModel) else None,
)
def test_models_whose_states_have_other_parts_are_refused(model: TinyModel, message: str, tmp_path: Path) -> None:
    path = model.write(tmp_path / "model.gguf")
    with pytest.raises(kvmmap.UnsupportedModelError, match=message):
        import_llama_cpp(TinyState(model=TinyModel()).build(), tmp_path / "made.kvm", gguf=path)


def test_split_models_are_read_as_whole_ones(tmp_path: Path) -> None:
    """All parts tell whose states they are, and the first one is given."""
    state = TinyState(model=TinyModel())
    whole = state.model.write(tmp_path / "model.gguf")
    first = state.model.write(tmp_path / "a model\nin parts.gguf", split=1)
    parts = sorted(tmp_path.glob("a model*.gguf"))
    assert len(parts) == 4
    import_llama_cpp(state.build(), tmp_path / "made.kvm", gguf=first)
    export_llama_cpp(tmp_path / "made.kvm", tmp_path / "again.bin", gguf=whole)
    assert (tmp_path / "again.bin").read_bytes() == state.build()
    with pytest.raises(kvmmap.NotACacheError, match="part 2 of a model of 4 parts"):
        import_llama_cpp(state.build(), tmp_path / "second.kvm", gguf=parts[1])
    other = TinyModel(seed=3).write(tmp_path / "other.gguf", split=1)
    norms = other.with_name(other.name.replace("00001-of", "00003-of"))
    parts[2].write_bytes(norms.read_bytes())
    with pytest.raises(kvmmap.ModelMismatchError, match="another model"):
        export_llama_cpp(tmp_path / "made.kvm", tmp_path / "third.bin", gguf=first)
    parts[3].unlink()
    with pytest.raises(kvmmap.CacheNotFoundError, match="00004-of-00004"):
        import_llama_cpp(state.build(), tmp_path / "third.kvm", gguf=first)
    (tmp_path / "renamed.gguf").write_bytes(first.read_bytes())
    with pytest.raises(kvmmap.NotACacheError, match="ends with -00001-of-00004"):
        import_llama_cpp(state.build(), tmp_path / "third.kvm", gguf=tmp_path / "renamed.gguf")


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    path = TinyModel(weights=False).write(tmp_path / "vocab.gguf")
    with pytest.raises(kvmmap.NotACacheError, match="no weights"):
        import_llama_cpp(TinyState(model=TinyModel()).build(), tmp_path / "made.kvm", gguf=path)


@pytest.mark.parametrize("seed", range(int(os.environ.get("KVMMAP_MUTATIONS", "4"))))
def test_mutated_states_and_models_give_typed_errors(seed: int, tmp_path: Path) -> None:
    """Each of 40 changes of a state, and of its model, is read as something, or refused as documented."""
    random = np.random.default_rng([7, seed])
    types, kinds = list(TYPES), [("slot", 2), ("slot", 3), ("session", 9), ("session", 10), ("sequence", 0)]
    kind, version = kinds[random.integers(len(kinds))]
    key_type, value_type = (types[random.integers(len(types))] for _ in range(2))
    architecture, extension = [("llama", 0), ("qwen2vl", 3)][random.integers(2)]
    state = TinyState(
        model=TinyModel(architecture=architecture),
        kind=kind,
        version=version,
        key_type=key_type,
        value_type=value_type,
        extension=extension,
        outputs=kind == "session" and version == 9,
    )
    model, data = state.model.write(tmp_path / "model.gguf"), state.build()
    header = model.read_bytes()
    for number in range(40):
        if number % 4 == 3:
            (tmp_path / "broken.gguf").write_bytes(mutated(header, random, 1200))
            pair = data, tmp_path / "broken.gguf"
        else:
            pair = mutated(data, random, 400 if random.integers(4) else len(data)), model
        target = tmp_path / "made.kvm"
        with contextlib.suppress(kvmmap.KvmmapError):
            import_llama_cpp(pair[0], target, gguf=pair[1], overwrite=True)
            with kvmmap.open(target) as cache:
                assert cache.verify().sound
            export_llama_cpp(target, tmp_path / "again.bin", gguf=pair[1], overwrite=True)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"model.gguf", "broken.gguf", "made.kvm", "again.bin"}


def mutated(data: bytes, random: np.random.Generator, within: int) -> bytes:
    """Change some of the first bytes: cut, insert, or put numbers that are extreme for their place."""
    made, within = bytearray(data), min(within, len(data))
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(within))
        match random.integers(5):
            case 0:
                del made[at:]
            case 1:
                made[at:at] = random.bytes(random.integers(1, 9))
            case 2:
                del made[at : at + int(random.integers(1, 9))]
            case 3:
                extreme = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(data)][random.integers(6)]
                made[at : at + 4] = struct.pack("<I", extreme)
            case _:
                made[at : at + 1] = random.bytes(1)
    return bytes(made)


def test_the_order_of_an_unknown_architecture_can_be_given(tmp_path: Path) -> None:
    model = TinyModel(architecture="made-up")
    path = model.write(tmp_path / "model.gguf")
    state = TinyState(model=model)
    import_llama_cpp(state.build(), tmp_path / "made.kvm", gguf=path, order="halves")
    with kvmmap.open(tmp_path / "made.kvm") as cache:
        np.testing.assert_array_equal(cache.layers[0].read_keys(0, 7), state.numbers(0, keys=True))


def test_layers_of_a_draft_head_are_not_in_states(tmp_path: Path) -> None:
    model = TinyModel(layers=3, more={"nextn_predict_layers": 1})
    path = model.write(tmp_path / "model.gguf")
    import_llama_cpp(TinyState(model=TinyModel(layers=2)).build(), tmp_path / "made.kvm", gguf=path)


def test_another_model_is_refused_on_the_way_out(tmp_path: Path) -> None:
    state = TinyState(model=TinyModel())
    there_and_back(state, tmp_path)
    other = TinyModel(seed=5).write(tmp_path / "other.gguf")
    with pytest.raises(kvmmap.ModelMismatchError, match="another model"):
        export_llama_cpp(tmp_path / "made.kvm", tmp_path / "other.bin", gguf=other)
    with pytest.raises(kvmmap.ShapeMismatchError):
        export_llama_cpp(
            tmp_path / "made.kvm", tmp_path / "other.bin", gguf=TinyModel(kv_heads=4).write(tmp_path / "third.gguf")
        )
    assert not (tmp_path / "other.bin").exists()


def test_other_weights_of_the_same_model_are_accepted_by_name(tmp_path: Path) -> None:
    """Norms are the same whatever the weights' type, and tell which model it is."""
    state = TinyState(model=TinyModel())
    there_and_back(state, tmp_path)
    with kvmmap.open(tmp_path / "made.kvm", "a") as cache:
        notes = cache.metadata
        cache.metadata = notes | {"portable": notes["portable"] | {"weights": "bfloat16"}}
        cache.model = kvmmap.ModelInfo(name="of a checkpoint", fingerprint="0123")
    model = tmp_path / "model.gguf"
    with pytest.raises(kvmmap.ModelMismatchError, match="accept_weights='bfloat16'"):
        export_llama_cpp(tmp_path / "made.kvm", tmp_path / "other.bin", gguf=model)
    export_llama_cpp(tmp_path / "made.kvm", tmp_path / "other.bin", gguf=model, accept_weights="bfloat16")
    assert (tmp_path / "other.bin").read_bytes() == state.build()


def test_other_forms_are_exported(tmp_path: Path) -> None:
    """A state of f16 as another kind, and of other types."""
    state = TinyState(model=TinyModel())
    there_and_back(state, tmp_path)
    model = tmp_path / "model.gguf"
    export_llama_cpp(tmp_path / "made.kvm", tmp_path / "b", gguf=model, kind="sequence")
    assert (tmp_path / "b").read_bytes() == TinyState(model=TinyModel(), kind="sequence").build()
    export_llama_cpp(tmp_path / "made.kvm", tmp_path / "c", gguf=model, kind="session", version=9, transposed=True)
    expected = TinyState(model=TinyModel(), kind="session", version=9, transposed=True)
    assert (tmp_path / "c").read_bytes() == expected.build()
    export_llama_cpp(tmp_path / "made.kvm", tmp_path / "d", gguf=model, key_type="q8_0", value_type="q4_1")
    import_llama_cpp(tmp_path / "d", tmp_path / "d.kvm", gguf=model)
    with kvmmap.open(tmp_path / "d.kvm") as cache:
        np.testing.assert_allclose(cache.layers[1].read_keys(0, 7), halves(state.numbers(1, keys=True)), atol=0.03)
        np.testing.assert_allclose(cache.layers[1].read_values(0, 7), state.numbers(1, keys=False), atol=0.4)
    for wrong in ({"kind": "disk"}, {"version": 1}, {"key_type": "q3"}, {"value_type": "q8_0", "transposed": True}):
        with pytest.raises(kvmmap.KvmmapError, match="no such state"):
            export_llama_cpp(tmp_path / "made.kvm", tmp_path / "e", gguf=model, **wrong)  # type: ignore[arg-type]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    state = TinyState(model=TinyModel())
    there_and_back(state, tmp_path)
    model = tmp_path / "model.gguf"
    with pytest.raises(kvmmap.CacheExistsError):
        export_llama_cpp(tmp_path / "made.kvm", tmp_path / "again.bin", gguf=model)
    export_llama_cpp(tmp_path / "made.kvm", tmp_path / "again.bin", gguf=model, overwrite=True)
    with pytest.raises(kvmmap.CacheExistsError):
        import_llama_cpp(tmp_path / "again.bin", tmp_path / "made.kvm", gguf=model)
    with pytest.raises(kvmmap.CacheNotFoundError):
        export_llama_cpp(tmp_path / "made.kvm", tmp_path / "none" / "again.bin", gguf=model)


@pytest.mark.parametrize("what", ["missing", "folder", "state", "cut"])
def test_bad_gguf_files_are_refused(what: str, tmp_path: Path) -> None:
    state = TinyState(model=TinyModel()).build()
    path = tmp_path / "model.gguf"
    if what == "folder":
        path.mkdir()
    elif what == "state":
        path.write_bytes(state)
    elif what == "cut":
        whole = TinyModel().write(path).read_bytes()
        path.write_bytes(whole[:200])
    with pytest.raises((kvmmap.NotACacheError, kvmmap.CacheNotFoundError, OSError)):
        import_llama_cpp(state, tmp_path / "made.kvm", gguf=path)


def test_attention_in_place_over_kept_blocks(tmp_path: Path) -> None:
    """Blocks of q8_0, rotated and in pairs, give the attention of the rows that they stand for."""
    state = TinyState(model=TinyModel(), key_type="q8_0", value_type="q8_0", count=40)
    there_and_back(state, tmp_path)
    queries = np.random.default_rng(5).standard_normal((3, 4, 64)).astype(np.float32)
    with kvmmap.open(tmp_path / "made.kvm") as cache:
        layer = cache.layers[0]
        plain = kvmmap.QuantizedKvLayer(64, 2, 64, key_codec="f32", value_codec="f32")
        plain.extend(layer.read_keys(0, 40), layer.read_values(0, 40))
        np.testing.assert_allclose(layer.attend(queries), plain.attend(queries), atol=1e-5)
        assert cache.verify().sound


GOLDEN = Path(__file__).parent / "golden"


def test_states_that_llama_cpp_has_written(tmp_path: Path) -> None:
    """Committed slot files of the real program: the same bytes come back, and f16 and rotated q8_0 mean the same."""
    model = TinyModel(layers=30, heads=9, kv_heads=3, embedding=576).write(tmp_path / "model.gguf")
    rows = {}
    for name in ("f16", "q8_0"):
        state = GOLDEN / f"llama-{name}.slot"
        kvmmap.import_llama_cpp(state, tmp_path / f"{name}.kvm", gguf=model)
        kvmmap.export_llama_cpp(tmp_path / f"{name}.kvm", tmp_path / name, gguf=model)
        assert (tmp_path / name).read_bytes() == state.read_bytes()
        with kvmmap.open(tmp_path / f"{name}.kvm") as cache:
            assert len(cache.token_ids) == 2
            rows[name] = np.stack([[layer.read_keys(0, 2), layer.read_values(0, 2)] for layer in cache.layers])
    for part in (0, 1):
        error = np.linalg.norm(rows["q8_0"][:3, part] - rows["f16"][:3, part]) / np.linalg.norm(rows["f16"][:3, part])
        assert error < 0.02


@pytest.mark.parametrize("key_type", ["f32", "f16", "bf16", "q8_0", "q4_1"])
def test_rows_with_a_nan_are_refused(key_type: str, tmp_path: Path) -> None:
    state = TinyState(model=TinyModel(), key_type=key_type)
    path = state.model.write(tmp_path / "model.gguf")
    data, raw = bytearray(state.build()), state.rows(1, keys=True).tobytes()
    where = bytes(data).index(raw)
    data[where : where + 4] = b"\xff" * 4  # a NaN in each of the formats, and as a scale
    for preset in ("native", "int8"):
        with pytest.raises(kvmmap.NonFiniteError):
            import_llama_cpp(bytes(data), tmp_path / "made.kvm", gguf=path, preset=preset)
    assert not (tmp_path / "made.kvm").exists()


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = TinyModel(layers=1)
    state = TinyState(model=model, key_type="f32")
    path = model.write(tmp_path / "model.gguf")
    data, raw = bytearray(state.build()), state.rows(0, keys=True).tobytes()
    where = bytes(data).index(raw)
    data[where + 512 : where + 516] = struct.pack("<f", 1e30)  # of position 1
    import_llama_cpp(bytes(data), tmp_path / "made.kvm", gguf=path)
    for key_type in ("f16", "q8_0", "q4_0", "q5_1"):
        with pytest.raises(kvmmap.NonFiniteError, match="position 1 of layer 0, head 0"):
            export_llama_cpp(tmp_path / "made.kvm", tmp_path / "a.bin", gguf=path, key_type=key_type)
    export_llama_cpp(tmp_path / "made.kvm", tmp_path / "a.bin", gguf=path)
    assert (tmp_path / "a.bin").read_bytes() == bytes(data)
