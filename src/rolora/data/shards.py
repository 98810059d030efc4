"""The rows of a run: read from their sources, cut into test, validation and clients' shards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rolora.algorithm.seeding import generator
from rolora.config.schema import RunConfig
from rolora.data import partition, tables
from rolora.data.partition import Partition
from rolora.errors import ConfigError, DataError, NotHere


@dataclass(frozen=True)
class Rows:
    """The rows of a run: all training rows in one table, who trains on which, what is held out.

    ``shards`` and ``held_out`` index into ``train``; the two are disjoint. ``label`` names the
    label column, where the data has one.
    """

    train: pa.Table
    test: pa.Table
    validation: pa.Table | None
    split: Partition
    shards: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]

    label: str | None

    def table(self) -> dict[str, Any]:
        """The split as the run folder keeps it: rows and labels per client."""
        label = self.label
        names = self.train[label].to_pylist() if label else []
        clients = []
        for client, rows in self.shards.items():
            counts = Counter(str(names[row]) for row in rows.tolist()) if label else {}
            ordered = dict(sorted(counts.items()))
            clients.append({"id": client, "num_examples": len(rows), "labels": ordered})
        return {"clients": clients, "dropped": self.split.dropped, "note": self.split.note}


def load_rows(config: RunConfig) -> Rows:
    """Read the configured sources and split them.

    Test and validation shares are cut off first and do not depend on the seed, so that runs with
    other seeds are measured on the same rows. Raises DataError or ConfigError in one line.
    """
    try:
        return _read_rows(config)
    except NotHere as missing:
        if config.data.made_by is None:
            raise
        said = f"{missing}; how to make them: {config.data.made_by}"
        raise NotHere(said, missing.source, missing.path) from None


def _read_rows(config: RunConfig) -> Rows:
    where = config.data
    read = partial(tables.read_table, root=config.root, offline=config.offline)
    per_file = tables.is_glob(where.train, root=config.root)
    if per_file != (config.partition.scheme == "files"):
        raise ConfigError(
            "partition.scheme = 'files' goes with a data.train pattern like 'data/site-*.jsonl'; "
            f"here scheme is {config.partition.scheme!r} and data.train is {where.train!r}"
        )
    if per_file:
        files = tables.read_clients(where.train, root=config.root)
        train = pa.concat_tables(files.values(), promote_options="permissive")
        owners = [client for client, table in files.items() for _ in range(table.num_rows)]
    else:
        train, owners = read(where.train, split=where.train_split), []
    left = torch.arange(train.num_rows)
    test, left = _part(where.test, "test", train, left, partial(read, split=where.test_split))
    validation = None
    if where.validation is not None:
        validation, left = _part(
            where.validation, "validation", train, left, partial(read, split="validation")
        )
    split = _partition(config, train, left, owners)
    shards, held_out = {}, {}
    for client, chosen in split.shards.items():
        shards[client], kept = hold_out(left[chosen], where.client_test or 0, config.seed, client)
        if len(kept):
            held_out[client] = kept
    label = config.data.label if config.data.label in train.column_names else None
    return Rows(train, test, validation, split, shards, held_out, label)


def digest(rows: Rows) -> str:
    """A hash of all rows, whatever the split."""
    found = hashlib.sha256()
    for table in (rows.train, rows.test, rows.validation):
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
    train: pa.Table,
    left: Tensor,
    read: Callable[[str], pa.Table],
) -> tuple[pa.Table, Tensor]:
    """Rows for one purpose, and the rows still left: another source, or a share of the rest."""
    if isinstance(wanted, str):
        return read(wanted), left
    order = left[torch.randperm(len(left), generator=generator(0, purpose))]
    count = round(wanted * train.num_rows)
    if not 0 < count < len(left):
        raise DataError(f"data.{purpose} = {wanted} of {train.num_rows} rows leaves nothing over")
    return train.take(order[:count].sort().values.tolist()), order[count:].sort().values


def _partition(
    config: RunConfig, train: pa.Table, left: Tensor, owners: Sequence[str]
) -> Partition:
    how = config.partition
    rng = generator(config.seed, "partition")
    kept = train.take(left.tolist())
    at_least = how.min_examples
    if how.scheme == "iid":
        return partition.iid(len(left), how.clients, rng, min_examples=at_least)
    if how.scheme == "files":
        return partition.by_field([owners[i] for i in left.tolist()], min_examples=at_least)
    if how.scheme == "by_field":
        values = tables.texts(kept, how.field or "", config.data.train)
        return partition.by_field(values, min_examples=at_least)
    labels = tables.labels(kept, config.data.label, config.data.train)
    if how.scheme == "by_label":
        k = how.labels_per_client
        return partition.by_label(labels, how.clients, k, rng, min_examples=at_least)
    return partition.dirichlet(labels, how.clients, how.alpha, rng, min_examples=at_least)
