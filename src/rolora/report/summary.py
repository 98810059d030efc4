"""What run folders say: one row a method, and who is ahead at an equal budget."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from rolora.errors import ConfigError, DataError
from rolora.tasks import HIGHER_IS_BETTER

METRICS = ("accuracy", "choice_accuracy", "exact_match", "perplexity", "loss")
MEGABYTE = 1e6  # bytes

Axis = Literal["rounds", "megabytes"]
Point = tuple[int, float, float]

_ROUND_FIELDS: dict[str, type | tuple[type, ...]] = {
    "round": int,
    "metrics": dict,
    "client_metrics": dict,
    "loss": (int, float, type(None)),
    "aggregation_error": (int, float, type(None)),
    "bytes_up": int,
    "bytes_down": int,
    "seconds": (int, float),
    "rejected": dict,
}


@dataclass(frozen=True, eq=False)
class Run:
    """What one run folder holds.

    ``method`` is the method's name with its options; ``config`` is nested as in the TOML;
    ``rounds`` are the lines of ``rounds.jsonl`` in order.
    """

    path: Path
    name: str
    method: str
    seed: int
    config: dict[str, Any]
    provenance: dict[str, Any]
    rounds: tuple[dict[str, Any], ...]
    partition: dict[str, Any]

    @property
    def label(self) -> str:
        """The last two parts of the path: short, and distinct in practice."""
        return "/".join(self.path.parts[-2:])

    def curve(self, metric: str) -> list[Point]:
        """(round, megabytes sent up so far, value) of every evaluated round."""
        sent = accumulate(line["bytes_up"] for line in self.rounds)
        return [
            (line["round"], total / MEGABYTE, line["metrics"][metric])
            for line, total in zip(self.rounds, sent, strict=True)
            if metric in line["metrics"]
        ]


@dataclass(frozen=True)
class Row:
    """One method over its runs; every number is a mean over them.

    ``final`` is the metric at the last evaluated round, ``best`` at its best round, ``final_sd``
    the sample standard deviation (None for a single run). Megabytes are 10⁶ bytes over the whole
    run and all clients; ``aggregation_error`` is the mean over rounds (None where unknown).
    """

    method: str
    seeds: tuple[int, ...]
    runs: int
    metric: str
    final_mean: float
    final_sd: float | None
    best_mean: float
    rounds: int
    megabytes_up: float
    megabytes_down: float
    aggregation_error: float | None
    seconds: float


@dataclass(frozen=True)
class Place:
    """A method at a common budget: mean and sample sd of the metric over its seeds."""

    method: str
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Standing:
    """Methods at the largest budget that every run has reached, best first.

    ``references`` are methods that send nothing, such as training alone or on all rows in one
    place: they compete with no federated method, and have no place on the megabytes axis.
    ``late`` are methods that were first evaluated beyond the budget.
    """

    axis: Axis
    budget: float
    places: tuple[Place, ...]
    references: tuple[Place, ...]
    late: tuple[str, ...]


def load_run(path: str | Path) -> Run:
    """Read a run folder. ConfigError if ``path`` is none, DataError for a file that is broken."""
    folder = Path(path).resolve()
    files = [folder / name for name in ("config.toml", "rounds.jsonl", "partition.json")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"{path} is no run folder (no {' and no '.join(missing)} in it)")
    try:
        config = tomllib.loads(files[0].read_text(encoding="utf-8"))
        partition = json.loads(files[2].read_text(encoding="utf-8"))
        provenance = config.pop("provenance", {})
        options = dict(config["method"])
        method = str(options.pop("name"))
        name, seed = str(config["name"]), int(config["seed"])
        shards = [(int(c["num_examples"]), dict(c["labels"])) for c in partition["clients"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: config.toml or partition.json is damaged ({error!r})") from None
    if not shards:
        raise DataError(f"{path}: partition.json names no client")
    if options:
        method += f" ({', '.join(f'{key}={value}' for key, value in sorted(options.items()))})"
    rounds = tuple(_read_rounds(files[1]))
    return Run(folder, name, method, seed, config, provenance, rounds, partition)


def _read_rounds(file: Path) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}, line {number}"
        try:
            line = json.loads(text)
        except ValueError:
            raise DataError(
                f"{where} is no JSON: rolora resume {file.parent} repairs a line cut off by a crash"
            ) from None
        for key, kind in _ROUND_FIELDS.items():
            if not isinstance(line, dict) or not isinstance(line.get(key, ...), kind):
                raise DataError(f"{where}: {key!r} is missing or not of its type")
        if not all(isinstance(value, int | float) for value in line["metrics"].values()):
            raise DataError(f"{where}: a metric is not a number")
        yield line


def primary_metric(runs: Sequence[Run]) -> str:
    """The first of ``METRICS`` that every run has measured. DataError if there is none."""
    measured = [{name for line in run.rounds for name in line["metrics"]} for run in runs]
    for run, names in zip(runs, measured, strict=True):
        if not names:
            raise DataError(f"{run.path} has no evaluated round yet: train on, or leave it out")
    for metric in METRICS:
        if all(metric in names for names in measured):
            return metric
    found = "; ".join(sorted({", ".join(sorted(names)) for names in measured}))
    raise DataError(f"these runs have no metric in common ({found}): report them apart")


def better(metric: str, value: float) -> float:
    """A number that is larger the better ``value`` is; what is not finite is worst."""
    if not math.isfinite(value):
        return -math.inf
    return value if HIGHER_IS_BETTER[metric] else -value


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in the order of their first run; a folder given twice counts once.

    Only runs that differ in nothing but name and seed are averaged: where runs of one method differ
    in another setting, each setting is a row of its own and its label says so.
    """
    methods: dict[str, list[Run]] = {}
    for run in {run.path: run for run in runs}.values():
        methods.setdefault(run.method, []).append(run)
    groups: dict[str, list[Run]] = {}
    for method, members in methods.items():
        settings = [dict(flat(run.config)) for run in members]
        for run, own in zip(members, settings, strict=True):
            apart = (f"{key}={own.get(key, 'unset')}" for key in differing(settings))
            groups.setdefault(", ".join((method, *apart)), []).append(run)
    return groups


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of ``settings``, but for name and seed."""
    keys = sorted(set().union(*settings) - {"name", "seed", "offline"})
    return [key for key in keys if any(s.get(key) != settings[0].get(key) for s in settings)]


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every entry of a nested table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def summarise(runs: Sequence[Run]) -> list[Row]:
    """One row a method, best final metric first (see ``by_method`` for what counts as one)."""
    metric = primary_metric(runs)
    rows = [_row(method, members, metric) for method, members in by_method(runs).items()]
    return sorted(rows, key=lambda row: better(metric, row.final_mean), reverse=True)


def _row(method: str, runs: Sequence[Run], metric: str) -> Row:
    values = [[value for _, _, value in run.curve(metric)] for run in runs]
    final, sd = mean_sd([each[-1] for each in values])
    best = [max(each, key=lambda value: better(metric, value)) for each in values]
    lines = [line for run in runs for line in run.rounds]
    errors = [e for line in lines if (e := line["aggregation_error"]) is not None]
    return Row(
        method=method,
        seeds=tuple(sorted(run.seed for run in runs)),
        runs=len(runs),
        metric=metric,
        final_mean=final,
        final_sd=sd,
        best_mean=statistics.fmean(best),
        rounds=max(line["round"] for line in lines),
        megabytes_up=sum(line["bytes_up"] for line in lines) / MEGABYTE / len(runs),
        megabytes_down=sum(line["bytes_down"] for line in lines) / MEGABYTE / len(runs),
        aggregation_error=statistics.fmean(errors) if errors else None,
        seconds=sum(line["seconds"] for line in lines) / len(runs),
    )


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for one value, or where one is not finite."""
    many = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if many else None


