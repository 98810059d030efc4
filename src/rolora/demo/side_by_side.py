"""``rolora demo``: three methods side by side on a real model and real texts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rolora.comparison.grid import Comparison, plan
from rolora.config.load import load_config
from rolora.demo.fetch import fetch
from rolora.demo.sources import SOURCES
from rolora.files import write_file

METHODS = ("rolora", "ffa_lora", "fedit")

# Tuned on other seeds than the demo runs; docs/demo.md describes the search.
QUESTIONS = """\
# Twenty clients learn to classify questions by the kind of their answer (TREC, six classes).
[model]
path = "minilm"
task = "classification"
[lora]
rank = 4
alpha = 8
target_modules = ["query", "value"]
layers = "top:2"
[data]
train = "trec/train.csv"
test = "trec/test.csv"
text = "text"
label = "label"
max_length = 64
[partition]
scheme = "dirichlet"
clients = 20
alpha = 0.5
[train]
rounds = 30
local_steps = 3
batch_size = 4
lr = 4e-2
keep_moments = true
[eval]
every = 5
"""

PROMPTS = """\
# Ten clients teach a small chat model to name the kind of a question's answer.
[model]
path = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
task = "causal_lm"
[lora]
rank = 4
alpha = 8
layers = "top:10"
[data]
train = "trec-prompts/train.csv"
test = "trec-prompts/test.csv"
prompt = "prompt"
completion = "completion"
label = "label"
max_length = 64
[partition]
scheme = "dirichlet"
clients = 10
alpha = 0.5
[train]
rounds = 10
local_steps = 2
batch_size = 4
lr = 2e-2
[eval]
every = 5
generate = 100
"""

# Tuned likewise. LoRA is in few layers, so that most of the model runs only once for each row.
PREFERENCES = """\
# Ten clients teach a small chat model to prefer the right kind of a question's answer to another.
[model]
path = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
task = "preference"
[lora]
rank = 4
alpha = 8
layers = "top:4"
[data]
train = "trec-preferences/train.jsonl"
test = "trec-preferences/test.jsonl"
prompt = "prompt"
chosen = "chosen"
rejected = "rejected"
label = "label"
max_length = 64
[partition]
scheme = "dirichlet"
clients = 10
alpha = 0.5
[train]
rounds = 10
local_steps = 2
batch_size = 4
lr = 4e-2
[eval]
every = 5
"""


MEANING = """\
All methods use the same rows, partition, cohorts and batches. "mean ± sd" is over the seeds, on
test rows that no client has. "MB up" is what the clients sent: rolora and ffa_lora send one factor
of the adapter per round, fedit sends both, so equal rounds and equal megabytes are different
comparisons. "agg. error" is the distance between the averaged product B·A and the average of the
clients' products: rounding for rolora and ffa_lora, real for fedit. The report has the details; the
adapter is a PEFT folder.
"""

MARGIN = (
    "every row is run once through the model before training, and only what changes since counts: "
    "margin is how much more likely the chosen answers have become than the rejected ones (as a "
    "logarithm, times preference.beta), accuracy the share of test rows where it is above 0"
)

Task = Literal["classification", "chat", "preference"]


@dataclass(frozen=True)
class _Setting:
    """A demonstration: what it fetches, the name and text of its configuration, its seeds, and what
    else to say beforehand."""

    model: str
    rows: str
    name: str
    config: str
    seeds: tuple[int, ...]
    note: str = ""


_SETTINGS: Mapping[Task, _Setting] = {
    "classification": _Setting("minilm", "trec", "questions", QUESTIONS, (0, 1, 2)),
    "chat": _Setting("smollm2", "trec-prompts", "prompts", PROMPTS, (0, 1)),
    "preference": _Setting(
        "smollm2", "trec-preferences", "preferences", PREFERENCES, (0, 1), MARGIN
    ),
}


@dataclass(frozen=True)
class Demo:
    """A configuration file whose model and data are on disk, and the folder for its runs.

    ``notes``: where its rows are, what they are, and what is measured on them.
    """

    file: Path
    out: Path
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def comparison(self) -> Comparison:
        """The methods and seeds to run."""
        return plan(load_config(self.file), dict.fromkeys(METHODS, ()), self.seeds)

    @property
    def command(self) -> tuple[str, ...]:
        """The command that continues these runs."""
        seeds = ",".join(map(str, self.seeds))
        given = ("--methods", ",".join(METHODS), "--seeds", seeds, "--out", str(self.out))
        return ("rolora", "compare", str(self.file), *given)


def prepare_demo(folder: Path, task: Task = "classification") -> Demo:
    """Fetch the demo's model and rows into ``folder`` and write its configuration there.

    MiniLM and the TREC questions; for chat and preference SmolLM2, and the questions as prompts or
    as pairs of answers.
    """
    setting = _SETTINGS[task]
    fetch(setting.model, folder)
    rows = f"the rows are in {fetch(setting.rows, folder)}: {SOURCES[setting.rows].what}"
    file = folder / f"{setting.name}.toml"
    write_file(file, setting.config)
    folders = (folder / "runs" / f"{setting.name}-{number}" for number in itertools.count(1))
    out = next(path for path in folders if not path.exists())
    return Demo(file, out, setting.seeds, tuple(note for note in (rows, setting.note) if note))
