"""How a model's own code attends, read from its source: whether the layers of a cache may stand in for tensors.

transformers has no flag for it: `set_attn_implementation` accepts every model whose file mentions the attention
interface at all, also where the layers that use the cache compute attention themselves. So this module looks at the
functions that update a cache: what they do with the keys and values that `update` returns. Knows no caches, no tensors.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal

Attends = Literal["interface", "tensors", "own"]
"""What a model does with the keys and values that a cache's `update` returns: it passes them to the attention interface
and does nothing else with them; it uses them besides, or passes arguments that attention in place does not know; or it
computes attention itself, or relies on a mask, and gets masks as "eager" has them."""

_ORDER: tuple[Attends, ...] = ("interface", "tensors", "own")

IN_PLACE = frozenset({"dropout", "scaling", "softcap", "s_aux", "attention_mask", "key", "query", "value"})
"""Arguments of the attention interface that attention in place computes with."""

HARMLESS = frozenset(
    {
        "deterministic",
        "is_causal",  # what kind of mask was made is known
        "max_length_k",
        "max_length_q",
        "output_attentions",  # refused where it is asked for
        "position_ids",
        "sliding_window",  # the layer knows its own, and the mask was made for that
    }
)
"""Arguments of the attention interface that change nothing in what is computed here."""


def attends(config: Any) -> Attends:
    """Return how the model of a config attends; "interface" where its source is not known.

    Args:
        config: of the part of the model that has the layers. Its modeling module is looked for beside its own.
    """
    return _attends(_source(config))


def masks_windows(config: Any) -> bool:
    """Return whether the model of a config ever asks for a mask with a window; True where its source is not known.

    Args:
        config: as for `attends`.
    """
    source = _source(config)
    return not source or "sliding_window_causal_mask" in source or "create_masks_for_generate" in source


def images_see_both_ways(config: Any) -> bool:
    """Return whether tokens of one image attend to one another in both directions.

    Args:
        config: of the whole model.
    """
    text = config.get_text_config(decoder=True)
    if text.model_type.startswith("gemma4"):
        return getattr(text, "use_bidirectional_attention", None) == "vision"
    source = _source(config)
    return "token_type_ids_mask_function" in source or "block_sequence_ids" in source


def source_known(config: Any) -> bool:
    """Return whether the code of a config's model is loaded, and so known.

    Args:
        config: as for `attends`.
    """
    return bool(_source(config))


_MODULES = {"blip_text_model": "modeling_blip_text"}
"""Modeling modules that are not named after that of the config."""


def _source(config: Any) -> str:
    """The source of a config's modeling module, if that is loaded."""
    folder, _, module = type(config).__module__.rpartition(".")
    module = _MODULES.get(getattr(config, "model_type", ""), module.replace("configuration_", "modeling_", 1))
    return _source_of(f"{folder}.{module}")


def _source_of(name: str) -> str:
    found = _sources.get(name, "")
    if not found and name in sys.modules:
        try:
            found = _sources[name] = inspect.getsource(sys.modules[name])
        except (OSError, TypeError):
            found = _sources[name] = ""
    return found


_sources: dict[str, str] = {}


@cache
def _attends(source: str) -> Attends:
    """Parse a module: once a process, some 20 ms."""
    nodes = list(ast.walk(ast.parse(source)))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
    uses = (use for function in functions for use in _uses(function))
    found: Attends = max(uses, key=_ORDER.index, default="interface")
    return "own" if found == "interface" and _causal_by_mask(nodes) else found


def _causal_by_mask(nodes: Iterable[ast.AST]) -> bool:
    """Whether layers of a decoder attend with modules that are causal by their mask alone: they always need one."""
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    plain = set()
    for name, made in classes.items():
        init = next((one for one in made.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
        arguments = init.args.args if init is not None else []
        defaults = init.args.defaults if init is not None else []
        given = zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
        if any(one.arg == "is_causal" and getattr(value, "value", None) is False for one, value in given):
            plain.add(name)
    calls = [
        node.value
        for name, made in classes.items()
        if name.endswith("DecoderLayer")
        for node in ast.walk(made)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _is_self_attention(node.targets[0])
    ]
    return any(
        isinstance(call.func, ast.Name)
        and call.func.id in plain
        and "is_causal" not in {word.arg for word in call.keywords}
        for call in calls
    )


def _is_self_attention(target: ast.AST) -> bool:
    return isinstance(target, ast.Attribute) and target.attr == "self_attn"


def _uses(function: ast.FunctionDef) -> Iterator[Attends]:
    """What a function does with each pair of keys and values that it gets from a cache."""
    nodes = list(_outside_eager(function))
    updates = [(node, names) for node in nodes if isinstance(node, ast.Assign) and (names := _updated(node))]
    if not updates:
        return
    interfaces = set(_assigned_from(nodes, "ALL_ATTENTION_FUNCTIONS"))
    calls = [
        node
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in interfaces
    ]
    words = {word.arg for call in calls for word in call.keywords if word.arg is not None}
    # What may stand where keys and values stand: arguments of the interface, and what is only kept for other layers.
    passed = {id(one) for call in calls for one in (*call.args, *(word.value for word in call.keywords))}
    passed |= {
        id(one)
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
        for one in ast.walk(node.value)
    }
    for update, names in updates:
        used = any(
            isinstance(node, ast.Name)
            and node.id in names
            and node.lineno > (update.end_lineno or 0)
            and id(node) not in passed
            for node in nodes
        )
        if not calls:
            yield "own"
        else:
            yield "tensors" if used or words - IN_PLACE - HARMLESS else "interface"


def _outside_eager(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """A function's nodes, but for branches that only the implementation "eager" takes."""
    eager = set(_assigned_from(ast.walk(function), "eager"))
    left: list[ast.AST] = [function]
    while left:
        node = left.pop()
        yield node
        if isinstance(node, ast.If) and any(
            isinstance(one, ast.Name) and one.id in eager for one in ast.walk(node.test)
        ):
            left += node.orelse
        else:
            left += ast.iter_child_nodes(node)


def _assigned_from(nodes: Iterable[ast.AST], mentioned: str) -> Iterator[str]:
    """Names that are assigned an expression in which a name or a string occurs."""
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            inner = ast.walk(node.value)
            if isinstance(target, ast.Name) and any(
                (isinstance(one, ast.Name) and one.id == mentioned)
                or (isinstance(one, ast.Constant) and one.value == mentioned)
                for one in inner
            ):
                yield target.id


def _updated(node: ast.Assign) -> set[str]:
    """The names of keys and values in `keys, values = cache.update(keys, values, layer)`."""
    call, target = node.value, node.targets[0]
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.func.attr != "update":
        return set()
    if not isinstance(target, ast.Tuple):
        return set()
    return {name.id for name in target.elts if isinstance(name, ast.Name)}
