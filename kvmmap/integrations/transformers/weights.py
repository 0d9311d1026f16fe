"""Weights: a digest of all that changes keys and values, and a cheap look at whether they are still what was digested.

The look compares each tensor's address and version, which modules there are, the adapters' settings, and a few words of
each tensor on the CPU: `.data` is edited without a trace in torch, but hardly without a change in any of these words.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ...errors import KvmmapError

_SAMPLES = 8  # words of 8 bytes that are looked at in each tensor

# The process's memory as words. Only words of tensors are read which have just told that they lie there.
# It begins behind the first page, as numpy takes address 0 for no memory.
_FIRST = 4096
_words: Any = (ctypes.c_uint64 * ((1 << 44) - _FIRST)).from_address(_FIRST)
_memory: NDArray[np.uint64] = np.frombuffer(_words, np.uint64)


def body_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the part of a model that makes keys and values, without wrappers and heads."""
    for name in ("_orig_mod", "module"):  # torch.compile's and DataParallel's
        model = getattr(model, name, model)
    if hasattr(model, "get_base_model"):  # peft's
        wrapper: Any = model
        model = wrapper.get_base_model()
    body = getattr(model, "base_model", model)
    return body if isinstance(body, torch.nn.Module) else model


class Weights:
    """What the weights of a model were at one moment."""

    def __init__(self, body: torch.nn.Module) -> None:
        self.digest: str | None = None
        self._modules = [(module._modules, dict(module._modules)) for module in body.modules() if module._modules]
        self._tensors: list[tuple[dict[str, Any], str]] = [
            (held, name)
            for module in body.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None and name not in module._non_persistent_buffers_set
        ]
        self._packed = [
            (vars(module), name)
            for module in body.modules()
            for name, value in vars(module).items()
            if isinstance(value, torch.ScriptObject)
        ]
        self._tuners = [module for _, module in tuners(body)]
        self._marks = self._look()
        self._words = self._places()
        self._sample = self._read()

    def unchanged(self) -> bool:
        """Whether the weights still look as they did then."""
        for held, children in self._modules:
            if held != children:
                return False
        try:
            return self._look() == self._marks and self._read() == self._sample
        except KeyError:
            return False

    def _look(self) -> list[Any]:
        tensors = [held[name] for held, name in self._tensors]
        marks: list[Any] = [(tensor.data_ptr(), _version(tensor)) for tensor in tensors]
        marks += [id(held[name]) for held, name in self._packed]
        marks += [_settings(module) for module in self._tuners]
        return marks

    def _places(self) -> np.ndarray[Any, np.dtype[np.intp]]:
        found = []
        for held, name in self._tensors:
            tensor = held[name]
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_quantized or tensor.is_sparse:
                continue
            words = tensor.numel() * tensor.element_size() // 8
            if tensor.is_cpu and tensor.is_contiguous() and words and tensor.data_ptr() % 8 == 0:
                steps = np.unique(np.linspace(0, words - 1, _SAMPLES).astype(np.intp))
                found.append((tensor.data_ptr() - _FIRST) // 8 + steps)
        return np.concatenate(found) if found else np.empty(0, np.intp)

    def _read(self) -> bytes:
        return bytes(_memory[self._words].tobytes())


_known: weakref.WeakKeyDictionary[torch.nn.Module, Weights] = weakref.WeakKeyDictionary()


def weights_of(model: torch.nn.Module) -> Weights:
    """Return what the weights of a model are: the same object as long as they have not changed."""
    body = body_of(model)
    known = _known.get(body)
    if known is None or not known.unchanged():
        known = _known[body] = Weights(body)
    return known


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Return a digest of all of a model's weights, XXH3 with 128 bits, in hex.

    It reads them all once, at memory speed; asked again for weights that have not changed, it is remembered. Adapters
    count as far as they are active, with their scale.

    Raises:
        KvmmapError: weights that have no bytes here (on the meta device, or of a kind torch can't show as bytes).
    """
    weights = weights_of(model)
    if weights.digest is None:
        weights.digest = _digest(body_of(model))
    return weights.digest


def _digest(body: torch.nn.Module) -> str:
    digest = xxhash.xxh3_128()
    found = list(tuners(body))
    seen = set()
    for name, value in body.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and id(value) in seen:  # tied
            continue
        seen.add(id(value))
        if all(_counts(name, prefix, tuner) for prefix, tuner in found):
            _add(digest, name.replace(".base_layer.", "."), value)
    for prefix, tuner in found:
        disabled, active, merged, scaling = _settings(tuner)
        if not disabled and not merged:
            digest.update(f"{prefix} {[(name, dict(scaling).get(name)) for name in active]}\n".encode())
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    """Add a value of a state dict: a tensor, or what packed parameters consist of."""
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _add(digest, f"{name}.{number}", item)
        return
    if not isinstance(value, torch.Tensor):
        if not isinstance(value, torch.dtype | int | float | str | None):
            raise KvmmapError(
                f"the weights can't be read to tell whose cache it is ({name} is a {type(value).__name__}): give "
                "fingerprint=, such as a digest of the weights' file"
            )
        if value is not None:
            digest.update(f"{name} {value}\n".encode())
        return
    try:
        tensor = value.detach()
        if hasattr(tensor, "__tensor_flatten__"):
            for inner in tensor.__tensor_flatten__()[0]:
                _add(digest, f"{name}.{inner}", getattr(tensor, inner))
            return
        if tensor.is_quantized:
            per_channel = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
            scales = tensor.q_per_channel_scales() if per_channel else torch.tensor(tensor.q_scale())
            points = tensor.q_per_channel_zero_points() if per_channel else torch.tensor(tensor.q_zero_point())
            _add(digest, name, [tensor.int_repr(), scales, points])
            return
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise KvmmapError(
            f"the weights can't be read to tell whose cache it is ({name}, {value.dtype} on {value.device}: "
            f"{error}): give fingerprint=, such as a digest of the weights' file"
        ) from error
    digest.update(data.data)


def tuners(body: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that peft has put adapters into, by name."""
    for name, module in body.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters"):
            yield name, module


def _settings(tuner: Any) -> tuple[bool, tuple[str, ...], tuple[str, ...], tuple[Any, ...]]:
    """What of an adapted module is no weight: is it disabled, which adapters are active and merged, their scales."""
    scaling = getattr(tuner, "scaling", None)
    return (
        bool(tuner.disable_adapters),
        tuple(tuner.active_adapters),
        tuple(getattr(tuner, "merged_adapters", ())),
        tuple(scaling.items()) if isinstance(scaling, dict) else (),
    )


def _counts(name: str, prefix: str, tuner: Any) -> bool:
    """Whether a weight takes part in what a model computes: not if it is an inactive adapter's, or a merged one's."""
    if not name.startswith(f"{prefix}."):
        return True
    part, _, rest = name[len(prefix) + 1 :].partition(".")
    if part not in tuner.adapter_layer_names:
        return True
    disabled, active, merged, _ = _settings(tuner)
    return not disabled and not merged and rest.partition(".")[0] in active


def _version(tensor: torch.Tensor) -> int:
    """torch's count of changes in place; a tensor made in inference mode has none, and is not changed outside of it."""
    return -1 if tensor.is_inference() else tensor._version
