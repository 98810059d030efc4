"""Claims about robust rules: against NumPy written from the papers, byzfl's values, and attacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from states import LAYERS, dense, make_specs, moved, random_state
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, role_of
from rolora.algorithm.effect import HIDDEN, inner_products
from rolora.algorithm.reduce import (
    CLIENT_WEIGHTS,
    Memory,
    Reducer,
    Value,
    clip,
    compose,
    fedavgm,
    mean,
    median,
    trimmed_mean,
)
from rolora.algorithm.robust import (
    bucketing,
    bulyan,
    centered_clip,
    clip_product,
    fltrust,
    geometric_median,
    krum,
    multi_krum,
    nnm,
)
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation
from rolora.errors import ConfigError

F = 2
RULES: dict[str, Callable[[], Reducer]] = {
    "median": lambda: median(byzantine=F),
    "trimmed_mean": lambda: trimmed_mean(byzantine=F),
    "krum": lambda: krum(byzantine=F),
    "multi_krum": lambda: multi_krum(byzantine=F),
    "bulyan": lambda: bulyan(byzantine=F),
    "geometric_median": lambda: geometric_median(byzantine=F),
    "centered_clip": lambda: centered_clip(byzantine=F),
    "nnm+trimmed_mean": lambda: nnm(trimmed_mean(byzantine=F), byzantine=F),
    "nnm+krum": lambda: nnm(krum(byzantine=F), byzantine=F),
    "clip+multi_krum": lambda: clip(multi_krum(byzantine=F), norm=1e3),
    "clip_product+median": lambda: clip_product(median(byzantine=F), norm=1e3),
}
LEAST = {
    "median": 5,
    "trimmed_mean": 5,
    "krum": 7,
    "multi_krum": 7,
    "bulyan": 11,
    "geometric_median": 5,
    "centered_clip": 5,
    "nnm+trimmed_mean": 5,
    "nnm+krum": 7,
    "clip+multi_krum": 7,
    "clip_product+median": 5,
}
BYZFL = json.loads(Path(__file__).with_name("byzfl.json").read_text())["cases"]


def whole(reducer: Reducer, given: np.ndarray, start: np.ndarray | None = None) -> Memory:
    """What a rule makes of these rows (n, d): the row ``value``, and the clients' ``weights``."""
    first = {"a": torch.tensor(np.zeros(given.shape[1]) if start is None else start)}
    memory = reducer.init()
    for row in given:
        memory = reducer.add(memory, {"a": torch.tensor(row)}, first, 1.0)
    value, kept = reducer.finish(memory, generator(0, "finish"))
    return {"value": value["a"].numpy(), "weights": kept[CLIENT_WEIGHTS].numpy()}


