"""Runs as one HTML page that opens offline: conclusions, tables, figures, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import tomli_w

from rolora.errors import ConfigError
from rolora.files import write_file
from rolora.report import figures, narrative
from rolora.report.pictures import AXES, are_finished, pictures, values
from rolora.report.svg import inline_svg
from rolora.results.defence import Cut, cuts, defence
from rolora.results.labels import label_recalls
from rolora.results.layers import MEASURES, last_layers
from rolora.results.published import Published, beside_published
from rolora.results.runs import (
    RunRecord,
    by_method,
    differing,
    load_run,
    on_second_rows,
    sorted_out,
    summarise,
)
from rolora.results.samples import side_by_side
from rolora.results.tuned import Tuning

MOST_PLACES = 6  # of each ranking, before the reader asks for the rest
UNUSED_ROWS = 100
CUT_ROWS = 20  # of each run: the clients that were cut most
# key of a run's provenance -> what it is called on the page, where that differs
NAMES = {
    "git_commit": "git commit",
    "cpu": "processor",
    "bank": "clients trained at once",
    "dtype": "dtype of the base",
    "prefix": "outputs of frozen layers from the cache",
    "data": "hash of the rows",
    "base": "hash of the base's weights",
    "init_from": "hash of the adapter it started from",
    "config": "hash of the settings",
}


def write_report(
    runs: Sequence[Path],
    out: Path,
    tuning: Tuning | None = None,
    published: Published | None = None,
) -> Path:
    """Write a self-contained HTML page about ``runs`` to ``out``, and return ``out``.

    ``tuning`` is how their settings were chosen, ``published`` the published results of the same
    methods. The same arguments give the same bytes. Raises ConfigError or DataError (see
    ``load_run`` and ``primary_metric``).
    """
    if not runs:
        raise ConfigError("a report needs at least one run folder")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name the page to write, such as {out / 'page.html'}")
    folders = dict.fromkeys(Path(run).resolve() for run in runs)
    page = render([load_run(folder) for folder in folders], tuning, published)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    return out


def render(
    every: Sequence[RunRecord], tuning: Tuning | None = None, published: Published | None = None
) -> str:
    """The page's HTML."""
    found = sorted_out(every)
    runs, metric, groups = found.finished, found.metric, found.methods
    conclusions = narrative.conclusions(runs) if runs else [narrative.nothing_finished(found)]
    left, finished = runs or found.unfinished, by_method(runs)
    defended = [(run.label, one) for run in every if (one := defence(run))]
    labels = label_recalls(finished)
    names = {run.name for run in left}
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            title=names.pop() if len(names) == 1 else f"{len(groups)} methods compared",
            about=narrative.describe_runs(left),
            conclusions=conclusions,
            reference=next(iter(groups), ""),
            cautions=narrative.cautions(every, tuning.keys if tuning else ()),
            tuning=tuning,
            seed_heads=[f"seed {seed}" for seed in tuning.seeds] if tuning else [],
            published=published,
            beside=beside_published(published, runs) if published and runs else [],
            metric=metric,
            direction=narrative.direction(metric),
            rows=summarise(runs),
            second=on_second_rows(runs, metric),
            unfinished=[(run, run.last(metric)) for run in found.unfinished],
            most_places=MOST_PLACES,
            rounding=figures.ROUNDING,
            keys={
                method: (n, inline_svg(figures.key(n, are_finished(own)), f"key-{n}"))
                for n, (method, own) in enumerate(groups.items())
            },
            pictures=pictures(left, groups, metric, conclusions),
            axes=[axis.label for axis in AXES],
            values=values(groups, metric),
            samples=side_by_side(finished),
            labels=labels,
            layers=last_layers(finished),
            measures={measure: title for measure, (title, _) in MEASURES.items()},
            recalled=list(dict.fromkeys(method for one in labels for method in one.methods)),
            unused={
                "Rejected updates": _unused(every, "rejected"),
                "Updates that did not come": _unused(every, "missing"),
            },
            most_unused=UNUSED_ROWS,
            defended=defended,
            attacked=any(one.attackers for _, one in defended),
            cut=[(run.label, one) for run in every for one in _most_cut(run)],
            spans=spans,
            configs=[(run.label, tomli_w.dumps(run.config)) for run in every],
            **_provenance(every),
        )
    )


def templates() -> jinja2.Environment:
    """The templates of pages, with the filters that write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(("html.j2",), default=False),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["palette"] = figures.PALETTE
    environment.filters |= {
        function.__name__: function
        for function in (
            *(narrative.format_metric, narrative.format_difference),
            *(narrative.format_megabytes, narrative.format_spent, narrative.escaped),
        )
    }
    return environment


def _unused(runs: Sequence[RunRecord], why: str) -> list[tuple[str, str, str, int, str]]:
    """(run, client, reason, how often, rounds) of all updates that are "rejected" or "missing", the
    most frequent first."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for run in runs:
        for line in run.rounds:
            for client, reason in line[why].items():
                found.setdefault((run.label, client, reason), []).append(line["round"])
    most = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(*what, len(rounds), spans(rounds)) for what, rounds in most]


def _most_cut(run: RunRecord) -> list[Cut]:
    """The clients that were cut most, and all attackers."""
    every = cuts(run)
    return every[:CUT_ROWS] + [one for one in every[CUT_ROWS:] if one.attacks]


def spans(rounds: Sequence[int], most: int | None = None) -> str:
    """'1-3, 7': ascending numbers, with those that follow each other as a span; ``most`` spans."""
    found: list[list[int]] = []
    for round in rounds:
        if found and round == found[-1][-1] + 1:
            found[-1] = [found[-1][0], round]
        else:
            found.append([round])
    more = [] if most is None or len(found) <= most else [f"and {len(found) - most} more"]
    return ", ".join(["-".join(map(str, span)) for span in found[:most]] + more)


def _provenance(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What all runs have in common (``shared``), and a table of the rest, one row for each run.

    The folder that a run was started from, and its name at its sites, are left out: pages are made
    to be shared.
    """
    tables = []
    for run in runs:
        made = {key: value for key, value in run.provenance.items() if key not in ("root", "run")}
        tables.append({**made.pop("versions", {}), **made})
    names = dict.fromkeys(name for table in tables for name in table)
    apart = differing(tables)
    rows = zip(runs, tables, strict=True)
    return {
        "shared": [
            f"{NAMES[n]}: {v}" if n in NAMES else f"{n} {v}"
            for n in names
            if n not in apart and (v := tables[0][n]) not in ("", None)
        ],
        "provenance_names": [NAMES.get(n, n) for n in apart],
        "provenance": [(run.label, [table.get(n, "") for n in apart]) for run, table in rows],
    }
