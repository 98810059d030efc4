"""Claims about the studies of docs/results.md: they go on where they stopped, and say what came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scripts import script

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with records and runs in a folder of their own."""
    module = script("experiments/run_studies.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    return module


def study(made: Any, site: Path, name: str, **more: Any) -> Any:
    few = ["train.rounds=2", "eval.every=1"]
    return made.Study(name, str(site), ["rolora", "fedit"], [0], few, **more)


def test_a_study_chooses_rates_and_another_uses_them_cell_by_cell(made: Any, site: Path) -> None:
    quiet = Console(quiet=True)
    tuned = study(made, site, "first", tune=["train.lr=1e-2,1e-1"], tune_seeds=[100])
    made.run(tuned, quiet)
    first = json.loads((made.RECORDS / "first.json").read_text())
    (cell,) = first["cells"]
    best = {one["method"]: one["best"]["train.lr"] for one in cell["tuning"]["methods"]}

    cells = {"lora.rank": [1, 2], "train.local_steps": [3]}
    made.run(study(made, site, "second", cells=cells, rates_of="first"), quiet)
    second = json.loads((made.RECORDS / "second.json").read_text())
    assert second["alone"] == {method: [f"train.lr={rate}"] for method, rate in best.items()}
    assert [tuple(one["cell"].values()) for one in second["cells"]] == [(1, 3), (2, 3)]
    sent = [{row["method"]: row["megabytes_up"] for row in c["methods"]} for c in second["cells"]]
    assert sent[0]["fedit"] < sent[1]["fedit"]
    curves = second["cells"][0]["curves"]["fedit"]
    assert {seed: [point[0] for point in curve] for seed, curve in curves.items()} == {
        "0": [0, 1, 2]
    }
    assert (
        min(second["cells"][0]["errors"]["fedit"])
        > 1e-6
        > max(second["cells"][0]["errors"]["rolora"])
    )


def test_a_table_has_each_method_s_rate_result_and_distance_at_equal_rounds_and_bytes() -> None:
    results = script("docs/make_results.py")
    apart = {"mean": -0.021, "interval": [-0.03, -0.012]}
    places = [{"method": "fedit", "difference": apart}, {"method": "rolora", "difference": None}]
    methods = [
        {"method": "fedit", "final_mean": 0.8, "final_sd": 0.01, "megabytes_up": 63.04},
        {"method": "rolora", "final_mean": 0.821, "final_sd": None, "megabytes_up": 31.5},
    ]
    scores = {"0.1": 0.8, "0.5": None}
    trials = [{"values": {"train.lr": rate}, "mean": mean} for rate, mean in scores.items()]
    tuned = [
        {"method": "rolora", "best": {"train.lr": "0.1"}, "at_edge": {}, "trials": trials},
        {
            "method": "fedit",
            "best": {"train.lr": "0.5"},
            "at_edge": {"train.lr": "largest"},
            "trials": trials,
        },
    ]
    cell = {
        "cell": {},
        "reference": "rolora",
        "methods": methods,
        "curves": {
            "rolora": {"0": [[k, k, 0.9 if k < 5 else 0.581] for k in range(9)]},
            "fedit": {
                "0": [[k, k, 0.3] for k in range(9)],
                "1": [[k, k, 0.1 if k == 8 else 0.5] for k in range(9)],
            },
        },
        "pairs": {"fedit": [{"equal": "rounds", "places": places}]},
        "tuning": {"methods": tuned, "seeds": [100]},
        "made": {"cpu": "a processor"},
    }
    record = {"config": "none.toml", "seeds": [0, 1], "rates_of": None, "core_hours": 0.26}
    lines = results.compared({**record, "cells": [cell]})
    assert lines[2] == "| `rolora` | 0.1 | 82.1 | 58.1, 0.0 (0.0) |  |  | 31.5 |"
    late = "35.0, 15.0 (30.0)"  # within a run, however far the runs lie apart
    assert lines[3] == f"| `fedit` | 0.5* | 80.0 ± 1.0 | {late} | −2.1 [−3.0, −1.2] |  | 63.0 |"
    assert lines[-4:] == [
        *("| `train.lr` | 0.1 | 0.5 |", "| --- | ---: | ---: |"),
        *("| `rolora` | 80.0 | diverged |", "| `fedit` | 80.0 | diverged |"),
    ]
    assert lines[5] == (
        "`experiments/none.toml`, seeds 0, 1; rates from 0.1, 0.5, chosen on validation "
        "rows of seed 100; 0.3 core-hours (a processor)."
    )


def test_a_registered_question_is_answered_by_holm_s_p_and_by_what_is_equal() -> None:
    results = script("docs/make_results.py")
    assert results.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    noise = [0.001, -0.001, 0.002, -0.002, 0.0]

    def cell(key: str, value: Any, **values: Sequence[float]) -> dict[str, Any]:
        """Scores of each seed; the reference's are the first."""
        first, *others = values
        pairs = {
            other: [
                {
                    "equal": axis,
                    "places": [
                        {"method": m, "values": values[m], "seeds": range(len(values[m]))}
                        for m in (first, other)
                    ],
                }
                for axis in ("rounds", "megabytes")
            ]
            for other in others
        }
        return {"cell": {key: value}, "metric": "accuracy", "reference": first, "pairs": pairs}

    def near(value: float, sign: int = 1) -> list[float]:
        return [value + sign * one for one in noise]

    turn = {"rolora (turn=1.0)": near(0.9)}
    three = near(0.905, -1)[:3]  # the others diverged
    scores = {"rolora": near(0.8, -1), "fedit": three, "ffa_lora": near(0.5, -1)}
    clients = cell("partition.clients", 5, **turn, **scores)
    rates = cell("train.schedule", "cosine", **turn, rolora=near(0.9, -1), fedit=near(0.95, -1))
    kept = [
        cell("train.keep_moments", way, rolora=near(score, sign), fedit=[0.7, 0.9, 0.8, 0.7, 0.9])
        for way, score, sign in ((True, 0.84, 1), (False, 0.825, -1))
    ]
    people = [
        {
            **cell("train.keep_moments", way, rolora=near(score), fedit=near(26.0, -1)),
            "metric": "perplexity",  # the lower one is ahead
        }
        for way, score in ((True, 20.0), (False, 22.0))
    ]
    cells = {"e1": [clients], "e3": [rates], "kept": kept, "e4": people}
    lines = results.answers({name: {"cells": found} for name, found in cells.items()})
    asked = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [(one[0], one[1], one[-1]) for one in asked] == [
        ("E1, 5 clients", "the turn − RoLoRA", "ahead"),
        ("E1, 5 clients", "the turn − `fedit`, equal bytes", "equal within 2 points"),
        ("E3, cosine rate", "the turn − RoLoRA", "equal within 2 points"),
        ("E3, cosine rate", "the turn − `fedit`, equal bytes", "behind"),
        ("TREC", "kept moments − fresh ones, RoLoRA", "ahead, but equal within 2 points"),
        ("TREC", "RoLoRA with kept moments − `fedit` with fresh ones, equal bytes", "cannot tell"),
        ("TREC", "RoLoRA with kept moments − `fedit` with kept ones, equal bytes", "cannot tell"),
        ("E4, six people", "kept moments − fresh ones, RoLoRA", "ahead"),
        *(
            (
                "E4, six people",
                f"RoLoRA with kept moments − `fedit` with {way} ones, equal bytes",
                "ahead",
            )
            for way in ("fresh", "kept")
        ),
    ]


def test_a_map_is_bold_where_a_method_is_ten_points_behind_at_chance_or_diverged() -> None:
    results = script("docs/make_results.py")

    def cell(rate: float, epochs: int, **found: float) -> dict[str, Any]:
        methods = [{"method": m, "final_mean": value} for m, value in found.items()]
        return {"cell": {"train.lr": rate, "train.local_epochs": epochs}, "methods": methods}

    cells = [
        cell(0.1, 1, rolora=0.8, fedit=0.65),
        cell(0.1, 5, rolora=0.8, fedit=0.75),
        cell(2.0, 1, rolora=0.1),
        cell(2.0, 5, rolora=0.5, fedit=0.9),
    ]
    lines = results.broken_map({"methods": ["rolora", "fedit"], "cells": cells})
    assert lines[0] == "| `train.lr` | `local_epochs` 1 | `local_epochs` 5 |"
    assert lines[2] == "| 0.1 | 80.0 / **65.0** | 80.0 / 75.0 |"
    assert lines[3] == "| 2.0 | **10.0** / **diverged** | **50.0** / 90.0 |"


def test_what_is_on_disk_is_not_run_again_and_the_record_is_the_same(
    made: Any, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = study(made, site, "again")
    made.run(one, Console(quiet=True))
    before = (made.RECORDS / "again.json").read_text()
    monkeypatch.setattr("rolora.comparison.queue.start", lambda *_: pytest.fail("ran again"))
    made.run(one, Console(quiet=True))
    assert (made.RECORDS / "again.json").read_text() == before


def test_a_study_that_is_stopped_has_the_record_of_the_cells_that_have_ended(
    made: Any, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(one: Any, cell: dict[str, Any], *rest: Any) -> Any:
        if cell == {"train.local_steps": 3}:
            raise KeyboardInterrupt
        return real(one, cell, *rest)

    real = made.run_cell
    monkeypatch.setattr(made, "run_cell", stopped)
    one = study(made, site, "half", cells={"train.local_steps": [1, 2, 3]})
    with pytest.raises(KeyboardInterrupt):
        made.run(one, Console(quiet=True))
    record = json.loads((made.RECORDS / "half.json").read_text())
    assert [cell["cell"] for cell in record["cells"]] == [{"train.local_steps": n} for n in (1, 2)]


def test_an_unknown_study_is_refused_in_one_line(made: Any) -> None:
    with pytest.raises(SystemExit, match="unknown study 'trek'; known: e1, "):
        made.main(["trek"])


def test_every_study_can_be_planned_and_uses_rates_of_one_that_tunes() -> None:
    made = script("experiments/run_studies.py")
    known = made.studies()
    for one in known.values():
        for cell in one.each():
            overrides = [*one.overrides, *(f"{key}={value}" for key, value in cell.items())]
            made.rolora.load_config(made.HERE / one.config, overrides)
        assert bool(one.tune) + bool(one.rates_of) + ("train.lr" in one.cells) == 1, one.name
        if one.rates_of:
            assert known[one.rates_of].tune
