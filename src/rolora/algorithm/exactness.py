"""The exact mean of what clients learned, to compare the server's average with.

Where no client trained one of the factors, the sum of products is that factor times the sum of the
other, so a client costs as many additions as it trained parameters, and no tensor of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, layer_of, role_of
from rolora.algorithm.low_rank import LowRank, Term, one_term
from rolora.algorithm.reduce import add_, zeros_like

Matrices = Mapping[str, LowRank]  # layer -> its product, or a sum of such products


class Products:
    """Σ weight · product per layer (see ``AdapterState``), over adapters added one at a time.

    A factor equal to that of ``common`` was not trained. Where both factors differ, both are kept
    until the layer's dense matrix is smaller; see ``LowRank``.
    """

    def __init__(self, common: AdapterState) -> None:
        self._common = common
        self._sums: dict[str, Tensor] = {}  # name of a trained tensor -> its float64 sum
        self._weight = 0.0  # of adapters whose deltas are the common ones
        self._others: dict[str, LowRank] = {}

    def add(self, state: AdapterState, weight: float) -> None:
        """Add ``weight`` times the products of this adapter."""
        moving: dict[str, Tensor] = {}
        for layer in state.layers():
            down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
            if self._common.holds(down, state[down]):
                moving[up] = state.up(layer)
            elif f"{layer}.lora_core.weight" not in state and self._common.holds(up, state[up]):
                moving[down] = state[down]
            else:
                term = (weight * state.scaling[layer], state.up(layer), state[down])
                _append(self._others, layer, term)
        deltas = {name: t for name, t in state.items() if role_of(name) == "delta"}
        if all(self._common.holds(name, tensor) for name, tensor in deltas.items()):
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
            layer, role = layer_of(name), role_of(name)
            if role == "delta":
                term = one_term(tensor)
            elif role == "A":
                term = (common.scaling[layer], common.up(layer), tensor)
            else:
                term = (common.scaling[layer], tensor, common[f"{layer}.lora_A.weight"])
            _append(found, layer, term)
        for name, tensor in common.items():
            if self._weight and role_of(name) == "delta":
                _append(found, layer_of(name), one_term(tensor.double() * self._weight))
        return found


class AggregationError:
    """How far the server's average is from the exact one, over clients added one at a time.

    ‖Σ p_i ΔW_i − ΔW‖_F / ‖Σ p_i W_i‖_F over all adapted layers. W_i is the product that client i
    returned, as the server decoded it (so rounding by an encoding does not count as an error), ΔW_i
    its change since the client received it, and ΔW the change of the server's product since
    ``start``. p_i are the weights of the method's own mean.
    """

    def __init__(self, start: AdapterState) -> None:
        self._start, self._weight = start, 0.0
        self._returned, self._received = Products(start), Products(start)

    def add(self, received: AdapterState, returned: AdapterState, weight: float) -> None:
        """Add one client: the adapter that it received and the one that it has now."""
        self._weight += weight
        self._returned.add(returned, weight)
        if received != self._start:
            self._received.add(received, weight)
            self._received.add(self._start, -weight)

    def of(self, after: AdapterState) -> float:
        """The error if the server now has ``after``; call it once, after the last client."""
        whole = norm(self._returned.total())
        self._returned.add(after, -self._weight)
        missed = norm(self._returned.total(), self._received.total())
        return missed / whole if whole else (math.inf if missed else 0.0)


def _append(sums: dict[str, LowRank], layer: str, term: Term) -> None:
    sums[layer] = sums.get(layer, LowRank(())) + LowRank([term])


def norm(one: Matrices, other: Matrices | None = None) -> float:
    """Frobenius norm of ``one - other`` over all layers together."""
    layers = {**one}
    for layer, matrix in (other or {}).items():
        layers[layer] = layers.get(layer, LowRank(())) - matrix
    return math.sqrt(sum(matrix.norm() ** 2 for matrix in layers.values()))
