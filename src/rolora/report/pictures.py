"""The figures of the page, each with its title, legend and caption."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from rolora.report import figures, narrative
from rolora.report.figures import Series
from rolora.report.narrative import Conclusion
from rolora.report.svg import inline_svg
from rolora.results.layers import MEASURES, known
from rolora.results.paired import CONFIDENCE, Difference
from rolora.results.ranking import rank_methods
from rolora.results.robustness import SUCCESS
from rolora.results.runs import (
    MEGABYTE,
    RunRecord,
    client_values,
    mean_sd,
    on_second_rows,
    over_seeds,
    worst_tenth,
)

Groups = Mapping[str, Sequence[RunRecord]]
Values = Mapping[int, Any]  # by round
# a round's values of all seeds -> its place on the line, the band there, and both in words
OverSeeds = Callable[[Sequence[Any]], tuple[float, tuple[float, float] | None, str]]
LOSS = "mean over the round's clients that report it, weighted by their rows"
POINTS = 300  # of each line, and how many of them have a readout: for pages of few megabytes
READOUTS = 40


class Axis(NamedTuple):
    """What a curve can be drawn against.

    ``spent`` gives what a run had spent by the end of each line of ``rounds.jsonl``; ``unit`` is a
    format of one such value.
    """

    name: str
    label: str
    unit: str
    spent: Callable[[RunRecord], Iterable[float]]
    note: str = ""


def _sum(spent: Callable[[Mapping[str, Any]], float]) -> Callable[[RunRecord], Iterator[float]]:
    return lambda run: accumulate(map(spent, run.rounds))


ROUNDS = Axis("rounds", "round", "round {:.4g}", lambda run: (line["round"] for line in run.rounds))
AXES = (
    ROUNDS,
    Axis(
        "megabytes sent",
        "MB sent up, all clients",
        "{:,.4g} MB",
        _sum(lambda line: line["bytes_up"] / MEGABYTE),
        " The fair axis where communication is the cost: all that clients have uploaded.",
    ),
    Axis(
        "seconds",
        "seconds",
        "{:,.4g} s",
        _sum(lambda line: line["seconds"]),
        " As long as the rounds took, evaluation included, on the machines that ran them.",
    ),
    Axis(
        "local steps",
        "local steps, all clients",
        "{:,.0f} steps",
        _sum(lambda line: sum(one.get("steps", 0) for one in line["clients"].values())),
        " Optimizer steps of all clients; one that trains a single factor costs less than one "
        "that trains both.",
    ),
)


@dataclass(frozen=True)
class Picture:
    """A figure of the page; ``methods`` are the entries of its legend.

    ``name`` is the id of its SVG element, ``description`` what a screen reader announces. ``axis``
    tells apart the figures of one place, of which the reader chooses one; ``choice`` stands before
    them.
    """

    name: str
    title: str
    description: str
    figure: Figure
    caption: str
    methods: tuple[str, ...] = ()
    axis: str = ""
    choice: str = "against"

    @property
    def svg(self) -> str:
        """The figure as an SVG element."""
        return inline_svg(self.figure, self.name, self.description)


def are_finished(runs: Sequence[RunRecord]) -> bool:
    """Whether a method's runs are finished; those of an unfinished method are drawn dashed."""
    return all(run.finished for run in runs)


def pictures(
    runs: Sequence[RunRecord], groups: Groups, metric: str, conclusions: Sequence[Conclusion]
) -> list[list[Picture]]:
    """All figures for which these runs have numbers; those of a list differ in their axis only."""
    found: Sequence[Sequence[Picture | None]] = (
        _curves(
            "metric",
            metric,
            groups,
            _metric(metric),
            _band(groups, narrative.direction(metric)),
            _budget(runs, metric),
        ),
        *(
            _curves(
                f"second-{n}", name, groups, _metric(name), _band(groups, narrative.direction(name))
            )
            for n, name in enumerate(on_second_rows(runs, metric))
        ),
        _curves("loss", "training loss", groups, _field("loss"), _band(groups, LOSS)),
        [_differences(groups, metric, conclusions)],
        [_client_spread(groups, metric)],
        [_aggregation_error(groups)],
        [_layers(groups, measure) for measure in MEASURES],
        [_attack_success(groups)],
        *([split] for split in _splits(runs)),
    )
    each = ([picture for picture in same if picture is not None] for same in found)
    return [same for same in each if same]


def _metric(metric: str) -> Callable[[RunRecord], Values]:
    return lambda run: {int(point.round): point.value for point in run.curve(metric)}


def _field(key: str) -> Callable[[RunRecord], Values]:
    """A field of the lines of ``rounds.jsonl``, where it is known."""
    return lambda run: {line["round"]: line[key] for line in run.rounds if line[key] is not None}


def _mean_and_sd(values: Sequence[float]) -> tuple[float, tuple[float, float] | None, str]:
    mean, sd = mean_sd(values)
    return mean, (mean - sd, mean + sd) if sd else None, narrative.format_metric(mean, sd)


