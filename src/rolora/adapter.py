"""Adapters as values: named tensors that are never changed in place, and their algebra.

Names are PEFT's own (``base_model.model.<layer>.lora_A.weight``), so an adapter on disk and an
adapter here are the same thing. The paper writes ``alpha * A * B`` with A down and B up; PEFT
writes ``scaling * lora_B @ lora_A``. We follow PEFT: lora_A is (rank, in), lora_B is (out, rank).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["A", "B", "head"]
Roles = frozenset[Role]

_SUFFIX: dict[str, Role] = {".lora_A.weight": "A", ".lora_B.weight": "B"}


@functools.lru_cache(maxsize=1 << 14)
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

    ``head`` holds the values of head tensors that the checkpoint has; the others are drawn with
    standard deviation ``head_std``, and lora_B with ``b_std``. ``scaling`` maps each adapted layer
    to alpha / rank.
    """

    tensors: tuple[TensorSpec, ...]
    scaling: Mapping[str, float]
    head: Mapping[str, Tensor]
    head_std: float = 0.02
    b_std: float = 0.0


Term = tuple[float, Tensor, Tensor]


class LowRank:
    """A matrix (out, in) kept as a sum of terms: weight · left (out, r) @ right (r, in).

    Sums concatenate, and compact themselves once they are larger than the matrix multiplied out.
    So the mean of any number of clients' products stays small. Norms go through float64 QR factors,
    which keep the digits of a small difference of large products (a Gram matrix would square them
    away).
    """

    def __init__(self, terms: Iterable[Term], rank: int | None = None) -> None:
        self.terms = tuple(terms)
        self.rank = sum(t[2].shape[0] for t in self.terms) if rank is None else rank

    def __add__(self, other: LowRank) -> LowRank:
        total = LowRank(self.terms + other.terms, self.rank + other.rank)
        return total.compact() if total.rank > 2 * min(total.shape) else total

    def __sub__(self, other: LowRank) -> LowRank:
        return self + other * -1.0

    def __mul__(self, factor: float) -> LowRank:
        terms = ((weight * factor, left, right) for weight, left, right in self.terms)
        return LowRank(terms, self.rank)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); (0, 0) for a sum of no terms."""
        if not self.terms:
            return (0, 0)
        _, left, right = self.terms[0]
        return (left.shape[0], right.shape[1])

    def dense(self) -> Tensor:
        """The matrix itself, float64 (out, in). For tests and small layers."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for weight, left, right in self.terms:
            total.addmm_(left.double(), right.double(), alpha=weight)
        return total

    def compact(self) -> LowRank:
        """The same matrix with terms that share a factor, bit for bit, merged into one.

        Clients that hold the same frozen A differ only in B: their sum is one term, and what
        cancels in exact arithmetic cancels here before any product is formed.
        """
        lefts = _numbered([left for _, left, _ in self.terms])
        rights = _numbered([right for _, _, right in self.terms])
        keys = list(zip(lefts, rights, strict=True))
        same: dict[tuple[int, int], Term] = {}
        for key, (weight, left, right) in zip(keys, self.terms, strict=True):
            same[key] = (same[key][0] + weight if key in same else weight, left, right)
        by_left = len({left for left, _ in same}) < len({right for _, right in same})
        groups: dict[int, list[Term]] = {}
        for key, term in same.items():
            groups.setdefault(key[0 if by_left else 1], []).append(term)
        merged = LowRank(_merged(terms, by_left) for terms in groups.values())
        if merged.rank <= 2 * min(self.shape):
            return merged
        whole, (out, width) = merged.dense(), self.shape
        pair = (whole, torch.eye(width)) if width <= out else (torch.eye(out), whole)
        return LowRank([(1.0, *pair)])

    def norm(self) -> float:
        """Frobenius norm, in float64: ‖L R‖ = ‖R_L R_Rᵀ‖ for L = Q_L R_L and Rᵀ = Q_R R_R."""
        terms = self.compact().terms
        if not terms:
            return 0.0
        left = torch.cat([weight * left.double() for weight, left, _ in terms], dim=1)
        right = torch.cat([right.double() for _, _, right in terms], dim=0)
        small = (torch.linalg.qr(side, mode="r").R for side in (left, right.T))
        return float(torch.linalg.matrix_norm(next(small) @ next(small).T))


