"""The runs of a comparison, one after another: tuning, the choice, the final runs, the page."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rolora.comparison.budget import Outlook, Timing
from rolora.comparison.folder import ComparisonFolder, rounds_done
from rolora.comparison.grid import TUNE_SEEDS, Comparison, PlannedRun, plan
from rolora.comparison.tuning import Setting, choose
from rolora.comparison.variants import checked_labels
from rolora.config.load import places, read_toml
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, RoloraError
from rolora.report.page import write_report
from rolora.results.published import Published
from rolora.results.runs import load_run, sorted_out
from rolora.results.tuned import Tuning
from rolora.run.experiment import Experiment, Parts
from rolora.run.runs import Build, Run, pinned, resume, start
from rolora.run.workers import all_processes
from rolora.training.processes import usable_cores


@dataclass(frozen=True)
class QueuedRun:
    """A run that is ready to start; ``done`` are all rounds of the comparison before it."""

    run: Run
    planned: PlannedRun
    outlook: Outlook
    done: Sequence[Timing]


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    tune: Sequence[str] = (),
    tune_seeds: Sequence[int] = TUNE_SEEDS,
    tune_rounds: int | None = None,
) -> Iterator[Run]:
    """One run per seed and method in ``out/METHOD-seedN``, on the same rows, cohorts and batches.

    Each of ``methods`` is a name, or ``NAME+OPTION=VALUE``. ``only`` maps a method to its own
    overrides. ``tune`` holds grids such as ``train.lr=1e-3,1e-2``: each method's best values on
    ``tune_seeds`` (by validation rows, in runs of ``tune_rounds``) are then used on ``seeds``.

    Yields each run that is still to do; iterate its ``rounds()`` to the end. After the last one
    ``out/report.html`` compares them all. Called again with the same arguments it continues where
    it stopped; ConfigError if ``out`` belongs to another comparison.
    """
    own = {method: tuple((only or {}).get(method, ())) for method in checked_labels(methods)}
    comparison = plan(config, own, seeds, tune, tune_seeds, tune_rounds)
    for queued in queued_runs(comparison, comparison_path(config, out)):
        yield queued.run


def comparison_path(config: RunConfig, out: str | Path | None) -> Path:
    """The comparison's folder, ``runs/NAME-compare`` by default."""
    return Path(out) if out is not None else Path("runs") / f"{config.name}-compare"


def queued_runs(
    comparison: Comparison,
    path: Path,
    published: Published | None = None,
    budget: float | None = None,
    build: Build = Experiment,
) -> Generator[QueuedRun]:
    """The runs that are still to do, each started or resumed; then ``path/report.html``.

    RoloraError if the caller asks for the next run before the last one has ended. BudgetSpent when
    ``budget`` core-seconds are used up; the comparison can then be continued. ``build`` makes a
    run's experiment, as for ``start``.
    """
    folder = ComparisonFolder(path)
    yield from queue_all({path: comparison}, budget, build)
    finals = [one.path for one in comparison.final_runs(path, None)]
    write_report(finals, folder.report, folder.tuning(), published)


def queue_all(
    comparisons: Mapping[Path, Comparison],
    budget: float | None = None,
    build: Build = Experiment,
) -> Generator[QueuedRun]:
    """The runs of several comparisons, one after another, as ``queued_runs``, but without pages.

    ``comparisons``: folder -> its comparison. They share one loaded base model and one budget.
    """
    parts = [(ComparisonFolder(path), comparison) for path, comparison in comparisons.items()]
    parts = [(folder, folder.dated(comparison)) for folder, comparison in parts]
    with contextlib.ExitStack() as held:
        for folder, comparison in parts:
            held.enter_context(folder.opened(comparison))
        owner = {
            one.path: (folder, one)
            for folder, comparison in parts
            for one in (
                *comparison.tuning_runs(folder.path),
                *comparison.final_runs(folder.path, None),
            )
        }
        every, paths = [one for _, one in owner.values()], list(owner)
        if (origin := _origin(every)) is not None:
            torch.set_num_threads(origin["threads"])
        processes = held.enter_context(all_processes(every[0].config)) if every else None
        loaded: dict[str, Parts] = {}
        done = rounds_done(every)
        queue = ((place, one) for place, compared in parts for one in _pending(compared, place))
        for folder, planned in queue:
            number = paths.index(planned.path) + 1
            later = (owner[path] for path in paths[number:])
            after = [timing for own, one in later if not own.ended(one) for timing in one.rounds]
            workers = planned.config.train.workers
            most = usable_cores() if workers == "auto" else workers
            outlook = Outlook(number, len(every), planned.rounds, after, budget, most)
            outlook.refuse_spent(done)
            before = rounds_done([planned])
            given = partial(build, processes=processes)
            run = _begin(planned, every, loaded, given)
            loaded = _loaded(run.experiment, planned.config)
            yield QueuedRun(run, planned, outlook, done)
            if not folder.ended(planned):
                raise RoloraError(f"{planned.path} did not finish: start again to continue")
            done = [*done, *rounds_done([planned])[len(before) :]]


