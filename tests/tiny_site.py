"""A small, complete place to run in: a tiny model, rows in files, and a configuration."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tiny import tiny_bert

KINDS = {
    "good": "a good film with a warm heart",
    "bad": "a bad film with a thin plot",
    "cat": "the cat sat on the mat",
}


def write_rows(path: Path, count: int, labels: list[str] | None = None) -> Path:
    """A CSV of ``count`` rows whose labels take turns."""
    chosen = labels or list(KINDS)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(count):
            label = chosen[row % len(chosen)]
            writer.writerow([f"{KINDS[label]} {'and ' * (row % 4)}dog", label])
    return path


def make_site(folder: Path) -> Path:
    """``model/``, ``train.csv``, ``test.csv`` and ``run.toml`` in ``folder``; the config."""
    tiny_bert(folder / "model")
    write_rows(folder / "train.csv", 60)
    write_rows(folder / "test.csv", 12)
    config = folder / "run.toml"
    config.write_text(
        """\
name = "tiny"
[model]
path = "model"
[lora]
rank = 2
alpha = 4
target_modules = ["query", "value"]
[data]
train = "train.csv"
test = "test.csv"
max_length = 32
[partition]
scheme = "dirichlet"
clients = 5
min_examples = 2
[train]
rounds = 4
local_steps = 2
batch_size = 4
participation = 0.6
[eval]
every = 2
"""
    )
    return config


def values(folder: Path) -> dict[str, Any]:
    """The same configuration as nested dicts."""
    import tomllib

    return tomllib.loads((folder / "run.toml").read_text())
