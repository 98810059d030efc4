"""From a configuration to the objects of a run: each part is made once, when first needed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Role
from rolora.algorithm.method import Method, ServerState, freeze_head, lora_init
from rolora.algorithm.reduce import compose
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation
from rolora.attacks import ATTACKS, NO_ATTACK
from rolora.attacks.attack import Attack, bad_clients
from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.data.examples import Examples
from rolora.data.labels import in_order, label_name
from rolora.errors import ConfigError
from rolora.files import from_home
from rolora.methods import get_method
from rolora.model.base import Base, load_base
from rolora.model.checkpoint import in_order_of_adapter, in_order_of_checkpoint
from rolora.model.peft import WEIGHTS, read_adapter
from rolora.model.prefix import kept_below
from rolora.run.refusals import require_clients, require_supported
from rolora.run.settings import base_dtype, local_settings, lora_settings, revisits
from rolora.run.shards import Rows, load_rows, neighboured, rewritten, spoiled
from rolora.run.workers import InWorkers, Part, WorkerPool, cards
from rolora.tasks.generation import answer_metrics
from rolora.tasks.registry import Task, TaskKind, task_kind
from rolora.training.attacked import Attacked
from rolora.training.client_store import ClientStore
from rolora.training.engine import Debug, Engine, Evaluation, InProcess
from rolora.training.local import first_gradient, outputs
from rolora.training.memory import SHARE, BankPlan, free_bytes, phases, plan_bank, worker_bytes
from rolora.training.precision import is_wide, lower
from rolora.training.processes import Processes, usable_cores
from rolora.training.reference import Tracked, references, untold
from rolora.training.rounds import Federation, RunState, cohort_size
from rolora.training.settings import LocalSettings

MEASURED = 256  # training rows of which dtype "auto" may time steps


class Parts(TypedDict, total=False):
    """Parts of an :class:`Experiment` that are given to it; None is as good as left out."""

    rows: Rows
    labels: Sequence[str]
    base: Base | None
    encoded: tuple[Examples, str]
    test: Examples
    second: Examples
    validation: Examples
    asked: Examples
    engine: Engine
    executor: Executor | None
    processes: Processes | None
    tracked: Tracked
    partition: Mapping[str, Any]
    data: str
    run: str
    bank: int
    spare: int
    notes: Sequence[str]


class Experiment:
    """A configured run. Each part is made when it is first needed, and kept.

    ``clients`` is the folder of the clients' own state, needed only for training. Parts that
    already exist are given by name: the base model of an earlier run with the same model, labels
    and LoRA settings; the labels that sites have agreed on; another engine. Making a part raises
    ConfigError or DataError, whose one line says what to change.

    ``run``: the run's name at its sites, "" on one machine. ``spare``: clients asked in excess of
    the cohort. ``executor`` runs the worker processes, wherever they are; without it, processes of
    this machine do: ``processes``, which outlive the run, or else its own. ``tracked`` shows
    how far a long pass over rows is.
    """

    run: str = ""
    spare: int = 0
    executor: Executor | None = None
    processes: Processes | None = None
    tracked: Tracked = staticmethod(untold)

    def __init__(
        self, config: RunConfig, clients: Path | None = None, **given: Unpack[Parts]
    ) -> None:
        self.config = config
        self.clients = clients
        # a cached property looks here before it makes anything
        vars(self).update({name: part for name, part in given.items() if part is not None})

    @cached_property
    def kind(self) -> TaskKind:
        """The configured kind of task."""
        return task_kind(self.config.model.task)

    @cached_property
    def columns(self) -> dict[str, Any]:
        """Key of ``[data]`` -> column, for those that the task reads."""
        return self.kind.chosen(dict(self.config.data))

    @cached_property
    def rows(self) -> Rows:
        """All rows and their split."""
        given = self.config
        scheme = given.partition.scheme
        if scheme in ("dirichlet", "by_label") and self.kind.head in ("multi_label", "regression"):
            raise ConfigError(
                f"partition.scheme = {scheme!r} needs one class per row, which task "
                f"{self.kind.name!r} does not have: use 'iid', 'by_field' or 'files'"
            )
        rows = load_rows(
            given.data,
            given.partition,
            columns=self.kind.columns_read(dict(given.data)),
            classes=self._classes,
            seed=given.seed,
            root=given.root,
            offline=given.offline,
        )
        rows = neighboured(rows, self.kind, self.columns)
        if self.attack is None or self.attack.spoil is None:
            return rows
        bad = self._bad(rows)
        return spoiled(rows, bad, self.attack.spoil, self.columns, given.data.train)

    @cached_property
    def attack(self) -> Attack | None:
        """What the bad clients do; None if there are none."""
        given = self.config.attack
        if given.name == NO_ATTACK:
            return None
        made: Attack = ATTACKS.make(given.name, **given.options)
        return made

    def _bad(self, rows: Rows) -> frozenset[str]:
        """The ids of the bad clients."""
        config = self.config
        trusted = config.aggregate.trusted
        return bad_clients(rows.shards, config.attack.clients, config.seed, trusted)

    def _classes(self, table: Any) -> list[list[str]]:
        """The classes of each row, where it has any: also of rows that are not learned by class."""
        data = self.config.data
        if self.kind.head == "multi_label":
            return self.kind.classes(table, self.columns, data.train)
        if self.kind.head == "regression" or data.label not in table.column_names:
            return []
        cells = tables.cells(table, str(data.label))
        return [[label_name(cell) or str(cell)] for cell in cells]

    @cached_property
    def partition(self) -> Mapping[str, Any]:
        """The split, as the run folder records it."""
        return self.rows.table()

    @cached_property
    def labels(self) -> Sequence[str]:
        """The class labels, in the order of the model's outputs; empty if the task has none."""
        source = self.config.data.train
        found = self.kind.labels(self.rows.train, self.columns, source)
        return self.ordered(self.kind.vocabulary(found, source))

    def ordered(self, labels: Sequence[str]) -> Sequence[str]:
        """These labels in the order of the checkpoint's outputs, if it has exactly these."""
        config = self.config
        return tuple(
            in_order_of_checkpoint(
                config.model.path, labels, root=config.root, offline=config.offline
            )
        )

    @cached_property
    def method(self) -> Method:
        """The configured method; with ``model.head = "freeze"`` it leaves the head alone.

        ConfigError for a setting that the method does not support.
        """
        config = self.config
        method = get_method(config.method.name, **config.method.options)
        require_supported(method, config, self.aggregation, self.attack)
        return freeze_head(method) if config.model.head == "freeze" else method

    @cached_property
    def settings(self) -> LocalSettings:
        """How clients train, and of which roles they keep the optimiser's state."""
        train = self.config.train
        rounds = range(1, train.rounds + 1) if train.keep_moments else ()
        kept = frozenset[Role]().union(*(self.method.trained(round) for round in rounds))
        return replace(local_settings(train), kept=kept)

    @cached_property
    def base(self) -> Base:
        """The base model, with a bank of adapters; its dtype suits this machine."""
        return self._loaded[0]

    def load_base(self) -> Base:
        """Load the base model. Without a measurement, dtype "auto" is bf16 on CUDA, otherwise fp32.

        ConfigError for a device that is missing or does not support the dtype.
        """
        config = self.config
        wanted = config.model.dtype
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device = 'cuda', but torch sees no CUDA device; use device = 'cpu'")
        if config.device == "mps" and not torch.backends.mps.is_available():
            raise ConfigError("device = 'mps', but torch sees no Apple GPU; use device = 'cpu'")
        if wanted == "bf16" and config.device == "cuda" and not torch.cuda.is_bf16_supported():
            raise ConfigError("this GPU does not support model.dtype = 'bf16'; use 'fp32'")
        base = load_base(
            config.model.path,
            self.kind.head,
            lora_settings(config.lora),
            root=config.root,
            labels=self.labels,
            dtype=base_dtype(wanted, config.device),
            quantise=wanted if wanted in ("int8", "nf4") else None,
            device=config.device,
            devices=range(torch.cuda.device_count() if config.model.device_map == "auto" else 0),
            offline=config.offline,
        )
        if config.train.recompute and base.stack is None:
            raise ConfigError("this model does not support train.recompute: remove it")
        if base.stack is not None:
            base.stack.checkpointing = config.train.recompute
        return base

    @cached_property
    def _loaded(self) -> tuple[Base, str]:
        """The base model, and a note on its dtype if that was measured."""
        base, config = self.load_base(), self.config
        if config.model.dtype != "auto" or config.device != "cpu" or not is_wide(base):
            return base, ""
        table, source = self.rows.train.slice(0, MEASURED), config.data.train
        task, size = self.task_on(base), config.train.batch_size
        adapter = lora_init(base.specs, generator(config.seed, "init"))
        rows = base.require_known(task.encode(table, source), source)
        if self.kind.compares:  # with anything: a step takes as long
            rows = replace(rows, reference=torch.zeros(len(rows), 4))
        return base, lower(base, task, rows, adapter, size, self.cohort)

    @cached_property
    def task(self) -> Task:
        """The configured task on the base model; rows that it does not know are refused.

        Where it compares, rows come with the outputs of the base, or of lora.init_from's adapter.
        """
        base, task = self.base, self.task_on(self.base)
        if not self.kind.compares:
            return ready(task, base.require_known)
        start = None if self._init_from is None else read_adapter(self._init_from, base.specs)
        compared = references(base, task, start, self._cache, self.tracked)
        return ready(task, lambda found, source: compared(base.require_known(found, source)))

    def task_on(self, base: Base) -> Task:
        """The configured task on this base model, which encodes rows as they are."""
        kind, config = self.kind, self.config
        options = getattr(config, kind.section).model_dump() if kind.section else {}
        return kind.make(base, self.columns | options, self.labels, config.data.max_length)

    @property
    def _cache(self) -> Path | None:
        """The folder of ``train.cache``; None where nothing is to be kept."""
        folder = self.config.train.cache
        return self.config.root / from_home(folder) if folder else None

    @cached_property
    def examples(self) -> Examples:
        """The training rows as tokens, with their prefix where that is cached."""
        return self.encoded[0]

    @cached_property
    def shards(self) -> Mapping[str, Tensor]:
        """Client -> its rows among ``examples``, int64 indices."""
        return {client: self.examples.made_of(rows) for client, rows in self.rows.shards.items()}

    @cached_property
    def test(self) -> Examples:
        """The rows behind ``metrics`` (see ``eval.rows``), as tokens."""
        return self._cached(self.task.encode_test(*self._held(self.config.eval.rows)))[0]

    @cached_property
    def second(self) -> Examples | None:
        """The rows of ``data.second_test`` as tokens, where those of ``data.test`` are used."""
        if self.config.data.second_test is None or self.config.eval.rows != "test":
            return None
        return self.task.encode_test(*self._held("second_test"))

    @cached_property
    def validation(self) -> Examples | None:
        """The validation rows as tokens, if there are any beside those of ``test``."""
        if self.config.data.validation is None or self.config.eval.rows == "validation":
            return None
        return self.task.encode_test(*self._held("validation"))

    @cached_property
    def encoded(self) -> tuple[Examples, str]:
        """``examples`` with a note on their prefix; the same however the rows are split."""
        return self._cached(self.task.encode(self.rows.train, self.config.data.train))

    def _held(self, key: str) -> tuple[Any, str]:
        """The server's rows of this key, and their source as messages name it."""
        source = getattr(self.config.data, key)
        table = getattr(self.rows, key)
        return table, source if isinstance(source, str) else self.config.data.train

    def _cached(self, examples: Examples) -> tuple[Examples, str]:
        """The examples with their prefix where that is worth caching, and a note on it."""
        train, sizes = self.config.train, [len(shard) for shard in self.rows.shards.values()]
        if self._cache is None or not sizes or not revisits(train, sizes):
            return examples, ""
        return kept_below(self.base, examples, self._cache)

    @property
    def cached(self) -> bool:
        """Whether training reads the outputs of the layers below the adapters from disk."""
        return self.rows.train is not None and self.examples.prefix is not None

    @cached_property
    def data(self) -> str:
        """A hash of who holds which rows, of the labels, and of all rows as tokens."""
        rows = self.examples, self.test, self.validation, self.second
        return data_hash(self.shards, self.labels, *rows)

    @cached_property
    def cohort(self) -> int:
        """Clients of a round, all of them with rows here."""
        return cohort_size(len(self.rows.shards), self.config.train.participation)

    @cached_property
    def start(self) -> RunState:
        """The state before the first round: the method's own adapter, or that of lora.init_from."""
        config, specs = self.config, self.base.specs
        if self.method.needs_gradient:
            size = config.train.batch_size
            gradient = first_gradient(
                self.base, self.task, self.examples, self.shards, size, config.seed
            )
            specs = replace(specs, gradient=gradient)
        adapter = self.method.init(specs, generator(config.seed, "init"))
        if config.lora.init_from is not None:
            if adapter.only(frozenset({"core"})):
                raise ConfigError(
                    f"{self.method.name} trains cores, which no PEFT adapter has: remove "
                    "lora.init_from"
                )
            adapter |= self._warm_start[0]
        return RunState(ServerState(adapter))

    @property
    def _init_from(self) -> Path | None:
        """The folder of the adapter that the run starts from, if it names one."""
        folder = self.config.lora.init_from
        return None if folder is None else self.config.root / from_home(folder)

    @cached_property
    def init_hash(self) -> str:
        """A hash of the adapter that the run starts from, or "" where it draws its own."""
        if self._init_from is None:
            return ""
        file = self._init_from / WEIGHTS
        if not file.is_file():
            raise ConfigError(f"lora.init_from: {file} is missing")
        return hashlib.sha256(file.read_bytes()).hexdigest()[:32]

    @cached_property
    def _warm_start(self) -> tuple[Mapping[str, Tensor], str]:
        """What is taken from lora.init_from, and a note if that is not all of it."""
        folder = self._init_from
        assert folder is not None
        adapter = read_adapter(folder, self.base.specs)
        theirs = in_order_of_adapter(folder, self.labels)
        if theirs == [*self.labels] or not adapter.only(frozenset({"head"})):
            return adapter, ""
        note = f"the head of {folder} is not used: its labels are not this run's, in this order"
        return adapter.only(frozenset({"A", "B"})), note

    @cached_property
    def bank_plan(self) -> BankPlan:
        """How many clients train at once, by what fits in memory."""
        train, adapter = self.config.train, self.start.server.adapter
        return plan_bank(
            self.base,
            self.task,
            self.examples,
            adapter,
            phases(self.method, train.rounds, self.settings.kept),
            train.batch_size,
            self.cohort,
            train.bank,
        )

    @cached_property
    def bank(self) -> int:
        """How many clients train at once."""
        return self.bank_plan.clients

    def held_out(self, client: str) -> Examples | None:
        """A client's held-out rows, if any, tokenised whenever asked for: nothing is kept."""
        if client not in self.rows.held_out:
            return None
        rows = self.rows.train.take(self.rows.held_out[client].tolist())
        return self.task.encode_test(rows, self.config.data.train)

    @cached_property
    def engine(self) -> Engine:
        """All clients in this process.

        ConfigError, before the model is loaded, for ranks, steps, a quorum or a trusted client that
        do not fit the clients.
        """
        if self.clients is None:
            raise ValueError("training needs a folder for the clients' state")
        sizes = {client: len(rows) for client, rows in self.rows.shards.items()}
        require_clients(self.method, self.config, self.aggregation, sizes, self.cohort)
        kind = Debug if self.config.train.engine == "debug" else InProcess
        here = kind(
            self.base,
            self.task,
            self.examples,
            self.shards,
            self.settings,
            ClientStore(self.clients),
            bank_size=self.bank,
            held_out=self.held_out,
            evaluation=partial(self.evaluate, answers=0),
            up=self.config.wire.up,
        )
        engine: Engine = here if self.worker_pool is None else InWorkers(here, self.worker_pool)
        if self.attack is None:
            return engine
        return Attacked(engine, self.attack, self._bad(self.rows), self.aggregation)

    @property
    def groups(self) -> int:
        """How many groups of clients a round has."""
        return math.ceil(self.cohort / self.bank) if self.method.federated else 1

    @cached_property
    def workers(self) -> int:
        """How many groups of clients train at a time, each in a process; 1: in this process, unless
        an executor is given."""
        train, device = self.config.train, self.config.device
        if train.engine == "debug" or (train.workers == 1 and self.executor is None):
            return 1
        groups = self.groups
        if train.workers != "auto":
            return min(train.workers, groups)
        if self.executor is not None:
            return groups
        if device != "cpu":
            return min(groups, torch.cuda.device_count() if cards(self.config) else 1)
        each = worker_bytes(self.base, self.bank_plan, self.start.server.adapter)
        fitting = int(SHARE * free_bytes(device)) // each
        return max(1, min(groups, usable_cores(), fitting))

    @cached_property
    def worker_pool(self) -> WorkerPool | None:
        """The processes that train and evaluate; None: this process does."""
        debug = self.config.train.engine == "debug"
        if self.clients is None or debug or (self.executor is None and self.workers == 1):
            return None
        config = self.config
        changes: dict[str, Any] = {
            "train": config.train.model_copy(update={"workers": 1}),
            "model": config.model.model_copy(update={"dtype": self.dtype}),
            "server_seed": None,
        }
        rows = {
            "examples": self.examples,
            "test": self.test,
            "second": self.second,
            "validation": self.validation,
            "asked": self.asked,
        }
        return WorkerPool(
            Part(
                Experiment, config.model_copy(update=changes), tuple(self.labels), self.base.digest
            ),
            {name: given for name, given in rows.items() if given is not None},
            self.clients.parent,
            self.workers,
            self.executor or self.processes,
        )

    @property
    def dtype(self) -> str:
        """``model.dtype``, as "auto" is resolved on this machine."""
        if (wanted := self.config.model.dtype) != "auto":
            return wanted
        return "bf16" if self.base.dtype == torch.bfloat16 else "fp32"

    @cached_property
    def aggregation(self) -> Aggregation:
        """How updates are combined."""
        given = self.config.aggregate
        reducer = compose(given.rules)
        return Aggregation(
            reducer,
            given.weights,
            given.quorum,
            max_share=given.max_share,
            trusted=given.trusted,
        )

    @cached_property
    def federation(self) -> Federation:
        """What ``federate`` runs."""
        config, train, engine = self.config, self.config.train, self.engine
        metric = config.eval.metric or next(iter(self.kind.metrics))
        return Federation(
            method=self.method,
            engine=engine,
            aggregation=self.aggregation,
            ranks=config.lora.ranks,
            seed=config.seed,
            server_seed=config.server_seed,
            rounds=train.rounds,
            lr=train.rate,
            participation=train.participation,
            metric=metric,
            higher_is_better=self.kind.metrics[metric],
            evaluate=self.evaluate,
            per_client=config.data.client_test is not None,
            eval_every=config.eval.every,
            patience=config.eval.patience,
            spare=self.spare,
        )

    @cached_property
    def asked(self) -> Examples | None:
        """The test rows with the answers that the attack is after, if it is after any."""
        if self.attack is None or self.attack.ask is None:
            return None
        table, source = self._held(self.config.eval.rows)
        classes = in_order(self.labels)
        made = rewritten(table, self.attack.ask, self.columns, classes, source)
        return self.task.encode_test(made, source)

    def evaluate(self, adapter: AdapterState, answers: int | None = None) -> Evaluation:
        """Metrics of an adapter on the test and the validation rows; see ``score``.

        Those on the second test rows are called "accuracy/second" and so on. Under an attack that
        is after certain answers, ``attack_success`` is how often it gets them.
        """
        found = self._scored("test", adapter, answers)
        if self.second is not None:
            name, own = self.config.data.second_name or "second", dict(found.metrics)
            for metric, value in self._scored("second", adapter, answers).metrics.items():
                own[f"{metric}/{name}"] = value
            found = replace(found, metrics=own)
        if self.asked is not None:
            success = self._scored("asked", adapter, answers=0).metrics["accuracy"]
            found = replace(found, metrics={**found.metrics, "attack_success": success})
        if self.config.eval.rows == "validation":
            return replace(found, validation=found.metrics)
        if self.validation is None:
            return found
        held = self._scored("validation", adapter, answers=0)
        return replace(found, validation=held.metrics)

    def score(
        self, examples: Examples, adapter: AdapterState, answers: int | None = None
    ) -> Evaluation:
        """The task's metrics of an adapter; with ``answers`` (left out: ``eval.generate``) also
        those of the answers generated for that many rows."""
        with self.base.holding(adapter):
            found = outputs(self.base, self.task, examples)
        return self._judged(found, examples, adapter, answers)

    def _scored(self, rows: str, adapter: AdapterState, answers: int | None) -> Evaluation:
        """``score`` on these rows of the run ("test", ...), by its worker processes if any."""
        examples: Examples = getattr(self, rows)
        if self.worker_pool is None:
            return self.score(examples, adapter, answers)
        return self._judged(self.worker_pool.outputs(rows, adapter), examples, adapter, answers)

    def _judged(
        self, outputs: Tensor, examples: Examples, adapter: AdapterState, answers: int | None
    ) -> Evaluation:
        """What these outputs of the adapter are worth, with what generated answers are."""
        how, task = self.config.eval, self.task
        metrics = task.score(outputs, examples)
        count = how.generate if answers is None else answers
        if count and self.kind.answers:
            with self.base.holding(adapter):
                metrics |= answer_metrics(self.base, examples, count, how.answer)
        recall = task.recall(outputs, examples) if task.recall else {}
        return Evaluation(metrics, recall=recall)

    @property
    def axes(self) -> dict[str, Any]:
        """What the lists in a round's line are over, as the run folder records it."""
        table, source = self._held(self.config.eval.rows)
        rows = self.kind.classes(table, self.columns, source) if self.kind.labelled else []
        counts = Counter(name for row in rows for name in row)
        return {
            "labels": {label: counts[label] for label in self.labels if counts[label]},
            "layers": self.start.server.adapter.layers(),
        }

    def prepare(self) -> None:
        """Make all parts that a run needs. Refusals that take no model come first."""
        first = ("method", "labels", "federation", "start")
        for part in (*first, "test", "second", "validation", "data"):
            getattr(self, part)

    def reloaded(self) -> Experiment:
        """The same run with the rows and the model that are loaded; everything else is made again.

        For another number of threads, on which the last bits of a first gradient and of the
        outputs before training depend.
        """
        loaded = {"rows", "labels", "base", "_loaded", "bank", "executor", "processes", "tracked"}
        if not self.kind.compares:  # then tokens are only tokens
            loaded |= {"encoded", "test", "second", "validation", "asked"}
        parts: Any = {name: part for name, part in vars(self).items() if name in loaded}
        return Experiment(self.config, self.clients, **parts)

    @cached_property
    def notes(self) -> Sequence[str]:
        """What the user should know of how the run was set up."""
        config, found = self.config, list[str]()
        if self.rows.note:
            found.append(self.rows.note)
        if self.rows.dropped:
            found.append(f"{self.rows.dropped} training rows belong to no client and are not used")
        text, source = self.columns.get("text", ()), config.data.train
        if empty := tables.blank_rows(self.rows.train, text, source):
            found.append(f"{empty} of {self.rows.train.num_rows} rows of data.train have no text")
        if self.attack is not None:
            found.append(
                f"an experiment: bad clients {', '.join(sorted(self._bad(self.rows)))} attack "
                f"({config.attack.name})"
            )
        limit = self.base.limit(config.data.max_length)
        held = ((config.eval.rows, self.test), ("second test", self.second))
        for what, examples in (("training", self.examples), *held):
            if examples is not None and examples.truncated:
                count = len(examples.sequences)
                found.append(
                    f"{examples.truncated} of {count} {what} rows are longer than "
                    f"{limit.tokens} tokens ({limit.source}) and were truncated"
                )
        found.append(self.base.note)
        found.append(self._warm_start[1] if config.lora.init_from is not None else "")
        found.append(self.encoded[1])
        found.append(self._loaded[1] if "_loaded" in vars(self) else "")
        wanted, plan = config.train.bank, str(self.bank_plan)
        short = isinstance(wanted, int) and self.bank < min(wanted, self.cohort)
        found.append(f"train.bank = {wanted} does not fit in memory; {plan}" if short else plan)
        if self.config.train.workers != 1 or self.executor is not None:
            found.append(
                f"{self.groups} groups of clients a round, {self.workers} trained at a time, each "
                "in its own process (train.bank sets the size of a group)"
            )
        found.append(self._one_phase())
        if self.method.personal_roles:
            kept = "+".join(sorted(self.method.personal_roles))
            found.append(
                f"each client keeps its own {kept}, in clients/ of the run's folder: metrics are "
                "means over clients, and adapter/ holds only the server's part"
            )
        return [note for note in found if note]

    def _one_phase(self) -> str:
        """A note if eval.every meets only one of several phases."""
        rounds, every = self.config.train.rounds, self.config.eval.every
        phases = [self.method.trained(round) for round in range(1, rounds + 1)]
        met = phases[every - 1 :: every]
        if len(met) < 2 or len(set(met)) > 1 or len(set(phases)) == 1:
            return ""
        trained = "+".join(sorted(met[0] - {"head"}))
        return (
            f"eval.every = {every} meets only rounds that train {trained}: before the last rounds, "
            "scores leave out the others, no round is the best, and eval.patience has no effect; "
            "where turns are equal, an odd number meets both"
        )


