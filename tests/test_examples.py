"""Rows as tokens: however many go through the tokenizer at once, and however batches are cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny import SENTENCES, esm_tokenizer, tiny_bert, tiny_esm, word_tokenizer
from tiny_clients import LABELS
from transformers import ByT5Tokenizer

from rolora.data.examples import Examples, collate
from rolora.model.base import load_base, tokenizer_digest
from rolora.model.peft import LoraSettings
from rolora.tasks import classification


@pytest.mark.parametrize("text", [["text"], ["text", "other"]])
def test_rows_are_the_same_tokens_however_many_go_through_the_tokenizer_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: list[str]
) -> None:
    base = load_base(
        str(tiny_bert(tmp_path / "bert")), "classification", LoraSettings(), labels=LABELS
    )
    task = classification.classification(base, LABELS, text, "label", 7)
    columns = {
        "text": [SENTENCES[i % 5][: 20 + i] for i in range(11)],
        "other": [SENTENCES[(i + 2) % 5][:i] for i in range(11)],
        "label": [LABELS[i % 3] for i in range(11)],
    }
    encoded = []
    for rows in (1000, 4):
        monkeypatch.setattr(classification, "ROWS_AT_ONCE", rows)
        encoded.append(task.encode(pa.table(columns), "rows"))
    whole, parts = encoded
    for name in ("tokens", "offsets", "targets"):
        one, other = getattr(whole, name), getattr(parts, name)
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    assert (whole.types is None) == (parts.types is None) == (len(text) == 1)
    assert whole.types is None or torch.equal(whole.types, _of(parts.types))
    assert whole.truncated == parts.truncated > 0
    assert len(parts) == 11


@pytest.mark.parametrize("pair", [False, True], ids=["one text", "two texts"])
@pytest.mark.parametrize("written_in_python", [esm_tokenizer, ByT5Tokenizer, word_tokenizer])
def test_a_tokenizer_written_in_python_serves_where_no_offsets_are_needed(
    written_in_python: Callable[[], Any], pair: bool
) -> None:
    """The oracle is the tokenizer itself, one row at a time."""
    tokenizer, limit = written_in_python(), 9
    firsts = ["MKV", "LAGVSER" * 3, "MKVLAGV", "the cat sat on the mat and looked at the dog"]
    columns = [firsts, ["GG", "K", "AAAA", "a good film"]] if pair else [firsts]
    rows = list(zip(*columns, strict=True))
    found = classification.tokenised(tokenizer, columns, torch.zeros(4).long(), limit, "rows")
    whole = [tokenizer(*row)["input_ids"] for row in rows]
    cut = [tokenizer(*row, truncation=True, max_length=limit)["input_ids"] for row in rows]
    ends = found.offsets.tolist()
    assert [found.tokens[a:b].tolist() for a, b in itertools.pairwise(ends)] == cut
    assert found.truncated == sum(len(ids) > limit for ids in whole)
    assert 0 < found.truncated < 4


def test_a_protein_model_is_fine_tuned_with_its_own_tokenizer(tmp_path: Path) -> None:
    settings = LoraSettings(target_modules=("query", "value"))
    base = load_base(str(tiny_esm(tmp_path / "esm")), "classification", settings, labels=("a", "b"))
    task = classification.classification(base, ("a", "b"), ["text"], "label", 16)
    table = pa.table({"text": ["MKVL", "GGS", "LAGV" * 9], "label": ["a", "b", "a"]})
    examples = task.encode(table, "rows")
    batch = collate(examples, torch.arange(3), base.tokenizer.pad_token_id)
    loss, _ = task.loss(base.model, batch)
    assert torch.isfinite(loss).all()
    assert examples.truncated == 1


def test_two_tokenizers_written_in_python_differ_by_class_and_words(
    tmp_path: Path,
) -> None:
    settings = LoraSettings(target_modules=("query",))
    base = load_base(str(tiny_esm(tmp_path)), "classification", settings, labels=("a", "b"))
    same, words = esm_tokenizer(), esm_tokenizer()
    words.add_tokens(["J"])
    digests = {
        name: tokenizer_digest(replace(base, tokenizer=tokenizer))
        for name, tokenizer in {"own": same, "words": words, "class": ByT5Tokenizer()}.items()
    }
    assert digests["own"] == tokenizer_digest(base)
    assert len(set(digests.values())) == 3


def _of(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def examples(lengths: list[int]) -> Examples:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    return Examples(
        tokens=torch.arange(1, total + 1, dtype=torch.int32),
        offsets=offsets,
        targets=(torch.arange(total) % 3 == 0).to(torch.uint8),
        types=(torch.arange(total) % 2).to(torch.uint8),
        prefix=torch.arange(2.0 * total).view(total, 2),
    )


@pytest.mark.parametrize(
    "lengths", [[4, 4, 4, 4], [4, 1, 4, 3], [2, 4, 1, 4]], ids=["equal", "unequal", "mixed"]
)
@pytest.mark.parametrize("chosen", [[3], [3, 0], [1, 3, 1], [2, 1, 0, 3]])
def test_a_batch_holds_each_row_s_own_tokens_and_padding_after_them(
    lengths: list[int], chosen: list[int]
) -> None:
    known = examples(lengths)
    batch = collate(known, torch.tensor(chosen), pad_id=-7)
    width = max(lengths[row] for row in chosen)
    assert batch.prefix is not None
    prefix = iter(batch.prefix.tolist())
    for place, row in enumerate(chosen):
        start, stop = known.offsets[row : row + 2].tolist()
        over = width - lengths[row]
        for name, flat, padding in (
            ("input_ids", known.tokens, -7),
            ("token_type_ids", _of(known.types), 0),
            ("attention_mask", torch.ones_like(known.tokens), 0),
        ):
            expected = flat[start:stop].tolist() + [padding] * over
            assert batch.inputs[name][place].tolist() == expected, name
            assert batch.inputs[name].dtype == torch.int64
        wanted = [0, *known.targets[start + 1 : stop].tolist(), *[0] * over]
        found = batch.targets[
            (batch.targets >= place * width) & (batch.targets < (place + 1) * width)
        ]
        assert (found - place * width).tolist() == [i for i, flag in enumerate(wanted) if flag]
        assert [next(prefix) for _ in range(start, stop)] == _of(known.prefix)[start:stop].tolist()
    assert batch.lengths.tolist() == [lengths[row] for row in chosen]