def _mean_error(values: Sequence[float]) -> tuple[float, None, str]:
    mean, _ = mean_sd(values)
    return mean, None, f"{mean:.1e}"


def _median_and_range(
    values: Sequence[Sequence[float]],
) -> tuple[float, tuple[float, float] | None, str]:
    """Of the values of all layers, for each seed."""
    median, _ = mean_sd([statistics.median(own) for own in values])
    low, high = min(map(min, values)), max(map(max, values))
    return median, (low, high), f"{median:.3g} ({low:.3g} to {high:.3g})"


def _series(
    groups: Groups,
    values: Callable[[RunRecord], Values],
    axis: Axis = ROUNDS,
    over_seeds: OverSeeds = _mean_and_sd,
) -> dict[str, Series]:
    """The line of each method, over the rounds that all of its seeds have.

    Those that spend nothing on this axis have none.
    """
    found = {}
    for style, (method, runs) in enumerate(groups.items()):
        spent = [
            dict(zip((line["round"] for line in run.rounds), axis.spent(run), strict=True))
            for run in runs
        ]
        each = [values(run) for run in runs]
        rounds = _thinned(sorted(set.intersection(*(set(own) for own in each))), POINTS)
        xs = [mean_sd([own[round] for own in spent])[0] for round in rounds]
        if rounds and (axis is ROUNDS or xs[-1]):
            means, bands, told = zip(
                *(over_seeds([own[round] for own in each]) for round in rounds), strict=True
            )
            shown, name = set(_thinned(rounds, READOUTS)), figures.elided(method, 14)
            words = [
                f"{name}, {axis.unit.format(x)}: {value}" if round in shown else ""
                for round, x, value in zip(rounds, xs, told, strict=True)
            ]
            found[method] = Series(style, xs, means, bands, are_finished(runs), words)
    return found


def _thinned(rounds: Sequence[int], most: int) -> Sequence[int]:
    """At most ``most`` of the rounds: the last, and evenly spaced ones before it."""
    every = max(1, math.ceil(len(rounds) / most))
    return rounds[(len(rounds) - 1) % every :: every] if rounds else rounds


def _curves(
    name: str,
    title: str,
    groups: Groups,
    values: Callable[[RunRecord], Values],
    caption: str,
    budget: float | None = None,
) -> list[Picture]:
    """The same values against each axis; ``budget`` is one of megabytes."""
    found = []
    recorded = {method: groups[method] for method in _series(groups, values)}
    for number, axis in enumerate(AXES):
        lines = _series(groups, values, axis)
        if not lines:
            continue
        mark = budget if axis.name == "megabytes sent" else None
        text = caption + axis.note
        if mark is not None:
            sent = narrative.format_megabytes(mark)
            text += f" Dotted: {sent} MB, the most that all methods have sent."
        found.append(
            Picture(
                f"{name}-{number}",
                f"{title} against {axis.name}",
                f"{title} against {axis.name} for {', '.join(lines)}",
                figures.curves(list(lines.values()), title, axis.label, budget=mark),
                text + _missing(groups, recorded) + _missing(recorded, lines, f"no {axis.name}"),
                tuple(lines),
                axis.name,
            )
        )
    return found


def values(groups: Groups, metric: str) -> list[tuple[str, ...]]:
    """What the curves of ``metric`` say when pointed at, as a table.

    (method, round, megabytes, seconds, local steps, value) of each point.
    """
    each = [_series(groups, _metric(metric), axis) for axis in AXES]
    return [
        (
            method,
            *(f"{own[method].x[n]:,.4g}" if method in own else "0" for own in each),
            told.rpartition(": ")[2],
        )
        for method, line in each[0].items()
        for n, told in enumerate(line.readouts)
        if told
    ]


def _missing(
    groups: Groups, drawn: Iterable[str], why: str = "not recorded in all of its runs"
) -> str:
    absent = [m for m, runs in groups.items() if m not in drawn and are_finished(runs)]
    return f" Not drawn ({why}): {', '.join(absent)}." if absent else ""


def _band(groups: Groups, first: str) -> str:
    """``first``, and what bands and dashes are."""
    several = any(len(runs) > 1 for runs in groups.values())
    text = f"{first[0].upper()}{first[1:]}."
    text += " Lines are means over seeds, bands one standard deviation." if several else ""
    if not all(map(are_finished, groups.values())):
        text += " Dashed, with open markers: unfinished."
    return text + _thin(groups)


def _thin(groups: Groups) -> str:
    most = max(run.done for runs in groups.values() for run in runs)
    return f" Of more than {POINTS} rounds, every n-th is drawn." if most > POINTS else ""


def _budget(runs: Sequence[RunRecord], metric: str) -> float | None:
    """The megabytes at which methods are compared; None without a second method."""
    finished = [run for run in runs if run.finished]
    ranking = rank_methods(finished, metric, "megabytes")
    return ranking.budget if ranking is not None and len(ranking.places) > 1 else None


