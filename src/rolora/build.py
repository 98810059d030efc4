"""From a configuration to the objects that run it: rows, split, model, task, engine, federation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rolora import data, partition
from rolora.adapter import AdapterState
from rolora.base import Base, load_base
from rolora.config import RunConfig
from rolora.draws import generator
from rolora.engine import ClientStore, Debug, InProcess
from rolora.errors import ConfigError, DataError
from rolora.local import LocalSettings, evaluate
from rolora.lora import LoraSettings, read_adapter
from rolora.method import Aggregation, Method, ServerState, freeze_head, get_method
from rolora.partition import Partition
from rolora.reduce import Reducer, clip, mean, median, trimmed_mean
from rolora.rounds import Federation, Metrics, RunState, learning_rate
from rolora.tasks import HIGHER_IS_BETTER, Examples, Task
from rolora.tasks.classification import class_labels, classification


@dataclass(frozen=True)
class Rows:
    """The rows of a run: all training rows in one table, who trains on which, what is held out.

    ``shards`` and ``held_out`` index into ``train``; the two are disjoint.
    """

    train: pa.Table
    test: pa.Table
    validation: pa.Table | None
    split: Partition
    shards: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]

    def table(self, label: str | None) -> dict[str, Any]:
        """The split as the run folder keeps it: rows and labels per client."""
        names = self.train[label].to_pylist() if label else []
        clients = []
        for client, rows in self.shards.items():
            counts = Counter(str(names[row]) for row in rows.tolist()) if label else {}
            ordered = dict(sorted(counts.items()))
            clients.append({"id": client, "num_examples": len(rows), "labels": ordered})
        return {"clients": clients, "dropped": self.split.dropped, "note": self.split.note}


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start: its federation, its first state, and what a user should know."""

    config: RunConfig
    base: Base
    task: Task
    rows: Rows
    examples: Examples
    federation: Federation
    start: RunState
    bank_size: int
    notes: tuple[str, ...]

    @property
    def split_table(self) -> dict[str, Any]:
        """The split as the run folder keeps it."""
        return self.rows.table(label_column(self.config, self.rows.train))


def load_rows(config: RunConfig) -> Rows:
    """Read the configured sources and split them.

    Test and validation shares are cut off first and do not depend on the seed, so that runs with
    other seeds are measured on the same rows. Raises DataError or ConfigError in one line.
    """
    where = config.data
    read = partial(data.read_table, root=config.root, offline=config.offline)
    per_file = data.is_glob(where.train)
    if per_file != (config.partition.scheme == "files"):
        raise ConfigError(
            "partition.scheme = 'files' goes with a data.train pattern such as 'data/site-*.jsonl'; "
            f"here scheme is {config.partition.scheme!r} and data.train is {where.train!r}"
        )
    if per_file:
        files = data.read_clients(where.train, root=config.root)
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
        rows = left[chosen]
        count = int(len(rows) * (where.client_test or 0))
        order = torch.randperm(len(rows), generator=generator(config.seed, "held out", client))
        shards[client] = rows[order[count:]].sort().values
        if count:
            held_out[client] = rows[order[:count]].sort().values
    return Rows(train, test, validation, split, shards, held_out)


def _part(
    wanted: str | float, purpose: str, train: pa.Table, left: Tensor, read: Any
) -> tuple[pa.Table, Tensor]:
    """Rows for one purpose, and the rows still left: another source, or a share of the rest."""
    if isinstance(wanted, str):
        return read(wanted), left
    order = left[torch.randperm(len(left), generator=generator(0, purpose))]
    count = round(wanted * train.num_rows)
    if not 0 < count < len(left):
        raise DataError(f"data.{purpose} = {wanted} of {train.num_rows} rows leaves nothing over")
    return train.take(order[:count].sort().values.tolist()), order[count:].sort().values


