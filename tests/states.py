"""Adapters without a model: random states, what clients made of them, and dense oracles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import (
    AdapterState,
    Assignment,
    ClientInfo,
    Roles,
    Specs,
    TensorSpec,
    Update,
    role_of,
)
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.seeding import generator

Cohort = dict[str, Assignment]
Shape = tuple[int, int, int]  # out, in, rank of one adapted layer
LAYERS: tuple[Shape, ...] = ((4, 6, 2), (7, 5, 2))
HEAD: Mapping[str, tuple[int, ...]] = {"score.bias": (3,), "score.weight": (3, 4)}


def make_specs(
    layers: tuple[Shape, ...] = LAYERS, head: Mapping[str, tuple[int, ...]] = HEAD
) -> Specs:
    """Specs of a model with these layers; each layer has a scaling of its own."""
    tensors = [
        TensorSpec(f"base_model.model.{name}", "head", shape) for name, shape in head.items()
    ]
    scaling = {}
    for index, (out, width, rank) in enumerate(layers):
        layer = f"base_model.model.layer.{index}.query"
        tensors.append(TensorSpec(f"{layer}.lora_A.weight", "A", (rank, width)))
        tensors.append(TensorSpec(f"{layer}.lora_B.weight", "B", (out, rank)))
        scaling[layer] = 0.5 + index
    return Specs(tuple(sorted(tensors, key=lambda spec: spec.name)), scaling, {})


def random_state(
    specs: Specs, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> AdapterState:
    """Every tensor normal, lora_B too."""
    rng = generator(seed, "state")
    tensors = {
        spec.name: (torch.randn(spec.shape, generator=rng, dtype=torch.float64) * scale).to(dtype)
        for spec in specs.tensors
    }
    return AdapterState(tensors, specs.scaling)


def start_of(
    method: Method,
    specs: Specs,
    seed: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> AdapterState:
    """What the method's adapter may look like after some rounds: its own tensors, all normal.

    Gains alone are 1, as the server has them. A method that asks for it is given a gradient.
    """
    rng = generator(seed, "state")
    shapes = {spec.name: spec.shape for spec in specs.tensors}
    gradient = {
        layer: torch.randn(
            shapes[f"{layer}.lora_B.weight"][0],
            shapes[f"{layer}.lora_A.weight"][1],
            generator=generator(seed, "gradient", layer),
        )
        for layer in specs.scaling
    }
    first = method.init(replace(specs, gradient=gradient), generator(seed, "init"))
    drawn = {
        name: torch.randn(tensor.shape, generator=rng, dtype=torch.float64) * scale
        for name, tensor in first.items()
        if not name.endswith(".lora_gain.weight")
    }
    return AdapterState(
        {name: drawn.get(name, tensor).to(dtype) for name, tensor in first.items()},
        specs.scaling,
    )


def moved(state: AdapterState, roles: Roles, seed: int, size: float = 0.1) -> AdapterState:
    """The state after a pretended training that moved the tensors of these roles."""
    rng = generator(seed, "moved")
    steps = {
        name: torch.randn(tensor.shape, generator=rng, dtype=torch.float64) * size
        for name, tensor in state.items()
    }
    wanted = {name for name in state if role_of(name) in roles}
    return state | {name: (state[name].double() + steps[name]).to(state[name]) for name in wanted}


def dense(state: AdapterState) -> dict[str, Tensor]:
    """layer -> delta + scaling · Σ_h gain_h · B_h @ core_h @ A_h, multiplied out in float64."""
    found = {}
    for layer, scaling in state.scaling.items():
        b, a = (state[f"{layer}.lora_{factor}.weight"].double() for factor in "BA")
        core = state.get(f"{layer}.lora_core.weight")
        if core is None:
            whole = b @ a
        else:
            gain = state.get(f"{layer}.lora_gain.weight", torch.ones(len(core)))
            whole = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
            for head, matrix in enumerate(core.double()):
                part = slice(head * len(matrix), (head + 1) * len(matrix))
                whole += float(gain[head]) * (b[:, part] @ matrix @ a[part])
        found[layer] = scaling * whole
        if (delta := state.get(f"{layer}.lora_delta.weight")) is not None:
            found[layer] = found[layer] + delta.double()
    return found


def effect(state: AdapterState) -> dict[str, Tensor]:
    """All that a model notices of an adapter: the products, and the head."""
    return {**dense(state), **state.only(frozenset({"head"}))}


def cohort_of(method: Method, server: ServerState, sizes: Mapping[str, int]) -> Cohort:
    """Clients of rank 2 with these row counts, and what each of them receives."""
    infos = [ClientInfo(id, count, 2, server.round + 1) for id, count in sizes.items()]
    return assign(method, server, infos)


def assign(method: Method, server: ServerState, infos: Iterable[ClientInfo]) -> Cohort:
    """Each client with what it receives."""
    return {info.id: Assignment(info, method.download(server, info)) for info in infos}


def trained(method: Method, assigned: Assignment, seed: int, size: float = 0.1) -> AdapterState:
    """What a client holds after a pretended local training of this round."""
    return moved(assigned.received, method.trained(assigned.info.round), seed, size)


def sent(method: Method, assigned: Assignment, adapter: AdapterState) -> Update:
    """What the method sends of a trained adapter in this round."""
    info = assigned.info
    uploaded = method.upload(assigned.received, adapter, info).only(method.shared(info.round))
    return Update(info.id, uploaded, info.num_examples, {"loss": 1.0})


def updates_from(method: Method, cohort: Cohort, seed: int = 0, size: float = 0.1) -> list[Update]:
    """What each client of the cohort sends after a pretended training."""
    return [
        sent(method, one, trained(method, one, seed + place, size))
        for place, one in enumerate(cohort.values())
    ]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal names, dtypes and values, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def relative(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """‖one − other‖ / ‖other‖ over all tensors together, in float64."""
    assert one.keys() == other.keys()
    missed = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)
    whole = sum(float(other[n].double().square().sum()) for n in other)
    return float((missed / whole) ** 0.5)
