"""Claims about ids and lengths: they are checked against the model's tables before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from rolora.config.load import make_config
from rolora.errors import ConfigError, DataError
from rolora.plan.estimate import estimate_run
from rolora.run.experiment import Experiment

LONG = " ".join(["the cat sat on the mat"] * 40)


def experiment(folder: Path, first: str = LONG, **data: Any) -> Experiment:
    """A run on four rows, of which the first is this text."""
    rows = [first, "a dog", "the cat", "a dog"]
    lines = [f"{row},{label}\n" for row, label in zip(rows, "abab", strict=True)]
    (folder / "rows.csv").write_text("text,label\n" + "".join(lines))
    tables = {
        "model": {"path": "model"},
        "lora": {"rank": 2, "target_modules": ["query"]},
        "data": {"train": "rows.csv", "test": "rows.csv", "max_length": 512, **data},
        "partition": {"clients": 2},
    }
    return Experiment(make_config(tables, root=folder), folder / "clients")


def change_tokenizer(folder: Path, **tokens: str | int) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("pad", ["[PAD]", "[SEP]"])
def test_a_long_text_is_cut_to_the_positions_that_a_roberta_really_has(
    tmp_path: Path, pad: str
) -> None:
    model = tiny.tiny_roberta(tmp_path / "model", pad=pad)
    change_tokenizer(model, model_max_length=10**6)
    run = experiment(tmp_path)
    longest = int(run.examples.lengths.max())
    ids = torch.full((1, longest), 10)
    network: Any = run.base.model
    network(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=torch.full((1, longest + 1), 10))
    note = f"1 of 4 training rows are longer than {longest} tokens (the positions that the model"
    assert [text for text in run.notes if text.startswith(note)]
    estimate = estimate_run(experiment(tmp_path))
    assert int(estimate.examples.lengths.max()) == longest


@pytest.mark.parametrize(
    ("most", "data", "limit"),
    [
        (10**6, {"max_length": 20}, "20 tokens (data.max_length)"),
        (16, {}, "16 tokens (the tokenizer's model_max_length)"),
        (10**6, {}, "64 tokens (the positions that the model has)"),
    ],
)
def test_truncation_is_reported_against_the_limit_that_bound(
    tmp_path: Path, most: int, data: dict[str, Any], limit: str
) -> None:
    change_tokenizer(tiny.tiny_bert(tmp_path / "model"), model_max_length=most)
    run = experiment(tmp_path, **data)
    assert f"1 of 4 training rows are longer than {limit} and were truncated" in run.notes


def test_a_token_without_a_row_in_the_embedding_is_refused_where_a_text_has_it(
    tmp_path: Path,
) -> None:
    model = tiny.tiny_bert(tmp_path / "model")
    tokenizer = change_tokenizer(model)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(model)
    assert len(experiment(tmp_path, "the cat").examples) == 4
    message = r"rows\.csv: token 'zebra' has the id 45, but the model's embedding has 45 rows"
    with pytest.raises(DataError, match=message):
        _ = experiment(tmp_path, "the zebra").examples
    with pytest.raises(DataError, match=message):
        estimate_run(experiment(tmp_path, "the zebra"))


def test_a_padding_token_without_a_row_in_the_embedding_is_refused(tmp_path: Path) -> None:
    change_tokenizer(tiny.tiny_bert(tmp_path / "model"), pad_token="[NEW]")
    for make in (lambda run: run.base, estimate_run):
        with pytest.raises(ConfigError, match=r"padding token of 'model' has the id 45, but the"):
            make(experiment(tmp_path))


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    change_tokenizer(tiny.tiny_bert(tmp_path / "model"), pad_token=None)  # type: ignore[arg-type]
    for make in (lambda run: run.base, estimate_run):
        with pytest.raises(ConfigError, match="has neither a padding nor an end-of-text token"):
            make(experiment(tmp_path))


def test_a_token_type_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    tiny.tiny_roberta(tmp_path / "model", type_vocab_size=1)
    (tmp_path / "pairs.csv").write_text("text,other,label\na dog,the cat,a\nthe cat,a dog,b\n")
    run = experiment(tmp_path, train="pairs.csv", test="pairs.csv", text=["text", "other"])
    with pytest.raises(DataError, match=r"pairs\.csv: the tokenizer marks the second text with"):
        _ = run.examples
