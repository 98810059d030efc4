"""The commented configuration that ``rolora init`` writes for a user's rows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rolora.data import tables
from rolora.data.columns import Guess, describe, guess_columns
from rolora.data.readers import guess_form
from rolora.data.text_form import TextForm
from rolora.errors import ConfigError, printable
from rolora.files import write_file
from rolora.tasks.registry import TASKS, task_kind

# by the model's head: a small model, max_length, and a learning rate to begin with
_START = {
    "texts": ("sentence-transformers/all-MiniLM-L6-v2", 128, "5e-3"),
    "causal_lm": ("HuggingFaceTB/SmolLM2-135M-Instruct", 512, "2e-3"),
}

_BY_LABEL = """\
scheme = "dirichlet"              # iid | dirichlet | by_label | by_field
clients = 10
alpha = 0.5                       # the smaller, the more uneven"""
_PREFERENCE = """
[preference]
loss = "{}"                      # dpo or ipo: chosen and rejected; kto: completion and label
beta = 0.1                        # the larger, the closer it stays to the model before training
"""
_EVENLY = """\
scheme = "iid"                    # or by_field with field = "a column"
clients = 10"""


def write_template(
    source: str,
    out: Path,
    model: str = "",
    delimiter: str | None = None,
    encoding: str | None = None,
) -> list[str]:
    """Look at the rows of ``source`` (a file or a pattern of files) and write a config to ``out``.

    ``delimiter`` and ``encoding`` of text files are found where they are left out. Returns what a
    user should know of the guess, a line each. Raises ConfigError if ``out`` exists or an argument
    is wrong, DataError if no task fits the columns.
    """
    if out.exists():
        raise ConfigError(f"{out} exists and is not overwritten: name another file with --out")
    if not out.parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist")
    root = Path()
    files = list(tables.files_of(source, root=root)) if tables.is_glob(source, root=root) else []
    found = guess_form(Path(files[0] if files else source))
    form = TextForm(delimiter or found.delimiter, encoding or found.encoding)
    owners: list[str] = []
    if files and not all(_SHARD.search(name) for name in files):
        table, owners = tables.read_clients(source, root=root, form=form)
    else:
        table = tables.read_table(source, root=root, form=form)
    if files or Path(source).exists():
        source = os.path.relpath(source, out.parent)
    if model and Path(model).exists():
        model = os.path.relpath(model, out.parent)
    guess = guess_columns(table)
    notes = _notes(table, guess, form)
    write_file(out, _template(source, table, guess, form, len(set(owners)), model, out, notes))
    return notes


# the usual names of the parts of one set of rows
_SHARD = re.compile(r"-\d{3,}-of-\d{3,}\.")


def _notes(table: Any, guess: Guess, form: TextForm) -> list[str]:
    chosen = guess[1]
    notes = [f"found {key} = {_toml(value)}" for key, value in _stated(form).items()]
    used = {n for names in chosen.values() for n in ([names] if isinstance(names, str) else names)}
    unused = [printable(name) for name in table.column_names if name not in used]
    if unused:
        notes.append(f"columns that are not used: {', '.join(unused)}")
    if _joined(table, guess):
        notes.append(
            "separator stands between the two columns of the prompt and before the completion"
            if isinstance(chosen["prompt"], list)
            else "nothing stands between prompt and completion: set separator if the texts need a "
            "space or a line break there"
        )
    return notes


def _joined(table: Any, guess: Guess) -> bool:
    """Whether completions stand behind prompts that are texts."""
    task, asked = guess[0], guess[1].get("prompt")
    chats = [column.name for column in describe(table) if column.kind == "messages"]
    return task in ("causal_lm", "preference") and asked is not None and asked not in chats


def _stated(form: TextForm) -> dict[str, str]:
    """The keys of [data] that say how text is written, where it is not the usual way."""
    keys = {"delimiter": form.delimiter, "encoding": form.encoding}
    return {key: value for key, value in keys.items() if value not in (None, "utf-8")}


def _template(
    source: str,
    table: Any,
    guess: Guess,
    form: TextForm,
    clients: int,
    model: str,
    out: Path,
    notes: Sequence[str],
) -> str:
    """The text of the config. ``clients``: the number of per-client files, or 0."""
    task, chosen = guess
    kind = task_kind(task)
    small, length, rate = _START["causal_lm" if kind.head == "causal_lm" else "texts"]
    seen = "\n".join(
        f"#   {printable(c.name)}: {c.kind}, {c.distinct} distinct, for example "
        f"{_toml(printable(c.example[:40]))}"
        for c in describe(table)
    )
    seen += "".join(f"\n# {note}" for note in notes)
    columns = "\n".join(f"{key} = {_toml(column)}" for key, column in chosen.items())
    more = ""
    if task == "preference":
        more = _PREFERENCE.format("kto" if "completion" in chosen else "dpo")
    if _joined(table, guess):
        off = "" if isinstance(chosen["prompt"], list) else "# "
        columns += f'\n{off}separator = "\\n"                # between the parts of each row'
    written = "".join(f"\n{key} = {_toml(value)}" for key, value in _stated(form).items())
    if clients:
        split = f'scheme = "files"                  # {clients} files, one client each'
    elif kind.head == "classification":
        split = _BY_LABEL
    else:
        split = _EVENLY
    return f"""\
# A federated LoRA run. Any key can be overridden: rolora run {printable(out.name)} train.lr=1e-3
name = {_toml(_name(source, out))}
seed = 0
device = "cpu"                    # cpu | cuda | mps

[model]
path = {_toml(model or small)}    # a folder, hub:NAME, or a .gguf file
task = {_toml(task)}        # {" | ".join(TASKS.names())}
dtype = "auto"                    # fp32 | bf16 | auto

[lora]
rank = 4
alpha = 8
# target_modules = ["query", "value"]   # left out: PEFT's default for the architecture

[data]                            # columns found:
{seen}
train = {_toml(source)}{written}
test = 0.2                        # a share of the rows, or another file
# validation = 0.1                # for the best round and early stopping
{columns}
max_length = {length}                  # tokens; longer rows are truncated
{more}
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


def _name(source: str, out: Path) -> str:
    """A name for the run that any file system takes."""
    stem = out.stem if out.stem != "rolora" else Path(source).name.partition(".")[0]
    return re.sub(r"[^\w.-]+", "-", stem.replace("*", "all")).strip(".-") or "run"


def _toml(value: str | list[str]) -> str:
    # a JSON string or list of strings is also TOML, but for control characters that JSON leaves
    return "".join(
        letter if letter.isprintable() else f"\\U{ord(letter):08x}"
        for letter in json.dumps(value, ensure_ascii=False)
    )
