"""Writes the tables and pictures of docs/results.md and docs/choosing.md from the studies' records.

    python experiments/run_studies.py     # hours; runs on disk are not repeated
    python docs/make_results.py

Every number between two marks on the page comes from experiments/records; published numbers come
from the ``.published.json`` next to the experiment's configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import put, save_picture
from scipy.stats import ttest_rel

from rolora.files import write_file
from rolora.report.figures import DASHES, MARKERS, PALETTE, STYLE
from rolora.results.paired import interval
from rolora.results.published import read_published

HERE = Path(__file__).parent
PAGE, CHOOSING = HERE / "results.md", HERE / "choosing.md"
EXPERIMENTS = HERE.parent / "experiments"
AXES = {"rounds": "equal rounds", "megabytes": "equal bytes up"}
LATE = 4  # evaluations, two after each of RoLoRA's phases
LATELY = f"last {LATE}: mean, swing (largest)"
CHANCE = 0.20  # accuracy below which a classifier of ten digits has learned next to nothing
EQUAL = 0.02  # methods this close to each other are called equal
BROKEN = 0.10  # a method this far behind the other is set in bold, like one that diverged

Record = Mapping[str, Any]
Records = Mapping[str, Record]
Table = tuple[tuple[str, ...], Callable[[Records], list[str]]]


def read_records() -> dict[str, Record]:
    """All records, by study."""
    found = sorted((EXPERIMENTS / "records").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}


def percent(value: float, sd: float | None = None) -> str:
    """'86.9 ± 0.4', from fractions."""
    return f"{100 * value:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def signed(found: Mapping[str, Any] | None) -> str:
    """'−2.1 [−3.0, −1.2]': a difference in points and its interval."""
    if found is None:
        return ""
    words = [f"{100 * x:+.1f}" for x in (found["mean"], *(found["interval"] or ()))]
    text = words[0] + (f" [{words[1]}, {words[2]}]" if len(words) > 1 else "")
    return text.replace("-", "−")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all but the first column are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def compared(record: Record) -> list[str]:
    """A study with one cell: each method's rate, result and difference from the first method.

    Each difference is between two methods: at equal bytes, both have sent what the one that sends
    less has sent.
    """
    (cell,) = record["cells"]
    first = cell["reference"]
    results, rates = published(record), chosen(record)
    apart = [f"minus `{first}`, {name}" for name in AXES.values()]
    late = LATELY
    head = ["method", "rate", "accuracy, %", late, *apart, "MB up"]
    rows = []
    often = all(len(run) > LATE for seeds in cell["curves"].values() for run in seeds.values())
    for row in sorted(cell["methods"], key=lambda row: row["method"] != first):
        method = row["method"]
        rate, result = rates.get(label(method), ""), percent(row["final_mean"], row["final_sd"])
        apart = [signed(at_equal(cell, method, axis)) for axis in AXES]
        late = lately(cell["curves"][method].values()) if often else ""
        apart = apart if often else [apart[0], ""]  # nothing was measured on the way
        line = [f"`{label(method)}`", rate, result, late, *apart, f"{row['megabytes_up']:.1f}"]
        rows.append([*line, *([results.get(label(method), "")] if results else [])])
    lines = table([*head, *(["published"] if results else [])], rows)
    return [*lines, "", setting(record), "", *tried(record)]


def lately(runs: Iterable[Sequence[Sequence[float]]]) -> str:
    """The mean over a run's last few evaluations, and how far the lowest of them is below it.

    Both are means over the runs; the largest swing of a run is in parentheses.
    """
    late = [[value for _, _, value in run[-LATE:]] for run in runs]
    swings = [fmean(values) - min(values) for values in late]
    mean = fmean(fmean(values) for values in late)
    return f"{percent(mean)}, {percent(fmean(swings))} ({percent(max(swings))})"


def tried(record: Record) -> list[str]:
    """What each method made of each rate, on the validation rows of the tuning seed."""
    validated = "Rates tried, with accuracy on validation rows of the tuning seed:"
    methods = record["cells"][0]["tuning"]["methods"]
    head = ["`train.lr`", *(trial["values"]["train.lr"] for trial in methods[0]["trials"])]
    rows = [
        [f"`{one['method']}`", *(percent_or_diverged(trial["mean"]) for trial in one["trials"])]
        for one in methods
    ]
    return [validated, "", *table(head, rows)]


def percent_or_diverged(mean: float | None) -> str:
    """An accuracy, or that it diverged."""
    return "diverged" if mean is None else percent(mean)


def label(method: str) -> str:
    """A method as it is given to compare: 'rolora (first=A)' -> 'rolora+first=a'."""
    name, _, options = method.partition(" (")
    return "+".join([name, *options.removesuffix(")").lower().split(", ")]) if options else name


def at_equal(cell: Record, method: str, axis: str) -> Mapping[str, Any] | None:
    """This method's difference from the first at an equal budget."""
    for budget in cell["pairs"].get(method, ()):
        for place in budget["places"]:
            if budget["equal"] == axis and place["method"] == method:
                found: Mapping[str, Any] | None = place["difference"]
                return found
    return None


