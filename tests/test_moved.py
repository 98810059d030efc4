"""Claims about runs whose files have moved: a hash says what is the same, and no path does."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
from comparisons import SMALL
from safetensors.torch import load_file, save_file
from test_cli import rolora
from test_runs import adapter_hash, finish
from tiny import tiny_bert
from tiny_site import make_site, write_rows

from rolora.comparison.grid import plan
from rolora.comparison.queue import comparison_path, queued_runs
from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a configuration and a stopped run, in which commands are given."""
    place = tmp_path / "project"
    place.mkdir()
    make_site(place)
    run = runs.start(load_config(place / "run.toml"), place / "runs" / "x")
    list(itertools.islice(run.rounds(), 2))
    return place


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("whole")
    return adapter_hash(finish(runs.start(load_config(make_site(place)), place / "run")))


def moved(project: Path) -> Path:
    there = project.parent / "some where" / "else"
    there.parent.mkdir()
    return project.rename(there)


def test_a_project_folder_that_has_moved_resumes_and_is_evaluated_and_reported(
    project: Path,
    whole: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(moved(project))
    assert rolora(monkeypatch, capsys, "resume", "runs/x")[0] == 0
    assert adapter_hash(Path("runs/x")) == whole
    monkeypatch.chdir("/")
    again = project.parent / "again"
    (project.parent / "some where" / "else").rename(again)
    monkeypatch.chdir(again)
    for words in (
        ("eval", "runs/x", "--data", "test.csv"),
        ("eval", "runs/x/adapter", "--data", "test.csv"),
        ("report", "runs/x"),
        ("resume", "runs/x"),
    ):
        code, _, err = rolora(monkeypatch, capsys, *words)
        assert code == 0, err
    for file in (again / "runs").rglob("*"):
        # PEFT loads an adapter's base from any folder only by an absolute path
        if file.suffix in (".toml", ".json", ".jsonl") and file.name != "adapter_config.json":
            assert str(project.parent) not in file.read_text(), file


def test_a_comparison_whose_project_has_moved_continues(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("compare", "run.toml", *SMALL, "--methods", "rolora,fedit", "--seeds", "0")
    monkeypatch.chdir(project)
    config = load_config("run.toml", SMALL)
    comparison = plan(config, {"rolora": (), "fedit": ()}, [0])
    with contextlib.closing(queued_runs(comparison, comparison_path(config, None))) as queue:
        list(itertools.islice(next(queue).run.rounds(), 2))
    monkeypatch.chdir("/")
    monkeypatch.chdir(moved(project))
    Path("model").rename("base")
    Path("train.csv").rename("rows.csv")
    code, _, err = rolora(monkeypatch, capsys, *words, "model.path=base", "data.train=rows.csv")
    assert code == 0, err
    Path("base").rename("model")
    Path("rows.csv").rename("train.csv")
    assert rolora(monkeypatch, capsys, *words)[0] == 0
    write_rows(Path("other.csv"), 60, ["good", "bad"])
    code, _, err = rolora(monkeypatch, capsys, *words, "data.train=other.csv")
    assert code == 2
    assert "the rows of data.train, data.test, data.second_test or data.validation changed" in err


@pytest.mark.parametrize("how", ["root", "places"])
def test_where_only_rows_and_model_have_moved_resume_is_told_their_place_and_keeps_it(
    project: Path,
    whole: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = project.parent / "store"
    there.mkdir()
    for name in ("model", "train.csv", "test.csv"):
        (project / name).rename(there / name)
    monkeypatch.chdir(project)
    code, _, err = rolora(monkeypatch, capsys, "resume", "runs/x")
    assert code == 3
    assert "if it has moved: rolora resume runs/x --root FOLDER, or KEY=PLACE" in err
    words = ["--root", "../store"]
    if how == "places":
        words = ["model.path=../store/model", "data.train=../store/train.csv"]
        words.append(f"data.test={there / 'test.csv'}")
    code, _, err = rolora(monkeypatch, capsys, "resume", "runs/x", *words)
    assert code == 0, err
    assert adapter_hash(Path("runs/x")) == whole
    for again in (("resume", "runs/x"), ("eval", "runs/x", "--data", "../store/test.csv")):
        assert rolora(monkeypatch, capsys, *again)[0] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.train=other.csv", "the data of runs/x changed"),
        ("data.test=other.csv", "the data of runs/x changed"),
        ("data.test=0.3", "the data of runs/x changed"),
        ("data.validation=other.csv", "the data of runs/x changed"),
        ("model.path=other", "the base model of runs/x changed"),
        ("lora.init_from=adapter", "the adapter of lora.init_from of runs/x changed"),
        ("train.lr=1", "train.lr=1: a run keeps its settings"),
        ("seed=1", "seed=1: a run keeps its settings"),
        ("data.label=text", "data.label=text: a run keeps its settings"),
        ("train.rounds=9", "train.rounds=9: a run keeps its settings. Only --rounds"),
        ("data.train", "data.train' is not of the form key.path=value"),
    ],
)
def test_other_rows_another_base_or_another_setting_are_not_the_same_run(
    project: Path,
    change: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows(project / "other.csv", 21)
    tiny_bert(project / "other", seed=1)
    if "init_from" in change:
        run = finish(runs.start(load_config(project / "run.toml"), project / "first"))
        (run / "adapter").rename(project / "adapter")
    monkeypatch.chdir(project)
    before = Path("runs/x/config.toml").read_bytes()
    code, _, err = rolora(monkeypatch, capsys, "resume", "runs/x", change)
    assert code == 2
    assert said in err
    assert Path("runs/x/config.toml").read_bytes() == before


def scaled(model: Path, by: float) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.encoder.layer.0.attention.self.key.weight"] *= by
    save_file(tensors, file, {"format": "pt"})


def other_tokenizer(model: Path) -> None:
    file = model / "tokenizer.json"
    rules = json.loads(file.read_text())
    words = rules["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    file.write_text(json.dumps(rules))


def test_an_adapter_is_evaluated_on_no_base_but_its_own_wherever_that_lies(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    finish(runs.resume("runs/x"))
    right = evaluate_adapter("runs/x", "test.csv")
    shutil.copytree("model", "moved")
    for path in ("runs/x", "runs/x/adapter"):
        assert evaluate_adapter(path, "test.csv", "moved") == right
    # in another dtype the weights are still those of the training
    assert evaluate_adapter("runs/x", "test.csv", "moved", ["model.dtype=bf16"]).keys() == (
        right.keys()
    )
    for name, change, said in (
        ("weights", lambda model: scaled(model, 1.5), "weights has other weights"),
        ("words", other_tokenizer, "words has another tokenizer"),
    ):
        shutil.copytree("model", name)
        change(Path(name))
        for overrides in ([], ["model.dtype=bf16"]):
            with pytest.raises(ConfigError, match=rf"{said}.*--model"):
                evaluate_adapter("runs/x", "test.csv", name, overrides)
    scaled(Path("model"), 1.5)  # the base that it finds by itself
    with pytest.raises(ConfigError, match="other weights than the base"):
        evaluate_adapter("runs/x", "test.csv")
