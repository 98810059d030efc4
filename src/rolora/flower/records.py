"""From Flower's records to ours: an adapter, an update, and metrics that may be averaged.

Everything in a reply is checked. flwr is not imported: only the records' methods are used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Failure, Update, layer_of, role_of
from rolora.errors import ConfigError, one_line, printable

# below this a count times a float32 value is exact in float64; no client has so many rows
MOST_EXAMPLES = 2**29 - 1


def adapter_in(arrays: Any) -> AdapterState:
    """The adapter in an ArrayRecord. Every layer gets scaling 1, since a record has none.

    Raises ConfigError unless the arrays are pairs of LoRA matrices, and a head, by PEFT's names.
    """
    tensors = arrays.to_torch_state_dict()
    if fault := _unfit(tensors):
        raise ConfigError(
            f"initial_arrays: {fault}; pass ArrayRecord(peft.get_peft_model_state_dict(model))"
        )
    return AdapterState(tensors, {layer_of(n): 1.0 for n in tensors if role_of(n) == "A"})


def _unfit(tensors: Mapping[str, Tensor]) -> str | None:
    """Why these tensors are not an adapter that can be averaged, or None."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            return f"{name} has values that are not finite numbers"
        if role_of(name) != "head":
            pairs.setdefault(layer_of(name), {})[role_of(name)] = tensor
        elif ".lora_" in name:  # an adapter's name in it, DoRA, a bias, LoRA on an embedding
            return f"{name} is neither a lora_A.weight nor a lora_B.weight"
    for layer, pair in pairs.items():
        shapes = [tuple(pair[role].shape) for role in ("B", "A") if role in pair]
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][0]:
            return f"{layer} has no lora_A (rank, in) with a lora_B (out, rank)"
    return None if pairs else "no name ends in lora_A.weight"


def update_in(
    message: Any, received: AdapterState, shared: AdapterState, key: str
) -> Update | Failure:
    """A reply as an update of the ``shared`` tensors, or why it is not one.

    The reply may hold the whole adapter or its shared part; the rest must be as ``received``.
    ``key`` names the number of examples in its MetricRecord. Whatever error a reply causes is a
    failure of its own node only.
    """
    node = str(message.metadata.src_node_id)
    try:
        return _update(node, message, received, shared, key)
    except Exception as error:  # whatever Flower, numpy and torch raise for arbitrary bytes
        reason = f"its reply cannot be read ({type(error).__name__}: {one_line(error)})"
        return Failure(node, printable(reason))


def _update(
    node: str, message: Any, received: AdapterState, shared: AdapterState, key: str
) -> Update | Failure:
    if message.has_error():
        reason = str(message.error.reason or message.error.code)
        return Failure(node, printable(" ".join(reason.split())[:300]), missing=True)
    content = message.content
    count = examples_in(content, key)
    if count is None:
        return Failure(node, f"expected one MetricRecord with {key!r} from 1 to {MOST_EXAMPLES}")
    if len(content.array_records) != 1:
        return Failure(node, f"expected one ArrayRecord, got {len(content.array_records)}")
    (arrays,) = content.array_records.values()
    tensors = arrays.to_torch_state_dict()
    for name in [n for n in tensors if n in received and n not in shared]:
        if not received.holds(name, tensors.pop(name)):
            return Failure(
                node,
                f"{name} is frozen in this round but came back changed: does the client call "
                "rolora.flower.freeze?",
            )
    return Update(node, AdapterState(tensors, received.scaling), count, {})


def examples_in(content: Any, key: str) -> int | None:
    """The number of examples in a reply's only MetricRecord, or None if it is not valid."""
    if len(content.metric_records) != 1:
        return None
    (metrics,) = content.metric_records.values()
    value = metrics.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 1 <= value <= MOST_EXAMPLES else None


def comparable(contents: Sequence[Any], key: str) -> list[Any]:
    """The replies whose metrics can be averaged: finite, and named as in most replies."""
    layouts = [_layout(content, key) for content in contents]
    counts = Counter(layout for layout in layouts if layout is not None)
    usual = max(counts, key=counts.__getitem__, default=None)
    pairs = zip(contents, layouts, strict=True)
    return [content for content, layout in pairs if layout is not None and layout == usual]


def _layout(content: Any, key: str) -> frozenset[tuple[str, int]] | None:
    """The names of a reply's metrics with their lengths (-1: a number); None if not finite."""
    try:
        if examples_in(content, key) is None:
            return None
        (metrics,) = content.metric_records.values()
        for value in metrics.values():
            if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
                return None
        return frozenset((n, len(v) if isinstance(v, list) else -1) for n, v in metrics.items())
    except Exception:  # a record is its node's and may be anything
        return None
