"""What run folders say, against numbers worked out by hand from the lines written here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from synthetic_runs import cut_short

from rolora.cli.main import report
from rolora.cli.results import show_results
from rolora.errors import ConfigError, DataError
from rolora.report.narrative import Conclusion, cautions, conclusions
from rolora.report.page import write_report
from rolora.results.export import export_results
from rolora.results.ranking import rank_methods
from rolora.results.runs import load_run, sorted_out, summarise, worst_tenth

MEGABYTE = 1_000_000


def write(
    path: Path,
    values: Sequence[float | None],
    method: str = "rolora",
    *,
    seed: int = 0,
    metric: str = "accuracy",
    up: int = MEGABYTE,
    errors: Sequence[float | None] = (),
    **settings: Any,
) -> Path:
    """A run folder with one line for each of ``values``; None is a round without evaluation."""
    path.mkdir(parents=True)
    config = {
        "name": "by-hand",
        "seed": seed,
        "method": {"name": method},
        "train": {"rounds": len(values) - 1, **settings},
        "provenance": {"versions": {"torch": "2.6.0"}, "data": f"rows of seed {seed}"},
    }
    clients = [{"id": "c", "num_examples": 4, "labels": {"x": 3, "y": 1}}]
    (path / "config.toml").write_text(tomli_w.dumps(config))
    (path / "partition.json").write_text(json.dumps({"clients": clients}))
    lines = [
        {
            "round": number,
            "metrics": {} if value is None else {metric: value},
            "client_metrics": {},
            "loss": 0.5 if number else None,
            "aggregation_error": errors[number] if errors else None,
            "bytes_up": up if number else 0,
            "bytes_down": 2 * up if number else 0,
            "seconds": 1.5,
            "rejected": {},
        }
        for number, value in enumerate(values)
    ]
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said(*folders: Path) -> list[Conclusion]:
    return conclusions([load_run(folder) for folder in folders])


def test_a_row_holds_the_mean_sd_megabytes_and_aggregation_error_of_the_json_lines(
    tmp_path: Path,
) -> None:
    first = write(tmp_path / "a", [0.1, 0.9, 0.7], seed=0, up=1_500_000, errors=[None, 0.2, 0.4])
    second = write(tmp_path / "b", [0.1, 0.5, 0.8], seed=1, up=500_000, errors=[None, 0.6, 0.0])
    (row,) = summarise([load_run(first), load_run(second)])
    assert (row.method, row.metric, row.seeds, row.runs, row.rounds) == (
        "rolora",
        "accuracy",
        (0, 1),
        2,
        2,
    )
    assert row.final_mean == pytest.approx((0.7 + 0.8) / 2)
    assert row.final_sd == pytest.approx(0.1 / math.sqrt(2))  # n - 1 below the sum of squares
    assert row.best_mean == pytest.approx((0.9 + 0.8) / 2)
    assert row.megabytes_up == pytest.approx((3.0 + 1.0) / 2)
    assert row.megabytes_down == pytest.approx((6.0 + 2.0) / 2)
    assert row.aggregation_error == pytest.approx((0.2 + 0.4 + 0.6 + 0.0) / 4)
    assert row.seconds == pytest.approx(4.5)


def test_the_page_prints_the_numbers_of_the_row(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "a", [0.1, 0.7], seed=0, up=2_340_000, errors=[None, 0.25]),
        write(tmp_path / "b", [0.1, 0.8], seed=1, up=2_340_000, errors=[None, 0.25]),
    ]
    page = write_report(runs, tmp_path / "page.html").read_text()
    for cell in ("0.750 ± 0.071", "0, 1", "2.34", "4.68", "0.25", "3.0"):
        assert f"<td>{cell}</td>" in page


def test_an_aggregation_error_that_no_round_knows_is_unknown_not_zero(tmp_path: Path) -> None:
    run = write(tmp_path / "a", [0.1, 0.7])
    assert summarise([load_run(run)])[0].aggregation_error is None
    assert "<td>unknown</td>" in write_report([run], tmp_path / "page.html").read_text()


def test_a_method_more_than_one_sd_above_the_next_is_ahead(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / f"{method}{seed}", [0.1, mean + shift], method, seed=seed)
        for method, mean in (("rolora", 0.8), ("fedit", 0.7))
        for seed, shift in enumerate((-0.01, 0.01))
    ]
    by_rounds, by_megabytes = said(*runs)
    assert (by_rounds.headline, by_megabytes.headline) == ("rolora is ahead",) * 2
    assert (by_rounds.budget, by_megabytes.budget) == ("after 1 round", "after 1.00 MB sent up")
    assert "Next is fedit with 0.700 ± 0.014: the gap of 0.100 is more" in by_rounds.text


def test_methods_within_one_sd_have_no_leader(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / f"{method}{seed}", [0.1, mean + shift], method, seed=seed)
        for method, mean, spread in (("rolora", 0.8, 0.01), ("fedit", 0.75, 0.05))
        for seed, shift in enumerate((-spread, spread))
    ]
    assert said(*runs)[0].headline == "No clear leader"
    assert "within one standard deviation of it: fedit" in said(*runs)[0].text


@pytest.mark.parametrize("seeds", [{"rolora": 1, "fedit": 1}, {"rolora": 2, "fedit": 1}])
def test_a_lead_over_or_of_a_single_seed_is_said_to_be_one(
    tmp_path: Path, seeds: dict[str, int]
) -> None:
    runs = [
        write(tmp_path / f"{method}{seed}", [0.1, mean + seed / 1000], method, seed=seed)
        for method, mean in (("rolora", 0.8), ("fedit", 0.7))
        for seed in range(seeds[method])
    ]
    conclusion = said(*runs)[0]
    alone = " and ".join(method for method in seeds if seeds[method] == 1)
    assert conclusion.headline == "rolora leads, on too few seeds"
    assert f"{alone} ran on one seed" in conclusion.text


def test_at_equal_megabytes_the_metric_is_interpolated_between_evaluated_rounds(
    tmp_path: Path,
) -> None:
    half = write(tmp_path / "half", [0.1, None, 0.6], "rolora", up=MEGABYTE // 2)  # 1 MB in all
    whole = write(tmp_path / "whole", [0.2, None, 0.8], "fedit", up=MEGABYTE)  # 2 MB in all
    at = rank_methods([load_run(half), load_run(whole)], "accuracy", "megabytes")
    assert at is not None
    assert at.budget == 1.0
    assert {place.method: place.mean for place in at.places} == pytest.approx(
        {"rolora": 0.6, "fedit": (0.2 + 0.8) / 2}
    )


def test_methods_are_compared_at_the_last_round_that_all_of_them_have_reached(
    tmp_path: Path,
) -> None:
    short = write(tmp_path / "short", [0.1, 0.6], "rolora")
    long = write(tmp_path / "long", [0.1, 0.5, 0.9], "fedit")
    conclusion = said(short, long)[0]
    assert (conclusion.budget, conclusion.headline) == (
        "after 1 round",
        "rolora leads, on too few seeds",
    )
    assert summarise([load_run(short), load_run(long)])[0].method == "fedit"  # at its own end


def test_no_round_is_the_best_before_all_phases_have_been_evaluated_and_no_untrained_one_is(
    tmp_path: Path,
) -> None:
    run = write(tmp_path / "a", [0.9, None, 0.4, 0.8, 0.2])
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["factors"] = ["B"] if line["round"] % 2 else ["A"]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = load_run(run)
    assert [point.value for point in record.scores("accuracy")] == pytest.approx(
        [0.9, 0.4, 0.6, 0.5]
    )
    assert record.best("accuracy") == pytest.approx(0.6)
    assert replace(record, rounds=record.rounds[:3]).best("accuracy") is None
    (row,) = summarise([record])
    assert (row.final_mean, row.best_mean) == pytest.approx((0.5, 0.6))


@pytest.mark.parametrize("metric", ["perplexity", "loss"])
def test_where_lower_is_better_the_lower_value_leads_and_the_lowest_round_is_best(
    tmp_path: Path, metric: str
) -> None:
    low = write(tmp_path / "low", [9.0, 2.0, 3.0], "rolora", metric=metric)
    high = write(tmp_path / "high", [9.0, 4.0, 5.0], "fedit", metric=metric)
    assert said(high, low)[0].places[0].method == "rolora"
    best, worst = summarise([load_run(high), load_run(low)])
    assert (best.method, best.best_mean, worst.method) == ("rolora", 2.0, "fedit")


def test_methods_that_send_nothing_are_named_for_reference_and_never_ranked(
    tmp_path: Path,
) -> None:
    bounds = [
        write(tmp_path / "local", [0.1, 0.5], "local", up=0),
        write(tmp_path / "all", [0.1, 0.95], "centralized", up=0),
    ]
    federated = [
        write(tmp_path / "a", [0.1, 0.8], "rolora"),
        write(tmp_path / "b", [0.1, 0.7], "fedit"),
    ]
    named = "Not ranked, because nothing is sent: centralized 0.950, local 0.500."
    by_rounds, by_megabytes = said(*bounds, *federated)
    assert [place.method for place in by_rounds.places] == ["rolora", "fedit"]
    assert by_rounds.text.endswith(named)
    assert "centralized" not in by_megabytes.text
    (single,) = said(*bounds, federated[0])
    assert (single.headline, single.places) == ("accuracy 0.800", ())
    assert single.text == f"rolora has accuracy 0.800 (higher is better). {named}"


def test_a_diverged_method_is_not_ranked_and_does_not_hide_the_others(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "a", [9.0, math.nan], "fedit", metric="perplexity"),
        write(tmp_path / "b", [9.0, 3.0], "rolora", metric="perplexity"),
    ]
    for conclusion in said(*runs):
        assert conclusion.headline == "perplexity 3.000"
        assert conclusion.text.endswith("Not ranked, because perplexity is not finite: fedit.")
    assert "<td>not finite</td>" in write_report(runs, tmp_path / "page.html").read_text()


def test_runs_of_one_method_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    slow = write(tmp_path / "slow", [0.1, 0.6], lr=0.001)
    fast = write(tmp_path / "fast", [0.1, 0.8], seed=1, lr=0.01)
    rows = summarise([load_run(slow), load_run(fast)])
    assert [(row.method, row.final_mean, row.runs) for row in rows] == [
        ("rolora, train.lr=0.01", 0.8, 1),
        ("rolora, train.lr=0.001", 0.6, 1),
    ]


def test_what_makes_a_comparison_uneven_is_said(tmp_path: Path) -> None:
    slow = write(tmp_path / "slow", [0.1, 0.6], "rolora", lr=0.001)
    again = write(tmp_path / "again", [0.1, 0.6], "rolora", lr=0.001)
    fast = write(tmp_path / "fast", [0.1, 0.8], "fedit", lr=0.01)
    other = fast / "config.toml"
    other.write_text(other.read_text().replace("2.6.0", "2.7.0").replace("rows of", "other rows"))
    assert cautions([load_run(folder) for folder in (slow, again, fast)]) == [
        "train.lr differs between runs: 0.001 (rolora); 0.01 (fedit).",
        "rolora has several runs of seed 0; each one counts.",
        "Runs of seed 0 do not have the same rows and shards.",
        "Library versions differ between runs (listed below).",
    ]


def test_a_folder_given_twice_counts_once(tmp_path: Path) -> None:
    run = load_run(write(tmp_path / "a", [0.1, 0.6]))
    (row,) = summarise([run, load_run(tmp_path / "b" / ".." / "a"), run])
    assert (row.runs, row.final_sd) == (1, None)


@pytest.mark.parametrize(
    ("metric", "worst"), [("accuracy", (0.0 + 1 + 2) / 3), ("loss", (20.0 + 19 + 18) / 3)]
)
def test_the_worst_tenth_of_21_clients_are_the_three_that_have_the_worst_values(
    tmp_path: Path, metric: str, worst: float
) -> None:
    run = write(tmp_path / "a", [0.1, 0.5])
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    lines[1]["client_metrics"] = {f"c{n}": {metric: 8 * n % 21} for n in range(21)}
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert worst_tenth(load_run(run), metric) == pytest.approx(worst)


def test_an_unfinished_run_is_reported_and_said_to_be_unfinished(tmp_path: Path) -> None:
    run = cut_short(write(tmp_path / "a", [0.1, 0.5, 0.6, 0.7]), 1)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "No run is finished" in page
    assert "<td>1 of 3</td><td>0.500</td>" in page
    assert "Summary" not in page


@pytest.mark.parametrize("rounds", [-1, 0, 1])
def test_an_unfinished_seed_is_in_no_mean_and_stands_apart_with_how_far_it_is(
    tmp_path: Path, rounds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        write(tmp_path / "r0", [0.1, 0.5, 0.8], seed=0),
        cut_short(write(tmp_path / "r1", [0.1, 0.2, 0.9], seed=1), rounds),
        write(tmp_path / "f0", [0.1, 0.4, 0.6], method="fedit", seed=0),
    ]
    page = write_report(paths, tmp_path / "page.html").read_text()
    found = export_results([load_run(path) for path in paths])
    assert {row["method"]: row["final_mean"] for row in found["methods"]} == {
        "rolora": 0.8,
        "fedit": 0.6,
    }
    (apart,) = found["unfinished"]
    assert (apart["run"], apart["round"], apart["rounds"]) == ("r1", max(rounds, 0), 2)
    apart_on_page = page.split("Unfinished runs</h2>")[1].split("</table>")[0]
    assert apart_on_page.count("<tr>") == 2  # the head, and the run
    assert f">{tmp_path.name}/r1<" in apart_on_page
    assert f"<td>{max(rounds, 0)} of 2</td>" in apart_on_page
    assert "sends nothing" not in page
    assert "stroke-dasharray: 3" not in page
    show_results(paths, False)
    out = capsys.readouterr().out
    assert "unfinished:" in out
    assert "r1 (rolora, seed 1), round" in out
    assert "±" not in out  # each method has one finished seed


def test_a_method_without_a_finished_run_is_called_unfinished_and_drawn_dashed(
    tmp_path: Path,
) -> None:
    paths = [
        write(tmp_path / "r0", [0.1, 0.5, 0.8]),
        cut_short(write(tmp_path / "f0", [0.1, 0.4, 0.6], method="fedit"), 1),
    ]
    page = write_report(paths, tmp_path / "page.html").read_text()
    runs = [load_run(path) for path in paths]
    assert [row.method for row in summarise(sorted_out(runs).finished)] == ["rolora"]
    assert "fedit (unfinished)" in page
    assert "Dashed, with open markers: unfinished." in page
    assert "sends nothing" not in page
    assert "leads" not in page


def test_a_run_that_stopped_early_is_finished_and_a_diverged_one_is_in_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "a", [0.1, 0.5, 0.4, 0.3, 0.2])
    config = run / "config.toml"
    config.write_text(config.read_text() + "\n[eval]\npatience = 2\n")
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line["stale"] = max(line["round"] - 1, 0)
    for rounds, finished in ((1, False), (2, False), (3, True)):
        text = "".join(json.dumps(line) + "\n" for line in lines[: rounds + 1])
        (run / "rounds.jsonl").write_text(text)
        assert load_run(run).finished == finished
    for line in lines:
        del line["stale"]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    assert not load_run(run).finished
    (run / "report.html").touch()  # is written last, and lines of old runs have no more to say
    assert load_run(run).finished
    other = write(tmp_path / "b", [0.1, 0.9], seed=1)
    (other / "diverged.txt").write_text("the loss is not finite\n")
    show_results([run, other], False)
    assert "0.300" in capsys.readouterr().out


def test_no_report_of_an_unfinished_run_takes_the_place_that_marks_its_end(tmp_path: Path) -> None:
    run = cut_short(write(tmp_path / "a", [0.1, 0.5, 0.6]), 1)
    with pytest.raises(ConfigError, match="marks the end of a run"):
        report([run], run / "report.html")
    report([run], tmp_path / "report.html")
    assert not load_run(run).finished


def damage(run: Path, how: str) -> None:
    rounds, config = run / "rounds.jsonl", run / "config.toml"

    def put(entry: str) -> None:
        rounds.write_text(rounds.read_text().replace("{", f"{{{entry}, ", 1))

    match how:
        case "cut off":
            rounds.write_bytes(rounds.read_bytes()[:-20])
        case "not text":
            rounds.write_bytes(b"\xff\xfe\n")
        case "a field gone":
            rounds.write_text(rounds.read_text().replace('"bytes_up"', '"bytes"'))
        case "a word as metric":
            rounds.write_text(rounds.read_text().replace('"accuracy": 0.6', '"accuracy": "good"'))
        case "never evaluated":
            rounds.write_text(rounds.read_text().replace('"accuracy": 0.1', "").splitlines()[0])
        case "empty":
            rounds.write_text("")
        case "no toml":
            config.write_text("name = ")
        case "no method":
            config.write_text(config.read_text().replace("[method]", "[other]"))
        case "no clients":
            (run / "partition.json").write_text('{"clients": []}')
        case "no labels":
            (run / "partition.json").write_text('{"clients": [{"num_examples": 1}]}')
        case "other labels":
            (run / "axes.json").write_text('{"labels": {"one": 2}, "layers": []}')
            put('"recall": [0.5, 1.0]')
        case "a word as recall":
            put('"recall": ["half"]')
        case "a word as norm":
            put('"layers": {"norm_A": ["large"]}')
        case "a word as rows":
            (run / "axes.json").write_text('{"labels": {"one": "two"}, "layers": []}')
        case "a list of labels":
            (run / "axes.json").write_text('{"labels": [["one", 2]], "layers": []}')
        case "no axes":
            put('"recall": [0.5]')
        case "a number as text":
            said = {"prompt": "", "expected": "", "before": "", "after": 1}
            (run / "samples.json").write_text(json.dumps([said]))
        case "gone":
            config.unlink()


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("cut off", DataError, "line 2 is not valid JSON; if a crash cut it off, repair it"),
        ("not text", DataError, "line 1 is not valid JSON"),
        ("a field gone", DataError, "line 1: bytes_up: Field required"),
        ("a word as metric", DataError, "line 2: metrics.accuracy: Input should be a valid number"),
        ("a word as recall", DataError, "line 1: recall.0: Input should be a valid number"),
        ("a word as norm", DataError, "line 1: layers.norm_A.0: Input should be a valid number"),
        ("a word as rows", DataError, "axes.json is damaged: labels.one: Input should be a valid"),
        ("a list of labels", DataError, "axes.json is damaged: labels: Input should be an object"),
        ("no axes", DataError, "axes.json does not have the labels and layers of"),
        (
            "a number as text",
            DataError,
            "samples.json is damaged: 0.after: Input should be a valid",
        ),
        ("never evaluated", DataError, "no evaluated round yet"),
        ("empty", DataError, "no evaluated round yet"),
        ("no toml", DataError, "config.toml or partition.json is damaged"),
        ("no method", DataError, "config.toml or partition.json is damaged"),
        ("no clients", DataError, "lists no clients"),
        ("no labels", DataError, "config.toml or partition.json is damaged"),
        (
            "other labels",
            DataError,
            "axes.json does not have the labels and layers of rounds.jsonl",
        ),
        ("gone", ConfigError, "is not a run folder: config.toml is missing"),
    ],
)
def test_a_damaged_or_unevaluated_run_folder_is_one_line_that_names_it(
    tmp_path: Path, how: str, error: type[Exception], says: str
) -> None:
    run = write(tmp_path / "a", [0.1, 0.6])
    damage(run, how)
    with pytest.raises(error) as caught:
        write_report([run], tmp_path / "page.html")
    assert says in str(caught.value)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()
