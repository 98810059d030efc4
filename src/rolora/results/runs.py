"""Run folders read back: the curve of each run, and a summary of each method."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError

from rolora.errors import AllDiverged, ConfigError, DataError
from rolora.tasks.registry import higher_is_better

FIRST = ("accuracy", "choice_accuracy", "answer_accuracy", "exact_match")
LAST = ("perplexity", "loss")
MEGABYTE = 1e6  # bytes
Measured = tuple[float, float | None]  # mean and sample standard deviation, see ``mean_sd``
T = TypeVar("T")
U = TypeVar("U")
# keys that runs of one group may differ in: what tells seeds apart, and what changes no result
IGNORED = {"name", "seed", "offline", "train.workers", "train.cache", "eval.samples"} | {
    f"data.second_{what}" for what in ("test", "split", "name")
}


# null where it was not finite; infinite is the worst score there is, see ``gain``
Score = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]


class Line(BaseModel, strict=True):
    """A line of ``rounds.jsonl``, as far as it is read."""

    round: int
    metrics: dict[str, Score]
    client_metrics: dict[str, dict[str, Score]]
    loss: float | None
    moved: bool | None = None
    aggregation_error: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    rejected: dict[str, str]
    missing: dict[str, str] = {}
    factors: list[str] = []
    stale: int = 0
    clients: dict[str, dict[str, float]] = {}
    validation: dict[str, Score] = {}
    cut: dict[str, float] = {}
    recall: list[float] = []
    layers: dict[str, list[float | None]] = {}


class Axes(BaseModel, strict=True, frozen=True):
    """Label -> its rows among those that are evaluated on, and the adapted layers: what ``recall``
    and ``layers`` of a line are over, in this order."""

    labels: dict[str, int] = {}
    layers: list[str] = []


class Written(BaseModel, strict=True, frozen=True):
    """What a language model wrote for one test prompt; see ``rolora.run.samples``."""

    prompt: str
    expected: str
    before: str
    after: str


class Point(NamedTuple):
    """The metric's ``value`` after a round, and what all clients had used by then.

    ``up`` and ``down`` are megabytes (10⁶ bytes). ``rows`` counts the training rows that went
    through the model, repetitions included (0 if the run does not record it).
    """

    round: float
    up: float
    down: float
    rows: float
    value: float


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The content of a run folder.

    ``method`` is the method's name with its options; ``config`` is nested as in the TOML file;
    ``rounds`` are the lines of ``rounds.jsonl``, whose lists are over what ``axes`` names;
    ``diverged`` is the message of a run whose loss became NaN or infinite, else None.
    """

    path: Path
    name: str
    method: str
    seed: int
    config: dict[str, Any]
    provenance: dict[str, Any]
    rounds: tuple[dict[str, Any], ...]
    partition: dict[str, Any]
    axes: Axes
    samples: tuple[Written, ...] = ()
    diverged: str | None = None

    @property
    def done(self) -> int:
        """The rounds that are on disk."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def planned(self) -> int:
        """The rounds of the whole run."""
        return int(self.config.get("train", {}).get("rounds", self.done))

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end: its last round, or that of an early stop."""
        if not self.rounds:
            return False
        patience = self.config.get("eval", {}).get("patience", math.inf)
        ended = self.done >= self.planned or self.rounds[-1]["stale"] >= patience
        return ended or (self.path / "report.html").is_file()  # lines of old runs have no stale

    def last(self, metric: str) -> float | None:
        """The last score; None before the first evaluation."""
        scores = self.scores(metric)
        return scores[-1].value if scores else None

    @property
    def label(self) -> str:
        """The last two parts of the path: short, and distinct in practice."""
        return "/".join(self.path.parts[-2:])

    def scores(self, metric: str) -> list[Point]:
        """The curve with every value a mean over phases, which all comparisons go by.

        A phase is a set of factors that is trained in a round. Of each phase the latest evaluation
        counts, so that no method is judged by the one that its run happens to end on. Of a method
        with one phase this is the curve.
        """
        return [point for point, _ in self._scored(metric)]

    def best(self, metric: str) -> float | None:
        """The best score, of the rounds by which all phases so far had been evaluated.

        As for the best round of a run: a phase that is evaluated on its good side alone would win.
        None before there is such a round; round 0 is none.
        """
        found = [point.value for point, whole in self._scored(metric) if whole]
        return max(found, key=lambda value: gain(metric, value), default=None)

    def _scored(self, metric: str) -> Iterator[tuple[Point, bool]]:
        """Each score, and whether all phases so far are in it."""
        points = {point.round: point for point in self.curve(metric)}
        trained, latest = set[str](), dict[str, float]()
        for line in self.rounds:
            trained |= {phase(line)} if line["round"] else set()
            if (point := points.get(line["round"])) is None:
                continue
            if trained:
                latest[phase(line)] = point.value
                point = point._replace(value=statistics.fmean(latest.values()))
            yield point, bool(trained) and latest.keys() == trained

    def curve(self, metric: str) -> list[Point]:
        """A point for each evaluated round."""
        batch = self.config.get("train", {}).get("batch_size")
        up = accumulate(line["bytes_up"] for line in self.rounds)
        down = accumulate(line["bytes_down"] for line in self.rounds)
        rows = accumulate(trained_rows(line["clients"], batch) for line in self.rounds)
        return [
            Point(line["round"], u / MEGABYTE, d / MEGABYTE, n, line["metrics"][metric])
            for line, u, d, n in zip(self.rounds, up, down, rows, strict=True)
            if metric in line["metrics"]
        ]


