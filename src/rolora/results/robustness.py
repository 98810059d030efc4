"""How methods withstand attacks: what each attack costs under each rule, paired by seed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rolora.attacks import NO_ATTACK
from rolora.results.paired import interval
from rolora.results.runs import RunRecord, gain, mean_sd, over_seeds

SUCCESS = "attack_success"


@dataclass(frozen=True)
class Cell:
    """One method under one attack and one rule.

    ``values`` holds the metric at the end of the run of each of ``seeds``, None where it diverged.
    ``lost`` is by how much the attacked runs are worse than the method's own without an attack,
    under the same rule, mean over seeds, and ``interval`` its confidence interval (see
    ``rolora.results.paired``). ``success`` is how often the attack got the answers that it is
    after, if it is after any.
    """

    attack: str
    rule: str
    method: str
    seeds: tuple[int, ...]
    values: tuple[float | None, ...]
    lost: float | None = None
    interval: tuple[float, float] | None = None
    success: float | None = None

    @property
    def diverged(self) -> int:
        """How many of the runs diverged."""
        return sum(value is None for value in self.values)

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None if a run diverged."""
        found = over_seeds(self.values)
        return found and found[0]

    @property
    def sd(self) -> float | None:
        """The sample standard deviation over seeds; None for one, or if a run diverged."""
        found = over_seeds(self.values)
        return found and found[1]


def matrix(runs: Mapping[tuple[str, str, str], Iterable[RunRecord]], metric: str) -> list[Cell]:
    """A cell for each (attack, rule, method), in their order."""
    found: dict[tuple[str, str, str], Cell] = {}
    for (attack, rule, method), each in runs.items():
        own = sorted(each, key=lambda run: run.seed)
        values = tuple(None if run.diverged else run.last(metric) for run in own)
        success = over_seeds([None if run.diverged else run.last(SUCCESS) for run in own])
        cell = Cell(
            attack,
            rule,
            method,
            tuple(run.seed for run in own),
            values,
            success=success and success[0],
        )
        clean = found.get((NO_ATTACK, rule, method), cell)
        found[attack, rule, method] = _beside(cell, clean, metric)
    return list(found.values())


def _beside(cell: Cell, clean: Cell, metric: str) -> Cell:
    """The cell with what it lost against the one without an attack."""
    if cell.mean is None or clean.mean is None or cell.seeds != clean.seeds:
        return cell
    ours = [gain(metric, value) for value in cell.values if value is not None]
    theirs = [gain(metric, value) for value in clean.values if value is not None]
    lost = [before - after for before, after in zip(theirs, ours, strict=True)]
    if not all(map(math.isfinite, lost)):
        return cell
    return dataclasses.replace(cell, lost=mean_sd(lost)[0], interval=interval(theirs, ours))


@dataclass(frozen=True)
class Standing:
    """How one method stands under one rule, over all attacks.

    ``lost``: the mean over attacks of ``Cell.lost``. ``beside``: the mean over attacks of the
    metric minus the reference's, paired by seed, with its confidence ``interval``; better is
    larger. Attacks under which a run of either diverged are in neither, and ``left_out``.
    ``worst`` is the attack that cost most.
    """

    rule: str
    method: str
    lost: float | None
    beside: float | None
    interval: tuple[float, float] | None
    worst: str
    left_out: tuple[str, ...]


def standings(cells: Sequence[Cell], metric: str) -> list[Standing]:
    """Every method under every rule, in their order; the first method is the reference."""
    by_place = {(cell.attack, cell.rule, cell.method): cell for cell in cells}
    attacks = [name for name in dict.fromkeys(cell.attack for cell in cells) if name != NO_ATTACK]
    methods = list(dict.fromkeys(cell.method for cell in cells))
    found = []
    for rule in dict.fromkeys(cell.rule for cell in cells):
        for method in methods:
            pairs = [
                (by_place[attack, rule, method], by_place[attack, rule, methods[0]])
                for attack in attacks
            ]
            whole = [(own, other) for own, other in pairs if not own.diverged + other.diverged]
            ours = _by_seed([own for own, _ in whole], metric)
            theirs = _by_seed([other for _, other in whole], metric)
            lost = [own.lost for own, _ in whole if own.lost is not None]
            costs = {
                own.attack: cost
                for own, _ in pairs
                if (cost := math.inf if own.diverged else own.lost) is not None
            }
            found.append(
                Standing(
                    rule,
                    method,
                    statistics.fmean(lost) if lost else None,
                    statistics.fmean(ours) - statistics.fmean(theirs) if ours else None,
                    interval(ours, theirs) if method != methods[0] else None,
                    max(costs, key=costs.__getitem__, default=""),
                    tuple(own.attack for own, other in pairs if own.diverged + other.diverged),
                )
            )
    return found


def _by_seed(cells: Sequence[Cell], metric: str) -> list[float]:
    """For each seed the mean of the metric over these cells, with the sign of ``gain``."""
    each = [[gain(metric, value) for value in cell.values if value is not None] for cell in cells]
    return [statistics.fmean(values) for values in zip(*each, strict=True)]


def export(cells: Sequence[Cell], metric: str, bad: int) -> dict[str, Any]:
    """The matrix as JSON."""
    rows = [{**dataclasses.asdict(cell), "mean": cell.mean, "sd": cell.sd} for cell in cells]
    return {
        "metric": metric,
        "bad": bad,
        "cells": rows,
        "standings": [dataclasses.asdict(one) for one in standings(cells, metric)],
    }
