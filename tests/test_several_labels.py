"""Claims about rows with several labels or a number: what transformers computes, everywhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pytest
import scipy.stats
import torch
import transformers
from calls import NAMES, calls, configuration, make_place, remote
from test_cli import rolora
from transformers import AutoConfig, AutoModelForSequenceClassification

from rolora.algorithm.adapter import tensor_hash
from rolora.data.examples import collate
from rolora.data.tables import label_sets, numbers
from rolora.errors import ConfigError, DataError
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter, evaluate_each
from rolora.run.experiment import Experiment
from rolora.run.prediction import predict

pytestmark = pytest.mark.usefixtures("quick")

WORDS = {"film": "a good film", "pet": "the cat", "plot": "a thin plot"}
COLUMNS = ["text", "tags", "listed", *WORDS, "score"]
KINDS = {
    "text": ("model.task=multi_label", "data.label=tags", "data.separator=+"),
    "JSON": ("model.task=multi_label", "data.label=listed"),
    "columns": ("model.task=multi_label", 'data.label=["film", "pet", "plot"]'),
    "number": ("model.task=regression", "data.label=score"),
}


def row(number: int) -> list[Any]:
    """Every subset of the three labels in turn, in a text that shows it; and how many there are."""
    names = [name for place, name in enumerate(WORDS) if number >> place & 1]
    text = " and ".join(["dog", *(WORDS[name] for name in names)])
    switches = [int(name in names) for name in WORDS]
    return [text, "+".join(names), json.dumps(names), *switches, len(names) + 0.5]


def write(path: Path, rows: range) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *map(row, rows)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_place(tmp_path_factory.mktemp("several"))
    write(folder / "test.csv", range(16))
    for name, rows in zip(NAMES, (range(21), range(9), range(4, 18)), strict=True):
        write(folder / f"site-{name}.csv", rows)
    return folder


def trained(place: Path, out: Path, kind: str, *more: str) -> Path:
    config = configuration(place, *KINDS[kind], "train.lr=0.05", *more)
    list(runs.start(config, out).rounds())
    return out


def by_peft(run: Path) -> tuple[Any, Any]:
    """The adapter's model and tokenizer, as its folder describes them."""
    folder = run / "adapter"
    config = AutoConfig.from_pretrained(folder / "model_config.json")
    base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    plain = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return peft.PeftModel.from_pretrained(plain, folder).eval(), tokenizer


@pytest.mark.parametrize("kind", ["text", "number"])
def test_the_loss_is_the_one_that_transformers_computes_for_this_problem(
    place: Path, kind: str
) -> None:
    experiment = Experiment(configuration(place, *KINDS[kind]))
    base, examples = experiment.base, experiment.examples
    model: Any = base.model
    rows = torch.arange(12)
    batch = collate(examples, rows, base.tokenizer.pad_token_id)
    with base.holding(experiment.start.server.adapter), torch.inference_mode():
        each, terms = experiment.task.loss(model, batch)
        theirs = model(**batch.inputs, labels=batch.targets).loss
    assert model.config.problem_type.startswith(experiment.kind.head)
    assert float(each.sum() / terms.sum()) == pytest.approx(float(theirs), rel=1e-5)


def test_probabilities_of_several_labels_are_those_of_transformers_pipeline(
    place: Path, tmp_path: Path
) -> None:
    run = trained(place, tmp_path / "run", "text")
    found = predict(run, str(place / "test.csv"))
    model, tokenizer = by_peft(run)
    pipeline = transformers.pipeline(
        "text-classification", model.merge_and_unload(), tokenizer=tokenizer, top_k=None
    )
    for number, one in enumerate(found):
        theirs = {part["label"]: part["score"] for part in pipeline([row(number)[0]])[0]}
        assert one["probabilities"] == pytest.approx(theirs, rel=1e-4)
        assert one["labels"] == [n for n, p in one["probabilities"].items() if p >= 0.5]
    assert len({tuple(one["labels"]) for one in found}) > 1


