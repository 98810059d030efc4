"""Start and resume runs: the library behind the commands."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rolora.algorithm.adapter import Failure, Update
from rolora.config.load import (
    PLACES,
    config_hash,
    dump_config,
    load_config,
    read_toml,
    relative_root,
)
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, ModelNotHere, NotHere
from rolora.files import write_file
from rolora.model.base import tokenizer_digest
from rolora.model.peft import save_adapter
from rolora.report.card import Source, card
from rolora.report.page import write_report
from rolora.results.runs import load_run
from rolora.run.environment import git_commit, processor
from rolora.run.experiment import Experiment
from rolora.run.folder import RunFolder, as_json, line
from rolora.run.place import new_path
from rolora.run.samples import samples
from rolora.run.settings import dated
from rolora.run.tracking import require_trackers, tracking
from rolora.tasks.spans import masks
from rolora.training.local import NonFiniteLoss
from rolora.training.rounds import RoundResult, RunState, federate


@dataclass(frozen=True)
class Run:
    """A run with its folder and the state to continue from, that of its newest ``checkpoint``."""

    experiment: Experiment
    folder: RunFolder
    state: RunState
    notes: tuple[str, ...]
    checkpoint: str = ""

    def rounds(
        self, arrived: Callable[[Update | Failure], None] = lambda reply: None
    ) -> Generator[RoundResult]:
        """Train; each round is on disk before it is yielded.

        At the end the adapter and the report are written. ``arrived`` is called with each client's
        reply as it comes. A loss that is not finite ends the run and is recorded in its
        folder. ConfigError if the folder is in use, or has advanced since this run was opened.
        """
        federation = replace(self.experiment.federation, arrived=arrived)
        track = tracking(self.experiment.config, self.folder)
        pool = self.experiment.worker_pool
        workers = contextlib.nullcontext() if pool is None else contextlib.closing(pool)
        with self.folder.locked(), workers, track as tracked:
            if self.folder.newest != self.checkpoint:
                raise ConfigError(
                    f"{self.folder.path} has advanced since this run was opened: resume it again"
                )
            if pool is not None and self.state.server.round < federation.rounds:
                pool.begin()  # loading is not part of a round
            state, results = self.state, federate(federation, self.state)
            while (result := self._committed(results)) is not None:
                state = result.state
                if result.advanced:
                    tracked(line(result))
                yield result
            self._finish(state)

    def _committed(self, results: Iterator[RoundResult]) -> RoundResult | None:
        """The next round, on disk; None at the end."""
        try:
            if (result := next(results, None)) is not None:
                self.folder.commit(result)
            return result
        except NonFiniteLoss as error:
            write_file(self.folder.diverged, f"{error}\n")
            raise

    def _finish(self, state: RunState) -> None:
        """Write the adapter of the best validated round (of the last, without validation)."""
        adapter = state.best.adapter if state.best else state.server.adapter
        round = state.best.round if state.best else state.server.round
        base = self.experiment.base
        config = pinned(self.experiment.config, _chosen(self.experiment))
        notes = {
            "rolora": version("rolora"),
            "round": round,
            "root": relative_root(config, self.folder.adapter),
            "base": base.digest,
            "tokenizer": tokenizer_digest(base),
            "init_from": self.experiment.init_hash,
            "labels": list(self.experiment.labels),
            "config": config.model_dump(mode="json", exclude_none=True),
        }
        save_adapter(
            self.folder.adapter,
            adapter,
            base.peft_config,
            base.model.config,
            base.tokenizer,
            notes,
            card(load_run(self.folder.path), round, card_source(self.experiment)),
        )
        if written := samples(self.experiment, adapter):
            write_file(self.folder.samples, as_json(written))
        write_report([self.folder.path], self.folder.report)


def card_source(experiment: Experiment) -> Source:
    """What a model card says of this experiment's adapter."""
    base = experiment.base
    return Source(
        base.peft_config.base_model_name_or_path,
        base.digest,
        base.licence,
        list(base.specs.scaling),
        experiment.labels,
        experiment.kind.head == "causal_lm",
        sorted(experiment.method.personal_roles),
    )


Build = Callable[..., Experiment]  # from a configuration and the folder of clients' state


def start(
    config: RunConfig,
    out: str | Path | None = None,
    build: Build = Experiment,
    *,
    executor: Executor | None = None,
) -> Run:
    """A new run in folder ``out`` (``runs/NAME`` if left out), which must not exist yet.

    ``build`` makes the experiment from the configuration and the folder of clients' state.
    ``executor`` runs the worker processes, for example on a cluster: see docs/scale.md. Everything
    is loaded and checked first, so a faulty configuration leaves no folder behind.
    """
    path, config = new_path(config, out), dated(config)
    require_trackers(config.track)
    experiment = _on(executor, build)(config, path / "clients")
    experiment.prepare()
    several = experiment.worker_pool is not None and config.device == "cpu"
    many = torch.get_num_threads() > 1 and "OMP_NUM_THREADS" not in os.environ
    if several and many:  # each process has a core
        torch.set_num_threads(1)
        experiment = experiment.reloaded()
        experiment.prepare()
    drawn = {"server_seed": experiment.config.server_seed}
    text = dump_config(config.model_copy(update=drawn), provenance(experiment), path)
    folder = RunFolder.create(path, text, experiment.partition, experiment.axes)
    return Run(experiment, folder, experiment.start, tuple(experiment.notes))


