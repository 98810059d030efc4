"""The commented configuration that ``rolora init`` writes for a user's rows."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

from rolora.data import tables
from rolora.data.columns import Column, Guess, describe, guess_columns
from rolora.errors import ConfigError
from rolora.files import write_file
from rolora.tasks.registry import TASKS, TaskKind, task_kind

# by the model's head: a small model, max_length, and a learning rate to begin with
_START = {
    "classification": ("sentence-transformers/all-MiniLM-L6-v2", 128, "5e-3"),
    "causal_lm": ("HuggingFaceTB/SmolLM2-135M-Instruct", 512, "2e-3"),
}


def write_template(source: str, out: Path, model: str = "") -> None:
    """Look at the rows of ``source`` (a file or a pattern of files) and write a config to ``out``.

    Raises ConfigError if ``out`` exists, DataError if no task fits the columns.
    """
    if out.exists():
        raise ConfigError(f"{out} exists and is not overwritten: name another file with --out")
    if not out.parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist")
    here = Path()
    pattern = tables.is_glob(source, root=here)
    if pattern:
        each = tables.read_clients(source, root=here)
        table, clients = next(iter(each.values())), len(each)
    else:
        table, clients = tables.read_table(source, root=here), 0
    local = pattern or Path(source).exists()
    place = os.path.relpath(source, out.parent) if local else source
    write_file(out, template(place, guess_columns(table), describe(table), clients, model, out))


def template(
    source: str, guess: Guess, columns: list[Column], clients: int, model: str, out: Path
) -> str:
    """The text of the config. ``clients``: the number of per-client files, 0 for one file."""
    kind = task_kind(guess.task)
    small, length, rate = _START[kind.head]
    if model and Path(model).exists():
        model = os.path.relpath(model, out.parent)
    seen = "\n".join(f"#   {c.name}: {c.kind}, {c.distinct} distinct, {_cut(c)}" for c in columns)
    return f"""\
# A federated LoRA run. Any key can be overridden: rolora run {out.name} train.lr=1e-3
name = {_toml(out.stem if out.stem != "rolora" else Path(source).stem.replace("*", "all"))}
seed = 0
device = "cpu"                    # cpu | cuda | mps

[model]
path = {_toml(model or small)}    # a folder, a hub name, or a .gguf file
task = {_toml(guess.task)}        # {" | ".join(TASKS.names())}
dtype = "auto"                    # fp32 | bf16 | auto

[lora]
rank = 4
alpha = 8
# target_modules = ["query", "value"]   # left out: PEFT's default for the architecture

[data]                            # columns found:
{seen}
train = {_toml(source)}
test = 0.2                        # a share of the rows, or another file
# validation = 0.1                # for the best round and early stopping
{_columns(guess, kind)}
max_length = {length}                  # tokens; longer rows are truncated

[partition]
{_partition(guess, clients)}

[method]
name = "rolora"                   # see: rolora methods

[train]
rounds = 40
participation = 1.0               # share of the clients in each round
local_steps = 5                   # or local_epochs
batch_size = 8
optimizer = "adamw"
lr = {rate}                         # try several: the best rate depends on method and data

[eval]
every = 5
"""


def _columns(guess: Guess, kind: TaskKind) -> str:
    lines = []
    for key in itertools.chain(*kind.columns):
        value = getattr(guess, key)
        if value is not None:
            chosen = value[0] if isinstance(value, tuple) and len(value) == 1 else value
            lines.append(f"{key} = {_toml(chosen)}")
    return "\n".join(lines)


def _partition(guess: Guess, clients: int) -> str:
    if clients:
        return f'scheme = "files"                  # {clients} files, one client each'
    if guess.label is None:
        return (
            'scheme = "iid"                    # or by_field with field = "a column"\nclients = 10'
        )
    return (
        'scheme = "dirichlet"              # iid | dirichlet | by_label | by_field\n'
        "clients = 10\nalpha = 0.5                       # the smaller, the more uneven"
    )


def _toml(value: str | tuple[str, ...]) -> str:
    # a JSON string or list of strings is also TOML
    return json.dumps(value, ensure_ascii=False)


def _cut(column: Column) -> str:
    return "for example " + json.dumps(column.example[:40], ensure_ascii=False)
