"""Claims about reducers, against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import relative, same
from torch import Tensor

from rolora.algorithm.reduce import (
    Reducer,
    Value,
    add_,
    clip,
    mean,
    median,
    trimmed_mean,
    zeros_like,
)
from rolora.algorithm.seeding import generator
from rolora.errors import ConfigError

reproducible = settings(max_examples=40, derandomize=True)
REDUCERS: dict[str, Callable[[], Reducer]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": lambda: trimmed_mean(trim=0.2),
    "clip": lambda: clip(mean(), norm=0.5),
}


def values(seed: int, clients: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    rng = generator(seed, "values")
    return [
        {name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for name, shape in
         {"a": (3, 2), "b": (4,)}.items()}
        for _ in range(clients)
    ]  # fmt: skip


def run(
    reducer: Reducer,
    given: list[dict[str, Tensor]],
    weights: list[float] | None = None,
    reference: Value | None = None,
) -> Value:
    start = reference or {name: torch.zeros_like(tensor) for name, tensor in given[0].items()}
    memory = reducer.init()
    for value, weight in zip(given, weights or [1.0] * len(given), strict=True):
        memory = reducer.add(memory, value, start, weight)
    reduced, _ = reducer.finish(memory, generator(0, "finish"))
    return reduced


def stacked(given: list[dict[str, Tensor]], name: str) -> np.ndarray:
    return np.stack([value[name].numpy() for value in given])


cases = given(st.integers(0, 2**31), st.integers(1, 9))


@reproducible
@cases
def test_the_mean_is_the_weighted_average(seed: int, clients: int) -> None:
    many = values(seed, clients)
    weights = [1.0 + (seed * (i + 1)) % 50 for i in range(clients)]
    reduced = run(mean(), many, weights)
    for name in many[0]:
        expected = np.average(stacked(many, name), axis=0, weights=weights)
        np.testing.assert_allclose(reduced[name].numpy(), expected, rtol=0, atol=1e-12)


@reproducible
@cases
def test_the_median_is_numpy_s_per_coordinate(seed: int, clients: int) -> None:
    many = values(seed, clients)
    reduced = run(median(), many, [float(i + 1) for i in range(clients)])
    for name in many[0]:
        expected = np.median(stacked(many, name), axis=0)
        np.testing.assert_allclose(reduced[name].numpy(), expected, rtol=0, atol=1e-14)


@reproducible
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.2, 0.34, 0.49]))
def test_the_trimmed_mean_averages_what_is_left_between_both_cut_ends(
    seed: int, clients: int, trim: float
) -> None:
    many = values(seed, clients)
    reduced = run(trimmed_mean(trim=trim), many)
    cut = min(int(np.ceil(trim * clients - 1e-9)), (clients - 1) // 2)
    for name in many[0]:
        kept = np.sort(stacked(many, name), axis=0)[cut : clients - cut]
        np.testing.assert_allclose(reduced[name].numpy(), kept.mean(axis=0), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("clients", "cut"), [(3, 1), (10, 1), (11, 2), (30, 3), (2, 0), (1, 0)])
def test_a_tenth_is_rounded_up_to_whole_clients_at_each_end(clients: int, cut: int) -> None:
    # client i says i: the i-th power of ten betrays which ones were averaged
    many = [{"a": torch.tensor([10.0**i], dtype=torch.float64)} for i in range(clients)]
    kept = [10.0**i for i in range(cut, clients - cut)]
    assert float(run(trimmed_mean(trim=0.1), many)["a"]) == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_one_client_is_its_own_result_bit_for_bit(name: str) -> None:
    (value,) = many = values(7, 1, torch.float32)
    reference = {key: tensor - 0.01 for key, tensor in value.items()}
    assert same(run(REDUCERS[name](), many, [17.0], reference), value)


@pytest.mark.parametrize("name", sorted(REDUCERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_clients_dtype_and_shapes(name: str, dtype: torch.dtype) -> None:
    many = values(3, 4, dtype)
    reduced = run(REDUCERS[name](), many)
    assert {n: (t.dtype, t.shape) for n, t in reduced.items()} == {
        n: (dtype, t.shape) for n, t in many[0].items()
    }


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_nothing_is_changed_in_place(name: str) -> None:
    many, before = values(3, 4), values(3, 4)
    run(REDUCERS[name](), many, [1.0, 2.0, 3.0, 4.0])
    assert all(same(one, other) for one, other in zip(many, before, strict=True))


@reproducible
@given(st.integers(0, 2**31), st.floats(0.05, 20))
def test_clipping_bounds_the_joint_norm_and_keeps_the_direction(seed: int, norm: float) -> None:
    (reference, value) = values(seed, 2)
    clipped = run(clip(mean(), norm=norm), [value], reference=reference)
    asked = torch.cat([(value[n] - reference[n]).flatten() for n in value])
    got = torch.cat([(clipped[n] - reference[n]).flatten() for n in value])
    assert float(got.norm()) == pytest.approx(min(norm, float(asked.norm())), rel=1e-9)
    assert float(got @ asked) == pytest.approx(float(got.norm() * asked.norm()), rel=1e-9)


def test_a_move_within_the_bound_is_not_touched() -> None:
    reference, value = values(1, 2, torch.float32)
    near = {name: reference[name] + 1e-3 * value[name] for name in value}
    assert same(run(clip(mean(), norm=1.0), [near], reference=reference), near)


def test_clipping_a_median_is_the_median_of_clipped_moves() -> None:
    many = values(2, 5)
    many[0] = {name: tensor * 100 for name, tensor in many[0].items()}
    zero = {name: torch.zeros_like(tensor) for name, tensor in many[0].items()}
    clipped = [dict(run(clip(mean(), norm=0.7), [value], reference=zero)) for value in many]
    assert same(run(clip(median(), norm=0.7), many, reference=zero), run(median(), clipped))
    assert not same(run(clip(median(), norm=0.7), many, reference=zero), run(median(), many))


def attacked(reducer: Reducer) -> tuple[Value, list[dict[str, Tensor]]]:
    """Nine honest clients near 1 and one that sends a million times the opposite."""
    honest = [{n: 1 + 0.1 * t for n, t in value.items()} for value in values(4, 9)]
    liar = {name: tensor * -1e6 for name, tensor in honest[0].items()}
    return run(reducer, [*honest, liar]), honest


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_one_sign_flipped_client_leaves_a_robust_rule_within_the_honest_range(name: str) -> None:
    reduced, honest = attacked(REDUCERS[name]())
    for key, tensor in reduced.items():
        lowest, highest = stacked(honest, key).min(axis=0), stacked(honest, key).max(axis=0)
        assert (lowest <= tensor.numpy()).all()
        assert (tensor.numpy() <= highest).all()


def test_one_sign_flipped_client_throws_the_mean_away() -> None:
    reduced, honest = attacked(mean())
    assert relative(reduced, honest[0]) > 1e4


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0])
def test_a_trim_that_leaves_nobody_is_refused(trim: float) -> None:
    with pytest.raises(ConfigError, match=r"trim must be in \[0, 0.5\)"):
        trimmed_mean(trim=trim)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_clip_norm_that_is_not_positive_is_refused(norm: float) -> None:
    with pytest.raises(ConfigError, match="norm must be positive"):
        clip(mean(), norm=norm)


@pytest.mark.parametrize("size", [3, (1 << 16) + 5])
def test_the_mean_has_the_bits_of_float64_terms_added_one_after_another(size: int) -> None:
    rng = generator(6, "bits")
    many = [{"a": torch.randn(2, size, generator=rng).T} for _ in range(7)]
    weights = [1.0, 913.0, 7.0, 12345.0, 3.0, 64.0, 81.0]
    total = many[0]["a"].double() * weights[0]
    for value, weight in zip(many[1:], weights[1:], strict=True):
        total = total + value["a"].double() * weight
    assert same(run(mean(), many, weights), {"a": (total / sum(weights)).float()})


def test_a_sum_of_sums_gives_the_same_average_as_one_sum() -> None:
    rng = generator(8, "tree")
    many = [torch.randn(1000, generator=rng) for _ in range(60)]
    weights = [float(1 + i % 9) for i in range(60)]
    (one,) = zeros_like(many[:1], torch.float64)
    (root,) = zeros_like(many[:1], torch.float64)
    for tensor, weight in zip(many, weights, strict=True):
        add_([one], [tensor], weight)
    for first in range(0, 60, 10):
        (leaf,) = zeros_like(many[:1], torch.float64)
        for tensor, weight in zip(many[first:][:10], weights[first:][:10], strict=True):
            add_([leaf], [tensor], weight)
        add_([root], [leaf], 1.0)
    assert torch.equal((one / sum(weights)).float(), (root / sum(weights)).float())


def test_a_lone_negative_zero_stays_one() -> None:
    reduced = run(mean(), [{"a": torch.tensor([-0.0, 0.0])}], [3.0])
    assert torch.signbit(reduced["a"]).tolist() == [True, False]
