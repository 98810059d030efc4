"""What is compared: methods, seeds, how settings are tuned, and the runs that follow.

Each method is tuned on tuning seeds and validation rows. The final runs use other seeds, are
measured on test rows, and start only when the choice is on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rolora.comparison.budget import Timing
from rolora.comparison.tuning import Grid, Setting, make_grids, refuse_unfair, settings
from rolora.comparison.variants import method_of, variant_overrides
from rolora.config.load import PLACES, make_config, refuse_idle
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError
from rolora.methods import get_method
from rolora.results.tuned import Tuning
from rolora.run.experiment import Experiment
from rolora.training.rounds import evaluated_rounds

TUNE_SEEDS = (100, 101)
VALIDATION = 0.1  # of the training rows, if the configuration has no validation rows

Stage = Literal["tuning", "final"]


@dataclass(frozen=True)
class PlannedRun:
    """A run of the comparison, done or not, with the tuned values and its folder ``path``."""

    stage: Stage
    method: str
    setting: Setting
    path: Path
    config: RunConfig

    @property
    def rounds(self) -> list[Timing]:
        """Its rounds, of which the evaluation before training is the first."""
        config, rounds = self.config, self.config.train.rounds
        method = get_method(config.method.name, **config.method.options)
        evaluated = evaluated_rounds(method, rounds, config.eval.every)
        return [Timing(round, round in evaluated) for round in range(rounds + 1)]


@dataclass(frozen=True)
class Comparison:
    """Methods, each with overrides of its own, on the same rows, cohorts and batches.

    ``methods`` is in the order of the table; the first is the reference. Each method that has a
    grid is tuned on ``tune_seeds`` in runs of ``tune_rounds`` rounds; ``config`` then has
    validation rows, and ``cut_validation`` tells whether they were cut from the training rows
    because the configuration had none.
    """

    config: RunConfig
    methods: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    grids: Mapping[str, Grid] = field(default_factory=dict)
    tune_seeds: tuple[int, ...] = ()
    tune_rounds: int = 0
    cut_validation: bool = False

    def configured(self, method: str, seed: int, more: Sequence[str] = ()) -> RunConfig:
        """The configuration of one run; ``more`` overrides the method's own overrides."""
        values, name = self.config.model_dump(mode="json", exclude_none=True), method_of(method)
        own = values["method"] if self.config.method.name == name else {"name": name}
        overrides = [*variant_overrides(method), *self.methods[method], *more]
        values = {**values, "method": own, "seed": seed}
        config = make_config(values, overrides, root=self.config.root)
        refuse_idle(config.aggregate)
        config = config.model_copy(update={"track": self.config.track})
        _ = Experiment(config).method  # raises before the first run starts
        return config

    def tuning_runs(self, path: Path) -> list[PlannedRun]:
        """The tuning runs, seed by seed."""
        fixed = ("eval.rows=validation", f"train.rounds={self.tune_rounds}")
        return [
            PlannedRun(
                "tuning",
                method,
                setting,
                path / "tuning" / f"{method}-{'-'.join(setting)}-seed{seed}".replace("/", "_"),
                self.configured(method, seed, (*setting, *fixed)),
            )
            for seed in self.tune_seeds
            for method, grid in self.grids.items()
            for setting in settings(grid)
        ]

    def final_runs(self, path: Path, tuning: Tuning | None) -> list[PlannedRun]:
        """The final runs, seed by seed; before the choice, with the first setting of the grid."""
        first = {method: settings(grid)[0] for method, grid in self.grids.items()}
        chosen = {m: tuning.best(m) if tuning else first.get(m, ()) for m in self.methods}
        return [
            PlannedRun(
                "final",
                method,
                setting,
                path / f"{method}-seed{seed}",
                self.configured(method, seed, setting),
            )
            for seed in self.seeds
            for method, setting in chosen.items()
        ]

    def tuned_on(self) -> str:
        """A description of the rows that settings are tuned on."""
        source = self.config.data.validation
        if not isinstance(source, float):
            return f"validation rows ({source})"
        where = f"validation rows: {source:.0%} of the training rows (data.validation = {source})"
        unset = ", cut off because the configuration names none"
        return where + (unset if self.cut_validation else "") + "; no run trains on them"

    def record(self) -> dict[str, Any]:
        """Everything that the results depend on, as JSON: only the same comparison is resumed.

        Not where files are: hashes tell whether rows and model are the same.
        """
        tuned = {
            "tune": {method: dict(grid) for method, grid in self.grids.items()},
            "tune seeds": list(self.tune_seeds),
            "tune rounds": self.tune_rounds,
        }
        config = self.config.model_dump(mode="json", exclude={"seed", "method", "federation"})
        del config["eval"]["samples"]
        for place in PLACES:
            section, _, key = place.partition(".")
            if isinstance(config.get(section, {}).get(key), str):  # a share of rows is no place
                del config[section][key]
        return {
            **config,
            "method": self.config.method.model_dump(mode="json"),
            "methods": list(self.methods),  # in the order of the table
            "alone": {method: list(own) for method, own in self.methods.items() if own},
            "seeds": list(self.seeds),
            **(tuned if self.grids else {}),
        }


