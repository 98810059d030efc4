"""Runs the studies behind docs/results.md and writes a record of each, cell by cell.

    python experiments/run_studies.py               # all of studies.toml, one after another
    python experiments/run_studies.py trec rank     # these
    python docs/make_results.py                     # the page, from the records

A study is one comparison (``rolora compare``) for each combination of its ``cells``. Runs that are
already in ``runs/studies`` are not repeated, so a stopped study continues. A process uses
OMP_NUM_THREADS threads; the records were made with one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

import rolora
from rolora.comparison.folder import ComparisonFolder
from rolora.errors import AllDiverged
from rolora.files import write_file
from rolora.results.export import export_results
from rolora.results.runs import RunRecord, by_method, load_run, primary_metric
from rolora.training.local import NonFiniteLoss

HERE = Path(__file__).parent
RECORDS = HERE / "records"
FOLDER = Path("runs") / "studies"


@dataclass(frozen=True)
class Study:
    """One or several comparisons of the same methods.

    ``cells`` maps keys to values; each combination is a comparison. ``rates_of`` names the study
    whose tuned values are used if this one does not ``tune``.
    """

    name: str
    config: str
    methods: Sequence[str]
    seeds: Sequence[int]
    overrides: Sequence[str] = ()
    cells: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune: Sequence[str] = ()
    tune_seeds: Sequence[int] = ()
    rates_of: str | None = None

    def each(self) -> Iterator[dict[str, Any]]:
        """Every combination of the values; one empty combination if there are no cells."""
        for values in itertools.product(*self.cells.values()):
            yield dict(zip(self.cells, values, strict=True))


def studies() -> dict[str, Study]:
    """All of ``studies.toml`` by name."""
    tables = tomllib.loads((HERE / "studies.toml").read_text(encoding="utf-8"))
    return {name: Study(name, **table) for name, table in tables.items()}


def tuned(name: str) -> dict[str, list[str]]:
    """The values that another study chose for each method, as overrides."""
    record = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    methods = record["cells"][0]["tuning"]["methods"]
    return {m["method"]: [f"{k}={v}" for k, v in m["best"].items()] for m in methods}


def run(study: Study, console: Console) -> None:
    """Run what is missing on disk; after each cell, write the record of those that have ended."""
    only = {} if study.rates_of is None else tuned(study.rates_of)
    cells = []
    for cell in study.each():
        cells.append(run_cell(study, cell, only, console))
        record = {
            "study": study.name,
            "config": study.config,
            "overrides": list(study.overrides),
            "methods": list(study.methods),
            "seeds": list(study.seeds),
            "rates_of": study.rates_of,
            "alone": only,
            "core_hours": round(sum(cell["core_seconds"] for cell in cells) / 3600, 2),
            "cells": cells,
        }
        RECORDS.mkdir(exist_ok=True)
        write_file(RECORDS / f"{study.name}.json", text_of(record))


def text_of(record: Mapping[str, Any]) -> str:
    """A record as JSON, each cell on one line."""
    *rest, last = json.dumps({**record, "cells": []}, indent=1).splitlines()
    cells = ",\n".join(f"  {json.dumps(cell)}" for cell in record["cells"])
    return "\n".join([*rest[:-1], ' "cells": [', cells, " ]", last]) + "\n"


def run_cell(
    study: Study, cell: Mapping[str, Any], only: Mapping[str, Sequence[str]], console: Console
) -> dict[str, Any]:
    """Run one comparison to its end and return its part of the record."""
    overrides = [*study.overrides, *(f"{key}={value}" for key, value in cell.items())]
    out = FOLDER / study.name / ("-".join(map(str, cell.values())) or "whole")
    config = rolora.load_config(HERE / study.config, overrides)
    own = {method: only.get(method, ()) for method in study.methods}
    tuning = (study.tune, study.tune_seeds)
    with contextlib.suppress(AllDiverged):  # there is no page then, but a line in the map
        for one in rolora.compare(config, study.methods, study.seeds, out, own, *tuning):
            console.print(f"{one.folder.path}: {train(one, study.name, console)}")
    return read_cell(out, study, cell)


def train(one: Any, name: str, console: Console) -> str:
    """Train one run to its end and return a line about its result."""
    started = time.monotonic()
    try:
        for result in one.rounds():
            console.print(f"{name}: {one.folder.path}: round {result.round}", end="\r")
        text = ", ".join(f"{key} {value:.4f}" for key, value in result.metrics.items())
    except NonFiniteLoss as error:
        text = f"diverged: {error}"
    return f"{text}   {time.monotonic() - started:.0f} s"


def read_cell(out: Path, study: Study, cell: Mapping[str, Any]) -> dict[str, Any]:
    """The results in a comparison's folder, with all curves."""
    finals = [load_run(out / f"{m}-seed{s}") for s in study.seeds for m in study.methods]
    every = finals + [load_run(path.parent) for path in out.glob("tuning/*/config.toml")]
    seconds = sum(line["seconds"] for one in every for line in one.rounds)
    made = {key: finals[0].provenance[key] for key in ("versions", "cpu", "threads", "git_commit")}
    record = {"cell": dict(cell), "core_seconds": round(seconds * made["threads"]), "made": made}
    runs = [one for one in finals if one.finished]
    if not runs:
        return {**record, "diverged": {one.path.name: one.diverged for one in finals}}
    first, *others = by_method(runs)
    pairs = {
        other: export_results([*by_method(runs)[first], *by_method(runs)[other]])["budgets"]
        for other in others
    }
    whole = export_results(finals, ComparisonFolder(out).tuning())
    del whole["budgets"]  # all methods share these; pairs of methods have larger ones
    return {**record, **whole, "pairs": pairs, "curves": curves(runs), "errors": errors(runs)}


def curves(runs: Sequence[RunRecord]) -> dict[str, dict[int, list[list[float]]]]:
    """Method -> seed -> [round, megabytes up, metric] of every evaluated round."""
    metric = primary_metric(runs)
    return {
        method: {
            one.seed: [[p.round, round(p.up, 4), round(p.value, 5)] for p in one.curve(metric)]
            for one in own
        }
        for method, own in by_method(runs).items()
    }


def errors(runs: Sequence[RunRecord]) -> dict[str, list[float]]:
    """Method -> mean over seeds of the relative aggregation error, round by round."""
    lines = {
        method: [[line["aggregation_error"] for line in one.rounds] for one in own]
        for method, own in by_method(runs).items()
    }
    return {
        method: [float(f"{fmean(at):.3g}") for at in zip(*own, strict=True) if None not in at]
        for method, own in lines.items()
    }


def main(names: Sequence[str]) -> None:
    """Run the named studies, or all."""
    known = studies()
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown study {unknown[0]!r}; known: {', '.join(known)}")
    console = Console(stderr=True)
    for name in names or known:
        run(known[name], console)


if __name__ == "__main__":
    main(sys.argv[1:])