def ready(task: Task, finish: Callable[[Examples, str], Examples]) -> Task:
    """The task, with ``finish(examples, source)`` applied to all examples that it encodes."""

    def finished(encode: Callable[[Any, str], Examples]) -> Callable[[Any, str], Examples]:
        return lambda table, source: finish(encode(table, source), source)

    def predict(
        table: Any, source: str, run: Callable[[Examples], Tensor], most: int
    ) -> list[dict[str, Any]]:
        assert task.predict is not None
        return task.predict(table, source, lambda found: run(finish(found, source)), most)

    return replace(
        task,
        encode=finished(task.encode),
        encode_test=finished(task.encode_test),
        predict=task.predict and predict,
    )


def data_hash(
    shards: Mapping[str, Tensor], labels: Sequence[str], *encoded: Examples | None
) -> str:
    """A hash of who holds which rows, of the labels, and of the rows as tokens."""
    digest = hashlib.sha256(repr(tuple(labels)).encode())
    for client, rows in shards.items():
        digest.update(client.encode())
        digest.update(rows.numpy().tobytes())
    for examples in (one for one in encoded if one is not None):
        for tensor in (
            examples.tokens,
            examples.offsets,
            examples.targets,
            examples.seconds,
            examples.answers,
        ):
            digest.update(b"" if tensor is None else tensor.numpy().data)
    return digest.hexdigest()[:32]
