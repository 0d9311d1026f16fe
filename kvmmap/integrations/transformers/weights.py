"""Weights: a digest of all that changes keys and values, and a cheap look at whether they are still what was digested.

The look compares each tensor's address and version, which modules there are and what they are set to (`behavior`), the
adapters' settings, and some of the bytes of tensors on the CPU (`memory`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import xxhash

from ...errors import KvmmapError
from .behavior import Behavior, changed_settings, state
from .frequencies import deviating, scalings, watched_buffers
from .memory import TensorBytes
from .randomness import RandomParts


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
        self.tables: str | None = None
        """A digest of buffers that are not saved with the weights, but for rotary frequencies, and of all numbers that
        modules hold. It is compared only within a process: two machines may compute tables differently in the last
        bit, and two releases of transformers may name numbers differently."""
        self.settings: dict[str, Any] = {}
        """Numbers and parts that its config does not give, by name; known once the digest is."""
        self.random = RandomParts(body)
        self._modules = [(module._modules, dict(module._modules)) for module in body.modules() if module._modules]
        named: list[tuple[dict[str, Any], str]] = [
            (held, name)
            for module in body.modules()
            for held, names in ((module._parameters, [*module._parameters]), (module._buffers, watched_buffers(module)))
            for name in names
        ]
        self._tensors = [(held, name) for held, name in named if held[name] is not None]
        self._absent = [(held, name) for held, name in named if held[name] is None]
        """Such as the bias of a layer without one, which may get one."""
        self._packed = [
            (vars(module), name)
            for module in body.modules()
            for name, value in vars(module).items()
            if isinstance(value, torch.ScriptObject)
        ]
        self._rotary = [module for module in body.modules() if scalings(module)]
        self._tuners = [module for _, module in tuners(body)]
        self._behavior = Behavior(body)
        self._marks = self._look()
        self._bytes = TensorBytes(held[name] for held, name in self._tensors)

    def unchanged(self, thorough: bool = False) -> bool:
        """Whether the weights still look as they did then; `thorough` looks at more of their bytes."""
        for held, children in self._modules:
            if held != children:
                return False
        if any(held.get(name) is not None for held, name in self._absent):
            return False
        try:
            return self._behavior.unchanged() and self._look() == self._marks and self._bytes.unchanged(thorough)
        except KeyError:
            return False

    def compute_digests(self, body: torch.nn.Module) -> None:
        """Compute the digests of everything."""
        self.tables = _digest_of_tables(body)
        self.settings = changed_settings(body)
        self._bytes.read_all()
        self.digest = _digest(body)

    def _look(self) -> list[Any]:
        tensors = [held[name] for held, name in self._tensors]
        marks: list[Any] = [tensor if tensor is None else (tensor.data_ptr(), _version(tensor)) for tensor in tensors]
        marks += [id(held[name]) for held, name in self._packed]
        marks += [scalings(module) for module in self._rotary]
        marks += [_settings(module) for module in self._tuners]
        return marks


_known: weakref.WeakKeyDictionary[torch.nn.Module, Weights] = weakref.WeakKeyDictionary()


def weights_of(model: torch.nn.Module, thorough: bool = False) -> Weights:
    """Return what the weights of a model are: the same object as long as no change is noticed.

    Args:
        model: the model.
        thorough: look at more of their bytes (`memory.THOROUGH`), for something less than a millisecond.
    """
    body = body_of(model)
    known = _known.get(body)
    if known is None or not known.unchanged(thorough):
        known = _known[body] = Weights(body)
    return known


def digested_weights(model: torch.nn.Module) -> Weights:
    """Return what the weights of a model are, with their digest; raises as `weights_fingerprint`."""
    weights = weights_of(model, thorough=True)
    if weights.digest is None:
        weights.compute_digests(body_of(model))
    return weights


def compared_weights(model: torch.nn.Module) -> Weights:
    """Return the weights that `weights_fingerprint` gave the digest of last, without another look.

    For a caller that has just compared that digest: a change since then is noticed at the next look, and refused. The
    weights as a look now would find them were compared with nothing.
    """
    return _known.get(body_of(model)) or weights_of(model)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Return a digest of all of a model's weights, XXH3 with 128 bits, in hex.

    It reads them all once, at memory speed; asked again, it is remembered as long as no change is noticed. Adapters
    count as far as they are active, with their scale; rotary frequencies, where they are not what the config says.

    Raises:
        KvmmapError: weights that have no bytes here (on the meta device, or of a kind torch can't show as bytes).
    """
    return str(digested_weights(model).digest)


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
    for name, value in deviating(body):
        _add(digest, name, value)
    return digest.hexdigest()


def _digest_of_tables(body: torch.nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for prefix, module in body.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            value = module._buffers.get(name)
            if value is not None and not value.is_meta and not name.endswith("inv_freq"):
                _add(digest, f"{prefix}.{name}", value)
    digest.update("\n".join(state(body)).encode())
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
