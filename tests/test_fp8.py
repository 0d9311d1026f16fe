"""Layers and caches of 8-bit floats: codes are those of OCP's OFP8, as ml_dtypes has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import kvmmap

FORMS: dict[str, Any] = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("form", FORMS)
def test_codes_without_scales_are_the_numbers(form: Any) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 2, 12), np.float32)
    layer = kvmmap.Fp8KvLayer(20, 2, 12, form=form, scaled=False)
    layer.extend(rows, -rows)
    expected = rows.astype(FORMS[form])
    found = layer.read_quantized()
    np.testing.assert_array_equal(found[0], expected.view(np.uint8))
    np.testing.assert_array_equal(layer.read_keys(), expected.astype(np.float32))
    np.testing.assert_array_equal(layer.read_values(), -expected.astype(np.float32))
    rows[3, 1, 5] = 1e6
    with pytest.raises(kvmmap.NonFiniteError, match="beyond"):
        layer.__class__(20, 2, 12, form=form, scaled=False).extend(rows, rows)


@pytest.mark.parametrize("form", FORMS)
def test_with_scales_any_row_fits(form: Any) -> None:
    rows = np.random.default_rng(1).standard_normal((20, 2, 12), np.float32) * np.float32(1e6)
    layer = kvmmap.Fp8KvLayer(20, 2, 12, 8, form=form)
    layer.push(rows[0], rows[0, :, :8])
    assert np.abs(layer.read_keys()[0] - rows[0]).max() < 0.07 * np.abs(rows[0]).max()


def test_a_cache_is_copied_to_a_file(tmp_path: Path) -> None:
    rows = np.random.default_rng(2).standard_normal((2, 30, 2, 16), np.float32)
    with kvmmap.Fp8KvCache(2, 64, 2, 16, form="e5m2") as cache:
        cache.extend(rows, rows)
        kvmmap.copy(cache, tmp_path / "a.kvm")
        with kvmmap.open(tmp_path / "a.kvm") as copied:
            assert {layer.geometry.key_codec.name for layer in copied.layers} == {"fp8-e5m2-scaled"}
            for mine, other in zip(cache.layers, copied.layers, strict=True):
                np.testing.assert_array_equal(mine.read_values(), other.read_values())


@pytest.mark.parametrize("make", [kvmmap.Fp8KvLayer, lambda *shape, **more: kvmmap.Fp8KvCache(1, *shape, **more)])
def test_other_forms_are_refused(make: Any) -> None:
    with pytest.raises(kvmmap.DtypeError, match="no form 'e3m4'"):
        make(4, 1, 8, form="e3m4")