def label_column(config: RunConfig, table: pa.Table) -> str | None:
    """The column that splits by label and split tables use, if the data has it."""
    return config.data.label if config.data.label in table.column_names else None


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
        values = data.texts(kept, how.field or "", config.data.train)
        return partition.by_field(values, min_examples=at_least)
    labels = data.labels(kept, config.data.label, config.data.train)
    if how.scheme == "by_label":
        k = how.labels_per_client
        return partition.by_label(labels, how.clients, k, rng, min_examples=at_least)
    return partition.dirichlet(labels, how.clients, how.alpha, rng, min_examples=at_least)


def prepare(config: RunConfig, clients_folder: Path, base: Base | None = None) -> Setup:
    """Build a run. ``clients_folder`` will hold personal adapters; ``base`` may be one that an
    earlier ``prepare`` of the same model, labels and LoRA settings has loaded."""
    rows = load_rows(config)
    labels = (
        class_labels(rows.train, config.data.label, config.data.train)
        if config.model.task == "classification"
        else []
    )
    base = base or _load_base(config, labels)
    task = make_task(config, base, labels)
    examples = task.encode(rows.train, config.data.train)
    test = task.encode_test(rows.test, _source(config.data.test, config))
    validation = (
        None
        if rows.validation is None
        else task.encode_test(rows.validation, _source(config.data.validation, config))
    )
    held_out = {
        client: task.encode_test(rows.train.take(chosen.tolist()), config.data.train)
        for client, chosen in rows.held_out.items()
    }
    size = bank_size(config, len(rows.shards))
    engine = InProcess(
        base,
        task,
        examples,
        rows.shards,
        local_settings(config),
        ClientStore(clients_folder),
        bank_size=size,
        held_out=held_out,
        test=test,
    )
    method = make_method(config)
    metric = config.eval.metric or task.metric
    if metric not in HIGHER_IS_BETTER:
        raise ConfigError(f"eval.metric {metric!r} is none of {', '.join(HIGHER_IS_BETTER)}")
    federation = Federation(
        method=method,
        engine=Debug(engine) if config.train.engine == "debug" else engine,
        aggregation=Aggregation(
            make_reducer(config), config.aggregate.weights, config.aggregate.quorum
        ),
        clients={client: len(shard) for client, shard in rows.shards.items()},
        rank=config.lora.rank,
        seed=config.seed,
        rounds=config.train.rounds,
        lr=partial(
            learning_rate,
            lr=config.train.lr,
            rounds=config.train.rounds,
            schedule=config.train.schedule,
            warmup_rounds=config.train.warmup_rounds,
        ),
        participation=config.train.participation,
        metric=metric,
        test=partial(_score, base, task, test, config.eval.generate),
        validation=None if validation is None else partial(_score, base, task, validation, 0),
        per_client=bool(held_out),
        eval_every=config.eval.every,
        patience=config.eval.patience,
    )
    _refuse_quorum(config, len(rows.shards))
    start = RunState(ServerState(first_adapter(config, method, base)))
    notes = _notes(config, rows, examples, test)
    return Setup(config, base, task, rows, examples, federation, start, size, notes)


def _source(source: str | float | None, config: RunConfig) -> str:
    return source if isinstance(source, str) else config.data.train


def _load_base(config: RunConfig, labels: Sequence[object]) -> Base:
    wanted = config.model.dtype
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device; use device = 'cpu'")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device = 'mps', but torch sees no Apple GPU; use device = 'cpu'")
    half = wanted == "bf16" or (wanted == "auto" and config.device == "cuda")
    lora = config.lora
    settings = LoraSettings(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=tuple(lora.target_modules),
        layers=lora.layers if isinstance(lora.layers, str) else tuple(lora.layers),
        rslora=lora.rslora,
    )
    return load_base(
        config.model.path,
        "classification" if config.model.task == "classification" else "causal_lm",
        settings,
        root=config.root,
        labels=labels,
        dtype=torch.bfloat16 if half else torch.float32,
        device=config.device,
        offline=config.offline,
    )
