"""Sequence classification: one or two text columns, one label column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn import functional

from rolora.data import tables
from rolora.data.examples import Batch, Examples, flatten, offsets_of
from rolora.errors import DataError, nearest, one_line
from rolora.model.base import Base
from rolora.tasks.registry import Task

ROWS_AT_ONCE = 1000  # through the tokenizer


def classification(
    base: Base, labels: Sequence[str], text: Sequence[str], label: str, max_length: int
) -> Task:
    """The task of telling ``labels`` apart in column(s) ``text``.

    Metrics: accuracy, macro_f1, matthews (scikit-learn) and loss (mean cross-entropy, nats).
    """
    index = {value: position for position, value in enumerate(labels)}

    def encode(table: Any, source: str) -> Examples:
        tables.require_columns(table, [*text, label], source)
        targets = []
        for row, value in enumerate(tables.labels(table, label, source), start=1):
            if value not in index:
                known = nearest(value, labels)
                raise DataError(
                    f"{source}, row {row}: label {value!r} does not occur in the training data; "
                    f"{known}"
                )
            targets.append(index[value])
        return read(table, torch.tensor(targets), source)

    def read(table: Any, targets: Tensor, source: str) -> Examples:
        columns = [tables.texts(table, column, source) for column in text]
        limit = base.limit(max_length).tokens
        return tokenised(base.tokenizer, columns, targets, limit, source)

    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        each = functional.cross_entropy(logits(model, batch), batch.targets, reduction="none")
        return each, torch.ones_like(each)

    def outputs(model: Any, batch: Batch) -> Tensor:
        return logits(model, batch).float()

    def predict(table: Any, source: str, run: Any, _: int) -> list[dict[str, Any]]:
        examples = read(table, torch.zeros(table.num_rows, dtype=torch.int64), source)
        names = list(map(str, labels))
        return [
            {
                "label": names[max(range(len(row)), key=row.__getitem__)],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for row in run(examples).softmax(dim=1).tolist()
        ]

    return Task(
        encode=encode,
        encode_test=encode,
        loss=loss,
        outputs=outputs,
        score=score,
        predict=predict,
    )


def tokenised(
    tokenizer: Any, columns: Sequence[Sequence[str]], targets: Tensor, limit: int, source: str
) -> Examples:
    """The rows of one or two columns of texts, at most ``limit`` tokens each.

    Some at a time: what a tokenizer returns is a hundred times as large as the tokens. DataError
    for a text that it refuses.
    """
    tokens, types, lengths, truncated = [], [], [torch.zeros(1, dtype=torch.int64)], 0
    for start in range(0, len(targets), ROWS_AT_ONCE):
        some = [column[start : start + ROWS_AT_ONCE] for column in columns]
        try:
            encoded = tokenizer(*some, truncation=True, max_length=limit)
        except Exception as error:  # tokenizers raises nothing more special
            rows = f"rows {start + 1} to {start + len(some[0])}"
            raise DataError(
                f"{source}, {rows}: the model's tokenizer refuses a text: {one_line(error)}"
            ) from error
        tokens.append(flatten(encoded["input_ids"], torch.int32))
        lengths.append(offsets_of(encoded["input_ids"]).diff())
        if len(columns) > 1 and "token_type_ids" in encoded:
            types.append(flatten(encoded["token_type_ids"], torch.uint8))
        truncated += _longer(tokenizer, some, encoded["input_ids"], limit)
    return Examples(
        tokens=torch.cat(tokens),
        offsets=torch.cat(lengths).cumsum(0),
        targets=targets,
        types=torch.cat(types) if types else None,
        truncated=truncated,
    )


def _longer(
    tokenizer: Any, columns: Sequence[Sequence[str]], cut: Sequence[Sequence[int]], limit: int
) -> int:
    """How many of these rows have more than ``limit`` tokens; ``cut`` are their tokens, truncated.

    A tokenizer written in Python does not say which rows it truncated.
    """
    full = [row for row, ids in enumerate(cut) if len(ids) >= limit]
    if not full:
        return 0
    whole = tokenizer(*([column[row] for row in full] for column in columns), verbose=False)
    return sum(len(ids) > limit for ids in whole["input_ids"])


def logits(model: Any, batch: Batch) -> Tensor:
    """(rows, labels). A decoder's last real token is found by our own lengths.

    transformers looks for the last token that is not padding, which is wrong where the padding
    token also ends a text.
    """
    if hasattr(model, "score"):
        hidden = model.base_model(**batch.inputs).last_hidden_state
        rows = torch.arange(len(batch.lengths), device=hidden.device)
        result: Tensor = model.score(hidden[rows, batch.lengths - 1])
    else:
        result = model(**batch.inputs).logits
    return result.float() if result.dtype in (torch.bfloat16, torch.float16) else result


def score(outputs: Tensor, examples: Examples) -> dict[str, float]:
    """Metrics of (rows, labels) logits against the examples' labels."""
    truth, guess = examples.targets.numpy(), outputs.argmax(dim=1).numpy()
    loss = float(functional.cross_entropy(outputs, examples.targets))
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "matthews": _matthews(truth, guess),
        "loss": loss if math.isfinite(loss) else math.inf,
    }


def _matthews(truth: Any, guess: Any) -> float:
    # scikit-learn warns where truth or guess has one class only; the coefficient is 0 there
    constant = (truth == truth[0]).all() or (guess == guess[0]).all()
    return 0.0 if constant else float(matthews_corrcoef(truth, guess))
