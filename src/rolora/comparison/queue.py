"""The runs of a comparison, one after another: tuning, the choice, the table, the page."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rolora.comparison.budget import Length, Tally, refuse_spent
from rolora.comparison.folder import ComparisonFolder, tally
from rolora.comparison.grid import Comparison, PlannedRun, Search, plan
from rolora.comparison.tuning import choose, grids, settings
from rolora.comparison.variants import listed
from rolora.config.load import read_toml
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, RoloraError
from rolora.model.base import Base
from rolora.report.page import write_report
from rolora.results.published import Published
from rolora.results.runs import load_run, primary_metric, sound
from rolora.results.tuned import Tuning
from rolora.run.experiment import Experiment
from rolora.run.runs import Run, pinned, resume, start

TUNE_SEEDS = (100, 101)


@dataclass(frozen=True)
class QueuedRun:
    """A run whose turn it is, ``number`` of ``of``.

    ``tally`` is of all rounds before, ``ahead`` of all runs after; ``budget`` in core-seconds.
    """

    run: Run
    planned: PlannedRun
    number: int
    of: int
    tally: Tally
    ahead: Length
    budget: float | None

    def seconds_left(self, tally: Tally, round: int) -> float | None:
        """Of the whole comparison, when this run has done ``round``; None if nobody can say."""
        config = self.planned.config
        own = Length.of(config.train.rounds, config.eval.every, round)
        return tally.estimate(own.plus(self.ahead))

    def refuse_spent(self, tally: Tally, round: int) -> None:
        """Raise BudgetSpent if there is a budget, nothing is left of it, and work is."""
        if round < self.planned.config.train.rounds:
            left = self.seconds_left(tally, round)
            refuse_spent(self.budget, tally, self.number - 1, self.of, left)


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

    Each of ``methods`` is a name, or ``NAME+OPTION=VALUE``. ``only`` maps a method to overrides for
    it alone. ``tune`` are grids such as ``train.lr=1e-3,1e-2``: each method's best values on
    ``tune_seeds`` (by validation rows, in runs of ``tune_rounds``) are then used on ``seeds``.

    Yields each run that is still to do; iterate its ``rounds()`` to the end. After the last one
    ``out/report.html`` compares them all. Called again with the same arguments it goes on where it
    stopped; ConfigError if ``out`` is of another comparison.
    """
    named = {method: tuple((only or {}).get(method, ())) for method in listed(",".join(methods))}
    search = make_search(config, tune, methods, tune_seeds, tune_rounds)
    path = Path(out) if out is not None else Path("runs") / f"{config.name}-compare"
    for turn in turns(plan(config, named, seeds, search), path):
        yield turn.run


def make_search(
    config: RunConfig,
    tune: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    rounds: int | None,
) -> Search | None:
    """The search that these grids ask for; None without a grid."""
    if not tune:
        return None
    rounds = config.train.rounds if rounds is None else rounds
    return Search(grids(tune, methods), tuple(seeds), rounds)


def turns(
    comparison: Comparison,
    path: Path,
    published: Published | None = None,
    budget: float | None = None,
) -> Generator[QueuedRun]:
    """The runs that are still to do, each begun or taken up; then ``path/report.html``.

    The caller runs each to its end before asking for the next, else RoloraError. BudgetSpent, when
    ``budget`` core-seconds are used up, leaves everything to go on from.
    """
    folder = ComparisonFolder(path)
    with folder.opened(comparison):
        every = [*comparison.tuning_runs(path), *comparison.final_runs(path, None)]
        if (origin := _origin(every)) is not None:
            torch.set_num_threads(origin["threads"])
        loaded: tuple[str, Base] | None = None
        for planned in _pending(comparison, folder):
            number = [one.path for one in every].index(planned.path) + 1
            after = [one.length for one in every[number:] if not folder.ended(one)]
            ahead = functools.reduce(Length.plus, after, Length(0, 0))
            so_far = tally(every)
            wanted = so_far.estimate(planned.length.plus(ahead))
            refuse_spent(budget, so_far, number - 1, len(every), wanted)
            run = _begin(planned, every, loaded)
            loaded = (_needs(planned), run.experiment.base)
            yield QueuedRun(run, planned, number, len(every), so_far, ahead, budget)
            if not folder.ended(planned):
                raise RoloraError(f"{planned.path} was left before its end: start again to go on")
        finals = [one.path for one in comparison.final_runs(path, None)]
        write_report(finals, folder.report, folder.tuning(), published)


def _pending(comparison: Comparison, folder: ComparisonFolder) -> Iterator[PlannedRun]:
    """Every run that is not ended. Between tuning and table the choice is written down."""
    yield from (one for one in comparison.tuning_runs(folder.path) if not folder.ended(one))
    if comparison.search is not None and not folder.tuning_file.is_file():
        folder.write_tuning(_choose(comparison, comparison.search, folder.path))
    finals = comparison.final_runs(folder.path, folder.tuning())
    yield from (one for one in finals if not folder.ended(one))


def _choose(comparison: Comparison, search: Search, path: Path) -> Tuning:
    found = {one.path: load_run(one.path) for one in comparison.tuning_runs(path)}
    metric = comparison.config.eval.metric or primary_metric(sound(list(found.values())))
    tuned = []
    for method, grid in search.grids.items():
        scores = {
            setting: [
                None if (run := found[at.path]).diverged else run.curve(metric)[-1].value
                for at in (comparison.tuning_run(path, method, setting, s) for s in search.seeds)
            ]
            for setting in settings(grid)
        }
        tuned.append(choose(method, grid, scores, metric))
    return Tuning(
        metric=metric,
        rows=comparison.rows_in_words(),
        seeds=list(search.seeds),
        rounds=search.rounds,
        methods=tuned,
    )


def _origin(every: Sequence[PlannedRun]) -> dict[str, Any] | None:
    """What the first of the runs was made with; None if none has been begun."""
    first = next((one for one in every if (one.path / "config.toml").is_file()), None)
    if first is None:
        return None
    return {**read_toml(first.path / "config.toml")["provenance"], "needs": _needs(first)}


def _begin(
    planned: PlannedRun, every: Sequence[PlannedRun], loaded: tuple[str, Base] | None
) -> Run:
    """Start the run, or take it up. All runs go with the bank and dtype of the first."""
    origin, needs = _origin(every), _needs(planned)
    base = loaded[1] if loaded is not None and loaded[0] == needs else None

    def build(config: RunConfig, folder: Path) -> Experiment:
        experiment = Experiment(config, folder, base=base)
        known = origin is not None and origin["needs"] == needs
        if origin is not None and known and experiment.base.digest != origin["base"]:
            raise ConfigError("the base model changed since the comparison began: change it back")
        return experiment

    if planned.path.exists():
        return resume(planned.path, build=build)
    if origin is None:
        return start(planned.config, planned.path, build)
    return start(planned.config, planned.path, lambda c, f: build(pinned(c, origin), f))


def _needs(planned: PlannedRun) -> str:
    """What a loaded base model depends on: runs that agree in it can share one."""
    config = planned.config
    parts = config.model_dump_json(include={"model", "lora", "device"})
    return f"{parts} {config.train.recompute}"
