"""What a finished run, or its adapter folder, predicts for rows; and predictions as text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rolora.errors import ConfigError
from rolora.files import finite
from rolora.results.runs import flatten
from rolora.run.evaluation import load_trained
from rolora.training.local import outputs


def predict(
    path: str | Path,
    source: str,
    model: str | None = None,
    overrides: Sequence[str] = (),
    max_new_tokens: int = 128,
    notify: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """What a finished run, or its adapter folder, predicts for each row of ``source``, in order.

    The rows need the columns that a prediction is made from, not the labels or expected answers. A
    classification gives "label" and "probabilities" (label -> share), a choice "answer" (from 0)
    and "choice", a preference "chosen_reward", "rejected_reward" and their difference "margin", or
    "reward" for a single completion, a language model "completion", of at most ``max_new_tokens``
    tokens, taken greedily; for a chat, the answer to its last turn, in place of one that it ends
    with.
    ``model`` and ``overrides`` are those of ``evaluate_adapter``, which also says what it raises.
    ``notify`` is told in which dtype the base computes.
    """
    experiment, adapter, read = load_trained(path, {source: source}, model, overrides, notify)
    task, base = experiment.task, experiment.base
    if task.predict is None:
        raise ConfigError(f"task {experiment.kind.name!r} makes no predictions")
    with base.holding(adapter):
        return task.predict(read[source], source, partial(outputs, base, task), max_new_tokens)


def writer(file: Path | None) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    """What turns predictions into the text of this file: .csv or .jsonl (None: JSON lines).

    In a CSV a table's entries have columns such as probabilities.LABEL, and a list is JSON.
    Raises ConfigError for another suffix.
    """
    suffix = ".jsonl" if file is None else file.suffix.lower()
    if suffix not in _WRITERS:
        raise ConfigError(f"{file}: predictions are written as {' or '.join(_WRITERS)}")
    return _WRITERS[suffix]


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finite(rows))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    flat = [dict(flatten(row)) for row in rows]
    text = io.StringIO()
    found = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    found.writeheader()
    for row in flat:
        found.writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value)
    return f"{value:.7g}" if isinstance(value, float) else value  # the digits of a float32


_WRITERS = {".csv": _csv, ".jsonl": _jsonl}
