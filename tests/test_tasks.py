"""Claims about kinds of task and the parts of an experiment, some of which can be given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_structure import loaded_by
from tiny_site import make_site

from rolora.config.load import load_config, make_config
from rolora.errors import ConfigError
from rolora.run import runs
from rolora.run.experiment import Experiment
from rolora.tasks.registry import TASKS, higher_is_better, task_kind

LEAST = {"model": {"path": "m"}, "data": {"train": "t.csv"}}
LENGTHS = '''\
"""Classification with metrics of its own."""

from rolora.tasks.registry import TaskKind, task_kind


def kind() -> TaskKind:
    return TaskKind(
        name="lengths",
        head="classification",
        columns=[("text", "label")],
        metrics={"macro_f1": True, "loss": False, "errors": False},
        make=make,
    )


def make(base, columns, labels, max_length):
    from dataclasses import replace

    task = task_kind("classification").make(base, columns, labels, max_length)

    def score(outputs, examples):
        found = task.score(outputs, examples)
        return {"macro_f1": found["macro_f1"], "loss": found["loss"], "errors": 1.0}

    return replace(task, score=score)
'''


@pytest.fixture
def lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that adds the task "lengths"."""
    place = tmp_path / "packages"
    (place / "lengths_task-1.0.dist-info").mkdir(parents=True)
    (place / "lengths_task.py").write_text(LENGTHS)
    about = place / "lengths_task-1.0.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lengths-task\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rolora.tasks]\nlengths = lengths_task:kind\n")
    monkeypatch.syspath_prepend(str(place))
    return place


@pytest.mark.usefixtures("lengths")
def test_a_task_of_an_installed_package_runs_by_its_name(tmp_path: Path) -> None:
    config = load_config(make_site(tmp_path), ["model.task=lengths", "data.validation=0.2"])
    run = runs.start(config, tmp_path / "run")
    *_, last = run.rounds()
    assert set(last.metrics) == {"macro_f1", "loss", "errors"}
    assert run.experiment.federation.metric == "macro_f1"
    assert last.state.best is not None
    assert not higher_is_better("errors")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.task=clasification"], "did you mean 'classification'?"),
        (["model.task=choice"], "needs data.prompt, data.choices and data.answer"),
        (["model.task=causal_lm"], "needs either data.completion, or data.mess"),
        (["eval.metric=macro"], "eval.metric 'macro' is not measured by classification: did you"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_when_the_configuration_is_read(
    overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(LEAST, overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kind_names_the_metrics_of_its_task_the_main_one_first() -> None:
    mains = {name: next(iter(task_kind(name).metrics)) for name in TASKS.names()}
    expected = {
        "causal_lm": "perplexity",
        "choice": "choice_accuracy",
        "preference": "accuracy",
    }
    texts = {"classification": "accuracy", "multi_label": "micro_f1", "regression": "pearson"}
    assert mains == {**expected, **texts}
    assert [higher_is_better(name) for name in ("exact_match", "perplexity")] == [True, False]
    with pytest.raises(ConfigError, match="no installed task measures 'speed'"):
        higher_is_better("speed")


def test_what_is_known_of_tasks_loads_no_heavy_library() -> None:
    heavy = {"transformers", "peft", "sklearn", "pyarrow", "datasets"}
    code = "from rolora.config.load import load_config\nfrom rolora.tasks import registry\n"
    assert loaded_by(f"{code}registry.higher_is_better('loss')", heavy) == []


def test_refusals_that_need_no_model_come_before_it_is_looked_for(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    for change, said in (
        ("aggregate.quorum=99", "aggregate.quorum = 99 can never be met"),
        ('lora.rank={"x" = 2}', "set lora.rank to one number"),
        ("data.label=lable", "no column 'lable'"),
    ):
        config = load_config(file, [change, "model.path=./gone"])
        with pytest.raises(Exception, match=said):
            Experiment(config, tmp_path / "clients").prepare()


def test_a_part_that_is_given_is_not_made_again(tmp_path: Path) -> None:
    config = load_config(make_site(tmp_path), ["train.rounds=1"])
    first = Experiment(config, tmp_path / "a")
    moved = config.model_copy(update={"model": config.model.model_copy(update={"path": "./gone"})})
    second = Experiment(moved, tmp_path / "b", base=first.base, rows=first.rows)
    second.prepare()
    assert second.base is first.base
    assert second.data == first.data
    one, other = (each.start.server.adapter for each in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_metric_s_name_cannot_be_taken_for_one_on_second_test_rows() -> None:
    with pytest.raises(ConfigError, match="a metric's name has no '/': 'rouge/1'"):
        dataclasses.replace(task_kind("classification"), metrics={"rouge/1": True})
