"""Claims about the server step: what it refuses, what it leaves alone, and how it counts."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import HEAD, cohort_of, dense, make_specs, random_state, same, updates_from
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Failure, Update
from rolora.algorithm.method import Method, Reduce, ServerState, freeze_head
from rolora.algorithm.reduce import (
    CLIENT_WEIGHTS,
    Memory,
    Reducer,
    Value,
    clip,
    mean,
    median,
    trimmed_mean,
)
from rolora.algorithm.robust import fltrust
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, RoundReport, step
from rolora.methods import get_method

SIZES = {"ann": 10, "bob": 7, "cy": 3, "dee": 5}
ROLORA = get_method("rolora")
MEAN = Aggregation(mean())
B = "base_model.model.layer.0.query.lora_B.weight"
A = "base_model.model.layer.0.query.lora_A.weight"
BIAS = "base_model.model.score.bias"
ONE = "base_model.model.score.temperature"


def server_state(dtype: torch.dtype = torch.float32) -> ServerState:
    head = {**HEAD, "score.temperature": (1,)}
    return ServerState(random_state(make_specs(head=head), 0, dtype))


def updates_of(method: Method, server: ServerState, size: float = 0.1) -> list[Update]:
    return updates_from(method, cohort_of(method, server, SIZES), size=size)


def take(
    updates: Iterable[Update | Failure],
    server: ServerState | None = None,
    method: Method = ROLORA,
    aggregation: Aggregation = MEAN,
) -> tuple[ServerState, RoundReport]:
    start = server or server_state()
    cohort = cohort_of(method, start, SIZES)
    return step(method, aggregation, start, cohort, updates, generator(0, "aggregate"))


def edited(update: Update, name: str, change: Callable[[Tensor], Tensor] | None) -> Update:
    """The update with one tensor changed, or dropped."""
    tensors = dict(update.adapter)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name, torch.zeros(2, 2)))
    return replace(update, adapter=AdapterState(tensors, update.adapter.scaling))


def renamed(update: Update) -> Update:
    return edited(edited(update, B, None), B.replace("query", "value"), torch.clone)


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        bad = tensor.clone()
        bad.view(-1)[1] = value
        return bad

    return spoil


FAULTS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "wrong name": (renamed, f"{B} is missing"),
    "missing name": (lambda u: edited(u, B, None), f"{B} is missing"),
    "missing head": (lambda u: edited(u, BIAS, None), f"{BIAS} is missing"),
    "extra name": (lambda u: edited(u, "lora_C", torch.clone), "lora_C was not asked for"),
    "frozen factor": (lambda u: edited(u, A, torch.clone), f"{A} was not asked for"),
    "transposed": (lambda u: edited(u, B, lambda t: t.T), "has shape (2, 4), expected (4, 2)"),
    "cut short": (lambda u: edited(u, B, lambda t: t[:3]), "has shape (3, 2), expected (4, 2)"),
    "scalar": (lambda u: edited(u, ONE, lambda t: t[0]), f"{ONE} has shape (), expected (1,)"),
    "float64": (lambda u: edited(u, B, Tensor.double), "has dtype torch.float64, expected"),
    "float16": (lambda u: edited(u, B, Tensor.half), "has dtype torch.float16, expected"),
    "integers": (lambda u: edited(u, B, Tensor.int), "has dtype torch.int32, expected"),
    "NaN": (lambda u: edited(u, B, with_value(math.nan)), f"{B} has values that are not finite"),
    "infinity": (lambda u: edited(u, BIAS, with_value(-math.inf)), "that are not finite"),
    "no rows": (lambda u: replace(u, num_examples=0), "num_examples is 0, but it joined with 7"),
    "negative": (lambda u: replace(u, num_examples=-1), "num_examples is -1"),
    "huge": (lambda u: replace(u, num_examples=10**12), "num_examples is 1000000000000"),
    "boolean": (lambda u: replace(u, num_examples=True), "num_examples is True"),
    "fraction": (lambda u: replace(u, num_examples=7.0), "num_examples is 7.0"),  # type: ignore[arg-type]
    "other count": (lambda u: replace(u, num_examples=8), "num_examples is 8, but it joined with"),
    "stranger": (lambda u: replace(u, client="eve"), "not in this round's cohort"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_update_is_named_and_the_others_are_used_as_if_it_never_came(name: str) -> None:
    spoil, reason = FAULTS[name]
    ann, bob, cy, dee = updates_of(ROLORA, server_state())
    bad = spoil(bob)
    after, report = take([ann, bad, cy, dee])
    expected, _ = take([ann, cy, dee])
    assert report.accepted == ("ann", "cy", "dee")
    assert report.rejected.keys() == {bad.client}
    assert reason in report.rejected[bad.client]
    assert (report.quorum_met, after.round) == (True, 1)
    assert same(after.adapter, expected.adapter)
    with_bob, _ = take([ann, bob, cy, dee])
    assert not same(with_bob.adapter, expected.adapter)


def test_one_client_that_joined_with_one_row_may_not_say_true() -> None:
    server = server_state()
    cohort = cohort_of(ROLORA, server, {"ann": 1})
    (update,) = updates_from(ROLORA, cohort)
    lie = replace(update, num_examples=True)
    _, report = step(ROLORA, MEAN, server, cohort, [lie], generator(0))
    assert report.rejected == {"ann": "num_examples is True, but it joined with 1"}


def test_of_a_client_that_sends_two_updates_the_first_counts_and_it_is_named() -> None:
    ann, bob, cy, dee = updates_of(ROLORA, server_state())
    again = edited(bob, B, lambda tensor: tensor * 2)
    expected, _ = take([ann, bob, cy, dee])
    for order in ([ann, bob, again, cy, dee], [bob, dee, cy, again, ann]):
        after, report = take(order)
        assert report.rejected == {"bob": "sent more than one update; the first counts"}
        assert report.accepted == ("ann", "bob", "cy", "dee")
        assert same(after.adapter, expected.adapter)


def test_a_failed_client_is_named_and_holds_up_nobody() -> None:
    _, bob, cy, dee = updates_of(ROLORA, server_state())
    expected, _ = take([bob, cy, dee])
    after, report = take([Failure("ann", "out of memory"), bob, cy, dee])
    assert report.rejected == {"ann": "out of memory"}
    assert same(after.adapter, expected.adapter)
    after, report = take([bob, Failure("ann", "no answer", missing=True), cy, dee])
    assert (report.rejected, report.missing) == ({}, {"ann": "no answer"})
    assert same(after.adapter, expected.adapter)


def test_updates_that_come_in_turn_are_dropped_once_used() -> None:
    server = server_state()
    alive: list[weakref.ref[AdapterState]] = []

    def stream() -> Iterator[Update]:
        for update in updates_of(ROLORA, server):
            copy = replace(update, adapter=update.adapter | {})
            alive.append(weakref.ref(copy.adapter))
            yield copy
            del copy
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1

    cohort = cohort_of(ROLORA, server, SIZES)
    _, report = step(ROLORA, MEAN, server, cohort, stream(), generator(0))
    assert len(report.accepted) == 4


@pytest.mark.parametrize(
    "aggregation", [MEAN, Aggregation(median()), Aggregation(clip(mean(), norm=1))]
)
def test_order_of_arrival_changes_no_bit(aggregation: Aggregation) -> None:
    updates = updates_of(ROLORA, server_state())
    first, report = take(updates, aggregation=aggregation)
    for turn in (1, 2, 3):
        turned, other = take([*updates[turn:], *updates[:turn]], aggregation=aggregation)
        assert same(turned.adapter, first.adapter)
        assert other == report


def test_below_the_quorum_only_the_attempt_advances() -> None:
    aggregation, server = Aggregation(mean(), quorum=3), replace(server_state(), attempt=1)
    ann, bob, cy, _ = updates_of(ROLORA, server)
    after, report = take([ann, bob, FAULTS["NaN"][0](cy)], server, aggregation=aggregation)
    assert (after.round, after.attempt) == (0, 2)
    assert after.adapter is server.adapter
    assert not report.quorum_met
    assert report.aggregation_error is None
    assert report.accepted == ("ann", "bob")
    assert report.rejected.keys() == {"cy"}
    done, report = take([ann, bob, cy], after, aggregation=aggregation)
    assert (done.round, done.attempt, report.quorum_met) == (1, 0, True)


def test_a_round_without_any_update_never_advances_even_with_a_quorum_of_zero() -> None:
    after, report = take([], aggregation=Aggregation(mean(), quorum=0))
    assert (after.round, after.attempt, report.quorum_met) == (0, 1, False)


@pytest.mark.parametrize("how", ["failed", "silent", "faulty", "unknown"])
def test_without_the_update_of_the_trusted_client_a_round_does_not_advance(how: str) -> None:
    server = server_state()
    ann, bob, cy, dee = updates_of(ROLORA, server)
    replies: dict[str, tuple[list[Update | Failure], str]] = {
        "failed": ([ann, bob, Failure("cy", "offline"), dee], "offline"),
        "silent": ([ann, bob, dee], "it did not answer"),
        "faulty": ([ann, bob, FAULTS["NaN"][0](cy), dee], "not finite"),
        "unknown": ([ann, bob, cy, dee], "it is not in the cohort"),
    }
    sent, reason = replies[how]
    trusted = "eve" if how == "unknown" else "cy"
    for reducer in (mean(), fltrust()):
        aggregation = Aggregation(reducer, trusted=trusted)
        after, report = take(sent, server, aggregation=aggregation)
        assert (after.round, after.attempt, report.quorum_met) == (0, 1, False)
        assert after.adapter is server.adapter
        assert report.reason.startswith(f"no usable update of {trusted}, the trusted client: ")
        assert reason in report.reason
    assert take([ann, bob, cy, dee], aggregation=Aggregation(fltrust(), trusted="cy"))[0].round == 1


@pytest.mark.parametrize("client", list(SIZES))
def test_the_trusted_client_s_update_is_the_first_to_be_reduced_whenever_it_comes(
    client: str,
) -> None:
    seen: list[Value] = []

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        seen.append(value)
        return memory or dict(value)

    look = Reducer(dict, add, lambda memory, rng: (memory, {}), trusting=True)
    server = server_state()
    updates = updates_of(ROLORA, server)
    _, report = take(updates, server, aggregation=Aggregation(look, trusted=client))
    assert report.accepted[0] == client
    assert sorted(report.accepted) == sorted(SIZES)
    own = next(update for update in updates if update.client == client)
    assert all(torch.equal(seen[0][name], own.adapter[name]) for name in seen[0])


def test_clients_weigh_by_their_rows_or_all_alike() -> None:
    server = server_state(torch.float64)
    updates = updates_of(ROLORA, server)
    for weights, shares in (
        ("num_examples", [10 / 25, 7 / 25, 3 / 25, 5 / 25]),
        ("uniform", [1 / 4] * 4),
    ):
        after, _ = take(updates, server, aggregation=Aggregation(mean(), weights))  # type: ignore[arg-type]
        for name in (B, BIAS):
            expected = sum(p * u.adapter[name] for p, u in zip(shares, updates, strict=True))
            assert isinstance(expected, Tensor)
            torch.testing.assert_close(after.adapter[name], expected, rtol=0, atol=1e-12)


def test_the_error_of_a_method_with_weights_of_its_own_is_that_of_its_own_mean() -> None:
    def alike(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        return replace(server, adapter=server.adapter | reduce(weight=lambda update: 1e-30))

    server = server_state(torch.float64)
    exact = replace(ROLORA, aggregate=alike)  # rows differ, but every client weighs the same
    _, report = take(updates_of(ROLORA, server), server, exact)
    assert report.aggregation_error is not None
    assert report.aggregation_error < 1e-12


def test_the_scaling_that_a_client_claims_is_not_believed() -> None:
    ann, bob, cy, dee = updates_of(ROLORA, server_state())
    loud = AdapterState(bob.adapter, dict.fromkeys(bob.adapter.scaling, 1000000.0))
    after, report = take([ann, replace(bob, adapter=loud), cy, dee])
    expected, honest = take([ann, bob, cy, dee])
    assert after.adapter.scaling == expected.adapter.scaling
    assert same(after.adapter, expected.adapter)
    assert report == honest


def test_clipping_measures_a_client_s_move_from_what_it_received() -> None:
    server = server_state(torch.float64)
    updates = updates_of(ROLORA, server, size=10.0)
    (_, bob, _, _) = updates
    cohort = cohort_of(ROLORA, server, {"bob": SIZES["bob"]})
    after, _ = step(
        ROLORA, Aggregation(clip(mean(), norm=0.5)), server, cohort, [bob], generator(0)
    )
    change = [(after.adapter[n] - server.adapter[n]).flatten() for n in bob.adapter]
    assert float(torch.cat(change).norm()) == pytest.approx(0.5)


def dense_error(
    method: Method, server: ServerState, updates: list[Update], after: ServerState
) -> float:
    """The aggregation error with every product multiplied out."""
    total = sum(u.num_examples for u in updates)
    now = dense(after.adapter)
    missed = wanted = 0.0
    for layer in now:
        ideal = torch.zeros_like(now[layer])
        for u in updates:
            ideal += u.num_examples / total * dense(server.adapter | u.adapter)[layer]
        missed += float((ideal - now[layer]).square().sum())
        wanted += float(ideal.square().sum())
    return math.sqrt(missed / wanted) if wanted else 0.0


@st.composite
def rounds(draw: st.DrawFn) -> tuple[ServerState, dict[str, int], float]:
    """Random layer shapes, ranks and client sizes, and how far the clients move."""
    side = st.integers(1, 7)
    layers = draw(st.lists(st.tuples(side, side, st.integers(1, 4)), min_size=1, max_size=3))
    start = random_state(make_specs(tuple(layers)), draw(st.integers(0, 2**31)), torch.float64)
    sizes = draw(st.lists(st.integers(1, 1000), min_size=2, max_size=6))
    number = draw(st.integers(0, 3))
    clients = {f"client-{i}": size for i, size in enumerate(sizes)}
    return ServerState(start, round=number), clients, draw(st.sampled_from([1e-3, 0.1, 3.0]))


reproducible = settings(max_examples=40, derandomize=True)


def play(
    method: Method, server: ServerState, sizes: dict[str, int], size: float
) -> tuple[ServerState, RoundReport, list[Update]]:
    cohort = cohort_of(method, server, sizes)
    updates = updates_from(method, cohort, size=size)
    after, report = step(method, MEAN, server, cohort, updates, generator(0))
    return after, report, updates


@pytest.mark.parametrize("name", ["rolora", "ffa_lora"])
@reproducible
@given(case=rounds())
def test_the_new_product_is_the_weighted_mean_of_the_clients_products(
    name: str, case: tuple[ServerState, dict[str, int], float]
) -> None:
    server, sizes, size = case
    method = get_method(name)
    after, report, updates = play(method, server, sizes, size)
    total = sum(sizes.values())
    for layer, product in dense(after.adapter).items():
        mean_product = sum(
            u.num_examples / total * dense(server.adapter | u.adapter)[layer] for u in updates
        )
        assert isinstance(mean_product, Tensor)
        missed = float((product - mean_product).norm())
        assert missed <= 1e-10 * max(1.0, float(mean_product.norm()))
    assert report.aggregation_error is not None
    assert report.aggregation_error <= 1e-10


@reproducible
@given(case=rounds())
def test_the_mean_of_both_factors_is_not_the_mean_of_the_products(
    case: tuple[ServerState, dict[str, int], float],
) -> None:
    server, sizes, size = case
    _, report, _ = play(get_method("fedit"), server, sizes, size)
    assert report.aggregation_error is not None
    assert report.aggregation_error > 1e-9  # rounding is 1e-15


@pytest.mark.parametrize("name", ["rolora", "ffa_lora", "fedit"])
@pytest.mark.parametrize("rule", ["mean", "median", "trimmed_mean"])
@reproducible
@given(case=rounds())
def test_the_aggregation_error_is_the_one_computed_densely(
    name: str, rule: str, case: tuple[ServerState, dict[str, int], float]
) -> None:
    server, sizes, size = case
    method = get_method(name)
    rules = {"mean": mean(), "median": median(), "trimmed_mean": trimmed_mean(trim=0.3)}
    cohort = cohort_of(method, server, sizes)
    updates = updates_from(method, cohort, size=size)
    after, report = step(method, Aggregation(rules[rule]), server, cohort, updates, generator(0))
    expected = dense_error(method, server, updates, after)
    assert report.aggregation_error == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("name", ["rolora", "ffa_lora"])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-6])
def test_in_float32_the_error_of_an_exact_method_is_rounding_however_little_moved(
    name: str, size: float, round: int
) -> None:
    specs = make_specs(((64, 48, 8), (32, 64, 8)))
    server = ServerState(random_state(specs, 1, scale=0.1), round=round)
    _, report, _ = play(get_method(name), server, SIZES, size)
    assert report.aggregation_error is not None
    assert report.aggregation_error <= 1e-7


@pytest.mark.parametrize("name", ["rolora", "ffa_lora", "fedit"])
def test_the_error_is_zero_when_nothing_moved(name: str) -> None:
    _, report, _ = play(get_method(name), server_state(), SIZES, 0.0)
    assert report.aggregation_error == 0.0


def test_where_factors_are_personal_the_error_is_unknown() -> None:
    _, report, _ = play(get_method("local"), server_state(), SIZES, 0.1)
    assert report.aggregation_error is None


def test_a_method_that_reduces_twice_is_a_bug_and_says_so() -> None:
    def twice(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        reduce()
        reduce()
        return server

    greedy = replace(ROLORA, aggregate=twice)
    with pytest.raises(RuntimeError, match="called reduce twice"):
        take(updates_of(ROLORA, server_state()), method=greedy)


def test_a_method_that_does_not_reduce_is_a_bug_and_says_so() -> None:
    idle = replace(ROLORA, aggregate=lambda server, reduce, rng: server)
    with pytest.raises(RuntimeError, match="'rolora' did not call reduce"):
        take(updates_of(ROLORA, server_state()), method=idle)


def test_a_reducer_that_keeps_what_no_checkpoint_can_hold_is_a_bug_and_says_so() -> None:
    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        return dict(memory["value"]), {"names": ["a"]}

    one = Reducer(dict, lambda memory, value, reference, weight: {"value": value}, finish)
    with pytest.raises(TypeError, match="keeps 'names', which is not a tensor"):
        take(updates_of(ROLORA, server_state()), aggregation=Aggregation(one))


def test_a_reducer_with_weights_of_other_clients_is_a_bug_and_says_so() -> None:
    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        return dict(memory["value"]), {CLIENT_WEIGHTS: torch.ones(3)}

    one = Reducer(dict, lambda memory, value, reference, weight: {"value": value}, finish)
    with pytest.raises(TypeError, match=r"have shape \(3,\), but 4 clients were reduced"):
        take(updates_of(ROLORA, server_state()), aggregation=Aggregation(one))


def test_a_weight_of_the_method_s_own_is_that_of_the_server_s_scaling() -> None:
    def by_size(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        def size(update: Update) -> float:
            return sum(update.adapter.scaling.values())

        return replace(server, adapter=server.adapter | reduce(weight=size))

    ann, bob, cy, dee = updates_of(ROLORA, server_state())
    loud = AdapterState(bob.adapter, dict.fromkeys(bob.adapter.scaling, 1000000.0))
    own = replace(ROLORA, aggregate=by_size)
    after, _ = take([ann, replace(bob, adapter=loud), cy, dee], method=own)
    expected, _ = take([ann, bob, cy, dee], method=own)
    assert same(after.adapter, expected.adapter)


def test_a_projection_sees_what_was_received_overlaid_with_what_was_sent() -> None:
    server = server_state(torch.float64)
    updates = updates_of(ROLORA, server)
    seen: list[AdapterState] = []

    def products(view: AdapterState) -> dict[str, Tensor]:
        seen.append(view)
        return {layer: matrix.dense() for layer, matrix in view.delta().items()}

    def keep(state: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        found = reduce(project=products, weight=lambda update: 1.0)
        for layer, tensor in found.items():
            expected = sum(dense(server.adapter | u.adapter)[layer] for u in updates) / 4
            assert isinstance(expected, Tensor)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-10)
        return state

    take(updates, server, method=replace(ROLORA, aggregate=keep))
    assert same(seen[0], server.adapter | updates[0].adapter)
    assert same(seen[1], server.adapter)  # the reference
    assert len(seen) == 8


def test_with_a_frozen_head_an_update_that_brings_one_is_rejected() -> None:
    method = freeze_head(ROLORA)
    updates = updates_of(ROLORA, server_state())
    _, report = take(updates, method=method)
    assert report.rejected["ann"] == f"{BIAS} was not asked for"
    _, report = take(updates_of(method, server_state()), method=method)
    assert report.rejected == {}