def chosen(record: Record) -> dict[str, str]:
    """The rate chosen for each method; '*' marks one at the end of its grid."""
    tuning = record["cells"][0].get("tuning")
    if tuning is None:
        return {m: own[0].partition("=")[2] for m, own in record["alone"].items() if own}
    edge = {m["method"]: "*" if m["at_edge"] else "" for m in tuning["methods"]}
    return {m["method"]: m["best"]["train.lr"] + edge[m["method"]] for m in tuning["methods"]}


def setting(record: Record) -> str:
    """The setting of a table, in a line."""
    seeds = ", ".join(map(str, record["seeds"]))
    tuning = record["cells"][0].get("tuning")
    text = f"`experiments/{record['config']}`, seeds {seeds}"
    if tuning:
        tried = (trial["values"]["train.lr"] for trial in tuning["methods"][0]["trials"])
        grid = ", ".join(dict.fromkeys(tried))
        over = ", ".join(map(str, tuning["seeds"]))
        text += f"; rates from {grid}, chosen on validation rows of seed {over}"
    if record["rates_of"]:
        text += f"; rates as chosen in `{record['rates_of']}`"
    return f"{text}; {record['core_hours']:.1f} core-hours ({record['cells'][0]['made']['cpu']})."


def published(record: Record) -> dict[str, str]:
    """The published result of each method, if the experiment has any."""
    found = read_published(EXPERIMENTS / record["config"])
    return {} if found is None else {m: f"{value:.1f}" for m, value in found.results.items()}


def by_value(key: str, cells: Mapping[str, Record], record: Record) -> list[str]:
    """A line for each value of ``key``, a column for each method of ``record``."""
    first, *others = record["methods"]
    rows = []
    for value, cell in sorted(cells.items(), key=lambda one: float(one[0])):
        results = {row["method"]: row for row in cell.get("methods", ())}
        found = [results.get(method) for method in (first, *others)]
        shown = [percent(f["final_mean"], f["final_sd"]) if f else "diverged" for f in found]
        rows.append([value, *shown, *(signed(at_equal(cell, m, "rounds")) for m in others)])
    against = [f"`{method}` − `{first}`" for method in others]
    head = [f"`{key}`", *(f"`{method}`" for method in (first, *others)), *against]
    return [*table(head, rows), "", setting(record)]


def broken_map(record: Record) -> list[str]:
    """Rate against another key: both methods' accuracies, bold where one broke down."""
    rate, other = record["cells"][0]["cell"]
    lines: dict[str, dict[str, str]] = {}
    for cell in record["cells"]:
        results = {row["method"]: row["final_mean"] for row in cell.get("methods", ())}
        said = [two(results, method) for method in record["methods"]]
        lines.setdefault(str(cell["cell"][rate]), {})[str(cell["cell"][other])] = " / ".join(said)
    columns = next(iter(lines.values()))
    head = [f"`{rate}`", *(f"`{other.partition('.')[2]}` {value}" for value in columns)]
    return table(head, [[value, *own.values()] for value, own in lines.items()])


