"""The groups of a cohort, trained by a pool of processes; evaluation too.

A process is sent all that a group starts from, and sends back what it ends with. Here, groups are
formed, clients' files are read and written, and updates are encoded: a process that dies, or does
something twice, leaves no trace. It loads the frozen base once, and reads rows as tokens from files
that were written here.
"""

from __future__ import annotations

import atexit
import gc
import os
import platform
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Assignment, Failure, Update
from rolora.algorithm.method import Method
from rolora.config.schema import RunConfig
from rolora.data.examples import Examples
from rolora.errors import ConfigError, RoloraError
from rolora.files import TEMPORARY, from_home, make_folder, write_file
from rolora.model.prefix import kept_below
from rolora.training.engine import ClientMetrics, Evaluation, InProcess, Job, starved
from rolora.training.local import (
    Trained,
    Work,
    evaluate,
    in_batches,
    in_order,
    outputs_of,
    train_group,
)
from rolora.training.processes import Processes, deal, usable_cores

Arrays = Mapping[str, Any]  # name -> numpy array: sent as plain bytes, not in shared memory
Adapter = tuple[Arrays, Mapping[str, float]]  # and its scaling


@dataclass(frozen=True)
class Part:
    """What a process makes its part of a run from.

    ``make`` makes an ``Experiment`` of a configuration and of parts that exist; ``config`` with
    dtype resolved; ``base``: the model's digest; ``files``: name of rows -> their file; ``cached``:
    those whose prefix is in ``train.cache``; ``threads``: of torch; ``versions``: of the libraries
    that compute; ``written``: a name for this writing of the files, since the next run of a folder
    has files of the same names.
    """

    make: Callable[..., Any]
    config: RunConfig
    labels: tuple[str, ...]
    base: str
    files: Mapping[str, Path] = field(default_factory=dict)
    cached: frozenset[str] = frozenset()
    threads: int = 1
    versions: tuple[str, ...] = ()
    written: str = ""


class WorkerPool:
    """The processes of a run, with the rows they read: started when first needed.

    ``part`` has no files yet. ``rows``: those that clients train on ("examples") and those that are
    evaluated on; ``folder`` holds them meanwhile. ``count`` calls are under way at a time, on the
    executor that is ``running``, or else on as many processes of this machine.
    """

    def __init__(
        self,
        part: Part,
        rows: Mapping[str, Examples],
        folder: Path,
        count: int,
        running: Executor | None = None,
    ) -> None:
        self._without_files, self._rows = part, rows
        self._folder = folder.resolve() / f"{TEMPORARY}rows"
        self._count, self._running = count, running

    @cached_property
    def _executor(self) -> Executor:
        if self._running is not None:
            return self._running
        return Processes(self._count, cards(self._without_files.config))

    @cached_property
    def _part(self) -> Part:
        atexit.register(self.close)  # a run may be abandoned, and later it is too late
        make_folder(self._folder)
        files = {}
        for name, examples in self._rows.items():
            files[name] = self._folder / f"{name}.safetensors"
            tensors = {key: t.contiguous() for key, t in _tensors_of(examples).items()}
            about = {"truncated": str(examples.truncated)}
            write_file(files[name], save(tensors, about), mode=0o600)
        cached = frozenset(name for name, one in self._rows.items() if one.prefix is not None)
        threads = torch.get_num_threads()
        return replace(
            self._without_files,
            files=files,
            cached=cached,
            threads=threads,
            versions=_versions(),
            written=uuid.uuid4().hex,
        )

    def begin(self) -> None:
        """Have the processes load what the run needs; returns once they have."""
        loading = [self._executor.submit(_load, self._part) for _ in range(self._count)]
        for one in loading:
            one.result()

    def close(self) -> None:
        """End the processes and delete their rows."""
        if vars(self).pop("_part", None) is None:  # nothing has begun, or all has ended
            return
        atexit.unregister(self.close)
        executor = vars(self).pop("_executor", None)
        if executor is not None and executor is not self._running:
            executor.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def train(
        self, work: Iterable[Sequence[Work]], job: Job
    ) -> Iterator[tuple[Sequence[Work], list[Trained] | None]]:
        """Each group with its clients at their end; None for one that does not fit in memory."""
        sent: list[Sequence[Work]] = []

        def calls() -> Iterator[Callable[[], Any]]:
            for group in work:
                sent.append(group)
                yield partial(_train, self._part, job.round, job.lr, job.seed, _sent(group))

        for ended in deal(self._executor, calls(), self._count):
            group = sent.pop(0)
            if ended is None:
                yield group, None
                continue
            pairs = zip(group, ended, strict=True)
            yield group, [_received(one, start.start.scaling) for start, one in pairs]

    def outputs(self, name: str, adapter: AdapterState) -> Tensor:
        """The task's outputs for the rows of this name, (rows, width), as in one process."""
        examples = self._rows[name]
        batches = len(in_batches(examples))
        count = min(self._count, batches)
        held = _packed(adapter, {}), dict(adapter.scaling)
        # batches are ordered by length: every count-th gives each process as much to do
        calls = (partial(_outputs, self._part, name, held, first, count) for first in range(count))
        found: list[Any] = [None] * batches
        for first, parts in enumerate(deal(self._executor, calls, self._count)):
            found[first::count] = [torch.tensor(part) for part in parts]
        return in_order(examples, found)

    def measure(
        self, clients: Iterable[tuple[AdapterState, Examples | None]], on_server: bool
    ) -> Iterator[tuple[dict[str, float], Evaluation]]:
        """Metrics of each adapter on the client's own rows, and ``on_server`` on the server's."""

        def calls() -> Iterator[Callable[[], tuple[dict[str, float], Evaluation]]]:
            for adapter, rows in clients:
                own = None if rows is None else (_packed(_tensors_of(rows), {}), rows.truncated)
                held = _packed(adapter, {}), dict(adapter.scaling)
                yield partial(_measure, self._part, held, own, on_server)

        return deal(self._executor, calls(), self._count)


