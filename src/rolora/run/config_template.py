"""``rolora init``: a commented configuration for the user's own rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rolora.data import tables
from rolora.data.columns import Column, Guess, describe, guess_columns
from rolora.errors import ConfigError
from rolora.files import write_file

_MODELS = {
    "classification": "sentence-transformers/all-MiniLM-L6-v2",
    "causal_lm": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "choice": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def write_starter(source: str, out: Path, model: str = "") -> None:
    """Look at the rows of ``source`` (a file or a pattern of files) and write a config to ``out``.

    Raises ConfigError if ``out`` exists, DataError if no task fits the columns.
    """
    if out.exists():
        raise ConfigError(f"{out} exists and is never overwritten: name another file with --out")
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
    write_file(out, starter(place, guess_columns(table), describe(table), clients, model, out))


def starter(
    source: str, guess: Guess, columns: list[Column], clients: int, model: str, out: Path
) -> str:
    """The text of the config. ``clients``: how many per-client files there are, 0 for one file."""
    if model and Path(model).exists():
        model = os.path.relpath(model, out.parent)
    seen = "\n".join(f"#   {c.name}: {c.kind}, {c.distinct} distinct, {_cut(c)}" for c in columns)
    length = 128 if guess.task == "classification" else 512
    rate = "5e-3" if guess.task == "classification" else "2e-3"
    return f"""\
# A federated LoRA run. Any key can be overridden: rolora run {out.name} train.lr=1e-3
name = {_toml(out.stem if out.stem != "rolora" else Path(source).stem.replace("*", "all"))}
seed = 0
device = "cpu"                    # cpu | cuda | mps

[model]
path = {_toml(model or _MODELS[guess.task])}    # a folder, a hub name, or a .gguf file
task = {_toml(guess.task)}        # classification | causal_lm | choice
dtype = "auto"                    # fp32 | bf16 | auto

[lora]
rank = 4
alpha = 8
# target_modules = ["query", "value"]   # left out: PEFT's default for the architecture

[data]                            # the columns that were found:
{seen}
train = {_toml(source)}
test = 0.2                        # a share of the rows, or another file
# validation = 0.1                # for the best round and early stopping
{_columns(guess)}
max_length = {length}                  # tokens; longer rows are truncated and counted

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
lr = {rate}                         # try a few: the best rate differs by method and data

[eval]
every = 5
"""


def _columns(guess: Guess) -> str:
    lines = []
    for key in ("text", "label", "prompt", "completion", "messages", "choices", "answer"):
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
    # a JSON string or list of strings is the same in TOML
    return json.dumps(value, ensure_ascii=False)


def _cut(column: Column) -> str:
    return "for example " + json.dumps(column.example[:40], ensure_ascii=False)