def two(results: Mapping[str, float], method: str) -> str:
    """A method's accuracy in a map."""
    if method not in results:
        return "**diverged**"
    behind = max(results.values()) - results[method] > BROKEN or results[method] < CHANCE
    return f"**{percent(results[method])}**" if behind else percent(results[method])


def lost(records: Sequence[tuple[str, Record]]) -> list[str]:
    """The relative aggregation error of FedIT in the first and the last ten rounds."""
    rows = []
    for said, cell in records:
        error = cell["errors"]["fedit"]
        rows.append([said, *(f"{fmean(part):.3f}" for part in (error[:10], error[-10:]))])
    return table(["", "rounds 1 to 10", "last 10 rounds"], rows)


def aggregation(records: Records) -> list[str]:
    """The aggregation error by number of clients, then by local steps."""
    by_clients = [
        (f"{cell['cell']['partition.clients']} clients, 3 local steps", cell)
        for cell in records["error-clients"]["cells"]
    ]
    steps = [
        (f"20 clients, {cell['cell']['train.local_steps']} local steps", cell)
        for cell in records["local-steps"]["cells"]
    ]
    return lost(
        [*by_clients, *steps, ("20 clients, 3 local steps", records["trec-top"]["cells"][0])]
    )


def clients(records: Records) -> list[str]:
    """Accuracy by number of clients, with the same number of samples in all."""
    cells = {str(n): records[f"snippets-{n}"]["cells"][0] for n in (3, 20, 50)}
    usual = records["snippets-20"]
    return [*by_value("partition.clients", cells, usual), "", *tried(usual)]


def changed(study: str, key: str, usual: str) -> Table:
    """The table of a study that changes one key; trec-top has its usual value."""

    def lines(records: Records) -> list[str]:
        cells = {usual: records["trec-top"]["cells"][0], **cells_of(records[study], key)}
        return by_value(key, cells, records[study])

    return (study, "trec-top"), lines


def cells_of(record: Record, key: str) -> dict[str, Record]:
    """A study's cells by the value of the key in which they differ, in its order."""
    cells = sorted(record["cells"], key=lambda cell: cell["cell"][key])
    return {str(cell["cell"][key]): cell for cell in cells}


def fifty(records: Records) -> list[str]:
    """50 clients, each method at the rate that tuning with 50 clients chose."""
    record = records["snippets-50-rate"]
    return by_value("train.lr", cells_of(record, "train.lr"), record)


def spent(records: Records) -> list[str]:
    """How long everything took, and the largest aggregation error of the exact methods."""
    hours = sum(record["core_hours"] for record in records.values())
    errors = [
        max(rounds, default=0.0)
        for record in records.values()
        for cell in record["cells"]
        for method, rounds in cell.get("errors", {}).items()
        if method.startswith(("rolora", "ffa_lora"))
    ]
    return [
        f"The {len(records)} studies took {hours:.1f} core-hours of training. The largest "
        f"aggregation error of RoLoRA and FFA-LoRA in any round was {max(errors):.1e}."
    ]


@dataclass(frozen=True)
class Contrast:
    """A question that was written down before its runs: two methods' scores, by seed."""

    study: str
    question: str
    ours: Mapping[int, float]
    theirs: Mapping[int, float]

    @property
    def paired(self) -> tuple[list[float], list[float]]:
        """The scores of the seeds on which neither diverged."""
        seeds = sorted(self.ours.keys() & self.theirs.keys())
        return [self.ours[seed] for seed in seeds], [self.theirs[seed] for seed in seeds]

    @property
    def difference(self) -> Mapping[str, Any]:
        """Its mean and interval, as in a record."""
        mean = fmean(self.paired[0]) - fmean(self.paired[1])
        return {"mean": mean, "interval": interval(*self.paired)}

    @property
    def p(self) -> float:
        """Of the paired t-test, two-sided."""
        return float(ttest_rel(*self.paired).pvalue)

    @property
    def equal(self) -> bool:
        """Whether two one-sided tests at 5 % say that the mean is within ``EQUAL``."""
        low, high = ttest_rel(*self.paired).confidence_interval(0.90)
        return bool(low > -EQUAL and high < EQUAL)


