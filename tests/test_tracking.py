"""Experiment trackers: each round once, and no run is other, or lost, because of one."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rolora.comparison.queue import compare
from rolora.config.load import config_hash, load_config
from rolora.errors import ConfigError
from rolora.run import runs
from rolora.run.folder import RunFolder
from rolora.run.tracking import TRACKERS, scalars


@dataclass
class Display:
    """trackio's interface: (project, run) -> its configuration and (round, scalars)."""

    runs: dict[tuple[str, str], list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    configs: list[dict[str, Any]] = field(default_factory=list)
    fails_at: int | None = None
    finished: int = 0

    def init(self, project: str, name: str, config: dict[str, Any], **_: Any) -> Any:
        print("to standard output")
        lines = self.runs.setdefault((project, name), [])
        self.configs.append(config)
        display = self

        class Run:
            _next_step = lines[-1][0] + 1 if lines else 0

            def log(self, values: dict[str, float], step: int) -> None:
                if step == display.fails_at:
                    raise ConnectionError("nobody\nis there")
                lines.append((step, values))

        return Run()

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Display:
    """A module ``trackio`` that remembers what it is told."""
    made, module = Display(), ModuleType("trackio")
    vars(module).update(init=made.init, finish=made.finish)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return made


def lines(path: Path) -> list[tuple[int, dict[str, float]]]:
    """What a tracker should have of this run."""
    found = map(json.loads, (path / "rounds.jsonl").read_text().splitlines())
    return [(line["round"], scalars(line)) for line in found]


@pytest.fixture(scope="module")
def plain(site: Path, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """A finished run without a tracker."""
    path = tmp_path_factory.mktemp("plain") / "run"
    list(runs.start(load_config(site), path).rounds())
    return path


@pytest.fixture(autouse=True)
def _quick(quick: None) -> None:
    """No pages."""


def weights(path: Path) -> bytes:
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_tracker_gets_the_configuration_and_every_round_once(
    site: Path, tmp_path: Path, display: Display, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(site, ["track.to=trackio", "track.project=films"])
    list(runs.start(config, tmp_path / "run").rounds())
    ((project, name),) = display.runs
    assert (project, name[:4], display.finished) == ("films", "run-", 1)
    assert display.runs[project, name] == lines(tmp_path / "run")
    told = display.runs[project, name][2][1]
    known = {"train/loss", "eval/accuracy", "aggregation_error", "bytes_up", "layers/norm_A"}
    assert {*known, "rejected"} <= told.keys()
    assert display.configs[0]["train.rounds"] == 4
    assert capsys.readouterr().out == ""


def test_a_resumed_run_goes_on_in_the_tracker_and_tells_what_it_has_missed(
    site: Path, tmp_path: Path, display: Display
) -> None:
    path = tmp_path / "run"
    started = runs.start(load_config(site, ["track.to=trackio"]), path)
    rounds = started.rounds()
    for _ in range(3):
        next(rounds)
    rounds.close()
    ((key, told),) = display.runs.items()
    assert [round for round, _ in told] == [0, 1, 2]
    del told[1:]  # as if the process had been killed before the tracker had sent them
    path = path.rename(tmp_path / "moved")
    list(runs.resume(path).rounds())
    assert display.runs == {key: lines(path)}


def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(
    site: Path,
    tmp_path: Path,
    plain: Path,
    display: Display,
    caplog: pytest.LogCaptureFixture,
) -> None:
    display.fails_at = 2
    path = tmp_path / "run"
    list(runs.start(load_config(site, ["track.to=trackio"]), path).rounds())
    (warning,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert warning.startswith(
        "tracking with trackio has stopped (ConnectionError: nobody is there)"
    )
    assert weights(path) == weights(plain)
    display.fails_at = None
    assert not list(runs.resume(path).rounds())  # finished: only the tracker's rounds are missing
    ((_, told),) = display.runs.items()
    assert told == lines(path)


def test_a_tracker_that_is_not_installed_is_refused_before_any_training(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (module, install, _) in TRACKERS.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=re.escape(f"pip install {install}")):
            runs.start(load_config(site, [f"track.to={name}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_another_tracker_is_the_same_run(
    site: Path, tmp_path: Path, plain: Path, display: Display
) -> None:
    config = load_config(site, ['track.to=["trackio"]'])
    assert config_hash(config) == config_hash(load_config(site))
    assert "track" not in config.model_dump_json()  # which sites are sent
    path = tmp_path / "run"
    rounds = runs.start(config, path).rounds()
    next(rounds)
    rounds.close()
    list(runs.resume(path, overrides=["track.to=[]"]).rounds())
    assert [len(told) for told in display.runs.values()] == [1]
    for name in ("adapter_model.safetensors", "rolora.json", "README.md"):
        assert (path / "adapter" / name).read_bytes() == (plain / "adapter" / name).read_bytes()
    assert runs.stored(RunFolder.open(path))[0].track.trackers == []


def test_every_run_of_a_comparison_is_tracked_under_one_project(
    site: Path, tmp_path: Path, display: Display
) -> None:
    config = load_config(site, ["track.to=trackio", "train.rounds=2"])
    out = tmp_path / "compare"
    for run in compare(config, ["rolora", "fedit"], [0], out):
        list(run.rounds())
    named = {name.rpartition("-")[0]: told for (_, name), told in display.runs.items()}
    assert {project for project, _ in display.runs} == {"tiny"}
    assert named == {name: lines(out / name) for name in ("rolora-seed0", "fedit-seed0")}
    again = config.model_copy(update={"track": load_config(site).track})
    assert not list(compare(again, ["rolora", "fedit"], [0], out))  # the same comparison


def library(name: str) -> Any:
    """The tracker's own library; the test is skipped where it is not installed."""
    try:
        return import_module(TRACKERS[name][0])
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def stopped_and_resumed(site: Path, path: Path, tracker: str) -> str:
    """A run that was left half way and resumed; its name in the tracker."""
    rounds = runs.start(load_config(site, [f"track.to={tracker}"]), path).rounds()
    for _ in range(3):
        next(rounds)
    rounds.close()
    list(runs.resume(path).rounds())
    return (path / "tracked_as.txt").read_text().strip()


def test_trackio_itself_has_every_round_once(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    library("trackio")
    name = stopped_and_resumed(site, tmp_path / "run", "trackio")
    kept = import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("tiny", name)
    assert [one["step"] for one in kept] == [0, 1, 2, 3, 4]
    assert [one["bytes_up"] for one in kept] == [v["bytes_up"] for _, v in lines(tmp_path / "run")]


def test_tensorboard_itself_has_every_round_once(site: Path, tmp_path: Path) -> None:
    library("tensorboard")
    stopped_and_resumed(site, tmp_path / "run", "tensorboard")
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    kept = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    kept.Reload()
    assert [one.step for one in kept.Scalars("bytes_up")] == [0, 1, 2, 3, 4]
    assert [one.step for one in kept.Scalars("eval/accuracy")] == [0, 2, 4]


def test_mlflow_itself_has_every_round_once(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = library("mlflow").MlflowClient()
    name = stopped_and_resumed(site, tmp_path / "run", "mlflow")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (kept,) = client.search_runs([experiment])
    steps = [one.step for one in client.get_metric_history(kept.info.run_id, "bytes_up")]
    assert (kept.info.run_name, kept.info.status, steps) == (name, "FINISHED", [0, 1, 2, 3, 4])
    assert kept.data.params["train.rounds"] == "4"


def test_wandb_itself_takes_a_run_without_a_network(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    name = stopped_and_resumed(site, tmp_path / "run", "wandb")
    kept = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}"))
    assert len(kept) == 2  # each of them has all rounds up to its end
    assert not [one for one in caplog.records if "tracking with" in one.getMessage()]
