"""The results of a comparison as JSON: rankings, differences, tuning, published numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rolora.files import finite
from rolora.results.labels import label_recalls
from rolora.results.paired import CONFIDENCE, differences
from rolora.results.published import Published, beside_published
from rolora.results.ranking import Ranking, rankings
from rolora.results.runs import RunRecord, by_method, sorted_out, summarise
from rolora.results.tuned import Tuning


def export_results(
    every: Sequence[RunRecord], tuning: Tuning | None = None, published: Published | None = None
) -> dict[str, Any]:
    """Each method's summary, and its place and difference at an equal budget of each kind.

    Numbers that are not finite become None. AllDiverged if every run did.
    """
    sorted_runs = sorted_out(every)
    runs, metric = sorted_runs.finished, sorted_runs.metric
    reference = next(iter(by_method(runs)), None)
    found = {
        "metric": metric,
        "reference": reference,
        "confidence": CONFIDENCE,
        "methods": summarise(runs),
        "labels": label_recalls(by_method(runs)),
        "budgets": [_budget(ranking, str(reference)) for ranking in rankings(runs, metric)],
        "unfinished": [unfinished(run, metric) for run in sorted_runs.unfinished],
        "diverged": [
            {"run": run.path.name, "method": run.method, "seed": run.seed, "reason": run.diverged}
            for run in every
            if run.diverged is not None
        ],
        "tuning": tuning,
        "published": published
        and {**published.model_dump(), "beside": beside_published(published, runs)},
    }
    return dict(finite(found))


def unfinished(run: RunRecord, metric: str) -> dict[str, Any]:
    """How far a run is that has not ended; ``value`` is the metric's so far."""
    return {
        "run": run.path.name,
        "method": run.method,
        "seed": run.seed,
        "round": run.done,
        "rounds": run.planned,
        "value": run.last(metric),
    }


def _budget(ranking: Ranking, reference: str) -> dict[str, Any]:
    paired = differences(ranking, reference)
    places = []
    for place in ranking.everyone:
        difference = paired.get(place.method)
        fields = difference and dataclasses.asdict(difference)
        places.append(
            {
                "method": place.method,
                "ranked": place in ranking.places,
                "mean": place.mean,
                "sd": place.sd,
                "seeds": place.seeds,
                "values": place.values,
                "rounds": place.spent.round,
                "megabytes_up": place.spent.up,
                "megabytes_down": place.spent.down,
                "trained_rows": place.spent.rows,
                "difference": fields and {k: v for k, v in fields.items() if k != "method"},
            }
        )
    return {"equal": ranking.axis, "budget": ranking.budget, "places": places, "late": ranking.late}