def at(cell: Record, method: str, axis: str) -> tuple[dict[int, float], dict[int, float]]:
    """The scores of the study's first method and of this one at an equal budget, by seed.

    More is better: a perplexity counts as minus its logarithm, so that 0.01 is one per cent of it.
    """
    (budget,) = (one for one in cell["pairs"][method] if one["equal"] == axis)
    falls = cell["metric"] == "perplexity"
    scores = {
        place["method"]: {
            seed: -math.log(value) if falls else value
            for seed, value in zip(place["seeds"], place["values"], strict=True)
        }
        for place in budget["places"]
    }
    return scores[cell["reference"]], scores[method]


def final(cell: Record, method: str) -> dict[int, float]:
    """The scores of a method at the end of its runs, by seed."""
    if method == cell["reference"]:
        return at(cell, next(iter(cell["pairs"])), "rounds")[0]
    return at(cell, method, "rounds")[1]


def strongest(cell: Record, methods: Iterable[str]) -> str:
    """The method with the highest mean score at the bytes of the study's first method."""
    return max(methods, key=lambda method: fmean(at(cell, method, "megabytes")[1].values()))


def others(cell: Record) -> list[str]:
    """The methods that are no form of RoLoRA."""
    return [method for method in cell["pairs"] if not method.startswith("rolora")]


def contrasts(records: Records) -> Iterator[Contrast]:
    """The registered questions, for the cells that have been run."""
    for study, key, name in (
        ("e1", "partition.clients", "E1, {} clients"),
        ("e2", "partition.clients", "E2, {} clients"),
        ("e3", "train.schedule", "E3, {} rate"),
        ("e3-dirichlet", "partition.alpha", "E3, Dirichlet {}"),
    ):
        if study not in records:
            continue
        for value, cell in cells_of(records[study], key).items():
            where = name.format(value)
            yield Contrast(where, "the turn − RoLoRA", *at(cell, "rolora", "megabytes"))
            best = strongest(cell, others(cell))
            question = f"the turn − `{label(best)}`, equal bytes"
            yield Contrast(where, question, *at(cell, best, "megabytes"))
    for study, where in (("kept", "TREC"), ("e4", "E4, six people")):
        plain, kept = cells_of(records[study], "train.keep_moments").values()
        ours, fresh = final(kept, "rolora"), final(plain, "rolora")
        yield Contrast(where, "kept moments − fresh ones, RoLoRA", ours, fresh)
        for cell, way in ((plain, "fresh"), (kept, "kept")):
            best = strongest(cell, others(cell))
            question = f"RoLoRA with kept moments − `{best}` with {way} ones, equal bytes"
            ours, theirs = at(kept, best, "megabytes")[0], at(cell, best, "megabytes")[1]
            yield Contrast(where, question, ours, theirs)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): the k-th smallest of n times n − k + 1, never falling."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


def answers(records: Records) -> list[str]:
    """Each registered question, with its difference, Holm's p over all of them, and the answer."""
    asked = list(contrasts(records))
    rows = []
    for one, p in zip(asked, holm([one.p for one in asked]), strict=True):
        found = one.difference
        said = ["ahead" if found["mean"] > 0 else "behind"] if p < 0.05 else []
        said += [f"equal within {100 * EQUAL:.0f} points"] if one.equal else []
        answer = ", but ".join(said) or "cannot tell"
        rows.append([one.study, one.question, signed(found), f"{p:.2g}", answer])
    return table(["setting", "question", "difference", "p (Holm)", "answer"], rows)


