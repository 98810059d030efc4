"""The rows of a run: read from their sources, split into test, validation and client shards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora.algorithm.seeding import generator
from rolora.attacks.attack import Rewrite, Rewritten
from rolora.config.schema import DataConfig, PartitionConfig
from rolora.data import partition, tables
from rolora.data.labels import in_order
from rolora.data.partition import Partition
from rolora.errors import ConfigError, DataError, NotHere
from rolora.tasks.registry import TaskKind, neighbour

Classes = Callable[[Any], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Rows:
    """The rows of a run, as pyarrow tables: who trains on which, and what is held out.

    ``shards`` and ``held_out`` map clients to int64 row indices into ``train``; the two are
    disjoint. ``dropped`` rows belong to no client; ``note`` says what the split had to adjust.
    ``classes`` gives the classes of each row of a table, or nothing where rows have none.
    """

    train: Any
    test: Any
    validation: Any | None
    shards: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    classes: Classes = lambda table: ()
    dropped: int = 0
    note: str = ""
    second_test: Any | None = None

    def table(self) -> dict[str, Any]:
        """The split as the run folder keeps it: rows and labels per client."""
        names, clients = self.classes(self.train), []
        for client, rows in self.shards.items():
            counts = Counter(name for row in rows.tolist() if names for name in names[row])
            ordered = {name: counts[name] for name in in_order(counts)}
            clients.append({"id": client, "num_examples": len(rows), "labels": ordered})
        return {"clients": clients, "dropped": self.dropped, "note": self.note}


def load_rows(
    data: DataConfig,
    how: PartitionConfig,
    *,
    columns: Sequence[str],
    classes: Classes,
    seed: int,
    root: Path,
    offline: bool = False,
) -> Rows:
    """Read the configured sources and split them; relative paths start from ``root``.

    ``columns`` are those that the task reads, which every client's file must have; for ``classes``
    see :class:`Rows`.

    Test and validation shares are cut off first and do not depend on the seed, so that runs with
    other seeds are evaluated on the same rows. Raises DataError or ConfigError.
    """
    try:
        return _load_rows(data, how, columns, classes, seed, root, offline)
    except NotHere as missing:
        if data.made_by is None:
            raise
        text = f"{missing}; how to make them: {data.made_by}"
        raise NotHere(text, missing.source, missing.path) from None


def _load_rows(
    data: DataConfig,
    how: PartitionConfig,
    columns: Sequence[str],
    classes: Classes,
    seed: int,
    root: Path,
    offline: bool,
) -> Rows:
    read = partial(tables.read_table, root=root, offline=offline, form=data.form)
    owners: list[str] = []
    if how.scheme != "files":
        train = read(data.train, split=data.train_split)
    elif tables.is_glob(data.train, root=root):
        train, owners = tables.read_clients(data.train, root=root, needed=columns, form=data.form)
    else:
        raise ConfigError(
            "partition.scheme = 'files' needs a data.train pattern such as 'data/site-*.jsonl' or "
            f"'data/*/'; here data.train is {data.train!r}"
        )
    tables.require_columns(train, columns, data.train)
    left = torch.arange(train.num_rows)
    test, left = _part(data.test, "test", train, left, partial(read, split=data.test_split))
    validation = None
    if data.validation is not None:
        validation, left = _part(
            data.validation, "validation", train, left, partial(read, split="validation")
        )
    second = data.second_test and read(data.second_test, split=data.second_split or "test")
    split = _partition(data, how, train, left, owners, seed)
    shards, held_out = {}, {}
    for client, chosen in split.shards.items():
        shards[client], kept = hold_out(left[chosen], data.client_test or 0, seed, client)
        if len(kept):
            held_out[client] = kept
    notes = [split.note]
    if test.equals(train):
        notes.append("the test rows are the training rows: metrics say nothing about other rows")
    if how.scheme != "files" and tables.is_glob(data.train, root=root):
        notes.append(
            f"the files of {data.train} are one set of rows, split by {how.scheme}; "
            'partition.scheme = "files" makes each a client'
        )
    note = "; ".join(filter(None, notes))
    return Rows(train, test, validation, shards, held_out, classes, split.dropped, note, second)


def neighboured(rows: Rows, kind: TaskKind, columns: Mapping[str, Any]) -> Rows:
    """The same rows, each with the completion of the row before it at its client as a column more,
    if the task compares single completions; the first of a client has the last one's.

    ``columns``: key of ``[data]`` -> column.
    """
    completion = columns.get("completion")
    if completion is None or not kind.compares:
        return rows
    before = torch.arange(rows.train.num_rows)
    for held in (*rows.shards.values(), *rows.held_out.values()):
        before[held] = held.roll(1)
    name = neighbour(completion)
    others = rows.train.select([completion]).take(before.tolist())[completion]
    own = rows.train.select([column for column in rows.train.column_names if column != name])
    return replace(rows, train=own.append_column(name, others))


def rewritten(
    table: Any, rewrite: Rewrite, columns: Mapping[str, Any], classes: Sequence[str], source: str
) -> Any:
    """The table with the rows, texts and labels that an attack makes of it.

    ``columns``: key of ``[data]`` -> column. Of two text columns the first is rewritten.
    ConfigError for a task that does not give each text one label.
    """
    text, label = columns.get("text"), columns.get("label")
    if text is None or not isinstance(label, str):
        raise ConfigError("this attack changes labels: it needs model.task = 'classification'")
    first = text if isinstance(text, str) else text[0]
    texts, labels = tables.texts(table, first, source), tables.labels(table, label, source)
    made = rewrite(texts, labels, classes)
    kept = table.take([row for row, _, _ in made])
    return tables.with_texts(
        kept, {first: [text for _, text, _ in made], label: [label for _, _, label in made]}
    )


def spoiled(
    rows: Rows, bad: Collection[str], rewrite: Rewrite, columns: Mapping[str, Any], source: str
) -> Rows:
    """The same rows, but each ``bad`` client trains on a rewritten copy of its own."""
    classes = in_order(name for row in rows.classes(rows.train) for name in row)
    parts = {"rows": rewritten(rows.train, _as_they_are, columns, classes, source)}
    shards, count = dict(rows.shards), rows.train.num_rows
    for client in sorted(bad):
        own = rows.train.take(shards[client].tolist())
        parts[client] = rewritten(own, rewrite, columns, classes, source)
        shards[client] = torch.arange(count, count + parts[client].num_rows)
        count += parts[client].num_rows
    return replace(rows, train=tables.stacked(parts), shards=shards)


def _as_they_are(texts: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> Rewritten:
    return list(zip(range(len(texts)), texts, labels, strict=True))


def digest(rows: Rows) -> str:
    """A hash of all rows, however they are split."""
    found = hashlib.sha256()
    second = () if rows.second_test is None else (rows.second_test,)
    for table in (rows.train, rows.test, rows.validation, *second):
        for row in table.to_pylist() if table is not None else ():
            found.update(json.dumps(row, default=str).encode())
        found.update(b"|")
    return found.hexdigest()[:32]


def hold_out(rows: Tensor, share: float, seed: int, client: str) -> tuple[Tensor, Tensor]:
    """A client's rows (int64 indices) to train on, and the share that it never trains on."""
    count = int(len(rows) * share)
    order = torch.randperm(len(rows), generator=generator(seed, "held out", client))
    return rows[order[count:]].sort().values, rows[order[:count]].sort().values


