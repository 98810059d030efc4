"""``rolora init glue/TASK``: GLUE's columns, labels, metrics and sets, in the form the hub has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from datasets import ClassLabel, Features, Value
from proposals import write_template
from sklearn.metrics import f1_score

from rolora.config.load import load_config
from rolora.errors import ConfigError, NotHere
from rolora.proposal.found_rows import GLUE
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter
from rolora.run.prediction import predict

pytestmark = pytest.mark.usefixtures("quick")

NLI = ("entailment", "neutral", "contradiction")
TWO = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
# the columns and labels of nyu-mll/glue
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (PAIR, ("not_equivalent", "equivalent")),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": (PAIR, ()),
    "mnli": (("premise", "hypothesis"), NLI),
    "qnli": (("question", "sentence"), TWO),
    "rte": (PAIR, TWO),
    "wnli": (PAIR, ("not_entailment", "entailment")),
}
METRICS = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}


def rows(task: str, split: str, count: int = 60) -> datasets.Dataset:
    """Invented rows of this form; those of "test" have no answers, as on the hub."""
    texts, names = TASKS[task]
    label = ClassLabel(names=list(names)) if names else Value("float32")
    features = {**{text: Value("string") for text in texts}, "label": label, "idx": Value("int32")}
    words = ("the cat sat", "a good film", "a thin plot", "of course")
    made: dict[str, list[Any]] = {
        text: [f"{words[(row + place) % 4]} number {row} of {split}" for row in range(count)]
        for place, text in enumerate(texts)
    }
    answers = [row % len(names) if names else row % 26 / 5 for row in range(count)]
    made["label"] = [-1] * count if split == "test" else answers
    return datasets.Dataset.from_dict(
        {**made, "idx": list(range(count))}, features=Features(features)
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the hub, asked from a folder without files."""

    def load(name: str, config: str, split: str, revision: str | None) -> datasets.Dataset:
        assert name == "nyu-mll/glue"
        return rows(config, split, 61 if split == "validation_mismatched" else 60)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("rolora.data.hub.is_reachable", lambda url: True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_task_of_glue_with_labels_is_known() -> None:
    assert GLUE.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("written", ["glue/{}", "hub:nyu-mll/glue:{}"])
def test_a_task_of_glue_is_configured_with_its_own_columns_metric_and_set(
    hub: Path, task: str, written: str
) -> None:
    write_template(written.format(task), hub / "a.toml", "model")
    config = load_config(hub / "a.toml")
    texts, names = TASKS[task]
    assert config.data.train == config.data.test == f"hub:nyu-mll/glue:{task}"
    assert config.data.test_split == ("validation_matched" if task == "mnli" else "validation")
    assert config.data.text == (texts[0] if len(texts) == 1 else list(texts))
    assert config.data.label == "label"
    assert config.model.task == ("classification" if names else "regression")
    assert config.eval.metric == METRICS.get(task)
    assert (config.data.positive in names) == (METRICS.get(task) == "f1")


@pytest.mark.parametrize("positive", TASKS["mrpc"][1])
def test_f1_is_that_of_the_positive_label_however_labels_are_ordered(
    hub: Path, positive: str
) -> None:
    tiny.tiny_bert(hub / "model")
    write_template("glue/mrpc", hub / "a.toml", "model")
    short = ["train.rounds=2", "partition.clients=2", "partition.scheme=iid", "train.lr=0.05"]
    config = load_config(hub / "a.toml", [*short, f"data.positive={positive}"])
    *_, last = runs.start(config, hub / "run").rounds()
    asked = rows("mrpc", "validation")
    asked.to_parquet(hub / "asked.parquet")
    found = predict(hub / "run", str(hub / "asked.parquet"))
    guess = [row["label"] for row in found]
    truth = [TASKS["mrpc"][1][number] for number in asked["label"]]
    assert last.metrics["f1"] == pytest.approx(f1_score(truth, guess, pos_label=positive))


def test_a_run_on_mnli_measures_both_of_its_sets(hub: Path) -> None:
    tiny.tiny_bert(hub / "model")
    write_template("glue/mnli", hub / "a.toml", "model")
    config = load_config(hub / "a.toml", ["train.rounds=2", "partition.clients=2"])
    *_, last = runs.start(config, hub / "run").rounds()
    for split, end in (("validation_matched", ""), ("validation_mismatched", "/mismatched")):
        rows("mnli", split, 61 if end else 60).to_parquet(hub / "asked.parquet")
        alone = evaluate_adapter(hub / "run", str(hub / "asked.parquet"))
        assert {name + end: value for name, value in alone.items()}.items() <= last.metrics.items()


def test_a_name_that_glue_does_not_have_is_refused_with_those_it_has(hub: Path) -> None:
    with pytest.raises(ConfigError, match="no task 'mnly' with labels: cola, sst2"):
        write_template("glue/mnly", hub / "a.toml", "model")


@pytest.mark.parametrize("source", ["glue/mnli", "hub:owner/name", "owner/name"])
def test_without_a_network_a_hub_name_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rolora.data.hub.is_reachable", lambda url: False)
    with pytest.raises(NotHere, match=r"the hub does not answer: where there is a network"):
        write_template(source, tmp_path / "a.toml", "model")


def test_f1_without_its_label_is_refused(hub: Path) -> None:
    write_template("glue/sst2", hub / "a.toml", "model")
    with pytest.raises(ConfigError, match=r"eval.metric = 'f1' needs data.positive"):
        load_config(hub / "a.toml", ["eval.metric=f1"])
