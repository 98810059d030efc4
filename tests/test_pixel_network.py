"""The paper's network for MNIST: it is the formula, and every part here works on it."""

from __future__ import annotations

import csv
import dataclasses
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from states import relative, same
from torch import Tensor

from rolora.algorithm.adapter import AdapterState
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.data.examples import Batch, collate
from rolora.errors import DataError
from rolora.methods import method_names
from rolora.model.base import Base
from rolora.model.pixel_network import PixelNetworkConfig, write_pixel_network
from rolora.plan.needs import make_plan
from rolora.report.narrative import cautions
from rolora.results.runs import load_run
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter
from rolora.run.experiment import Experiment
from rolora.run.progress import described

pytestmark = pytest.mark.usefixtures("quick")

LABELS = ("0", "1", "2", "3")
PIXELS = 36
LAYER = "base_model.model.hidden.linear"


def write_digits(path: Path, count: int, seed: int) -> None:
    """Four kinds of noisy pictures of 36 pixels: each is bright in a quarter of its own."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(count):
            label = LABELS[row % 4]
            bright = [draw.randrange(180, 256) if i // 9 == row % 4 else 0 for i in range(PIXELS)]
            noisy = [value or draw.choice([0, 0, draw.randrange(120)]) for value in bright]
            writer.writerow([" ".join(map(str, noisy)), label])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for name, std in (("model", 0.5), ("zero", 0.0)):
        (folder / name).mkdir()
        config = PixelNetworkConfig(PIXELS, 24, initializer_range=0.3, lora_b_std=std)
        write_pixel_network(folder / name, config)
    write_digits(folder / "train.csv", 96, seed=1)
    write_digits(folder / "test.csv", 40, seed=2)
    return folder


def configuration(place: Path, *overrides: str) -> RunConfig:
    tables: dict[str, Any] = {
        "name": "digits",
        "model": {"path": "model", "head": "freeze", "dtype": "fp32"},
        "lora": {"rank": 4, "alpha": 6, "target_modules": ["linear"]},
        "data": {"train": "train.csv", "test": "test.csv", "max_length": PIXELS},
        "partition": {"scheme": "by_label", "clients": 4, "labels_per_client": 1},
        "train": {"rounds": 6, "local_epochs": 3, "batch_size": 7, "optimizer": "sgd", "lr": 0.1},
        "eval": {"every": 6},
    }
    return make_config(tables, ["train.bank=4", *overrides], root=place)


def start(config: RunConfig) -> tuple[Base, AdapterState]:
    made = Experiment(config, labels=LABELS)
    return made.base, made.start.server.adapter


def formula(texts: list[str], adapter: Mapping[str, Tensor], scaling: float) -> Tensor:
    """W_out ReLU(s · B A x) in float64, x read off the texts."""
    x = torch.tensor([[int(word) / 255 for word in text.split()] for text in texts]).double()
    a, b = (adapter[f"{LAYER}.lora_{which}.weight"].double() for which in "AB")
    w_out = adapter["base_model.model.classifier.weight"].double()
    return (x @ a.T @ b.T * scaling).clamp(min=0) @ w_out.T


def rows(base: Base, config: RunConfig, source: str = "test.csv") -> tuple[list[str], Batch]:
    """The texts of a file, and its rows as the model takes them."""
    table = tables.read_table(source, root=config.root)
    examples = Experiment(config, labels=LABELS, base=base).task.encode(table, source)
    batch = collate(examples, torch.arange(len(examples)), base.tokenizer.pad_token_id)
    return table["text"].to_pylist(), batch


def logits(base: Base, adapter: AdapterState, batch: Batch) -> Tensor:
    with base.holding(adapter), torch.no_grad():
        found: Tensor = base.model(**batch.inputs).logits
    return found


def test_the_logits_are_the_formula_of_the_paper(place: Path) -> None:
    config = configuration(place)
    base, adapter = start(config)
    texts, batch = rows(base, config)
    truth = formula(texts, adapter, scaling=6 / 4)
    assert truth.abs().max() > 0.1
    assert torch.allclose(logits(base, adapter, batch).double(), truth, rtol=0, atol=1e-5)


def test_what_a_row_lacks_at_its_end_is_black(place: Path) -> None:
    config = configuration(place)
    base, adapter = start(config)
    short = ["200 30", "9 0 255 70 1", " ".join(["255"] * PIXELS)]
    texts = [" ".join((text.split() + ["0"] * PIXELS)[:PIXELS]) for text in short]
    for name, some in (("short", short), ("filled", texts), ("five", short[:2])):
        lines = [f"{text},{row}" for row, text in enumerate(some)]
        (place / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    filled = logits(base, adapter, rows(base, config, "filled.csv")[1])
    assert same_values(logits(base, adapter, rows(base, config, "short.csv")[1]), filled)
    assert same_values(logits(base, adapter, rows(base, config, "five.csv")[1]), filled[:2])


def same_values(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-6)


@pytest.mark.parametrize("row", ["0 12 256", "0 12 red", "0 -1 3"])
def test_a_word_that_is_no_pixel_is_refused_in_one_line(place: Path, row: str) -> None:
    (place / "wrong.csv").write_text(f"text,label\n{row},1\n0 1 2,0\n")
    config = configuration(place)
    base, _ = start(config)
    with pytest.raises(DataError, match=r"^wrong.csv, rows 1 to 2: .*tokenizer refuses[^\n]*$"):
        rows(base, config, "wrong.csv")


def test_lora_b_starts_random_from_the_seed_and_w_out_too(place: Path) -> None:
    names = (f"{LAYER}.lora_B.weight", "base_model.model.classifier.weight")
    starts = [start(configuration(place, f"seed={seed}"))[1] for seed in (3, 3, 4)]
    assert same(starts[0], starts[1])
    for name, std in zip(names, (0.5, 0.3), strict=True):
        assert starts[0][name].std().item() == pytest.approx(std, rel=0.2)
        assert relative({name: starts[2][name]}, {name: starts[0][name]}) > 0.5


def test_from_b_of_zero_it_would_learn_nothing(place: Path, tmp_path: Path) -> None:
    run = runs.start(configuration(place, "model.path=zero"), tmp_path / "run")
    losses = [result.metrics["loss"] for result in run.rounds() if result.metrics]
    assert run.experiment.start.server.adapter[f"{LAYER}.lora_B.weight"].abs().max() == 0
    assert losses[0] == losses[-1] == pytest.approx(math.log(len(LABELS)), rel=1e-6)


@pytest.mark.parametrize("name", method_names())
def test_a_run_in_which_no_tensor_of_any_client_moves_says_so_in_every_round(
    place: Path, tmp_path: Path, name: str
) -> None:
    config = configuration(place, f"method.name={name}", "model.path=zero", "train.rounds=2")
    run = runs.start(config, tmp_path / "run")
    said = [line for _, line in described(run.rounds(), run)]
    assert ["NOTHING MOVED" in line for line in said] == [False, True, True]
    record = load_run(tmp_path / "run")
    assert [line["moved"] for line in record.rounds] == [None, False, False]
    assert "moved no tensor of any client in 2 of 2 rounds" in "".join(cautions([record]))


def test_a_round_takes_one_row_of_80_columns_and_says_what_went_wrong(
    place: Path, tmp_path: Path
) -> None:
    run = runs.start(configuration(place, "train.rounds=2"), tmp_path / "run")
    before, _, last = run.rounds()
    long = dataclasses.replace(
        last,
        round=100,
        factors=("A", "B", "head"),
        metrics={"accuracy": 0.5, "loss": 1.0, "macro_f1": 0.5},
        aggregation_error=1e-8,
    )
    wrong = dataclasses.replace(long, rejected={"ann": "too large"}, missing={"bob": "no answer"})
    said = [line for _, line in described([before, long, wrong], run)]
    assert said[0] == f"before training  accuracy {before.metrics['accuracy']:.3f}"
    assert said[1].startswith(f"round 100/2  train A+B  train loss {last.loss:.3f}  accuracy 0.500")
    assert len(said[1]) <= 80
    assert said[2].endswith("  rejected 1: ann (too large)  no update of 1: bob (no answer)")


def test_a_run_that_moves_does_not_say_that_it_stands_still(place: Path, tmp_path: Path) -> None:
    run = runs.start(configuration(place, "train.rounds=2"), tmp_path / "run")
    assert not any("NOTHING" in line for _, line in described(run.rounds(), run))
    record = load_run(tmp_path / "run")
    assert [line["moved"] for line in record.rounds] == [None, True, True]
    assert not any("moved" in note for note in cautions([record]))


# with lora_A at home, a client of one label learns to say that label
@pytest.mark.parametrize("name", sorted({*method_names()} - {"local", "fed_alora"}))
def test_every_method_starts_where_a_gradient_passes_the_relu(
    place: Path, tmp_path: Path, name: str
) -> None:
    config = configuration(place, f"method.name={name}", "train.rounds=3", "eval.every=3")
    first, *_, last = runs.start(config, tmp_path / "run").rounds()
    assert last.metrics["loss"] < first.metrics["loss"] - 0.01


@pytest.mark.parametrize("method", ["rolora", "ffa_lora", "fedit", "centralized", "fed_sb"])
def test_methods_learn_it_on_clients_of_one_label(place: Path, tmp_path: Path, method: str) -> None:
    run = runs.start(configuration(place, f"method.name={method}"), tmp_path / "run")
    results = list(run.rounds())
    before, after = results[0].metrics, results[-1].metrics
    assert after["loss"] < 0.8 * before["loss"]
    assert after["accuracy"] > 0.6 > before["accuracy"]
    head = "base_model.model.classifier.weight"
    ended = results[-1].state.server.adapter
    assert torch.equal(ended[head], run.experiment.start.server.adapter[head])


def test_clients_in_one_bank_end_where_they_end_one_by_one(place: Path, tmp_path: Path) -> None:
    ends = []
    for bank in (4, 1):
        run = runs.start(configuration(place, f"train.bank={bank}"), tmp_path / str(bank))
        assert run.experiment.bank == bank
        ends.append([result.state.server.adapter for result in run.rounds()][-1])
    assert relative(ends[0], ends[1]) < 1e-5
    assert relative(ends[0], run.experiment.start.server.adapter) > 0.1


def test_peft_loads_a_run_s_adapter_with_the_same_logits_merged_or_not(
    place: Path, tmp_path: Path
) -> None:
    config = configuration(place)
    run = runs.start(config, tmp_path / "run")
    adapter = [result.state.server.adapter for result in run.rounds()][-1]
    _, batch = rows(run.experiment.base, config)
    ours = logits(run.experiment.base, adapter, batch)
    labels = transformers.AutoConfig.from_pretrained(run.folder.adapter / "model_config.json")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        place / "model", config=labels
    )
    model = peft.PeftModel.from_pretrained(base, run.folder.adapter).eval()
    with torch.no_grad():
        assert same_values(model(**batch.inputs).logits, ours)
        assert same_values(model.merge_and_unload()(**batch.inputs).logits, ours)
    assert ours.abs().max() > 0.1


def test_a_finished_run_is_measured_on_other_rows(place: Path, tmp_path: Path) -> None:
    run = runs.start(configuration(place), tmp_path / "run")
    last = [result.metrics for result in run.rounds()][-1]
    again = evaluate_adapter(tmp_path / "run", str(place / "test.csv"))
    assert again == pytest.approx(last, rel=1e-6)


def test_its_run_can_be_planned(place: Path) -> None:
    (planned,) = make_plan(Experiment(configuration(place))).methods
    assert [plan.factors for plan in planned.rounds] == ["B", "A"]
    assert all(plan.peak for plan in planned.rounds)
