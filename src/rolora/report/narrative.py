"""What the runs say, in sentences: what was compared, who is ahead, what to be careful about."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rolora.results.paired import CONFIDENCE, LEAST_SEEDS, Difference, difference, differences
from rolora.results.ranking import Axis, Place, Ranking, standings
from rolora.results.runs import Row, Run, by_method, differing, flat, primary_metric, summarise
from rolora.tasks.registry import higher_is_better

TITLES: Mapping[Axis, str] = {
    "rounds": "equal rounds",
    "megabytes": "equal bytes",
    "rows": "equal local compute",
}
NO_INTERVAL = f"no interval with fewer than {LEAST_SEEDS} seeds"


@dataclass(frozen=True)
class Verdict:
    """Who is ahead at an equal budget: a headline and the sentence that backs it.

    ``places`` are best first; ``differences`` maps methods to how far they are from the reference.
    """

    title: str
    budget: str
    headline: str
    text: str
    axis: Axis = "rounds"
    places: tuple[Place, ...] = ()
    differences: Mapping[str, Difference] = field(default_factory=dict)


def score(value: float, sd: float | None = None) -> str:
    """A metric to three decimals, with its sd if it has one."""
    text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
    return text if sd is None else f"{text} ± {sd:.3f}"


def apart(found: Difference) -> str:
    """'+0.018 [+0.006, +0.030]', without the interval where there is none."""
    text = f"{found.mean:+.3f}"
    if found.interval is not None:
        text += f" [{found.interval[0]:+.3f}, {found.interval[1]:+.3f}]"
    return text.replace("-", "−")


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
    shards = [[client["num_examples"] for client in run.partition["clients"]] for run in runs]
    settings = [dict(flat(run.config)) for run in runs]

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


def _rank(run: Run) -> int | str:
    """The run's LoRA rank, or from which to which its clients' go."""
    rank = run.config.get("lora", {}).get("rank", "unknown")
    if isinstance(rank, list | dict):
        return _range(rank.values() if isinstance(rank, dict) else rank)
    found: int | str = rank
    return found


def _range(counts: Iterable[int]) -> str:
    """'1,122', or '887 to 1,122' where they differ."""
    ordered = sorted(counts)
    return " to ".join(f"{count:,}" for count in dict.fromkeys((ordered[0], ordered[-1])))


def _all(values: Iterable[Any]) -> str:
    """The distinct values: '20', or '0, 1, 2'. Numbers in order, words as they come."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int) for value in distinct):
        distinct.sort()
    return ", ".join(map(str, distinct))


def tenths(rounds: float) -> str:
    """'40', or '15.9' where a budget ends within a round."""
    return f"{rounds:,.1f}".removesuffix(".0")


def budget(at: Ranking) -> str:
    """'after 40 rounds', 'after 3.20 MB sent up', or 'after 7,200 rows trained on'."""
    if at.axis == "rounds":
        return f"after {tenths(at.budget)} round{'' if at.budget == 1 else 's'}"
    if at.axis == "rows":
        return f"after {at.budget:,.0f} rows trained on"
    return f"after {megabytes(at.budget)} MB sent up"


def spending(place: Place, axis: Axis) -> str:
    """What the budget of one axis came to on the others: 'round 15, 25.60 MB down'."""
    spent = place.spent
    sent = f"{megabytes(spent.up)} MB up, {megabytes(spent.down)} MB down"
    if axis == "rounds":
        return sent
    if axis == "megabytes":
        return f"round {tenths(spent.round)}, {megabytes(spent.down)} MB down"
    return f"round {tenths(spent.round)}"


