"""Every method against its own formula, on random rounds; and broken ones, which must be noticed.

What must hold is in ``formulas``. It is asked here of random shapes, ranks, weights and cohorts.
Then each method is broken, in ways that such code has been broken in elsewhere: the very same check
must fail on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from formulas import ALL, CHECKS, Case, dense_error, named, play
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, role_of
from rolora.algorithm.method import Method, Reduce, ServerState
from rolora.methods import get_method, method_names

# the properties


FAIR = (get_method("lora_fair", ridge=0.0), get_method("fedit"))


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    side = st.integers(4, 8)
    rank = st.sampled_from([2, 4] if name == "ravan" else [1, 2, 3, 4])
    layers = draw(st.lists(st.tuples(side, side, rank), min_size=1, max_size=2))
    sizes = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=5))
    ranks = draw(st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes)))
    return Case(
        layers=tuple(layers),
        sizes=tuple(sizes),
        ranks=tuple(ranks),
        round=draw(st.integers(1, 4)),
        move=draw(st.sampled_from([1e-2, 0.1, 1.0])),
        seed=draw(st.integers(0, 2**20)),
    )


def test_every_method_has_a_row_and_a_check() -> None:
    assert sorted(CHECKS) == method_names()


@pytest.mark.parametrize("name", method_names())
@settings(max_examples=25, derandomize=True)
@given(data=st.data())
def test_a_round_is_what_the_method_s_formula_says(name: str, data: st.DataObject) -> None:
    CHECKS[name](play(get_method(name), data.draw(cases(name))))


@pytest.mark.parametrize("name", method_names())
@settings(max_examples=15, derandomize=True)
@given(data=st.data())
def test_the_aggregation_error_is_that_of_the_matrices_multiplied_out(
    name: str, data: st.DataObject
) -> None:
    game = play(get_method(name), data.draw(cases(name)))
    if game.method.personal(game.infos[0].round):
        assert game.report.aggregation_error is None
    else:
        expected = dense_error(game)
        assert game.report.aggregation_error == pytest.approx(expected, rel=1e-6, abs=1e-9)
        lone_or_exact = game.method.exact or (
            len(game.infos) == 1 and not game.method.heterogeneous_ranks
        )
        assert not lone_or_exact or expected <= 1e-2


TYPICAL = Case(
    layers=((6, 6, 2), (5, 7, 4)),
    sizes=(400, 90, 310),
    ranks=(4, 2, 3),
    round=3,
    move=3.0,
    seed=11,
)


def test_lora_fair_without_a_ridge_is_exact_where_lora_a_has_more_rows_than_inputs() -> None:
    case = Case(((4, 2, 3),), sizes=(3, 5), ranks=(3, 3), round=1, move=0.5, seed=0)
    fair, fedit = (play(method, case).report.aggregation_error or 0.0 for method in FAIR)
    assert fair < 1e-6 < 1e-3 < fedit


def test_the_methods_that_say_they_are_exact_are_those_whose_error_is_rounding() -> None:
    found = {
        name: play(get_method(name), TYPICAL).report.aggregation_error for name in method_names()
    }
    for name, error in found.items():
        if error is not None and name != "centralized":
            assert get_method(name).exact == (error <= 1e-9), name


# each method broken: the check must notice


def reducing(method: Method, change: Callable[[Reduce, Any, Any], Any]) -> Method:
    """Another way to combine: ``change(reduce, project, weight)``."""

    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        @wraps(reduce)
        def changed(project: Any = None, weight: Any = None) -> Any:
            return change(reduce, project, weight)

        return method.aggregate(server, changed, rng)  # type: ignore[arg-type]

    return replace(method, aggregate=aggregate)


def unweighted(method: Method) -> Method:
    """The mean of the clients, whatever their rows."""
    return reducing(method, lambda reduce, project, weight: reduce(project, lambda update: 1.0))


def then(method: Method, change: Callable[[AdapterState, AdapterState], Any]) -> Method:
    """The server's new tensors, changed: ``change(before, after)`` gives those to put in place."""

    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        after = method.aggregate(server, reduce, rng)
        return replace(after, adapter=after.adapter | change(server.adapter, after.adapter))

    return replace(method, aggregate=aggregate)


def sending(method: Method, change: Callable[[AdapterState, AdapterState], Any]) -> Method:
    """What a client sends, changed: ``change(trained, what it should send)``."""

    def upload(received: AdapterState, end: AdapterState, info: ClientInfo) -> AdapterState:
        right = method.upload(received, end, info)
        return right | dict(change(end, right))

    return replace(method, upload=upload)