def _pending(comparison: Comparison, folder: ComparisonFolder) -> Iterator[PlannedRun]:
    """Every run that has not ended. The choice is saved after tuning, before the final runs."""
    yield from (one for one in comparison.tuning_runs(folder.path) if not folder.ended(one))
    if comparison.grids and not folder.tuning_file.is_file():
        folder.write_tuning(_choose(comparison, folder.path))
    finals = comparison.final_runs(folder.path, folder.tuning())
    yield from (one for one in finals if not folder.ended(one))


def _choose(comparison: Comparison, path: Path) -> Tuning:
    planned = comparison.tuning_runs(path)
    runs = [load_run(one.path) for one in planned]
    metric = comparison.config.eval.metric or sorted_out(runs).metric
    scores: dict[str, dict[Setting, list[float | None]]] = {}
    for one, run in zip(planned, runs, strict=True):
        score = None if run.diverged else run.last(metric)
        scores.setdefault(one.method, {}).setdefault(one.setting, []).append(score)
    return Tuning(
        metric=metric,
        rows=comparison.tuned_on(),
        seeds=list(comparison.tune_seeds),
        rounds=comparison.tune_rounds,
        methods=[choose(m, grid, scores[m], metric) for m, grid in comparison.grids.items()],
    )


def _origin(every: Sequence[PlannedRun]) -> dict[str, Any] | None:
    """The provenance of the first run that has been started, and the key of its base model."""
    first = next((one for one in every if (one.path / "config.toml").is_file()), None)
    if first is None:
        return None
    return {**read_toml(first.path / "config.toml")["provenance"], "key": _base_key(first.config)}


def _begin(
    planned: PlannedRun,
    every: Sequence[PlannedRun],
    loaded: Mapping[str, Parts],
    make: Build,
) -> Run:
    """Start or resume the run. All runs use the bank and dtype of the first."""
    origin, key = _origin(every), _base_key(planned.config)

    def build(config: RunConfig, folder: Path) -> Experiment:
        rows = f"{key} {_rows_key(planned.config)}"
        parts: Parts = {**loaded.get(key, {}), **loaded.get(rows, {})}
        experiment = make(config, folder, **parts)
        known = origin is not None and origin["key"] == key
        if origin is not None and known and experiment.base.digest != origin["base"]:
            raise ConfigError("the base model changed since the comparison began: restore it")
        return experiment

    if planned.path.exists():
        config = planned.config
        return resume(planned.path, build=build, overrides=places(config), root=config.root)
    if origin is None:
        return start(planned.config, planned.path, build)
    return start(planned.config, planned.path, lambda c, f: build(pinned(c, origin), f))


def _loaded(run: Experiment, planned: RunConfig) -> dict[str, Parts]:
    """What this run has loaded, by the planned settings that it depends on.

    The run's own settings have dtype and bank pinned. Tokens are the same however rows are split.
    """
    base = _base_key(planned)
    tokens: Parts = {"encoded": run.encoded, "test": run.test}
    return {base: {"base": run.base}, f"{base} {_rows_key(planned)}": tokens}


def _base_key(config: RunConfig) -> str:
    """What a loaded base model depends on: runs with the same key can share one."""
    parts = config.model_dump_json(include={"model", "lora", "device"})
    return f"{parts} {config.train.recompute}"


def _rows_key(config: RunConfig) -> str:
    """What the rows as tokens depend on, beside the base model and the files."""
    keys: dict[str, Any] = {"data": True, "partition": {"scheme"}, "eval": {"rows"}}
    keys["train"] = {
        "rounds",
        "participation",
        "local_steps",
        "local_epochs",
        "batch_size",
        "cache",
    }
    attack = Experiment(config).attack
    spoils = attack is not None and attack.spoil is not None  # the rows of the seed's bad clients
    if spoils or config.preference.loss == "kto":  # rows beside others of the seed's clients
        keys |= {"attack": True, "seed": True, "partition": True}
    return config.model_dump_json(include=keys)