def phase(line: Mapping[str, Any]) -> str:
    """What was trained in the round of this line."""
    return "+".join(line["factors"])


def trained_rows(clients: Mapping[str, Mapping[str, float]], batch_size: int | None) -> int:
    """The rows that a round's clients trained on; 0 if ``batch_size`` is None.

    Each pass over a shard ends with a short batch (see ``training.local.batches``).
    """
    total = 0
    if batch_size is None:
        return total
    for client in clients.values():
        shard, steps = int(client["num_examples"]), int(client.get("steps", 0))
        passes, left = divmod(steps, math.ceil(shard / batch_size))
        total += passes * shard + min(left * batch_size, shard)
    return total


@dataclass(frozen=True)
class Summary:
    """One method; every number is a mean over its runs.

    ``final_mean`` is the last score (see ``RunRecord.scores``), ``best_mean`` that of
    ``RunRecord.best``, ``final_sd`` the sample standard deviation (None for a single run).
    Megabytes are 10⁶ bytes over the whole run and all clients; ``trained_rows`` is ``Point.rows``
    at the end; ``aggregation_error`` is the mean over rounds (None if unknown);
    ``worst_tenth_mean`` and its sd are of the function ``worst_tenth`` (None if a run has not
    measured its clients).
    ``second``: a metric of ``on_second_rows`` -> mean and sd of the last score.
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
    trained_rows: float
    aggregation_error: float | None
    seconds: float
    worst_tenth_mean: float | None
    worst_tenth_sd: float | None
    second: Mapping[str, Measured]


def load_run(path: str | Path) -> RunRecord:
    """Read a run folder. ConfigError if ``path`` is not one, DataError for a damaged file."""
    folder = Path(path).resolve()
    files = [folder / name for name in ("config.toml", "rounds.jsonl", "partition.json")]
    if missing := [file.name for file in files if not file.is_file()]:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(f"{path} is not a run folder: {' and '.join(missing)} {verb} missing")
    try:
        config = tomllib.loads(files[0].read_text(encoding="utf-8"))
        partition = json.loads(files[2].read_text(encoding="utf-8"))
        provenance = config.pop("provenance", {})
        config.pop("server_seed", None)  # is shown nowhere
        config.pop("track", None)  # no setting that results depend on
        options = dict(config["method"])
        method = str(options.pop("name"))
        name, seed = str(config["name"]), int(config["seed"])
        shards = [(int(c["num_examples"]), dict(c["labels"])) for c in partition["clients"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: config.toml or partition.json is damaged ({error!r})") from None
    if not shards:
        raise DataError(f"{path}: partition.json lists no clients")
    if options:
        method += f" ({', '.join(f'{key}={value}' for key, value in sorted(options.items()))})"
    rounds = tuple(_read_rounds(files[1]))
    marker = folder / "diverged.txt"
    diverged = marker.read_text(encoding="utf-8").strip() if marker.is_file() else None
    return RunRecord(
        folder,
        name,
        method,
        seed,
        config,
        provenance,
        rounds,
        partition,
        _read_axes(folder / "axes.json", rounds),
        read_json(folder / "samples.json", tuple[Written, ...], ()),
        diverged,
    )


def _read_axes(file: Path, rounds: Sequence[Mapping[str, Any]]) -> Axes:
    """What the lists of these lines are over. DataError unless they are as long."""
    axes = read_json(file, Axes, Axes())
    for line in rounds:
        recall, layers = line["recall"] or axes.labels, line["layers"].values()
        if len(recall) != len(axes.labels) or any(len(v) != len(axes.layers) for v in layers):
            raise DataError(
                f"{file} does not have the labels and layers of rounds.jsonl: make it again with: "
                f"rolora resume {shlex.quote(str(file.parent))}"
            )
    return axes


def read_json(file: Path, kind: type[T], otherwise: U) -> T | U:
    """The content of a JSON file, if there is one. DataError for one that is damaged."""
    if not file.is_file():
        return otherwise
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except ValidationError as error:
        raise DataError(f"{file} is damaged: {_fault(error)}") from None


def _fault(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "model_type":
        return "it is not a JSON object"
    return ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")


def _read_rounds(file: Path) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}, line {number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(
                f"{where} is not valid JSON; if a crash cut it off, repair it with: "
                f"rolora resume {shlex.quote(str(file.parent))}"
            ) from None
        try:
            read = Line.model_validate(line).model_dump()
        except ValidationError as error:
            raise DataError(f"{where}: {_fault(error)}") from None
        yield line | read


@dataclass(frozen=True)
class Runs:
    """Runs by how far they are. Only ``finished`` ones enter a mean; diverged ones are in neither.

    ``metric`` is the primary one of the finished runs, or of the unfinished ones if none is.
    """

    finished: list[RunRecord]
    unfinished: list[RunRecord]
    metric: str

    @property
    def methods(self) -> dict[str, list[RunRecord]]:
        """The finished runs of each method (see ``by_method``), then the methods without any."""
        found = by_method(self.finished)
        for method, runs in by_method(self.unfinished).items():
            known = method in found or {run.method for run in runs} <= found.keys()
            if not known and all(run.curve(self.metric) for run in runs):
                found[f"{method} (unfinished)"] = runs
        return found


def sorted_out(every: Sequence[RunRecord]) -> Runs:
    """The runs by how far they are. AllDiverged if every run diverged; see ``primary_metric``."""
    left = list({run.path: run for run in every if run.diverged is None}.values())
    if every and not left:
        raise AllDiverged(f"every run diverged; the first is {every[0].path}: {every[0].diverged}")
    finished = [run for run in left if run.finished]
    unfinished = [run for run in left if not run.finished]
    evaluated = [run for run in unfinished if any(line["metrics"] for line in run.rounds)]
    return Runs(finished, unfinished, primary_metric(finished or evaluated or unfinished))


def primary_metric(runs: Sequence[RunRecord]) -> str:
    """The metric that all runs have and that says most: a loss only where there is no other.

    DataError if there is none.
    """
    measured: list[list[str]] = [
        list(dict.fromkeys(name for line in run.rounds for name in line["metrics"])) for run in runs
    ]
    for run, names in zip(runs, measured, strict=True):
        if not names:
            raise DataError(f"{run.path} has no evaluated round yet: resume it, or leave it out")
    others = [name for name in measured[0] if name not in LAST and "/" not in name]
    for metric in (*FIRST, *others, *LAST):
        if all(metric in names for names in measured):
            return metric
    found = "; ".join(sorted({", ".join(sorted(names)) for names in measured}))
    raise DataError(f"these runs have no metric in common ({found}): report them separately")


def on_second_rows(runs: Iterable[RunRecord], metric: str) -> list[str]:
    """What ``metric`` is called on second test rows, such as "accuracy/second", in each run that
    has any (see ``data.second_test``)."""
    lines = (line for run in runs for line in run.rounds)
    names = dict.fromkeys(name for line in lines for name in line["metrics"])
    return [name for name in names if name.startswith(f"{metric}/")]


def gain(metric: str, value: float) -> float:
    """``value`` with its sign set so that larger is better; minus infinity if it is not finite."""
    if not math.isfinite(value):
        return -math.inf
    return value if higher_is_better(metric) else -value


def by_method(runs: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs of each method, in the order of their first run; a folder given twice counts once.

    Runs are grouped only if nothing but name and seed differs. Runs of one method with different
    settings form groups of their own, whose labels name the settings.
    """
    methods: dict[str, list[RunRecord]] = {}
    for run in {run.path: run for run in runs}.values():
        methods.setdefault(run.method, []).append(run)
    groups: dict[str, list[RunRecord]] = {}
    for method, members in methods.items():
        settings = [dict(flatten(run.config)) for run in members]
        keys = differing(settings)
        for run, own in zip(members, settings, strict=True):
            label = [method, *(f"{key}={own.get(key, 'unset')}" for key in keys)]
            groups.setdefault(", ".join(label), []).append(run)
    return groups


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not equal in all of ``settings``, without ``IGNORED``."""
    keys = sorted(set().union(*settings) - IGNORED)
    return [key for key in keys if any(s.get(key) != settings[0].get(key) for s in settings)]


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every entry of a nested table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def summarise(runs: Sequence[RunRecord]) -> list[Summary]:
    """A summary of each method (see ``by_method``), best final metric first; [] for no runs."""
    if not runs:
        return []
    metric = primary_metric(runs)
    rows = [_summary(method, members, metric) for method, members in by_method(runs).items()]
    return sorted(rows, key=lambda row: gain(metric, row.final_mean), reverse=True)


def _summary(method: str, runs: Sequence[RunRecord], metric: str) -> Summary:
    curves = [run.scores(metric) for run in runs]
    finals = [curve[-1].value for curve in curves]
    final, sd = mean_sd(finals)
    best = [
        last if (value := run.best(metric)) is None else value
        for run, last in zip(runs, finals, strict=True)
    ]
    lines = [line for run in runs for line in run.rounds]
    errors = [e for line in lines if (e := line["aggregation_error"]) is not None]
    worst, worst_sd = over_seeds([worst_tenth(run, metric) for run in runs]) or (None, None)
    second = {
        name: over_seeds([run.last(name) for run in runs]) for name in on_second_rows(runs, metric)
    }
    return Summary(
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
        trained_rows=statistics.fmean(curve[-1].rows for curve in curves),
        aggregation_error=statistics.fmean(errors) if errors else None,
        seconds=sum(line["seconds"] for line in lines) / len(runs),
        worst_tenth_mean=worst,
        worst_tenth_sd=worst_sd,
        second={name: measured for name, measured in second.items() if measured},
    )


def client_values(run: RunRecord, metric: str) -> list[float]:
    """The last score of each client on its own held-out rows: a mean over phases, as ``scores``."""
    latest: dict[str, dict[str, float]] = {}
    for line in run.rounds:
        for client, own in line["client_metrics"].items():
            if line["round"] and metric in own:
                latest.setdefault(client, {})[phase(line)] = own[metric]
    return [statistics.fmean(phases.values()) for phases in latest.values()]


def worst_tenth(run: RunRecord, metric: str) -> float | None:
    """The mean over the worst tenth of ``client_values``, of one at least; None without any."""
    values = sorted(client_values(run, metric), key=lambda value: gain(metric, value))
    return statistics.fmean(values[: math.ceil(len(values) / 10)]) if values else None


def over_seeds(values: Sequence[float | None]) -> Measured | None:
    """``mean_sd`` of a value of each of a method's runs; None if a run does not have it."""
    known = [value for value in values if value is not None]
    return mean_sd(known) if known and len(known) == len(values) else None


def mean_sd(values: Sequence[float]) -> Measured:
    """Mean and sample standard deviation (None for one value, or if a value is not finite)."""
    several = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if several else None
