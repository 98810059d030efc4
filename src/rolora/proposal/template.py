"""The commented configuration that ``rolora init`` proposes for a user's rows."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolora.config.load import make_config
from rolora.data import tables
from rolora.data.columns import is_own_value, names_client
from rolora.data.text_form import TextForm
from rolora.errors import ConfigError, printable
from rolora.files import from_home
from rolora.model.checkpoint import stored_parameters
from rolora.network import HUB
from rolora.proposal.found_rows import GLUE, Found, each, look
from rolora.proposal.trl_config import Trainer, read_trainer
from rolora.run.experiment import Experiment
from rolora.tasks.registry import TASKS, TaskKind


@dataclass(frozen=True)
class Start:
    """Settings to start with, by the model's head: minutes on two cores with the model ``small``.

    ``small`` is what ``rolora fetch NAME`` puts into data/; ``lr`` is RoLoRA's best with it, see
    docs/choosing.md, and is proposed for models of at most ``largest`` parameters. ``tokens``:
    trained on in a whole run. ``test_rows``: the most rows to hold out, since each evaluation takes
    time.
    """

    small: str
    name: str
    max_length: int
    lr: float
    largest: float
    clients: int
    local_steps: int
    batch_size: int
    tokens: int
    test_rows: int


_ENCODER = Start("data/minilm", "minilm", 128, 2e-2, 1e8, 10, 5, 8, 200_000, 500)
_SMOLLM2 = "data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DECODER = Start(_SMOLLM2, "smollm2", 512, 1e-2, 1.5e8, 4, 2, 4, 20_000, 100)
_LR = 5e-3  # for larger models, and those of unknown size
_MODELS = ("data", "models")  # folders that may already have a model
NO_LABEL = ("-1", "nan", "na", "n/a", "none", "null")  # what may stand for a label that is missing
SAYS_LITTLE = ("train", "data", "dataset", "rows", "all")  # names of files of any rows

Lines = dict[str, tuple[Any, str]]  # a key, or a comment in its place: its value, and a comment


@dataclass(frozen=True)
class Proposal:
    """The text of a configuration, what a user should know of it, a line each, and its experiment,
    whose rows have been read and split."""

    text: str
    notes: Sequence[str]
    experiment: Experiment


def propose(
    source: str,
    out: Path,
    model: str = "",
    delimiter: str | None = None,
    encoding: str | None = None,
    trainer: Path | None = None,
) -> Proposal:
    """Look at the rows of ``source``, and make a configuration for the new file ``out``.

    ``source``: a file, a folder, a pattern of files, a hub name, or a task of GLUE's ("glue/mnli").
    ``delimiter`` and ``encoding`` of text files are found where they are left out. ``trainer``: a
    YAML file of TRL's, whose settings are taken over. Writes nothing. Raises ConfigError if ``out``
    exists or an argument is wrong, DataError if no task fits the columns or the rows cannot be
    split.
    """
    if out.exists():
        raise ConfigError(f"{out} exists and is not overwritten: name another file with --out")
    if not out.parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist")
    theirs = read_trainer(trainer) if trainer else Trainer()
    split, test_split = map(theirs.text, ("dataset_train_split", "dataset_test_split"))
    found = look(source, delimiter, encoding, split=split, test_split=test_split)
    notes = [*_notes(found), *theirs.notes]
    sections = _sections(found, source, out, _model(found, model, theirs, out, notes))
    _take_over(sections, found, theirs, notes)
    text = _text(sections, found, out, notes)
    experiment = Experiment(make_config(tomllib.loads(text), root=out.parent))
    labels = found.kind.labels(experiment.rows.train, experiment.columns, source)
    found.kind.vocabulary(labels, source)
    if found.kind.head == "regression":
        tables.numbers(found.table, str(found.guess[1]["label"]), source)
    return Proposal(text, notes, experiment)


def _model(found: Found, given: str, theirs: Trainer, out: Path, notes: list[str]) -> str:
    """The model's path for the file; if none is given, a small one that can be fetched."""
    start = _start(found.kind)
    if not given and (named := theirs.text("model_name_or_path")):
        at = theirs.text("model_revision")
        given = named if Path(named).exists() else HUB + named + (f"@{at}" if at else "")
    if not given:
        small = Path(start.small)
        rest = small.relative_to(small.parts[0])
        own = [Path(folder) / rest for folder in _MODELS]
        place = next((path for path in own if path.exists()), None)
        what = f"no --model given: the file names {place or small}, a small model"
        notes.append(what if place else f"{what}; get it with: rolora fetch {start.name}")
        return os.path.relpath(place or small, out.parent)
    return os.path.relpath(given, out.parent) if Path(given).exists() else given


