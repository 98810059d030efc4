"""``rolora demo``: three methods side by side on a real model and real texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rolora.comparison.queue import compare
from rolora.config.load import load_config
from rolora.demo.fetch import fetch
from rolora.files import write_file
from rolora.model.peft import read_adapter
from rolora.run.runs import Run
from rolora.tasks.generation import generate

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


MEANING = """\
All methods use the same rows, partition, cohorts and batches. "mean ± sd" is over the seeds, on
test rows that no client has. "MB up" is what the clients sent: rolora and ffa_lora send one factor
of the adapter per round, fedit sends both, so equal rounds and equal megabytes are different
comparisons. "agg. error" is the distance between the averaged product B·A and the average of the
clients' products: rounding for rolora and ffa_lora, real for fedit. The report has the details; the
adapter is a PEFT folder.
"""


@dataclass(frozen=True)
class Demo:
    """A configuration file whose model and data are on disk, and the folder for its runs."""

    file: Path
    out: Path
    seeds: tuple[int, ...]

    def runs(self) -> Iterator[Run]:
        """One run per method and seed, to be advanced through ``rounds()``."""
        return compare(load_config(self.file), METHODS, self.seeds, self.out)

    @property
    def command(self) -> tuple[str, ...]:
        """The command that continues these runs."""
        seeds = ",".join(map(str, self.seeds))
        given = ("--methods", ",".join(METHODS), "--seeds", seeds, "--out", str(self.out))
        return ("rolora", "compare", str(self.file), *given)


def prepare_demo(folder: Path, *, llm: bool = False) -> Demo:
    """Fetch MiniLM and the TREC questions into ``folder`` and write ``questions.toml`` there.

    With ``llm``: SmolLM2, the questions as prompts, and ``prompts.toml``.
    """
    model, rows, name = "minilm", "trec", "questions"
    if llm:
        model, rows, name = "smollm2", "trec-prompts", "prompts"
    fetch(model, folder)
    fetch(rows, folder)
    file = folder / f"{name}.toml"
    write_file(file, PROMPTS if llm else QUESTIONS)
    folders = (folder / "runs" / f"{name}-{number}" for number in itertools.count(1))
    out = next(path for path in folders if not path.exists())
    return Demo(file, out, (0, 1) if llm else (0, 1, 2))


def before_and_after(run: Run, rows: int = 4) -> list[tuple[str, str, str]]:
    """(prompt, completion by the base, completion with the run's adapter) for test prompts."""
    base = run.experiment.base
    prompts = run.experiment.rows.test["prompt"].slice(0, rows).to_pylist()
    tokens = [base.tokenizer(prompt)["input_ids"] for prompt in prompts]
    plain = generate(base, tokens, max_new_tokens=12)
    with base.holding(read_adapter(run.folder.adapter, base.specs, any_rank=True)):
        tuned = generate(base, tokens, max_new_tokens=12)
    return list(zip(prompts, plain, tuned, strict=True))
