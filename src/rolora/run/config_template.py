"""The commented configuration that ``rolora init`` writes for a user's rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rolora.data import tables
from rolora.data.columns import describe, guess_columns
from rolora.errors import ConfigError
from rolora.files import write_file
from rolora.tasks.registry import TASKS, task_kind

# by the model's head: a small model, max_length, and a learning rate to begin with
_START = {
    "classification": ("sentence-transformers/all-MiniLM-L6-v2", 128, "5e-3"),
    "causal_lm": ("HuggingFaceTB/SmolLM2-135M-Instruct", 512, "2e-3"),
}

_BY_LABEL = """\
scheme = "dirichlet"              # iid | dirichlet | by_label | by_field
clients = 10
alpha = 0.5                       # the smaller, the more uneven"""
_EVENLY = """\
scheme = "iid"                    # or by_field with field = "a column"
clients = 10"""


def write_template(source: str, out: Path, model: str = "") -> None:
    """Look at the rows of ``source`` (a file or a pattern of files) and write a config to ``out``.

    Raises ConfigError if ``out`` exists, DataError if no task fits the columns.
    """
    if out.exists():
        raise ConfigError(f"{out} exists and is not overwritten: name another file with --out")
    if not out.parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist")
    here = Path()
    clients = 0
    if tables.is_glob(source, root=here):
        each = tables.read_clients(source, root=here)
        table, clients = next(iter(each.values())), len(each)
    else:
        table = tables.read_table(source, root=here)
    if clients or Path(source).exists():
        source = os.path.relpath(source, out.parent)
    if model and Path(model).exists():
        model = os.path.relpath(model, out.parent)
    write_file(out, _template(source, table, clients, model, out))


def _template(source: str, table: Any, clients: int, model: str, out: Path) -> str:
    """The text of the config. ``clients``: the number of per-client files, 0 for one file."""
    task, chosen = guess_columns(table)
    kind = task_kind(task)
    small, length, rate = _START[kind.head]
    seen = "\n".join(
        f"#   {c.name}: {c.kind}, {c.distinct} distinct, for example {_toml(c.example[:40])}"
        for c in describe(table)
    )
    columns = "\n".join(f"{key} = {_toml(column)}" for key, column in chosen.items())
    if clients:
        split = f'scheme = "files"                  # {clients} files, one client each'
    elif kind.labelled:
        split = _BY_LABEL
    else:
        split = _EVENLY
    return f"""\
# A federated LoRA run. Any key can be overridden: rolora run {out.name} train.lr=1e-3
name = {_toml(out.stem if out.stem != "rolora" else Path(source).stem.replace("*", "all"))}
seed = 0
device = "cpu"                    # cpu | cuda | mps

[model]
path = {_toml(model or small)}    # a folder, a hub name, or a .gguf file
task = {_toml(task)}        # {" | ".join(TASKS.names())}
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
{columns}
max_length = {length}                  # tokens; longer rows are truncated

[partition]
{split}

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


def _toml(value: str | list[str]) -> str:
    # a JSON string or list of strings is also TOML
    return json.dumps(value, ensure_ascii=False)
