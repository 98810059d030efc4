"""The grid of settings that are tried for a method, and the choice of the best.

The score of a setting is the mean over the tuning seeds of a run's last score on validation rows
(``RunRecord.scores``); among equal scores the first in the order of the grid wins. ``tuning.json``
records all scores and is written before any final run starts.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from rolora.comparison.variants import addressee
from rolora.errors import ConfigError, RoloraError
from rolora.results.runs import gain
from rolora.results.tuned import Trial, Tuned

Grid = Mapping[str, tuple[str, ...]]
Setting = tuple[str, ...]

SECTIONS = ("train", "method", "lora", "aggregate", "wire", "model")
FIXED = ("train.rounds", "method.name", "model.path", "model.task")


def make_grids(texts: Sequence[str], methods: Sequence[str]) -> dict[str, Grid]:
    """The grid of each method, from ``key=value,value,...`` for all or ``METHOD:key=...`` for one.

    A key given for one method replaces the same key given for all. ConfigError for text that is not
    a grid, or a key that would change what is compared.
    """
    grids: dict[str, dict[str, tuple[str, ...]]] = {method: {} for method in ("", *methods)}
    for text in texts:
        method, rest = addressee(text, methods)
        key, values = _axis(rest)
        if key in grids[method]:
            raise ConfigError(f"--tune {text}: {key} already has a grid; give all values in one")
        grids[method][key] = values
    for_all = grids.pop("")
    found: dict[str, Grid] = {method: {**for_all, **own} for method, own in grids.items()}
    if empty := [method for method, grid in found.items() if not grid]:
        raise ConfigError(f"--tune gives {empty[0]} no values: tune every method, or none")
    return found


def refuse_unfair(key: str, text: str) -> None:
    """ConfigError if setting ``key``, written as ``text``, would change what is compared."""
    if key.partition(".")[0] not in SECTIONS or key in FIXED:
        raise ConfigError(
            f"{text}: that would change what is compared; methods may differ in "
            f"{', '.join(SECTIONS)}"
        )


def _axis(text: str) -> tuple[str, tuple[str, ...]]:
    """The key and the values of one ``--tune``."""
    left, equals, right = text.partition("=")
    # a comma in brackets belongs to a list
    key, values = left.strip(), tuple(one.strip() for one in re.split(r",(?![^\[]*\])", right))
    if not equals or not key or not all(values):
        raise ConfigError(f"--tune {text!r} does not look like train.lr=1e-3,3e-3,1e-2")
    refuse_unfair(key, f"--tune {key}")
    if len(values) == 1:
        raise ConfigError(f"--tune {text}: one value leaves nothing to choose; give two or more")
    if len({_number(value) for value in values}) < len(values):
        raise ConfigError(f"--tune {text}: a value is repeated")
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
        found = [s if s is not None and math.isfinite(s) else None for s in scores[setting]]
        finite = [score for score in found if score is not None]
        mean = statistics.fmean(finite) if len(finite) == len(found) else None
        trials.append(Trial(values=values, scores=found, mean=mean))
    best = max(trials, key=lambda t: gain(metric, math.nan if t.mean is None else t.mean))
    if best.mean is None:
        raise RoloraError(f"{method} diverged with every value of its grid: try other values")
    alike = all(trial.mean == best.mean for trial in trials)  # then neither end is better
    edges = {} if alike else {k: _edge(best.values[k], values) for k, values in grid.items()}
    at_edge = {key: edge for key, edge in edges.items() if edge is not None}
    return Tuned(method=method, trials=trials, best=best.values, at_edge=at_edge)


def _edge(value: str, values: Sequence[str]) -> Literal["smallest", "largest"] | None:
    """Which end of the grid a value is at, if any; words have no ends."""
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