def plan(
    config: RunConfig,
    methods: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    tune: Sequence[str] = (),
    tune_seeds: Sequence[int] = TUNE_SEEDS,
    tune_rounds: int | None = None,
) -> Comparison:
    """A comparison whose runs all have valid configurations.

    ``methods`` maps each method to its own overrides; ``tune`` holds grids (see ``make_grids``),
    tried on ``tune_seeds`` in runs of ``tune_rounds`` rounds (None: ``train.rounds``). If there are
    grids but no validation rows, ``VALIDATION`` of the training rows become them. ConfigError for
    anything that cannot be compared.
    """
    if config.federation.on:
        raise ConfigError(
            "compare runs on this machine only: remove federation.on, or start each method with "
            "rolora run"
        )
    if not methods or not seeds:
        raise ConfigError("a comparison needs at least one method and one seed")
    _refuse_repeated("seed", seeds)
    grids = make_grids(tune, list(methods)) if tune else {}
    rounds = config.train.rounds if tune_rounds is None else tune_rounds
    cut = bool(tune) and config.data.validation is None
    if tune:
        _check_tuning(grids, methods, seeds, tune_seeds, rounds)
    if cut:
        data = config.data.model_copy(update={"validation": VALIDATION})
        config = config.model_copy(update={"data": data})
    for method, overrides in methods.items():
        for text in overrides:
            if (key := _key(text)) != "train.rounds":
                refuse_unfair(key, f"{method}:{text}")
    own = {method: tuple(overrides) for method, overrides in methods.items()}
    comparison = Comparison(config, own, tuple(seeds), grids, tuple(tune_seeds), rounds, cut)
    comparison.tuning_runs(Path())
    alike: dict[str, str] = {}
    for run in comparison.final_runs(Path(), None)[: len(own)]:
        other = alike.setdefault(run.config.model_dump_json(), run.method)
        if other != run.method:
            raise ConfigError(f"methods {other!r} and {run.method!r} are the same")
    return comparison


def _check_tuning(
    grids: Mapping[str, Grid],
    methods: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    tune_seeds: Sequence[int],
    tune_rounds: int,
) -> None:
    _refuse_repeated("tuning seed", tune_seeds)
    if not tune_seeds:
        raise ConfigError("tuning needs at least one seed")
    if tune_rounds < 1:
        raise ConfigError(f"--tune-rounds {tune_rounds}: a run needs at least one round")
    if both := sorted(set(tune_seeds) & set(seeds)):
        raise ConfigError(
            f"seed {both[0]} is in --seeds and --tune-seeds: the final runs need fresh seeds"
        )
    for method, overrides in methods.items():
        if both_keys := grids[method].keys() & set(map(_key, overrides)):
            key = min(both_keys)
            raise ConfigError(f"{method}:{key} is both fixed and in --tune: remove one of them")


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _refuse_repeated(what: str, seeds: Sequence[int]) -> None:
    if again := [seed for seed in seeds if list(seeds).count(seed) > 1]:
        raise ConfigError(f"{what} {again[0]} is listed twice")