def by_budget(records: Records) -> list[str]:
    """RoLoRA with the cure of each study, less the usual alternatives, at two equal budgets."""
    settings = [
        (f"{rows}, {clients} even clients", "`turn=1.0`", cell)
        for rows, study in (("digits", "e1"), ("questions, frozen head", "e2"))
        if study in records
        for clients, cell in cells_of(records[study], "partition.clients").items()
    ]
    for schedule, cell in cells_of(records["e3"], "train.schedule").items():
        settings.append((f"digits, one digit a client, {schedule} rate", "`turn=1.0`", cell))
    if "e3-dirichlet" in records:
        for alpha, cell in cells_of(records["e3-dirichlet"], "partition.alpha").items():
            settings.append((f"digits, ten clients, Dirichlet {alpha}", "`turn=1.0`", cell))
    for rows_of, study in (
        ("questions, 20 uneven clients", "kept"),
        ("six people's lines (per cent of perplexity)", "e4"),
    ):
        *_, kept = cells_of(records[study], "train.keep_moments").values()
        settings.append((rows_of, "kept moments", kept))
    rows = [
        [where, cure, f"`{label(method)}`", *(signed(less(cell, method, axis)) for axis in AXES)]
        for where, cure, cell in settings
        for method in ("fedit", "fedit (scaled=True)", "fedex_lora", "ffa_lora")
        if method in cell["pairs"]
    ]
    return table(["rows", "RoLoRA with", "minus", *AXES.values()], rows)


def less(cell: Record, method: str, axis: str) -> Mapping[str, Any]:
    """The study's first method minus this one at an equal budget: the mean and its interval."""
    return Contrast("", "", *at(cell, method, axis)).difference


def in_columns(record: Record, key: str) -> list[str]:
    """Scores of each method, a column for each value of ``key``; then differences and rates."""
    cells = cells_of(record, key)
    every = list(cells.values())
    first, results, apart, rates = every[0]["reference"], [], [], []
    for method in sorted((row["method"] for row in every[0]["methods"]), key=lambda m: m != first):
        name = f"`{label(method)}`"
        results.append([name, *(scored(cell, method, record) for cell in every)])
        rates.append([name, *(rate(cell, method) for cell in every)])
        if method != first:
            found = (signed(at_equal(cell, method, axis)) for axis in AXES for cell in every)
            apart.append([name, *found])
    heads = [f"{key.partition('.')[2]} {value}" for value in cells]
    both = [f"{head}, {axis}" for axis in AXES.values() for head in heads]
    return [
        *table(["accuracy, %", *heads], results),
        "",
        *table([f"minus `{label(first)}`", *both], apart),
        "",
        *table(["rate", *heads], rates),
        "",
        setting(record),
    ]


def scored(cell: Record, method: str, record: Record) -> str:
    """A method's score in a cell, and how many of its runs diverged."""
    row = next((row for row in cell["methods"] if row["method"] == method), None)
    if row is None:
        return "diverged"
    lost = len(record["seeds"]) - row["runs"]
    score = percent(row["final_mean"], row["final_sd"])
    return f"{score}, {lost} of {len(record['seeds'])} diverged" if lost else score


def rate(cell: Record, method: str) -> str:
    """The rate that this cell's tuning chose for a method; '*' marks the end of the grid."""
    plain = label(method)
    for one in (cell.get("tuning") or {"methods": ()})["methods"]:
        if one["method"] == plain:
            return ", ".join(v + "*" * (k in one["at_edge"]) for k, v in one["best"].items())
    return ""