def test_a_predicted_number_is_that_of_transformers_pipeline(place: Path, tmp_path: Path) -> None:
    run = trained(place, tmp_path / "run", "number")
    found = predict(run, str(place / "test.csv"))
    model, tokenizer = by_peft(run)
    pipeline = transformers.pipeline(
        "text-classification", model.merge_and_unload(), tokenizer=tokenizer
    )
    for number, one in enumerate(found):
        assert one["value"] == pytest.approx(pipeline(row(number)[0])[0]["score"], rel=1e-4)
    values, truth = [one["value"] for one in found], [row(number)[-1] for number in range(16)]
    metrics = evaluate_adapter(run, str(place / "test.csv"))
    assert metrics["pearson"] == pytest.approx(scipy.stats.pearsonr(truth, values).statistic)
    assert metrics["spearman"] == pytest.approx(scipy.stats.spearmanr(truth, values).statistic)
    errors = torch.tensor(values) - torch.tensor(truth)
    assert metrics["mean_absolute_error"] == pytest.approx(float(errors.abs().mean()))
    assert metrics["loss"] == pytest.approx(float(errors.square().mean()))


def test_metrics_of_several_labels_count_labels_and_whole_rows(place: Path, tmp_path: Path) -> None:
    run = trained(place, tmp_path / "run", "text", "train.rounds=12")
    found = [set(one["labels"]) for one in predict(run, str(place / "test.csv"))]
    truth = [set(filter(None, row(number)[1].split("+"))) for number in range(16)]
    metrics = evaluate_adapter(run, str(place / "test.csv"))
    right = sum(len(one & other) for one, other in zip(found, truth, strict=True))
    f1 = 2 * right / sum(len(one) + len(other) for one, other in zip(found, truth, strict=True))
    whole = sum(one == other for one, other in zip(found, truth, strict=True)) / 16
    assert 0 < whole < 1
    assert (metrics["micro_f1"], metrics["subset_accuracy"]) == pytest.approx((f1, whole))


def test_the_recall_of_a_label_is_over_the_rows_that_have_it_among_others(
    place: Path, tmp_path: Path
) -> None:
    run = trained(place, tmp_path / "run", "text", "train.rounds=12")
    found = [set(one["labels"]) for one in predict(run, str(place / "test.csv"))]
    truth = [set(filter(None, row(number)[1].split("+"))) for number in range(16)]
    ((_, scored),) = evaluate_each(run, {"test": str(place / "test.csv")})
    assert set(scored.recall) == set(WORDS)
    for label, share in scored.recall.items():
        having = [one for one, other in zip(found, truth, strict=True) if label in other]
        assert share == sum(label in one for one in having) / len(having)


