"""Comparing methods: tuned apart from the test, taken up where it stopped, never mixed up."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from comparisons import GRID, METHODS, SMALL, everything, finish, lines, planned
from tiny_site import write_rows

from rolora.comparison.budget import Timing
from rolora.comparison.folder import ComparisonFolder
from rolora.comparison.grid import Comparison, plan
from rolora.comparison.queue import QueuedRun, compare, queued_runs
from rolora.config.load import load_config, read_toml
from rolora.errors import BudgetSpent, ConfigError, RoloraError
from rolora.results.runs import load_run
from rolora.training.local import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def whole(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(planned(site), tmp_path_factory.mktemp("whole") / "all")


def test_a_comparison_leaves_its_settings_its_choice_its_runs_and_a_page(whole: Path) -> None:
    runs = {f"{method}-seed{seed}" for method in METHODS for seed in (0, 1, 2)}
    names = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    assert names == {"comparison.json", "tuning.json", "tuning", "report.html", *runs}
    assert len(list((whole / "tuning").iterdir())) == 2 * 2
    page = (whole / "report.html").read_text()
    assert "How the settings were chosen" in page
    assert "equal local compute" in page
    assert "Difference from rolora" in page


def test_every_method_has_the_same_cohorts_split_and_start(site: Path, tmp_path: Path) -> None:
    methods, seeds = ["rolora", "fedit", "centralized"], [0, 1]
    for run in compare(load_config(site, SMALL), methods, seeds, tmp_path / "all"):
        list(run.rounds())
    for seed in seeds:
        found = [lines(tmp_path / "all" / f"{method}-seed{seed}") for method in methods]
        for one in found[1:]:
            assert [e["cohort"] for e in one] == [e["cohort"] for e in found[0]]
            assert one[0]["metrics"] == found[0][0]["metrics"]
    cohorts = [lines(tmp_path / "all" / f"rolora-seed{s}")[1]["clients"] for s in seeds]
    assert cohorts[0] != cohorts[1]
    assert (tmp_path / "all" / "report.html").stat().st_size > 10_000


def test_settings_for_one_method_alone_reach_it_alone_and_its_model(
    site: Path, tmp_path: Path
) -> None:
    config = load_config(site, ["train.rounds=1"])
    only = {"fedit": ["train.lr=0.25", "lora.rank=3"]}
    found = {}
    for run in compare(config, METHODS, [0], tmp_path / "rates", only):
        rank = {spec.shape[0] for spec in run.experiment.base.specs.tensors if spec.role == "A"}
        found[run.experiment.config.method.name] = (run.experiment.config.train.lr, rank)
        list(run.rounds())
    assert found == {"rolora": (5e-3, {2}), "fedit": (0.25, {3})}


def test_a_method_stands_beside_itself_with_other_options(site: Path, tmp_path: Path) -> None:
    comparison = planned(site, methods=["rolora", "rolora+first=A"], seeds=[0], tune=())
    finish(comparison, tmp_path / "all")
    runs = [load_run(run) for run in sorted((tmp_path / "all").glob("*-seed0"))]
    assert [run.method for run in runs] == ["rolora (first=A)", "rolora"]
    assert [run.rounds[1]["factors"][0] for run in runs] == ["A", "B"]


def test_no_test_row_is_looked_at_while_settings_are_chosen(
    site: Path, whole: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(site.parent, tmp_path / "site")) / site.name
    write_rows(other.parent / "test.csv", 30, ["cat", "cat", "good"])
    for queued in queued_runs(planned(other), tmp_path / "all"):
        if queued.planned.stage == "final":
            break
        list(queued.run.rounds())
    chosen = (tmp_path / "all" / "tuning.json").read_bytes()
    assert chosen == (whole / "tuning.json").read_bytes()
    before, after = (lines(path / "rolora-seed0") for path in (whole, tmp_path / "all"))
    list(queued.run.rounds())
    after = lines(tmp_path / "all" / "rolora-seed0")
    assert before[0]["metrics"] != after[0]["metrics"]  # of the table they are what is measured


def test_the_choice_follows_the_validation_rows(site: Path, whole: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(site.parent, tmp_path / "site")) / site.name
    write_rows(other.parent / "validation.csv", 30, ["cat"])
    comparison = planned(other, "data.validation=validation.csv")
    for queued in queued_runs(comparison, tmp_path / "all"):
        if queued.planned.stage == "final":
            break
        list(queued.run.rounds())
    tuning, old = (ComparisonFolder(path).tuning() for path in (tmp_path / "all", whole))
    assert tuning is not None
    assert old is not None
    assert tuning.rows == "validation rows (validation.csv)"
    assert [one.trials for one in tuning.methods] != [one.trials for one in old.methods]


def test_a_run_that_tunes_measures_validation_rows_only_and_once(whole: Path) -> None:
    for run in (whole / "tuning").iterdir():
        for line in lines(run):
            assert line["metrics"] == line["validation"] != {}
        assert load_run(run).config["eval"]["rows"] == "validation"
    final = lines(whole / "rolora-seed0")[-1]
    assert final["metrics"].keys() == final["validation"].keys()
    assert load_run(whole / "rolora-seed0").config["eval"]["rows"] == "test"


def test_a_personal_method_is_tuned_by_the_adapters_of_its_clients(
    site: Path, tmp_path: Path
) -> None:
    config = load_config(site, [*SMALL, "method.name=local", "data.validation=0.2"])
    from rolora.run import runs

    run = runs.start(
        config.model_copy(update={"eval": config.eval.model_copy(update={"rows": "validation"})}),
        tmp_path / "run",
    )
    list(run.rounds())
    first, *_, last = lines(tmp_path / "run")
    assert last["metrics"] != first["metrics"]  # the server's own adapter never moves
    assert last["validation"] == last["metrics"]


def test_the_choice_is_on_disk_before_a_run_of_the_table_is(site: Path, tmp_path: Path) -> None:
    path, stages = tmp_path / "all", []
    for queued in queued_runs(planned(site, seeds=[0]), path):
        stages.append(queued.planned.stage)
        finals, chosen = list(path.glob("*-seed0")), (path / "tuning.json").is_file()
        assert (bool(finals), chosen) == (
            (False, False) if stages[-1] == "tuning" else (True, True)
        )
        list(queued.run.rounds())
    assert stages == ["tuning"] * 4 + ["final"] * 2


def test_the_table_uses_the_best_values_fresh_seeds_and_no_validation_row(whole: Path) -> None:
    tuning = ComparisonFolder(whole).tuning()
    assert tuning is not None
    for one in tuning.methods:
        rates = {trial.values["train.lr"]: trial.mean for trial in one.trials}
        assert rates[one.best["train.lr"]] == max(rates.values())  # type: ignore[type-var]
        differ = len(set(rates.values())) > 1
        assert bool(one.at_edge) == differ  # of two values each is at an edge, if one is better
        for seed in (0, 1, 2):
            config = load_run(whole / f"{one.method}-seed{seed}").config
            assert config["train"]["lr"] == float(one.best["train.lr"])
            assert config["data"]["validation"] == 0.1
    tuned = {load_run(run).seed for run in (whole / "tuning").iterdir()}
    assert tuned == {100}
    page = (whole / "report.html").read_text()
    assert "that was tried; a " in page
    assert "cut off because the configuration names none; no run trains on them" in page


def stop_after(comparison: Comparison, path: Path, rounds: int) -> int:
    """Leave the comparison after so many rounds of all its runs, as a crash would."""
    done = 0
    for queued in queued_runs(comparison, path):
        for _ in queued.run.rounds():
            done += 1
            if done == rounds:
                return done
    return done


@pytest.mark.parametrize("rounds", [1, 3, 11])
def test_a_comparison_left_after_any_round_ends_with_the_same_bits(
    site: Path, whole: Path, tmp_path: Path, rounds: int
) -> None:
    path = tmp_path / "all"
    assert stop_after(planned(site), path, rounds) == rounds
    assert everything(finish(planned(site), path)) == everything(whole)


def test_a_comparison_killed_in_the_middle_ends_with_the_same_bits(
    site: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "all"
    words = ["--methods", ",".join(METHODS), "--seeds", "0,1,2", "--tune", GRID]
    words += ["--tune-seeds", "100", "--tune-rounds", "1", "--out", str(path)]
    command = [sys.executable, "-m", "rolora", "compare", str(site), *SMALL, *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    second = "tuning/*lr=1e-1-seed100/checkpoints/round-*"
    while not list(path.glob(second)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (path / "report.html").exists()
    done = [page.parent / "rounds.jsonl" for page in path.glob("tuning/*/report.html")]
    kept = {file: file.stat().st_mtime_ns for file in done}
    assert kept
    assert everything(finish(planned(site), path)) == everything(whole)
    assert {file: file.stat().st_mtime_ns for file in done} == kept


def test_a_finished_comparison_runs_nothing_again_and_gives_the_same_page(
    site: Path, whole: Path
) -> None:
    page = (whole / "report.html").read_bytes()
    assert list(queued_runs(planned(site), whole)) == []
    assert (whole / "report.html").read_bytes() == page


def test_runs_go_with_the_bank_and_dtype_of_the_first(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "all"
    queue = queued_runs(planned(site, methods=["rolora", "fedit"], seeds=[0], tune=()), path)
    first = next(queue)
    list(first.run.rounds())
    file = path / "rolora-seed0" / "config.toml"
    bank = read_toml(file)["provenance"]["bank"]
    assert bank > 1
    file.write_text(file.read_text().replace(f"bank = {bank}", "bank = 1"))
    assert next(queue).run.experiment.bank == 1


@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_the_base_model_and_the_rows_as_tokens_are_made_once_for_all_runs(
    site: Path, tmp_path: Path, dtype: str
) -> None:
    config = load_config(site, [*SMALL, f"model.dtype={dtype}"])
    used = []
    for run in compare(config, ["rolora", "fedit"], [0, 1], tmp_path / "all"):
        used.append((run.experiment.base, run.experiment.examples, run.experiment.test))
        list(run.rounds())
    assert len(used) == 4
    assert all(a is b for one in used for a, b in zip(one, used[0], strict=True))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"overrides": ["train.lr=0.3"]}, "train.lr is 0.005 there, 0.3 here"),
        ({"seeds": [0, 1, 3]}, "seeds is [0, 1, 2] there, [0, 1, 3] here"),
        ({"methods": ["fedit", "rolora"]}, "methods is ['rolora', 'fedit'] there"),
        ({"tune": ["train.lr=1e-2,2e-1"]}, "tune.rolora.train.lr is ['1e-2', '1e-1'] there"),
        ({"tune_seeds": [101]}, "tune seeds is [100] there, [101] here"),
        ({"tune": []}, "data.validation is 0.1 there"),
    ],
)
def test_with_other_settings_a_comparison_is_not_taken_up(
    site: Path, whole: Path, changed: dict[str, Any], says: str
) -> None:
    comparison = planned(site, *changed.pop("overrides", []), **changed)
    with pytest.raises(ConfigError) as caught:
        list(queued_runs(comparison, whole))
    assert says in str(caught.value)
    assert "is of another comparison" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["train.csv", "test.csv"])
def test_with_other_rows_a_comparison_is_not_taken_up(
    site: Path, tmp_path: Path, file: str
) -> None:
    other = Path(shutil.copytree(site.parent, tmp_path / "site")) / site.name
    comparison = planned(other, seeds=[0], tune=())
    stop_after(comparison, tmp_path / "all", 1)
    write_rows(other.parent / file, 33)
    with pytest.raises(
        ConfigError, match=r"the rows of data\.train, data\.test, data\.second_test or data\."
    ):
        list(queued_runs(comparison, tmp_path / "all"))


def test_with_another_base_model_a_comparison_is_not_taken_up(site: Path, tmp_path: Path) -> None:
    from test_runs import with_other_weights

    other = Path(shutil.copytree(site.parent, tmp_path / "site")) / site.name
    comparison = planned(other, seeds=[0], tune=())
    queue = queued_runs(comparison, tmp_path / "all")
    list(next(queue).run.rounds())
    queue.close()
    with_other_weights(other.parent)
    with pytest.raises(ConfigError, match="the base model changed since the comparison began"):
        list(queued_runs(comparison, tmp_path / "all"))


def test_a_folder_that_is_no_comparison_or_in_use_is_refused(site: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="exists and is not a comparison"):
        list(queued_runs(planned(site), tmp_path / "mine"))
    queue = queued_runs(planned(site), tmp_path / "all")
    next(queue)
    with pytest.raises(ConfigError, match="is in use by another process"):
        next(queued_runs(planned(site), tmp_path / "all"))


def test_a_run_left_before_its_end_stops_the_queue(site: Path, tmp_path: Path) -> None:
    queue = queued_runs(planned(site), tmp_path / "all")
    next(queue)
    with pytest.raises(RoloraError, match="did not finish"):
        next(queue)


def test_a_value_that_diverges_is_not_chosen_and_the_others_are_tried(
    site: Path, tmp_path: Path
) -> None:
    comparison = planned(site, seeds=[0], methods=["fedit"], tune=["train.lr=1e30,1e-2"])
    for _ in range(2):  # what diverged is not tried again
        seen = []
        for queued in queued_runs(comparison, tmp_path / "all"):
            seen.append(queued.planned.path.name)
            try:
                list(queued.run.rounds())
            except NonFiniteLoss:
                break
    assert seen == ["fedit-train.lr=1e-2-seed100", "fedit-seed0"]
    tuning = ComparisonFolder(tmp_path / "all").tuning()
    assert tuning is not None
    (one,) = tuning.methods
    assert [trial.scores[0] is None for trial in one.trials] == [True, False]
    assert one.best == {"train.lr": "1e-2"}


def test_a_budget_between_runs_is_spent_before_the_next_is_begun(
    site: Path, tmp_path: Path
) -> None:
    queue = queued_runs(planned(site), tmp_path / "all", budget=1e-6)
    list(next(queue).run.rounds())
    with pytest.raises(BudgetSpent, match=r"1 of 10 runs are done, about .* core-hours remain"):
        next(queue)
    assert len(list((tmp_path / "all" / "tuning").iterdir())) == 1


def test_the_estimate_falls_as_rounds_are_done(site: Path, tmp_path: Path) -> None:
    queued: QueuedRun = next(queued_runs(planned(site), tmp_path / "all"))
    done = [*queued.done, Timing(0, True, 1.0), Timing(1, True, 3.0)]
    # 1 round of 1 is done; 3 of the same, and 6 of 2 rounds with 3 evaluations each
    assert queued.outlook.seconds_left(done, 1) == 3 * (2 + 2) + 6 * (2 * 2 + 3)
    assert queued.outlook.seconds_left(done, 0) == 2 + 1 + 3 * (2 + 2) + 6 * (2 * 2 + 3)


def test_variants_that_are_the_same_are_refused(site: Path) -> None:
    config = load_config(site, ["method.first=A"])
    with pytest.raises(ConfigError, match=r"methods 'rolora' and 'rolora\+first=A' are the same"):
        plan(config, {"rolora": (), "rolora+first=A": ()}, [0])


def test_a_search_names_what_it_cannot_do(site: Path) -> None:
    config = load_config(site)
    with pytest.raises(ConfigError, match="tuning needs at least one seed"):
        plan(config, {"rolora": ()}, [0], tune=["train.lr=1,2"], tune_seeds=[])


def test_the_public_function_tunes_too(site: Path, whole: Path, tmp_path: Path) -> None:
    runs = compare(
        load_config(site, SMALL),
        METHODS,
        (0, 1, 2),
        tmp_path / "all",
        tune=[GRID],
        tune_seeds=[100],
        tune_rounds=1,
    )
    for run in itertools.islice(runs, 4):
        list(run.rounds())
    assert next(runs).experiment.config.seed == 0
    assert (tmp_path / "all" / "tuning.json").read_text() == (whole / "tuning.json").read_text()
