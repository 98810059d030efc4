"""Differences between methods seed by seed and standings at equal budgets: by hand, by scipy."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from test_report_conclusions import write

from rolora.report.narrative import conclusions, format_difference
from rolora.results.paired import CONFIDENCE, difference, differences, interval
from rolora.results.ranking import AXES, Place, rank_methods, rankings
from rolora.results.robustness import Cell, standings
from rolora.results.runs import Point, RunRecord, load_run, summarise, trained_rows
from rolora.training.local import Work, batches

MEGABYTE = 1_000_000


def place(method: str, values: dict[int, float]) -> Place:
    spent = Point(1, 1, 1, 1, 1)
    return Place(method, tuple(values), tuple(values.values()), spent)


def loaded(tmp_path: Path, **methods: dict[int, Sequence[float | None]]) -> list[RunRecord]:
    """Runs of these methods: seed -> the metric of each round; fedit sends twice as much."""
    return [
        load_run(
            write(
                tmp_path / f"{method}-seed{seed}",
                values,
                method,
                seed=seed,
                up=MEGABYTE * (2 if method == "fedit" else 1),
                rounds=40,  # that were planned, whatever became of them
            )
        )
        for method, seeds in methods.items()
        for seed, values in seeds.items()
    ]


def test_a_difference_is_taken_seed_by_seed_and_its_interval_is_student_s() -> None:
    ours = place("fedit", {0: 0.70, 1: 0.80, 2: 0.60})
    theirs = place("rolora", {2: 0.55, 0: 0.68, 1: 0.79})
    found = difference(ours, theirs)
    assert found is not None
    assert found.seeds == (0, 1, 2)
    assert found.each == pytest.approx((0.02, 0.01, 0.05))
    assert found.mean == pytest.approx(0.08 / 3)
    # by hand: sd = sqrt((0.00667² + 0.01667² + 0.02333²) / 2), t(0.975, 2) = 4.30265
    sd = math.sqrt((0.0066667**2 + 0.0166667**2 + 0.0233333**2) / 2)
    reach = 4.30265 * sd / math.sqrt(3)
    assert found.interval == pytest.approx((0.08 / 3 - reach, 0.08 / 3 + reach), rel=1e-4)
    assert found.significant is False
    assert format_difference(found) == "+0.027 [−0.025, +0.078]"


def paired(count: int, mean: float, sd: float, rng: random.Random) -> tuple[list[float], ...]:
    """Values of two methods whose differences are normal."""
    theirs = [rng.uniform(0, 1) for _ in range(count)]
    return [value + rng.gauss(mean, sd) for value in theirs], theirs


@pytest.mark.parametrize("count", [3, 5, 20])
def test_the_interval_is_that_of_student_s_t_over_the_differences(count: int) -> None:
    ours, theirs = paired(count, 0.02, 0.01, random.Random(count))
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    expected = stats.t.interval(CONFIDENCE, count - 1, loc=sum(each) / count, scale=stats.sem(each))
    assert interval(ours, theirs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_differences_that_are_all_equal_have_an_interval_without_width(shift: float) -> None:
    theirs = [0.78, 0.80, 0.91]
    assert interval([value + shift for value in theirs], theirs) == pytest.approx((shift, shift))
    assert interval([0.75, 1.0, 1.25], [0.25, 0.5, 0.75]) == (0.5, 0.5)


def test_the_interval_holds_the_true_difference_in_95_of_100_comparisons() -> None:
    rng = random.Random(0)
    tries, held = 1000, 0
    for _ in range(tries):
        found = interval(*paired(4, 0.3, 2.0, rng))
        assert found is not None
        held += found[0] <= 0.3 <= found[1]
    assert abs(held / tries - 0.95) < 4 * math.sqrt(0.95 * 0.05 / tries)


def test_what_seeds_have_in_common_falls_out_of_the_difference() -> None:
    hard = {0: -0.2, 1: 0.0, 2: 0.2}  # one seed is harder than another, for every method
    ours = place("a", {seed: 0.52 + shift + seed / 1e4 for seed, shift in hard.items()})
    theirs = place("b", {seed: 0.50 + shift for seed, shift in hard.items()})
    found = difference(ours, theirs)
    assert found is not None
    assert ours.sd is not None
    assert ours.sd > 0.02  # by their spreads alone nobody could tell them apart
    assert found.significant is True


def test_with_two_seeds_there_is_no_interval_and_the_page_says_so(tmp_path: Path) -> None:
    runs = loaded(
        tmp_path, rolora={0: [0.1, 0.8], 1: [0.1, 0.82]}, fedit={0: [0.1, 0.6], 1: [0.1, 0.62]}
    )
    said = conclusions(runs)[0]
    assert said.differences["fedit"].interval is None
    assert said.text.endswith(
        "more than one standard deviation; no interval with fewer than 3 seeds."
    )


def test_only_seeds_that_both_methods_ran_once_are_paired() -> None:
    twice = Place("a", (0, 0, 1, 2), (0.1, 0.2, 0.5, 0.6), Point(1, 1, 1, 1, 1))
    found = difference(twice, place("b", {0: 0.1, 1: 0.4, 3: 0.9}))
    assert found is not None
    assert found.seeds == (1,)
    assert found.each == pytest.approx((0.1,))
    assert difference(twice, place("b", {7: 0.1})) is None


def test_a_difference_that_is_not_finite_has_no_interval() -> None:
    found = difference(
        place("a", {0: math.nan, 1: 1.0, 2: 2.0}), place("b", {0: 1.0, 1: 1.0, 2: 1.0})
    )
    assert found is not None
    assert found.interval is None


def test_a_lead_whose_interval_leaves_out_zero_is_one_and_another_is_not(tmp_path: Path) -> None:
    clear = loaded(
        tmp_path / "clear",
        rolora={s: [0.1, 0.80 + s / 10] for s in range(3)},
        fedit={s: [0.1, 0.78 + s / 10 + s / 1000] for s in range(3)},
    )
    said = conclusions(clear)[0]
    assert said.headline == "rolora is ahead"  # though one sd is 0.1
    assert "the difference, paired by seed, is +0.019 [+0.017, +0.021], which excludes" in said.text
    unclear = loaded(
        tmp_path / "unclear",
        rolora={0: [0.1, 0.90], 1: [0.1, 0.80], 2: [0.1, 0.90]},
        fedit={0: [0.1, 0.80], 1: [0.1, 0.81], 2: [0.1, 0.80]},
    )
    said = conclusions(unclear)[0]
    assert said.headline == "No clear leader"  # though its own sd is smaller than the gap
    assert "the 95% interval of its lead includes zero over fedit (+0.063 [" in said.text


def test_both_readings_of_the_questions_are_seen_at_a_glance(tmp_path: Path) -> None:
    """Accuracies like those of a comparison on the TREC questions, in rounds 0, 15 and 30."""
    runs = loaded(
        tmp_path,
        rolora={
            s: [0.1, *[None] * 14, 0.82, *[None] * 14, a]
            for s, a in enumerate((0.868, 0.870, 0.869))
        },
        fedit={
            s: [0.1, *[None] * 14, half, *[None] * 14, a]
            for s, (half, a) in enumerate(((0.816, 0.886), (0.820, 0.890), (0.818, 0.888)))
        },
    )
    rounds, size = (one for one in conclusions(runs) if one.axis != "rows")
    assert (rounds.title, rounds.headline) == ("equal rounds", "fedit is ahead")
    assert (size.title, size.headline) == ("equal bytes", "rolora is ahead")
    at = {one.method: one for one in size.places}
    assert at["fedit"].spent.round == 15
    assert at["fedit"].values == (0.816, 0.820, 0.818)
    assert at["rolora"].values == (0.868, 0.870, 0.869)
    assert at["fedit"].spent.up == at["rolora"].spent.up == 30
    assert (at["fedit"].spent.down, at["rolora"].spent.down) == (60, 60)


def with_clients(run: RunRecord, steps: int, batch_size: int = 4) -> RunRecord:
    """The same run with one client of ten rows that takes so many steps in a round."""
    for line in run.rounds:
        line["clients"] = {"c": {"num_examples": 10, "steps": steps}} if line["round"] else {}
    run.config["train"]["batch_size"] = batch_size
    return run


def test_at_equal_local_compute_methods_have_trained_on_as_many_rows(tmp_path: Path) -> None:
    ours, theirs = loaded(tmp_path, rolora={0: [0.1, 0.3, 0.5]}, fedit={0: [0.1, 0.2, 0.4]})
    runs = [with_clients(ours, 4), with_clients(theirs, 2)]  # 4+4+2+4 and 4+4 rows a round
    at = rank_methods(runs, "accuracy", "rows")
    assert at is not None
    assert at.budget == 16
    assert {p.method: p.spent.round for p in at.places} == {
        "fedit": 2,
        "rolora": pytest.approx(16 / 14),
    }
    assert at.places[0].method == "fedit"
    assert [one.axis for one in rankings(runs, "accuracy")] == list(AXES)


def test_where_all_train_on_the_same_rows_equal_compute_is_said_to_be_equal_rounds(
    tmp_path: Path,
) -> None:
    runs = loaded(tmp_path, rolora={0: [0.1, 0.3]}, fedit={0: [0.1, 0.2]})
    said = conclusions([with_clients(run, 3) for run in runs])
    assert [one.title for one in said] == ["equal rounds", "equal bytes", "equal local compute"]
    assert (
        said[2].text
        == "All methods train on the same number of rows per round: as at equal rounds."
    )


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 11])
@pytest.mark.parametrize("shard", [1, 7, 8, 10])
def test_the_rows_of_a_client_are_those_of_its_batches(shard: int, steps: int) -> None:
    work = Work("c", torch.arange(shard), None, steps)  # type: ignore[arg-type]
    stream = batches(work, 4, seed=0, round=1)
    seen = sum(len(next(stream)) for _ in range(steps))
    assert trained_rows({"c": {"num_examples": shard, "steps": float(steps)}}, 4) == seen


def test_within_a_seed_every_method_has_the_same_budget(tmp_path: Path) -> None:
    runs = loaded(
        tmp_path,
        rolora={0: [0.1, 0.2, 0.3, 0.4], 1: [0.1, 0.2]},
        fedit={0: [0.1, 0.3, 0.5], 1: [0.1, 0.4, 0.6]},
    )
    at = rank_methods(runs, "accuracy", "rounds")
    assert at is not None
    assert at.budget == 1.5
    values = {one.method: dict(zip(one.seeds, one.values, strict=True)) for one in at.places}
    assert values == {"rolora": {0: 0.3, 1: 0.2}, "fedit": {0: 0.5, 1: 0.4}}


def test_methods_with_other_seeds_are_compared_at_one_budget(tmp_path: Path) -> None:
    runs = loaded(tmp_path, rolora={0: [0.1, 0.2, 0.3]}, fedit={1: [0.1, 0.5]})
    at = rank_methods(runs, "accuracy", "rounds")
    assert at is not None
    assert {one.method: one.values for one in at.places} == {"rolora": (0.2,), "fedit": (0.5,)}


def test_a_run_that_diverged_is_in_no_mean_and_is_named(tmp_path: Path) -> None:
    from rolora.report.narrative import cautions
    from rolora.results.export import export_results
    from rolora.results.runs import sorted_out

    runs = loaded(tmp_path, rolora={0: [0.1, 0.2], 1: [0.1, 0.4]}, fedit={0: [0.1, 0.5]})
    (tmp_path / "rolora-seed1" / "diverged.txt").write_text("the loss is not finite\n")
    for run in runs:
        config = run.path / "config.toml"
        config.write_text(config.read_text().replace("rounds = 40", "rounds = 1"))
    again = [load_run(run.path) for run in runs]
    assert [run.path.name for run in sorted_out(again).finished] == ["rolora-seed0", "fedit-seed0"]
    found = export_results(again)
    assert {row["method"]: row["final_mean"] for row in found["methods"]} == {
        "rolora": 0.2,
        "fedit": 0.5,
    }
    assert found["diverged"] == [
        {"run": "rolora-seed1", "method": "rolora", "seed": 1, "reason": "the loss is not finite"}
    ]
    assert [text for text in cautions(again) if "rolora-seed1 diverged" in text]


def test_differences_are_from_the_first_method_whoever_leads(tmp_path: Path) -> None:
    runs = loaded(tmp_path, rolora={0: [0.1, 0.2]}, fedit={0: [0.1, 0.5]}, local={0: [0.1, 0.3]})
    at = rank_methods(runs, "accuracy", "rounds")
    assert at is not None
    found = differences(at, "rolora")
    assert {method: one.mean for method, one in found.items()} == pytest.approx(
        {"fedit": 0.3, "local": 0.1}
    )
    assert conclusions(runs)[0].differences == found


@pytest.mark.parametrize(
    ("turns", "last"), [(("B", "A"), 0.6), (("A", "B", "B"), 0.6), (("A+B",), 0.8)]
)
def test_a_method_that_trains_factors_in_turn_is_scored_by_the_mean_over_them(
    turns: tuple[str, ...], last: float, tmp_path: Path
) -> None:
    (run,) = loaded(tmp_path, rolora={0: [0.1, 0.5, 0.7, 0.4, 0.8]})
    lines = tuple(
        {**line, "factors": turns[(line["round"] - 1) % len(turns)].split("+")}
        for line in run.rounds
    )
    run = replace(run, rounds=lines)
    assert [point.value for point in run.curve("accuracy")] == [0.1, 0.5, 0.7, 0.4, 0.8]
    assert run.last("accuracy") == pytest.approx(last)
    assert summarise([run])[0].final_mean == pytest.approx(last)
    ranking = rank_methods([run], "accuracy", "rounds")
    assert ranking is not None
    assert ranking.places[0].mean == pytest.approx(last)


def test_an_attack_under_which_the_reference_diverged_is_in_no_mean_over_attacks() -> None:
    def cell(attack: str, method: str, value: float | None) -> Cell:
        clean = {"rolora": 0.9, "fedit": 0.8}[method]
        lost = None if value is None else clean - value
        return Cell(attack, "mean", method, (0,), (value,), lost)

    values = {"none": (0.9, 0.8), "ipm": (0.5, 0.6), "alie": (None, 0.1)}
    cells = [
        cell(attack, method, value)
        for attack, own in values.items()
        for method, value in zip(("rolora", "fedit"), own, strict=True)
    ]
    rolora, fedit = standings(cells, "accuracy")
    assert (rolora.left_out, fedit.left_out) == (("alie",), ("alie",))
    assert rolora.lost == pytest.approx(0.4)
    assert fedit.lost == pytest.approx(0.2)
    assert fedit.beside == pytest.approx(0.1)
    assert (rolora.worst, fedit.worst) == ("alie", "alie")
