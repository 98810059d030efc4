"""The mean of what clients learned, as products: the other side of the aggregation error.

A layer's product is scaling · lora_B @ lora_A. Where nobody trained one of the factors, a sum of
products is that factor times the sum of the other, so that a client costs as many additions as it
has trained parameters, and nothing of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rolora.adapter import AdapterState, LowRank, layer_of
from rolora.reduce import add_, zeros_like

Matrices = Mapping[str, LowRank]  # layer -> scaling · B · A, or a sum of such products


class Products:
    """Σ weight · scaling · lora_B @ lora_A per layer, over adapters that stream by.

    ``common`` is what they have in common: a factor that *is* its tensor (the same object) was
    trained by nobody. Where both factors differ, both are kept, until the layer's matrix itself is
    smaller; see ``LowRank``.
    """

    def __init__(self, common: AdapterState) -> None:
        self._common = common
        self._sums: dict[str, Tensor] = {}  # name of a moving factor -> its float64 sum
        self._others: dict[str, LowRank] = {}

    def add(self, state: AdapterState, weight: float) -> None:
        """Add ``weight`` times the products of this adapter."""
        moving: list[str] = []
        for layer in state.layers():
            down, up = _factors(layer)
            if state[down] is self._common.get(down):
                moving.append(up)
            elif state[up] is self._common.get(up):
                moving.append(down)
            else:
                term = (weight * state.scaling[layer], state[up], state[down])
                self._others[layer] = self._others.get(layer, LowRank(())) + LowRank([term])
        new = [name for name in moving if name not in self._sums]
        starts = zeros_like((state[name] for name in new), torch.float64)
        self._sums.update(zip(new, starts, strict=True))
        add_([self._sums[name] for name in moving], [state[name] for name in moving], weight)

    def total(self) -> Matrices:
        """layer -> the sum so far."""
        found = dict(self._others)
        for name, factor in self._sums.items():
            layer = layer_of(name)
            down, up = _factors(layer)
            pair = (self._common[up], factor) if name == down else (factor, self._common[down])
            term = LowRank([(self._common.scaling[layer], *pair)])
            found[layer] = found.get(layer, LowRank(())) + term
        return found


def norm(one: Matrices, other: Matrices | None = None, factor: float = 1.0) -> float:
    """Frobenius norm of ``one + factor * other`` over all layers together."""
    layers = {**one}
    for layer, matrix in (other or {}).items():
        layers[layer] = layers.get(layer, LowRank(())) + matrix * factor
    return math.sqrt(sum(matrix.norm() ** 2 for matrix in layers.values()))


def _factors(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
