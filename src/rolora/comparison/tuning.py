"""Which of several settings serves a method best: the grid, the choice, and the record of both.

The score of a setting is the mean over the tuning seeds of the metric at the end of the run, on
validation rows; of equal scores the first in the order of the grid is taken. ``tuning.json`` holds
all of it and is written before any run of the table is started.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from rolora.comparison.variants import addressed
from rolora.errors import ConfigError, RoloraError
from rolora.results.runs import better
from rolora.results.tuned import Trial, Tuned

Grid = Mapping[str, tuple[str, ...]]
Setting = tuple[str, ...]

SECTIONS = ("train", "method", "lora", "aggregate", "wire", "model")
FIXED = ("train.rounds", "method.name", "model.path", "model.task")


def grids(texts: Sequence[str], methods: Sequence[str]) -> dict[str, Grid]:
    """Method -> its grid, from ``key=value,value,...`` for all or ``METHOD:key=...`` for one.

    What is for one method takes the place of the same key for all. Raises ConfigError in one line
    for what is no grid, or would change what is compared.
    """
    for_all: dict[str, tuple[str, ...]] = {}
    own: dict[str, dict[str, tuple[str, ...]]] = {method: {} for method in methods}
    for text in texts:
        method, rest = addressed(text, methods)
        key, values = _axis(rest)
        grid = own[method] if method else for_all
        if key in grid:
            raise ConfigError(f"--tune {text}: {key} has a grid already; give all values in one")
        grid[key] = values
    found: dict[str, Grid] = {method: {**for_all, **grid} for method, grid in own.items()}
    for method, axes in found.items():
        if not axes:
            raise ConfigError(f"--tune gives {method} nothing to choose from: all methods, or none")
    return found


def refuse_unfair(key: str, text: str) -> None:
    """ConfigError if ``text``, a setting of ``key``, would change what methods are compared on."""
    if key.partition(".")[0] not in SECTIONS or key in FIXED:
        raise ConfigError(
            f"{text}: that would change what is compared; what methods may differ in is in "
            f"{', '.join(SECTIONS)}"
        )


def _axis(text: str) -> tuple[str, tuple[str, ...]]:
    """(key, values) of one ``--tune``."""
    left, equals, right = text.partition("=")
    # a comma in brackets is one of a list
    key, values = left.strip(), tuple(one.strip() for one in re.split(r",(?![^\[]*\])", right))
    if not equals or not key or not all(values):
        raise ConfigError(f"--tune {text!r} is not of the form train.lr=1e-3,3e-3,1e-2")
    refuse_unfair(key, f"--tune {key}")
    if len(values) == 1:
        raise ConfigError(f"--tune {text}: one value leaves nothing to choose; give two or more")
    if len({_number(value) for value in values}) < len(values):
        raise ConfigError(f"--tune {text}: a value is there twice")
    return key, values


def settings(grid: Grid) -> list[Setting]:
    """Every combination of the grid's values, as overrides."""
    axes = [[f"{key}={value}" for value in values] for key, values in grid.items()]
    return list(itertools.product(*axes))


def choose(
    method: str, grid: Grid, scores: Mapping[Setting, Sequence[float | None]], metric: str
) -> Tuned:
    """The best setting of a method by the scores of all; RoloraError if every one diverged."""
    trials = []
    for setting in settings(grid):
        values = dict(text.split("=", 1) for text in setting)
        finite = [s if s is not None and math.isfinite(s) else None for s in scores[setting]]
        whole = [score for score in finite if score is not None]
        mean = statistics.fmean(whole) if len(whole) == len(finite) else None
        trials.append(Trial(values=values, scores=finite, mean=mean))
    best = max(trials, key=lambda trial: better(metric, _or_nan(trial.mean)))
    if best.mean is None:
        raise RoloraError(f"{method} diverged with every value of its grid: give --tune others")
    alike = all(trial.mean == best.mean for trial in trials)  # then no end is better than another
    edges = {} if alike else {k: _edge(best.values[k], values) for k, values in grid.items()}
    at_edge = {key: edge for key, edge in edges.items() if edge is not None}
    return Tuned(method=method, trials=trials, best=best.values, at_edge=at_edge)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _edge(value: str, values: Sequence[str]) -> Literal["smallest", "largest"] | None:
    """At which end of the grid a value is; words have no ends."""
    numbers = [number for each in values if isinstance(number := _number(each), float)]
    if len(numbers) < len(values):
        return None
    if float(value) == min(numbers):
        return "smallest"
    return "largest" if float(value) == max(numbers) else None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
