"""What ``rolora init`` finds: the rows, what their columns are for, and where test rows are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rolora.data import tables
from rolora.data.columns import (
    Column,
    Guess,
    describe,
    guess_clients,
    guess_columns,
    names_client,
)
from rolora.data.readers import guess_form, kind_of
from rolora.data.text_form import TextForm
from rolora.errors import ConfigError, DataError
from rolora.network import HUB
from rolora.tasks.registry import TaskKind, task_kind

# the metric of GLUE's tasks other than accuracy; the label that its F1 is of
GLUE: Mapping[str, Mapping[str, str]] = {
    "cola": {"eval.metric": "matthews"},
    "sst2": {},
    "mrpc": {"eval.metric": "f1", "data.positive": "equivalent"},
    "qqp": {"eval.metric": "f1", "data.positive": "duplicate"},
    "stsb": {"eval.metric": "pearson"},
    "mnli": {},
    "qnli": {},
    "rte": {},
    "wnli": {},
}
_GLUE = re.compile(rf"({HUB})?(nyu-mll/)?glue[/:](?P<task>\w+)(?P<revision>@[\w./-]+)?")
_HELD_OUT = ("test", "validation", "validation_matched", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Found:
    """What init found.

    ``train`` and ``held`` are keys of ``[data]``; ``columns`` are those of ``table``, of which
    ``own`` may say whose row each is; ``clients`` counts files or folders of one client each, or is
    0.
    """

    train: Mapping[str, str]
    held: Mapping[str, str]
    table: Any
    columns: Sequence[Column]
    guess: Guess
    form: TextForm
    own: Sequence[Column]
    clients: int
    glue: str

    @property
    def client(self) -> Column | None:
        """The column that names each row's client, if one seems to."""
        named = bool(self.own) and names_client(self.own[0].name) and not self.clients
        return self.own[0] if named else None

    @property
    def kind(self) -> TaskKind:
        """The kind of task that the columns are for."""
        return task_kind(self.guess[0])

    @property
    def used(self) -> list[str]:
        """The columns that the task reads."""
        return [name for value in self.guess[1].values() for name in each(value)]


def look(
    source: str,
    delimiter: str | None = None,
    encoding: str | None = None,
    *,
    split: str = "",
    test_split: str = "",
) -> Found:
    """Read the rows, and find where test rows are.

    ``source``, ``delimiter``, ``encoding``: see ``template.propose``. ``split`` and
    ``test_split`` name the splits to use; empty, "train" and the usual ones.
    """
    root = Path()
    glue = _GLUE.fullmatch(source)
    glue = None if Path(source).exists() else glue
    if glue and glue["task"] not in GLUE:
        raise ConfigError(f"GLUE has no task {glue['task']!r} with labels: {', '.join(GLUE)}")
    if glue:
        source = f"{HUB}nyu-mll/glue:{glue['task']}{glue['revision'] or ''}"
    source = tables.per_client(source, root=root) or source
    files = list(tables.files_of(source, root=root)) if tables.is_glob(source, root=root) else []
    form = _form(Path(files[0] if files else source), delimiter, encoding)
    owners: list[str] = []
    split = split or "train"
    if files and not all(tables.SHARD.search(name) for name in files):
        table, owners = tables.read_clients(source, root=root, form=form)
    else:
        table = tables.read_table(source, root=root, form=form, split=split)
    train = {"train": source, **({"train_split": split} if split != "train" else {})}
    task = glue["task"] if glue else ""
    if task:  # the test split has no answers
        test_split = test_split or ("validation_matched" if task == "mnli" else "validation")
    clients, guess = len(set(owners)), guess_columns(table)
    found = Found(train, {}, table, describe(table), guess, form, (), clients, task)
    held = {} if files else _held_out(found, test_split)
    return replace(found, held=held, own=guess_clients(table, found.used))


def _form(path: Path, delimiter: str | None, encoding: str | None) -> TextForm:
    """How the text of these rows is written, by the first file of a folder."""
    while path.is_dir():
        inside = sorted(path.iterdir())
        path = next((one for one in inside if kind_of(one.name)), path / "none")
    found = guess_form(path)
    return TextForm(delimiter or found.delimiter, encoding or found.encoding)


def _held_out(found: Found, wanted: str) -> dict[str, str]:
    """Keys of ``[data]`` for test rows that come with the training rows; empty if none do.

    They have the columns and, where rows have classes, right answers that also occur in training:
    many test splits on the hub have no answers.
    """
    source, root = found.train["train"], Path()
    own = Path(source)
    if own.is_file() and "train" in own.name:  # x_test.csv beside x_train.csv
        beside = {end: own.with_name(own.name.replace("train", end, 1)) for end in _HELD_OUT}
        places = {end: (str(path), "train") for end, path in beside.items() if path.is_file()}
    else:
        splits = [wanted] if wanted else tables.splits_of(source, root=root)
        places = {split: (source, split) for split in splits}
    for place, split in [places[name] for name in (wanted, *_HELD_OUT) if name in places]:
        table = tables.read_table(place, root=root, form=found.form, split=split)
        if table.equals(found.table):  # the source has no splits
            continue
        if not (set(found.used) <= set(table.column_names) and _is_answered(found, table)):
            continue
        held = {"test": place, **({} if split in ("train", "test") else {"test_split": split})}
        other = "validation_mismatched"  # MNLI's second set, of other kinds of text
        if split == "validation_matched" and (
            found.glue or other in tables.splits_of(place, root=root)
        ):
            held |= {"second_test": place, "second_split": other, "second_name": "mismatched"}
        return held
    return {}


def _is_answered(found: Found, table: Any) -> bool:
    """Whether these rows seem to have right answers: all there, known, and not all the same."""
    keys = ("label", "answer", "completion")
    answers = [name for key in keys for name in each(found.guess[1].get(key, []))]
    if answers and all(column.distinct < 2 for column in describe(table.select(answers))):
        return False
    if any(table[name].null_count for name in found.used):
        return False
    try:
        known, asked = (found.kind.labels(t, found.guess[1], "") for t in (found.table, table))
    except DataError:
        return False
    return set(asked) <= set(known)


def each(value: str | list[str]) -> list[str]:
    """The columns that a key of ``[data]`` names: one or several."""
    return [value] if isinstance(value, str) else value
