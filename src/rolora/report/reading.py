"""What the runs say, in sentences: what was compared, who is ahead, what to be careful about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rolora.report.summary import (
    Axis,
    Place,
    Row,
    Run,
    Standing,
    by_method,
    differing,
    flat,
    primary_metric,
    standing,
    summarise,
)
from rolora.tasks import HIGHER_IS_BETTER


@dataclass(frozen=True)
class Verdict:
    """Who is ahead at an equal budget: a headline and the sentence that backs it."""

    budget: str
    headline: str
    text: str
    places: tuple[Place, ...] = ()


def score(value: float, sd: float | None = None) -> str:
    """A metric to three decimals, with its sd if it has one."""
    text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
    return text if sd is None else f"{text} ± {sd:.3f}"


def megabytes(value: float) -> str:
    """Two decimals, or two digits where that would be 0.0x."""
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def about(runs: Sequence[Run]) -> str:
    """One sentence on what was run, from the configurations; what differs is listed."""
    groups = by_method(runs)
    seeds = f"seed{'' if len({r.seed for r in runs}) == 1 else 's'} {_all(r.seed for r in runs)}"
    if len(groups) > 1:
        what = f"{len(groups)} methods are compared over {sum(map(len, groups.values()))} runs"
    else:
        what = f"{next(iter(groups))} in {'one run' if len(runs) == 1 else f'{len(runs)} runs'}"
    clients = _all(len(run.partition["clients"]) for run in runs)
    rows = _all(sum(c["num_examples"] for c in run.partition["clients"]) for run in runs)
    settings = [dict(flat(run.config)) for run in runs]

    def setting(key: str) -> str:
        return _all(own[key] for own in settings if key in own) or "unknown"

    return (
        f"{what} ({seeds}): {setting('model.task')} on {setting('model.path')} with LoRA of rank "
        f"{setting('lora.rank')}, {rows} training rows held by {clients} clients "
        f"({setting('partition.scheme')} split), {setting('train.participation')} of them in a "
        f"round, {setting('train.rounds')} rounds."
    )


def _all(values: Iterable[Any]) -> str:
    """The distinct values in order: '20', or '0, 1, 2'."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int) for value in distinct):
        return ", ".join(f"{value:,}" for value in sorted(distinct))
    return ", ".join(map(str, distinct))


def budget(at: Standing) -> str:
    """'after 40 rounds', or 'after 3.20 MB sent up'."""
    if at.axis == "rounds":
        return f"after {at.budget:.0f} round{'' if at.budget == 1 else 's'}"
    return f"after {megabytes(at.budget)} MB sent up"


def tied(first: Place, other: Place) -> bool | None:
    """Whether two methods are within one sd of each other, the larger of the two.

    None if neither has one: a single seed says nothing about spread.
    """
    spreads = [place.sd for place in (first, other) if place.sd is not None]
    return abs(first.mean - other.mean) <= max(spreads) if spreads else None


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Who is ahead at equal rounds and at equal megabytes; for a single method, its result."""
    metric = primary_metric(runs)
    axes: tuple[Axis, ...] = ("rounds", "megabytes")
    found = [standing(runs, metric, axis) for axis in axes]
    return [verdict(each, metric) for each in found if each and len(each.places) > 1] or [
        alone(row) for row in summarise(runs)
    ]


def verdict(at: Standing, metric: str) -> Verdict:
    """Who is ahead, or that nobody clearly is. ``at`` has at least two places."""
    first, second = at.places[:2]
    close = [p.method for p in at.places[1:] if tied(first, p) or p.mean == first.mean]
    best = f"{first.method} has the best {metric}, {score(first.mean, first.sd)}"
    gap = score(abs(first.mean - second.mean))
    next_best = f"{second.method}, at {score(second.mean, second.sd)}"
    if close:
        headline = "No clear leader"
        text = f"{best}, but within one standard deviation of it: {', '.join(close)}."
    elif tied(first, second) is None:
        headline = f"{first.method}, on one seed"
        text = f"{best}; {gap} separate it from {next_best}. One seed does not show how much of "
        text += "that is chance: run more seeds before relying on it."
    else:
        headline = f"{first.method} is ahead"
        text = f"{best}; {gap}, more than one standard deviation, separate it from {next_best}."
    if at.references:
        bounds = ", ".join(f"{p.method} {score(p.mean, p.sd)}" for p in at.references)
        text += f" Sending nothing, for reference: {bounds}."
    if at.late:
        text += f" Not placed, because first evaluated later: {', '.join(at.late)}."
    return Verdict(budget(at), headline, text, at.places)


def alone(row: Row) -> Verdict:
    """The result of a single method."""
    seeds = "" if row.runs == 1 else f", mean ± sd over {row.runs} seeds"
    return Verdict(
        f"after {row.rounds} round{'' if row.rounds == 1 else 's'}",
        f"{row.metric} {score(row.final_mean, row.final_sd)}",
        f"{row.method} reached {row.metric} {score(row.final_mean, row.final_sd)}{seeds} "
        f"({direction(row.metric)}; {score(row.best_mean)} in its best round), for "
        f"{megabytes(row.megabytes_up)} MB sent up and {megabytes(row.megabytes_down)} MB down.",
    )


def direction(metric: str) -> str:
    """'higher is better', or 'lower is better'."""
    return "higher is better" if HIGHER_IS_BETTER[metric] else "lower is better"


def cautions(runs: Sequence[Run]) -> list[str]:
    """What makes a comparison uneven: settings, rows, versions that differ, unfinished runs."""
    notes = []
    settings = [dict(flat(run.config)) for run in runs]
    for key in differing(settings):
        if not key.startswith("method."):
            values = {
                run.method: own.get(key, "unset") for run, own in zip(runs, settings, strict=True)
            }
            said = "; ".join(f"{method} {value}" for method, value in values.items())
            notes.append(f"{key} is not the same in all runs: {said}.")
    by_seed: dict[int, set[str]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, set()).add(str(run.provenance.get("data")))
    if uneven := [seed for seed, hashes in sorted(by_seed.items()) if len(hashes) > 1]:
        notes.append(f"Runs of seed {_all(uneven)} did not train on the same rows and shards.")
    if differing([dict(flat(run.provenance.get("versions", {}))) for run in runs]):
        notes.append("Library versions are not the same in all runs (listed below).")
    for run in runs:
        done, planned = run.rounds[-1]["round"], run.config.get("train", {}).get("rounds", 0)
        if done < planned:
            notes.append(f"{run.label} has done {done} of {planned} rounds.")
    return notes