def tied(first: Place, other: Place) -> bool | None:
    """Whether nothing shows that two methods differ: the interval of their difference holds zero.

    Without an interval, whether they are within one sd of each other, the larger of the two; None
    if neither has one: a single seed says nothing about spread.
    """
    paired = difference(first, other)
    if paired is not None and paired.decided is not None:
        return not paired.decided
    spreads = [place.sd for place in (first, other) if place.sd is not None]
    return abs(first.mean - other.mean) <= max(spreads) if spreads else None


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Who is ahead at an equal budget of each kind; for a single method, its result."""
    metric, reference = primary_metric(runs), next(iter(by_method(runs)))
    found = [at for at in standings(runs, metric) if len((*at.places, *at.references)) > 1]
    compared = [verdict(at, metric, reference) for at in found if at.places]
    rounds = next((one for one in compared if one.axis == "rounds"), None)
    for n, one in enumerate(compared):
        if rounds is not None and one.axis == "rows" and _same(one, rounds):
            said = "All train on the same number of rows in a round: as at equal rounds."
            compared[n] = replace(one, text=said)
    return compared or [alone(row) for row in summarise(runs)]


def _same(one: Verdict, other: Verdict) -> bool:
    values = [{place.method: place.values for place in each.places} for each in (one, other)]
    return values[0] == values[1] and one.headline == other.headline


def verdict(at: Ranking, metric: str, reference: str) -> Verdict:
    """Who is ahead, or that nobody clearly is, and what is not ranked and why."""
    ranked = tuple(place for place in at.places if math.isfinite(place.mean))
    headline, text = _ranking(ranked, metric)
    unranked = {
        "because nothing is sent": [
            f"{place.method} {score(place.mean, place.sd)}" for place in at.references
        ],
        f"because {metric} is not finite": [
            place.method for place in at.places if place not in ranked
        ],
        "because first evaluated later": at.late,
    }
    for why, methods in unranked.items():
        text += f" Not ranked, {why}: {', '.join(methods)}." if methods else ""
    shown = ranked if len(ranked) > 1 else ()
    paired = differences(at, reference)
    return Verdict(TITLES[at.axis], budget(at), headline, text, at.axis, shown, paired)


def _ranking(places: Sequence[Place], metric: str) -> tuple[str, str]:
    """Headline and sentences about ``places``, best first and all finite."""
    if not places:
        return f"No finite {metric}", "Training has diverged."
    first, *others = places
    result = f"{metric} {score(first.mean, first.sd)}"
    if not others:
        return result, f"{first.method} has {result} ({direction(metric)})."
    best = f"{first.method} has the best {metric}, {score(first.mean, first.sd)}"
    if close := [place for place in others if tied(first, place) or place.mean == first.mean]:
        return "No clear leader", f"{best}, but {_reservation(first, close)}."
    second = others[0]
    gap = score(abs(first.mean - second.mean))
    text = f"{best}. Next is {second.method} with {score(second.mean, second.sd)}: "
    if once := [place.method for place in (first, second) if place.sd is None]:
        text += f"a gap of {gap}. But {' and '.join(once)} ran on one seed, which does not show "
        text += "how much of that is chance: run more seeds before relying on it."
        return f"{first.method} leads, on too few seeds", text
    paired = difference(first, second)
    if paired is not None and paired.interval is not None:
        text += f"the difference, paired by seed, is {apart(paired)}, which leaves out zero."
    else:
        text += f"the gap of {gap} is more than one standard deviation; {NO_INTERVAL}."
    return f"{first.method} is ahead", text


def _reservation(first: Place, close: Sequence[Place]) -> str:
    """Why nobody of ``close`` can be told from the first."""
    paired = {place.method: difference(first, place) for place in close}
    held = [f"{method} ({apart(one)})" for method, one in paired.items() if one and one.interval]
    rest = [method for method, one in paired.items() if one is None or one.interval is None]
    parts = []
    if held:
        parts.append(f"the {CONFIDENCE:.0%} interval of its lead holds zero over {', '.join(held)}")
    if rest:
        parts.append(f"within one standard deviation of it: {', '.join(rest)} ({NO_INTERVAL})")
    return "; ".join(parts)


def alone(row: Row) -> Verdict:
    """The result of a single method."""
    seeds = "" if row.runs == 1 else f", mean ± sd over {row.runs} seeds"
    return Verdict(
        "result",
        f"after {row.rounds} round{'' if row.rounds == 1 else 's'}",
        f"{row.metric} {score(row.final_mean, row.final_sd)}",
        f"{row.method} reached {row.metric} {score(row.final_mean, row.final_sd)}{seeds} "
        f"({direction(row.metric)}; {score(row.best_mean)} in its best round), for "
        f"{megabytes(row.megabytes_up)} MB sent up and {megabytes(row.megabytes_down)} MB down.",
    )


def direction(metric: str) -> str:
    """'higher is better', or 'lower is better'."""
    return "higher is better" if higher_is_better(metric) else "lower is better"


def cautions(runs: Sequence[Run], tuned: Collection[str] = ()) -> list[str]:
    """What makes a comparison uneven: settings, rows, versions that differ, unfinished runs.

    Keys that are ``tuned`` for each method may differ.
    """
    notes = []
    settings = [dict(flat(run.config)) for run in runs]
    for key in differing(settings):
        if not key.startswith("method.") and key not in tuned:
            having: dict[str, list[str]] = {}
            for run, own in zip(runs, settings, strict=True):
                having.setdefault(str(own.get(key, "unset")), []).append(run.method)
            said = "; ".join(f"{value} ({_all(methods)})" for value, methods in having.items())
            notes.append(f"{key} is not the same in all runs: {said}.")
    for method, own_runs in by_method(runs).items():
        seeds = [run.seed for run in own_runs]
        if again := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            notes.append(f"{method} has several runs of seed {_all(again)}, counted one by one.")
    by_seed: dict[int, set[str]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, set()).add(str(run.provenance.get("data")))
    if uneven := [seed for seed, hashes in sorted(by_seed.items()) if len(hashes) > 1]:
        notes.append(f"Runs of seed {_all(uneven)} did not train on the same rows and shards.")
    if differing([dict(flat(run.provenance.get("versions", {}))) for run in runs]):
        notes.append("Library versions are not the same in all runs (listed below).")
    for run in runs:
        if run.diverged is not None:
            notes.append(
                f"{run.label} diverged and is in no mean, which flatters {run.method}: "
                f"{run.diverged}"
            )
            continue
        done, planned = run.rounds[-1]["round"], run.config.get("train", {}).get("rounds", 0)
        if done < planned:
            notes.append(f"{run.label} has done {done} of {planned} rounds.")
    return notes
