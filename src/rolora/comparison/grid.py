"""What is compared: methods, seeds, how settings are tuned, and the runs that follow from it.

Each method's settings are chosen on seeds of their own and on validation rows. The runs of the
table use other seeds, are measured on test rows, and start only when the choice is on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rolora.comparison.budget import Length
from rolora.comparison.tuning import Grid, Setting, refuse_unfair, settings
from rolora.comparison.variants import method_of, variant_overrides
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError
from rolora.results.tuned import Tuning
from rolora.run.experiment import Experiment

VALIDATION = 0.1  # of the training rows, where the configuration has no validation rows

Stage = Literal["tuning", "final"]


@dataclass(frozen=True)
class Search:
    """How settings are tuned: a grid for each method, the seeds, and the rounds of a run."""

    grids: Mapping[str, Grid]
    seeds: tuple[int, ...]
    rounds: int


@dataclass(frozen=True)
class PlannedRun:
    """A run of the comparison, done or not, in folder ``path``."""

    stage: Stage
    method: str
    path: Path
    config: RunConfig

    @property
    def length(self) -> Length:
        """Of the whole run."""
        return Length.of(self.config.train.rounds, self.config.eval.every)


@dataclass(frozen=True)
class Comparison:
    """Methods (with overrides for each alone) on the same rows, cohorts and batches.

    ``methods`` is in the order of the table; the first is what the others are set against. With a
    ``search``, ``config`` has validation rows.
    """

    config: RunConfig
    methods: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    search: Search | None = None
    cut_validation: bool = False

    def settings(self, method: str, seed: int, more: Sequence[str] = ()) -> RunConfig:
        """The configuration of one run; ``more`` wins over what is for the method alone."""
        values, name = self.config.model_dump(mode="json", exclude_none=True), method_of(method)
        own = values["method"] if self.config.method.name == name else {"name": name}
        overrides = [*variant_overrides(method), *self.methods[method], *more]
        values = {**values, "method": own, "seed": seed}
        config = make_config(values, overrides, root=self.config.root)
        _ = Experiment(config).method  # refuses before the first run starts
        return config

    def tuning_run(self, path: Path, method: str, setting: Setting, seed: int) -> PlannedRun:
        """One run of the tuning stage."""
        if self.search is None:
            raise ValueError("this comparison tunes nothing")
        more = [*setting, "eval.rows=validation", f"train.rounds={self.search.rounds}"]
        name = f"{method}-{'-'.join(setting)}-seed{seed}".replace("/", "_")
        config = self.settings(method, seed, more)
        return PlannedRun("tuning", method, path / "tuning" / name, config)

    def tuning_runs(self, path: Path) -> list[PlannedRun]:
        """All runs of the tuning stage, seed by seed."""
        if self.search is None:
            return []
        return [
            self.tuning_run(path, method, setting, seed)
            for seed in self.search.seeds
            for method, grid in self.search.grids.items()
            for setting in settings(grid)
        ]

    def final_runs(self, path: Path, tuning: Tuning | None) -> list[PlannedRun]:
        """The runs of the table, seed by seed; before the choice, with the grid's first setting."""
        return [
            PlannedRun(
                "final",
                method,
                path / f"{method}-seed{seed}",
                self.settings(method, seed, self._setting(method, tuning)),
            )
            for seed in self.seeds
            for method in self.methods
        ]

    def _setting(self, method: str, tuning: Tuning | None) -> Setting:
        if tuning is not None:
            return tuning.best(method)
        return settings(self.search.grids[method])[0] if self.search else ()

    def rows_in_words(self) -> str:
        """The rows that settings are tuned on."""
        source = self.config.data.validation
        if not isinstance(source, float):
            return f"validation rows ({source})"
        where = f"validation rows: {source:.0%} of the training rows (data.validation = {source})"
        unset = ", cut off because the configuration names none"
        return where + (unset if self.cut_validation else "") + "; no run trains on them"

    def record(self) -> dict[str, Any]:
        """All that the results depend on, as JSON: a comparison goes on only with the same."""
        tuned = self.search and {
            "tune": {method: dict(grid) for method, grid in self.search.grids.items()},
            "tune seeds": list(self.search.seeds),
            "tune rounds": self.search.rounds,
        }
        return {
            **self.config.model_dump(mode="json", exclude={"seed", "method", "federation"}),
            "method": self.config.method.model_dump(mode="json"),
            "methods": list(self.methods),  # in the order of the table
            "alone": {method: list(own) for method, own in self.methods.items() if own},
            "seeds": list(self.seeds),
            **(tuned or {}),
        }


def plan(
    config: RunConfig,
    methods: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    search: Search | None = None,
) -> Comparison:
    """A comparison, checked as a whole: every run's configuration is valid.

    With a ``search`` and no validation rows, ``VALIDATION`` of the training rows become them.
    Raises ConfigError in one line.
    """
    if config.federation.on:
        raise ConfigError(
            "compare runs on this machine alone: leave out federation.on, or start each method "
            "with rolora run"
        )
    if not methods or not seeds:
        raise ConfigError("compare needs at least one method and one seed")
    _refuse_twice("seed", seeds)
    cut = search is not None and config.data.validation is None
    if search is not None:
        _refuse_search(search, methods, seeds)
    if cut:
        data = config.data.model_copy(update={"validation": VALIDATION})
        config = config.model_copy(update={"data": data})
    own = {method: tuple(overrides) for method, overrides in methods.items()}
    for method, overrides in own.items():
        for text in overrides:
            if (key := text.partition("=")[0].strip()) != "train.rounds":
                refuse_unfair(key, f"{method}:{text}")
    made = Comparison(config, own, tuple(seeds), search, cut)
    finals = made.final_runs(Path(), None)
    made.tuning_runs(Path())
    alike: dict[str, str] = {}
    for run in finals[: len(own)]:
        other = alike.setdefault(run.config.model_dump_json(), run.method)
        if other != run.method:
            raise ConfigError(f"methods {other!r} and {run.method!r} are the same")
    return made


def _refuse_search(
    search: Search, methods: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> None:
    _refuse_twice("tuning seed", search.seeds)
    if not search.seeds:
        raise ConfigError("tuning needs at least one seed")
    if search.rounds < 1:
        raise ConfigError(f"--tune-rounds {search.rounds}: a run needs at least one round")
    if both := sorted(set(search.seeds) & set(seeds)):
        raise ConfigError(
            f"seed {both[0]} is among --seeds and --tune-seeds: the table's seeds must be fresh"
        )
    for method, overrides in methods.items():
        fixed = {text.partition("=")[0].strip() for text in overrides}
        if key := next((key for key in search.grids[method] if key in fixed), None):
            raise ConfigError(f"{method}:{key} is fixed and in --tune: leave out one of them")


def _refuse_twice(what: str, seeds: Sequence[int]) -> None:
    if again := [seed for seed in seeds if list(seeds).count(seed) > 1]:
        raise ConfigError(f"{what} {again[0]} is there twice")
