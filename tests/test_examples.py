"""Rows as tokens: however many go through the tokenizer at once, and however batches are cut."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tiny import SENTENCES, tiny_bert
from tiny_clients import LABELS

from rolora.data.examples import Examples, collate
from rolora.model.base import load_base
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
