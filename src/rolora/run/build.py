"""From a configuration to the objects that run it: rows, split, model, task, engine, federation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.method import Method, ServerState, lora_init
from rolora.algorithm.seeding import generator
from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.data.examples import Examples
from rolora.data.shards import Rows, load_rows
from rolora.errors import ConfigError
from rolora.model.base import Base
from rolora.model.prefix import kept_below
from rolora.run.configured import (
    first_adapter,
    load_base_for,
    local_settings,
    make_method,
    make_task,
    revisits,
    text_columns,
)
from rolora.run.federation import evaluation, federation_of, score
from rolora.tasks.classification import Label, class_labels
from rolora.tasks.registry import Task
from rolora.training.client_store import ClientStore
from rolora.training.engine import Debug, InProcess
from rolora.training.gradient import first_gradient
from rolora.training.memory import BankPlan, phases, plan_bank
from rolora.training.precision import is_wide, lowered
from rolora.training.rounds import Federation, RunState, cohort_size


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start: its federation, its first state, what a user should know.

    ``partition`` is who holds how many rows; ``data`` a hash of all rows that are here; ``bank``
    how many clients train at once; ``cached`` whether frozen layers are read from disk.
    """

    config: RunConfig
    base: Base
    task: Task
    test_rows: Any
    federation: Federation
    start: RunState
    labels: tuple[Label, ...]
    partition: Mapping[str, Any]
    data: str
    bank: int
    cached: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class HeldOut(Mapping[str, Examples]):
    """Each client's held-out rows, tokenised anew whenever asked for: nothing is kept per client.

    Their faults were named when all training rows were encoded.
    """

    task: Task
    rows: Rows
    source: str

    def __getitem__(self, client: str) -> Examples:
        chosen = self.rows.held_out[client]
        return self.task.encode_test(self.rows.train.take(chosen.tolist()), self.source)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.held_out)

    def __len__(self) -> int:
        return len(self.rows.held_out)


@dataclass(frozen=True)
class Encoded:
    """The rows of a run as tokens, with what their frozen layers give where that is kept."""

    examples: Examples
    test: Examples
    validation: Examples | None
    notes: tuple[str, ...]


def prepare(config: RunConfig, clients_folder: Path, base: Base | None = None) -> Setup:
    """Build a run. ``clients_folder`` will hold personal adapters; ``base`` may be one that an
    earlier ``prepare`` of the same model, labels and LoRA settings has loaded."""
    rows = load_rows(config)
    labels = _labels(config, rows)
    method = make_method(config)
    config.lora.ranks(rows.shards)  # refuses a table that leaves a client out
    _refuse_quorum(config, len(rows.shards))
    notes: tuple[str, ...] = ()
    if base is None:
        base, notes = load_in_dtype(config, measured(config, rows)[0], labels)
    task = make_task(config, base, labels)
    encoded = _encode(config, base, task, rows)
    gradient = None
    if method.needs_gradient:
        size = config.train.batch_size
        gradient = first_gradient(base, task, encoded.examples, rows.shards, size, config.seed)
    adapter = first_adapter(config, method, base, gradient)
    cohort = cohort_size(len(rows.shards), config.train.participation)
    bank, said = _bank(config, base, task, encoded.examples, method, adapter, cohort)
    measure, unanswered = partial(score, base, task), config.eval.model_copy(update={"generate": 0})
    engine = InProcess(
        base,
        task,
        encoded.examples,
        rows.shards,
        local_settings(config),
        ClientStore(clients_folder),
        bank_size=bank.clients,
        held_out=HeldOut(task, rows, config.data.train),
        evaluation=evaluation(unanswered, measure, encoded.test, encoded.validation),
        up=config.wire.up,
    )
    return Setup(
        config=config,
        base=base,
        task=task,
        test_rows=rows.test,
        federation=federation_of(
            config,
            method,
            Debug(engine) if config.train.engine == "debug" else engine,
            evaluation(config.eval, measure, encoded.test, encoded.validation),
            task,
            per_client=bool(engine.held_out),
        ),
        start=RunState(ServerState(adapter)),
        labels=tuple(labels),
        partition=rows.table(),
        data=data_hash(rows.shards, encoded.examples, encoded.test),
        bank=bank.clients,
        cached=encoded.examples.prefix is not None,
        notes=(*encoded.notes, *notes, *said, *_kept_note(method)),
    )


def _labels(config: RunConfig, rows: Rows) -> list[Label]:
    """The classes; none for a task without."""
    if config.model.task != "classification":
        return []
    found = tables.labels(rows.train, config.data.label, config.data.train)
    return class_labels(found, config.data.train)


