"""Claims about a checkpoint whose head is trained: its outputs keep the meaning they have there."""

from __future__ import annotations

import copy
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from calls import Calls, configuration
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rolora.config.load import make_config
from rolora.model.peft import save_adapter
from rolora.run import runs
from rolora.run.experiment import Experiment
from rolora.sites.coordinator import across
from rolora.sites.site import Site
from rolora.sites.site_config import SiteConfig

WORDS = [word for sentence in tiny.SENTENCES for word in sentence.split()]
TEXTS = [" ".join(WORDS[start : start + 3]) for start in range(40)]


def checkpoint(folder: Path, names: Sequence[str] | None, outputs: int = 2) -> Path:
    """A model with a trained head; its outputs are called ``names``, or nothing in particular."""
    tiny.tiny_bert(folder)
    named = {} if names is None else {"id2label": dict(enumerate(names))}
    config = AutoConfig.from_pretrained(folder, num_labels=outputs, **named)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
        torch.nn.init.normal_(model.classifier.weight)
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():  # so that each output is the largest for some text
        model.classifier.bias -= model.eval()(**inputs).logits.mean(dim=0)
    model.save_pretrained(folder)
    return folder


def predicted(folder: Path) -> list[str]:
    """What transformers' own pipeline calls each text."""
    pipe = transformers.pipeline("text-classification", str(folder))
    found = [answer["label"] for answer in pipe(TEXTS)]
    assert len(set(found)) == pipe.model.config.num_labels
    return found


def write(path: Path, labels: Sequence[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(TEXTS, labels, strict=True))


def experiment(place: Path, labels: Sequence[str]) -> Experiment:
    """A run on these labels of the texts, tested on the rows that it trains on."""
    write(place / "rows.csv", labels)
    tables = {
        "model": {"path": "model"},
        "lora": {"rank": 2},
        "data": {"train": "rows.csv", "test": "rows.csv"},
        "partition": {"clients": 2},
    }
    return Experiment(make_config(tables, root=place), place / "clients")


def accuracy_before_training(run: Experiment) -> float:
    return run.evaluate(run.start.server.adapter).metrics["accuracy"]


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        (("pos", "neg"), str),
        (("NEGATIVE", "POSITIVE"), str.lower),
        (("b", "c", "a"), str.upper),
        (("1", "0"), str),
        (None, lambda name: name.removeprefix("LABEL_")),
        (None, str),  # the rows call them LABEL_0 and LABEL_1 too
    ],
)
def test_a_head_whose_names_are_the_run_s_labels_is_as_right_as_in_transformers(
    tmp_path: Path, names: Sequence[str] | None, ours: type[str]
) -> None:
    model = checkpoint(tmp_path / "model", names, len(names or "ab"))
    run = experiment(tmp_path, [ours(name) for name in predicted(model)])
    assert accuracy_before_training(run) == 1.0
    assert not [note for note in run.notes if "head" in note]


@pytest.mark.parametrize(
    ("names", "renamed", "note"),
    [
        (None, {"LABEL_0": "bad", "LABEL_1": "good"}, "outputs have no names, the run's labels"),
        (("pos", "neg"), {"pos": "good", "neg": "bad"}, "outputs are pos, neg, the run's labels"),
        (("a", "A"), {"a": "x", "A": "X"}, "outputs are a, A, the run's labels are X, x"),
        (("a", "b", "c"), {"a": "a", "b": "b", "c": "b"}, "outputs are a, b, c, the run's labels"),
    ],
)
def test_a_head_whose_outputs_mean_something_else_is_drawn_anew_and_the_run_says_so(
    tmp_path: Path, names: Sequence[str] | None, renamed: dict[str, str], note: str
) -> None:
    model = checkpoint(tmp_path / "model", names, len(names or "ab"))
    run = experiment(tmp_path, [renamed[name] for name in predicted(model)])
    head = "base_model.model.classifier.weight"
    assert head not in run.base.specs.head
    (said,) = (text for text in run.notes if "head" in text)
    assert note in said
    assert not Experiment(run.config, labels=(*run.labels, "new")).base.specs.head


def test_labels_that_differ_by_case_only_are_told_apart(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", ("b", "B"))
    run = experiment(tmp_path, predicted(model))
    assert run.labels == ("b", "B")
    assert accuracy_before_training(run) == 1.0


@pytest.mark.wide
def test_sites_follow_the_checkpoint_s_order_too(tmp_path: Path) -> None:
    names = predicted(checkpoint(tmp_path / "model", ("pos", "neg")))
    write(tmp_path / "test.csv", names)
    sites = {}
    for number, site in enumerate(("ann", "bob")):
        write(tmp_path / f"{site}.csv", names)
        state = str(tmp_path / "state" / site)
        own = SiteConfig(
            name=site,
            data=f"{site}.csv",
            state=state,
            root=tmp_path,
            text="text",
            label="label",
            min_train_rows=1,
        )
        sites[number] = Site(own)
    transport = Calls(sites)
    config = configuration(tmp_path, "federation.sites=2", "train.rounds=1")
    run = runs.start(config, tmp_path / "run", across(transport, transport.notified.append))
    start, *_ = run.rounds()
    assert run.experiment.labels == ("pos", "neg")
    assert start.metrics["accuracy"] == 1.0


@pytest.mark.parametrize("names", [("b", "a"), ("bad", "good")])
def test_an_adapter_s_head_starts_a_run_only_where_its_outputs_mean_the_same(
    tmp_path: Path, names: Sequence[str]
) -> None:
    tiny.tiny_bert(tmp_path / "model")
    first = experiment(tmp_path, ["a", "b"] * 20)
    start = first.start.server.adapter
    base = first.base
    config: Any = copy.deepcopy(base.model.config)
    config.id2label = dict(enumerate(names))
    other = start | {name: tensor + 1 for name, tensor in start.items()}
    save_adapter(tmp_path / "adapter", other, base.peft_config, config, base.tokenizer, {}, "")
    warm = first.config.model_copy(
        update={"lora": first.config.lora.model_copy(update={"init_from": "adapter"})}
    )
    run = Experiment(warm, base=base)
    taken = run.start.server.adapter
    assert all(torch.equal(taken[n], other[n]) for n in other if "lora" in n)
    assert all(torch.equal(taken[n], start[n]) for n in other if "lora" not in n)
    (said,) = (note for note in run.notes if "head of" in note)
    assert "its labels are not this run's" in said