def _start(kind: TaskKind) -> Start:
    return _DECODER if kind.head == "causal_lm" else _ENCODER


def _notes(found: Found) -> list[str]:
    table, chosen = found.table, found.guess[1]
    notes = [f"found {key} = {_toml(value)}" for key, value in _stated(found.form).items()]
    used = list(found.used)
    if client := found.client:
        used.append(client.name)
        notes.append(
            f"a guess: each of the {client.distinct} values of {printable(client.name)} is a client"
        )
    unused = [name for name in table.column_names if name not in used]
    if unused:
        notes.append(f"unused columns: {', '.join(map(printable, unused))}")
    for name in unused:
        if found.clients or not names_client(name):
            continue
        cells = tables.cells(table, name)
        if empty := sum(cell is None or not str(cell).strip() for cell in cells):
            notes.append(
                f"{printable(name)} seems to name each row's client, but {empty} of "
                f"{table.num_rows} rows have none: fill it, and each of its values is a client"
            )
    label = chosen.get("label")
    if isinstance(label, str) and is_own_value(table, label):
        notes.append(
            f"{printable(label)} is both a column's name and a value in it: if the file has no "
            "header row, add one"
        )
    source = found.train["train"]
    rows = f"of {table.num_rows} rows"
    if found.guess[0] == "classification":
        named = Counter(tables.labels(table, str(label), source))
        notes += [
            f"{printable(str(label))} is {name} in {count} {rows}, which counts as a class: if it "
            "means that a row has no label, remove those rows"
            for name, count in named.items()
            if name.lower() in NO_LABEL
        ]
    if blank := tables.blank_rows(table, chosen.get("text", ()), source):
        notes.append(
            f"{blank} {rows} have no text; a run trains on them anyway: remove them if you do not "
            "want that"
        )
    labels = next((c for c in found.columns if c.name == label), None)
    if found.kind.labelled and labels and labels.distinct > table.num_rows / 2:
        many = f"{labels.distinct} values in {table.num_rows} rows"
        notes.append(f"{printable(labels.name)} has {many}: few rows to learn each value from")
    if chosen.keys() == {"completion"}:
        notes.append(
            f"{printable(str(chosen['completion']))} is learned as it is, without a prompt"
        )
    if touching := _touching(found):
        notes.append(
            f"{touching} of {table.num_rows} completions follow their prompt without a space or "
            "line break: set data.separator if they need one"
        )
    return notes


def _joined(found: Found) -> bool:
    """Whether completions follow prompts that are texts."""
    task, asked = found.guess[0], found.guess[1].get("prompt")
    chats = [column.name for column in found.columns if column.kind == "messages"]
    return task in ("causal_lm", "preference") and asked is not None and asked not in chats


def _touching(found: Found) -> int:
    """In how many rows a completion follows its prompt, in one column, without a space between."""
    chosen, source = found.guess[1], found.train["train"]
    if not _joined(found) or isinstance(chosen["prompt"], list):
        return 0
    starts = tables.texts(found.table, chosen["prompt"], source)
    names = [str(chosen[key]) for key in ("completion", "chosen", "rejected") if key in chosen]
    ends = zip(*(tables.texts(found.table, name, source) for name in names), strict=True)
    return sum(
        start != "" and not start[-1].isspace() and any(not end[:1].isspace() for end in row)
        for start, row in zip(starts, ends, strict=True)
    )


def _stated(form: TextForm) -> dict[str, str]:
    """The keys of [data] for text that is not written in the usual way."""
    keys = {"delimiter": form.delimiter, "encoding": form.encoding}
    return {key: value for key, value in keys.items() if value not in (None, "utf-8")}


