"""A second set of test rows: measured whenever the first is, and deciding nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_cli import rolora
from tiny_site import KINDS, write_rows

from rolora.cli.results import results_table
from rolora.config.load import load_config
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, NotHere
from rolora.report.page import render
from rolora.results.runs import by_method, gain, load_run, primary_metric, summarise
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter
from rolora.run.experiment import Experiment

pytestmark = pytest.mark.usefixtures("quick")

VALIDATED = ("data.validation=0.2", "eval.every=1")


@pytest.fixture(scope="module")
def elsewhere(site: Path) -> Path:
    """Rows of another kind beside the site's."""
    return write_rows(site.parent / "elsewhere.csv", 9, [*KINDS][:1] * 2 + [*KINDS][2:])


def named(site: Path, *changes: str) -> RunConfig:
    second = ("data.second_test=elsewhere.csv", "data.second_name=elsewhere")
    return load_config(site, [*second, *changes])


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, (folder / "rounds.jsonl").read_text().splitlines())


def without_second(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "/" not in name}


def both(folder: Path, config: RunConfig, other: RunConfig) -> list[list[dict[str, Any]]]:
    for name, one in (("with", config), ("without", other)):
        list(runs.start(one, folder / name).rounds())
    return [list(lines(folder / name)) for name in ("with", "without")]


def test_every_round_that_measures_the_test_rows_measures_the_second_ones(
    site: Path, elsewhere: Path, tmp_path: Path
) -> None:
    list(runs.start(named(site), tmp_path / "run").rounds())
    measured = [line["metrics"] for line in lines(tmp_path / "run") if line["metrics"]]
    assert len(measured) > 2
    for metrics in measured:
        first = without_second(metrics)
        assert metrics.keys() == {*first, *(f"{name}/elsewhere" for name in first)}
    alone = evaluate_adapter(tmp_path / "run", str(elsewhere))
    assert {name: measured[-1][f"{name}/elsewhere"] for name in alone} == alone


@pytest.mark.parametrize("changes", [(), ("train.workers=2", "train.bank=1")])
def test_the_second_rows_change_neither_the_run_nor_its_best_round(
    site: Path, elsewhere: Path, tmp_path: Path, changes: Sequence[str]
) -> None:
    given = (*VALIDATED, *changes)
    config, other = named(site, *given, "eval.patience=2"), load_config(site, given)
    found, plain = both(tmp_path, config, other.model_copy(update={"eval": config.eval}))
    for one, two in zip(found, plain, strict=True):
        one["metrics"] = without_second(one["metrics"])
        del one["seconds"], two["seconds"]
        assert one == two
    weights = [tmp_path / n / "adapter" / "adapter_model.safetensors" for n in ("with", "without")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_that_leaves_the_test_rows_alone_leaves_the_second_ones_alone(
    site: Path, elsewhere: Path, tmp_path: Path
) -> None:
    config = named(site, *VALIDATED, "eval.rows=validation", "train.rounds=1")
    *_, last = runs.start(config, tmp_path / "run").rounds()
    assert last.metrics == without_second(dict(last.metrics))


def test_clients_that_keep_a_part_of_the_adapter_are_each_measured_on_both(
    site: Path, elsewhere: Path, tmp_path: Path
) -> None:
    config = named(site, "method.name=fedsa_lora", "train.rounds=2")
    *_, last = runs.start(config, tmp_path / "run").rounds()
    assert "accuracy/elsewhere" in last.metrics


def test_reports_tables_and_comparisons_have_both_and_go_by_the_first(
    site: Path,
    elsewhere: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("data.second_test=elsewhere.csv", "data.second_name=elsewhere", "train.rounds=2")
    methods = ("--methods", "rolora,fedit", "--seeds", "0", "--out", tmp_path / "both")
    code, out, _ = rolora(monkeypatch, capsys, "compare", site, *words, *methods)
    assert code == 0
    assert "accuracy/elsewhere" in out
    found = [load_run(tmp_path / "both" / f"{name}-seed0") for name in ("rolora", "fedit")]
    assert primary_metric(found) == "accuracy"
    rows = summarise(found)
    for row, run in ((row, run) for row in rows for run in found if run.method == row.method):
        assert row.second == {"accuracy/elsewhere": (run.last("accuracy/elsewhere"), None)}
    assert [str(one.header) for one in results_table(rows).columns][:3] == [
        *("method", "accuracy", "accuracy/elsewhere")
    ]
    page = render(found)
    assert "<th>accuracy/elsewhere</th>" in page
    assert "accuracy/elsewhere against rounds" in page


def test_seeds_with_and_without_second_rows_are_one_method(
    site: Path, elsewhere: Path, tmp_path: Path
) -> None:
    configs = load_config(site, ["train.rounds=1"]), named(site, "train.rounds=1", "seed=1")
    for config in configs:
        list(runs.start(config, tmp_path / str(config.seed)).rounds())
    records = [load_run(tmp_path / str(config.seed)) for config in configs]
    assert by_method(records) == {"rolora": records}
    (row,) = summarise(records)
    assert (row.seeds, row.second) == ((0, 1), {})


def test_no_metric_of_the_second_rows_is_the_main_one(site: Path, tmp_path: Path) -> None:
    list(runs.start(load_config(site, ["train.rounds=1"]), tmp_path / "run").rounds())
    record, lines = load_run(tmp_path / "run"), {"perplexity": 3.0, "loss": 1.0}
    for line in record.rounds:
        line["metrics"] = {"perplexity/second": 2.0, **lines}
    assert primary_metric([record]) == "perplexity"
    assert gain("perplexity/second", 2.0) == -2.0


def test_the_second_rows_are_part_of_what_a_resumed_run_must_have(
    site: Path, elsewhere: Path, tmp_path: Path
) -> None:
    list(runs.start(named(site, "train.rounds=1"), tmp_path / "run").rounds())
    other = write_rows(site.parent / "other.csv", 12)
    with pytest.raises(ConfigError, match="the data of"):
        runs.resume(tmp_path / "run", 2, overrides=[f"data.second_test={other}"])
    moved = write_rows(tmp_path / "moved.csv", 0)
    moved.write_text(elsewhere.read_text())
    resumed = runs.resume(tmp_path / "run", 2, overrides=[f"data.second_test={moved}"])
    assert "accuracy/elsewhere" in list(resumed.rounds())[-1].metrics


def test_second_rows_that_are_not_there_are_named_before_the_model_is_loaded(site: Path) -> None:
    with pytest.raises(NotHere, match=r"nowhere\.csv"):
        Experiment(load_config(site, ["data.second_test=nowhere.csv"])).rows  # noqa: B018
    with pytest.raises(ConfigError, match=r"data\.second_name"):
        load_config(site, ["data.second_name=a/b"])


@pytest.mark.parametrize("key", ["second_split", "second_name"])
def test_what_is_said_of_second_rows_that_are_not_configured_is_refused(
    site: Path, key: str
) -> None:
    with pytest.raises(ConfigError, match=f"data.{key} has no effect without data.second_test"):
        load_config(site, [f"data.{key}=a"])


def test_a_trial_across_sites_takes_the_second_rows_along(
    site: Path, elsewhere: Path, tmp_path: Path
) -> None:
    pytest.importorskip("flwr", reason="sites need Flower")
    from rolora.sites.local_trial import make_trial

    make_trial(tmp_path / "federation", str(site), ["data.second_test=elsewhere.csv"], 2, 19093)
    rows = Experiment(load_config(tmp_path / "federation" / "run.toml")).rows
    assert rows.second_test is not None
    assert rows.second_test.num_rows == 9
