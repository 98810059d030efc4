"""From a configuration to the objects that run it: rows, split, model, task, engine, federation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rolora.adapter import AdapterState
from rolora.base import Base, load_base
from rolora.config import RunConfig
from rolora.draws import generator
from rolora.engine import ClientStore, Debug, InProcess
from rolora.errors import ConfigError
from rolora.local import LocalSettings, evaluate
from rolora.lora import LoraSettings, read_adapter
from rolora.method import Method, ServerState, freeze_head, get_method
from rolora.reduce import Reducer, clip, mean, median, trimmed_mean
from rolora.rounds import Federation, Metrics, RunState, cohort_size
from rolora.rows import Rows, load_rows
from rolora.schedule import learning_rate
from rolora.step import Aggregation
from rolora.tasks import Examples, Task
from rolora.tasks.causal_lm import causal_lm
from rolora.tasks.choice import choice
from rolora.tasks.classification import Label, class_labels, classification
from rolora.tasks.generation import exact_match


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start: its federation, its first state, what a user should know."""

    config: RunConfig
    base: Base
    task: Task
    rows: Rows
    examples: Examples
    test: Examples
    federation: Federation
    start: RunState
    labels: tuple[Label, ...]
    bank_size: int
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


def prepare(config: RunConfig, clients_folder: Path, base: Base | None = None) -> Setup:
    """Build a run. ``clients_folder`` will hold personal adapters; ``base`` may be one that an
    earlier ``prepare`` of the same model, labels and LoRA settings has loaded."""
    rows = load_rows(config)
    labels = (
        class_labels(rows.train, config.data.label, config.data.train)
        if config.model.task == "classification"
        else []
    )
    method, size = make_method(config), bank_size(config, len(rows.shards))
    _refuse_quorum(config, len(rows.shards))
    base = base or load_base_for(config, labels)
    task = make_task(config, base, labels)
    examples = task.encode(rows.train, config.data.train)
    test = task.encode_test(rows.test, _source(config.data.test, config))
    validation = None
    if rows.validation is not None:
        validation = task.encode_test(rows.validation, _source(config.data.validation, config))
    held_out = HeldOut(task, rows, config.data.train)
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
        up=config.wire.up,
    )
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
        lr=_schedule(config),
        participation=config.train.participation,
        metric=_metric(config, task),
        test=partial(_score, base, task, test, config.eval.generate),
        validation=None if validation is None else partial(_score, base, task, validation, 0),
        per_client=bool(held_out),
        eval_every=config.eval.every,
        patience=config.eval.patience,
    )
    start = RunState(ServerState(first_adapter(config, method, base)))
    notes = _notes(config, rows, examples, test)
    return Setup(
        config, base, task, rows, examples, test, federation, start, tuple(labels), size, notes
    )


def _schedule(config: RunConfig) -> Callable[[int], float]:
    train = config.train
    return partial(
        learning_rate,
        lr=train.lr,
        rounds=train.rounds,
        schedule=train.schedule,
        warmup_rounds=train.warmup_rounds,
    )


def _metric(config: RunConfig, task: Task) -> str:
    metric = config.eval.metric or task.metrics[0]
    if metric not in task.metrics:
        known = ", ".join(task.metrics)
        raise ConfigError(f"eval.metric {metric!r} is none of what {task.name} measures: {known}")
    return metric


def _refuse_quorum(config: RunConfig, clients: int) -> None:
    cohort = cohort_size(clients, config.train.participation)
    if config.aggregate.quorum > cohort:
        raise ConfigError(
            f"aggregate.quorum = {config.aggregate.quorum} can never be met by a cohort of "
            f"{cohort} (train.participation of {clients} clients)"
        )


def _source(source: str | float | None, config: RunConfig) -> str:
    return source if isinstance(source, str) else config.data.train


def load_base_for(config: RunConfig, labels: Sequence[object]) -> Base:
    """The configured base model. ConfigError for a device that is not there."""
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


def make_task(config: RunConfig, base: Base, labels: Sequence[Label]) -> Task:
    """The configured task, with the columns it reads."""
    columns, limit = config.data, config.data.max_length
    if config.model.task == "classification":
        text = [columns.text] if isinstance(columns.text, str) else columns.text
        return classification(base, labels, text, columns.label, limit)
    if config.model.task == "choice":
        return choice(
            base,
            prompt=str(columns.prompt),
            choices=str(columns.choices),
            answer=str(columns.answer),
            max_length=limit,
        )
    return causal_lm(
        base,
        prompt=columns.prompt,
        completion=columns.completion,
        messages=columns.messages,
        max_length=limit,
    )


def make_method(config: RunConfig) -> Method:
    """The configured method; with ``model.head = "freeze"`` it leaves the head alone."""
    method = get_method(config.method.name, **config.method.options)
    return freeze_head(method) if config.model.head == "freeze" else method


def make_reducer(config: RunConfig) -> Reducer:
    """The configured reducer, clipped if a norm is given."""
    how = config.aggregate
    if how.reducer == "trimmed_mean":
        reducer = trimmed_mean(how.trim)
    else:
        reducer = median() if how.reducer == "median" else mean()
    return reducer if how.clip_norm is None else clip(reducer, how.clip_norm)


def local_settings(config: RunConfig) -> LocalSettings:
    """How the configured clients train in a round."""
    train = config.train
    steps = 5 if train.local_steps is None and train.local_epochs is None else train.local_steps
    return LocalSettings(
        steps=steps,
        epochs=train.local_epochs,
        batch_size=train.batch_size,
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        momentum=train.momentum,
        max_grad_norm=train.max_grad_norm,
    )


def bank_size(config: RunConfig, clients: int) -> int:
    """How many clients go through the model at once; "auto" aims at 128 rows in a pass."""
    if config.train.bank != "auto":
        return config.train.bank
    return max(1, min(clients, 128 // config.train.batch_size))


def first_adapter(config: RunConfig, method: Method, base: Base) -> AdapterState:
    """What every client starts from: the method's own start, or a warm start from a PEFT folder."""
    start = method.init(base.specs, generator(config.seed, "init"))
    if config.lora.init_from is None:
        return start
    return start | read_adapter(config.root / config.lora.init_from, base.specs)


def _score(
    base: Base, task: Task, examples: Examples, generate: int, adapter: AdapterState
) -> Metrics:
    metrics = evaluate(base, task, examples, adapter)
    if generate and task.name == "causal_lm":
        with base.holding(adapter):
            metrics["exact_match"] = exact_match(base, examples, range(generate)[: len(examples)])
    return metrics


def _notes(config: RunConfig, rows: Rows, examples: Examples, test: Examples) -> tuple[str, ...]:
    notes = [rows.split.note] if rows.split.note else []
    if rows.split.dropped:
        notes.append(f"{rows.split.dropped} training rows belong to no client and are left out")
    for what, encoded in (("training", examples), ("test", test)):
        if encoded.truncated:
            notes.append(
                f"{encoded.truncated} of {len(encoded)} {what} rows are longer than "
                f"{config.data.max_length} tokens (data.max_length) and were truncated"
            )
    return tuple(notes)
