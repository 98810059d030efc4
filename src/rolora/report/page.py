"""Runs as one HTML page that opens offline: the reading in words, tables, figures, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import tomli_w

from rolora.errors import ConfigError
from rolora.files import write_file
from rolora.report import figures, narrative
from rolora.report.pictures import pictures
from rolora.report.svg import inline_svg
from rolora.results.published import Published, beside
from rolora.results.ranking import standing
from rolora.results.runs import (
    Run,
    by_method,
    differing,
    load_run,
    primary_metric,
    sound,
    summarise,
)
from rolora.results.tuned import Tuning


def write_report(
    runs: Sequence[Path],
    out: Path,
    tuning: Tuning | None = None,
    published: Published | None = None,
) -> Path:
    """Write one self-contained HTML page about ``runs`` to ``out``, and return ``out``.

    ``tuning`` is how their settings were chosen, ``published`` what a paper says of the same
    methods. The same arguments give the same bytes. Raises ConfigError or DataError (see
    ``load_run`` and ``primary_metric``).
    """
    if not runs:
        raise ConfigError("a report needs at least one run folder")
    folders = dict.fromkeys(Path(run).resolve() for run in runs)
    page = render([load_run(folder) for folder in folders], tuning, published)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    return out


def render(
    every: Sequence[Run], tuning: Tuning | None = None, published: Published | None = None
) -> str:
    """The page's HTML."""
    runs = sound(every)
    metric = primary_metric(runs)
    groups = by_method(runs)
    rows = summarise(runs)
    verdicts = narrative.verdicts(runs)
    names = {run.name for run in runs}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "score": narrative.score,
        "megabytes": narrative.megabytes,
        "apart": narrative.apart,
        "spending": narrative.spending,
    }
    return environment.get_template("page.html.j2").render(
        title=names.pop() if len(names) == 1 else f"{len(groups)} methods compared",
        about=narrative.about(runs),
        verdicts=verdicts,
        reference=next(iter(groups)),
        cautions=narrative.cautions(every, tuning.keys if tuning else ()),
        tuning=tuning,
        published=published,
        beside=beside(published, runs) if published else [],
        metric=metric,
        direction=narrative.direction(metric),
        rows=rows,
        rounding=figures.ROUNDING,
        palette=list(enumerate(figures.PALETTE)),
        keys={m: (n, inline_svg(figures.key(n), f"key-{n}")) for n, m in enumerate(groups)},
        pictures=pictures(runs, groups, metric, standing(runs, metric, "megabytes"), verdicts),
        rejected=_rejected(every),
        configs=[(run.label, tomli_w.dumps(run.config)) for run in every],
        **_origins(every),
    )


def _rejected(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """(run, client, reason, rounds) of every kind of refusal."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for run in runs:
        for line in run.rounds:
            for client, reason in line["rejected"].items():
                found.setdefault((run.label, client, reason), []).append(line["round"])
    return [(*what, ", ".join(map(str, rounds))) for what, rounds in found.items()]


def _origins(runs: Sequence[Run]) -> dict[str, Any]:
    """What each run was made with: ``shared`` by all, and a table of the rest, one row a run.

    The folder it ran in is left out: a page is made to be shown to others.
    """
    tables = []
    for run in runs:
        made = {key: value for key, value in run.provenance.items() if key != "root"}
        tables.append({**made.pop("versions", {}), **made})
    names = list(dict.fromkeys(name for table in tables for name in table))
    apart = differing(tables)
    rows = zip(runs, tables, strict=True)
    return {
        "shared": [f"{name} {tables[0][name]}" for name in names if name not in apart],
        "origin_names": apart,
        "origins": [(run.label, [table.get(n, "") for n in apart]) for run, table in rows],
    }