def row(reducer: Reducer, given: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    found: np.ndarray = whole(reducer, given, start)["value"]
    return found


def drawn(seed: int, clients: int = 11, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(clients, width))


# The papers' formulas, one coordinate or one pair at a time.


def krum_scores(x: np.ndarray, f: int) -> list[float]:
    scores = []
    for one in x:
        distances = sorted(float(np.sum((one - other) ** 2)) for other in x)
        scores.append(sum(distances[: len(x) - f]))  # its own 0 and the n - f - 1 nearest others
    return scores


def numpy_krum(x: np.ndarray, f: int = F) -> np.ndarray:
    best: np.ndarray = x[int(np.argmin(krum_scores(x, f)))]
    return best


def numpy_multi_krum(x: np.ndarray, f: int = F) -> np.ndarray:
    order = np.argsort(krum_scores(x, f), kind="stable")
    found: np.ndarray = x[order[: len(x) - f]].mean(axis=0)
    return found


def numpy_bulyan(x: np.ndarray, f: int = F) -> np.ndarray:
    left, chosen = [*x], list[np.ndarray]()
    while len(chosen) < len(x) - 2 * f:
        chosen.append(left.pop(int(np.argmin(krum_scores(np.array(left), f)))))
    result = []
    for values in np.array(chosen).T:
        middle = np.median(values)
        nearest = sorted(values, key=lambda value: abs(value - middle))[: len(chosen) - 2 * f]
        result.append(np.mean(nearest))
    return np.array(result)


def numpy_geometric_median(x: np.ndarray) -> np.ndarray:
    z: np.ndarray = x.mean(axis=0)
    for _ in range(5000):
        weights = 1 / np.maximum(np.linalg.norm(x - z, axis=1), 1e-12)
        z = (weights[:, None] * x).sum(axis=0) / weights.sum()
    return z


def numpy_centered_clip(x: np.ndarray, radius: float | None = None) -> np.ndarray:
    v = np.zeros(x.shape[1])
    for _ in range(5):
        norms = np.linalg.norm(x - v, axis=1)
        tau = np.sort(norms)[(len(x) - 1) // 2] if radius is None else radius
        v = v + np.mean([(one - v) * min(1, tau / n) for one, n in zip(x, norms, strict=True)], 0)
    return v


def numpy_nnm(x: np.ndarray, f: int = F) -> np.ndarray:
    mixed = []
    for one in x:
        nearest = sorted(x, key=lambda other: float(np.sum((one - other) ** 2)))
        mixed.append(np.mean(nearest[: len(x) - f], axis=0))
    return np.array(mixed)


def numpy_trimmed_mean(x: np.ndarray, f: int = F) -> np.ndarray:
    found: np.ndarray = np.sort(x, axis=0)[f : len(x) - f].mean(axis=0)
    return found


ORACLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "trimmed_mean": numpy_trimmed_mean,
    "krum": numpy_krum,
    "multi_krum": numpy_multi_krum,
    "bulyan": numpy_bulyan,
    "geometric_median": numpy_geometric_median,
    "centered_clip": numpy_centered_clip,
    "nnm+trimmed_mean": lambda x: numpy_trimmed_mean(numpy_nnm(x)),
    "nnm+krum": lambda x: numpy_krum(numpy_nnm(x)),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("seed", range(8))
def test_each_rule_is_the_formula_of_its_paper(name: str, seed: int) -> None:
    x = drawn(seed, 11 + seed % 3)
    x[:F] *= 1 + 10 * (seed % 2)
    np.testing.assert_allclose(row(RULES[name](), x), ORACLES[name](x), rtol=0, atol=1e-8)


def test_a_radius_of_one_s_own_replaces_the_median_of_the_distances() -> None:
    x = drawn(3)
    found = row(centered_clip(radius=0.7), x)
    np.testing.assert_allclose(found, numpy_centered_clip(x, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", range(len(BYZFL)))
@pytest.mark.parametrize("name", sorted(set(RULES) & BYZFL[0]["found"].keys()))
def test_each_rule_has_the_values_of_byzfl(name: str, case: int) -> None:
    given, found = np.array(BYZFL[case]["vectors"]), BYZFL[case]["found"][name]
    reducer = centered_clip(radius=1.5) if name == "centered_clip" else RULES[name]()
    np.testing.assert_allclose(row(reducer, given), found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", range(len(BYZFL)))
def test_nearest_neighbour_mixing_has_the_mixtures_of_byzfl(case: int) -> None:
    seen: list[np.ndarray] = []

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        seen.append(value["a"].numpy())
        return {"value": value}

    look = Reducer(dict, add, lambda memory, rng: (memory["value"], {}))
    whole(nnm(look, byzantine=F), np.array(BYZFL[case]["vectors"]))
    np.testing.assert_allclose(np.array(seen), BYZFL[case]["found"]["nnm"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_clients_does_not_matter(name: str) -> None:
    x = drawn(5)
    order = np.random.default_rng(0).permutation(len(x))
    one, other = whole(RULES[name](), x), whole(RULES[name](), x[order])
    np.testing.assert_allclose(one["value"], other["value"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(one["weights"][order], other["weights"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_what_is_added_to_the_start_and_all_clients_is_added_to_the_result(name: str) -> None:
    x, shift = drawn(6), drawn(7, 1)[0]
    moved_along = row(RULES[name](), x + shift, shift)
    np.testing.assert_allclose(moved_along, row(RULES[name](), x) + shift, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in RULES if "clip_" not in name])
@pytest.mark.parametrize("factor", [-3.0, 1e-5, 100.0])
def test_what_scales_all_clients_scales_the_result(name: str, factor: float) -> None:
    x = drawn(8)
    scaled = row(RULES[name](), factor * x) / factor
    np.testing.assert_allclose(scaled, row(RULES[name](), x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", RULES)
def test_where_all_clients_agree_the_result_is_theirs(name: str) -> None:
    x = np.tile(drawn(9, 1), (11, 1))
    found = row(RULES[name](), x)
    # centered clipping comes nearer with each of its steps, from where the round started
    near = 1e-12 if name != "centered_clip" else 1e-6
    np.testing.assert_allclose(found, x[0], rtol=0, atol=near)


def attacked(seed: int, length: float, together: bool) -> tuple[np.ndarray, np.ndarray]:
    """Nine honest clients near 1, and two that send something ``length`` long."""
    honest = 1 + 0.1 * drawn(seed, 9)
    way = drawn(seed + 100, 2)
    bad = length * (way[[0, 0]] if together else way)
    return honest, np.concatenate([bad, honest])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [1e6, 1e30])
@pytest.mark.parametrize("together", [True, False])
def test_two_clients_that_send_anything_leave_the_result_among_the_honest(
    name: str, length: float, together: bool
) -> None:
    honest, everyone = attacked(11, length, together)
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    away = np.linalg.norm(row(RULES[name](), everyone) - honest.mean(axis=0))
    assert away <= (4 if name == "centered_clip" else 1.5) * spread


@pytest.mark.parametrize("rule", [mean, lambda: bucketing(mean())])
def test_the_mean_goes_wherever_one_of_them_wants(rule: Callable[[], Reducer]) -> None:
    _, everyone = attacked(11, 1e6, True)
    reducer, first = rule(), {"a": torch.zeros(6, dtype=torch.float64)}
    memory = reducer.init()
    for one in everyone:
        memory = reducer.add(memory, {"a": torch.tensor(one)}, first, 1.0)
    value, _ = reducer.finish(memory, generator(0))
    assert float(value["a"].norm()) > 1e5


@pytest.mark.parametrize("name", RULES)
def test_a_client_far_from_all_others_has_less_weight_than_an_equal_share(name: str) -> None:
    _, everyone = attacked(12, 1e6, False)
    weights = whole(RULES[name](), everyone)["weights"]
    assert weights.shape == (11,)
    assert float(weights.sum()) <= 1 + 1e-12
    assert weights[:2].max() < 0.25 / 11
    assert weights[2:].sum() > 0.5


def test_the_weights_are_those_that_make_the_result() -> None:
    x = drawn(13)
    for name in ("krum", "multi_krum", "geometric_median", "centered_clip", "nnm+krum"):
        found = whole(RULES[name](), x)
        np.testing.assert_allclose(found["weights"] @ x, found["value"], rtol=0, atol=1e-10)


def test_a_mixture_s_weights_go_back_to_the_clients_that_it_is_made_of() -> None:
    x = drawn(14, 10)
    found = whole(bucketing(krum(), size=3), x)
    chosen = np.flatnonzero(found["weights"])
    np.testing.assert_allclose(found["weights"][chosen], 1 / len(chosen))
    np.testing.assert_allclose(x[chosen].mean(axis=0), found["value"], rtol=0, atol=1e-12)


def test_buckets_hang_on_the_random_numbers_of_the_round_alone() -> None:
    x = drawn(15, 10)
    reducer, first = bucketing(median(), size=2), {"a": torch.zeros(6, dtype=torch.float64)}

    def once(seed: int) -> Tensor:
        memory = reducer.init()
        for one in x:
            memory = reducer.add(memory, {"a": torch.tensor(one)}, first, 1.0)
        return reducer.finish(memory, generator(seed))[0]["a"]

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


@pytest.mark.parametrize("name", RULES)
def test_weights_that_clients_ask_for_change_nothing(name: str) -> None:
    x, first = drawn(16), {"a": torch.zeros(6, dtype=torch.float64)}
    found = []
    for weights in ([1.0] * 11, [1e18] + [1.0] * 10):
        reducer = RULES[name]()
        memory = reducer.init()
        for one, weight in zip(x, weights, strict=True):
            memory = reducer.add(memory, {"a": torch.tensor(one)}, first, weight)
        found.append(reducer.finish(memory, generator(0))[0]["a"])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", RULES)
def test_each_rule_says_how_many_it_needs_and_reduces_no_fewer(name: str) -> None:
    reducer = RULES[name]()
    assert reducer.least == LEAST[name]
    assert np.isfinite(row(reducer, drawn(17, LEAST[name]))).all()
    with pytest.raises(ValueError, match=f"needs {LEAST[name]} updates"):
        row(reducer, drawn(17, LEAST[name] - 1))


def test_buckets_need_as_many_clients_as_fill_what_their_rule_needs() -> None:
    assert bucketing(krum(byzantine=1), size=2).least == 9  # five buckets, the last with one
    assert np.isfinite(row(bucketing(krum(byzantine=1), size=2), drawn(18, 9))).all()


def test_a_server_optimizer_and_a_wrapper_of_three_functions_pass_on_what_a_rule_needs() -> None:
    assert fedavgm(krum(byzantine=1)).least == 5
    assert compose([("fedavgm", {}), ("nnm", {}), ("bulyan", {"byzantine": 1})]).least == 7


def test_mixing_before_a_server_optimizer_keeps_its_momentum() -> None:
    def play(reducer: Reducer) -> list[Tensor]:
        memory, found = reducer.init(), []
        first = {"a": torch.zeros(6, dtype=torch.float64)}
        for round in range(3):
            for one in drawn(20 + round, 7):
                memory = reducer.add(memory, {"a": torch.tensor(one)}, first, 1.0)
            value, kept = reducer.finish(memory, generator(0))
            memory = {key: kept[key] for key in kept if key != CLIENT_WEIGHTS}
            found.append(value["a"])
        return found

    inside, outside = play(nnm(fedavgm(median()))), play(fedavgm(nnm(median())))
    for one, other in zip(inside, outside, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: krum(byzantine=-1), "krum: byzantine must be at least 0"),
        (lambda: median(byzantine=-1), "median: byzantine must be at least 0"),
        (lambda: trimmed_mean(byzantine=-1), "trimmed_mean: byzantine must be at least 0"),
        (lambda: fltrust(byzantine=-1), "fltrust: byzantine must be at least 0"),
        (lambda: nnm(fltrust()), "nnm mixes updates, so .* leave nnm out"),
        (lambda: bucketing(clip(fltrust(), norm=1.0)), "bucketing mixes updates"),
        (lambda: compose([("nnm", {}), ("fltrust", {})]), "nnm mixes updates"),
        (lambda: geometric_median(smoothing=0.0), "smoothing must be positive"),
        (lambda: centered_clip(radius=0.0), "radius must be positive"),
        (lambda: centered_clip(iterations=0), "iterations must be at least 1"),
        (lambda: bucketing(mean(), size=0), "size must be at least 1"),
        (lambda: clip_product(mean(), norm=0.0), "norm must be positive"),
    ],
)
def test_a_setting_out_of_range_is_refused(make: Callable[[], Reducer], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


# The rule that trusts its first client.


def numpy_fltrust(x: np.ndarray, start: np.ndarray) -> np.ndarray:
    trusted, total, scores = x[0] - start, np.zeros(x.shape[1]), 0.0
    for one in x[1:]:
        move = one - start
        cosine = move @ trusted / (np.linalg.norm(move) * np.linalg.norm(trusted))
        score = max(float(cosine), 0.0)
        total += score * np.linalg.norm(trusted) / np.linalg.norm(move) * move
        scores += score
    found: np.ndarray = start + total / scores
    return found


@pytest.mark.parametrize("seed", range(8))
def test_trust_is_the_formula_of_its_paper(seed: int) -> None:
    x, start = drawn(seed, 9 + seed % 3), drawn(seed + 50, 1)[0]
    x[1:3] *= 1 + 10 * (seed % 2)
    found = row(fltrust(byzantine=F), x, start)
    np.testing.assert_allclose(found, numpy_fltrust(x, start), rtol=0, atol=1e-10)


def test_the_order_of_those_who_are_not_trusted_does_not_matter() -> None:
    x = drawn(30)
    order = np.array([0, *(1 + np.random.default_rng(0).permutation(10))])
    one, other = whole(fltrust(), x), whole(fltrust(), x[order])
    np.testing.assert_allclose(one["value"], other["value"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(one["weights"][order], other["weights"], rtol=0, atol=1e-12)
    swapped = row(fltrust(), x[[1, 0, *range(2, 11)]])
    assert np.abs(swapped - one["value"]).max() > 0.1  # who comes first does


@pytest.mark.parametrize("factor", [-3.0, 1e-5, 100.0])
def test_what_scales_or_shifts_all_scales_or_shifts_what_is_trusted(factor: float) -> None:
    x, shift = drawn(31), drawn(32, 1)[0]
    plain = row(fltrust(), x)
    np.testing.assert_allclose(row(fltrust(), factor * x) / factor, plain, rtol=0, atol=1e-10)
    np.testing.assert_allclose(row(fltrust(), x + shift, shift), plain + shift, rtol=0, atol=1e-10)


@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1e6, 1e30])
def test_how_far_a_client_goes_changes_nothing_beside_a_trusted_one(factor: float) -> None:
    x = drawn(33)
    plain = row(fltrust(), x)
    x[4] *= factor
    np.testing.assert_allclose(row(fltrust(), x), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", [1, 5, 9])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e30])
def test_however_many_send_anything_the_result_goes_no_farther_than_the_trusted_nor_against_it(
    bad: int, length: float
) -> None:
    trusted, sent = drawn(34, 1), length * drawn(35, bad)
    x = np.concatenate([trusted, sent, 1 + 0.1 * drawn(36, 10 - bad)])
    found = row(fltrust(byzantine=bad), x)
    assert np.linalg.norm(found) <= np.linalg.norm(trusted[0]) * (1 + 1e-12)
    assert found @ trusted[0] >= 0


def test_who_goes_the_other_way_has_no_weight_and_the_trusted_one_an_equal_share() -> None:
    x = np.tile(drawn(37, 1), (5, 1))
    x[3] *= -100
    found = whole(fltrust(), x)
    np.testing.assert_allclose(found["value"], x[0], rtol=0, atol=1e-12)
    share = (1 - 1 / 5) / 3
    np.testing.assert_allclose(found["weights"], [1 / 5, share, share, 0, share])


@pytest.mark.parametrize("others", [-1.0, 0.0])
def test_where_nobody_agrees_the_trusted_update_alone_is_the_result(others: float) -> None:
    x = drawn(38, 4)
    x[1:] = others * x[0]
    found = whole(fltrust(), x)
    assert np.array_equal(found["value"], x[0])
    assert found["weights"].tolist() == [1, 0, 0, 0]


def test_where_the_trusted_client_has_not_moved_nothing_moves() -> None:
    x, start = drawn(39), drawn(40, 1)[0]
    x[0] = start
    assert np.array_equal(row(fltrust(), x, start), start)


def test_a_client_that_has_not_moved_neither_votes_nor_spoils_the_sum() -> None:
    x = drawn(41)
    x[5] = 0
    np.testing.assert_allclose(
        row(fltrust(), x), row(fltrust(), np.delete(x, 5, axis=0)), rtol=0, atol=1e-12
    )


def test_weights_that_clients_ask_for_change_no_trust() -> None:
    x, first, reducer = drawn(42), {"a": torch.zeros(6, dtype=torch.float64)}, fltrust()
    memory = reducer.init()
    for place, one in enumerate(x):
        memory = reducer.add(memory, {"a": torch.tensor(one)}, first, 1e18 if place == 3 else 1.0)
    assert np.array_equal(reducer.finish(memory, generator(0))[0]["a"].numpy(), row(fltrust(), x))


def test_who_is_trusted_needs_somebody_honest_beside_the_bad_ones() -> None:
    for bad, least in ((0, 2), (3, 5)):
        assert fltrust(byzantine=bad).least == least
        with pytest.raises(ValueError, match=f"fltrust needs {least} updates"):
            row(fltrust(byzantine=bad), drawn(43, least - 1))


def test_a_rule_that_trusts_says_so_through_what_wraps_it_and_needs_somebody_to_trust() -> None:
    assert compose([("fedavgm", {}), ("clip", {"norm": 1.0}), ("fltrust", {})]).trusting
    assert not compose([("fedavgm", {}), ("krum", {})]).trusting
    for reducer in (fltrust(), clip(fltrust(), norm=1.0), fedavgm(fltrust())):
        assert Aggregation(reducer, trusted="ann").fewest == 2
        with pytest.raises(ConfigError, match=r"aggregate\.trusted is missing"):
            Aggregation(reducer)


# What follows is about adapters: what a client does to the model, not the size of its factor.


def only(state: AdapterState, *roles: str) -> AdapterState:
    return state.only(frozenset(roles))  # type: ignore[arg-type]


def reduced(
    reducer: Reducer, values: list[Value], start: AdapterState
) -> tuple[Value, list[float]]:
    memory = reducer.init()
    for value in values:
        memory = reducer.add(memory, value, start, 1.0)
    value, kept = reducer.finish(memory, generator(0))
    return value, kept[CLIENT_WEIGHTS].tolist()


@pytest.mark.parametrize("roles", [("B", "head"), ("A", "head"), ("A", "B", "head")])
@pytest.mark.parametrize("norm", [0.05, 0.5])
def test_what_a_clipped_product_does_to_the_model_is_bounded(
    roles: tuple[str, ...], norm: float
) -> None:
    start = random_state(make_specs(), 0, torch.float64)
    value = only(moved(start, frozenset(roles), 1, 0.5), *roles)  # type: ignore[arg-type]
    found, weights = reduced(clip_product(mean(), norm=norm), [value], start)
    size = float(inner_products([found], start, hidden=0.0)) ** 0.5
    assert size == pytest.approx(norm, rel=1e-6)
    scales = [float(((found[n] - start[n]) / (value[n] - start[n])).mean()) for n in value]
    assert scales == pytest.approx([weights[0]] * len(value), rel=1e-6)


def test_a_product_within_the_bound_is_not_touched() -> None:
    start = random_state(make_specs(), 0, torch.float64)
    value = only(moved(start, frozenset({"B"}), 1, 1e-4), "B")
    found, weights = reduced(clip_product(mean(), norm=10.0), [value], start)
    assert weights == [1.0]
    assert all(torch.equal(found[name], value[name]) for name in value)


@pytest.mark.parametrize("name", ["krum", "multi_krum", "geometric_median", "nnm+trimmed_mean"])
def test_a_client_with_a_small_factor_and_a_large_product_is_cut(name: str) -> None:
    start = random_state(make_specs(LAYERS[:1]), 0, torch.float64)
    a, b = sorted(only(start, "A", "B"))
    steep = start[a].clone()
    steep[0] *= 1e4
    start = start | {a: steep}
    gentle = torch.tensor([1e-4, 1.0], dtype=torch.float64)  # honest moves avoid the steep row
    honest: list[Value] = [
        {b: start[b] + 0.1 * (moved(start, frozenset({"B"}), seed)[b] - start[b]) * gentle}
        for seed in range(9)
    ]
    sly = start[b].clone()
    sly[:, 0] += 0.005
    # in factor space it is nearer to the start than the honest ones are
    assert float((sly - start[b]).norm()) < min(float((v[b] - start[b]).norm()) for v in honest)
    _, weights = reduced(RULES[name](), [{b: sly}, {b: sly}, *honest], start)
    assert max(weights[:2]) < 0.25 / 11


@pytest.mark.parametrize("name", ["krum", "multi_krum", "geometric_median", "nnm+trimmed_mean"])
def test_a_client_that_moves_only_what_the_other_factor_hides_is_cut(name: str) -> None:
    start = random_state(make_specs(LAYERS[:1]), 0, torch.float64)
    a, b = sorted(only(start, "A", "B"))
    asleep = start[a].clone()
    asleep[1] = 0.0  # what column 1 of lora_B does is not seen before lora_A moves
    start = start | {a: asleep}
    honest: list[Value] = [only(moved(start, frozenset({"B"}), seed), "B") for seed in range(9)]
    sly = honest[0][b].clone()
    sly[:, 1] += 1e3
    _, weights = reduced(RULES[name](), [{b: sly}, {b: sly}, *honest], start)
    assert max(weights[:2]) < 0.25 / 11


@pytest.mark.parametrize("roles", [("B", "head"), ("A", "head")])
def test_trust_goes_by_angles_and_lengths_of_what_clients_do_to_the_model(
    roles: tuple[str, ...],
) -> None:
    start = random_state(make_specs(), 0, torch.float64)
    values = [only(moved(start, frozenset(roles), seed), *roles) for seed in range(6)]  # type: ignore[arg-type]
    found, _ = reduced(fltrust(), list(values), start)

    def seen(value: Value) -> np.ndarray:
        """What this does to the model: dense products, heads, and a share of factors by hand."""
        state, parts = start | value, []
        for layer, product in dense(state).items():
            other = f"{layer}.lora_{'A' if 'B' in roles else 'B'}.weight"
            mine = f"{layer}.lora_{'B' if 'B' in roles else 'A'}.weight"
            size = float(start[other].square().mean() * max(start[other].shape)) ** 0.5
            own = HIDDEN * start.scaling[layer] * size * (state[mine] - start[mine])
            parts += [product - dense(start)[layer], own]
        parts += [t - start[n] for n, t in state.items() if role_of(n) == "head"]
        return np.concatenate([part.flatten().numpy() for part in parts])

    wanted = numpy_fltrust(np.array([seen(value) for value in values]), np.zeros_like(seen({})))
    np.testing.assert_allclose(seen(found), wanted, rtol=0, atol=1e-9)


def test_a_small_factor_with_a_large_product_is_not_taken_for_a_small_move() -> None:
    start = random_state(make_specs(LAYERS[:1]), 0, torch.float64)
    a, b = sorted(only(start, "A", "B"))
    steep = start[a].clone()
    steep[0] *= 1e4
    start = start | {a: steep}
    gentle = torch.tensor([1e-4, 1.0], dtype=torch.float64)
    trusted = {b: start[b] + 0.1 * (moved(start, frozenset({"B"}), 1)[b] - start[b]) * gentle}
    sly = {b: trusted[b] + torch.tensor([0.005, 0.0], dtype=torch.float64)}
    factor = float((sly[b] - start[b]).norm() / (trusted[b] - start[b]).norm())
    found, _ = reduced(fltrust(), [trusted, sly], start)
    size = float(inner_products([found], start) / inner_products([trusted], start)) ** 0.5
    assert factor < 2
    assert size == pytest.approx(1, rel=1e-6)
