"""Sweeps of the linear model: one setting varied at a time, on several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rolora.errors import ConfigError, nearest
from rolora.theory.curves import simulate
from rolora.theory.linear_model import Setting, draw_problem

VALUES: dict[str, tuple[float, ...]] = {
    "clients": (1, 2, 5, 10, 20, 50),
    "dimension": (10, 25, 50, 100, 200, 400),
    "samples": (10, 20, 50, 100, 200, 500, 1000),
    "noise": (0.0, 0.01, 0.03, 0.1, 0.3, 1.0),
    "heterogeneity": (0.0, 0.2, 0.4, 0.6, 0.8, 0.95),
}
SEEDS = 5
FOUND = 1e-6  # below this sin θ, a* counts as found


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (0 for one seed) and range over the seeds."""

    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class SweepRow:
    """The results for one value. Sines and losses are those after the last round.

    ``rounds_until_found``: per seed, the first round after which RoLoRA's sin θ is below ``FOUND``,
    or None. ``fedit_error``: the aggregation error of FedAvg of LoRA in round 1.
    """

    value: float
    samples: int
    seeds: tuple[int, ...]
    rounds_until_found: tuple[int | None, ...]
    sin: Spread
    sin_fedit: Spread
    loss_rolora: Spread
    loss_ffa: Spread
    loss_fedit: Spread
    fedit_error: Spread


def plan_sweep(setting: Setting, name: str, seeds: int = SEEDS) -> list[tuple[Setting, ...]]:
    """For each of ``VALUES[name]`` the settings to run, with ``seeds`` seeds from ``setting.seed``.

    A sweep over ``clients`` keeps the total number of rows. ConfigError for an unknown name or a
    value that does not fit the other settings.
    """
    if name not in VALUES:
        raise ConfigError(f"no sweep over {name!r}: {nearest(name, VALUES)}")
    changed = [_with(setting, name, value) for value in VALUES[name]]
    return [tuple(replace(one, seed=one.seed + k) for k in range(seeds)) for one in changed]


def _with(setting: Setting, name: str, value: float) -> Setting:
    if name == "clients":
        total = setting.clients * setting.samples
        return replace(setting, clients=int(value), samples=max(1, total // int(value)))
    whole = name in ("dimension", "samples")
    changed: dict[str, Any] = {name: int(value) if whole else value}
    return replace(setting, **changed)


def measure(name: str, settings: Sequence[Setting]) -> SweepRow:
    """Run settings that differ only in their seed; ``name`` is the setting of the sweep."""
    outcomes = [simulate(draw_problem(setting)) for setting in settings]
    last = [outcome.rounds[-1] for outcome in outcomes]
    return SweepRow(
        value=getattr(settings[0], name),
        samples=settings[0].samples,
        seeds=tuple(setting.seed for setting in settings),
        rounds_until_found=tuple(outcome.rounds_until(FOUND) for outcome in outcomes),
        sin=_spread([one.sin for one in last]),
        sin_fedit=_spread([outcome.fedit_sin[-1] for outcome in outcomes]),
        loss_rolora=_spread([one.loss_rolora for one in last]),
        loss_ffa=_spread([one.loss_ffa for one in last]),
        loss_fedit=_spread([one.loss_fedit for one in last]),
        fedit_error=_spread([outcome.fedit_error[0] for outcome in outcomes]),
    )


def _spread(values: Sequence[float]) -> Spread:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), sd, min(values), max(values))