def test_text_lists_and_columns_of_0_and_1_say_the_same(place: Path, tmp_path: Path) -> None:
    hashes = set()
    for kind in ("text", "JSON", "columns"):
        run = trained(place, tmp_path / kind, kind, "train.rounds=2")
        hashes.add((run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_sites_train_as_one_machine_does(place: Path, tmp_path: Path, kind: str) -> None:
    config = configuration(place, *KINDS[kind])
    here = list(runs.start(config, tmp_path / "here").rounds())[-1]
    policy: dict[str, Any] = {"tasks": [config.model.task], "label": config.data.label}
    transport = calls(place, tmp_path / "state", **policy)
    across = list(remote(config, tmp_path / "out", transport).rounds())[-1]
    one, other = (last.state.server.adapter for last in (here, across))
    assert {n: tensor_hash(t) for n, t in one.items()} == {
        n: tensor_hash(t) for n, t in other.items()
    }
    assert dict(here.metrics) == dict(across.metrics)


def test_a_run_of_each_kind_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    for kind in ("text", "number"):
        whole = trained(place, tmp_path / f"{kind}-whole", kind, "eval.every=1")
        half = runs.start(
            configuration(place, *KINDS[kind], "train.lr=0.05", "eval.every=1"), tmp_path / kind
        )
        for result in half.rounds():
            if result.round == 3:
                break
        list(runs.resume(tmp_path / kind).rounds())
        name = "adapter/adapter_model.safetensors"
        assert (tmp_path / kind / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("kind", ["text", "number"])
@pytest.mark.parametrize("scheme", ["dirichlet", "by_label"])
def test_a_partition_by_class_is_refused_where_a_row_has_no_one_class(
    place: Path, kind: str, scheme: str
) -> None:
    config = configuration(place, *KINDS[kind], f"partition.scheme={scheme}")
    with pytest.raises(ConfigError, match=rf"'{scheme}' needs one class per row"):
        _ = Experiment(config).rows


def test_the_rows_of_a_client_are_counted_by_label(place: Path) -> None:
    experiment = Experiment(configuration(place, *KINDS["columns"]))
    (ann, *_), labels = experiment.partition["clients"], experiment.labels
    assert ann["labels"] == {"film": 10, "pet": 10, "plot": 9}
    assert labels == ("film", "pet", "plot")
    assert (
        Experiment(configuration(place, *KINDS["number"])).partition["clients"][0]["labels"] == {}
    )


def test_a_head_of_one_output_starts_a_regression_and_no_other_does(
    place: Path, tmp_path: Path
) -> None:
    for outputs, kept in ((1, True), (2, False)):
        folder = tmp_path / str(outputs)
        model = AutoModelForSequenceClassification.from_pretrained(
            place / "model", num_labels=outputs
        )
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(place / "model").save_pretrained(folder)
        base = Experiment(configuration(place, *KINDS["number"], f"model.path={folder}")).base
        found = base.specs.head.get("base_model.model.classifier.weight")
        assert (found is not None and torch.equal(found, model.classifier.weight)) is kept
        assert ("the run predicts one number" in base.note) is not kept


def test_a_base_that_was_trained_for_another_problem_keeps_nothing_of_it(
    place: Path, tmp_path: Path
) -> None:
    """Pipelines go by problem_type: a stale one would turn classes into sigmoids."""
    folder = tmp_path / "model"
    model = AutoModelForSequenceClassification.from_pretrained(
        place / "model", num_labels=3, problem_type="multi_label_classification"
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(place / "model").save_pretrained(folder)
    run = trained(
        place,
        tmp_path / "run",
        "text",
        f"model.path={folder}",
        "model.task=classification",
        "data.label=film",
        "data.separator=null",
        "train.rounds=1",
    )
    found = AutoConfig.from_pretrained(run / "adapter" / "model_config.json")
    assert found.problem_type == "single_label_classification"


@pytest.mark.parametrize(
    ("values", "separator", "expected"),
    [
        (["a+b", "", "b"], "+", [["a", "b"], [], ["b"]]),
        (["a, b", " a ,"], ",", [["a", "b"], ["a"]]),
        (['["a", 2]', "[]"], None, [["a", "2"], []]),
        ([["a", "b"], []], None, [["a", "b"], []]),
        ([[1, 2], [3]], None, [["1", "2"], ["3"]]),
        (["a+b+a"], "+", [["a", "b"]]),  # a row is counted once for each of its labels
    ],
)
def test_labels_of_a_row_are_read_from_lists_json_and_separated_text(
    values: list[Any], separator: str | None, expected: list[list[str]]
) -> None:
    assert label_sets(pa.table({"y": values}), "y", separator, "a.csv") == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a+b", "a"], "is not a list of names in row 1"),
        (['["a"]', '{"a": 1}'], "is not a list of names in row 2"),
        (['["a", null]'], "is not a list of names in row 1"),
        ([["a"], None], "is missing in row 2"),
        ([[1.5]], "is not a list of names in row 1"),
        ([3, 4], "is not a list of names in row 1"),
        (["[" * 100_000], "is not a list of names in row 1"),
    ],
)
def test_what_is_no_list_of_labels_is_refused_by_row(values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_sets(pa.table({"y": values}), "y", None, "a.csv")


def test_a_column_of_labels_holds_0_or_1_and_nothing_else() -> None:
    table = pa.table({"a": ["1", "0"], "b": [True, False], "c": [1.0, 0.0], "d": [0, -1]})
    assert label_sets(table, ["c", "a", "b"], None, "a.csv") == [["c", "a", "b"], []]
    with pytest.raises(DataError, match=r"column 'd' is '-1' in row 2; .* 0 or 1"):
        label_sets(table, ["a", "d"], None, "a.csv")


@pytest.mark.parametrize("value", ["", "high", "nan", "inf", None])
def test_what_is_no_number_is_refused_by_row(value: str | None) -> None:
    assert numbers(pa.table({"y": ["1", " 2.5", "-1e3"]}), "y", "a.csv") == [1.0, 2.5, -1000.0]
    with pytest.raises(DataError, match=r"a\.csv: column 'y' is .* in row 2"):
        numbers(pa.table({"y": ["1", value]}), "y", "a.csv")


def test_predictions_of_both_kinds_are_written_as_csv(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = {
        "text": ["labels", *(f"probabilities.{name}" for name in WORDS)],
        "number": ["value"],
    }
    for kind, head in heads.items():
        run = trained(place, tmp_path / kind, kind, "train.rounds=1")
        out = tmp_path / f"{kind}.csv"
        words = ("predict", run, "--data", place / "test.csv", "--out", out)
        assert rolora(monkeypatch, capsys, *words)[0] == 0
        with out.open(newline="") as file:
            assert next(csv.reader(file)) == head
