"""The runs in sentences: what was compared, which method is ahead, what to be careful about."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rolora.errors import printable
from rolora.results.defence import cuts
from rolora.results.paired import CONFIDENCE, MIN_SEEDS, Difference, difference, differences
from rolora.results.ranking import Axis, Place, Ranking, rankings
from rolora.results.runs import (
    RunRecord,
    Runs,
    Summary,
    by_method,
    differing,
    flatten,
    primary_metric,
    summarise,
)
from rolora.tasks.registry import higher_is_better

TITLES: Mapping[Axis, str] = {
    "rounds": "equal rounds",
    "megabytes": "equal bytes",
    "rows": "equal local compute",
}
NO_INTERVAL = f"no interval with fewer than {MIN_SEEDS} seeds"


@dataclass(frozen=True)
class Conclusion:
    """Which method is ahead at an equal budget: a headline and the text that supports it.

    ``places`` are best first; ``differences`` maps each method to its difference from the
    reference.
    """

    title: str
    budget: str
    headline: str
    text: str
    axis: Axis = "rounds"
    places: tuple[Place, ...] = ()
    differences: Mapping[str, Difference] = field(default_factory=dict)


def format_metric(value: float, sd: float | None = None, digits: str = ".3f") -> str:
    """'0.821 ± 0.004': a metric to three decimals, with its sd if there is one."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:{digits}}" if abs(value) < 1000 else f"{value:.4g}"
    return text if sd is None else f"{text} ± {sd:{digits}}"


def format_difference(difference: Difference) -> str:
    """'+0.018 [+0.006, +0.030]', without the interval if there is none."""
    return format_mean(difference.mean, difference.interval)


def format_mean(mean: float, interval: tuple[float, float] | None) -> str:
    """The mean of differences and its interval, as ``format_difference``."""
    text = f"{mean:+.3f}"
    if interval is not None:
        text += f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    return text.replace("-", "−")


def format_megabytes(value: float) -> str:
    """'3.20', or two significant digits below 0.1."""
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def escaped(text: str) -> str:
    """A name of the user's, of any characters, within one cell of a Markdown table."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", printable(text))


def format_rounds(rounds: float) -> str:
    """'40', or '15.9' if a budget ends within a round."""
    return f"{rounds:,.1f}".removesuffix(".0")


def format_budget(ranking: Ranking) -> str:
    """'after 40 rounds', 'after 3.20 MB sent up', or 'after 7,200 rows trained on'."""
    if ranking.axis == "rounds":
        return f"after {format_rounds(ranking.budget)} round{'' if ranking.budget == 1 else 's'}"
    if ranking.axis == "rows":
        return f"after {ranking.budget:,.0f} rows trained on"
    return f"after {format_megabytes(ranking.budget)} MB sent up"


def format_spent(place: Place, axis: Axis) -> str:
    """What a place used on the other axes: 'round 15, 25.60 MB down'."""
    spent, down = place.spent, f"{format_megabytes(place.spent.down)} MB down"
    if axis == "rounds":
        return f"{format_megabytes(spent.up)} MB up, {down}"
    return f"round {format_rounds(spent.round)}" + (f", {down}" if axis == "megabytes" else "")


def describe_runs(runs: Sequence[RunRecord]) -> str:
    """One sentence about what was run, from the configurations; where they differ, all values."""
    groups = by_method(runs)
    seeds = f"seed{'' if len({r.seed for r in runs}) == 1 else 's'} {_all(r.seed for r in runs)}"
    if len(groups) > 1:
        what = f"{len(groups)} methods are compared over {sum(map(len, groups.values()))} runs"
    else:
        what = f"{next(iter(groups))} in {'one run' if len(runs) == 1 else f'{len(runs)} runs'}"
    shards = [[client["num_examples"] for client in run.partition["clients"]] for run in runs]
    settings = [dict(flatten(run.config)) for run in runs]

    def setting(key: str) -> str:
        return _all(own[key] for own in settings if key in own) or "unknown"

    shares = [own["train.participation"] for own in settings if "train.participation" in own]
    return (
        f"{what} ({seeds}): {setting('model.task')} on {setting('model.path')} with LoRA of rank "
        f"{_all(map(_rank, runs))}, {_range(map(sum, shards))} training rows held by "
        f"{_range(map(len, shards))} clients ({setting('partition.scheme')} split), "
        f"{_all(f'{share:.0%}' for share in shares) or 'unknown'} of them in a round, "
        f"{setting('train.rounds')} rounds."
    )


def _rank(run: RunRecord) -> int | str:
    """The LoRA rank of a run: '4', or '2 to 8' if its clients' ranks differ."""
    rank: Any = run.config.get("lora", {}).get("rank", "unknown")
    if isinstance(rank, dict):
        rank = list(rank.values())
    found: int | str = _range(rank) if isinstance(rank, list) else rank
    return found


