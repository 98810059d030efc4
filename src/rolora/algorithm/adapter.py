"""Adapters as values: named tensors that are never changed in place, and their algebra.

Tensor names are PEFT's (``base_model.model.<layer>.lora_A.weight``), and so is the product
``scaling * lora_B @ lora_A`` of lora_A (rank, in) and lora_B (out, rank). The RoLoRA paper writes
``alpha * A * B`` with A the down projection.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rolora.algorithm.low_rank import LowRank, equal, one_term

Role = Literal["A", "B", "core", "delta", "turn", "head"]
Roles = frozenset[Role]

_SUFFIX: dict[str, Role] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_core.weight": "core",
    ".lora_gain.weight": "core",
    ".lora_delta.weight": "delta",
    ".lora_grown_A.weight": "delta",
    ".lora_grown_B.weight": "delta",
    ".lora_turn_A.weight": "turn",
    ".lora_turn_B.weight": "turn",
}


@functools.lru_cache(maxsize=1 << 14)
def role_of(name: str) -> Role:
    """The role of the tensor with this name.

    ``"A"``: lora_A (rank, in). ``"B"``: lora_B (out, rank). ``"core"``: matrices (heads, r, r)
    between lora_B and lora_A and their gains (heads,), where rank = heads · r. ``"delta"``: a
    change of the base weight (out, in) beside the factors, or what it grew by in a round.
    ``"turn"``: how a factor was turned (see ``rolora.algorithm.patches``); it travels, and is no
    part of an adapter. ``"head"``: everything else.
    """
    return next((role for suffix, role in _SUFFIX.items() if name.endswith(suffix)), "head")


def layer_of(name: str) -> str:
    """The adapted layer that a LoRA tensor belongs to: the name without its ``.lora_*`` suffix."""
    return name.rsplit(".lora_", 1)[0]


def partner_of(name: str) -> str:
    """The name of the layer's other factor: of lora_B for lora_A, and of lora_A for lora_B."""
    return f"{layer_of(name)}.lora_{'B' if role_of(name) == 'A' else 'A'}.weight"


def pieces(name: str, factor: Tensor) -> Tensor:
    """The rank-one pieces of a factor (..., rank, width): rows of lora_A, columns of lora_B.

    A view; applied to the pieces it gives back the factor.
    """
    return factor if role_of(name) == "A" else factor.mT


@dataclass(frozen=True)
class TensorSpec:
    """Name, role and shape of one tensor of an adapter."""

    name: str
    role: Role
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Specs:
    """The tensors of a model's adapter, before they have values.

    ``head`` holds the head tensors that the checkpoint has; other head weights are drawn with
    standard deviation ``head_std``, and lora_B with ``b_std``. ``scaling`` maps each adapted layer
    to alpha / rank (or alpha / sqrt(rank)). ``gradient`` maps it to the gradient (out, in) of the
    loss at the base model's weights, for methods that need it.
    """

    tensors: tuple[TensorSpec, ...]
    scaling: Mapping[str, float]
    head: Mapping[str, Tensor]
    head_std: float = 0.02
    b_std: float = 0.0
    gradient: Mapping[str, Tensor] = field(default_factory=dict)


def through_core(lora_b: Tensor, core: Tensor, gain: Tensor | None = None) -> Tensor:
    """lora_B · blockdiag(gain_h · core_h): (..., out, heads · r).

    ``lora_b`` (..., out, heads · r), ``core`` (..., heads, r, r), ``gain`` (..., heads).
    """
    if gain is not None:
        core = core * gain[..., None, None]
    heads = lora_b.view(*lora_b.shape[:-1], *core.shape[-3:-1])
    return torch.einsum("...ohr,...hrs->...ohs", heads, core).flatten(-2)


