"""What a comparison came to, as a program reads it: budgets, differences, tuning, published."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rolora.results.paired import CONFIDENCE, Difference, differences
from rolora.results.published import Published, beside
from rolora.results.ranking import Place, Ranking, standings
from rolora.results.runs import Run, by_method, primary_metric, sound, summarise
from rolora.results.tuned import Tuning


def outcome(
    every: Sequence[Run], tuning: Tuning | None = None, published: Published | None = None
) -> dict[str, Any]:
    """JSON: each method's row, and its place and difference at an equal budget of each kind.

    Numbers that are not finite are null.
    """
    runs = sound(every)
    metric, reference = primary_metric(runs), next(iter(by_method(runs)))
    found: dict[str, Any] = {
        "metric": metric,
        "reference": reference,
        "confidence": CONFIDENCE,
        "methods": [dataclasses.asdict(row) for row in summarise(runs)],
        "budgets": [_standing(at, reference) for at in standings(runs, metric)],
        "diverged": {run.path.name: run.diverged for run in every if run.diverged is not None},
        "tuning": tuning and tuning.model_dump(mode="json"),
        "published": None,
    }
    if published is not None:
        rows = [dataclasses.asdict(row) for row in beside(published, runs)]
        found["published"] = {**published.model_dump(mode="json"), "beside": rows}
    cleaned: dict[str, Any] = _finite(found)
    return cleaned


def _standing(at: Ranking, reference: str) -> dict[str, Any]:
    apart = differences(at, reference)
    ranked = [(True, place) for place in at.places] + [(False, p) for p in at.references]
    return {
        "equal": at.axis,
        "budget": at.budget,
        "places": [_place(ranks, place, apart.get(place.method)) for ranks, place in ranked],
        "late": list(at.late),
    }


def _place(ranks: bool, place: Place, apart: Difference | None) -> dict[str, Any]:
    spent = place.spent
    return {
        "method": place.method,
        "ranked": ranks,
        "mean": place.mean,
        "sd": place.sd,
        "seeds": list(place.seeds),
        "values": list(place.values),
        "rounds": spent.round,
        "megabytes_up": spent.up,
        "megabytes_down": spent.down,
        "trained_rows": spent.rows,
        "difference": apart
        and {k: v for k, v in dataclasses.asdict(apart).items() if k != "method"},
    }


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
