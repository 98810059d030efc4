"""Who is ahead at an equal budget: of rounds, of bytes sent, or of rows trained on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rolora.results.runs import Point, Run, better, by_method, mean_sd

Axis = Literal["rounds", "megabytes", "rows"]
AXES: tuple[Axis, ...] = ("rounds", "megabytes", "rows")


@dataclass(frozen=True)
class Place:
    """A method at a common budget.

    ``values`` are the metric in the runs of ``seeds``, in this order; ``spent`` is the mean over
    them of what the budget came to on every axis.
    """

    method: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    spent: Point

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean_sd(self.values)[0]

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return mean_sd(self.values)[1]


@dataclass(frozen=True)
class Ranking:
    """Methods at an equal budget, best first.

    The budget is the largest that every run of a seed has reached: it is equal within each seed,
    and ``budget`` is its mean over seeds. Where methods have other seeds than each other, it is the
    largest that every run has reached. ``references`` are methods that send nothing, such as
    training alone or on all rows in one place: they compete with no federated method, and have no
    place on the megabytes axis. ``late`` are methods that were first evaluated beyond the budget.
    """

    axis: Axis
    budget: float
    places: tuple[Place, ...]
    references: tuple[Place, ...]
    late: tuple[str, ...]

    def place(self, method: str) -> Place | None:
        """The place of this method, if it has one."""
        every = (*self.places, *self.references)
        return next((place for place in every if place.method == method), None)


def standings(runs: Sequence[Run], metric: str) -> list[Ranking]:
    """The standing on every axis that has one."""
    found = (standing(runs, metric, axis) for axis in AXES)
    return [at for at in found if at is not None]


def standing(runs: Sequence[Run], metric: str, axis: Axis) -> Ranking | None:
    """Who is ahead at an equal budget on this axis; None if there is no such.

    Between two evaluated rounds the metric is interpolated linearly.
    """
    groups = by_method(runs)
    silent = {m for m, own in groups.items() if not any(run.curve(metric)[-1].up for run in own)}
    curves = {
        method: [(run.seed, run.curve(metric)) for run in own]
        for method, own in groups.items()
        if axis != "megabytes" or method not in silent
    }
    budgets = _budgets(curves, axis)
    if not budgets or min(budgets.values()) == 0:
        return None
    started = {
        method: own
        for method, own in curves.items()
        if all(_spent(curve[0], axis) <= budgets[seed] for seed, curve in own)
    }
    places = []
    for method, own in started.items():
        at = [_reached(curve, axis, budgets[seed]) for seed, curve in own]
        spent = Point(*(statistics.fmean(column) for column in zip(*at, strict=True)))
        seeds = tuple(seed for seed, _ in own)
        places.append(Place(method, seeds, tuple(point.value for point in at), spent))
    places.sort(key=lambda place: better(metric, place.mean), reverse=True)
    return Ranking(
        axis,
        statistics.fmean(budgets.values()),
        tuple(place for place in places if place.method not in silent),
        tuple(place for place in places if place.method in silent),
        tuple(method for method in curves if method not in started),
    )


def _budgets(
    curves: Mapping[str, Sequence[tuple[int, Sequence[Point]]]], axis: Axis
) -> dict[int, float]:
    """Seed -> the largest budget that each of its runs has reached (see ``Standing``)."""
    ends: dict[int, float] = {}
    for own in curves.values():
        for seed, curve in own:
            ends[seed] = min(ends.get(seed, math.inf), _spent(curve[-1], axis))
    if len({frozenset(seed for seed, _ in own) for own in curves.values()}) > 1:
        return dict.fromkeys(ends, min(ends.values()))
    return ends


def _spent(point: Point, axis: Axis) -> float:
    return {"rounds": point.round, "megabytes": point.up, "rows": point.rows}[axis]


def _reached(curve: Sequence[Point], axis: Axis, budget: float) -> Point:
    """Where the curve, which begins before ``budget`` and ends after it, has spent it."""
    after = next(point for point in curve if _spent(point, axis) >= budget)
    before = next(point for point in reversed(curve) if _spent(point, axis) <= budget)
    if after.round <= before.round:
        return before
    share = (budget - _spent(before, axis)) / (_spent(after, axis) - _spent(before, axis))
    return Point(*(b + share * (a - b) for b, a in zip(before, after, strict=True)))
