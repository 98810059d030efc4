"""How far apart clients are, measured by what they do to the model.

A factor that changed little can move the product far, and one that changed a lot may hardly move
it. So rules that judge clients compare scaling · lora_B · lora_A, and the head as it is.
No product is formed: inner products of products come from r × r matrices of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, layer_of, role_of
from rolora.algorithm.reduce import Value

# What the other factor hides now, it may show in the next round: a factor's own move counts a
# tenth of what it would do if the other factor hid none of it.
HIDDEN = 0.1


def inner_products(
    values: Sequence[Value],
    origin: Value,
    hidden: float = HIDDEN,
    sized_by: Sequence[Value] | None = None,
) -> Tensor:
    """Inner products of what each value changes in the model since ``origin``, (n, n) in float64.

    ``values`` have the names of the value that is reduced. ``origin`` has these names too; as an
    ``AdapterState`` it has the whole adapter with its scaling, whose other tensors did not move. If
    it is none, all tensors are compared as they are.

    With b_i = B_i − B and a_i = A_i − A, a layer's change is s · (b_i A_i + B a_i), whose inner
    products are traces of r × r matrices, such as s² · tr(b_jᵀ b_i A Aᵀ) where lora_A did not move.
    lora_B stands for lora_B · core where there is a core. Heads, deltas and products in place of a
    delta are compared as they are.

    Beside its product, each moved factor counts as it is, times ``hidden``, the layer's scaling and
    the size of the other factor (the root of its mean squared singular value, the median over
    ``sized_by``, or over ``values`` without; ``hidden`` is 1 if that is 0). With ``hidden`` = 0
    only the products count.
    """
    total = torch.zeros(len(values), len(values), dtype=torch.float64)
    if not values:
        return total
    whole = origin if isinstance(origin, AdapterState) else AdapterState(origin, {})
    factors = {name for name in values[0] if role_of(name) in ("A", "B", "core")}
    factors = {name for name in factors if layer_of(name) in whole.scaling}
    for name in values[0].keys() - factors:
        moves = _moves(values, origin, name)
        total += moves @ moves.T
    for layer in sorted({layer_of(name) for name in factors}):
        moved = sorted(name for name in factors if layer_of(name) == layer)
        states = [_layer(layer, whole, value) for value in values]
        sizing = states if sized_by is None else [_layer(layer, whole, one) for one in sized_by]
        start, scaling = _layer(layer, whole, {}), whole.scaling[layer]
        if f"{layer}.lora_delta.weight" not in values[0]:
            total += scaling**2 * _products(layer, states, start, moved)
        for name in moved if hidden else ():
            moves = _moves(values, origin, name)
            other = _size_of_others(layer, sizing, role_of(name))
            weight = hidden**2 * other if other else 1.0
            total += scaling**2 * weight * (moves @ moves.T)
    return (total + total.T) / 2


def squared_distances(gram: Tensor) -> Tensor:
    """‖x_i − x_j‖² (n, n) from inner products (n, n); none is negative, and x_i is at x_i."""
    own = gram.diagonal()
    apart = (own[:, None] + own[None, :] - 2 * gram).clamp_min(0)
    return apart.fill_diagonal_(0)


def _layer(layer: str, whole: AdapterState, value: Value) -> AdapterState:
    """The tensors of one layer, in float64: those of the value in place of the adapter's."""
    names = (f"{layer}.lora_{part}.weight" for part in ("A", "B", "core", "gain"))
    held = {name: value.get(name, whole.get(name)) for name in names}
    found = {name: tensor.double() for name, tensor in held.items() if tensor is not None}
    return AdapterState(found, {layer: whole.scaling[layer]})


def _moves(values: Sequence[Value], origin: Value, name: str) -> Tensor:
    """(n, elements) in float64."""
    start = origin[name].double()
    return torch.stack([(value[name].double() - start).reshape(-1) for value in values])


def _products(
    layer: str, states: Sequence[AdapterState], start: AdapterState, moved: Sequence[str]
) -> Tensor:
    """Inner products of the changes of lora_B · core · lora_A, without the scaling."""
    down = f"{layer}.lora_A.weight"
    up0, down0 = start.up(layer), start[down]
    if down not in moved:
        ups = torch.stack([state.up(layer) - up0 for state in states])
        return ups.flatten(1) @ (ups @ (down0 @ down0.T)).flatten(1).T
    downs = torch.stack([state[down] - down0 for state in states])
    if len(moved) == 1:
        return downs.flatten(1) @ (up0.T @ up0 @ downs).flatten(1).T
    # each change as one product: [b_i, B] (out, 2 r) times [A_i; a_i] (2 r, in)
    lefts = [torch.cat([state.up(layer) - up0, up0], dim=1) for state in states]
    rights = [torch.cat([state[down], move]) for state, move in zip(states, downs, strict=True)]
    every_left, every_right = torch.stack(lefts), torch.stack(rights)
    rows = [
        ((left.T @ every_left) * (right @ every_right.mT)).sum(dim=(1, 2))
        for left, right in zip(lefts, rights, strict=True)
    ]
    return torch.stack(rows)


def _size_of_others(layer: str, states: Sequence[AdapterState], role: str) -> float:
    """Median over clients of the squared size of the factors that stand beside this one."""
    others = {"A": ("B",), "B": ("A",), "core": ("A", "B")}[role]
    sizes = torch.ones(len(states), dtype=torch.float64)
    for number, state in enumerate(states):
        for other in others:
            factor = state[f"{layer}.lora_{other}.weight"]
            sizes[number] = sizes[number] * factor.square().sum() / min(factor.shape)
    return float(sizes.median())