def _range(counts: Iterable[int]) -> str:
    """'1,122', or '887 to 1,122' if they differ."""
    ordered = sorted(counts)
    return " to ".join(f"{count:,}" for count in dict.fromkeys((ordered[0], ordered[-1])))


def _all(values: Iterable[Any]) -> str:
    """The distinct values, '0, 1, 2': numbers sorted, words in their order."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int) for value in distinct):
        distinct.sort()
    return ", ".join(map(str, distinct))


def conclusions(runs: Sequence[RunRecord]) -> list[Conclusion]:
    """Which method is ahead at an equal budget of each kind; for a single method, its result."""
    metric, reference = primary_metric(runs), next(iter(by_method(runs)))
    found = [
        conclusion(ranking, metric, reference)
        for ranking in rankings(runs, metric)
        if ranking.places and len(ranking.everyone) > 1
    ]
    rounds = next((one for one in found if one.axis == "rounds"), None)
    for n, one in enumerate(found):
        if rounds is not None and one.axis == "rows" and _same(one, rounds):
            text = "All methods train on the same number of rows per round: as at equal rounds."
            found[n] = replace(one, text=text)
    return found or [_single(row) for row in summarise(runs)]


def nothing_finished(runs: Runs) -> Conclusion:
    """That there is no result yet."""
    text = f"There is no result yet. How far each run is, with its {runs.metric} so far, is below."
    return Conclusion("unfinished", "", "No run is finished", text)


def _same(one: Conclusion, other: Conclusion) -> bool:
    values = [{place.method: place.values for place in each.places} for each in (one, other)]
    return values[0] == values[1] and one.headline == other.headline


def conclusion(ranking: Ranking, metric: str, reference: str) -> Conclusion:
    """Which method is ahead, or that none clearly is; and which are not ranked, and why."""
    ranked = tuple(place for place in ranking.places if math.isfinite(place.mean))
    headline, text = _headline(ranked, metric)
    unranked = {
        "because nothing is sent": [
            f"{place.method} {format_metric(place.mean, place.sd)}" for place in ranking.references
        ],
        f"because {metric} is not finite": [
            place.method for place in ranking.places if place not in ranked
        ],
        "because first evaluated later": ranking.late,
    }
    for why, methods in unranked.items():
        text += f" Not ranked, {why}: {', '.join(methods)}." if methods else ""
    shown = ranked if len(ranked) > 1 else ()
    paired = differences(ranking, reference)
    title, budget = TITLES[ranking.axis], format_budget(ranking)
    return Conclusion(title, budget, headline, text, ranking.axis, shown, paired)


def _headline(places: Sequence[Place], metric: str) -> tuple[str, str]:
    """Headline and text about ``places``, which are best first and finite."""
    if not places:
        return f"No finite {metric}", "Training has diverged."
    first, *others = places
    result = f"{metric} {format_metric(first.mean, first.sd)}"
    if not others:
        return result, f"{first.method} has {result} ({direction(metric)})."
    best = f"{first.method} has the best {metric}, {format_metric(first.mean, first.sd)}"
    if close := [place for place in others if tied(first, place) or place.mean == first.mean]:
        return "No clear leader", f"{best}, but {_reservation(first, close)}."
    second = others[0]
    gap = format_metric(abs(first.mean - second.mean))
    text = f"{best}. Next is {second.method} with {format_metric(second.mean, second.sd)}: "
    if once := [place.method for place in (first, second) if place.sd is None]:
        text += f"a gap of {gap}. But {' and '.join(once)} ran on one seed, which does not show "
        text += "how much of that is chance: run more seeds before relying on it."
        return f"{first.method} leads, on too few seeds", text
    paired = difference(first, second)
    if paired is not None and paired.interval is not None:
        text += f"the difference, paired by seed, is {format_difference(paired)}, "
        text += "which excludes zero."
    else:
        text += f"the gap of {gap} is more than one standard deviation; {NO_INTERVAL}."
    return f"{first.method} is ahead", text


def tied(first: Place, other: Place) -> bool | None:
    """Whether the runs do not show that two methods differ: their interval includes zero.

    Without an interval: whether they are within one sd of each other, the larger of the two. None
    if neither has an sd: a single seed shows no spread.
    """
    paired = difference(first, other)
    if paired is not None and paired.significant is not None:
        return not paired.significant
    spreads = [place.sd for place in (first, other) if place.sd is not None]
    return abs(first.mean - other.mean) <= max(spreads) if spreads else None


def _reservation(first: Place, close: Sequence[Place]) -> str:
    """Why ``first`` cannot be told from the methods of ``close``."""
    paired = {place.method: difference(first, place) for place in close}
    known = {method: one for method, one in paired.items() if one is not None and one.interval}
    rest = [method for method in paired if method not in known]
    parts = []
    if known:
        over = ", ".join(f"{method} ({format_difference(one)})" for method, one in known.items())
        parts.append(f"the {CONFIDENCE:.0%} interval of its lead includes zero over {over}")
    if rest:
        parts.append(f"within one standard deviation of it: {', '.join(rest)} ({NO_INTERVAL})")
    return "; ".join(parts)


def _single(row: Summary) -> Conclusion:
    seeds = "" if row.runs == 1 else f", mean ± sd over {row.runs} seeds"
    result = f"{row.metric} {format_metric(row.final_mean, row.final_sd)}"
    return Conclusion(
        "result",
        f"after {row.rounds} round{'' if row.rounds == 1 else 's'}",
        result,
        f"{row.method} reached {result}{seeds} "
        f"({direction(row.metric)}; {format_metric(row.best_mean)} in its best round), for "
        f"{format_megabytes(row.megabytes_up)} MB sent up and "
        f"{format_megabytes(row.megabytes_down)} MB down.",
    )


def _cut_notes(run: RunRecord) -> list[str]:
    """Who was cut in most rounds, in one sentence."""
    every = cuts(run)
    named = [one for one in every if one.in_most_rounds]
    if not named:
        return []
    if 2 * len(named) > len(every):
        return [
            f"{run.label}: the rule used few clients a round; {len(named)} of {len(every)} were "
            "cut by more than half in most of their rounds."
        ]
    words = [f"{one.client} ({len(one.mostly)} of {one.rounds})" for one in named]
    return [f"{run.label}: cut by more than half in most of their rounds: {_all(words)}."]


def direction(metric: str) -> str:
    """'higher is better' or 'lower is better'."""
    return "higher is better" if higher_is_better(metric) else "lower is better"


def cautions(runs: Sequence[RunRecord], tuned: Collection[str] = ()) -> list[str]:
    """What makes a comparison uneven: different settings, rows or versions, runs that
    stood still or diverged.

    Keys that are ``tuned`` for each method, and options of methods, may differ.
    """
    notes = []
    settings = [dict(flatten(run.config)) for run in runs]
    for key in differing(settings):
        if not key.startswith("method.") and key not in tuned:
            methods: dict[str, list[str]] = {}
            for run, own in zip(runs, settings, strict=True):
                methods.setdefault(str(own.get(key, "unset")), []).append(run.method)
            values = "; ".join(f"{value} ({_all(names)})" for value, names in methods.items())
            notes.append(f"{key} differs between runs: {values}.")
    for method, own_runs in by_method(runs).items():
        seeds = [run.seed for run in own_runs]
        if again := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            notes.append(f"{method} has several runs of seed {_all(again)}; each one counts.")
    rows: dict[int, set[str]] = {}
    for run in runs:
        rows.setdefault(run.seed, set()).add(str(run.provenance.get("data")))
    if uneven := sorted(seed for seed, hashes in rows.items() if len(hashes) > 1):
        notes.append(f"Runs of seed {_all(uneven)} do not have the same rows and shards.")
    if differing([dict(flatten(run.provenance.get("versions", {}))) for run in runs]):
        notes.append("Library versions differ between runs (listed below).")
    for run in runs:
        if still := [line["round"] for line in run.rounds if line["moved"] is False]:
            notes.append(
                f"{run.label}: training moved no tensor of any client in {len(still)} of "
                f"{run.rounds[-1]['round']} rounds (the first is round {still[0]}): no gradient "
                "reached what its clients train."
            )
        notes += _cut_notes(run)
        if run.diverged is not None:
            notes.append(
                f"{run.label} diverged and is left out of every mean, which flatters {run.method}: "
                f"{run.diverged}"
            )
    return notes