def each(
    state: AdapterState, which: str, change: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The tensors of this kind of every layer, changed: ``change(layer, tensor)``."""
    return {
        named(layer, which): change(layer, state[named(layer, which)]) for layer in state.layers()
    }


def scaled_again(method: Method) -> Method:
    """The server's factors of a product that it did not divide by the scaling."""

    def change(before: AdapterState, after: AdapterState) -> dict[str, Tensor]:
        return each(after, "B", lambda layer, b: b * after.scaling[layer])

    return then(method, change)


def growth(before: AdapterState, after: AdapterState, times: Callable[[str], float]) -> Any:
    """The new delta with what was added to it multiplied."""
    return {
        name: before[name] + times(name.rsplit(".lora_", 1)[0]) * (after[name] - before[name])
        for name in before.only(frozenset({"delta"}))
    }


def singular_values_to(factor: str, method: Method) -> Method:
    """All of S in one factor, or in none of them ("")."""

    def change(before: AdapterState, after: AdapterState) -> dict[str, Tensor]:
        found = {}
        for layer in after.layers():
            down, up = after[named(layer, "A")], after[named(layer, "B")]
            length = {"A": up.norm(dim=0), "B": down.norm(dim=1)}
            root = length["A"] * length["B"]
            found[named(layer, "A")] = down / length["B"][:, None]
            found[named(layer, "B")] = up / length["A"]
            if factor:
                name = named(layer, factor)
                found[name] = found[name] * (root[:, None] if factor == "A" else root)
        return found

    return then(method, change)


def transposed_residual(method: Method) -> Method:
    def change(before: AdapterState, after: AdapterState) -> dict[str, Tensor]:
        added = {name: after[name] - t for name, t in before.only(frozenset({"delta"})).items()}
        return {
            name: before[name] + (part.mT if part.shape[0] == part.shape[1] else part)
            for name, part in added.items()
        }

    return then(method, change)


def by_rows_of_data(method: Method) -> Method:
    """Weights that are num_examples, where the method has its own."""
    return reducing(method, lambda reduce, project, weight: reduce(project))


def padded_in_front(method: Method) -> Method:
    def flipped(reduce: Reduce, project: Any, weight: Any) -> Any:
        def front(view: AdapterState) -> Any:
            found = dict(project(view))
            for name, tensor in view.items():
                axis = {"A": 0, "B": 1}.get(role_of(name))
                if axis is not None:
                    shift = found[name].shape[axis] - tensor.shape[axis]
                    found[name] = found[name].roll(shift, axis)
            return found

        return reduce(front, weight)

    return reducing(method, flipped)


def turning(method: Method, how: Callable[[Tensor], Tensor], both: bool = True) -> Method:
    """Clients that turn by another matrix than the method's own, which is worked out from A."""

    def upload(received: AdapterState, end: AdapterState, info: ClientInfo) -> AdapterState:
        right, new = method.upload(received, end, info), {}
        for layer in end.layers():
            down, up = end[named(layer, "A")], end[named(layer, "B")]
            turn = how(torch.linalg.lstsq(down.mT, right[named(layer, "A")].mT).solution)
            new[named(layer, "A")] = turn.mT @ down
            new[named(layer, "B")] = up @ turn if both else right[named(layer, "B")]
        return right | new

    return replace(method, upload=upload)


def mirrored(turn: Tensor) -> Tensor:
    return turn @ torch.diag(torch.tensor([-1.0] + [1.0] * (len(turn) - 1), dtype=turn.dtype))


def across_rank(name: str, gradients: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    """LA-LoRA's filter along the wrong side."""
    own = get_method("la_lora").gradient
    assert own is not None
    other = name.replace("lora_A", "lora_#").replace("lora_B", "lora_A").replace("lora_#", "lora_B")
    return own(other, gradients, leaves)


RIGHT = {name: get_method(name) for name in method_names()}
MUTANTS: dict[str, tuple[str, Method]] = {
    "rolora weighs clients alike": ("rolora", unweighted(RIGHT["rolora"])),
    "rolora moves half way": (
        "rolora",
        then(
            RIGHT["rolora"],
            lambda before, after: each(
                after, "B", lambda layer, b: (b + before[named(layer, "B")]) / 2
            ),
        ),
    ),
    "rolora is out of phase": ("rolora", get_method("rolora", first="A")),
    "ffa_lora weighs clients alike": ("ffa_lora", unweighted(RIGHT["ffa_lora"])),
    "ffa_lora moves lora_A": (
        "ffa_lora",
        then(RIGHT["ffa_lora"], lambda before, after: each(after, "A", lambda _, a: 1.01 * a)),
    ),
    "fedit weighs clients alike": ("fedit", unweighted(RIGHT["fedit"])),
    "centralized keeps what it had": (
        "centralized",
        then(RIGHT["centralized"], lambda before, after: before),
    ),
    "local sends all": ("local", replace(RIGHT["local"], shared=lambda round: ALL)),
    "fedsa_lora sends lora_B": (
        "fedsa_lora",
        replace(RIGHT["fedsa_lora"], shared=lambda round: frozenset({"A", "B"})),
    ),
    "fedsa_lora weighs clients alike": ("fedsa_lora", unweighted(RIGHT["fedsa_lora"])),
    "fed_alora sends lora_A instead": ("fed_alora", RIGHT["fedsa_lora"]),
    "fed_alora averages the head": (
        "fed_alora",
        replace(RIGHT["fed_alora"], shared=lambda round: frozenset({"B", "head"})),
    ),
    "fed_alora weighs clients alike": ("fed_alora", unweighted(RIGHT["fed_alora"])),
    "flexlora weighs clients alike": ("flexlora", unweighted(RIGHT["flexlora"])),
    "flexlora forgets √S": ("flexlora", singular_values_to("", RIGHT["flexlora"])),
    "flexlora gives all of S to lora_B": ("flexlora", singular_values_to("B", RIGHT["flexlora"])),
    "flexlora forgets the scaling": ("flexlora", scaled_again(RIGHT["flexlora"])),
    "flexlora hands out the last directions": (
        "flexlora",
        replace(
            RIGHT["flexlora"],
            download=lambda server, client: (
                server.adapter
                | {
                    **each(server.adapter, "A", lambda _, a: a[-client.rank :]),
                    **each(server.adapter, "B", lambda _, b: b[:, -client.rank :]),
                }
            ),
        ),
    ),
    "fedask sketches no more than the rank": ("fedask", get_method("fedask", oversampling=0)),
    "fedask weighs clients alike": ("fedask", unweighted(RIGHT["fedask"])),
    "fedask forgets the scaling": ("fedask", scaled_again(RIGHT["fedask"])),
    "raflora divides by all clients": ("raflora", RIGHT["flexlora"]),
    "raflora weighs clients alike": ("raflora", unweighted(RIGHT["raflora"])),
    "raflora forgets the scaling": ("raflora", scaled_again(RIGHT["raflora"])),
    "flora does not start again": (
        "flora",
        then(RIGHT["flora"], lambda before, after: before.only(frozenset({"A", "B"}))),
    ),
    "flora keeps lora_A": (
        "flora",
        then(RIGHT["flora"], lambda before, after: before.only(frozenset({"A"}))),
    ),
    "flora forgets the scaling": (
        "flora",
        then(
            RIGHT["flora"],
            lambda before, after: growth(before, after, lambda layer: 1 / after.scaling[layer]),
        ),
    ),
    "flora weighs clients alike": ("flora", unweighted(RIGHT["flora"])),
    "fedex_lora adds no residual": (
        "fedex_lora",
        then(RIGHT["fedex_lora"], lambda before, after: growth(before, after, lambda layer: 0.0)),
    ),
    "fedex_lora transposes the residual": ("fedex_lora", transposed_residual(RIGHT["fedex_lora"])),
    "fedex_lora forgets the scaling": (
        "fedex_lora",
        then(
            RIGHT["fedex_lora"],
            lambda before, after: growth(before, after, lambda layer: 1 / after.scaling[layer]),
        ),
    ),
    "fedex_lora weighs clients alike": ("fedex_lora", unweighted(RIGHT["fedex_lora"])),
    "hetlora weighs by rows": ("hetlora", by_rows_of_data(RIGHT["hetlora"])),
    "hetlora weighs clients alike": ("hetlora", unweighted(RIGHT["hetlora"])),
    "hetlora pads in front": ("hetlora", padded_in_front(RIGHT["hetlora"])),
    "fedsvd gives S to lora_A": (
        "fedsvd",
        then(
            RIGHT["fedsvd"],
            lambda before, after: {
                **each(
                    after, "A", lambda layer, a: a * after[named(layer, "B")].norm(dim=0)[:, None]
                ),
                **each(after, "B", lambda _, b: b / b.norm(dim=0)),
            },
        ),
    ),
    "fedsvd forgets S": (
        "fedsvd",
        then(
            RIGHT["fedsvd"], lambda before, after: each(after, "B", lambda _, b: b / b.norm(dim=0))
        ),
    ),
    "fedsvd does not turn": (
        "fedsvd",
        replace(RIGHT["fedsvd"], aggregate=RIGHT["ffa_lora"].aggregate),
    ),
    "lora_a2 sends the smallest": (
        "lora_a2",
        sending(
            RIGHT["lora_a2"],
            lambda end, right: each(right, "B", lambda layer, b: 2 * end[named(layer, "B")] - b),
        ),
    ),
    "lora_a2 sends all": ("lora_a2", replace(RIGHT["lora_a2"], upload=RIGHT["fedit"].upload)),
    "lora_a2 forgets a client's rank": ("lora_a2", get_method("lora_a2", keep=1.0)),
    "lora_fair does not correct": (
        "lora_fair",
        replace(RIGHT["lora_fair"], aggregate=RIGHT["fedit"].aggregate),
    ),
    "lora_fair forgets its ridge": ("lora_fair", get_method("lora_fair", ridge=0.0)),
    "lora_fair weighs clients alike": ("lora_fair", unweighted(RIGHT["lora_fair"])),
    "fedrot_lora does not turn": (
        "fedrot_lora",
        replace(RIGHT["fedrot_lora"], upload=RIGHT["fedit"].upload),
    ),
    "fedrot_lora turns all the way": ("fedrot_lora", get_method("fedrot_lora", softness=1.0)),
    "fedrot_lora turns lora_A alone": (
        "fedrot_lora",
        sending(RIGHT["fedrot_lora"], lambda end, right: each(end, "B", lambda _, b: b)),
    ),
    "fedrot_lora turns the wrong way": (
        "fedrot_lora",
        turning(RIGHT["fedrot_lora"], lambda turn: turn.mT),
    ),
    "fedrot_lora mirrors": ("fedrot_lora", turning(RIGHT["fedrot_lora"], mirrored)),
    "la_lora weighs clients alike": ("la_lora", unweighted(RIGHT["la_lora"])),
    "la_lora filters across the rank": ("la_lora", replace(RIGHT["la_lora"], gradient=across_rank)),
    "la_lora does not filter": (
        "la_lora",
        replace(RIGHT["la_lora"], gradient=lambda name, gradients, leaves: gradients),
    ),
    "fed_sb weighs clients alike": ("fed_sb", unweighted(RIGHT["fed_sb"])),
    "fed_sb transposes the core": (
        "fed_sb",
        then(RIGHT["fed_sb"], lambda before, after: each(after, "core", lambda _, core: core.mT)),
    ),
    "fed_sb moves lora_A": (
        "fed_sb",
        then(RIGHT["fed_sb"], lambda before, after: each(after, "A", lambda _, a: 1.01 * a)),
    ),
    "ravan averages gains by themselves": (
        "ravan",
        replace(RIGHT["ravan"], upload=RIGHT["fedit"].upload),
    ),
    "ravan forgets the gains": (
        "ravan",
        sending(RIGHT["ravan"], lambda end, right: each(end, "core", lambda _, core: core)),
    ),
    "ravan weighs clients alike": ("ravan", unweighted(RIGHT["ravan"])),
    "fedmomentum adds no rest": (
        "fedmomentum",
        then(RIGHT["fedmomentum"], lambda before, after: growth(before, after, lambda layer: 0.0)),
    ),
    "fedmomentum keeps every bit of energy": ("fedmomentum", get_method("fedmomentum", energy=1.0)),
    "fedmomentum forgets the scaling": ("fedmomentum", scaled_again(RIGHT["fedmomentum"])),
}


def test_every_check_has_a_broken_method_to_notice() -> None:
    assert {CHECKS[name] for name, _ in MUTANTS.values()} == set(CHECKS.values())


@pytest.mark.parametrize("what", MUTANTS)
def test_the_check_notices_a_method_that_is_broken(what: str) -> None:
    name, broken = MUTANTS[what]
    CHECKS[name](play(RIGHT[name], TYPICAL))
    with pytest.raises(AssertionError):
        CHECKS[name](play(broken, TYPICAL))