def resume(
    path: str | Path,
    rounds: int | None = None,
    build: Build = Experiment,
    *,
    overrides: Sequence[str] = (),
    root: str | Path | None = None,
    executor: Executor | None = None,
) -> Run:
    """A run as of its last intact checkpoint; ``rounds`` raises the number of rounds.

    Where files have moved, ``root`` is the folder that relative paths start from, and ``overrides``
    give new ``PLACES``, such as ``model.path=NEW``, or ``train.workers``. Threads, bank and dtype
    stay as they were, because bits depend on them. Raises ConfigError if the data, the base model
    or the configuration has changed since the start.
    """
    folder = RunFolder.open(Path(path))
    with folder.locked():
        config, origin = stored(folder, overrides, root)
        if rounds is not None:
            config = load_config(folder.config, [*overrides, f"train.rounds={rounds}"], config.root)
        require_trackers(config.track)
        wanted = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else origin["threads"]
        torch.set_num_threads(origin["threads"])
        try:
            experiment = _on(executor, build)(pinned(config, origin), folder.clients)
            experiment.prepare()
        except (NotHere, ModelNotHere) as error:
            error.add_note(
                f"if it has moved: rolora resume {shlex.quote(str(path))} --root FOLDER, or "
                "KEY=PLACE"
            )
            raise
        now = provenance(experiment)
        for key, what in _SAME.items():
            if now[key] != origin[key]:
                raise ConfigError(
                    f"{what} of {path} changed since the run started: change it back, or start "
                    f"again with: rolora run {folder.config} --out NEW_FOLDER"
                )
        state, notes = folder.restore(experiment.start)
        if wanted != origin["threads"]:
            threads = "1 thread" if origin["threads"] == 1 else f"{origin['threads']} threads"
            notes.append(f"it continues on {threads}, as it began: OMP_NUM_THREADS is not used")
        checkpoint = folder.newest
        if rounds is not None and rounds < state.server.round:
            raise ConfigError(f"{path} has already done {state.server.round} rounds")
        if rounds is not None:
            folder.report.unlink(missing_ok=True)  # marks the end, which now lies ahead
            folder.samples.unlink(missing_ok=True)
        write_file(folder.axes, as_json(experiment.axes))  # older runs have none
        if rounds is not None or overrides or root is not None:
            write_file(folder.config, dump_config(config, origin, folder.path))
    for key, what in _ALIKE.items():
        if now[key] != origin[key]:
            notes.append(f"the {what} changed since the run started, so the last bits may differ")
    return Run(experiment, folder, state, (*experiment.notes, *notes), checkpoint)


def _on(executor: Executor | None, build: Build) -> Build:
    return build if executor is None else partial(build, executor=executor)


def stored(
    folder: RunFolder, overrides: Sequence[str] = (), root: str | Path | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """A run's configuration and provenance; see :func:`resume`. ConfigError for other overrides."""
    for text in overrides:
        if text.partition("=")[0].strip() not in (*PLACES, "train.workers"):
            raise ConfigError(
                f"{text}: a run keeps its settings. Only --rounds, train.workers and the places of "
                f"its files can change ({', '.join(PLACES)}), so start another with: rolora run "
                f"{shlex.quote(str(folder.config))} {shlex.quote(text)} --out NEW_FOLDER"
            )
    if root is not None and not Path(root).is_dir():
        raise ConfigError(f"--root {root} is not a folder")
    origin = read_toml(folder.config).get("provenance", {})
    if not isinstance(origin, dict):
        raise ConfigError(f"{folder.config} is damaged: provenance is not a table")
    if lost := {"root", "threads", "bank", "dtype", *_SAME, *_ALIKE} - origin.keys():
        raise ConfigError(f"{folder.config} is damaged: provenance.{min(lost)} is missing")
    return load_config(folder.config, overrides, root), origin


def training_masks(experiment: Experiment, rows: int) -> list[dict[str, list[tuple[str, bool]]]]:
    """The first training rows in runs of tokens, each with whether the loss is taken on it.

    Of a pair, those of its "chosen" and of its "rejected" completion; of any other row, of its
    "text". ConfigError for a task that learns from whole rows.
    """
    if experiment.kind.head != "causal_lm":
        raise ConfigError(f"{experiment.kind.name} trains on whole rows: there are no masks")
    base = experiment.load_base()
    table, source = experiment.rows.train.slice(0, rows), experiment.config.data.train
    examples = base.require_known(experiment.task_on(base).encode(table, source), source)
    shown = masks(examples.sequences, base.tokenizer)
    names = ("chosen", "rejected") if "chosen" in experiment.columns else ("text",)
    each = 2 if experiment.kind.compares else 1  # the second of KTO is of another row
    return [dict(zip(names, shown[n:], strict=False)) for n in range(0, len(shown), each)]


def provenance(experiment: Experiment) -> dict[str, Any]:
    """What a run depends on: versions, commit, processor, threads, hashes of the data."""
    packages = ("rolora", "torch", "transformers", "peft", "datasets", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {
        "versions": versions,
        "git_commit": git_commit(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        **_chosen(experiment),
        "prefix": experiment.cached,
        "data": experiment.data,
        "base": experiment.base.digest,
        **({"run": experiment.run} if experiment.run else {}),
        "init_from": experiment.init_hash,
        "config": config_hash(experiment.config),
    }


_SAME = {
    "data": "the data",
    "base": "the base model",
    "init_from": "the adapter of lora.init_from",
    "config": "the configuration",
}
_ALIKE = {"versions": "library versions", "cpu": "processor", "prefix": "use of the cache"}


def _chosen(experiment: Experiment) -> dict[str, Any]:
    """What "auto" resolves to on this machine."""
    return {"bank": experiment.bank, "dtype": experiment.dtype}


def pinned(config: RunConfig, origin: Mapping[str, Any]) -> RunConfig:
    """The configuration with the bank and dtype that ``origin`` recorded."""
    train = config.train.model_copy(update={"bank": origin["bank"]})
    model = config.model.model_copy(update={"dtype": origin["dtype"]})
    return config.model_copy(update={"train": train, "model": model})