@dataclass(frozen=True)
class InWorkers:
    """Deals the groups of ``here`` out to a worker pool. Results are those of ``here``, to the bit.

    Groups are formed before they are dealt, and what comes back is used in the cohort's order.
    Where a group does not fit in memory, it and all groups after it are formed again, as ``here``
    does.
    """

    here: InProcess
    pool: WorkerPool

    def clients(self) -> Mapping[str, int]:
        """Every client, always."""
        return self.here.clients()

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """Train the cohort's groups, the largest first."""
        left = job.cohort
        while left:
            groups = self.here.groups(left)
            work = ([self.here.prepare(assigned) for assigned in group] for group in groups)
            for group, (_, ended) in zip(groups, self.pool.train(work, job), strict=False):
                if ended is None:
                    self.here.halve(len(group))
                    break
                for assigned, trained in zip(group, ended, strict=True):
                    yield self.here.finish(method, assigned, trained)
                left = left[len(group) :]

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterator[ClientMetrics]:
        """Each client's metrics; on the server's rows only if adapters are personal."""
        asked = list(clients)
        each = ((self.here.held_by(one), self.here.held_out(one.info.id)) for one in asked)
        found = self.pool.measure(each, on_server=bool(method.personal_roles))
        for assigned, (held_out, server) in zip(asked, found, strict=True):
            yield ClientMetrics(assigned.info.id, held_out, server)


def all_processes(config: RunConfig) -> Processes:
    """As many processes as runs of this configuration may need; none is started yet."""
    each, workers = cards(config), config.train.workers
    return Processes(workers if workers != "auto" else len(each) or usable_cores(), each)


def cards(config: RunConfig) -> list[str]:
    """CUDA's names of the cards that this process sees, of which each worker takes one; empty where
    each takes all."""
    if config.device != "cuda" or config.model.device_map == "auto":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]


# what travels


def _packed(tensors: Mapping[str, Tensor], seen: dict[int, Any]) -> Arrays:
    """The tensors as arrays; one that has been ``seen`` is the same array, and travels once."""
    return {name: seen.setdefault(id(t), t.numpy()) for name, t in tensors.items()}