def _part(
    wanted: str | float,
    purpose: str,
    train: Any,
    left: Tensor,
    read: Callable[[str], Any],
) -> tuple[Any, Tensor]:
    """Rows for one purpose, from another source or as a share of ``train``; the rows then left."""
    if isinstance(wanted, str):
        return read(wanted), left
    order = left[torch.randperm(len(left), generator=generator(0, purpose))]
    count = round(wanted * train.num_rows)
    if not 0 < count < len(left):
        raise DataError(
            f"data.{purpose} = {wanted} of {train.num_rows} rows leaves no rows on one side"
        )
    return train.take(order[:count].sort().values.tolist()), order[count:].sort().values


def _partition(
    data: DataConfig,
    how: PartitionConfig,
    train: Any,
    left: Tensor,
    owners: Sequence[str],
    seed: int,
) -> Partition:
    """The rows ``left`` of ``train`` (int64 indices) dealt out to clients, which get places in
    ``left``; ``owners`` names the client of each row of ``train``, for scheme "files".

    All of ``train`` is read, so that an error counts its rows.
    """
    rng, at_least = generator(seed, "partition"), how.min_examples
    if how.scheme == "iid":
        return partition.iid(len(left), how.clients, rng, min_examples=at_least)
    if how.scheme in ("files", "by_field"):
        every = owners or tables.texts(train, how.field or "", data.train)
        return partition.by_field([every[row] for row in left.tolist()], min_examples=at_least)
    every = tables.labels(train, str(data.label), data.train)
    labels = [every[row] for row in left.tolist()]
    if how.scheme == "by_label":
        k = how.labels_per_client
        return partition.by_label(labels, how.clients, k, rng, min_examples=at_least)
    return partition.dirichlet(labels, how.clients, how.alpha, rng, min_examples=at_least)
