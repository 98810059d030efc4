"""Predictions for whole texts: a class, any number of classes, or a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import scipy.stats
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn import functional

from rolora.data import tables
from rolora.data.examples import Batch, Examples, flatten, moved, offsets_of
from rolora.errors import ConfigError, DataError, nearest, one_line
from rolora.model.base import Base
from rolora.tasks.registry import Task

ROWS_AT_ONCE = 1000  # through the tokenizer


def classification(
    base: Base,
    labels: Sequence[str],
    text: str | Sequence[str],
    label: str,
    max_length: int,
    positive: str | None = None,
) -> Task:
    """The task of telling ``labels`` apart in column(s) ``text``.

    Metrics: accuracy, macro_f1, matthews (scikit-learn) and loss (mean cross-entropy, nats); with
    ``positive``, one of the labels, also f1, which is that label's. ConfigError for another.
    """
    if positive is not None and positive not in labels:
        raise ConfigError(f"data.positive {positive!r} is not a label: {nearest(positive, labels)}")

    def targets(table: Any, source: str) -> Tensor:
        rows = [[name] for name in tables.labels(table, label, source)]
        return torch.tensor(_places(rows, labels, source), dtype=torch.int64).flatten()

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits, targets, reduction="none")

    def predictions(logits: Tensor) -> list[dict[str, Any]]:
        return [
            {"label": max(row, key=row.__getitem__), "probabilities": row}
            for row in _named(logits.softmax(dim=1), labels)
        ]

    def score(outputs: Tensor, examples: Examples) -> dict[str, float]:
        truth, guess = examples.targets.numpy(), outputs.argmax(dim=1).numpy()
        return {
            "accuracy": float(accuracy_score(truth, guess)),
            "macro_f1": _f1(truth, guess, "macro"),
            "matthews": _matthews(truth, guess),
            "loss": _mean(loss(outputs, examples.targets)),
            **({} if positive is None else {"f1": _f1_of(labels.index(positive), truth, guess)}),
        }

    def recall(outputs: Tensor, examples: Examples) -> dict[str, float]:
        truth = examples.targets
        found = truth[outputs.argmax(dim=1) == truth]
        return _shares(labels, *(of.bincount(minlength=len(labels)) for of in (found, truth)))

    task = _of_texts(base, text, max_length, targets, loss, score, predictions)
    return replace(task, recall=recall)


def multi_label(
    base: Base,
    labels: Sequence[str],
    text: str | Sequence[str],
    label: str | Sequence[str],
    max_length: int,
    separator: str | None = None,
) -> Task:
    """The task of telling which of ``labels`` column(s) ``text`` have, each by itself.

    For ``label`` and ``separator`` see :func:`rolora.data.tables.label_sets`. A label is predicted
    where its probability is at least 1/2. Metrics: micro_f1, macro_f1, subset_accuracy (the rows
    of which every label is right) and loss (binary cross-entropy, nats, mean over rows and labels).
    """

    def targets(table: Any, source: str) -> Tensor:
        sets = tables.label_sets(table, label, separator, source)
        found = torch.zeros(len(sets), len(labels))
        for row, places in enumerate(_places(sets, labels, source)):
            found[row, places] = 1.0
        return found

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        each = functional.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype), reduction="none"
        )
        return each.mean(dim=1)

    def predictions(logits: Tensor) -> list[dict[str, Any]]:
        return [
            {"labels": [name for name in row if row[name] >= 0.5], "probabilities": row}
            for row in _named(logits.sigmoid(), labels)
        ]

    def score(outputs: Tensor, examples: Examples) -> dict[str, float]:
        truth, guess = examples.targets.numpy() > 0, outputs.numpy() >= 0
        return {
            "micro_f1": _f1(truth, guess, "micro"),
            "macro_f1": _f1(truth, guess, "macro"),
            "subset_accuracy": float(accuracy_score(truth, guess)),
            "loss": _mean(loss(outputs, examples.targets)),
        }

    def recall(outputs: Tensor, examples: Examples) -> dict[str, float]:
        truth = examples.targets > 0
        return _shares(labels, *(of.sum(dim=0) for of in (truth & (outputs >= 0), truth)))

    task = _of_texts(base, text, max_length, targets, loss, score, predictions)
    return replace(task, recall=recall)


def regression(base: Base, text: str | Sequence[str], label: str, max_length: int) -> Task:
    """The task of predicting the number in column ``label`` from column(s) ``text``.

    Metrics: pearson and spearman (scipy; 0 where a side is constant), mean_absolute_error, and
    loss (mean squared error).
    """

    def targets(table: Any, source: str) -> Tensor:
        return torch.tensor(tables.numbers(table, label, source), dtype=torch.float32)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.squeeze(1) - targets).square()

    def predictions(logits: Tensor) -> list[dict[str, Any]]:
        return [{"value": value} for value in logits.squeeze(1).tolist()]

    def score(outputs: Tensor, examples: Examples) -> dict[str, float]:
        truth, guess = examples.targets.double(), outputs.squeeze(1).double()
        return {
            "pearson": _correlation(scipy.stats.pearsonr, truth, guess),
            "spearman": _correlation(scipy.stats.spearmanr, truth, guess),
            "mean_absolute_error": _mean((truth - guess).abs()),
            "loss": _mean(loss(outputs, examples.targets)),
        }

    return _of_texts(base, text, max_length, targets, loss, score, predictions)


def _of_texts(
    base: Base,
    text: str | Sequence[str],
    max_length: int,
    targets: Callable[[Any, str], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor, Examples], dict[str, float]],
    predictions: Callable[[Tensor], list[dict[str, Any]]],
) -> Task:
    """A task with one target for each row of one or two columns of texts.

    ``targets(table, source)`` has an entry per row, ``loss(logits, targets)`` is each row's own,
    (rows,), and ``predictions(logits)`` has a dict per row.
    """
    columns = [text] if isinstance(text, str) else text

    def read(table: Any, source: str, targets: Tensor) -> Examples:
        each = [tables.texts(table, column, source) for column in columns]
        return tokenised(base.tokenizer, each, targets, base.limit(max_length).tokens, source)

    def encode(table: Any, source: str) -> Examples:
        return read(table, source, targets(table, source))

    def losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        each = loss(logits(model, batch), batch.targets)
        return each, torch.ones_like(each)

    def outputs(model: Any, batch: Batch) -> Tensor:
        return logits(model, batch).float()

    def predict(table: Any, source: str, run: Any, _: int) -> list[dict[str, Any]]:
        unknown = torch.zeros(table.num_rows, dtype=torch.int64)
        return predictions(run(read(table, source, unknown)))

    return Task(
        encode=encode,
        encode_test=encode,
        loss=losses,
        outputs=outputs,
        score=score,
        predict=predict,
    )


def _places(rows: Sequence[Sequence[str]], labels: Sequence[str], source: str) -> list[list[int]]:
    """Where each row's classes stand among ``labels``; DataError for one that is not there."""
    index = {name: place for place, name in enumerate(labels)}
    for row, names in enumerate(rows, start=1):
        for name in names:
            if name not in index:
                raise DataError(
                    f"{source}, row {row}: label {name!r} does not occur in the training data; "
                    f"{nearest(name, labels)}"
                )
    return [[index[name] for name in names] for names in rows]


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
        result: Tensor = model.score(hidden[rows, moved(batch.lengths - 1, hidden.device)])
    else:
        result = model(**batch.inputs).logits
    return result.float() if result.dtype in (torch.bfloat16, torch.float16) else result