def load_in_dtype(
    config: RunConfig, test_rows: Any, labels: Sequence[Label]
) -> tuple[Base, tuple[str, ...]]:
    """The base model in the dtype that suits this machine; what to say of it."""
    base, notes = load_base_for(config, labels), tuple[str, ...]()
    if config.model.dtype == "auto" and config.device == "cpu" and is_wide(base):
        task = make_task(config, base, labels)
        adapter = lora_init(base.specs, generator(config.seed, "init"))
        few = task.encode_test(test_rows.slice(0, 16), _source(config.data.test, config))
        base, said = lowered(base, task, few, adapter, lambda: load_base_for(config, labels))
        notes = (said,)
    if config.train.recompute and base.stack is None:
        raise ConfigError("train.recompute is not possible for this model's layers: leave it out")
    if base.stack is not None:
        base.stack.checkpointing = config.train.recompute
    return base, notes


def measured(config: RunConfig, rows: Rows) -> tuple[Any, str]:
    """The rows that ``metrics`` are of (``eval.rows``), and where they are from."""
    if config.eval.rows == "validation":
        return rows.validation, _source(config.data.validation, config)
    return rows.test, _source(config.data.test, config)


def _encode(config: RunConfig, base: Base, task: Task, rows: Rows) -> Encoded:
    examples = task.encode(rows.train, config.data.train)
    test = task.encode_test(*measured(config, rows))
    notes = _notes(config, rows, examples, test)
    if config.train.cache and revisits(config, [len(shard) for shard in rows.shards.values()]):
        folder = config.root / Path(config.train.cache).expanduser()
        examples, note = kept_below(base, examples, folder)
        test, _ = kept_below(base, test, folder)
        notes += (note,) if note else ()
    validation = None
    if config.eval.rows != "validation" and rows.validation is not None:
        validation = task.encode_test(rows.validation, _source(config.data.validation, config))
    return Encoded(examples, test, validation, notes)


def _kept_note(method: Method) -> tuple[str, ...]:
    if not method.personal_roles:
        return ()
    kept = "+".join(sorted(method.personal_roles))
    return (
        f"each client keeps its own {kept}, in clients/ of the run's folder: metrics are means "
        "over clients, and adapter/ holds the server's part alone",
    )


def data_hash(shards: Mapping[str, Tensor], *encoded: Examples) -> str:
    """A hash of who holds which rows, and of the rows as tokens."""
    digest = hashlib.sha256()
    for client, rows in shards.items():
        digest.update(client.encode())
        digest.update(rows.numpy().tobytes())
    for examples in encoded:
        for tensor in (examples.tokens, examples.offsets, examples.targets):
            digest.update(tensor.numpy().data)
    return digest.hexdigest()[:32]


def _bank(
    config: RunConfig,
    base: Base,
    task: Task,
    examples: Examples,
    method: Method,
    adapter: AdapterState,
    clients: int,
) -> tuple[BankPlan, tuple[str, ...]]:
    """How many clients train at once, and what to say of it."""
    kinds = phases(method, config.train.rounds)
    wanted = None if config.train.bank == "auto" else config.train.bank
    size = config.train.batch_size
    plan = plan_bank(base, task, examples, adapter, kinds, size, clients, wanted)
    if wanted is not None and plan.clients < min(wanted, clients):
        return plan, (f"train.bank = {wanted} does not fit in memory; {plan}",)
    return plan, (str(plan),)


def _refuse_quorum(config: RunConfig, clients: int) -> None:
    cohort = cohort_size(clients, config.train.participation)
    if config.aggregate.quorum > cohort:
        raise ConfigError(
            f"aggregate.quorum = {config.aggregate.quorum} can never be met by a cohort of "
            f"{cohort} (train.participation of {clients} clients)"
        )


def _source(source: str | float | None, config: RunConfig) -> str:
    return source if isinstance(source, str) else config.data.train


def _notes(config: RunConfig, rows: Rows, examples: Examples, test: Examples) -> tuple[str, ...]:
    notes = [rows.split.note] if rows.split.note else []
    if rows.split.dropped:
        notes.append(f"{rows.split.dropped} training rows belong to no client and are left out")
    if config.model.task == "classification" and (empty := _without_text(config, rows)):
        notes.append(f"{empty} of {rows.train.num_rows} training rows have no text")
    for what, encoded in (("training", examples), (config.eval.rows, test)):
        if encoded.truncated:
            notes.append(
                f"{encoded.truncated} of {len(encoded)} {what} rows are longer than "
                f"{config.data.max_length} tokens (data.max_length) and were truncated"
            )
    return tuple(notes)


def _without_text(config: RunConfig, rows: Rows) -> int:
    """How many training rows are blank in every column of text."""
    columns = [tables.texts(rows.train, name, config.data.train) for name in text_columns(config)]
    return sum(not "".join(row).strip() for row in zip(*columns, strict=True))
