"""Claims about RoLoRA's options: whose turn it is, and what lora_A starts as."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from states import make_specs, same

from rolora.algorithm.adapter import AdapterState, Roles, role_of
from rolora.algorithm.factors import orthonormal
from rolora.algorithm.seeding import generator
from rolora.config.load import load_config, make_config
from rolora.errors import ConfigError
from rolora.methods import get_method
from rolora.run import runs
from rolora.run.experiment import Experiment
from rolora.training.memory import phases

pytestmark = pytest.mark.usefixtures("quick")

ROUNDS = 24
LEAST = {"model": {"path": "m"}, "data": {"train": "t.csv"}}


def turns(**options: Any) -> str:
    """The factor of every round, in one word."""
    method = get_method("rolora", **options)
    word = ""
    for round in range(1, ROUNDS + 1):
        (factor,) = method.shared(round) - {"head"}
        assert method.trainable(round, 0) == method.shared(round) == {factor, "head"}
        word += factor
    return word


@pytest.mark.parametrize("b_rounds", [1, 2, 3, 7])
@pytest.mark.parametrize("first", ["A", "B"])
def test_b_rounds_of_b_come_with_every_round_of_a(first: str, b_rounds: int) -> None:
    one_turn = "B" * b_rounds + "A" if first == "B" else "A" + "B" * b_rounds
    assert turns(first=first, b_rounds=b_rounds) == "".join(islice(cycle(one_turn), ROUNDS))


def test_orthogonal_a_starts_from_orthonormal_rows_and_a_product_of_zero() -> None:
    specs = make_specs()
    adapter = get_method("rolora", orthogonal_a=True).init(specs, generator(3, "init"))
    for name, tensor in adapter.items():
        if role_of(name) == "A":
            gram = tensor @ tensor.mT
            assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-6)
        if role_of(name) == "B":
            assert not tensor.any()


def test_more_orthonormal_rows_than_a_layer_is_wide_are_refused() -> None:
    name = "base_model.model.q.lora_A.weight"
    with pytest.raises(ConfigError, match="rank = 5 is more than the 4 orthonormal directions"):
        orthonormal(name, 5, 4, generator(3, "init"))
    assert orthonormal(name, 4, 4, generator(3, "init")).shape == (4, 4)


def test_the_other_options_leave_the_start_as_it_is() -> None:
    def start(**options: Any) -> AdapterState:
        return get_method("rolora", **options).init(make_specs(), generator(3, "init"))

    assert same(start(b_rounds=3, first="A"), start())
    assert not same(start(orthogonal_a=True), start())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["method.b_rounds=2"], "BBABBA"),
        (["method.orthogonal_a=true", "method.first=A"], "ABABAB"),
    ],
)
def test_a_run_moves_the_factor_whose_turn_it_is_and_every_average_is_exact(
    site: Path, tmp_path: Path, options: list[str], word: str
) -> None:
    run = runs.start(load_config(site, ["train.rounds=6", *options]), tmp_path / "run")
    before = run.state.server.adapter
    for result in run.rounds():
        after = result.state.server.adapter
        moved = {role_of(n) for n in after if not torch.equal(after[n], before[n])}
        if result.round:
            turn = word[result.round - 1]
            assert result.factors == (turn, "head")
            # while lora_B is 0, lora_A has no gradient
            still = result.round == 1 and turn == "A"
            assert moved == ({"head"} if still else {turn, "head"})
            assert result.aggregation_error is not None
            assert result.aggregation_error <= 1e-6
        before = after


@pytest.mark.parametrize(
    ("name", "options", "rounds", "found"),
    [
        ("rolora", {}, 40, {"B", "A"}),
        ("rolora", {}, 1, {"B"}),
        ("rolora", {"b_rounds": 5}, 40, {"B", "A"}),
        ("rolora", {"b_rounds": 5}, 5, {"B"}),
        ("la_lora", {}, 1, {"B", "A"}),
        ("ffa_lora", {}, 40, {"B"}),
        ("fedit", {}, 40, {"A+B"}),
    ],
)
def test_memory_is_planned_for_everything_that_a_run_will_train_at_a_time(
    name: str, options: dict[str, Any], rounds: int, found: set[str]
) -> None:
    planned = phases(get_method(name, **options), rounds)
    assert planned.keys() == found
    for word, roles in planned.items():
        parts: Roles = frozenset(word.split("+"))  # type: ignore[arg-type]
        assert roles == parts | {"head"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("b_rounds", "0", "b_rounds must be at least 1, not 0"),
        ("b_rounds", "-2", "b_rounds must be at least 1, not -2"),
        ("b_rounds", "1.5", "method.b_rounds: Input should be a valid integer, got 1.5"),
        ("b_rounds", '"2"', "method.b_rounds: Input should be a valid integer, got '2'"),
        ("b_rounds", "true", "method.b_rounds: Input should be a valid integer, got True"),
        ("orthogonal_a", "1", "method.orthogonal_a: Input should be a valid boolean, got 1"),
        ("orthogonal", "true", "'method.orthogonal': did you mean 'method.orthogonal_a'?"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_one_line(key: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(LEAST, [f"method.{key}={value}"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ([], set()),
        (["train.keep_moments=true"], {"A", "B", "head"}),
        (["train.keep_moments=true", "train.rounds=1"], {"B", "head"}),
        (
            ["train.keep_moments=true", "method.b_rounds=150", "train.rounds=200"],
            {"A", "B", "head"},
        ),
        (["train.keep_moments=true", "method.name=ffa_lora"], {"B", "head"}),
    ],
)
def test_moments_are_kept_of_what_some_round_of_the_run_trains(
    changes: list[str], kept: set[str]
) -> None:
    assert Experiment(make_config(LEAST, changes)).settings.kept == kept