def inexact(records: Records) -> list[str]:
    """What FedAvg of LoRA loses by averaging: FedEx-LoRA minus it, by number of clients."""
    cells = cells_of(records["e1"], "partition.clients")
    (moved,) = records["e1-transfer"]["cells"]
    rows = []
    for clients, cell, tuned in [
        *((clients, cell, cell) for clients, cell in cells.items()),
        ("50, at the rates of 5", moved, cells["5"]),
    ]:
        exact, mixed = (final(cell, method) for method in ("fedex_lora", "fedit"))
        found = signed(Contrast("E1", "", exact, mixed).difference)
        error = f"{fmean(cell['errors']['fedit']):.2g}"
        rates = f"{rate(tuned, 'fedex_lora')}, {rate(tuned, 'fedit')}"
        rows.append([clients, rates, found, error])
    head = ["clients", "rates", "`fedex_lora` − `fedit`", "relative error of `fedit`'s mean"]
    return table(head, rows)


def transferred(records: Records) -> list[str]:
    """Fifty clients at the rates of five: scores, and what the wrong rate costs."""
    record = records["e1-transfer"]
    (cell,) = record["cells"]
    own = cells_of(records["e1"], "partition.clients")["50"]
    rows = []
    for method in (row["method"] for row in cell["methods"]):
        apart = Contrast("E1", "", final(cell, method), final(own, method)).difference
        scores = (scored(one, method, record) for one in (cell, own))
        rows.append([f"`{label(method)}`", *scores, signed(apart)])
    return table(["fifty clients", "rate of five", "rate of fifty", "difference"], rows)


def swings(record: Record, key: str) -> list[str]:
    """The mean of the last evaluations and the swing below it, for each cell."""
    cells = cells_of(record, key)
    rows = []
    for method in next(iter(cells.values()))["curves"]:
        runs = (cell["curves"].get(method, {}).values() for cell in cells.values())
        rows.append([f"`{label(method)}`", *(lately(own) if own else "diverged" for own in runs)])
    return table([LATELY, *cells], rows)


def bounds(records: Records) -> list[str]:
    """E3's rows in one place, and every client for itself."""
    record = records["e3-bounds"]
    cells = cells_of(record, "train.schedule")
    rows = [
        [
            f"`{method}`",
            *(f"{scored(c, method, record)} ({rate(c, method)})" for c in cells.values()),
        ]
        for method in record["methods"]
    ]
    return [*table(["accuracy, % (rate)", *cells], rows), "", setting(record)]


def heterogeneous(records: Records) -> list[str]:
    """E3: scores, differences and swings, for each schedule."""
    columns = in_columns(records["e3"], "train.schedule")
    return [*columns, "", *swings(records["e3"], "train.schedule")]


def moments(records: Records) -> list[str]:
    """Each method with fresh and with kept moments, and its swing."""
    record = records["kept"]
    rows = []
    for method, way, cell, row in by_moments(record):
        late, up = lately(cell["curves"][method].values()), f"{row['megabytes_up']:.1f}"
        score = scored(cell, method, record)
        rows.append([f"`{method}`", way, rate(cell, method), score, late, up])
    head = ["method", "moments", "rate, head's ratio", "accuracy, %"]
    head += [LATELY, "MB up"]
    return [*table(head, rows), "", setting(record)]


def by_moments(record: Record) -> Iterator[tuple[str, str, Record, Record]]:
    """(method, "fresh" or "kept", cell, the method's results in it), for a study of moments."""
    for method in record["methods"]:
        for way, cell in zip(
            ("fresh", "kept"), cells_of(record, "train.keep_moments").values(), strict=True
        ):
            row = next(row for row in cell["methods"] if row["method"] == method)
            yield method, way, cell, row


def language(records: Records) -> list[str]:
    """E4: perplexities, and RoLoRA with the same moments less each method, in per cent of it."""
    record = records["e4"]
    rows = []
    for method, way, cell, row in by_moments(record):
        usual = method == cell["reference"]
        apart = ["", ""] if usual else [signed(less(cell, method, axis)) for axis in AXES]
        score = f"{row['final_mean']:.2f} ± {row['final_sd']:.2f}"
        up = f"{row['megabytes_up']:.1f}"
        rows.append([f"`{method}`", way, rate(cell, method), score, *apart, up])
    head = ["method", "moments", "rate", "perplexity"]
    head += [f"`rolora`'s lead, {name}, %" for name in AXES.values()] + ["MB up"]
    return [*table(head, rows), "", setting(record)]


