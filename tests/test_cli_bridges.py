"""`kvmmap import` and `kvmmap export` with other programs' files."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.llama_states import TinyModel, TinyState
from kvmmap_cli.main import kvmmap as group

import kvmmap


def invoke(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(group, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output + str(done.exception)
    return done.output


@pytest.fixture
def state(tmp_path: Path) -> TinyState:
    made = TinyState(model=TinyModel(), key_type="q8_0", value_type="q8_0")
    made.model.write(tmp_path / "model.gguf")
    (tmp_path / "slot.bin").write_bytes(made.build())
    return made


def test_a_slot_goes_through_a_cache(state: TinyState, tmp_path: Path) -> None:
    model, slot, cache = (tmp_path / name for name in ("model.gguf", "slot.bin", "prompt.kvm"))
    assert "made of" in invoke("import", slot, cache, "--gguf", model)
    assert "written" in invoke("export", cache, tmp_path / "again.bin", "--gguf", model)
    assert (tmp_path / "again.bin").read_bytes() == slot.read_bytes()
    invoke(
        "export", cache, tmp_path / "f16.bin", "--gguf", model, "--kv-type", "f16", "--transposed", "--state", "session"
    )
    invoke("import", tmp_path / "f16.bin", tmp_path / "int8.kvm", "--gguf", model, "--preset", "int8", "--capacity", 99)
    with kvmmap.open(tmp_path / "int8.kvm") as made:
        assert (made.seq_len, made.capacity) == (7, 99)
        assert made.layers[0].geometry.key_codec.name == "int8"
    other = TinyModel(seed=3).write(tmp_path / "other.gguf")
    assert "another model" in " ".join(invoke("export", cache, tmp_path / "x", "--gguf", other, code=2).split())
    assert "sequence 4" in " ".join(
        invoke("import", slot, tmp_path / "y.kvm", "--gguf", model, "--sequence", 4, code=2).split()
    )


def test_a_prompt_cache_of_mlx(state: TinyState, tmp_path: Path) -> None:
    invoke("import", tmp_path / "slot.bin", tmp_path / "a.kvm", "--gguf", tmp_path / "model.gguf")
    invoke("export", tmp_path / "a.kvm", tmp_path / "a.safetensors", "--mlx", "--dtype", "f16")
    invoke("import", tmp_path / "a.safetensors", tmp_path / "b.kvm", "--mlx")
    with kvmmap.open(tmp_path / "b.kvm") as cache:
        assert cache.seq_len == 7
        assert cache.token_ids.tolist() == list(range(100, 107))


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "slot.bin", "x.kvm", "--sequence", 1),
        ("import", "slot.bin", "x.kvm", "--no-rotation"),
        ("import", "slot.bin", "x.kvm", "--preset", "int8"),
        ("import", "slot.bin", "x.kvm", "--gguf", "model.gguf", "--mlx"),
        ("export", "a.kvm", "x.bin", "--state", "slot"),
        ("export", "a.kvm", "x.bin", "--kv-type", "f16"),
        ("export", "a.kvm", "x.bin", "--gguf", "model.gguf", "--stop", 3),
        ("export", "a.kvm", "x.bin", "--gguf", "model.gguf", "--mlx"),
        ("export", "a.kvm", "x.safetensors", "--mlx", "--dtype", "int8"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_options_that_do_not_go_together(
    arguments: tuple[object, ...], state: TinyState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--help tells more" in invoke(*arguments, code=2)
    assert not list(tmp_path.glob("x.*"))
