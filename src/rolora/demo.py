"""``rolora demo``: a real model, real texts, three methods side by side, a page and an adapter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora import demo_data
from rolora.base import Base
from rolora.config import RunConfig, load_config
from rolora.durable import write_file
from rolora.runs import Run, compare
from rolora.tasks.generation import generate

METHODS = ("rolora", "ffa_lora", "fedit")
SEEDS = (0, 1)

# The rates were searched on seeds 100 and 101, the demo runs seeds 0 and 1: docs/demo.md.
QUESTIONS = """\
# Twenty clients learn which kind of answer a question asks for (TREC questions, six kinds).
name = "questions"
[model]
path = "models/minilm"
task = "classification"
[lora]
rank = 4
alpha = 8
target_modules = ["query", "value"]
[data]
train = "data/questions-train.csv"
test = "data/questions-test.csv"
text = "text"
label = "label"
max_length = 64
[partition]
scheme = "dirichlet"
clients = 20
alpha = 0.5
[train]
rounds = 40
local_steps = 3
batch_size = 4
lr = 1e-2
[eval]
every = 5
"""


@dataclass(frozen=True)
class Demo:
    """A configuration whose model and data are at hand, and where its runs go."""

    config: RunConfig
    file: Path
    out: Path

    def runs(self) -> Iterator[Run]:
        """One run per method and seed; iterate each one's ``rounds()``."""
        return compare(self.config, METHODS, SEEDS, self.out, RATES)


RATES: Mapping[str, Sequence[str]] = {}


def classification_demo(folder: Path) -> Demo:
    """Fetch MiniLM and the TREC questions into ``folder`` and write ``questions.toml`` there."""
    demo_data.minilm(folder)
    demo_data.questions(folder)
    return _demo(folder, "questions", QUESTIONS)


def _demo(folder: Path, name: str, text: str) -> Demo:
    file = folder / f"{name}.toml"
    write_file(file, text)
    numbers = itertools.count(1)
    out = next(p for n in numbers if not (p := folder / "runs" / f"{name}-{n}").exists())
    return Demo(load_config(file), file, out)