# table -> the studies that it needs, and how it is made from them
TABLES: Mapping[str, Table] = {
    "spent": ((), spent),
    "answers": (("e1", "e3", "e4", "kept"), answers),
    "e1": (("e1",), lambda records: in_columns(records["e1"], "partition.clients")),
    "e1-inexact": (("e1", "e1-transfer"), inexact),
    "e1-transfer": (("e1", "e1-transfer"), transferred),
    "e2": (("e2",), lambda records: in_columns(records["e2"], "partition.clients")),
    "e3": (("e3",), heterogeneous),
    "e3-bounds": (("e3-bounds",), bounds),
    "e3-dirichlet": (
        ("e3-dirichlet",),
        lambda records: in_columns(records["e3-dirichlet"], "partition.alpha"),
    ),
    "e4": (("e4",), language),
    "kept": (("kept",), moments),
    "mnist-epochs": (("mnist-epochs",), lambda records: broken_map(records["mnist-epochs"])),
    "mnist-rank": (("mnist-rank",), lambda records: broken_map(records["mnist-rank"])),
    "mnist-clients": (("mnist-clients",), lambda records: broken_map(records["mnist-clients"])),
    "trec": (("trec",), lambda records: compared(records["trec"])),
    "trec-top": (("trec-top",), lambda records: compared(records["trec-top"])),
    "snippets": (("snippets-3", "snippets-20", "snippets-50"), clients),
    "snippets-50-rate": (("snippets-50-rate",), fifty),
    "rank": changed("rank", "lora.rank", "2"),
    "local-steps": changed("local-steps", "train.local_steps", "3"),
    "dirichlet": changed("dirichlet", "partition.alpha", "0.5"),
    "aggregation": (("error-clients", "local-steps", "trec-top"), aggregation),
}


def draw(record: Record) -> Figure:
    """Accuracy against rounds and megabytes sent: means over seeds, bands from least to most."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        names = ("round", "MB sent up by all clients")
        for column, axes in enumerate(figure.subplots(1, 2, sharey=True)):
            curves(axes, record["cells"][0]["curves"], column)
            axes.set_xlabel(names[column])
        figure.axes[0].set_ylabel("accuracy")
        figure.axes[0].legend(frameon=False)
        figure.axes[1].set_xlim(0, None)
        return figure


def curves(axes: Axes, methods: Mapping[str, Mapping[str, Any]], column: int) -> None:
    """A line for each method."""
    for style, (method, seeds) in enumerate(methods.items()):
        runs = list(seeds.values())
        x = [point[column] for point in runs[0]]
        values = [[run[k][2] for run in runs] for k in range(len(x))]
        colour = PALETTE[style]
        axes.fill_between(x, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.15)
        (line,) = axes.plot(x, [*map(fmean, values)], color=colour, ls=DASHES[style], label=method)
        line.set(marker=MARKERS[style], markevery=max(1, len(x) // 8), markersize=5)


def choosing(text: str, records: Records) -> str:
    """The page on choosing with its table replaced."""
    return put(text, "results:choosing", by_budget(records))


def page(text: str, records: Records) -> str:
    """The page with every table between its marks replaced."""
    for name, (needed, lines) in TABLES.items():
        missing = [study for study in needed if study not in records]
        shown = [f"*Not run yet: {', '.join(missing)}.*"] if missing else lines(records)
        text = put(text, f"results:{name}", shown)
    return text


if __name__ == "__main__":
    found = read_records()
    write_file(PAGE, page(PAGE.read_text(encoding="utf-8"), found))
    write_file(CHOOSING, choosing(CHOOSING.read_text(encoding="utf-8"), found))
    for study in {"e3", "trec"} & found.keys():
        save_picture(draw(found[study]), HERE / f"results-{study}.png")
