"""The mean of what clients learned, as products: the other side of the aggregation error.

A layer's product is delta + scaling · lora_B · core · lora_A (see ``AdapterState``). Where nobody
trained one of the factors, a sum of products is that factor times the sum of the other, so that a
client costs as many additions as it has trained parameters, and nothing of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, layer_of, role_of
from rolora.algorithm.low_rank import LowRank, Term
from rolora.algorithm.reduce import add_, zeros_like

Matrices = Mapping[str, LowRank]  # layer -> its product, or a sum of such products


class Products:
    """Σ weight · product per layer, over adapters that stream by.

    ``common`` is what they have in common: a factor that *is* its tensor (the same object) was
    trained by nobody. Where both factors differ, both are kept, until the layer's matrix itself is
    smaller; see ``LowRank``.
    """

    def __init__(self, common: AdapterState) -> None:
        self._common = common
        self._sums: dict[str, Tensor] = {}  # name of what moves -> its float64 sum
        self._weight = 0.0  # of adapters whose deltas are the common ones
        self._others: dict[str, LowRank] = {}

    def add(self, state: AdapterState, weight: float) -> None:
        """Add ``weight`` times the products of this adapter."""
        moving: dict[str, Tensor] = {}
        for layer in state.layers():
            down, up = _factors(layer)
            if state[down] is self._common.get(down):
                moving[up] = state.up(layer)
            elif state[up] is self._common.get(up) and state.up(layer) is state[up]:
                moving[down] = state[down]
            else:
                term = (weight * state.scaling[layer], state.up(layer), state[down])
                self._others[layer] = self._others.get(layer, LowRank(())) + LowRank([term])
        deltas = {name: t for name, t in state.items() if role_of(name) == "delta"}
        if all(tensor is self._common.get(name) for name, tensor in deltas.items()):
            self._weight += weight
        else:
            moving |= deltas
        new = [name for name in moving if name not in self._sums]
        starts = zeros_like((moving[name] for name in new), torch.float64)
        self._sums.update(zip(new, starts, strict=True))
        add_([self._sums[name] for name in moving], moving.values(), weight)

    def total(self) -> Matrices:
        """layer -> the sum so far."""
        common, found = self._common, dict(self._others)
        for name, tensor in self._sums.items():
            layer = layer_of(name)
            down, _ = _factors(layer)
            if role_of(name) == "delta":
                term = _beside(tensor)
            elif name == down:
                term = (common.scaling[layer], common.up(layer), tensor)
            else:
                term = (common.scaling[layer], tensor, common[down])
            found[layer] = found.get(layer, LowRank(())) + LowRank([term])
        if self._weight:
            for name, tensor in common.items():
                if role_of(name) == "delta":
                    layer = layer_of(name)
                    term = _beside(tensor.double() * self._weight)
                    found[layer] = found.get(layer, LowRank(())) + LowRank([term])
        return found


class AggregationError:
    """How far a round's average is from the exact one, over clients that stream by.

    ‖Σ p_i ΔW_i − ΔW‖_F / ‖Σ p_i W_i‖_F over all adapted layers. W_i is the product scaling·B·A that
    client i returned (as it arrived, so what an encoding rounded away is not in it), ΔW_i its
    change since the client received it, ΔW the change of the server's product from ``start``.
    """

    def __init__(self, start: AdapterState) -> None:
        self._start, self._weight = start, 0.0
        self._returned, self._handed_out = Products(start), Products(start)

    def add(self, received: AdapterState, returned: AdapterState, weight: float) -> None:
        """One client: what it was given and what it has now."""
        self._weight += weight
        self._returned.add(returned, weight)
        if received is not self._start:
            self._handed_out.add(received, weight)
            self._handed_out.add(self._start, -weight)

    def of(self, after: AdapterState) -> float:
        """The error if the server has ``after`` now; ask once, when every client was added."""
        whole = norm(self._returned.total())
        self._returned.add(after, -self._weight)
        missed = norm(self._returned.total(), self._handed_out.total(), -1.0)
        return _ratio(missed, whole)


def _beside(delta: Tensor) -> Term:
    return 1.0, delta, torch.eye(delta.shape[1], dtype=delta.dtype)


def norm(one: Matrices, other: Matrices | None = None, factor: float = 1.0) -> float:
    """Frobenius norm of ``one + factor * other`` over all layers together."""
    layers = {**one}
    for layer, matrix in (other or {}).items():
        layers[layer] = layers.get(layer, LowRank(())) + matrix * factor
    return math.sqrt(sum(matrix.norm() ** 2 for matrix in layers.values()))


def _factors(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def _ratio(missed: float, whole: float) -> float:
    return missed / whole if whole else (math.inf if missed else 0.0)
