"""Claims about distances between what clients do to the model, against matrices multiplied out."""

from __future__ import annotations

import math

import pytest
import torch
from method_rows import ROWS
from states import assign, dense, make_specs, moved, random_state, start_of
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Roles, role_of
from rolora.algorithm.effect import HIDDEN, inner_products, squared_distances
from rolora.algorithm.method import ServerState
from rolora.algorithm.reduce import Value
from rolora.methods import get_method

A = "base_model.model.layer.0.query.lora_A.weight"
B = "base_model.model.layer.0.query.lora_B.weight"
ROLES: dict[str, Roles] = {
    "B": frozenset({"B", "head"}),
    "A": frozenset({"A", "head"}),
    "A+B": frozenset({"A", "B", "head"}),
}


def seen(state: AdapterState) -> Tensor:
    """All that the model notices of an adapter, as one vector."""
    parts = {**dense(state), **state.only(frozenset({"head"}))}
    return torch.cat([parts[name].double().reshape(-1) for name in sorted(parts)])


def apart(values: list[Value], origin: AdapterState, hidden: float = 0.0) -> Tensor:
    return squared_distances(inner_products(values, origin, hidden)).sqrt()


def far(states: list[AdapterState]) -> Tensor:
    vectors = torch.stack([seen(state) for state in states])
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("trained", ROLES)
@pytest.mark.parametrize("size", [1e-3, 0.1, 30.0])
def test_the_distance_of_two_clients_is_that_of_their_models(trained: str, size: float) -> None:
    origin = random_state(make_specs(), 0, torch.float64)
    states = [moved(origin, ROLES[trained], seed, size) for seed in range(6)]
    found = apart([state.only(ROLES[trained]) for state in states], origin)
    expected = far(states)
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.max())


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"local"}))  # which sends nothing
@pytest.mark.parametrize("round", [1, 2])
def test_so_it_is_for_what_each_method_sends(name: str, round: int) -> None:
    method = get_method(name)
    origin = start_of(method, make_specs(), 0, torch.float64)
    server = ServerState(origin, round=round - 1)
    infos = [ClientInfo(f"client-{n}", 5, 2, round) for n in range(5)]
    cohort = assign(method, server, infos)
    states = [
        moved(one.received, method.shared(round), seed) for seed, one in enumerate(cohort.values())
    ]
    found = apart([state.only(method.shared(round)) for state in states], origin)
    expected = far(states)
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.max())


def test_a_product_in_place_of_its_factors_is_compared_as_it_is() -> None:
    origin = random_state(make_specs(), 0, torch.float64)
    states = [moved(origin, ROLES["A+B"], seed) for seed in range(4)]

    def projected(state: AdapterState) -> Value:
        products = {f"{layer}.lora_delta.weight": whole for layer, whole in dense(state).items()}
        return {**products, **state.only(frozenset({"head"}))}

    found = apart([projected(state) for state in states], origin | projected(origin))
    torch.testing.assert_close(found, far(states), rtol=1e-9, atol=0)


def test_without_an_adapter_all_tensors_are_compared_as_they_are() -> None:
    origin = random_state(make_specs(), 0, torch.float64)
    states = [moved(origin, ROLES["B"], seed) for seed in range(4)]
    values = [dict(state.only(ROLES["B"])) for state in states]
    found = squared_distances(inner_products(values, dict(origin), hidden=1.0))
    flat = torch.stack([torch.cat([t.reshape(-1) for t in value.values()]) for value in values])
    torch.testing.assert_close(found.sqrt(), torch.cdist(flat, flat), rtol=1e-7, atol=1e-12)


def test_a_small_factor_with_a_large_product_is_far_and_a_large_one_with_a_small_product_near() -> (
    None
):
    origin = random_state(make_specs(((6, 8, 2),)), 0, torch.float64)
    lopsided = origin[A].clone()
    lopsided[0] *= 1000.0
    lopsided[1] *= 0.001
    origin = origin | {A: lopsided}
    loud, quiet = origin[B].clone(), origin[B].clone()
    loud[0, 0] += 0.1  # meets the large row of lora_A
    quiet[0, 1] += 10.0  # meets the small one
    values: list[Value] = [{B: origin[B]}, {B: loud}, {B: quiet}]
    found = apart(values, origin)
    assert float(found[0, 1]) > 1000 * float(found[0, 2])


@pytest.mark.parametrize("size", [1e2, 1e6])
def test_a_move_that_the_other_factor_hides_counts_a_tenth(size: float) -> None:
    origin = random_state(make_specs(((6, 8, 2),)), 0, torch.float64)
    asleep = origin[A].clone()
    asleep[1] = 0.0
    origin = origin | {A: asleep}
    hiding = origin[B].clone()
    hiding[0, 1] += size
    values: list[Value] = [{B: origin[B]}, {B: hiding}]
    assert float(apart(values, origin)[0, 1]) == 0
    layer = next(iter(origin.scaling))
    typical = float(asleep.norm()) / math.sqrt(2)
    expected = HIDDEN * origin.scaling[layer] * typical * size
    assert float(apart(values, origin, HIDDEN)[0, 1]) == pytest.approx(expected, rel=1e-9)


def test_what_hidden_moves_count_can_be_left_to_some_whom_the_others_cannot_sway() -> None:
    start = random_state(make_specs(), 0, torch.float64)
    honest: Value = moved(start, ROLES["A+B"], 1)
    loud: list[Value] = [moved(start, ROLES["A+B"], seed, 1e4) for seed in (2, 3, 4)]
    alone = inner_products([honest], start)[0, 0]
    swayed = inner_products([honest, *loud], start)[0, 0]
    kept = inner_products([honest, *loud], start, sized_by=[honest])[0, 0]
    assert swayed > 1000 * alone
    assert float(kept) == pytest.approx(float(alone), rel=1e-12)


def test_while_lora_b_is_zero_moves_of_lora_a_are_compared_as_they_are() -> None:
    origin = random_state(make_specs(((6, 8, 2),)), 0, torch.float64)
    origin = origin | {B: torch.zeros_like(origin[B])}
    values: list[Value] = [{A: origin[A]}, {A: origin[A] + 1.0}]
    layer = next(iter(origin.scaling))
    expected = origin.scaling[layer] * math.sqrt(origin[A].numel())
    assert float(apart(values, origin, HIDDEN)[0, 1]) == pytest.approx(expected, rel=1e-9)


def test_the_same_product_from_other_factors_is_seen_where_the_factors_are_averaged() -> None:
    origin = random_state(make_specs(((6, 8, 2),)), 0, torch.float64)
    states = [moved(origin, ROLES["A+B"], seed, 0.01) for seed in range(4)]
    values: list[Value] = [state.only(ROLES["A+B"]) for state in states]
    turned = {**values[0], A: values[0][A] * 1e-4, B: values[0][B] * 1e4}
    found = apart([*values, turned], origin, HIDDEN)
    assert float(apart([*values, turned], origin)[0, 4]) < 1e-6
    assert float(found[:4, 4].min()) > 100 * float(found[:4, :4].max())


def test_no_inner_product_overflows_for_the_largest_float32() -> None:
    origin = random_state(make_specs(), 0)
    huge = {name: torch.full_like(t, 3e38) for name, t in origin.items() if role_of(name) != "head"}
    values: list[Value] = [origin.only(ROLES["A+B"]), origin.only(ROLES["A+B"]) | huge]
    assert torch.isfinite(inner_products(values, origin)).all()
