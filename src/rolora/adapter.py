"""Adapters as values: named tensors that are never changed in place, and their algebra.

Names are PEFT's own (``base_model.model.<layer>.lora_A.weight``), so an adapter on disk and an
adapter here are the same thing. The paper writes ``alpha * A * B`` with A down and B up; PEFT
writes ``scaling * lora_B @ lora_A``. We follow PEFT: lora_A is (rank, in), lora_B is (out, rank).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["A", "B", "head"]
Roles = frozenset[Role]

_SUFFIX: dict[str, Role] = {".lora_A.weight": "A", ".lora_B.weight": "B"}


def role_of(name: str) -> Role:
    """What a tensor of this name is: ``"A"`` (rank, in), ``"B"`` (out, rank), or ``"head"``."""
    return next((role for suffix, role in _SUFFIX.items() if name.endswith(suffix)), "head")


def layer_of(name: str) -> str:
    """The adapted layer that a LoRA factor belongs to: its name without the factor's suffix."""
    return name.rsplit(".lora_", 1)[0]


@dataclass(frozen=True)
class TensorSpec:
    """Name, role and shape of one tensor of an adapter."""

    name: str
    role: Role
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Specs:
    """What an adapter of a model looks like, before it has values.

    ``head`` holds the starting values of the task head (seeded by name where the checkpoint has
    none); ``scaling`` maps each adapted layer to alpha / rank.
    """

    tensors: tuple[TensorSpec, ...]
    scaling: Mapping[str, float]
    head: Mapping[str, Tensor]


class LowRank:
    """A matrix (out, in) kept as a sum of factor pairs: sum of left (out, r) @ right (r, in).

    Sums concatenate and nothing is multiplied out, so the mean of many clients' products stays
    small. Norms go through float64 Gram matrices of the factors.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.pairs = tuple(pairs)

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank(self.pairs + other.pairs)

    def __sub__(self, other: LowRank) -> LowRank:
        return self + other * -1.0

    def __mul__(self, factor: float) -> LowRank:
        return LowRank((left.double() * factor, right) for left, right in self.pairs)

    def dense(self) -> Tensor:
        """The matrix itself, float64 (out, in). For tests and small layers."""
        return torch.stack([left.double() @ right.double() for left, right in self.pairs]).sum(0)

    def compact(self) -> LowRank:
        """The same matrix with pairs that share a factor, bit for bit, merged into one.

        Clients that hold the same frozen A differ only in B: their sum is one pair, and what
        cancels in exact arithmetic cancels here before any product is formed.
        """
        return self._merge(shared=1)._merge(shared=0)

    def _merge(self, shared: int) -> LowRank:
        groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for pair in self.pairs:
            groups.setdefault(tensor_hash(pair[shared]), []).append(pair)
        merged = []
        for pairs in groups.values():
            summed = sum((p[1 - shared].double() for p in pairs[1:]), pairs[0][1 - shared].double())
            kept = pairs[0][shared].double()
            merged.append((summed, kept) if shared == 1 else (kept, summed))
        return LowRank(merged)

    def norm(self) -> float:
        """Frobenius norm: sqrt of tr(R Rᵀ Lᵀ L) over the concatenated factors, in float64."""
        compact = self.compact()
        if not compact.pairs:
            return 0.0
        left = torch.cat([pair[0] for pair in compact.pairs], dim=1)
        right = torch.cat([pair[1] for pair in compact.pairs], dim=0)
        square = float(((left.T @ left) * (right @ right.T)).sum())
        return math.sqrt(max(square, 0.0))


class AdapterState(Mapping[str, Tensor]):
    """An adapter's CPU tensors by PEFT name, in name order; a value, never changed in place.

    ``scaling`` maps each adapted layer to the factor in front of lora_B @ lora_A. Tensors are
    float32 in a run; tests may build float64. Head tensors (classifier, score, ...) are in it too.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> None:
        self._tensors = {name: tensors[name].detach() for name in sorted(tensors)}
        self.scaling = dict(scaling)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __or__(self, other: Mapping[str, Tensor]) -> AdapterState:
        """This adapter with ``other``'s tensors in place of its own."""
        return AdapterState({**self._tensors, **other}, self.scaling)

    def only(self, roles: Roles) -> AdapterState:
        """The tensors of these roles."""
        return self.select(lambda name: role_of(name) in roles)

    def select(self, wanted: Callable[[str], bool]) -> AdapterState:
        """The tensors whose name is wanted."""
        return AdapterState({n: t for n, t in self._tensors.items() if wanted(n)}, self.scaling)

    def delta(self) -> dict[str, LowRank]:
        """layer -> scaling · lora_B @ lora_A as factors; layers that lack a factor are left out."""
        return {
            layer: LowRank([(self[f"{layer}.lora_B.weight"], self[f"{layer}.lora_A.weight"])])
            * self.scaling[layer]
            for layer in self.layers()
        }

    def layers(self) -> list[str]:
        """Adapted layers of which both factors are here, in name order."""
        found = (layer_of(name) for name in self if role_of(name) == "A")
        return [layer for layer in found if f"{layer}.lora_B.weight" in self._tensors]

    def hashes(self) -> dict[str, str]:
        """name -> hash of dtype, shape and bytes: what a client reports that it holds."""
        return {name: tensor_hash(tensor) for name, tensor in self._tensors.items()}

    def num_bytes(self) -> int:
        """Payload bytes: elements × width, summed over tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client in a round: its rows, its LoRA rank, the round number."""

    id: str
    num_examples: int
    rank: int
    round: int


@dataclass(frozen=True)
class Update:
    """What a client sends: absolute values of the shared tensors, never differences."""

    client: str
    adapter: AdapterState
    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Failure:
    """A client of the cohort that sent nothing usable, and why."""

    client: str
    reason: str


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of dtype, shape and exact bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def mean_delta(
    deltas: Sequence[Mapping[str, LowRank]], weights: Sequence[float]
) -> dict[str, LowRank]:
    """layer -> Σ_i weights_i · delta_i: the mean of products, as concatenated factors."""
    total: dict[str, LowRank] = {}
    for delta, weight in zip(deltas, weights, strict=True):
        for layer, matrix in delta.items():
            total[layer] = total.get(layer, LowRank(())) + matrix * weight
    return total