def _shares(labels: Sequence[str], found: Tensor, rows: Tensor) -> dict[str, float]:
    """Label -> found / rows, for labels with rows; both (labels,)."""
    each = zip(labels, found.tolist(), rows.tolist(), strict=True)
    return {label: hits / count for label, hits, count in each if count}


def _named(shares: Tensor, labels: Sequence[str]) -> list[dict[str, float]]:
    return [dict(zip(labels, row, strict=True)) for row in shares.tolist()]


def _mean(each: Tensor) -> float:
    mean = float(each.mean())
    return mean if math.isfinite(mean) else math.inf


def _f1(truth: Any, guess: Any, average: str) -> float:
    return float(f1_score(truth, guess, average=average, zero_division=0))


def _f1_of(place: int, truth: Any, guess: Any) -> float:
    return _f1(truth == place, guess == place, "binary")


def _matthews(truth: Any, guess: Any) -> float:
    # scikit-learn warns where truth or guess has one class only; the coefficient is 0 there
    constant = (truth == truth[0]).all() or (guess == guess[0]).all()
    return 0.0 if constant else float(matthews_corrcoef(truth, guess))


def _correlation(measure: Any, truth: Tensor, guess: Tensor) -> float:
    # scipy warns if a side is constant or not finite
    for side in (truth, guess):
        if not side.isfinite().all() or (side == side[0]).all():
            return 0.0
    return float(measure(truth.numpy(), guess.numpy()).statistic)