class AdapterState(Mapping[str, Tensor]):
    """An adapter's CPU tensors by PEFT name, in name order; a value, never changed in place.

    A layer changes its base weight by delta + scaling · lora_B · core · lora_A, where only some
    methods have a core or a delta. ``scaling`` maps each adapted layer to its factor. The tensors
    of the task head (classifier, ...) are part of the adapter. In a run they are float32.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> None:
        # no new object unless one is needed: comparing a tensor with itself costs nothing
        self._tensors = {
            name: tensors[name].detach() if tensors[name].requires_grad else tensors[name]
            for name in sorted(tensors)
        }
        self.scaling: dict[str, float] = dict(scaling)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdapterState):
            return NotImplemented
        same_names = self.keys() == other.keys() and self.scaling == other.scaling
        return same_names and all(self.holds(name, tensor) for name, tensor in other.items())

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether this adapter has a tensor of this dtype, shape and value under this name."""
        return name in self._tensors and equal(self._tensors[name], tensor)

    def __or__(self, other: Mapping[str, Tensor]) -> AdapterState:
        """This adapter with ``other``'s tensors in place of its own."""
        if other.keys() <= self._tensors.keys():
            own = (other if isinstance(other, AdapterState) else AdapterState(other, {}))._tensors
            return self._with({**self._tensors, **own})
        return AdapterState({**self._tensors, **other}, self.scaling)

    def only(self, roles: Roles) -> AdapterState:
        """The tensors that have one of these roles."""
        return self.select(lambda name: role_of(name) in roles)

    def select(self, wanted: Callable[[str], bool]) -> AdapterState:
        """The tensors for whose name ``wanted`` is true."""
        return self._with({name: t for name, t in self._tensors.items() if wanted(name)})

    def _with(self, tensors: dict[str, Tensor]) -> AdapterState:
        """These tensors, already in name order and without gradients, with this scaling."""
        state = AdapterState({}, self.scaling)
        state._tensors = tensors
        return state

    def delta(self) -> dict[str, LowRank]:
        """layer -> its change of the base weight; layers without both factors are left out."""
        found = {}
        for layer in self.layers():
            terms = [(self.scaling[layer], self.up(layer), self[f"{layer}.lora_A.weight"])]
            if (beside := self.get(f"{layer}.lora_delta.weight")) is not None:
                terms.append(one_term(beside))
            found[layer] = LowRank(terms)
        return found

    def up(self, layer: str) -> Tensor:
        """(out, rank): the layer's lora_B, multiplied by its core if it has one."""
        lora_b, core = self[f"{layer}.lora_B.weight"], self.get(f"{layer}.lora_core.weight")
        if core is None:
            return lora_b
        return through_core(lora_b, core, self.get(f"{layer}.lora_gain.weight"))

    def layers(self) -> list[str]:
        """The adapted layers that have both factors, in name order."""
        found = (layer_of(name) for name in self if role_of(name) == "A")
        return [layer for layer in found if f"{layer}.lora_B.weight" in self._tensors]

    @property
    def rank(self) -> int:
        """The largest rank of its lora_A; 0 without any."""
        return max((len(t) for name, t in self.items() if role_of(name) == "A"), default=0)

    def num_bytes(self) -> int:
        """Payload bytes: elements × width, summed over tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows about a client in a round.

    ``members``: usually empty. Otherwise this client stands for those clients: it holds the rows of
    everybody and takes as many optimiser steps as its members together.
    """

    id: str
    num_examples: int
    rank: int
    round: int
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """A client's part of a round: who it is, and the adapter that it received."""

    info: ClientInfo
    received: AdapterState


@dataclass(frozen=True)
class Update:
    """What a client sends: the values of the shared tensors, not differences.

    ``encoded_bytes`` is the size of the encoding if the update was encoded
    (``rolora.algorithm.codec``); ``adapter`` is then what the server decodes.
    """

    client: str
    adapter: AdapterState
    num_examples: int
    metrics: Mapping[str, float]
    encoded_bytes: int | None = None

    def num_bytes(self) -> int:
        """Payload bytes: of the encoding, or else elements × width."""
        return self.adapter.num_bytes() if self.encoded_bytes is None else self.encoded_bytes


@dataclass(frozen=True)
class Failure:
    """A client of the cohort that sent no usable update, and why; ``missing``: it sent none."""

    client: str
    reason: str
    missing: bool = False


# The largest value of a tensor that a client sends. Trained factors and heads are below 100; at
# this, training has diverged, or somebody wants the others to overflow.
LARGEST = 1e6


def too_large(tensor: Tensor, most: float = LARGEST) -> bool:
    """Whether a value is beyond ``most``, or not finite."""
    if not tensor.numel():
        return False
    low, high = tensor.aminmax()
    return not (-most <= low.item() and high.item() <= most)


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
