"""``rolora demo``: a real model, real texts, three methods side by side, a page and an adapter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rolora.comparison.queue import compare
from rolora.config.load import load_config
from rolora.config.schema import RunConfig
from rolora.demo.fetch import fetch
from rolora.files import write_file
from rolora.model.base import Base
from rolora.model.peft import read_adapter
from rolora.run.runs import Run
from rolora.tasks.generation import generate

METHODS = ("rolora", "ffa_lora", "fedit")

# The settings were searched on other seeds than the demo runs: docs/demo.md has the search.
QUESTIONS = """\
# Twenty clients learn which kind of answer a question asks for (TREC questions, six kinds).
[model]
path = "minilm"
task = "classification"
[lora]
rank = 4
alpha = 8
target_modules = ["query", "value"]
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
lr = 2e-2
[eval]
every = 5
"""

PROMPTS = """\
# Ten clients teach a small chat model to answer with the kind of a question's answer.
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


MEANING = """\
Every method saw the same rows, split, cohorts and batches. "mean ± sd" is over the seeds, on test
rows that no client holds. "MB up" is what the clients sent: rolora and ffa_lora send one factor of
the adapter in a round, fedit both, so equal rounds and equal megabytes are two comparisons. "agg.
error" is how far the averaged product B·A is from the average of the clients' products: rounding
for rolora and ffa_lora, real for fedit. The report shows all of it; the adapter is a PEFT folder.
"""


@dataclass(frozen=True)
class Demo:
    """A configuration whose model and data are at hand, and where its runs go.

    ``only`` holds the overrides of single methods (their own tuned rates).
    """

    config: RunConfig
    file: Path
    out: Path
    seeds: tuple[int, ...]
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def runs(self) -> Iterator[Run]:
        """One run per method and seed; iterate each one's ``rounds()``."""
        return compare(self.config, METHODS, self.seeds, self.out, self.only)


def classification_demo(folder: Path) -> Demo:
    """Fetch MiniLM and the TREC questions into ``folder`` and write ``questions.toml`` there."""
    fetch("minilm", folder)
    fetch("trec", folder)
    return _demo(folder, "questions", QUESTIONS, (0, 1, 2))


def language_demo(folder: Path) -> Demo:
    """Fetch SmolLM2 and the questions as prompts into ``folder`` and write ``prompts.toml``."""
    fetch("smollm2", folder)
    fetch("trec-prompts", folder)
    return _demo(folder, "prompts", PROMPTS, (0, 1))


def _demo(folder: Path, name: str, text: str, seeds: tuple[int, ...]) -> Demo:
    file = folder / f"{name}.toml"
    write_file(file, text)
    folders = (folder / "runs" / f"{name}-{number}" for number in itertools.count(1))
    out = next(path for path in folders if not path.exists())
    return Demo(load_config(file), file, out, seeds)


def before_and_after(run: Run, rows: int = 4) -> list[tuple[str, str, str]]:
    """(prompt, what the plain base writes, what the run's adapter writes) for test prompts."""
    base: Base = run.experiment.base
    prompts = run.experiment.rows.test["prompt"].slice(0, rows).to_pylist()
    tokens = [base.tokenizer(prompt)["input_ids"] for prompt in prompts]
    plain = generate(base, tokens, max_new_tokens=12)
    with base.holding(read_adapter(run.folder.adapter, base.specs, any_rank=True)):
        tuned = generate(base, tokens, max_new_tokens=12)
    return list(zip(prompts, plain, tuned, strict=True))
