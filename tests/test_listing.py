"""``rolora runs`` and ``rolora env``: what there is, how far it is, and on what machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from rolora.cli.main import main
from rolora.cli.printing import show
from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.results.listing import Listed, list_runs
from rolora.run import runs
from rolora.run.prediction import writer

Say = Callable[..., str]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: None) -> Say:
    """What a command prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["rolora", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def folder(site: Path, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """A finished run, one that was stopped, and three that cannot be read."""
    path = tmp_path_factory.mktemp("listed")
    list(runs.start(load_config(site), path / "whole").rounds())
    rounds = runs.start(load_config(site, ["method.name=fedit"]), path / "deep" / "half").rounds()
    for _ in range(3):
        next(rounds)
    rounds.close()
    shutil.copytree(path / "whole", path / "torn")
    with (path / "torn" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 5, "met')
    shutil.copytree(path / "whole", path / "bare")
    (path / "bare" / "partition.json").unlink()
    shutil.copytree(path / "whole", path / "strange")
    (path / "strange" / "config.toml").write_bytes(b"\\xff\\x00 not toml")
    shutil.copytree(path / "whole", path / ".part-whole-1")  # of a killed process
    (path / "whole" / "wandb").mkdir()
    (path / "whole" / "wandb" / "config.toml").touch()  # of something that a run holds
    return path


def by_name(folder: Path) -> dict[str, Listed]:
    return {one.path.name: one for one in list_runs(folder)}


def test_each_run_is_listed_with_how_far_it_is(folder: Path) -> None:
    found = by_name(folder)
    assert found.keys() == {"whole", "half", "torn", "bare", "strange"}
    whole, half = found["whole"], found["half"]
    assert (whole.state, whole.round, whole.rounds) == ("finished", 4, 4)
    assert (half.state, half.round, half.rounds) == ("not finished", 2, 4)
    assert (half.method, half.metric) == ("fedit", "accuracy")
    text = (folder / "deep" / "half" / "rounds.jsonl").read_text()
    record = [json.loads(line) for line in text.splitlines()]
    values = [line["metrics"]["accuracy"] for line in record if line["metrics"]]
    assert (half.last, half.best) == (values[-1], max(values))


def test_a_folder_that_cannot_be_read_is_a_line_with_its_reason(folder: Path, say: Say) -> None:
    found = by_name(folder)
    assert "partition.json is missing" in found["bare"].reason
    assert "damaged" in found["strange"].reason
    assert "line 6 is not valid JSON" in found["torn"].reason
    lines = [line for line in say("runs", folder).splitlines() if line.startswith("unreadable: ")]
    assert len(lines) == 3


def test_a_run_is_running_while_a_process_holds_its_folder(site: Path, tmp_path: Path) -> None:
    rounds = runs.start(load_config(site), tmp_path / "run").rounds()
    next(rounds)
    before = sorted(tmp_path.rglob("*"))
    assert by_name(tmp_path)["run"].state == "running"
    assert sorted(tmp_path.rglob("*")) == before
    rounds.close()
    assert by_name(tmp_path)["run"].state == "not finished"


def test_the_list_is_printed_for_people_and_as_json(
    folder: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rolora.cli.printing.out_console.width", 200)
    assert "fedit   not finished, round 2 of 4  accuracy" in say("runs", folder / "deep")
    (told,) = json.loads(say("runs", folder / "deep", "--json"))
    assert (told["path"], told["seed"], told["round"]) == (str(folder / "deep" / "half"), 0, 2)
    with pytest.raises(ConfigError, match="is not a folder"):
        list_runs(folder / "none")


def test_the_environment_has_what_a_bug_report_needs(say: Say) -> None:
    found = json.loads(say("env", "--json"))
    assert found["packages"]["torch"] == version("torch")
    assert {"rolora", "python", "platform", "processor", "gpus", "git_commit"} <= found.keys()
    assert 0 < found["memory_free"] <= found["memory"]
    assert "pytest" not in found["packages"]
    assert f"transformers       {version('transformers')}" in say("env").splitlines()


def test_a_number_that_is_not_finite_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"last": float("nan"), "rows": ({"best": float("-inf")}, 1.5)}
    show(True, found)
    for text in (capsys.readouterr().out, writer(None)([found])):
        strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert strict == {"last": None, "rows": [{"best": None}, 1.5]}