def standing(runs: Sequence[Run], metric: str, axis: Axis) -> Standing | None:
    """Who is ahead at the largest budget that all runs have reached; None if there is no such.

    Between two evaluated rounds the metric is interpolated linearly.
    """
    groups = by_method(runs)
    silent = {m for m, own in groups.items() if not any(run.curve(metric)[-1][1] for run in own)}
    column = 0 if axis == "rounds" else 1
    curves = {
        method: [[(float(point[column]), point[2]) for point in run.curve(metric)] for run in own]
        for method, own in groups.items()
        if axis == "rounds" or method not in silent
    }
    budget = min((curve[-1][0] for own in curves.values() for curve in own), default=0.0)
    if budget == 0:
        return None
    started = {m: own for m, own in curves.items() if all(curve[0][0] <= budget for curve in own)}
    places = [
        Place(method, *mean_sd([_interpolate(curve, budget) for curve in own]))
        for method, own in started.items()
    ]
    places.sort(key=lambda place: better(metric, place.mean), reverse=True)
    return Standing(
        axis,
        budget,
        tuple(place for place in places if place.method not in silent),
        tuple(place for place in places if place.method in silent),
        tuple(method for method in curves if method not in started),
    )


def _interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """The value at ``x``, which lies between the first and the last point of ``curve``."""
    after = next(point for point in curve if point[0] >= x)
    before = next(point for point in reversed(curve) if point[0] <= x)
    if after[0] <= before[0]:
        return before[1]
    share = (x - before[0]) / (after[0] - before[0])
    return before[1] + share * (after[1] - before[1])
