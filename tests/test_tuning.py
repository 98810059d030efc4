"""The grid and the choice: what may be tuned, which value is best, when the grid is too narrow."""

from __future__ import annotations

import math

import pytest

from rolora.comparison.budget import Timing, core_seconds, estimate
from rolora.comparison.tuning import choose, make_grids, settings
from rolora.comparison.variants import addressee, checked_labels, variant_overrides
from rolora.errors import ConfigError, RoloraError
from rolora.results.tuned import Tuning

RATES = {"train.lr": ("1e-3", "3e-3", "1e-2")}


def scored(*means: float | None) -> dict[tuple[str, ...], list[float | None]]:
    return dict(zip(settings(RATES), [[mean] for mean in means], strict=True))


def test_a_grid_of_two_keys_holds_every_combination() -> None:
    found = make_grids(["train.lr=1e-3,1e-2", "train.optimizer=adamw,sgd"], ["rolora"])
    assert settings(found["rolora"]) == [
        ("train.lr=1e-3", "train.optimizer=adamw"),
        ("train.lr=1e-3", "train.optimizer=sgd"),
        ("train.lr=1e-2", "train.optimizer=adamw"),
        ("train.lr=1e-2", "train.optimizer=sgd"),
    ]


def test_a_method_may_have_a_grid_of_its_own() -> None:
    found = make_grids(
        ["train.lr=1,2", "fedit:train.lr=3,4", "rolora:method.first=A,B"], ["rolora", "fedit"]
    )
    assert found == {
        "rolora": {"train.lr": ("1", "2"), "method.first": ("A", "B")},
        "fedit": {"train.lr": ("3", "4")},
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train.lr", "does not look like train.lr=1e-3,3e-3,1e-2"),
        ("train.lr=1e-3,,1e-2", "does not look like"),
        ("train.lr=1e-3", "one value leaves nothing to choose"),
        ("train.lr=1e-3,0.001", "a value is repeated"),
        ("lora.rank=[4,2],[4,2]", "a value is repeated"),
        ("lora.rank=[4,2]", "one value leaves nothing to choose"),
        ("data.test=a.csv,b.csv", "would change what is compared"),
        ("seed=1,2", "would change what is compared"),
        ("train.rounds=10,20", "would change what is compared"),
        ("method.name=rolora,fedit", "would change what is compared"),
        ("fedti:train.lr=1,2", "'fedti' is not among the compared methods: did you mean 'fedit'?"),
    ],
)
def test_what_is_no_grid_is_one_line_that_says_why(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_grids([text], ["rolora", "fedit"])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_given_twice_and_a_method_without_a_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match="already has a grid"):
        make_grids(["train.lr=1,2", "train.lr=3,4"], ["rolora"])
    with pytest.raises(ConfigError, match="gives rolora no values"):
        make_grids(["fedit:train.lr=1,2"], ["rolora", "fedit"])


def test_the_best_mean_is_chosen_and_of_equal_ones_the_first() -> None:
    assert choose("m", RATES, scored(0.1, 0.5, 0.4), "accuracy").best == {"train.lr": "3e-3"}
    assert choose("m", RATES, scored(3.0, 2.0, 1.0), "perplexity").best == {"train.lr": "1e-2"}
    assert choose("m", RATES, scored(0.5, 0.5, 0.4), "accuracy").best == {"train.lr": "1e-3"}


def test_the_score_is_the_mean_over_seeds() -> None:
    scores = dict(zip(settings(RATES), [[0.9, 0.1], [0.6, 0.6], [0.0, 0.0]], strict=True))
    tuned = choose("m", RATES, scores, "accuracy")
    assert tuned.best == {"train.lr": "3e-3"}
    assert [trial.mean for trial in tuned.trials] == [0.5, 0.6, 0.0]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_setting_that_diverged_on_one_seed_is_never_the_best(bad: float | None) -> None:
    values: list[list[float | None]] = [[0.9, bad], [0.2, 0.2], [0.1, 0.1]]
    scores = dict(zip(settings(RATES), values, strict=True))
    tuned = choose("m", RATES, scores, "accuracy")
    assert tuned.best == {"train.lr": "3e-3"}
    assert (tuned.trials[0].scores, tuned.trials[0].mean) == ([0.9, None], None)