def _numbered(tensors: Sequence[Tensor]) -> list[int]:
    """A number for each tensor, the same for tensors that are equal bit for bit.

    Nothing is hashed: only tensors of one shape with the same last element are compared at all.
    """
    kinds: dict[tuple[torch.Size, float], list[int]] = {}
    numbers: list[int] = []
    for index, tensor in enumerate(tensors):
        alike = kinds.setdefault((tensor.shape, tensor[-1, -1].item()), [])
        found = next((i for i in alike if _equal(tensors[i], tensor)), index)
        if found == index:
            alike.append(index)
        numbers.append(found)
    return numbers


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _merged(terms: Sequence[Term], by_left: bool) -> Term:
    """The sum of terms that all have the same left, or all the same right, factor."""
    if by_left:
        return 1.0, terms[0][1], torch.stack([w * right.double() for w, _, right in terms]).sum(0)
    return 1.0, torch.stack([w * left.double() for w, left, _ in terms]).sum(0), terms[0][2]


class AdapterState(Mapping[str, Tensor]):
    """An adapter's CPU tensors by PEFT name, in name order; a value, never changed in place.

    ``scaling`` maps each adapted layer to the factor in front of lora_B @ lora_A. Tensors are
    float32 in a run; tests may build float64. Head tensors (classifier, score, ...) are in it too.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> None:
        self._tensors = {name: _constant(tensors[name]) for name in sorted(tensors)}
        self.scaling = dict(scaling)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __or__(self, other: Mapping[str, Tensor]) -> AdapterState:
        """This adapter with ``other``'s tensors in place of its own."""
        if other.keys() <= self._tensors.keys():
            own = (other if isinstance(other, AdapterState) else AdapterState(other, {}))._tensors
            return self._with({**self._tensors, **own})
        return AdapterState({**self._tensors, **other}, self.scaling)

    def only(self, roles: Roles) -> AdapterState:
        """The tensors of these roles."""
        return self.select(lambda name: role_of(name) in roles)

    def select(self, wanted: Callable[[str], bool]) -> AdapterState:
        """The tensors whose name is wanted."""
        return self._with({name: t for name, t in self._tensors.items() if wanted(name)})

    def _with(self, tensors: dict[str, Tensor]) -> AdapterState:
        """These tensors, in name order and without gradients already, with this scaling."""
        state = AdapterState({}, self.scaling)
        state._tensors = tensors
        return state

    def delta(self) -> dict[str, LowRank]:
        """layer -> scaling · lora_B @ lora_A as factors; layers that lack a factor are left out."""
        return {
            layer: LowRank(
                [
                    (
                        self.scaling[layer],
                        self[f"{layer}.lora_B.weight"],
                        self[f"{layer}.lora_A.weight"],
                    )
                ]
            )
            for layer in self.layers()
        }

    def layers(self) -> list[str]:
        """Adapted layers of which both factors are here, in name order."""
        found = (layer_of(name) for name in self if role_of(name) == "A")
        return [layer for layer in found if f"{layer}.lora_B.weight" in self._tensors]

    def num_bytes(self) -> int:
        """Payload bytes: elements × width, summed over tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())


def _constant(tensor: Tensor) -> Tensor:
    # a tensor that needs no gradient stays the same object, so that "is" tells who shares it
    return tensor.detach() if tensor.requires_grad else tensor


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client in a round: its rows, its LoRA rank, the round number."""

    id: str
    num_examples: int
    rank: int
    round: int


@dataclass(frozen=True)
class Update:
    """What a client sends: absolute values of the shared tensors, never differences.

    ``encoded_bytes`` is what travelled for them where that was an encoding (``rolora.wire``); the
    adapter is then what the server decoded.
    """

    client: str
    adapter: AdapterState
    num_examples: int
    metrics: Mapping[str, float]
    encoded_bytes: int | None = None

    def num_bytes(self) -> int:
        """Payload bytes that travelled: of the encoding, or else elements × width."""
        return self.adapter.num_bytes() if self.encoded_bytes is None else self.encoded_bytes


@dataclass(frozen=True)
class Failure:
    """A client of the cohort that sent nothing usable, and why."""

    client: str
    reason: str


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of dtype, shape and exact bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
