"""Claims about adapters as values and about low-rank algebra, against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import HEAD, LAYERS, dense, make_specs, random_state, same

from rolora.algorithm.adapter import AdapterState, Roles, layer_of, role_of, tensor_hash
from rolora.algorithm.low_rank import LowRank
from rolora.algorithm.seeding import generator

QUERY = "base_model.model.layer.0.query"
reproducible = settings(max_examples=50, derandomize=True)
seeds = st.integers(0, 2**31)


def low_rank(seed: int, out: int, width: int, ranks: list[int]) -> LowRank:
    rng = generator(seed, "low-rank")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return LowRank((float(draw()), draw(out, rank), draw(rank, width)) for rank in ranks)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[LowRank, LowRank]:
    out, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    ranks = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    one, other = (low_rank(draw(seeds), out, width, draw(ranks)) for _ in range(2))
    return one, other


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        (f"{QUERY}.lora_A.weight", "A"),
        (f"{QUERY}.lora_B.weight", "B"),
        ("base_model.model.score.weight", "head"),
        ("base_model.model.lora_A.dense.bias", "head"),
    ],
)
def test_a_tensor_s_role_is_read_from_the_end_of_its_name(name: str, role: str) -> None:
    assert role_of(name) == role


def test_both_factors_of_a_layer_name_the_same_layer() -> None:
    assert layer_of(f"{QUERY}.lora_A.weight") == layer_of(f"{QUERY}.lora_B.weight") == QUERY


def test_names_come_in_sorted_order_whatever_order_they_were_given_in() -> None:
    state = random_state(make_specs(), 0)
    turned = AdapterState(dict(reversed(list(state.items()))), state.scaling)
    assert list(turned) == list(state) == sorted(state)


def test_overlaying_takes_the_right_side_and_leaves_both_sides_as_they_were() -> None:
    one, other = random_state(make_specs(), 1), random_state(make_specs(), 2)
    before = {name: tensor.clone() for name, tensor in one.items()}
    both = one | other.only(frozenset({"A"}))
    assert same(both.only(frozenset({"A"})), other.only(frozenset({"A"})))
    assert same(both.only(frozenset({"B", "head"})), one.only(frozenset({"B", "head"})))
    assert same(one, before)
    assert both.scaling == one.scaling


def test_a_state_does_not_follow_the_mapping_it_was_built_from() -> None:
    tensors = {
        name: tensor.requires_grad_() for name, tensor in random_state(make_specs(), 1).items()
    }
    scaling = {"layer": 1.0}
    state = AdapterState(tensors, scaling)
    tensors.clear()
    scaling["layer"] = 2.0
    assert len(state) == len(make_specs().tensors)
    assert state.scaling == {"layer": 1.0}
    assert not any(tensor.requires_grad for tensor in state.values())


def test_the_three_roles_split_a_state_without_overlap() -> None:
    state = random_state(make_specs(), 0)
    kinds: list[Roles] = [frozenset({"A"}), frozenset({"B"}), frozenset({"head"})]
    parts = [state.only(kind) for kind in kinds]
    assert [len(part) for part in parts] == [len(LAYERS), len(LAYERS), len(HEAD)]
    assert same(parts[0] | parts[1] | parts[2], state)


def test_the_delta_of_a_layer_is_scaling_times_b_times_a() -> None:
    state = random_state(make_specs(), 3)
    assert state.delta().keys() == state.scaling.keys()
    for layer, matrix in state.delta().items():
        close(matrix.dense(), dense(state)[layer])


def test_a_layer_that_lacks_a_factor_has_no_delta() -> None:
    state = random_state(make_specs(), 3)
    without = state.select(lambda name: name != f"{QUERY}.lora_B.weight")
    assert without.delta().keys() == state.scaling.keys() - {QUERY}
    assert state.only(frozenset({"B"})).delta() == {}


def test_bytes_are_elements_times_width() -> None:
    specs = make_specs()
    elements = sum(math.prod(spec.shape) for spec in specs.tensors)
    assert random_state(specs, 0).num_bytes() == 4 * elements
    assert random_state(specs, 0, torch.float64).num_bytes() == 8 * elements


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([[1.0, 2.0], [3.0, 4.5]]),
        torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
    ],
    ids=["value", "shape", "dimensions", "dtype"],
)
def test_a_hash_tells_value_shape_and_dtype_apart(other: torch.Tensor) -> None:
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert tensor_hash(tensor) == tensor_hash(torch.tensor([[1.0, 3.0], [2.0, 4.0]]).T)
    assert tensor_hash(other) != tensor_hash(tensor)


def test_a_tensor_without_dimensions_has_a_hash_too() -> None:
    assert tensor_hash(torch.tensor(1.0)) != tensor_hash(torch.tensor([1.0]))


@reproducible
@given(pairs(), st.floats(-3, 3))
def test_sums_differences_and_multiples_are_those_of_the_dense_matrices(
    both: tuple[LowRank, LowRank], factor: float
) -> None:
    one, other = both
    close((one + other).dense(), one.dense() + other.dense())
    close((one - other).dense(), one.dense() - other.dense())
    close((one * factor).dense(), one.dense() * factor)


@reproducible
@given(pairs())
def test_the_norm_is_the_frobenius_norm_of_the_dense_matrix(both: tuple[LowRank, LowRank]) -> None:
    matrix = both[0] - both[1]
    assert matrix.norm() == pytest.approx(float(matrix.dense().norm()), rel=1e-9, abs=1e-12)


@reproducible
@given(seeds, st.integers(1, 5), st.booleans(), st.integers(2, 5))
def test_terms_that_share_a_factor_become_one_term_of_the_same_matrix(
    seed: int, rank: int, share_right: bool, count: int
) -> None:
    shared = low_rank(seed, 4, 6, [rank]).terms[0]
    terms = low_rank(seed + 1, 4, 6, [rank] * count).terms
    if share_right:
        matrix = LowRank((w, left, shared[2].clone()) for w, left, _ in terms)
    else:
        matrix = LowRank((w, shared[1].clone(), right) for w, _, right in terms)
    merged = matrix.compact()
    assert len(merged.terms) == 1
    close(merged.dense(), matrix.dense())


@reproducible
@given(pairs())
def test_compacting_keeps_the_matrix(both: tuple[LowRank, LowRank]) -> None:
    matrix = both[0] + both[1] + both[0] * 0.5
    close(matrix.compact().dense(), matrix.dense())


def test_a_matrix_minus_itself_is_exactly_nothing() -> None:
    matrix = low_rank(5, 4, 6, [3])
    assert (matrix - matrix).norm() == 0.0
    assert LowRank(()).norm() == 0.0


def test_a_small_difference_of_large_products_keeps_its_digits() -> None:
    # the products are ~1e6, their difference ~1e-8: multiplying out first would leave noise
    rng = generator(1, "cancel")
    left, right = (
        torch.randn(shape, generator=rng, dtype=torch.float64) * 1e3 for shape in ((4, 2), (2, 6))
    )
    step = torch.randn(4, 2, generator=rng, dtype=torch.float64) * 2.0**-37
    moved = left + step
    found = (LowRank([(1.0, moved, right)]) - LowRank([(1.0, left, right)])).norm()
    assert found == pytest.approx(float(((moved - left) @ right).norm()), rel=1e-6)


@reproducible
@given(seeds, st.integers(1, 60), st.sampled_from(["A", "B", "both"]), st.integers(1, 3))
def test_a_long_sum_of_products_stays_small_and_is_the_dense_sum(
    seed: int, count: int, moving: str, rank: int
) -> None:
    rng = generator(seed, "sum")
    left, right = torch.randn(5, rank, generator=rng), torch.randn(rank, 7, generator=rng)
    total, expected = LowRank(()), torch.zeros(5, 7, dtype=torch.float64)
    for _ in range(count):
        left = left if moving == "A" else torch.randn(5, rank, generator=rng)
        right = right if moving == "B" else torch.randn(rank, 7, generator=rng)
        weight = float(torch.rand((), generator=rng))
        total = total + LowRank([(weight, left, right)])
        expected += weight * left.double() @ right.double()
    close(total.dense(), expected)
    assert len(total.terms) <= 34
    if moving != "both":
        assert len(total.compact().terms) == 1