def test_where_everything_diverged_there_is_no_choice() -> None:
    with pytest.raises(RoloraError, match="m diverged with every value of its grid"):
        choose("m", RATES, scored(None, math.nan, None), "accuracy")


@pytest.mark.parametrize(
    ("means", "edge"),
    [
        ((0.9, 0.5, 0.1), {"train.lr": "smallest"}),
        ((0.1, 0.5, 0.1), {}),
        ((0.1, 0.5, 0.9), {"train.lr": "largest"}),
        ((0.5, 0.5, 0.5), {}),
    ],
)
def test_a_best_value_at_the_edge_of_its_grid_is_said_to_be_there(
    means: tuple[float, ...], edge: dict[str, str]
) -> None:
    tuned = choose("m", RATES, scored(*means), "accuracy")
    assert tuned.at_edge == edge
    if edge:
        (said,) = tuned.cautions
        assert (
            f"is the {edge['train.lr']} value that was tried; a {edge['train.lr'][:-2]}r one"
            in said
        )


def test_the_edge_goes_by_size_and_not_by_order_and_words_have_none() -> None:
    grid = {"train.lr": ("1e-2", "1e-3", "3e-3"), "train.optimizer": ("adamw", "sgd")}
    best = ("train.lr=1e-2", "train.optimizer=adamw")
    scores = {each: [float(each == best)] for each in settings(grid)}
    assert choose("m", grid, scores, "accuracy").at_edge == {"train.lr": "largest"}


def test_a_record_is_read_back_as_it_was_written() -> None:
    tuned = choose("m", RATES, scored(0.1, None, 0.4), "accuracy")
    record = Tuning(metric="accuracy", rows="rows", seeds=[7], rounds=3, methods=[tuned])
    again = Tuning.model_validate_json(record.model_dump_json(indent=1))
    assert again == record
    assert again.best("m") == ("train.lr=1e-2",)


def test_a_method_with_options_is_a_name_and_overrides() -> None:
    assert variant_overrides("rolora+first=A") == ["method.first=A"]
    assert checked_labels([" rolora", " rolora+first=A "]) == ["rolora", "rolora+first=A"]
    labels = ["rolora", "rolora+first=A"]
    assert addressee("rolora+first=A:train.lr=1", labels) == ("rolora+first=A", "train.lr=1")
    assert addressee("rolora:train.lr=1", labels) == ("rolora", "train.lr=1")
    assert addressee("train.cache=a:b", labels) == ("", "train.cache=a:b")


@pytest.mark.parametrize("wrong", ["rolora+first", "rolora+=A", "rolora+first="])
def test_an_option_without_name_or_value_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"write options as rolora\+NAME=VALUE"):
        variant_overrides(wrong)


@pytest.mark.parametrize("labels", [[], [""], [" ", ""]])
def test_a_list_without_a_method_is_refused(labels: list[str]) -> None:
    with pytest.raises(ConfigError, match="at least one method"):
        checked_labels(labels)


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28_800), ("30m", 1800), ("90s", 90), ("1.5h", 5400), (".5m", 30)]
)
def test_a_budget_is_read_in_hours_minutes_or_seconds(text: str, seconds: float) -> None:
    assert core_seconds(text) == seconds


@pytest.mark.parametrize("text", ["8", "h", "-1h", "1d", "0h", "0.0s", "nan"])
def test_a_budget_of_nothing_or_in_another_unit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        core_seconds(text)


def test_an_estimate_tells_training_from_evaluation() -> None:
    first, left = Timing(0, True, 10.0), [Timing(n, n > 2) for n in range(1, 5)]
    done = [first, Timing(1, False, 2.0)]
    assert estimate(done, left) == 4 * 2.0 + 2 * 10.0
    assert estimate([*done, Timing(2, True, 12.0)], left) == 4 * 2.0 + 2 * 10.0
    assert estimate(done, [Timing(0, True), *left]) == 4 * 2.0 + 3 * 10.0
    assert estimate([first], left) is None