def _differences(groups: Groups, metric: str, conclusions: Sequence[Conclusion]) -> Picture | None:
    paired: dict[str, Mapping[str, Difference]] = {}
    for one in conclusions:
        same = next((title for title, own in paired.items() if own == one.differences), None)
        title = one.title if same is None else f"{same}, {one.title}"
        if one.differences:
            paired = {title if was == same else was: own for was, own in paired.items()}
            paired[title] = one.differences
    if not paired:
        return None
    every = [difference for own in paired.values() for difference in own.values()]
    reference = every[0].reference
    caption = f"Each method minus {reference}, seed by seed, at an equal budget of each kind. "
    if any(difference.interval for difference in every):
        caption += f"Bars: {CONFIDENCE:.0%} confidence intervals of the mean difference; one that "
        caption += "excludes zero is a difference that these seeds show."
    else:
        caption += f"{narrative.NO_INTERVAL.capitalize()}."
    return Picture(
        "differences",
        f"Difference from {reference}",
        f"difference in {metric} from {reference} at each kind of equal budget",
        figures.forest_plot(paired, _styles(groups), metric, reference),
        caption,
    )


def _aggregation_error(groups: Groups) -> Picture | None:
    lines = _series(groups, _field("aggregation_error"), over_seeds=_mean_error)
    if not lines:
        return None
    return Picture(
        "errors",
        "Aggregation error",
        f"aggregation error of each round for {', '.join(lines)}",
        figures.aggregation_errors(list(lines.values())),
        "How far the server's B·A is from the mean of the clients' B·A, relative to that mean. In "
        "the grey band the average is exact; lines there are spread only to be seen."
        + _thin(groups)
        + _missing(groups, lines),
        tuple(lines),
    )


def _attack_success(groups: Groups) -> Picture | None:
    lines = _series(groups, _metric(SUCCESS))
    if not lines:
        return None
    return Picture(
        "success",
        "Attack success",
        f"attack success over rounds for {', '.join(lines)}",
        figures.curves(list(lines.values()), "attack success", ROUNDS.label),
        "How often the model gives the answers that the attack wants. "
        + _band(groups, "lower is better")
        + _missing(groups, lines),
        tuple(lines),
    )


def _layers(groups: Groups, measure: str) -> Picture | None:
    lines = _series(groups, lambda run: known(run, measure), over_seeds=_median_and_range)
    if not lines:
        return None
    title, about = MEASURES[measure]
    return Picture(
        measure,
        title[0].upper() + title[1:],
        f"{title} over rounds for {', '.join(lines)}",
        figures.curves(list(lines.values()), title, ROUNDS.label),
        f"{about} Line: median over layers; band: from the smallest to the largest layer."
        + _missing(groups, lines),
        tuple(lines),
        title,
        "show",
    )


def _client_spread(groups: Groups, metric: str) -> Picture | None:
    clients, worst = {}, {}
    for method, runs in groups.items():
        tenth = over_seeds([worst_tenth(run, metric) for run in runs])
        if are_finished(runs) and tenth:
            clients[method] = [value for run in runs for value in client_values(run, metric)]
            worst[method] = tenth[0]
    if not clients:
        return None
    return Picture(
        "clients",
        f"{metric} of each client",
        f"{metric} of each client for {', '.join(clients)}",
        figures.client_spread(clients, worst, _styles(groups), metric),
        "On each client's own held-out rows, at the end; clients of all seeds together. A dot's "
        "area is the number of clients; bar: mean; triangle: mean of the worst tenth of a run's "
        "clients, over seeds." + _missing(groups, clients),
    )


def _splits(runs: Sequence[RunRecord]) -> list[Picture]:
    """One picture for each split: seeds differ in it, methods do not."""
    splits: list[list[RunRecord]] = []
    for run in runs:
        same = next((own for own in splits if own[0].partition == run.partition), None)
        splits.append([run]) if same is None else same.append(run)
    return [_split(own, number, len(splits)) for number, own in enumerate(splits)]


def _split(runs: Sequence[RunRecord], number: int, of: int) -> Picture:
    partition = runs[0].partition
    sizes = [client["num_examples"] for client in partition["clients"]]
    dropped = partition.get("dropped", 0)
    least, most = min(sizes), max(sizes)
    rows = f"{least:,} rows each" if least == most else f"{least:,} to {most:,} rows each"
    caption = f"{len(sizes)} clients hold {rows}."
    for note in (partition.get("note"), dropped and f"{dropped:,} rows are held by no client"):
        caption += f" {note[0].upper()}{note[1:]}." if note else ""
    if of > 1:
        caption += f" The split of {', '.join(run.label for run in runs)}."
    return Picture(
        f"split-{number}",
        "Who holds which rows" + (f" ({number + 1} of {of})" if of > 1 else ""),
        f"training rows of {len(sizes)} clients, {rows}",
        figures.split_figure(partition),
        caption,
    )


def _styles(groups: Groups) -> dict[str, int]:
    return {method: style for style, method in enumerate(groups)}