def _unpacked(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _sent(group: Sequence[Work]) -> list[tuple[str, Any, Adapter, int, Arrays]]:
    seen: dict[int, Any] = {}
    return [
        (
            work.client,
            work.rows.numpy(),
            (_packed(work.start, seen), dict(work.start.scaling)),
            work.steps,
            _packed(work.moments, seen),
        )
        for work in group
    ]


def _received(ended: tuple[Arrays, float, int, int, Arrays], scaling: Any) -> Trained:
    arrays, loss, steps, moved, moments = ended
    return Trained(AdapterState(_unpacked(arrays), scaling), loss, steps, moved, _unpacked(moments))


def _tensors_of(examples: Examples) -> dict[str, Tensor]:
    """All tensors of the rows but their prefix, which has a file of its own."""
    names = [field.name for field in fields(examples) if field.name != "prefix"]
    found = {name: getattr(examples, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


# what a process does


class _Here:
    """The run that this process works for; it takes one call at a time."""

    part: Part | None = None
    experiment: Any = None
    turn = threading.Lock()


def _load(part: Part) -> None:
    """Load what the run needs."""
    with _Here.turn:
        _experiment(part)


def _train(
    part: Part,
    round: int,
    lr: float,
    seed: int,
    group: Sequence[tuple[str, Any, Adapter, int, Arrays]],
) -> list[tuple[Arrays, float, int, int, Arrays]] | None:
    """Train a group; None if that takes more memory than there is."""
    with _Here.turn:
        run = _experiment(part)
        work = [
            Work(client, torch.tensor(rows), _adapter(start), steps, _unpacked(moments))
            for client, rows, start, steps, moments in group
        ]
        parts = run.base, run.task, run.examples, work, run.method, run.settings
        try:
            ended = train_group(*parts, lr=lr, seed=seed, round=round)
        except RuntimeError as error:
            if not starved(error):
                raise
            return None
        return [
            (_packed(t.adapter, {}), t.loss, t.steps, t.moved, _packed(t.moments, {}))
            for t in ended
        ]


def _outputs(part: Part, name: str, adapter: Adapter, first: int, step: int) -> list[Any]:
    """The task's outputs for some batches of the rows of this name, ``step`` apart."""
    with _Here.turn:
        run = _experiment(part)
        examples: Examples = getattr(run, name)
        with run.base.holding(_adapter(adapter)):
            batches = in_batches(examples)[first::step]
            return [one.numpy() for one in outputs_of(run.base, run.task, examples, batches)]


def _measure(
    part: Part, adapter: Adapter, own: tuple[Arrays, int] | None, on_server: bool
) -> tuple[dict[str, float], Evaluation]:
    """Metrics of an adapter on these rows and, ``on_server``, on the server's."""
    with _Here.turn:
        run, held, held_out = _experiment(part), _adapter(adapter), dict[str, float]()
        if own is not None:
            rows = Examples(**_unpacked(own[0]), truncated=own[1])
            held_out = evaluate(run.base, run.task, rows, held)
        return held_out, run.evaluate(held, answers=0) if on_server else Evaluation()


def _adapter(sent: Adapter) -> AdapterState:
    return AdapterState(_unpacked(sent[0]), sent[1])


def _experiment(part: Part) -> Any:
    """This process's part of the run, made once; the base model is kept for a run like it."""
    torch.set_num_threads(part.threads)
    if _Here.part != part:
        try:
            _Here.experiment = _made(part)
        except RoloraError as error:
            raise RoloraError(f"a worker process on {platform.node()}: {error}") from None
        _Here.part = part
    return _Here.experiment


def _versions() -> tuple[str, ...]:
    return tuple(f"{name} {version(name)}" for name in ("rolora", "torch", "transformers"))


def _made(part: Part) -> Any:
    if (own := _versions()) != part.versions:
        there, here = ", ".join(part.versions), ", ".join(own)
        raise ConfigError(f"it has {here}, and the run {there}: install the same versions")
    config, before = part.config, _Here.part
    same = before is not None and _loads(before) == _loads(part)
    base = _Here.experiment.base if same else None
    _Here.part = _Here.experiment = None
    gc.collect()  # weights are in reference cycles, and would stay beside those to come
    run = part.make(config, labels=part.labels, base=base)
    if run.base.digest != part.base:
        raise ConfigError(f"the base model {config.model.path} is not the one that the run has")
    given: dict[str, Any] = {}
    for name, file in part.files.items():
        given[name] = _read(file)
        if name in part.cached:
            folder = config.root / from_home(config.train.cache)
            given[name], note = kept_below(run.base, given[name], folder)
            if given[name].prefix is None:
                raise ConfigError(f"train.cache: {note}")
    given["encoded"] = given.pop("examples"), ""
    return part.make(config, labels=part.labels, base=run.base, **given)


def _loads(part: Part) -> tuple[Any, ...]:
    """What a loaded base model depends on."""
    config = part.config
    return config.model, config.lora, config.device, config.train.recompute, part.labels, part.base


def _read(file: Path) -> Examples:
    """Rows that were written for the processes, mapped from their file."""
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return Examples(**tensors, truncated=int(stored.metadata()["truncated"]))