def _sections(found: Found, source: str, out: Path, model: str) -> dict[str, Lines]:
    """The tables of the file, by name; "" has the keys before the first."""
    task, chosen = found.guess
    start, rows = _start(found.kind), found.table.num_rows
    base = out.parent / model
    small = base.name == Path(start.small).name or 0 < stored_parameters(base) <= start.largest
    train = {key: _seen_from(out, value) for key, value in found.train.items()}
    held: Lines = {key: (_seen_from(out, value), "") for key, value in found.held.items()}
    if "second_name" in held:
        held["second_name"] = (found.held["second_name"], "for accuracy/mismatched and so on")
    if not held:
        share = round(min(0.2, max(start.test_rows / rows, 0.001)), 3)
        held = {"test": (share, "a share of the rows, or another file"), **held}
        rows -= round(share * rows)
    data: Lines = {
        **{key: (value, "") for key, value in train.items()},
        **{key: (value, "") for key, value in _stated(found.form).items()},
        **held,
        "# validation": (0.1, "for the best round and early stopping"),
        **{key: (value, "") for key, value in chosen.items()},
    }
    if _joined(found):
        off = "" if isinstance(chosen["prompt"], list) else "# "
        data[f"{off}separator"] = ("\n", "between the parts of each row")
    data["max_length"] = (start.max_length, "tokens; longer rows are truncated")
    split, clients = _split(found, rows)
    cohort = min(clients, start.clients)
    batch = max(1, min(start.batch_size, rows // clients))
    tokens = cohort * start.local_steps * batch * min(_tokens(found), start.max_length)
    rounds = max(6, min(40, 2 * round(start.tokens / tokens / 2)))
    seen = float(f"{tokens * rounds:.2g}")
    few = f"about {seen:,.0f} tokens: minutes on two idle cores with a small model"
    share = math.ceil(100 * cohort / clients) / 100
    sections: dict[str, Lines] = {
        "": {
            "name": (_name(source, out), ""),
            "seed": (0, ""),
            "device": ("cpu", "cpu | cuda | mps"),
        },
        "model": {
            "path": (model, "a folder, hub:NAME, or a .gguf file"),
            "task": (task, " | ".join(TASKS.names())),
            "dtype": ("auto", "fp32 | bf16 | auto"),
        },
        "lora": {
            "rank": (4, ""),
            "alpha": (8, ""),
            "# target_modules": (["query", "value"], "left out: PEFT's default"),
            "# layers": ("top:2", "adapters in the top layers alone: faster"),
        },
        "data": data,
    }
    if task == "preference":
        judged = "kto" if "completion" in chosen else "dpo"
        sections["preference"] = {
            "loss": (judged, "dpo or ipo: chosen and rejected; kto: completion and label"),
            "beta": (0.1, "the larger, the closer it stays to the model before training"),
        }
    sections |= {
        "partition": split,
        "method": {"name": ("rolora", "see: rolora methods")},
        "train": {
            "rounds": (rounds, few),
            "participation": (share, "share of the clients in each round"),
            "local_steps": (start.local_steps, "or local_epochs"),
            "batch_size": (batch, ""),
            "optimizer": ("adamw", ""),
            "lr": (start.lr, "won with a small model: with another, try several")
            if small
            else (_LR, f"small models did best with {start.lr}: with a larger one, start lower"),
        },
        "eval": {"every": (_every(rounds), "rounds")},
    }
    for key, value in GLUE.get(found.glue, {}).items():
        table, _, name = key.partition(".")
        sections[table][name] = (
            value,
            "GLUE's metric" if table == "eval" else "its F1 is measured",
        )
    return sections


def _every(rounds: int) -> int:
    """For about four evaluations; odd, so that they follow both kinds of RoLoRA's rounds."""
    return rounds // 4 | 1


def _split(found: Found, rows: int) -> tuple[Lines, int]:
    """The keys of ``[partition]``, and the number of clients."""
    if found.clients:
        return {"scheme": ("files", f"{found.clients} files, one client each")}, found.clients
    usual = max(2, min(_start(found.kind).clients, rows // 8))
    if client := found.client:
        return {
            "scheme": ("by_field", "a client for each value of field: a guess, by its name"),
            "field": (client.name, f"{client.distinct} values; or scheme iid with clients = 10"),
        }, client.distinct
    other = f"by_field with field = {_toml(found.own[0].name if found.own else 'a column')}"
    if found.kind.head == "classification":
        return {
            "scheme": ("dirichlet", f"iid | dirichlet | by_label, or {other}"),
            "clients": (usual, ""),
            "alpha": (0.5, "the smaller, the more uneven"),
        }, usual
    return {"scheme": ("iid", f"or {other}"), "clients": (usual, "")}, usual


def _tokens(found: Found) -> float:
    """Tokens of a row, roughly: a quarter of its letters; both completions are behind a prompt."""
    some = found.table.slice(0, 200)
    again = each(found.guess[1].get("prompt", [])) if found.kind.compares else []
    letters = [len(str(cell)) for n in (*found.used, *again) for cell in tables.cells(some, n)]
    return max(sum(letters) / 4 / int(some.num_rows), 1.0)


def _take_over(sections: dict[str, Lines], found: Found, theirs: Trainer, notes: list[str]) -> None:
    """Put the settings of TRL's file into the tables, with a note on those the task cannot use."""
    for key, (value, origin) in theirs.settings.items():
        table, _, name = key.rpartition(".")
        if table not in sections:
            notes.append(f"{origin} is not used: the task is {found.guess[0]}, not preference")
            continue
        sections[table].pop(f"# {name}", None)
        sections[table][name] = (value, f"{origin} of TRL's file")
    if (wanted := theirs.text("dataset_test_split")) and not found.held:
        notes.append(
            f"dataset_test_split: {printable(wanted)} is not used: it is missing or has no answers"
        )
    train = sections["train"]
    steps, batch = train["local_steps"][0], train["batch_size"][0]
    clients = _split(found, found.table.num_rows)[1]
    cohort = max(1, math.ceil(train["participation"][0] * clients))
    if rounds := theirs.rounds(found.table.num_rows, cohort, steps, batch):
        train["rounds"] = (rounds, "as many rows in all as TRL's file has; rolora counts rounds")
        sections["eval"]["every"] = (_every(rounds), "rounds")
    if warmup := theirs.warmup(train["rounds"][0], steps):
        train["warmup_rounds"] = (warmup, "from the warm-up of TRL's file")


def _text(sections: Mapping[str, Lines], found: Found, out: Path, notes: Sequence[str]) -> str:
    """The file."""
    first = "# A federated LoRA run. Any key can be overridden: rolora run "
    lines = [f"{first}{printable(out.name)} train.lr=1e-3"]
    for table, keys in sections.items():
        if table:
            lines += ["", f"[{table}]"]
        if table == "data":
            lines[-1] = f"{'[data]':34}# columns found:"
            lines += _seen(found)
            lines += [f"# {note}" for note in notes]
        for key, (value, comment) in keys.items():
            line = f"{key} = {_toml(value)}"
            lines.append(f"{line:32}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def _seen(found: Found) -> Iterator[str]:
    for column in found.columns:
        example = _toml(printable(column.example[:40]))
        name = f"#   {printable(column.name)}: {column.kind}, {column.distinct} distinct"
        yield f"{name}, for example {example}"


def _seen_from(out: Path, source: str) -> str:
    """A source as a file in the folder of ``out`` names it."""
    if tables.is_glob(source, root=Path()) or (from_home(source)).exists():
        end = "/" if source.endswith("/") else ""
        return os.path.relpath(source, out.parent) + end
    return source


def _name(source: str, out: Path) -> str:
    """A name for the run that any file system takes; for train.csv and the like the folder's."""
    if out.stem != "rolora":
        found = [out.stem]
    else:
        path = Path(os.path.abspath(source))  # "." has no name
        found = [path.name.partition(".")[0].replace("*", "all"), path.parent.name]
    names = [re.sub(r"[^\w.-]+", "-", name).strip(".-") for name in found]
    return (
        next((name for name in names if name.lower() not in ("", *SAYS_LITTLE)), names[0]) or "run"
    )


def _toml(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ConfigError(f"{printable(text)} is not valid Unicode, so a TOML file cannot name it")
    # JSON of strings, lists and numbers is also TOML, but for control characters that JSON leaves
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)
